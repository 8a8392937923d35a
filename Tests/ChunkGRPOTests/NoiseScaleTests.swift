import Foundation
import Testing

@testable import ChunkGRPO

@Suite("gradient noise scale")
struct NoiseScaleTests {
  private func scale(_ vectors: [[Double]]) throws -> NoiseScale {
    let sum = vectors[0].indices.map { i in vectors.reduce(0) { $0 + $1[i] } }
    func dot(_ a: [Double], _ b: [Double]) -> Double { zip(a, b).reduce(0) { $0 + $1.0 * $1.1 } }
    return try NoiseScale(squares: vectors.map { dot($0, $0) }, withSum: vectors.map { dot($0, sum) })
  }

  // Oracle: by hand. Pairs of (1,0), (3,0), (2,3): 3 + 2 + 6 over 3; deviations from (2,1): 2 + 2 + 4 over 2.
  @Test("signal is the mean product of pairs, noise the summed variance")
  func closedForm() throws {
    let got = try scale([[1, 0], [3, 0], [2, 3]])
    expectClose(got.signal, 11.0 / 3, relative: 1e-14)
    expectClose(got.noise, 4, relative: 1e-14)
    expectClose(try #require(got.scale), 12.0 / 11, relative: 1e-14)
    expectClose(got.cosine(groups: 2), 11.0 / 3 / (11.0 / 3 + 2), relative: 1e-14)
    // leave one out: pairs 6, 2, 3
    let jackknife =
      (2.0 / 3
      * ((6 - 11.0 / 3) * (6 - 11.0 / 3) + (2 - 11.0 / 3) * (2 - 11.0 / 3)
        + (3 - 11.0 / 3) * (3 - 11.0 / 3)))
      .squareRoot()
    expectClose(got.signalCI95.halfWidth, StudentT(degrees: 2).quantile(0.975) * jackknife, relative: 1e-12)
  }

  @Test("equal gradients have no noise, opposite ones no signal")
  func limits() throws {
    let equal = try scale([[1, 2], [1, 2], [1, 2]])
    #expect(equal.noise == 0 && equal.scale == 0 && equal.cosine(groups: 1) == 1)
    let opposite = try scale([[1, 0], [-1, 0], [0, 1], [0, -1]])
    #expect(opposite.signal < 0 && opposite.scale == nil && opposite.cosine(groups: 9) == 0)
    #expect(throws: StatisticsError.self) { try scale([[1], [2]]) }
    #expect(throws: StatisticsError.self) { try scale([[1], [2], [.nan]]) }
  }

  // Oracle: Monte Carlo of known mean and variance: 40 gradients N((½, 0, …), 1) in 50 dimensions, 200 times. The
  // standard error of the mean signal is about 0.01: the spread of one, √(2·50)/40 ≈ 0.25, over √200, plus the mean's.
  @Test("no bias, and the interval covers about 95 %")
  func monteCarlo() throws {
    var stream = RandomPlan(seed: 3).stream(.initialNoise)
    var (signals, noises, covered) = ([Double](), [Double](), 0)
    for _ in 0..<200 {
      let got = try scale(
        (0..<40).map { _ in
          stream.normals(count: 50).enumerated().map { Double($1) + ($0 == 0 ? 0.5 : 0) }
        })
      signals.append(got.signal)
      noises.append(got.noise)
      if got.signalCI95.low...got.signalCI95.high ~= 0.25 { covered += 1 }
    }
    expectClose(signals.reduce(0, +) / 200, 0.25, absolute: 0.06)  // three standard errors and more
    expectClose(noises.reduce(0, +) / 200, 50, absolute: 0.3)  // of √(2·50/39)/√200 ≈ 0.11
    // 95 % of 200 is 190 ± 3; the jackknife of a quadratic is a little wide or narrow.
    #expect(175...200 ~= covered)
  }
}
