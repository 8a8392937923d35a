import ChunkGRPO
import FlowModels
import Foundation
import Testing
import Torch

@testable import FlowTraining

private let kinds: [StepKind] = [.flowSDE, .danceSDE, .cps]

@Suite("rollout")
struct RolloutTests {
  // Equal inputs through the same functions: not a bit may differ, so there is no tolerance.
  @Test("states and log-probabilities do not depend on the batch, bit for bit", arguments: [1, 2, 3, 4, 5])
  func batches(_ batch: Int) throws {
    let bench = try Bench()
    let (whole, parts) = (try bench.rollout(), try bench.rollout(batch: batch))
    #expect(try parts.states.floats() == whole.states.floats())
    #expect(try parts.clean.floats() == whole.clean.floats())
    #expect(parts.logProbabilities == whole.logProbabilities)
  }

  @Test("filled passes have exactly the rows asked for and change nothing")
  func filledRows() throws {
    let bench = try Bench()
    let counting = CountingModel(FluxFlowModel(bench.transformer, grid: Bench.grid))
    let t = try Rollout(table: bench.table, guidance: 3.5, batch: 5, fillsRows: true)
      .sample(counting, initial: bench.initial, conditions: bench.conditions, noise: Bench.noise)
    #expect(counting.passes == [Int](repeating: 5, count: 2 * 6))
    let whole = try bench.rollout()
    #expect(try t.states.floats() == whole.states.floats() && t.clean.floats() == whole.clean.floats())
    #expect(t.logProbabilities == whole.logProbabilities)
  }

  @Test("batches cover every row once, none above the limit unless a single row would be left")
  func batchRanges() {
    for count in 1...50 {
      for limit in 1...50 {
        let ranges = Array(Batches(count, of: limit))
        #expect(ranges.flatMap { Array($0) } == Array(0..<count))
        #expect(count == 1 || ranges.allSatisfy { $0.count >= 2 })
        #expect(ranges.allSatisfy { $0.count <= max(limit, 3) })
      }
    }
    #expect(Array(Batches(0, of: 4)).isEmpty)
  }

  // Hazard 3. The oracle is method.md's table, evaluated here: rounding of float32 states near 3 only.
  @Test("the first step leaves σ = 1 by σ_1 in the denominator")
  func firstStep() throws {
    let bench = try Bench()
    let t = try bench.rollout()
    let first = (0..<bench.samples).map { (row: $0, step: 0) }
    let next = Double(bench.table.schedule.sigmas[1])
    #expect(bench.table.schedule.sigmas[0] == 1)
    let g2 = 0.7 * 0.7 / (1 - next)
    let delta = next - 1
    let v = try withoutGrad { try bench.velocity(first, t) }
    var noise = [Float](repeating: 0, count: 6 * 6 * 64)
    noise.withUnsafeMutableBufferPointer { all in
      for s in 0..<6 {
        Bench.noise(s, 0, UnsafeMutableBufferPointer(rebasing: all[(s * 384)..<((s + 1) * 384)]))
      }
    }
    let expected =
      try bench.initial * (1 + g2 * delta / 2) + v * delta
      + Tensor(noise, shape: [6, 6, 64]) * (g2 * -delta).squareRoot()
    #expect(relativeError(try t.states[1].doubles(), try expected.doubles()) < 1e-6)
  }

  @Test(
    "the last step has no log-probability, and what is decoded is x − σ·v of the last pass", arguments: kinds)
  func lastStep(_ kind: StepKind) throws {
    let bench = try Bench(kind: kind)
    let t = try bench.rollout()
    #expect(t.states.shape == [7, 6, 6, 64])
    #expect(t.logProbabilities.allSatisfy { $0.count == 5 && $0.allSatisfy(\.isFinite) })
    #expect(Array(bench.table.schedule.sigmas.suffix(1)) == [0])
    let last = (0..<bench.samples).map { (row: $0, step: 5) }
    let v = try withoutGrad { try bench.velocity(last, t) }
    let expected = try t.states[5] - v * Double(bench.table.schedule.sigmas[5])
    #expect(try t.clean.floats() == expected.floats())
  }

