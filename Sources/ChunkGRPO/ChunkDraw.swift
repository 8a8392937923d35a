import Foundation

/// Which chunks of a sample are trained on: the configuration's `chunk.draw`.
public enum ChunkDraw: Sendable, Equatable, CustomStringConvertible {
  /// All chunks alike.
  case uniform
  /// In proportion to the chunk's weight.
  case weighted
  /// In proportion to e^weight, which is nearly uniform for raw weights.
  case weightedSoftmax
  /// Always these, whatever the fraction; sorted, without repeats.
  case only([Int])

  static let forms = "uniform, weighted, weighted:softmax or only:j,k,…"

  /// Parses `uniform`, `weighted`, `weighted:normalised`, `weighted:softmax` or `only:0,2`.
  ///
  /// - Throws: ``ChunkError/unknownDraw(_:)``.
  public init(_ text: String) throws(ChunkError) {
    switch text {
    case "uniform": self = .uniform
    case "weighted", "weighted:normalised": self = .weighted
    case "weighted:softmax": self = .weightedSoftmax
    default:
      guard text.hasPrefix("only:"), let chunks = integers(text.dropFirst(5)), chunks.allSatisfy({ $0 >= 0 })
      else { throw .unknownDraw(text) }
      self = .only(Set(chunks).sorted())
    }
  }

  /// The text it is parsed from.
  public var description: String {
    switch self {
    case .uniform: "uniform"
    case .weighted: "weighted"
    case .weightedSoftmax: "weighted:softmax"
    case .only(let chunks): "only:" + chunks.map(String.init).joined(separator: ",")
    }
  }

  /// Whether drawing needs the chunks' weights w_j, the mean change of their steps.
  public var needsWeights: Bool { self == .weighted || self == .weightedSoftmax }

  /// max(1, ⌊K·f + 1e-9⌋): how many of `chunks` are drawn.
  ///
  /// - Throws: ``ChunkError/fractionOutOfRange(_:)``.
  public static func count(chunks: Int, fraction: Double) throws(ChunkError) -> Int {
    guard fraction > 0, fraction <= 1 else { throw .fractionOutOfRange(fraction) }
    return max(1, Int(Double(chunks) * fraction + 1e-9))
  }

  /// p_j, the chance of each chunk in the first draw; for `only` 1 for the listed and 0 for the others.
  ///
  /// Weights that are all 0 count as equal.
  /// - Throws: ``ChunkError/badWeights(_:chunks:)`` or ``ChunkError/noSuchChunk(index:chunks:)``.
  public func probabilities(of plan: ChunkPlan, weights: [Double]? = nil) throws(ChunkError) -> [Double] {
    let even = [Double](repeating: 1 / Double(plan.count), count: plan.count)
    switch self {
    case .uniform: return even
    case .only(let chunks):
      if let bad = chunks.first(where: { $0 >= plan.count }) {
        throw .noSuchChunk(index: bad, chunks: plan.count)
      }
      return (0..<plan.count).map { chunks.contains($0) ? 1 : 0 }
    case .weighted, .weightedSoftmax:
      guard let weights, weights.count == plan.count, weights.allSatisfy({ $0.isFinite && $0 >= 0 }) else {
        throw .badWeights(weights, chunks: plan.count)
      }
      let largest = weights.reduce(0, max)
      guard largest > 0 else { return even }
      let scaled = weights.map { self == .weighted ? $0 / largest : exp($0 - largest) }
      let total = scaled.reduce(0, +)
      return scaled.map { $0 / total }
    }
  }

