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
  /// The policy that ratios are taken against: the one that sampled, unless ``PolicyUpdate/anchored(_:_:conditions:)``
  /// has put a replay in its place.
  public internal(set) var anchor: Anchor

  /// What an old policy said of stored transitions.
  public struct Anchor {
    /// log p, shaped like ``Trajectories/logProbabilities``.
    public internal(set) var logProbabilities: [[Double]]
    /// μ_i of the stochastic steps, [T, S, ...] or longer, float32; nil unless ratios are normalised.
    public internal(set) var means: Tensor?
  }

  /// Wraps trajectories that were sampled elsewhere; `means` [T, S, ...] are those of their steps.
  public init(states: Tensor, clean: Tensor, logProbabilities: [[Double]], means: Tensor? = nil) {
    self.states = states
    self.clean = clean
    self.logProbabilities = logProbabilities
    anchor = Anchor(logProbabilities: logProbabilities, means: means)
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
  /// Whether the means of stochastic steps are kept, which take as much memory as the states.
  public var keepsMeans = false
  /// Called before every forward pass; throws to stop.
  public var beforeStep: () throws -> Void = {}
  /// Called when a batch of samples has arrived: their numbers, their x̂0 and their x_T. What waits for others can begin
  /// with them while the next batch is sampled.
  public var arrived: ((_ samples: [Int], _ clean: Tensor, _ end: Tensor) throws -> Void)?

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
  ///   - paths: one a sample, over the table's schedule; nil takes ``TransitionTable/steps``. Levels that a path leaves
  ///     out are NaN in the trajectories.
  ///   - sharing: this many consecutive samples have one x_0, condition and path, and the moves before the first
  ///     stochastic one are computed once for all of them; 1 shares nothing. Where passes have equally many rows
  ///     (``fillsRows``), not a bit of the result changes.
  ///   - noise: fills ε of sample s at step i.
  /// - Returns: the trajectories.
  public func sample(
    _ network: any FlowModel, initial: Tensor, conditions: [Condition], paths: [SamplingPath]? = nil,
    sharing: Int = 1,
    noise: (_ sample: Int, _ step: Int, _ out: UnsafeMutableBufferPointer<Float>) -> Void
  ) throws -> Trajectories {
    let (samples, steps) = (initial.size(0), table.steps.count)
    let paths = paths ?? [SamplingPath](repeating: table.path, count: samples)
    let skips = paths.contains { $0.moves.count < steps }
    let states = try Tensor.full(
      [steps + 1] + initial.shape, skips ? Double.nan : 0, device: initial.device)
    let clean = try Tensor.zeros(like: initial)
    let means = keepsMeans ? try Tensor.zeros([steps] + initial.shape, device: initial.device) : nil
    var logProbabilities = [[Double]](repeating: [Double](repeating: .nan, count: steps - 1), count: samples)
    try states[0].copy(from: initial)

    func walk(_ walks: [Walk]) throws {
      // Walks of about one length go together; those that have ended leave their rows to repeats.
      let walks = walks.filter { !$0.moves.isEmpty }.sorted { $0.moves.count > $1.moves.count }
      for range in Batches(walks.count, of: batch) {
        let members = Array(walks[range])
        let rows = max(fillsRows ? max(batch, members.count) : members.count, fewestRows)
        let condition = try Condition.stack(
          filled(members, to: rows).map { conditions[$0.samples.lowerBound] })
        var x = try Tensor.cat(
          members.map { walk in
            let s = walk.samples.lowerBound
            return try states[walk.moves[walk.moves.startIndex].from][s..<(s + 1)]
          })
        var previous: Tensor?
        for k in 0..<members[0].moves.count {
          let going = members.prefix { $0.moves.count > k }
          let moves = going.map { $0.moves[$0.moves.startIndex + k] }
          x = try x.narrow(0, 0, moves.count)
          try beforeStep()
          let times = try Tensor(filled(moves, to: rows).map { table.times[$0.from] }).to(x.device)
          var v = try network.velocity(
            try widened(x, to: rows), times: times, condition: condition, guidance: guidance
          )[0..<moves.count]
          let found = v
          if let previous, moves.contains(where: { $0.extrapolation != 0 }) {
            v = try v + (v - previous[0..<moves.count]) * column(moves.map(\.extrapolation), like: v)
          }
          previous = found
          let transitions = moves.map(\.step)
          let mean = try table.mean(x, v, transitions)
          if moves.contains(where: { $0.to == steps }) {
            let estimate = try table.cleanEstimate(x, v, moves.map(\.from))
            for (r, move) in moves.enumerated() where move.to == steps {
              for s in going[r].samples { try clean[s].copy(from: try estimate[r]) }
            }
          }
          x = mean
          if transitions.contains(where: \.isStochastic) {
            x = try table.sample(mean, noise: try noiseTensor(going, moves, like: x, noise), transitions)
            let residuals = try table.meanSquaredResidual(x, mean).doubles()
            for (r, move) in moves.enumerated() where move.step.isStochastic && move.to < steps {
              logProbabilities[going[r].samples.lowerBound][move.from] = table.logProbability(
                meanSquaredResidual: residuals[r], step: move.from)
              try means?[move.from][going[r].samples.lowerBound].copy(from: try mean[r])
            }
          }
          for (r, move) in moves.enumerated() {
            for s in going[r].samples { try states[move.to][s].copy(from: try x[r]) }
          }
        }
        if let arrived, members[0].moves.last!.to == steps {
          let samples = members.flatMap(\.samples)
          let index = try Tensor(samples.map(Int64.init)).to(clean.device)
          try arrived(samples, try clean.indexSelect(0, index), try states[steps].indexSelect(0, index))
        }
      }
    }
    try withoutGrad {
      var started = 0
      if sharing > 1 {
        try walk(
          stride(from: 0, to: samples, by: sharing).map { s in
            Walk(samples: s..<min(s + sharing, samples), moves: paths[s].moves[..<paths[s].stem])
          })
        started = 1
      }
      try walk(
        (0..<samples).map { s in
          Walk(samples: s..<(s + 1), moves: paths[s].moves[(started * paths[s].stem)...])
        })
    }
    return Trajectories(states: states, clean: clean, logProbabilities: logProbabilities, means: means)
  }

  /// Consecutive moves of samples that are still one.
  private struct Walk {
    let samples: Range<Int>
    let moves: ArraySlice<SamplingPath.Move>
  }

  /// `x` with its last row repeated until there are `rows`.
  private func widened(_ x: Tensor, to rows: Int) throws -> Tensor {
    let missing = rows - x.size(0)
    guard missing > 0 else { return x }
    let last = try x[(x.size(0) - 1)..<x.size(0)]
    return try Tensor.cat([x] + [Tensor](repeating: last, count: missing))
  }

  /// ε of every stochastic row; 0 in the others.
  private func noiseTensor(
    _ walks: ArraySlice<Walk>, _ moves: [SamplingPath.Move], like x: Tensor,
    _ noise: (Int, Int, UnsafeMutableBufferPointer<Float>) -> Void
  ) throws -> Tensor {
    let each = x.count / moves.count
    let values = [Float](unsafeUninitializedCapacity: x.count) { buffer, count in
      for (r, (walk, move)) in zip(walks, moves).enumerated() {
        let row = UnsafeMutableBufferPointer(rebasing: buffer[(r * each)..<((r + 1) * each)])
        if move.step.isStochastic {
          noise(walk.samples.lowerBound, move.from, row)
        } else {
          row.initialize(repeating: 0)
        }
      }
      count = x.count
    }
    return try Tensor(values, shape: x.shape).to(x.device)
  }
}

/// Rows of the smallest pass: one row rounds differently from several everywhere, two do in float32 on processors without
/// AVX-512 (seen on an AMD EPYC with AVX2), even the second of two from the first.
let fewestRows = TorchRuntime.nativeBFloat16 ? 2 : 3

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
