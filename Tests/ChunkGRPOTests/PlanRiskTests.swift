import Foundation
import Testing

@testable import ChunkGRPO

private func normals(_ name: String, _ count: Int) -> [Double] {
  var stream = testStream(name)
  return stream.normals(count: count).map(Double.init)
}

@Suite struct PlanRiskTests {
  /// Every way to cut `count` steps into chunks within the bounds.
  private func segmentations(_ count: Int, _ bounds: ClosedRange<Int>) -> [[Int]] {
    guard count > 0 else { return [[]] }
    return bounds.filter { $0 <= count }.flatMap { size in
      segmentations(count - size, bounds).map { [size] + $0 }
    }
  }

  // Oracle: every segmentation, its cost written out from the definition. 1e-12: sums in another order.
  @Test("the plan is the best of all there are, with the curves of every kind of bounds", arguments: 1...60)
  func bruteForce(_ trial: Int) throws {
    var random = testStream("brute \(trial)")
    let count = 1 + random.index(below: 11)
    let stopSize = 1 + random.index(below: 7)
    let minChunk = 1 + random.index(below: (stopSize + 1) / 2)
    let wobble = [0.01, 0.1, 0.5][trial % 3]
    let shape = (0..<count).map { _ in 0.2 + 3 * random.uniform() }
    let curves = (0..<(2 + trial % 5)).map { m in
      zip(shape, normals("brute \(trial) \(m)", count)).map { $0 * exp(wobble * $1) }
    }
    let risk = try PlanRisk(curves: curves)
    let plan = try risk.best(stopSize: stopSize, minChunk: minChunk)

    let logs = curves.map { $0.map { log($0) } }
    let mean = (0..<count).map { i in logs.reduce(0) { $0 + $1[i] } / Double(logs.count) }
    let grand = mean.reduce(0, +) / Double(count)
    var rest = 0.0
    for row in logs {
      let own = row.reduce(0, +) / Double(count)
      for i in 0..<count { rest += pow(row[i] - own - mean[i] + grand, 2) }
    }
    let tau2 = count > 1 ? rest / Double((logs.count - 1) * (count - 1)) : 0
    expectClose(risk.noise, tau2, absolute: 1e-15, relative: 1e-10)  // small differences of larger sums
    func cost(_ sizes: [Int]) -> Double {
      var (start, total) = (0, 0.0)
      for size in sizes {
        let values = mean[start..<start + size]
        let level = values.reduce(0, +) / Double(size)
        total += values.reduce(0) { $0 + pow($1 - level, 2) } + 0.5 + tau2 / Double(logs.count)
        start += size
      }
      return total
    }
    let all = segmentations(count, min(minChunk, count)...stopSize)
    let least = try #require(all.map(cost).min())
    #expect(all.contains(plan.sizes))
    expectClose(cost(plan.sizes), least, absolute: 1e-14, relative: 1e-10)
    expectClose(risk(plan), least, absolute: 1e-14, relative: 1e-10)
  }

  // Oracle: within a flat piece nothing is hidden, so that a boundary only costs; across the jump it pays.
  @Test("two flat levels: one boundary, where the step is", arguments: 1...7)
  func oneBoundary(_ at: Int) throws {
    let curves = (0..<6).map { m in
      normals("levels \(m)", 8).enumerated().map { i, e in (i < at ? 1.0 : 4.0) * exp(0.02 * e) }
    }
    let risk = try PlanRisk(curves: curves)
    #expect(try risk.best(stopSize: 8, minChunk: 1).sizes == [at, 8 - at])
    // Closed form of two levels: log(4)²·a·b/(a + b) at no noise; the noise of a mean of 6, at 5 standard errors.
    let hidden = pow(log(4.0), 2) * Double(at * (8 - at)) / 8
    expectClose(risk.heterogeneity(0..<8), hidden, absolute: 5 * 2 * hidden.squareRoot() * 0.02)
    // 3.3 standard errors of χ² with 35 degrees of freedom
    expectClose(risk.noise, 0.02 * 0.02, relative: 0.8)
    #expect(risk.penalty == 0.5 + risk.noise / 6)
  }

  // Oracle: by hand. μ = (0, 0, c, c), each trajectory ±e around it in turns: τ² = 8e²/3, the price ½ + 4e²/3; the
  // boundary explains 4·(c/2)² = c². With e = 0.2 it is drawn where c > 0.7439.
  @Test(
    "a boundary is drawn exactly where it explains more than it costs",
    arguments: [(0.74, [4]), (0.75, [2, 2])])
  func threshold(_ c: Double, _ expected: [Int]) throws {
    let curves = [0.2, -0.2].map { e in [e, -e, c + e, c - e].map { exp($0) } }
    let risk = try PlanRisk(curves: curves)
    expectClose(risk.penalty, 0.5 + 0.16 / 3, relative: 1e-12)
    expectClose(risk.heterogeneity(0..<4), c * c, relative: 1e-12)
    #expect(try risk.best(stopSize: 4, minChunk: 2).sizes == expected)
  }