  @Test("steps outside the window follow the ODE and have no log-probability")
  func window() throws {
    let bench = try Bench(window: 1..<3)
    let t = try bench.rollout()
    for values in t.logProbabilities { #expect(values.map(\.isNaN) == [true, false, false, true, true]) }
    for step in [0, 3, 4, 5] {
      let rows = (0..<bench.samples).map { (row: $0, step: step) }
      let v = try withoutGrad { try bench.velocity(rows, t) }
      let sigmas = bench.table.schedule.sigmas
      let expected = try t.states[step] + v * Double(sigmas[step + 1] - sigmas[step])
      // one float32 rounding of a coefficient apart
      #expect(relativeError(try t.states[step + 1].doubles(), try expected.doubles()) < 1e-6)
    }
  }

  /// Paths of three kinds, two samples each: noise late, early and coarse, twice and coarse.
  private func paths(_ bench: Bench) throws -> [SamplingPath] {
    let courses: [([Range<Int>], Int?)] = [([3..<5], nil), ([1..<2], 2), ([0..<1, 3..<4], 1)]
    return try courses.flatMap { stochastic, coarse in
      let path = try SamplingPath(
        bench.table.schedule, kind: .flowSDE, eta: 0.7, stochastic: stochastic, coarse: coarse)
      return [path, path]
    }
  }

  // Equal inputs through the same functions: not a bit may differ from samples alone, so there is no tolerance.
  @Test("paths of different lengths go together, each as it would alone", arguments: [2, 4, 6])
  func mixedPaths(_ batch: Int) throws {
    let bench = try Bench()
    let paths = try paths(bench)
    let sampler = Rollout(table: bench.table, guidance: 3.5, batch: batch, fillsRows: true)
    let t = try sampler.sample(
      bench.network, initial: bench.initial, conditions: bench.conditions, paths: paths, noise: Bench.noise)
    for s in 0..<6 {
      let alone = try sampler.sample(
        bench.network, initial: try bench.initial[s..<(s + 1)], conditions: [bench.conditions[s]],
        paths: [paths[s]]
      ) { Bench.noise($0 + s, $1, $2) }
      let visited = Set(paths[s].moves.map(\.to) + [0])
      for level in 0...6 {
        let x = try t.states[level][s].floats()
        guard visited.contains(level) else {
          #expect(x.allSatisfy { $0.isNaN })
          continue
        }
        #expect(try x == alone.states[level][0].floats() && x.allSatisfy { $0.isFinite })
      }
      #expect(try t.clean[s].floats() == alone.clean[0].floats())
      let noisy = Set(paths[s].moves.filter(\.step.isStochastic).map(\.from))
      for i in 0..<5 {
        #expect(t.logProbabilities[s][i].isNaN != noisy.contains(i))
        #expect(
          t.logProbabilities[s][i].bitPattern == alone.logProbabilities[0][i].bitPattern || !noisy.contains(i)
        )
      }
    }
    // The last move is deterministic for samples 2 to 5: then what is decoded is the solver's own end.
    for s in 2..<6 {
      // x + Δ·v against x − σ·v, Δ = −σ: the same float32 products
      #expect(try t.clean[s].floats() == t.states[6][s].floats())
    }
  }

  // Oracle: the recursion x' = x + Δ·(v + ρ·(v − v_previous)), ρ = Δ/(2Δ_previous), written out with velocities of
  // passes of its own; 1e-6 is a few roundings of float32.
  @Test("coarse moves are two-step Adams–Bashforth, begun anew after noise")
  func coarseMoves() throws {
    let bench = try Bench()
    let path = try SamplingPath(
      bench.table.schedule, kind: .flowSDE, eta: 0.7, stochastic: [0..<1], coarse: 3)
    #expect(path.moves.map(\.to) == [1, 3, 5, 6])
    let t = try Rollout(table: bench.table, guidance: 3.5, batch: 6)
      .sample(
        bench.network, initial: bench.initial, conditions: bench.conditions,
        paths: [SamplingPath](repeating: path, count: 6), noise: Bench.noise)
    let sigmas = bench.table.schedule.sigmas.map(Double.init)
    var (x, previous) = (try t.states[1], Tensor?.none)
    var length = 0.0
    for (from, to) in [(1, 3), (3, 5), (5, 6)] {
      let v = try withoutGrad { try bench.velocity((0..<6).map { ($0, from) }, t) }
      let delta = sigmas[to] - sigmas[from]
      let used = try previous.map { try v + (v - $0) * (delta / (2 * length)) } ?? v
      x = try x + used * delta
      #expect(relativeError(try t.states[to].doubles(), try x.doubles()) < 1e-6)
      (previous, length) = (v, delta)
    }
    #expect(relativeError(try t.clean.doubles(), try x.doubles()) < 1e-6)
  }

