import Foundation
import Testing

@testable import ChunkGRPO

@Suite struct ChunkPlanTests {
  @Test(
    "every form parses, prints itself and makes its plan",
    arguments: [
      ("step", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]), ("sequence", [16]),
      ("fixed:4", [4, 4, 4, 4]),
      ("fixed:5", [5, 5, 5, 1]), ("fixed:99", [16]), ("list:2,3,4,7", [2, 3, 4, 7]),
    ])
  func strategies(_ text: String, _ sizes: [Int]) throws {
    let strategy = try ChunkStrategy(text)
    #expect(strategy.description == text)
    #expect(!strategy.needsCurve)
    let plan = try strategy.plan(steps: 16)
    #expect(plan.sizes == sizes)
    #expect(plan.ranges.flatMap(Array.init) == Array(0..<16))
    #expect(try JSONDecoder().decode(ChunkPlan.self, from: JSONEncoder().encode(plan)) == plan)
  }

  @Test("adaptive forms need a curve", arguments: ["adaptive", "adaptive-shared", "auto"])
  func adaptiveForms(_ text: String) throws {
    let strategy = try ChunkStrategy(text)
    #expect(strategy.description == text)
    #expect(strategy.needsCurve)
    #expect(throws: ChunkError.needsCurve(plan: text)) { try strategy.plan(steps: 16) }
  }

  @Test(
    "other texts are refused",
    arguments: [
      "", "steps", "step:1", "fixed", "fixed:", "fixed:x", "fixed:2,3", "list:", "list:2,,3", "list:2;3",
    ])
  func unknown(_ text: String) {
    #expect(throws: ChunkError.unknownPlan(text)) { try ChunkStrategy(text) }
  }

  @Test("sizes must be positive and cover the schedule; the message names both sums")
  func sums() throws {
    #expect(throws: ChunkError.badSizes([0])) { try ChunkStrategy("fixed:0") }
    #expect(throws: ChunkError.badSizes([4, -1])) { try ChunkStrategy("list:4,-1") }
    #expect(throws: ChunkError.badSizes([])) { try ChunkPlan(sizes: []) }
    #expect(throws: ChunkError.noSteps(0)) { try ChunkStrategy.sequence.plan(steps: 0) }
    #expect(throws: ChunkError.badSizes([2, 0])) {
      try JSONDecoder().decode(ChunkPlan.self, from: Data("[2,0]".utf8))
    }
    let error = #expect(throws: ChunkError.self) { try ChunkStrategy("list:4,4,4").plan(steps: 16) }
    #expect(
      error?.description
        == "chunks [4, 4, 4] cover 12 steps, the schedule has 16: change chunk.plan or sampling.steps")
  }

  /// The definition's own vectors, found by an independent implementation.
  @Test("adaptive plans of known curves")
  func adaptiveVectors() throws {
    let steps = (0..<16).map(Double.init)
    let vectors: [([Double], [Int])] = [
      (steps.map { 0.74 * pow(0.9, $0) }, [4, 4, 4, 4]),
      (steps.map { 0.2 + 0.05 * abs($0 - 9) }, [4, 5, 7]),
      (steps.map { 0.4 + 0.05 * pow(-1, $0) }, [7, 4, 3, 2]),
      (steps.map { 0.4 + 0.3 * sin(0.9 * $0) * exp(-$0 / 8) }, [2, 3, 4, 3, 4]),
      (
        [0.9, 0.84, 0.79, 0.75, 0.7, 0.64, 0.57, 0.51, 0.46, 0.44, 0.45, 0.46, 0.47, 0.48, 0.49, 0.5],
        [2, 3, 4, 7]
      ),
    ]
    for (curve, sizes) in vectors { #expect(try ChunkPlan.adaptive(curve: curve).sizes == sizes) }
  }

  /// Vectors of a second implementation, written from the definition with binomials: steps with equal values (zero
  /// differences inside and in front), rounding noise on a flat curve, and other bounds.
  @Test("adaptive plans of stepped, flat and rough curves")
  func adaptiveMoreVectors() throws {
    func digits(_ text: String) -> [Double] { text.map { Double($0.wholeNumberValue!) } }
    let vectors: [(curve: [Double], stopSize: Int, minChunk: Int, sizes: [Int])] = [
      (digits("0101200022212122"), 7, 2, [2, 2, 3, 6, 3]),
      (digits("0022001112200112"), 4, 2, [3, 2, 2, 3, 2, 4]),
      (digits("201011200202010102110111"), 7, 3, [3, 7, 4, 3, 3, 4]),
      (digits("02222211212200110110"), 6, 1, [5, 2, 1, 1, 2, 2, 2, 1, 2, 2]),
      (digits("7285846561462278").map { 0.5 + 1e-8 * $0 }, 7, 2, [4, 4, 4, 4]),
      (
        zip(digits("055426596194625031581766887265"), digits("143138441493898837218652580331")).map {
          (10 * $0 + $1) / 100
        }, 5, 3, [3, 5, 4, 3, 4, 4, 4, 3]
      ),
      (
        zip(digits("426419676134707926795758"), digits("459067064500125571356204")).map {
          (10 * $0 + $1) / 100
        }, 9, 4, [6, 6, 6, 6]
      ),
    ]
    for v in vectors {
      #expect(
        try ChunkPlan.adaptive(curve: v.curve, stopSize: v.stopSize, minChunk: v.minChunk).sizes == v.sizes)
    }
  }

  @Test("adaptive plans of GCPO's recorded latents, each sample and all together")
  func adaptiveOfLatents() throws {
    let latents = try Fixture.chunkStep.floats("out.latents")  // [4, 18, 6, 64]
    let size = 6 * 64
    let curves = (0..<4).map { sample in
      (0..<16).map { step in
        let start = (sample * 18 + step) * size
        return Distance.l1(
          from: Array(latents[start..<start + size]), to: Array(latents[start + size..<start + 2 * size]))
      }
    }
    let plans = try curves.map { try ChunkPlan.adaptive(curve: $0).sizes }
    #expect(plans == [[5, 4, 5, 2], [5, 6, 5], [4, 4, 2, 3, 3], [5, 3, 3, 3, 2]])
    #expect(try ChunkPlan.adaptive(sharedBy: curves).sizes == [4, 4, 3, 2, 3])
  }

  @Test("any curve gives a plan within its bounds")
  func adaptiveProperties() throws {
    var random = testStream("curves")
    for trial in 0..<400 {
      let count = 1 + random.index(below: 60)
      let stopSize = 1 + random.index(below: 12)
      let minChunk = 1 + random.index(below: (stopSize + 1) / 2)
      // smooth, rough, stepped and constant curves
      let curve = (0..<count).map { i -> Double in
        switch trial % 4 {
        case 0: 0.4 + 0.3 * sin(Double(i) * random.uniform())
        case 1: random.uniform()
        case 2: Double(random.index(below: 3))
        default: 0.5
        }
      }
      let plan = try ChunkPlan.adaptive(curve: curve, stopSize: stopSize, minChunk: minChunk)
      #expect(plan.steps == count)
      #expect(plan.sizes.allSatisfy { $0 <= stopSize && $0 >= min(minChunk, count) })
      let scaled = try ChunkPlan.adaptive(
        curve: curve.map { 1024 * $0 }, stopSize: stopSize, minChunk: minChunk)
      #expect(scaled == plan)
    }
  }

  @Test("a shared plan is the plan of the mean curve; bad curves and bounds are refused")
  func adaptiveRefusals() throws {
    #expect(throws: ChunkError.badBounds(stopSize: 4, minChunk: 3)) {
      try ChunkPlan.adaptive(curve: [1, 2, 3], stopSize: 4, minChunk: 3)
    }
    #expect(throws: ChunkError.noSteps(0)) { try ChunkPlan.adaptive(curve: []) }
    #expect(throws: ChunkError.badCurve(step: 1, value: .infinity)) {
      try ChunkPlan.adaptive(curve: [1, .infinity])
    }
    #expect(throws: ChunkError.badCurve(step: 0, value: -1)) { try ChunkPlan.adaptive(curve: [-1]) }
    #expect(throws: ChunkError.curveLengths([1, 2])) { try ChunkPlan.adaptive(sharedBy: [[1], [1, 2]]) }
    #expect(throws: ChunkError.curveLengths([])) { try ChunkPlan.adaptive(sharedBy: []) }
  }

  /// Closed forms on small vectors.
  @Test("distances are relative")
  func distances() {
    #expect(Distance.l1(from: [1, -3], to: [2, -1]) == 0.75)
    #expect(Distance.l2(from: [3, 4], to: [3, 9]) == 1)
    #expect(Distance.cosine(from: [1, 0], to: [0, 2]) == 1)
    #expect(Distance.cosine(from: [0.1, 0.2, 0.3], to: [0.2, 0.4, 0.6]) < 1e-15)
    #expect(Distance.cosine(from: [1, 2], to: [-2, -4]) == 2)
    for distance in Distance.allCases { #expect(!distance(from: [0, 0], to: [1, 2]).isFinite) }
  }

  @Test("time weights are what their definitions say")
  func timeWeights() throws {
    let steps = try NoiseSchedule.training(steps: 17, shift: 3).trainingSteps(kind: .flowSDE, eta: 0.7)
    let plan = try ChunkPlan(sizes: [2, 3, 4, 7])
    #expect(try TimeWeight.perChunk.weights(plan: plan, steps: steps) == [1, 1, 1, 1])
    #expect(try TimeWeight.none.weights(plan: plan, steps: steps) == [2, 3, 4, 7])
    let tempflow = try TimeWeight.tempflow.weights(plan: plan, steps: steps)
    let levels = steps.map { ($0.sigma == 1 ? steps[0].next : $0.sigma, $0.sigma) }
    expectClose(
      tempflow[0], levels[..<2].reduce(0) { $0 + ($1.1 / (1 - $1.0)).squareRoot() }, relative: 1e-14)  // g/η
    let guarded = try TimeWeight.guard.weights(plan: plan, steps: steps)
    expectClose(guarded[1], steps[2..<5].reduce(0) { $0 + 1 / ($1.sigma - $1.next) }, relative: 1e-14)
    // equalised: weight times sensitivity is the same for every step, so one-step chunks invert the 34-fold
    // spread
    let single = try ChunkStrategy.step.plan(steps: 16)
    for (w, step) in zip(try TimeWeight.equalised.weights(plan: single, steps: steps), steps) {
      expectClose(w * step.sensitivity, 1, relative: 1e-14)
    }
    let cps = try NoiseSchedule.training(steps: 17, shift: 3).trainingSteps(kind: .cps, eta: 0.8)
    #expect(throws: ChunkError.undefinedTimeWeight(.tempflow, kind: .cps)) {
      try TimeWeight.tempflow.weights(plan: plan, steps: cps)
    }
    #expect(throws: ChunkError.sumMismatch(sizes: [2, 3, 4, 7], steps: 15)) {
      try TimeWeight.none.weights(plan: plan, steps: Array(steps.dropLast()))
    }
  }
}

