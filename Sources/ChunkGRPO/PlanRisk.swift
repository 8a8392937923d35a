import Foundation

/// What it costs to treat the steps of a chunk as one, and the plan that costs least: `chunk.plan: auto`.
///
/// Near the old policy the log-ratio of a step is a mean over latents of noise times change of velocity, so it is normal around
/// almost 0: a_i·z_i. The paper's premise is that the dynamics d_i of a step tell how much it matters, so a_i ∝ d_i. A chunk has
/// one ratio, one clip range and one weight, as if its steps were of one scale. In nats, describing step log-ratios by one
/// scale for each chunk rather than by their own costs ½(a²/ā² − 1 − log(a²/ā²)) ≈ (log a_i − log ā)² a step; and a chunk's
/// scale is known only from its own cs_j draws, which costs ½ however many they are, as does every parameter found by maximum
/// likelihood (what AIC counts). With μ_i the mean of log d_i over trajectories,
///
///   risk = Σ_j [ Σ_{i∈j} (μ_i − mean_j μ)² + ½ ].
///
/// Long chunks hide differences, short ones do not average noise out: a boundary is drawn where it explains more than half a nat.
/// No number is chosen but the bounds of the sizes. μ is known from M trajectories only, whose noise τ² looks like differences
/// in proportion to N − K; the unbiased estimate has ½ + τ²/M for each chunk, up to a constant.
///
/// τ² itself must not be the price: it measures how well d is known, which is very well, and a boundary would be drawn at
/// almost every step. How sensitive log p is to the velocity at a step is not part of a_i here: it is known without a
/// pilot and has a knob of its own, ``TimeWeight/equalised``.
public struct PlanRisk: Sendable, Equatable, Codable {
  /// μ_i, the mean over trajectories of log d_i.
  public let curve: [Double]
  /// τ², the variance of log d_i between trajectories after their own levels.
  public let noise: Double
  /// M, the trajectories that were measured.
  public let trajectories: Int

  /// Measures dynamics.
  ///
  /// - Parameter curves: d of at least two trajectories, equally many steps each. A change below a millionth of the
  ///   trajectory's largest counts as that.
  /// - Parameter distance: what d is; `cosine` is about half the square of the others, so its logarithms count half.
  /// - Throws: ``ChunkError/tooFewCurves(_:)``, ``ChunkError/curveLengths(_:)``, ``ChunkError/noSteps(_:)`` or
  ///   ``ChunkError/badCurve(step:value:)``.
  public init(curves: [[Double]], distance: Distance = .l1) throws(ChunkError) {
    guard curves.count > 1 else { throw .tooFewCurves(curves.count) }
    guard curves.allSatisfy({ $0.count == curves[0].count }) else { throw .curveLengths(curves.map(\.count)) }
    guard !curves[0].isEmpty else { throw .noSteps(0) }
    var logs: [[Double]] = []
    for d in curves { logs.append(try Self.logarithms(d, distance)) }
    let spread = NestedVariance(logs.map { [$0] })
    curve = spread.steps
    trajectories = curves.count
    noise = spread.total * spread.promptStep / Double(max(1, (trajectories - 1) * (curve.count - 1)))
  }

  /// log d with a floor under what has no logarithm, halved for `cosine`.
  ///
  /// - Throws: ``ChunkError/badCurve(step:value:)``.
  public static func logarithms(_ d: [Double], _ distance: Distance) throws(ChunkError) -> [Double] {
    if let i = d.firstIndex(where: { !($0.isFinite && $0 >= 0) }) { throw .badCurve(step: i, value: d[i]) }
    let largest = d.reduce(0, max)
    let power = distance == .cosine ? 0.5 : 1
    return d.map { largest > 0 ? power * log(max($0, largest * 1e-6)) : 0 }
  }

  /// Σ (μ_i − mean)² over consecutive steps.
  public func heterogeneity(_ steps: Range<Int>) -> Double {
    let values = curve[steps]
    let mean = values.reduce(0, +) / Double(steps.count)
    return values.reduce(0) { $0 + ($1 - mean) * ($1 - mean) }
  }

  /// What every chunk adds, ½ + τ²/M.
  public var penalty: Double { 0.5 + noise / Double(trajectories) }

  /// The estimated risk of a plan over these steps, in nats.
  public func callAsFunction(_ plan: ChunkPlan) -> Double {
    precondition(plan.steps == curve.count, "a plan of \(plan.steps) steps for a curve of \(curve.count)")
    return plan.ranges.reduce(0) { $0 + heterogeneity($1) + penalty }
  }

  /// The plan of least risk, exactly, by dynamic programming over where the last chunk begins.
  ///
  /// Of plans whose risks agree to rounding the one with fewer chunks, then the one with more even chunks.
  /// - Parameters:
  ///   - stopSize: the largest chunk.
  ///   - minChunk: the smallest chunk, unless there are fewer steps.
  /// - Throws: ``ChunkError/badBounds(stopSize:minChunk:)``.
  public func best(stopSize: Int, minChunk: Int) throws(ChunkError) -> ChunkPlan {
    guard minChunk >= 1, minChunk <= (stopSize + 1) / 2 else {
      throw .badBounds(stopSize: stopSize, minChunk: minChunk)
    }
    struct Prefix {
      var risk = 0.0, chunks = 0, squares = 0, last = 0
    }
    let count = curve.count
    let equal = 1e-12 * (heterogeneity(0..<count) + Double(count) * penalty)  // roundings decide nothing
    var best: [Prefix?] = [Prefix()] + [Prefix?](repeating: nil, count: count)
    for end in 1...count {
      for size in stride(from: min(minChunk, count), through: min(stopSize, end), by: 1) {
        guard var next = best[end - size] else { continue }
        next.risk += heterogeneity(end - size..<end) + penalty
        next.chunks += 1
        next.squares += size * size
        next.last = size
        guard let found = best[end] else {
          best[end] = next
          continue
        }
        let better =
          abs(next.risk - found.risk) > equal
          ? next.risk < found.risk : (next.chunks, next.squares) < (found.chunks, found.squares)
        if better { best[end] = next }
      }
    }
    var sizes: [Int] = []
    var end = count
    while end > 0 {
      // the bounds leave a way to every number of steps from minChunk on
      sizes.append(best[end]!.last)
      end -= sizes[sizes.count - 1]
    }
    return try ChunkPlan(sizes: sizes.reversed())
  }
}