  // Equal numbers of rows in every pass, so no tolerance; hazard 1 for what follows the shared moves.
  @Test("moves before the first noise are computed once for a group", arguments: [DType.float32, .bfloat16])
  func sharedStem(_ dtype: DType) throws {
    let bench = try Bench(dtype: dtype)
    let counting = CountingModel(FluxFlowModel(bench.transformer, grid: Bench.grid))
    // Two groups of three: one x_0, condition and path each.
    let initial = try Tensor.stack([0, 0, 0, 3, 3, 3].map { try bench.initial[$0] })
    let conditions = [0, 0, 0, 3, 3, 3].map { bench.conditions[$0] }
    let paths = try [2..<4, 4..<5].flatMap { window in
      [SamplingPath](
        repeating: try SamplingPath(
          bench.table.schedule, kind: .flowSDE, eta: 0.7, stochastic: [window], coarse: 3), count: 3)
    }
    let sampler = Rollout(table: bench.table, guidance: 3.5, batch: 4, fillsRows: true)
    func sample(_ sharing: Int) throws -> (Trajectories, passes: Int) {
      let before = counting.passes.count
      let t = try sampler.sample(
        counting, initial: initial, conditions: conditions, paths: paths, sharing: sharing, noise: Bench.noise
      )
      return (t, counting.passes.count - before)
    }
    let (each, shared) = (try sample(1), try sample(3))
    #expect(
      try shared.0.states.floats().map(\.bitPattern) == each.0.states.floats().map(\.bitPattern))
    #expect(try shared.0.clean.floats() == each.0.clean.floats())
    #expect(
      shared.0.logProbabilities.map { $0.map(\.bitPattern) }
        == each.0.logProbabilities.map { $0.map(\.bitPattern) })
    // Moves: 2 + 2 + 2 and 3 + 1 + 1 (the last step is as noisy as the one before it). In batches of 3 samples, longest
    // first: 6 + 5 passes; shared: 3 of the two stems together, then 4 + 2.
    #expect(counting.passes.allSatisfy { $0 == 4 })
    #expect(each.passes == 11 && shared.passes == 9)
    try bench.transformer.modules.makeTrainable()
    let windows = [2..<4, 4..<5]
    let samples = (0..<6).map {
      UpdateSample(row: $0, advantage: $0 % 2 == 0 ? 1 : -1, chunks: [(windows[$0 / 3], 1)])
    }
    let report = try bench.rule(microBatch: 4)
      .accumulate(samples, shared.0, conditions: conditions, first: true)
    #expect(report.replayGap == 0 && report.ratios == [Double](repeating: 1, count: 6))
  }

  // Hazard 2: bfloat16 has 8 bits; a float32 state has low bits that bfloat16 cannot hold.
  @Test("trajectories are float32 when the network is bfloat16")
  func float32States() throws {
    let bench = try Bench(dtype: .bfloat16)
    let t = try bench.rollout()
    #expect(t.states.dtype == .float32 && t.clean.dtype == .float32)
    #expect(try t.states[0].floats() == bench.initial.floats())
    for i in 1...6 {
      let values = try t.states[i].floats()
      #expect(values.filter { $0.bitPattern & 0xFFFF == 0 }.count < values.count / 100)
    }
    // The stored log-probabilities are those of the stored states.
    for i in 0..<5 {
      let rows = [Int](repeating: i, count: 6)
      let v = try withoutGrad { try bench.velocity((0..<6).map { ($0, i) }, t) }
      #expect(v.dtype == .float32)
      let residuals = try bench.table.meanSquaredResidual(
        t.states[i + 1], try bench.table.mean(t.states[i], v, rows)
      ).doubles()
      for s in 0..<6 {
        let replayed = bench.table.logProbability(meanSquaredResidual: residuals[s], step: i)
        #expect(replayed == t.logProbabilities[s][i])
      }
    }
  }

  @Test("dynamics are ‖x' − x‖₁ / ‖x‖₁ of every trainable step (definition)")
  func dynamics() throws {
    let t = try Bench().rollout()
    let d = try t.dynamics(.l1)
    #expect(d.count == 6 && d.allSatisfy { $0.count == 5 })
    let (a, b) = (try t.states[2][4].doubles(), try t.states[3][4].doubles())
    let moved = zip(a, b).reduce(0) { $0 + abs($1.1 - $1.0) }
    // sums of 384 Doubles in another order
    #expect(abs(d[4][2] / (moved / a.reduce(0) { $0 + abs($1) }) - 1) < 1e-12)
  }

  @Test("beforeStep is asked before every pass and can stop the rollout")
  func stops() throws {
    struct Stop: Error {}
    let bench = try Bench()
    var sampler = Rollout(table: bench.table, guidance: 3.5, batch: 3)
    final class Counter { var passes = 0 }
    let counter = Counter()
    sampler.beforeStep = {
      counter.passes += 1
      if counter.passes == 8 { throw Stop() }
    }
    #expect(throws: Stop.self) {
      try sampler.sample(
        bench.network, initial: bench.initial, conditions: bench.conditions, noise: Bench.noise)
    }
    #expect(counter.passes == 8)
  }
}

