import Foundation

/// What a statistic needs and did not get.
public enum StatisticsError: Error, CustomStringConvertible, Sendable, Equatable {
  /// Too few values.
  case tooFewValues(got: Int, atLeast: Int)
  /// A value is infinite or not a number.
  case notFinite(index: Int, value: Double)

  /// What is wrong, what was expected, and the way out.
  public var description: String {
    switch self {
    case .tooFewValues(let got, let atLeast):
      "statistics: expected \(atLeast) values or more, got \(got); use more prompts"
    case .notFinite(let index, let value):
      "statistics: value \(index) is \(value), expected a finite number; mask failed samples first"
    }
  }
}

/// A range of plausible values.
public struct Interval: Sendable, Equatable, Codable {
  /// Lower end.
  public let low: Double
  /// Upper end.
  public let high: Double

  /// An interval from its ends.
  public init(low: Double, high: Double) { (self.low, self.high) = (low, high) }

  /// Half of its width.
  public var halfWidth: Double { (high - low) / 2 }
}

/// Mean, standard deviation and 95 % confidence interval of the mean by Student's t.
public struct Summary: Sendable, Equatable, Codable {
  /// Arithmetic mean.
  public let mean: Double
  /// Standard deviation with n − 1; 0 for one value.
  public let standardDeviation: Double
  /// 95 % confidence interval of the mean; nil for one value.
  public let ci95: Interval?
  /// Number of values.
  public let n: Int

  /// Summarises at least one finite value.
  ///
  /// - Throws: ``StatisticsError``.
  public init(_ values: [Double]) throws(StatisticsError) {
    guard !values.isEmpty else { throw .tooFewValues(got: 0, atLeast: 1) }
    if let i = values.firstIndex(where: { !$0.isFinite }) { throw .notFinite(index: i, value: values[i]) }
    (mean, standardDeviation) = moments(values)
    n = values.count
    if n > 1 {
      let half = StudentT(degrees: Double(n - 1)).quantile(0.975) * standardDeviation / Double(n).squareRoot()
      ci95 = Interval(low: mean - half, high: mean + half)
    } else {
      ci95 = nil
    }
  }
}

/// The paired t-test: is the mean of per-unit differences 0?
public struct PairedTest: Sendable, Equatable, Codable {
  /// Mean difference.
  public let difference: Double
  /// 95 % confidence interval of the mean difference.
  public let ci95: Interval
  /// Student's t with n − 1 degrees of freedom; nil when all differences are equal.
  public let t: Double?
  /// Two-sided p-value. If all differences are equal, 1 when they are 0 and otherwise 0.
  public let p: Double
  /// Number of pairs.
  public let n: Int

  /// Tests at least two differences, one per unit (a prompt, never an image).
  ///
  /// - Throws: ``StatisticsError``.
  public init(differences: [Double]) throws(StatisticsError) {
    guard differences.count > 1 else { throw .tooFewValues(got: differences.count, atLeast: 2) }
    let summary = try Summary(differences)
    (difference, n) = (summary.mean, summary.n)
    ci95 = summary.ci95!  // there are two values or more
    let spread = differences.min() == differences.max() ? 0 : summary.standardDeviation
    t = spread > 0 ? difference / (spread / Double(n).squareRoot()) : nil
    p =
      t.map { StudentT(degrees: Double(differences.count - 1)).twoSidedTail($0) } ?? (difference == 0 ? 1 : 0)
  }
}

/// Mean and n − 1 standard deviation (0 for a single value), in two passes.
func moments(_ values: [Double]) -> (mean: Double, standardDeviation: Double) {
  let mean = values.reduce(0, +) / Double(values.count)
  let squares = values.reduce(0) { $0 + ($1 - mean) * ($1 - mean) }
  return (mean, values.count > 1 ? (squares / Double(values.count - 1)).squareRoot() : 0)
}

/// Student's t distribution.
public struct StudentT: Sendable {
  /// Degrees of freedom, positive.
  public let degrees: Double

  /// The distribution with `degrees` > 0 degrees of freedom.
  public init(degrees: Double) {
    precondition(degrees > 0, "Student's t needs positive degrees of freedom")
    self.degrees = degrees
  }

  /// P(|T| ≥ |t|) = I_{ν/(ν + t²)}(ν/2, 1/2).
  public func twoSidedTail(_ t: Double) -> Double {
    let total = degrees + t * t
    return total.isFinite ? incompleteBeta(degrees / total, t * t / total, degrees / 2, 0.5) : 0
  }

  /// P(T ≤ t).
  public func cdf(_ t: Double) -> Double {
    let tail = twoSidedTail(t) / 2
    return t < 0 ? tail : 1 - tail
  }

  /// The t with P(T ≤ t) = `probability`, in (0, 1), by bisection to the last bit.
  public func quantile(_ probability: Double) -> Double {
    precondition(probability > 0 && probability < 1, "a quantile needs a probability in (0, 1)")
    guard probability != 0.5 else { return 0 }
    let tail = 2 * min(probability, 1 - probability)
    var (low, high) = (0.0, 1.0)
    while twoSidedTail(high) > tail { (low, high) = (high, 2 * high) }
    while true {
      let middle = (low + high) / 2
      guard middle > low && middle < high else { break }
      if twoSidedTail(middle) > tail { low = middle } else { high = middle }
    }
    return probability < 0.5 ? -high : high
  }
}

/// The regularised incomplete beta function I_x(a, b); `y` is 1 − x, given apart because it may be tiny.
func incompleteBeta(_ x: Double, _ y: Double, _ a: Double, _ b: Double) -> Double {
  guard x > 0 else { return 0 }
  guard y > 0 else { return 1 }
  // on either side of about the mean one of the two fractions converges fast
  return x < (a + 1) / (a + b + 2) ? betaFraction(x, y, a, b) : 1 - betaFraction(y, x, b, a)
}

/// I_x(a, b) by its continued fraction, evaluated by Lentz's method. Source: Numerical Recipes, 3rd edition,
/// 6.4.
private func betaFraction(_ x: Double, _ y: Double, _ a: Double, _ b: Double) -> Double {
  let front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log(y)) / a
  func nonZero(_ v: Double) -> Double { abs(v) < 1e-300 ? 1e-300 : v }
  var c = 1.0
  var d = 1 / nonZero(1 - (a + b) * x / (a + 1))
  var fraction = d
  for m in 1...10_000 {
    let (m, even) = (Double(m), a + 2 * Double(m))
    for numerator in [
      m * (b - m) * x / ((even - 1) * even), -(a + m) * (a + b + m) * x / (even * (even + 1)),
    ] {
      d = 1 / nonZero(1 + numerator * d)
      c = nonZero(1 + numerator / c)
      fraction *= c * d
    }
    if abs(c * d - 1) < 3e-16 { break }  // one rounding of 1
  }
  return front * fraction
}