  /// Draws chunks one after another without replacement, each in proportion to the probabilities of those
  /// left.
  ///
  /// - Parameters:
  ///   - plan: the chunks to choose from.
  ///   - fraction: f, the share to draw, in (0, 1].
  ///   - weights: w_j for the weighted kinds.
  ///   - generator: the sample's own stream.
  /// - Returns: the drawn chunks' indices in ascending order.
  /// - Throws: ``ChunkError``.
  public func draw(
    from plan: ChunkPlan, fraction: Double, weights: [Double]? = nil,
    using generator: inout some RandomNumberGenerator
  ) throws(ChunkError) -> [Int] {
    let count = try Self.count(chunks: plan.count, fraction: fraction)
    let p = try probabilities(of: plan, weights: weights)
    if case .only(let chunks) = self { return chunks }
    var left = Array(p.indices)
    var drawn: [Int] = []
    for _ in 0..<count {
      // chunks of probability 0 have their turn, in equal parts, once they are alone
      let total = left.reduce(0) { $0 + p[$1] }
      var threshold = generator.uniform() * (total > 0 ? total : Double(left.count))
      let candidates = total > 0 ? left.filter { p[$0] > 0 } : left
      let pick =
        candidates.first { chunk in
          threshold -= total > 0 ? p[chunk] : 1
          return threshold < 0
        } ?? candidates[candidates.count - 1]  // only rounding reaches the end
      drawn.append(pick)
      left.removeAll { $0 == pick }
    }
    return drawn.sorted()
  }

  /// The steps of a drawn chunk that are trained on: m = max(1, ⌊cs·q + 1e-9⌋) of its cs, every choice alike.
  ///
  /// The chunk keeps its weight W_j and its ratio becomes the geometric mean over the m steps, so that each has
  /// ω = W_j / (m·ΣW): at ratio 1 the expected gradient is that of the whole chunk, as is the expected log-ratio
  /// at any. A sample's time weights are those of whole chunks.
  ///
  /// - Parameters:
  ///   - chunk: the chunk's steps.
  ///   - fraction: q, the share to train on, in (0, 1]; 1 takes all and no random number.
  ///   - generator: the sample's own stream.
  /// - Returns: the steps in ascending order.
  /// - Throws: ``ChunkError/fractionOutOfRange(_:)``.
  public static func steps(
    of chunk: Range<Int>, fraction: Double, using generator: inout some RandomNumberGenerator
  ) throws(ChunkError) -> [Int] {
    let count = try count(chunks: chunk.count, fraction: fraction)
    var left = Array(chunk)
    // what is removed, the fewest calls for a share near 1
    for _ in 0..<(chunk.count - count) { left.remove(at: generator.index(below: left.count)) }
    return left
  }

  /// The chance of each chunk to be among the drawn.
  ///
  /// Drawing in proportion without replacement takes the m chunks whose exponential clocks of rate p_j ring
  /// first, so π_j = ∫ p_j e^{−p_j t} P(fewer than m others have rung by t) dt; the integrand is analytic,
  /// and the trapezoid rule in s with t = exp(s − e^{−s}), where it decays doubly exponentially at both ends,
  /// is exact to about 1e-12.
  /// - Throws: ``ChunkError``.
  public func inclusionProbabilities(
    of plan: ChunkPlan, fraction: Double, weights: [Double]? = nil
  ) throws(ChunkError) -> [Double] {
    let count = try Self.count(chunks: plan.count, fraction: fraction)
    let p = try probabilities(of: plan, weights: weights)
    if case .only = self { return p }
    let positive = p.indices.filter { p[$0] > 0 }
    guard count < positive.count else {
      let rest = Double(count - positive.count) / Double(max(1, p.count - positive.count))
      return p.map { $0 > 0 ? 1 : rest }
    }
    guard self != .uniform else { return p.map { _ in Double(count) / Double(p.count) } }
    var inclusion = [Double](repeating: 0, count: p.count)
    let spacing = 1.0 / 32
    let last = log(40 / positive.reduce(1) { min($0, p[$1]) }) + 1
    for s in stride(from: -4.5, through: last, by: spacing) {
      let t = exp(s - exp(-s))
      let measure = t * (1 + exp(-s)) * spacing
      let rung = p.map { -expm1(-$0 * t) }
      for j in positive {
        var ways = [1.0] + [Double](repeating: 0, count: count - 1)  // P(k others have rung), k < m
        for other in positive where other != j {
          for k in stride(from: count - 1, through: 0, by: -1) {
            ways[k] = ways[k] * (1 - rung[other]) + (k > 0 ? ways[k - 1] * rung[other] : 0)
          }
        }
        inclusion[j] += p[j] * exp(-p[j] * t) * measure * ways.reduce(0, +)
      }
    }
    return inclusion
  }
}
