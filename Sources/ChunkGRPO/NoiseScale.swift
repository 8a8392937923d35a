/// How far a gradient estimate from several groups can be trusted: the simple noise scale.
///
/// The groups' own gradients G_g are independent estimates of one gradient G. An estimate from N groups has
/// E|Ĝ|² = |G|² + tr Σ/N, so that two independent ones have a cosine near |G|²/(|G|² + tr Σ/N): ½ at N = tr Σ/|G|².
///
/// Source: McCandlish, Kaplan, Amodei, An Empirical Model of Large-Batch Training, arXiv 1812.06162, eq. 2.8; the
/// estimate of |G|² is the mean of G_g·G_h over pairs, which no noise biases.
public struct NoiseScale: Sendable, Equatable, Codable {
  /// Groups measured.
  public let groups: Int
  /// |G|², without bias; may come out negative where there is too little to see.
  public let signal: Double
  /// Its 95 % interval, by the jackknife over groups and Student's t.
  public let signalCI95: Interval
  /// tr Σ, that of a single group.
  public let noise: Double

  /// From the gradients' squared norms and their products with the sum of all.
  ///
  /// - Parameters:
  ///   - squares: |G_g|², one a group, at least three.
  ///   - withSum: G_g·ΣG, as many.
  /// - Throws: ``StatisticsError``.
  public init(squares: [Double], withSum: [Double]) throws(StatisticsError) {
    precondition(squares.count == withSum.count, "a square and a product for every gradient")
    guard squares.count > 2 else { throw .tooFewValues(got: squares.count, atLeast: 3) }
    for (index, value) in (squares + withSum).enumerated() where !value.isFinite {
      throw .notFinite(index: index % squares.count, value: value)
    }
    let n = Double(squares.count)
    let (total, own) = (withSum.reduce(0, +), squares.reduce(0, +))
    func pairs(_ total: Double, _ own: Double, _ n: Double) -> Double { (total - own) / (n * (n - 1)) }
    groups = squares.count
    signal = pairs(total, own, n)
    noise = (own - total / n) / (n - 1)
    // |S − G_g|² = |S|² − 2·G_g·S + |G_g|².
    let without = zip(squares, withSum).map { pairs(total - 2 * $1 + $0, own - $0, n - 1) }
    let mean = without.reduce(0, +) / n
    let variance = (n - 1) / n * without.reduce(0) { $0 + ($1 - mean) * ($1 - mean) }
    let half = StudentT(degrees: n - 1).quantile(0.975) * variance.squareRoot()
    signalCI95 = Interval(low: signal - half, high: signal + half)
  }

  /// Groups of an update at which signal and noise are equal; nil where no signal was seen.
  public var scale: Double? { signal > 0 ? noise / signal : nil }
  /// Ends of ``scale`` by those of ``signalCI95``; an end is nil where the interval holds 0.
  public var scaleCI95: (low: Double?, high: Double?) {
    (
      signalCI95.high > 0 ? noise / signalCI95.high : nil, signalCI95.low > 0 ? noise / signalCI95.low : nil
    )
  }
  /// Cosine to expect between the gradients of two independent updates of so many groups.
  public func cosine(groups: Int) -> Double { max(0, signal) / (max(0, signal) + noise / Double(groups)) }
}
