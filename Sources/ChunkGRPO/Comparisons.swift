import Foundation

/// The noncentral t distribution: of (Z + δ)/√(χ²_ν/ν), what a t statistic follows when the true mean is not 0.
public struct NoncentralT: Sendable {
  /// Degrees of freedom ν, positive.
  public let degrees: Double
  /// Noncentrality δ: true mean over its standard error.
  public let shift: Double

  /// The distribution with `degrees` > 0 degrees of freedom and |shift| ≤ 37, where e^(−δ²/2) is a normal number.
  public init(degrees: Double, shift: Double) {
    precondition(degrees > 0 && abs(shift) <= 37, "noncentral t: need degrees > 0 and |shift| ≤ 37")
    (self.degrees, self.shift) = (degrees, shift)
  }

  /// P(T ≤ t), to 1e-10 absolute.
  ///
  /// For t ≥ 0 a Poisson mixture of incomplete beta functions, for t < 0 by reflection. Source: Lenth, Applied Statistics 38
  /// (1989) 185–189, algorithm AS 243.
  public func cdf(_ t: Double) -> Double {
    if t < 0 { return 1 - NoncentralT(degrees: degrees, shift: -shift).cdf(-t) }
    let (square, half) = (t * t, shift * shift / 2)
    let (x, y) = (square / (square + degrees), degrees / (square + degrees))
    var sum = 0.5 * erfc(shift / 2.0.squareRoot())
    var even = exp(-half) / 2
    var odd = shift * exp(-half) / (2 * Double.pi).squareRoot()
    var left = 1.0  // what is left of the Poisson weights bounds what is left of the sum
    for j in 0..<10_000 {
      let j = Double(j)
      sum +=
        even * incompleteBeta(x, y, j + 0.5, degrees / 2) + odd * incompleteBeta(x, y, j + 1, degrees / 2)
      left -= 2 * even
      if left < 1e-13 && j > half { break }
      even *= half / (j + 1)
      odd *= half / (j + 1.5)
    }
    return min(max(sum, 0), 1)
  }
}

/// How large a difference a paired t-test can be expected to find.
public enum PairedPower {
  /// Chance that the two-sided test of level `alpha` over `pairs` pairs finds a true mean difference of
  /// `effect` standard deviations of the differences.
  ///
  /// - Throws: ``StatisticsError/tooFewValues(got:atLeast:)`` for fewer than two pairs.
  public static func power(effect: Double, pairs: Int, alpha: Double = 0.05) throws(StatisticsError) -> Double
  {
    guard pairs > 1 else { throw .tooFewValues(got: pairs, atLeast: 2) }
    let degrees = Double(pairs - 1), limit = StudentT(degrees: degrees).quantile(1 - alpha / 2)
    let t = NoncentralT(degrees: degrees, shift: abs(effect) * Double(pairs).squareRoot())
    return 1 - t.cdf(limit) + t.cdf(-limit)
  }

  /// The smallest true mean difference, in standard deviations of the differences, that the test finds with
  /// chance `power`; times the standard deviation seen, the minimum detectable difference.
  ///
  /// - Throws: ``StatisticsError/tooFewValues(got:atLeast:)`` for fewer than two pairs.
  public static func detectableEffect(
    pairs: Int, power: Double = 0.8, alpha: Double = 0.05
  ) throws(StatisticsError) -> Double {
    precondition(
      alpha < power && power <= 0.99 && alpha >= 0.05, "detectable effects of levels and powers in use")
    guard pairs > 1 else { throw .tooFewValues(got: pairs, atLeast: 2) }
    // Power grows with the effect. At two pairs a shift of 33 has power 0.99, more pairs need less.
    var (low, high) = (0.0, 37 / Double(pairs).squareRoot())
    for _ in 0..<60 {
      let middle = (low + high) / 2
      if try self.power(effect: middle, pairs: pairs, alpha: alpha) < power {
        low = middle
      } else {
        high = middle
      }
    }
    return (low + high) / 2
  }
}

/// Holm's step-down correction: p-values that may each be held against the level of the whole family.
///
/// The i-th smallest of m becomes max over k ≤ i of (m − k + 1)·p_k, at most 1. Source: Holm, Scandinavian Journal of
/// Statistics 6 (1979) 65–70.
public func holm(_ p: [Double]) -> [Double] {
  var corrected = p
  var largest = 0.0
  for (rank, index) in p.indices.sorted(by: { p[$0] < p[$1] }).enumerated() {
    largest = max(largest, min(1, Double(p.count - rank) * p[index]))
    corrected[index] = largest
  }
  return corrected
}