@Suite("policy update")
struct PolicyUpdateTests {
  /// Clipped and unclipped ratios of both signs, a sample without and one with few chunks.
  private static let samples = [
    UpdateSample(row: 0, advantage: 1.3, chunks: [(0..<2, 1), (2..<5, 1)]),
    UpdateSample(row: 1, advantage: -0.7, chunks: [(2..<5, 2.5)]),
    UpdateSample(row: 2, advantage: 0, chunks: [(0..<2, 1)]),
    UpdateSample(row: 3, advantage: 0.4, chunks: [(0..<1, 0.5), (1..<3, 1), (3..<5, 2)]),
    UpdateSample(row: 5, advantage: -2, chunks: [(0..<2, 1), (3..<5, 3)]),
  ]

  private static let everything = (0..<6).map {
    UpdateSample(row: $0, advantage: $0 % 2 == 0 ? 1 : -1, chunks: [(0..<2, 1), (2..<5, 1)])
  }

  // Hazard 1: exactly 0 and exactly 1, no tolerance.
  @Test(
    "before the first update every ratio is 1 and the replay gap 0, exactly",
    arguments: kinds, [1, 2, 3, 4, 7, 48])
  func replay(_ kind: StepKind, _ microBatch: Int) throws {
    let bench = try Bench(kind: kind)
    let t = try bench.rollout(batch: 4)
    try bench.transformer.modules.makeTrainable()
    let rule = bench.rule(microBatch: microBatch, ratio: .step)
    let report = try rule.accumulate(Self.everything, t, conditions: bench.conditions, first: true)
    #expect(report.replayGap == 0 && report.replayGapAt == nil)
    #expect(report.ratios == [Double](repeating: 1, count: 30))
    #expect(report.clipped == 0)
    for row in [0, 3, 5] {
      for steps in [[0], [3], [0, 1, 2, 3, 4]] {
        let replayed = try rule.logProbabilities(row: row, steps: steps, t, conditions: bench.conditions)
        #expect(replayed == steps.map { t.logProbabilities[row][$0] })
      }
    }
  }

  // bfloat16 products depend on the number of rows, which is therefore the same in rollout and replay.
  @Test("in bfloat16, too, when rollout and replay have passes of as many rows", arguments: [3, 8])
  func replayBFloat16(_ rows: Int) throws {
    let bench = try Bench(dtype: .bfloat16)
    let t = try bench.rollout(batch: rows, fillsRows: true)
    try bench.transformer.modules.makeTrainable()
    let report = try bench.rule(microBatch: rows)
      .accumulate(Self.everything, t, conditions: bench.conditions, first: true)
    #expect(report.replayGap == 0 && report.ratios == [Double](repeating: 1, count: 12))
  }

  // Hazard 1, for the other ways to form ratios and anchors: exactly 0 and exactly 1, no tolerance.
  @Test("with normalised ratios and a replayed anchor, too", arguments: kinds, [2, 7, 48])
  func replayNormalised(_ kind: StepKind, _ microBatch: Int) throws {
    let bench = try Bench(kind: kind)
    let t = try bench.rollout(batch: 4, keepsMeans: true)
    try bench.transformer.modules.makeTrainable()
    for norm in RatioNorm.allCases {
      var rule = bench.rule(microBatch: microBatch)
      rule.ratioNorm = norm
      let anchored = try rule.anchored(Self.everything, t, conditions: bench.conditions)
      #expect(anchored.anchor.logProbabilities == t.logProbabilities)
      if norm == .guard {
        for step in 0..<5 {
          #expect(try anchored.anchor.means![step].floats() == t.anchor.means![step].floats())
        }
      }
      // As a later update, too, which takes nothing for granted.
      for (t, first) in [(t, true), (t, false), (anchored, true), (anchored, false)] {
        let report = try rule.accumulate(Self.everything, t, conditions: bench.conditions, first: first)
        #expect(report.ratios == [Double](repeating: 1, count: 12) && report.replayGap == 0)
      }
    }
  }

  @Test("an anchor from a replay: ratios start at 1 whatever the rollout said, whose gap is still measured")
  func anchored() throws {
    let bench = try Bench(trainable: true)
    let t = try bench.rollout()
    let old = t.logProbabilities.map { $0.map { $0 + 2e-4 } }
    let changed = Trajectories(states: t.states, clean: t.clean, logProbabilities: old)
    let counting = CountingModel(FluxFlowModel(bench.transformer, grid: Bench.grid))
    let rule = PolicyUpdate(
      network: TimedNetwork(counting), table: bench.table, guidance: 3.5, microBatch: 7, ratio: .step,
      clip: ClipRange(low: 5e-5, high: 5e-5))
    let samples = Self.samples
    let anchored = try rule.anchored(samples, changed, conditions: bench.conditions)
    // The trained steps of the four samples with advantage: 5 + 3 + 5 + 4 in passes of 7.
    #expect(counting.passes == [7, 7, 7])
    #expect(anchored.logProbabilities == old)
    for sample in samples {
      let trained = Set(!sample.counts ? [] : sample.chunks.flatMap(\.steps))
      for step in 0..<5 {
        let (got, rollout) = (anchored.anchor.logProbabilities[sample.row][step], old[sample.row][step])
        #expect(got == (trained.contains(step) ? t.logProbabilities[sample.row][step] : rollout))
      }
    }
    let report = try rule.accumulate(samples, anchored, conditions: bench.conditions, first: true)
    #expect(report.ratios == [Double](repeating: 1, count: 17))
    #expect(abs(report.replayGap - 2e-4) < 1e-12)  // a difference of Doubles near 1
    let plain = try rule.accumulate(samples, changed, conditions: bench.conditions, first: true)
    #expect(plain.ratios.allSatisfy { abs($0 - exp(-2e-4)) < 1e-12 })
  }

