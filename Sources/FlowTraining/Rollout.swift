import ChunkGRPO
import FlowModels
import Torch

/// Sampled trajectories, stored once, in float32.
public struct Trajectories {
  /// x_0 … x_T: [T + 1, S, ...].
  public let states: Tensor
  /// x̂0 of the last forward pass: [S, ...].
  public let clean: Tensor
  /// log p of each sample's stochastic steps before the last, by step; NaN where a step has none.
  public let logProbabilities: [[Double]]

  /// Wraps trajectories that were sampled elsewhere.
  public init(states: Tensor, clean: Tensor, logProbabilities: [[Double]]) {
    self.states = states
    self.clean = clean
    self.logProbabilities = logProbabilities
  }

  /// d_i of every sample over its steps, the dynamics that adaptive plans and weighted draws read.
  ///
  /// - Parameter steps: the trainable steps of each sample; nil for 0 … N−1.
  /// - Returns: one curve a sample, with a value for each of its steps.
  public func dynamics(_ distance: Distance, over steps: [Range<Int>]? = nil) throws -> [[Double]] {
    try (0..<states.size(1)).map { s in
      let steps = steps?[s] ?? 0..<(states.size(0) - 2)
      let x = try (steps.lowerBound...steps.upperBound).map { try states[$0][s].floats() }
      return zip(x, x.dropFirst()).map { distance(from: $0, to: $1) }
    }
  }
}

/// Samples trajectories in batches of rows.
public struct Rollout {
  /// The steps.
  public let table: TransitionTable
  /// Guidance scale for networks that embed one.
  public let guidance: Double?
  /// Most rows of one forward pass.
  public let batch: Int
  /// Whether every pass has exactly `batch` rows, short ones filled up with repeats: what a replay needs.
  public let fillsRows: Bool
  /// Called before every forward pass; throws to stop.
  public var beforeStep: () throws -> Void = {}

  /// Creates a sampler.
  public init(table: TransitionTable, guidance: Double?, batch: Int, fillsRows: Bool = false) {
    self.table = table
    self.guidance = guidance
    self.batch = batch
    self.fillsRows = fillsRows
  }

  /// Samples one trajectory a row.
  ///
  /// - Parameters:
  ///   - initial: x_0 [S, ...] float32.
  ///   - conditions: one a sample.
  ///   - noise: fills ε of sample s at step i.
  /// - Returns: the trajectories.
  public func sample(
    _ network: any FlowModel, initial: Tensor, conditions: [Condition],
    noise: (_ sample: Int, _ step: Int, _ out: UnsafeMutableBufferPointer<Float>) -> Void
  ) throws -> Trajectories {
    let samples = initial.size(0)
    let steps = table.steps.count
    let states = try Tensor.zeros([steps + 1] + initial.shape, device: initial.device)
    let clean = try Tensor.zeros(like: initial)
    var logProbabilities = [[Double]](repeating: [Double](repeating: .nan, count: steps - 1), count: samples)
    try states[0].copy(from: initial)
    try withoutGrad {
      for range in Batches(samples, of: batch) {
        let members = filled(Array(range), to: fillsRows ? batch : 0)
        let condition = try Condition.stack(members.map { conditions[$0] })
        var x = try initial[range]
        /// x with as many rows as the pass has, and back.
        func widened(_ x: Tensor) throws -> Tensor {
          guard members.count > range.count else { return x }
          let last = try x[(range.count - 1)..<range.count]
          return try Tensor.cat([x] + [Tensor](repeating: last, count: members.count - range.count))
        }
        for i in 0..<steps {
          try beforeStep()
          let v = try network.velocity(try widened(x), at: i, table, condition, guidance)[0..<range.count]
          if i == steps - 1 { try clean[range].copy(from: try table.cleanEstimate(x, v, step: i)) }
          let rows = [Int](repeating: i, count: range.count)
          let mean = try table.mean(x, v, rows)
          if table.steps[i].isStochastic {
            x = try table.sample(mean, noise: try noiseTensor(range, i, x, noise), rows)
            if i < steps - 1 {
              let residuals = try table.meanSquaredResidual(x, mean).doubles()
              for (s, value) in zip(range, residuals) {
                logProbabilities[s][i] = table.logProbability(meanSquaredResidual: value, step: i)
              }
            }
          } else {
            x = mean
          }
          try states[i + 1][range].copy(from: x)
        }
      }
    }
    return Trajectories(states: states, clean: clean, logProbabilities: logProbabilities)
  }

  private func noiseTensor(
    _ range: Range<Int>, _ step: Int, _ x: Tensor,
    _ noise: (Int, Int, UnsafeMutableBufferPointer<Float>) -> Void
  ) throws -> Tensor {
    let each = x.count / range.count
    let values = [Float](unsafeUninitializedCapacity: each * range.count) { buffer, count in
      for (row, s) in range.enumerated() {
        noise(s, step, UnsafeMutableBufferPointer(rebasing: buffer[(row * each)..<((row + 1) * each)]))
      }
      count = each * range.count
    }
    return try Tensor(values, shape: x.shape).to(x.device)
  }
}

extension FlowModel {
  func velocity(
    _ x: Tensor, at step: Int, _ table: TransitionTable, _ condition: Condition, _ guidance: Double?
  ) throws -> Tensor {
    let times = try Tensor.full([x.size(0)], Double(table.times[step]), device: x.device)
    return try velocity(x, times: times, condition: condition, guidance: guidance)
  }
}

/// `rows` with the last repeated until there are `count`.
///
/// bfloat16 products of few rows round differently from those of many (a batch of 4 samples against one of 30, where
/// measured, in one activation of millions): replay and rollout agree in every bit only with equal numbers of rows.
func filled<Row>(_ rows: [Row], to count: Int) -> [Row] {
  rows + [Row](repeating: rows[rows.count - 1], count: max(0, count - rows.count))
}

/// Consecutive ranges of about equal size, at most `limit` where that leaves none with a single row: products of
/// one row round differently from those of several, and rollout and replay must agree in every bit.
struct Batches: Sequence {
  private let ranges: [Range<Int>]
  init(_ count: Int, of limit: Int) {
    let parts = Swift.max(Swift.min((count + limit - 1) / limit, count / 2), 1)
    ranges = (0..<parts).map { (count * $0 / parts)..<(count * ($0 + 1) / parts) }.filter { !$0.isEmpty }
  }
  /// Rows of the largest range.
  var largest: Int { ranges.map(\.count).max() ?? 0 }
  func makeIterator() -> IndexingIterator<[Range<Int>]> { ranges.makeIterator() }
}