  // Oracle: every segmentation, in a second implementation (numpy), of latents recorded from the authors' code.
  @Test("the plan of GCPO's recorded latents")
  func ofLatents() throws {
    let latents = try Fixture.chunkStep.floats("out.latents")  // [4, 18, 6, 64]
    let size = 6 * 64
    let curves = (0..<4).map { sample in
      (0..<16).map { step in
        let start = (sample * 18 + step) * size
        return Distance.l1(
          from: Array(latents[start..<start + size]), to: Array(latents[start + size..<start + 2 * size]))
      }
    }
    let risk = try PlanRisk(curves: curves)
    expectClose(risk.noise, 0.002166359430515974, relative: 1e-6)  // float32 latents, sums in another order
    #expect(try risk.best(stopSize: 7, minChunk: 2).sizes == [3, 6, 7])
    #expect(try risk.best(stopSize: 16, minChunk: 1).sizes == [4, 12])
  }

  @Test("units, the order of trajectories and a trajectory's own level change nothing")
  func invariance() throws {
    for trial in 0..<20 {
      var random = testStream("invariance \(trial)")
      let shape = (0..<16).map { 0.1 + exp(-Double($0) / 5) + 0.2 * random.uniform() }
      let curves = (0..<5).map { m in
        zip(shape, normals("invariance \(trial) \(m)", 16)).map { $0 * exp(0.05 * $1) }
      }
      func plan(_ curves: [[Double]]) throws -> ChunkPlan {
        try PlanRisk(curves: curves).best(stopSize: 7, minChunk: 2)
      }
      let expected = try plan(curves)
      #expect(try plan(curves.map { $0.map { 1000 * $0 } }) == expected)
      // 1 − cos is like a square
      let squares = curves.map { $0.map { $0 * $0 } }
      #expect(try PlanRisk(curves: squares, distance: .cosine).best(stopSize: 7, minChunk: 2) == expected)
      #expect(try plan(curves.reversed()) == expected)
      #expect(try plan(curves.enumerated().map { m, d in d.map { $0 * Double(1 + m) } }) == expected)
      // A mirrored curve has the mirrored plan, where no tie decides.
      #expect(try plan(curves.map { $0.reversed() }).sizes == expected.sizes.reversed())
    }
  }

  @Test("curves that tell nothing: the fewest chunks, evenly; steps that are all different: the finest plan")
  func extremes() throws {
    for value in [0.0, 0.3] {
      let flat = try PlanRisk(curves: [[Double]](repeating: .init(repeating: value, count: 16), count: 3))
      #expect(flat.noise < 1e-25)  // squares of roundings
      #expect(try flat.best(stopSize: 7, minChunk: 2).sizes.sorted() == [5, 5, 6])
      #expect(try flat.best(stopSize: 16, minChunk: 1).sizes == [16])
    }
    func plan(_ ratio: Double, _ bounds: ClosedRange<Int>) throws -> [Int] {
      let curve = (0..<12).map { pow(ratio, Double($0)) }
      return try PlanRisk(curves: [curve, curve]).best(
        stopSize: bounds.upperBound, minChunk: bounds.lowerBound
      ).sizes
    }
    // Closed form: a chunk of n steps hides (n³ − n)/12·log²(ratio); a pair costs more than ½ beyond a ratio of e.
    #expect(try plan(0.35, 1...12) == [Int](repeating: 1, count: 12))
    #expect(try plan(0.35, 2...7) == [Int](repeating: 2, count: 6))
    #expect(try plan(0.9, 2...7) == [6, 6])
    // A shorter curve than a chunk is one.
    #expect(try PlanRisk(curves: [[1], [2]]).best(stopSize: 7, minChunk: 2).sizes == [1])
  }

  @Test("more trajectories of one distribution do not make finer plans")
  func sampleSize() throws {
    // Oracle: closed form; in twelfths, 16 steps hide 340, halves of 8 steps 42 each, and 144 are worth two chunks.
    let shape = (0..<16).map { exp(-Double($0) / 12) }
    for total in [50, 400, 3200] {
      let curves = (0..<total).map { m in
        zip(shape, normals("many \(m)", 16)).map { $0 * exp(0.15 * $1) }
      }
      #expect(try PlanRisk(curves: curves).best(stopSize: 16, minChunk: 1).count == 2, "\(total)")
    }
  }