/// Where the variance of curves comes from that are nested as [prompt][sample][step]; equally many of each.
///
/// Sums of squares of the balanced design: steps, prompts, prompts × steps, and the samples of a prompt. They are
/// orthogonal and add up to the total. Samples of S trajectories a prompt leave 1/S of their own variance in the prompts'.
public struct NestedVariance: Sendable, Equatable {
  /// Mean curve over all prompts and samples.
  public let steps: [Double]
  /// Standard deviation (n − 1) at each step of the prompts' mean curves; 0 for one prompt.
  public let betweenPrompts: [Double]
  /// Standard deviation at each step of samples around their prompt's mean curve, pooled; 0 for one sample each.
  public let withinPrompts: [Double]
  /// Sum of squares around the grand mean.
  public let total: Double
  /// Shares of ``total``; 0 if all curves are flat and equal.
  public let step, prompt, promptStep, sample: Double

  /// Splits up the variance of at least one curve.
  public init(_ curves: [[[Double]]]) {
    let (prompts, samples, count) = (curves.count, curves[0].count, curves[0][0].count)
    precondition(
      curves.allSatisfy { $0.count == samples && $0.allSatisfy { $0.count == count } }, "ragged curves")
    func mean(_ curves: [[Double]]) -> [Double] {
      (0..<count).map { i in curves.reduce(0) { $0 + $1[i] } / Double(curves.count) }
    }
    func mean(_ values: [Double]) -> Double { values.reduce(0, +) / Double(values.count) }
    let means = curves.map { mean($0) }
    let average = mean(means)
    let grand = mean(average)
    let levels = means.map { mean($0) }
    func sum(_ term: (Int) -> Double) -> Double { (0..<count).reduce(0) { $0 + term($1) } }
    func square(_ x: Double) -> Double { x * x }
    let within = (0..<count).map { i in
      zip(curves, means).reduce(0.0) { sum, prompt in
        sum + prompt.0.reduce(0) { $0 + square($1[i] - prompt.1[i]) }
      }
    }
    let squares = [
      Double(prompts * samples) * sum { square(average[$0] - grand) },
      Double(samples * count) * levels.reduce(0) { $0 + square($1 - grand) },
      Double(samples)
        * zip(means, levels).reduce(0.0) { so, prompt in
          so + sum { square(prompt.0[$0] - prompt.1 - average[$0] + grand) }
        },
      within.reduce(0, +),
    ]
    total = squares.reduce(0, +)
    let whole = total
    let shares = squares.map { whole > 0 ? $0 / whole : 0 }
    (step, prompt, promptStep, sample) = (shares[0], shares[1], shares[2], shares[3])
    steps = average
    betweenPrompts = (0..<count).map { i in moments(means.map { $0[i] }).standardDeviation }
    withinPrompts = within.map { ($0 / Double(max(1, prompts * (samples - 1)))).squareRoot() }
  }
}

/// Spearman's rank correlation, ties sharing their mean rank; nil if either list is constant or shorter than two.
public func rankCorrelation(_ x: [Double], _ y: [Double]) -> Double? {
  precondition(x.count == y.count, "\(x.count) and \(y.count) values have no correlation")
  guard let a = unitRanks(x), let b = unitRanks(y) else { return nil }
  return zip(a, b).reduce(0) { $0 + $1.0 * $1.1 }
}

/// Means of ``rankCorrelation(_:_:)`` over all pairs of curves [prompt][sample][step] of different prompts, and of one
/// prompt; nil where there is no pair. Constant curves are left out.
public func meanRankCorrelations(_ curves: [[[Double]]]) -> (between: Double?, within: Double?) {
  /// Σ over pairs = (‖Σ u‖² − Σ ‖u‖²)/2 of unit vectors.
  func pairs(_ units: [[Double]]) -> (sum: Double, count: Int) {
    guard let first = units.first else { return (0, 0) }
    let sum = first.indices.map { i in units.reduce(0) { $0 + $1[i] } }
    let count = units.count
    return ((sum.reduce(0) { $0 + $1 * $1 } - Double(count)) / 2, count * (count - 1) / 2)
  }
  let units = curves.map { $0.compactMap(unitRanks) }
  let all = pairs(units.flatMap { $0 })
  let own = units.map(pairs).reduce((sum: 0.0, count: 0)) { ($0.sum + $1.sum, $0.count + $1.count) }
  let others = all.count - own.count
  return (
    others > 0 ? (all.sum - own.sum) / Double(others) : nil, own.count > 0 ? own.sum / Double(own.count) : nil
  )
}

/// Ranks around their mean, as a vector of length 1; nil where all values are equal.
private func unitRanks(_ values: [Double]) -> [Double]? {
  // twice the rank, counted from its middle
  let ranks = values.map { v in values.reduce(0.0) { $0 + ($1 < v ? 1 : $1 > v ? -1 : 0) } }
  let length = ranks.reduce(0) { $0 + $1 * $1 }.squareRoot()
  return length > 0 ? ranks.map { $0 / length } : nil
}
