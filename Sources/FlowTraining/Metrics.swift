import FlowModels
import Foundation
import Torch
import TorchNN

/// One line of `metrics.jsonl`; `Documentation/Metrics.md` explains every key with its formula.
public struct MetricsRow: Sendable {
  /// Iterations done, this one included.
  public var iteration = 0
  /// Optimizer steps done.
  public var update = 0
  /// Named numbers; NaN is written as null.
  public var values: [String: Double] = [:]
  /// Named counts.
  public var counts: [String: Int] = [:]
  /// Sizes of the chunks of the plan; where every sample has its own, of that of the mean change curve.
  public var chunkSizes: [Int] = []
  /// Chance of each of these chunks to be the one drawn next, and to be among the drawn.
  public var drawProbabilities: [Double] = [], inclusion: [Double] = []
  /// Wall-clock seconds of ``parts``, and of what overlaps with them.
  public var seconds: [String: Double] = [:]
  /// What an iteration consists of, in order.
  public static let parts = ["rollout", "decode", "reward", "planning", "update"]

  /// The row as JSON, keys sorted, numbers in shortest round-trip form.
  public func json() throws -> String {
    func number(_ x: Double) -> Any { x.isFinite ? x : NSNull() }
    var object: [String: Any] = values.mapValues(number)
    for (key, value) in counts { object[key] = value }
    object["iteration"] = iteration
    object["update"] = update
    if !chunkSizes.isEmpty {
      object["chunk_sizes"] = chunkSizes
      object["draw_p"] = drawProbabilities.map(number)
      object["draw_inclusion"] = inclusion.map(number)
    }
    object["seconds"] = seconds.mapValues(number)
    let data = try JSONSerialization.data(
      withJSONObject: object, options: [.sortedKeys, .withoutEscapingSlashes])
    return String(decoding: data, as: UTF8.self)
  }
}

/// Wall-clock seconds by part.
struct Stopwatch {
  private(set) var seconds: [String: Double] = [:]
  mutating func time<R>(_ part: String, _ body: () throws -> R) rethrows -> R {
    let start = ContinuousClock.now
    defer {
      let spent = (ContinuousClock.now - start).components
      seconds[part, default: 0] += Double(spent.seconds) + Double(spent.attoseconds) * 1e-18
    }
    return try body()
  }

  /// Counts seconds of one part, spent inside another, as their own.
  mutating func move(_ seconds: Double, from outer: String, to inner: String) {
    self.seconds[outer, default: 0] -= seconds
    self.seconds[inner, default: 0] += seconds
  }

  /// CPU seconds of this process, over all threads.
  static var processSeconds: Double {
    var time = timespec()
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
  }
}

/// A network with the wall-clock seconds of its forward and backward passes, to tell what else an iteration costs.
public final class TimedNetwork: FlowModel {
  private let base: any FlowModel
  private let passesOfRow: Int
  private var clock = Stopwatch()
  private var passes = 0
  private var rows = 0

  /// Times `base`, which takes `passesOfRow` passes of the transformer for a row of latents.
  public init(_ base: any FlowModel, passesOfRow: Int = 1) {
    (self.base, self.passesOfRow) = (base, passesOfRow)
  }

  /// The base network's.
  public var modules: ModuleRegistry { base.modules }

  /// The base network's, timed.
  public func velocity(_ latents: Tensor, times: Tensor, condition: Condition, guidance: Double?) throws
    -> Tensor
  {
    passes += latents.size(0) * passesOfRow
    rows += latents.size(0)
    return try clock.time("") {
      try base.velocity(latents, times: times, condition: condition, guidance: guidance)
    }
  }

  /// Back-propagates through passes of this network.
  func backward(_ output: Tensor, _ gradient: Tensor) throws {
    try clock.time("") { try output.backward(gradient) }
  }

  /// Rows of forward passes since the last call, repeats that fill up a pass included.
  func takeRows() -> Int {
    defer { rows = 0 }
    return rows
  }

  /// Seconds since the last call.
  func takeSeconds() -> Double {
    defer { clock = Stopwatch() }
    return clock.seconds[""] ?? 0
  }

  /// Forward passes since the last call, one a row, rows that only fill a batch included.
  func takePasses() -> Int {
    defer { passes = 0 }
    return passes
  }
}