  // Oracle: the noise that made the steps. Means are float32 numbers near 3, of which differences keep 1e-7.
  @Test("a normalised log-ratio is the mean of ε·(μ_θ − μ_old), for every kind", arguments: kinds)
  func normalisedRatio(_ kind: StepKind) throws {
    let bench = try Bench(kind: kind, trainable: true)
    let t = try bench.rollout(keepsMeans: true)
    let before = try withoutGrad { try bench.velocity(Self.rowsOfStepTwo, t) }
    try bench.perturb(by: 1e-2)
    let after = try withoutGrad { try bench.velocity(Self.rowsOfStepTwo, t) }
    let samples = (0..<6).map { UpdateSample(row: $0, advantage: 1, chunks: [(2..<3, 1)]) }
    let wide = ClipRange(low: 1, high: 1)
    let report = try bench.gradient(samples, t, microBatch: 48, clip: wide, norm: .guard, first: false).report
    for s in 0..<6 {
      let moved = try (after[s] - before[s]).doubles().map { $0 * bench.table.steps[2].velocityWeight }
      var noise = [Float](repeating: 0, count: moved.count)
      noise.withUnsafeMutableBufferPointer { Bench.noise(s, 2, $0) }
      let expected = zip(noise, moved).reduce(0) { $0 + Double($1.0) * $1.1 } / Double(moved.count)
      #expect(abs(log(report.ratios[s]) - expected) < 1e-7 && abs(expected) > 1e-6)
    }
  }
  private static let rowsOfStepTwo = (0..<6).map { (row: $0, step: 2) }