@Suite struct ChunkDrawTests {
  let plan = try! ChunkPlan(sizes: [2, 3, 4, 7])

  @Test(
    "every form parses and prints itself", arguments: ["uniform", "weighted", "weighted:softmax", "only:0,2"])
  func parsing(_ text: String) throws { #expect(try ChunkDraw(text).description == text) }

  @Test("forms are normalised; others are refused")
  func parsingMore() throws {
    #expect(try ChunkDraw("weighted:normalised") == .weighted)
    #expect(try ChunkDraw("only:3,1,3") == .only([1, 3]))
    for text in ["", "only", "only:", "only:-1", "only:a", "weighted:max"] {
      #expect(throws: ChunkError.unknownDraw(text)) { try ChunkDraw(text) }
    }
  }

  /// 50·0.58 is 28.999999999999996 in Double: max(1, ⌊K·f + 1e-9⌋) must still draw 29.
  @Test(
    "count of drawn chunks",
    arguments: [
      (4, 0.5, 2), (5, 0.5, 2), (1, 0.5, 1), (16, 0.01, 1), (50, 0.58, 29), (7, 1, 7), (10, 0.3, 3),
    ])
  func counts(_ chunks: Int, _ fraction: Double, _ count: Int) throws {
    #expect(try ChunkDraw.count(chunks: chunks, fraction: fraction) == count)
  }

  /// Oracle: the sum over all ordered draws, 5·4·3 of them. The quadrature is good to 1e-12; 1e-10 leaves
  /// room for the sum.
  @Test(
    "inclusion chances equal brute-force enumeration",
    arguments: [
      [0.1, 0.2, 0.3, 0.15, 0.25], [5, 1e-3, 1, 1, 2], [1, 1, 1, 1, 1], [0, 1, 2, 3, 4], [1, 0, 0, 2, 0],
    ])
  func inclusion(_ weights: [Double]) throws {
    let plan = try ChunkPlan(sizes: [1, 1, 1, 1, 1])
    let draw = ChunkDraw.weighted
    let p = try draw.probabilities(of: plan, weights: weights)
    expectClose(p.reduce(0, +), 1, absolute: 1e-15)
    var expected = [Double](repeating: 0, count: 5)
    func walk(_ taken: [Int], _ chance: Double) {
      guard taken.count < 3 else {
        for j in taken { expected[j] += chance }
        return
      }
      let left = p.indices.filter { !taken.contains($0) }
      let total = left.reduce(0) { $0 + p[$1] }
      for j in left { walk(taken + [j], chance * (total > 0 ? p[j] / total : 1 / Double(left.count))) }
    }
    walk([], 1)
    expectClose(
      try draw.inclusionProbabilities(of: plan, fraction: 0.6, weights: weights), expected, absolute: 1e-10)
  }

  /// 4.5 standard errors of a frequency over 4000 draws; the seed is fixed, the tolerance is that of any
  /// seed.
  @Test(
    "drawing follows the inclusion chances",
    arguments: [ChunkDraw.uniform, .weighted, .weightedSoftmax, .only([1, 3])])
  func frequencies(_ draw: ChunkDraw) throws {
    let weights = [0.9, 0.2, 0.5, 0.1]
    let chance = try draw.inclusionProbabilities(of: plan, fraction: 0.5, weights: weights)
    expectClose(chance.reduce(0, +), 2, absolute: 1e-10)
    var random = testStream("draw \(draw)")
    var seen = [Double](repeating: 0, count: 4)
    for _ in 0..<4000 {
      let drawn = try draw.draw(from: plan, fraction: 0.5, weights: weights, using: &random)
      #expect(drawn.count == 2 && drawn[0] < drawn[1])
      for j in drawn { seen[j] += 1 }
    }
    for (j, p) in chance.enumerated() {
      expectClose(seen[j] / 4000, p, absolute: 4.5 * (p * (1 - p) / 4000).squareRoot() + 1e-12)
    }
  }

  /// 4.5 standard errors of a frequency over 4000 draws, as above.
  @Test(
    "steps of a chunk: as many as asked for, each alike",
    arguments: [(0.01, 1), (0.5, 2), (0.6, 3), (0.99, 4), (1, 5)])
  func steps(_ fraction: Double, _ count: Int) throws {
    var random = testStream("steps \(fraction)")
    var seen = [Double](repeating: 0, count: 5)
    for _ in 0..<4000 {
      let steps = try ChunkDraw.steps(of: 3..<8, fraction: fraction, using: &random)
      #expect(steps.count == count && steps == Set(steps).sorted())
      for step in steps { seen[step - 3] += 1 }
    }
    let p = Double(count) / 5
    for n in seen { expectClose(n / 4000, p, absolute: 4.5 * (p * (1 - p) / 4000).squareRoot()) }
    #expect(throws: ChunkError.fractionOutOfRange(0)) {
      try ChunkDraw.steps(of: 3..<8, fraction: 0, using: &random)
    }
  }