  @Test("what cannot be planned is refused")
  func refusals() throws {
    #expect(throws: ChunkError.tooFewCurves(1)) { try PlanRisk(curves: [[1, 2]]) }
    #expect(throws: ChunkError.curveLengths([2, 1])) { try PlanRisk(curves: [[1, 2], [1]]) }
    #expect(throws: ChunkError.noSteps(0)) { try PlanRisk(curves: [[], []]) }
    #expect(throws: ChunkError.badCurve(step: 1, value: -1)) { try PlanRisk(curves: [[1, 2], [1, -1]]) }
    #expect(throws: ChunkError.badBounds(stopSize: 4, minChunk: 3)) {
      try PlanRisk(curves: [[1, 2], [1, 3]]).best(stopSize: 4, minChunk: 3)
    }
    #expect(throws: ChunkError.tooFewCurves(1)) {
      try ChunkStrategy.auto.plans(steps: 2, samples: 1, curves: [[1, 2]], stopSize: 7, minChunk: 2)
    }
    let plans = try ChunkStrategy.auto.plans(
      steps: 4, samples: 2, curves: [[1, 1, 9, 9], [1.1, 1, 9, 9.1]], stopSize: 4, minChunk: 1)
    #expect(plans.map(\.sizes) == [[2, 2], [2, 2]])
  }
}

@Suite struct NestedVarianceTests {
  // Oracle: curves that are sums of known orthogonal effects; each share is that effect's own sum of squares.
  @Test("the shares of known effects")
  func shares() {
    let step: [Double] = [3, 1, -4], prompt: [Double] = [2, -2], sample: [Double] = [1, -1]
    let both: [[Double]] = [[1, -2, 1], [-1, 2, -1]]
    let scale: [Double] = [1, 3, 1]
    func value(_ p: Int, _ s: Int, _ i: Int) -> Double {
      let common: Double = 10 + step[i] + prompt[p]
      return common + both[p][i] + sample[s] * scale[i]
    }
    let curves = (0..<2).map { p in (0..<2).map { s in (0..<3).map { i in value(p, s, i) } } }
    let variance = NestedVariance(curves)
    let squares: [Double] = [4 * 26, 6 * 8, 2 * 12, 4 * 11]
    let total = squares.reduce(0, +)
    expectClose(variance.total, total, relative: 1e-12)
    expectClose(
      [variance.step, variance.prompt, variance.promptStep, variance.sample], squares.map { $0 / total },
      relative: 1e-12)
    expectClose(variance.steps, step.map { 10 + $0 }, relative: 1e-12)
    // two prompts at ±3, ±0, ±3: a standard deviation of √2 times that
    expectClose(variance.betweenPrompts, [3.0, 0, 3].map { $0 * 2.0.squareRoot() }, absolute: 1e-12)
    expectClose(variance.withinPrompts, scale.map { $0 * 2.0.squareRoot() }, absolute: 1e-12)
  }

  // Oracle: by hand, and Pearson of ranks with their ties' mean.
  @Test("rank correlation: order counts, values do not")
  func ranks() throws {
    func correlation(_ x: [Double], _ y: [Double]) throws -> Double { try #require(rankCorrelation(x, y)) }
    // 1e-15: a few roundings of numbers of about 1
    expectClose(try correlation([1, 2, 30], [0.1, 5, 6]), 1, absolute: 1e-15)
    expectClose(try correlation([1, 2, 3], [3, 2, -9]), -1, absolute: 1e-15)
    expectClose(try correlation([1, 2, 3, 4], [1, 3, 2, 4]), 0.8, absolute: 1e-15)  // 1 − 6·2/(4·15)
    // ranks 1.5, 1.5, 3 and 1, 2, 3
    expectClose(
      try #require(rankCorrelation([7, 7, 9], [1, 2, 3])), 1.5 / (1.5 * 2).squareRoot(), relative: 1e-15)
    #expect(rankCorrelation([1, 1], [1, 2]) == nil && rankCorrelation([1], [1]) == nil)
    // Oracle: the pairs, one by one.
    let curves = (0..<3).map { p in (0..<3).map { s in normals("ranks \(p) \(s)", 5) } }
    var (between, within): ([Double], [Double]) = ([], [])
    for a in 0..<9 {
      for b in 0..<a {
        let value = try correlation(curves[a / 3][a % 3], curves[b / 3][b % 3])
        if a / 3 == b / 3 { within.append(value) } else { between.append(value) }
      }
    }
    let means = meanRankCorrelations(curves)
    expectClose(try #require(means.between), between.reduce(0, +) / 27, absolute: 1e-14)
    expectClose(try #require(means.within), within.reduce(0, +) / 9, absolute: 1e-14)
    let lone = meanRankCorrelations([[[1, 2]], [[1, 1], [2, 1]]])
    expectClose(try #require(lone.between), -1, absolute: 1e-15)
    #expect(lone.within == nil)
  }
}