  @Test("normalised ratios without the sampled means are refused")
  func normalisedWithoutMeans() throws {
    let bench = try Bench(trainable: true)
    let t = try bench.rollout()
    #expect(
      message { _ = try bench.gradient(Self.samples, t, microBatch: 48, norm: .guard) }.contains("means"))
  }

  // The reference of a training of all weights; equal weights through the same functions: no tolerance.
  @Test("without an adapter the reference is a copy of the weights, and both come back")
  func fullReference() throws {
    let bench = try Bench()
    let t = try bench.rollout()
    let policy = try Policy(
      {
        var full = Configuration.Trainable(); full.kind = .full; return full
      }(), bench.transformer.modules,
      device: .cpu, seeds: RandomPlan(seed: 1), keepsReference: true)
    func velocity() throws -> [Float] {
      try withoutGrad { try bench.velocity(Self.rowsOfStepTwo, t).floats() }
    }
    let before = try velocity()
    try bench.perturb(by: 1e-2)
    let (moved, weights) = (try velocity(), try policy.parameters.mapValues { try $0.floats() })
    #expect(moved != before)
    #expect(try policy.reference(velocity) == before)
    struct Stop: Error {}
    #expect(throws: Stop.self) { try policy.reference { throw Stop() } }
    #expect(try velocity() == moved && policy.parameters.mapValues { try $0.floats() } == weights)
    // Its divergence has a gradient, and the graph survives the exchange of weights.
    var rule = bench.rule(microBatch: 2)
    rule.penalty = ReferencePenalty(beta: 1, form: .exact) { try policy.reference($0) }
    let idle = [UpdateSample(row: 0, advantage: 0, chunks: [(0..<5, 1)])]
    let report = try rule.accumulate(idle, t, conditions: bench.conditions, first: false)
    #expect(report.divergence > 0 && report.objective == -report.divergence)
    #expect(try bench.takeGradient().contains { $0 != 0 })
  }

  @Test("a replay that differs is reported with its size, row and step")
  func replayGap() throws {
    let bench = try Bench(trainable: true)
    let t = try bench.rollout()
    var old = t.logProbabilities
    old[3][1] += 1e-4
    old[4][3] -= 3e-4
    let changed = Trajectories(states: t.states, clean: t.clean, logProbabilities: old)
    for microBatch in [2, 48] {
      let report = try bench.gradient(Self.everything, changed, microBatch: microBatch).report
      #expect(report.replayGapAt?.row == 4 && report.replayGapAt?.step == 3)
      #expect(abs(report.replayGap - 3e-4) < 1e-12)  // a difference of Doubles near 1
    }
    let later = try bench.rule(microBatch: 48)
      .accumulate(Self.everything, changed, conditions: bench.conditions, first: false)
    #expect(later.replayGap == 0)  // measured before the first update only
  }

  // Oracle: method.md's objective, min(r·A, clip(r)·A), in one autograd graph. 2.5e-6 is the rounding of float32
  // sums in another order, method.md "The update".
  @Test(
    "gradients in micro-batches equal those of the literal objective in one graph",
    arguments: RatioKind.allCases.flatMap { ratio in RatioNorm.allCases.map { (ratio, $0) } }, [1, 3, 48])
  func literal(_ kind: (ratio: RatioKind, norm: RatioNorm), _ microBatch: Int) throws {
    let (ratio, norm) = kind
    let bench = try Bench(trainable: true)
    let t = try bench.rollout(keepsMeans: norm == .guard)
    // Both inside and outside the clip range, as the check below demands.
    let moving = norm == .none ? ClipRange(low: 1e-4, high: 3e-4) : ClipRange(low: 1e-6, high: 2e-6)
    for (size, clip) in [(0.0, ClipRange(low: 5e-5, high: 5e-5)), (2e-3, moving)] {
      try bench.perturb(by: size)
      let expected = try bench.literal(Self.samples, t, ratio: ratio, clip: clip, norm: norm)
      // Once as the first update, which knows its ratios, and as a later one, which has to find them.
      for first in size == 0 ? [true, false] : [false] {
        let got = try bench.gradient(
          Self.samples, t, microBatch: microBatch, ratio: ratio, clip: clip, norm: norm, first: first)
        #expect(relativeError(got.values, expected.gradient) < 2.5e-6, "first: \(first)")
      }
      let got = try bench.gradient(
        Self.samples, t, microBatch: microBatch, ratio: ratio, clip: clip, norm: norm, first: false)
      #expect(got.values.count == expected.gradient.count && got.values.contains { $0 != 0 })
      if size > 0 {
        let moved = got.report.ratios.filter { abs($0 - 1) > clip.low / 2 }.count
        #expect(moved > 0 && got.report.clipped > 0 && got.report.clipped < got.report.ratios.count)
        // The literal ratios list the sample without advantage too, which costs no pass here.
        let passed = expected.ratios.count - [RatioKind.step: 2, .chunk: 1, .sequence: 1][ratio]!
        #expect(got.report.ratios.count == passed)
        // float32 log p against float64: 2e-6 as in the parity contract
        #expect(abs(got.report.objective - expected.value) < 2e-6)
      } else {
        #expect(got.report.ratios.allSatisfy { $0 == 1 })
      }
    }
  }

  @Test("ratios after a change of weights are those of the definition", arguments: RatioKind.allCases)
  func ratios(_ ratio: RatioKind) throws {
    let bench = try Bench(trainable: true)
    let t = try bench.rollout()
    try bench.perturb(by: 1e-2)
    let active = Self.samples.filter { $0.counts }
    let clip = ClipRange(low: 1e-3, high: 1e-3)
    let expected = try bench.literal(active, t, ratio: ratio, clip: clip)
    let got = try bench.gradient(active, t, microBatch: 4, ratio: ratio, clip: clip).report
    #expect(got.ratios.count == expected.ratios.count)
    #expect(expected.ratios.contains { abs($0 - 1) > 1e-3 })
    for (a, b) in zip(got.ratios, expected.ratios) { #expect(abs(a - b) < 2e-6) }  // parity contract
  }

  // Hazard 5: the same numbers in the same order, so no tolerance.
  @Test("chunks of one step are step-level GRPO bit for bit, before and after an update")
  func singleSteps() throws {
    let bench = try Bench(trainable: true)
    let t = try bench.rollout()
    func samples(_ chunks: [(steps: Range<Int>, weight: Double)]) -> [UpdateSample] {
      (0..<6).map { UpdateSample(row: $0, advantage: Double($0) - 2.5, chunks: chunks) }
    }
    let ones = samples((0..<5).map { ($0..<($0 + 1), 1) })
    let grouped = samples([(0..<2, 2), (2..<5, 3)])
    for _ in 0..<2 {
      let chunk = try bench.gradient(ones, t, microBatch: 10, ratio: .chunk)
      let step = try bench.gradient(ones, t, microBatch: 10, ratio: .step)
      let weighted = try bench.gradient(grouped, t, microBatch: 10, ratio: .step)
      #expect(chunk.values == step.values && chunk.report.ratios == step.report.ratios)
      #expect(weighted.values == step.values && weighted.report.ratios == step.report.ratios)
      try bench.perturb(by: 1e-4)
    }
  }

  // Hazard 5. Linear in the step gradients, so only float32 sums differ.
  @Test("at ratio 1 a chunk's gradient is the mean of its steps', chunks by weight")
  func meanOfSteps() throws {
    let bench = try Bench(trainable: true)
    let t = try bench.rollout()
    func gradient(_ chunks: [(steps: Range<Int>, weight: Double)]) throws -> [Double] {
      let sample = UpdateSample(row: 1, advantage: 1.7, chunks: chunks)
      return try bench.gradient([sample], t, microBatch: 48).values
    }
    let whole = try gradient([(0..<2, 1), (2..<5, 3)])
    let each = try (0..<5).map { try gradient([($0..<($0 + 1), 1)]) }
    let shares = [1.0 / 8, 1.0 / 8, 3.0 / 12, 3.0 / 12, 3.0 / 12]
    let expected = whole.indices.map { p in zip(shares, each).reduce(0) { $0 + $1.0 * $1.1[p] } }
    #expect(relativeError(whole, expected) < 2.5e-6)
  }

  // Oracle: the whole chunk's gradient. All choices are alike, so that their mean is the expectation; it is linear
  // in the step gradients, and only float32 sums differ.
  @Test("some steps of a chunk: at ratio 1 the expected gradient is the whole chunk's", arguments: [1, 2])
  func someSteps(_ count: Int) throws {
    let bench = try Bench(trainable: true)
    let t = try bench.rollout()
    func gradient(_ steps: [Int]) throws -> [Double] {
      let sample = UpdateSample(row: 1, advantage: 1.7, steps: [([0], 2), (steps, 3)])
      return try bench.gradient([sample], t, microBatch: 48).values
    }
    let choices = count == 1 ? [[1], [2], [3]] : [[1, 2], [1, 3], [2, 3]]
    let each = try choices.map(gradient)
    let mean = each[0].indices.map { p in each.reduce(0) { $0 + $1[p] } / 3 }
    #expect(relativeError(mean, try gradient([1, 2, 3])) < 2.5e-6)
    #expect(relativeError(each[0], each[1]) > 1e-2, "the steps' gradients are alike, nothing is tested")
  }

  @Test("samples without advantage count in S, cost no pass and add nothing")
  func zeroAdvantage() throws {
    let bench = try Bench(trainable: true)
    let t = try bench.rollout()
    let some = Array(Self.everything[..<4])
    let idle = (4..<6).map { UpdateSample(row: $0, advantage: 0, chunks: [(0..<5, 1)]) }
    let few = try bench.gradient(some, t, microBatch: 48).values
    let more = try bench.gradient(some + idle, t, microBatch: 48).values
    // Coefficients are rounded to float32 once, gradients follow: 1e-6.
    #expect(relativeError(more.map { $0 * 6 / 4 }, few) < 1e-6)

    for microBatch in [3, 48] {
      let counting = CountingModel(FluxFlowModel(bench.transformer, grid: Bench.grid))
      let rule = PolicyUpdate(
        network: TimedNetwork(counting), table: bench.table, guidance: 3.5, microBatch: microBatch,
        ratio: .chunk, clip: ClipRange(low: 5e-5, high: 5e-5))
      let none = try rule.accumulate(idle, t, conditions: bench.conditions, first: true)
      #expect(counting.passes.isEmpty && none.ratios.isEmpty && none.objective == 0)
      #expect(try bench.takeGradient().isEmpty)
      for first in [true, false] {
        _ = try rule.accumulate(some + idle, t, conditions: bench.conditions, first: first)
        // 4 × 5 steps in one pass or in seven of 3; a later update passes once for the ratios, once for the gradient.
        let passes = microBatch == 48 ? [48] : [Int](repeating: 3, count: first ? 7 : 2 * 7)
        #expect(counting.passes == passes)
        counting.passes = []
        _ = try bench.takeGradient()
      }
    }
  }

  // Oracle: the three divergences as they are defined, in one float64 graph from the velocity on. Samples without
  // advantage leave nothing but the penalty; 2.5e-6 is float32 sums in another order, as for the objective. k3 takes its
  // d from log-probabilities, differences of numbers near 1 whose float32 residuals are known to 1e-7.
  @Test(
    "the divergence from the reference has the gradient of its definition (hazard 7)",
    arguments: [ReferencePenalty.Form.flowGRPO, .exact, .k3], [2, 48])
  func penalty(_ form: ReferencePenalty.Form, _ microBatch: Int) throws {
    let bench = try Bench()
    let t = try bench.rollout()
    let modules = bench.transformer.modules
    let adapter = try LoRAAdapter(modules, rank: 2, alpha: 4, targets: ["to_q", "to_v"]) { name, count in
      try! Bench.normals([count], name).floats()
    }
    for (name, layer) in adapter.layers {
      try layer.up.setRequiresGrad(false)
      try layer.up.copy(from: try Bench.normals(layer.up.shape, name + "up") * 0.3)
      try layer.up.setRequiresGrad(true)
    }
    let names = adapter.parameters.keys.sorted()
    func takeGradient() throws -> [Double] {
      try names.flatMap { name in
        let parameter = adapter.parameters[name]!
        defer { try? parameter.clearGrad() }
        return try parameter.grad()!.doubles()
      }
    }
    let samples = [
      UpdateSample(row: 0, advantage: 0, chunks: [(0..<2, 1), (2..<5, 3)]),
      UpdateSample(row: 4, advantage: 0, steps: [([1], 0.5), ([2, 4], 1)]),
    ]
    var rule = bench.rule(microBatch: microBatch)
    rule.penalty = ReferencePenalty(beta: 0.25, form: form) { body in
      adapter.disable()
      defer { adapter.enable() }
      return try body()
    }
    let report = try rule.accumulate(samples, t, conditions: bench.conditions, first: false)
    let got = try takeGradient()

    let entries = samples.flatMap { s in s.chunks.flatMap { $0.steps.map { (row: s.row, step: $0) } } }
    let v = try bench.velocity(entries, t).to(.float64)
    adapter.disable()
    let reference = try withoutGrad { try bench.velocity(entries, t).to(.float64) }
    adapter.enable()
    let x = try bench.states(entries, t, ahead: 0).to(.float64)
    let next = try bench.states(entries, t, ahead: 1).to(.float64)
    var at = 0
    var total = try Tensor.zeros([], dtype: .float64)
    for s in samples {
      let weight = s.chunks.reduce(0) { $0 + $1.weight }
      for chunk in s.chunks {
        var sum = try Tensor.zeros([], dtype: .float64)
        for i in chunk.steps {
          let sigmas = bench.table.schedule.sigmas.map(Double.init)
          let (sigma, delta) = (sigmas[i], sigmas[i + 1] - sigmas[i])
          let g2 = bench.eta * bench.eta * sigma / (1 - (i == 0 ? sigmas[1] : sigma))
          func mean(_ v: Tensor) throws -> Tensor {
            try x[at] * (1 + g2 * delta / (2 * sigma)) + v[at]
              * ((1 + g2 * (1 - sigma) / (2 * sigma)) * delta)
          }
          let (mu, other) = (try mean(v), try mean(reference))
          switch form {
          case .flowGRPO: sum = try sum + (mu - other).square().mean() * (1 / (2 * g2))
          case .exact: sum = try sum + (mu - other).square().mean() * (1 / (2 * g2 * -delta))
          case .k3:
            let d = try (next[at] - mu).square().mean() - (next[at] - other).square().mean()
            sum = try sum + d * (1 / (2 * g2 * -delta))
          }
          at += 1
        }
        let mean = try sum * (1 / Double(chunk.steps.count))
        let divergence = form == .k3 ? try mean.exp() - mean - 1 : mean
        total = try total + divergence * (chunk.weight / weight / 2)
      }
    }
    try (total * 0.25).backward()
    let expected = try takeGradient()
    #expect(expected.contains { $0 != 0 })
    #expect(relativeError(got, expected) < (form == .k3 ? 1e-3 : 2.5e-6))
    let value = try total.item()
    #expect(abs(report.divergence / value - 1) < (form == .k3 ? 1e-2 : 1e-5))
    #expect(abs(report.objective + 0.25 * report.divergence) < 1e-12)
  }

  // The oracle is a finite difference of the objective itself; truncation and float32 rounding leave 1 %.
  @Test("the gradient is the derivative of the objective (finite difference)")
  func finiteDifference() throws {
    let bench = try Bench(trainable: true)
    let t = try bench.rollout()
    let samples = [UpdateSample(row: 0, advantage: 1, chunks: [(0..<2, 1), (2..<5, 1)])]
    let wide = ClipRange(low: 10, high: 10)
    let gradient = try bench.gradient(samples, t, microBatch: 48, clip: wide).values
    let direction = try bench.transformer.modules.parameters.flatMap {
      try Bench.normals($0.tensor.shape, $0.key).doubles()
    }
    // accumulate() adds −∇objective, in the order of the parameters that have a gradient: all of them
    try #require(direction.count == gradient.count)
    let slope = -zip(gradient, direction).reduce(0) { $0 + $1.0 * $1.1 }
    let h = 1e-3
    func value() throws -> Double {
      let report = try bench.gradient(samples, t, microBatch: 48, clip: wide).report
      return report.objective
    }
    try bench.perturb(by: h)
    let up = try value()
    try bench.perturb(by: -2 * h)
    let down = try value()
    #expect(abs((up - down) / (2 * h) / slope - 1) < 1e-2)
  }
}