  @Test("edges: all chunks, zero weights, a fraction out of range, missing weights, missing chunks")
  func edges() throws {
    var random = testStream("edges")
    #expect(try ChunkDraw.uniform.draw(from: plan, fraction: 1, using: &random) == [0, 1, 2, 3])
    // the two chunks of positive weight are always drawn first
    #expect(
      try ChunkDraw.weighted.draw(from: plan, fraction: 0.5, weights: [0, 1, 0, 1e-9], using: &random) == [
        1, 3,
      ])
    #expect(
      try ChunkDraw.weighted.probabilities(of: plan, weights: [0, 0, 0, 0]) == [0.25, 0.25, 0.25, 0.25])
    #expect(try ChunkDraw.only([2]).draw(from: plan, fraction: 1, using: &random) == [2])
    #expect(throws: ChunkError.fractionOutOfRange(0)) {
      try ChunkDraw.uniform.draw(from: plan, fraction: 0, using: &random)
    }
    #expect(throws: ChunkError.badWeights(nil, chunks: 4)) { try ChunkDraw.weighted.probabilities(of: plan) }
    #expect(throws: ChunkError.badWeights([1, 1, 1, -1], chunks: 4)) {
      try ChunkDraw.weightedSoftmax.probabilities(of: plan, weights: [1, 1, 1, -1])
    }
    let error = #expect(throws: ChunkError.self) { try ChunkDraw.only([0, 4]).probabilities(of: plan) }
    #expect(
      error?.description
        == "chunk.draw: chunk 4 does not exist, the plan has 4 (0 … 3); change chunk.draw or chunk.plan")
  }
}
