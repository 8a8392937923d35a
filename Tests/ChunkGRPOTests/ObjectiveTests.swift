import Foundation
import Testing

@testable import ChunkGRPO

@Suite struct AdvantageTests {
  @Test("A = (R − mean) / (std + 1e-8) with n − 1")
  func closedForm() throws {
    let got = try Advantages.group(rewards: [1, 2, 3, 6])
    let std = (14.0 / 3).squareRoot()
    expectClose(got.values, [-2, -1, 0, 3].map { $0 / (std + 1e-8) }, absolute: 1e-15)
    #expect(got.zeroGroups == 0 && got.masked == 0)
  }

  /// The members' float32 mean is not the common value, so their deviation is rounding noise: advantages near
  /// 1 without the test.
  @Test("equal rewards give 0, whatever the mean rounds to", arguments: [AdvantageStd.group, .global])
  func equalRewards(_ std: AdvantageStd) throws {
    let flat = [Double](repeating: 0.1, count: 3)
    #expect(flat.reduce(0, +) / 3 != 0.1)  // the case is a real one
    let got = try Advantages.groups(rewards: [flat, [1, 2, 3]], std: std)
    #expect(Array(got.values[..<3]) == [0, 0, 0])
    #expect(got.values[5] > 0.5)
    #expect(got.zeroGroups == 1)
  }

  @Test("masked members are left out, and a group with fewer than two others is zero")
  func masks() throws {
    let got = try Advantages.groups(
      rewards: [[1, .nan, 3], [4, 5, 6]], masked: [[false, true, false], [true, true, false]])
    expectClose(got.values, [-0.5.squareRoot(), 0, 0.5.squareRoot(), 0, 0, 0], absolute: 1e-8)
    #expect(got.zeroGroups == 1 && got.masked == 3)
  }

  @Test("the global standard deviation is that of all unmasked samples, the mean stays the group's")
  func globalStd() throws {
    let got = try Advantages.groups(rewards: [[0, 2], [10, 14]], std: .global)
    let std = (131.0 / 3).squareRoot()  // of 0, 2, 10, 14 about 6.5: 42.25 + 20.25 + 12.25 + 56.25
    expectClose(got.values, [-1, 1, -2, 2].map { $0 / std }, relative: 1e-8)
  }

  /// Of 1, 2, 3 and then 6, 8: mean 4, squares 9 + 4 + 1 + 4 + 16 = 34 over n − 1 = 4.
  @Test("running statistics: mean and standard deviation of all rewards of the prompt so far")
  func running() throws {
    var seen = RewardStatistics()
    seen.add([1, 2, 3])
    #expect(seen.mean == 2 && seen.standardDeviation == 1 && seen.count == 3)
    let first = try Advantages.groups(rewards: [[1, 2, 3]], running: [seen])
    #expect(first == (try Advantages.groups(rewards: [[1, 2, 3]])))  // bit for bit
    seen.add([])
    seen.add([6, 8])
    expectClose(seen.mean, 4, relative: 1e-15)
    expectClose(seen.standardDeviation, 8.5.squareRoot(), relative: 1e-15)
    let second = try Advantages.groups(
      rewards: [[6, .nan, 8], [5, 5]], masked: [[false, true, false], [false, false]],
      running: [
        seen,
        {
          var flat = RewardStatistics(); flat.add([5, 5, 5, 5]); return flat
        }(),
      ])
    let std = 8.5.squareRoot() + 1e-8
    expectClose(second.values, [2 / std, 0, 4 / std, 0, 0], relative: 1e-14)
    #expect(second.zeroGroups == 1 && second.masked == 1)
    // Equal rewards that are better than before are worth something.
    let equal = try Advantages.groups(rewards: [[6, 6]], running: [seen])
    expectClose(equal.values, [2 / std, 2 / std], relative: 1e-14)
    let global = try Advantages.groups(rewards: [[6, 8]], std: .global, running: [seen])
    expectClose(global.values, [2, 4].map { $0 / (2.0.squareRoot() + 1e-8) }, relative: 1e-14)
    #expect(RewardStatistics(values: seen.values) == seen)
    #expect(RewardStatistics(values: RewardStatistics().values) == RewardStatistics())
    #expect(RewardStatistics(values: [1, 2]) == nil && RewardStatistics(values: [0.5, 0, 0, 0, 0]) == nil)
  }

  /// Oracle: the two-pass formula over everything; both lose some 1e-16 of the squares of numbers near 10.
  @Test("running statistics of many batches are those of all rewards at once")
  func runningBatches() {
    var (stream, seen, all) = (testStream("running"), RewardStatistics(), [Double]())
    for size in [1, 12, 3, 7, 1, 20] {
      let batch = (0..<size).map { _ in 10 + stream.uniform() }
      seen.add(batch)
      all += batch
    }
    let mean = all.reduce(0, +) / 44
    let squares = all.reduce(0) { $0 + ($1 - mean) * ($1 - mean) }
    expectClose(seen.mean, mean, relative: 1e-14)
    expectClose(seen.standardDeviation, (squares / 43).squareRoot(), relative: 1e-13)
    #expect(seen.low == all.min() && seen.high == all.max() && seen.varies)
  }

  @Test("clamping acts from group size 27 on")
  func clamp() throws {
    // one outlier among n: (n − 1)/√n
    let outlier = { (n: Int) in [Double](repeating: 0, count: n - 1) + [1] }
    #expect(try Advantages.group(rewards: outlier(26)).values[25] < 5)
    #expect(try Advantages.group(rewards: outlier(27)).values[26] > 4.99)
    #expect(try Advantages.group(rewards: outlier(28)).values[27] == 5)
    #expect(try Advantages.group(rewards: outlier(28), clamp: 1).values[27] == 1)
  }

  @Test("groups of one and failed rewards are refused")
  func refusals() {
    let error = #expect(throws: AdvantageError.self) { try Advantages.group(rewards: [1]) }
    #expect(error?.description == "group 0 has 1 sample, expected at least 2: raise group.size")
    #expect(throws: AdvantageError.notFinite(group: 1, sample: 0, reward: .infinity)) {
      try Advantages.groups(rewards: [[1, 2], [.infinity, 1]])
    }
    #expect(throws: AdvantageError.shapeMismatch(expected: 2, got: 1)) {
      try Advantages.group(rewards: [1, 2], masked: [false])
    }
  }

  /// z of 1, 2, 3 is −1, 0, 1; of 3, 1, 2 with the last masked (2, 1 → ±√½).
  @Test("advantages: each reward's own, weighted and not standardised again")
  func ownAdvantages() throws {
    let sums = try RewardAggregate.advantages.combine(
      rewards: [[1, 2, 3], [4, 4, 4], [30, 10, 20]], weights: [2, 5, -1])
    expectClose(sums, [-3, 1, 2], absolute: 1e-7)
    let masked = try RewardAggregate.advantages.combine(
      rewards: [[2, 1, 7]], weights: [1], masked: [false, false, true])
    let root = 0.5.squareRoot()
    expectClose(masked, [root, -root, 0], absolute: 1e-7)
    // z of one outlier among 28 is above 5
    let outlier = [Double](repeating: 0, count: 27) + [1]
    let clamped = try RewardAggregate.advantages.combine(rewards: [outlier], weights: [1], clamp: 3)
    #expect(clamped.last == 3)
    let groups = Advantages.summed([[-9, 1], [0, 0]], masked: [[false, false], [true, false]], clamp: 5)
    #expect(groups.values == [-5, 1, 0, 0] && groups.zeroGroups == 1 && groups.masked == 1)
  }

  @Test("rewards combine as sums or as group z-scores")
  func aggregates() throws {
    let rewards = [[1.0, 2, 3], [100, 100, 100], [0, 50, 10]]
    #expect(try RewardAggregate.sum.combine(rewards: rewards, weights: [1, 0.5, 0.1]) == [51, 57, 54])
    let std = 700.0.squareRoot()  // of 0, 50, 10 about 20: 400 + 900 + 100 over 2
    expectClose(
      try RewardAggregate.normalised.combine(rewards: rewards, weights: [1, 0.5, 2]),
      [-1 - 40 / std, 60 / std, 1 - 20 / std], absolute: 2e-8)  // + 1e-8 in each divisor
    let masked = try RewardAggregate.normalised.combine(
      rewards: [[1, .nan, 3]], weights: [2], masked: [false, true, false])
    expectClose(masked, [-2.0.squareRoot(), 0, 2.0.squareRoot()], absolute: 2e-8)
    #expect(throws: AdvantageError.weightCount(rewards: 3, weights: 1)) {
      try RewardAggregate.sum.combine(rewards: rewards, weights: [1])
    }
  }
}

@Suite struct ObjectiveTests {
  let clip = ClipRange(low: 0.05, high: 0.08)

  /// Changes of log p between −0.2 and 0.8 of `scale`. One within a finite difference of a clip edge would show as
  /// a mismatch; at these fixed seeds there is none.
  private func chunks(_ name: String, scale: Double) -> [TrainedChunk] {
    var random = testStream(name)
    return [2, 3, 1, 4].enumerated().map { j, size in
      let old = (0..<size).map { _ in -1.4 + random.uniform() }
      let new = old.map { $0 + scale * (random.uniform() - 0.2) }
      return TrainedChunk(new: new, old: old, weight: Double(j) + 0.5)
    }
  }

  /// Central differences, h = 1e-5: h²·f''' and ε/h are both near 1e-11 for values below 1; demanded 1e-9.
  @Test("coefficients are the value's derivatives", arguments: RatioKind.allCases, [-1.3, 0.9])
  func finiteDifferences(_ ratio: RatioKind, _ advantage: Double) throws {
    var clipped = 0
    for (trial, scale) in [0.02, 0.3, 0.8, -0.8].enumerated() {
      let chunks = chunks("objective \(trial)", scale: scale)
      func value(_ chunks: [TrainedChunk]) throws -> SampleObjective {
        try SampleObjective(advantage: advantage, chunks: chunks, ratio: ratio, clip: clip, samples: 3)
      }
      let got = try value(chunks)
      clipped += got.clipped.filter { $0 }.count
      for (j, chunk) in chunks.enumerated() {
        for i in chunk.new.indices {
          let sides = try [1e-5, -1e-5].map { h in
            var (moved, new) = (chunks, chunk.new)
            new[i] += h
            moved[j] = TrainedChunk(new: new, old: chunk.old, weight: chunk.weight)
            return try value(moved).value
          }
          expectClose(
            got.coefficients[j][i], (sides[0] - sides[1]) / 2e-5, absolute: 1e-9, "chunk \(j) step \(i)")
        }
      }
    }
    #expect(clipped > 0)  // the clip was exercised
  }

  /// Chunks pull in different directions: each must be clipped on its own side. Tolerance as above.
  @Test("with an advantage a chunk, coefficients are the value's derivatives", arguments: RatioKind.allCases)
  func advantagesOfChunks(_ ratio: RatioKind) throws {
    var clipped = 0
    for scale in [0.01, 0.05, 0.3] {
      let chunks = chunks("advantages of chunks", scale: scale)
      let advantages = chunks.indices.map { [1.3, -0.7, 0, 2.1, -1.9][$0 % 5] }
      func value(_ chunks: [TrainedChunk]) throws -> SampleObjective {
        try SampleObjective(advantages: advantages, chunks: chunks, ratio: ratio, clip: clip, samples: 3)
      }
      let got = try value(chunks)
      clipped += got.clipped.count { $0 }
      for (j, chunk) in chunks.enumerated() {
        for i in chunk.new.indices {
          let sides = try [1e-5, -1e-5].map { h in
            var (moved, new) = (chunks, chunk.new)
            new[i] += h
            moved[j] = TrainedChunk(new: new, old: chunk.old, weight: chunk.weight)
            return try value(moved).value
          }
          expectClose(
            got.coefficients[j][i], (sides[0] - sides[1]) / 2e-5, absolute: 1e-9, "chunk \(j) step \(i)")
        }
      }
      // All alike is the one advantage, bit for bit.
      let alike = try SampleObjective(
        advantages: chunks.map { _ in -1.3 }, chunks: chunks, ratio: ratio, clip: clip, samples: 3)
      #expect(
        alike == (try SampleObjective(advantage: -1.3, chunks: chunks, ratio: ratio, clip: clip, samples: 3)))
    }
    #expect(clipped > 0 || ratio == .sequence)  // one ratio is held only if it is for all
  }

  /// Normalised log-ratios are independent of log p: only they may count. Tolerance as above.
  @Test("log-ratios given apart take the place of the differences", arguments: RatioKind.allCases)
  func changes(_ ratio: RatioKind) throws {
    let plain = chunks("changes", scale: 0.3)
    func value(_ changes: [[Double]]) throws -> SampleObjective {
      try SampleObjective(
        advantage: 1.3,
        chunks: zip(plain, changes).map {
          TrainedChunk(new: $0.old, old: $0.old, changes: $1, weight: $0.weight)
        }, ratio: ratio, clip: clip, samples: 3)
    }
    let got = try value(plain.map(\.changes))
    let same = try SampleObjective(advantage: 1.3, chunks: plain, ratio: ratio, clip: clip, samples: 3)
    #expect(got == same)
    for (j, chunk) in plain.enumerated() {
      let sides = try [1e-5, -1e-5].map { h in
        var changes = plain.map(\.changes)
        changes[j][chunk.changes.count - 1] += h
        return try value(changes).value
      }
      expectClose(got.coefficients[j].last!, (sides[0] - sides[1]) / 2e-5, absolute: 1e-9)
    }
  }

  /// The closed form of the method, written out for one case of each side of the clip.
  @Test("c = A·r·u·W / (cs·ΣW·S), one-sided")
  func closedForm() throws {
    let chunks = [
      TrainedChunk(new: [0.10, 0.20], old: [0, 0], weight: 1), TrainedChunk(new: [-0.3], old: [0], weight: 3),
    ]
    let up = try SampleObjective(advantage: 2, chunks: chunks, ratio: .chunk, clip: clip, samples: 5)
    expectClose(up.ratios, [exp(0.15), exp(-0.3)], relative: 1e-15)
    #expect(up.clipped == [true, false])  // above 1 + ε⁺ with A > 0; far below 1 − ε⁻ is not clipped
    #expect(up.coefficients[0] == [0, 0])
    expectClose(up.coefficients[1], [2 * exp(-0.3) * 3 / 4 / 5], relative: 1e-15)
    expectClose(up.value, (2 * 1.08 * 1 + 2 * exp(-0.3) * 3) / 4 / 5, relative: 1e-15)
    expectClose(up.stepWeights, [1.0 / 40, 3.0 / 20], relative: 1e-15)
    let down = try SampleObjective(advantage: -2, chunks: chunks, ratio: .chunk, clip: clip, samples: 5)
    #expect(down.clipped == [false, true])
    expectClose(down.coefficients[0][0], -2 * exp(0.15) / 2 / 4 / 5, relative: 1e-15)
    #expect(down.coefficients[1] == [0])
    let zero = try SampleObjective(advantage: 0, chunks: chunks, ratio: .chunk, clip: clip, samples: 5)
    #expect(zero.coefficients == [[0, 0], [0]] && zero.clipped == [false, false] && zero.value == 0)
  }

  @Test("at ratio 1 all ratio kinds give the same coefficients: a chunk's is the mean of its steps'")
  func ratioOne() throws {
    let chunks = chunks("ratio one", scale: 0).map {
      TrainedChunk(new: $0.old, old: $0.old, weight: $0.weight)
    }
    let all = try RatioKind.allCases.map {
      try SampleObjective(advantage: -0.7, chunks: chunks, ratio: $0, clip: clip, samples: 4)
    }
    for one in all {
      #expect(one.ratios.allSatisfy { $0 == 1 })
      #expect(one.coefficients == all[0].coefficients)  // bit for bit
      expectClose(one.value, -0.7 / 4, relative: 1e-15)
      expectClose(one.coefficients.flatMap { $0 }.reduce(0, +), -0.7 / 4, relative: 1e-15)  // Σω = 1
    }
    // hazard 5: with W_j = cs_j the objective's gradient is the plain mean over steps
    let plain = try SampleObjective(
      advantage: 1,
      chunks: [2, 3].map {
        TrainedChunk(
          new: .init(repeating: -1, count: $0), old: .init(repeating: -1, count: $0), weight: Double($0))
      },
      ratio: .chunk, clip: clip, samples: 1)
    expectClose(plain.coefficients.flatMap { $0 }, [0.2, 0.2, 0.2, 0.2, 0.2], relative: 1e-15)
  }

  @Test("chunks of one step are step-level GRPO, bit for bit", arguments: [-0.8, 1.7])
  func singleSteps(_ advantage: Double) throws {
    let steps = (chunks("up", scale: 0.3) + chunks("down", scale: -0.3)).flatMap { chunk in
      zip(chunk.new, chunk.old).map { TrainedChunk(new: [$0], old: [$1]) }
    }
    let chunk = try SampleObjective(
      advantage: advantage, chunks: steps, ratio: .chunk, clip: clip, samples: 6)
    let step = try SampleObjective(advantage: advantage, chunks: steps, ratio: .step, clip: clip, samples: 6)
    #expect(chunk == step)
    #expect(step.clipped.contains(true) && step.clipped.contains(false))
  }

  /// GCPO's recorded updates: rewards, ratios and the running sum of losses over S = 2 samples an update.
  /// Ratios are recorded in float32 (6e-8) and the sum runs in float32 over up to 32 terms of size 0.5: 1e-6.
  @Test("advantages and losses are those of GCPO's training step", arguments: [true, false])
  func recordedUpdates(_ chunked: Bool) throws {
    let f = chunked ? Fixture.chunkStep : Fixture.grpoStep
    let advantages = try Advantages.group(rewards: f.doubles("out.rewards")).values
    let order = f.has("out.randperm.4") ? try f.integers("out.randperm.4") : [0, 1, 2, 3]
    let ratios = try f.doubles("out.ratios")
    let perSample = ratios.count / 4
    let losses = try f.doubles("out.total_loss_cumulative")
    var loss = 0.0
    for (k, sample) in order.enumerated() {
      let chunks = ratios[k * perSample..<(k + 1) * perSample].map { TrainedChunk(new: [log($0)], old: [0]) }
      loss -= try SampleObjective(
        advantage: advantages[sample], chunks: chunks, ratio: .chunk, clip: ClipRange(low: 5e-5, high: 5e-5),
        samples: 2
      ).value
      expectClose(loss, losses[(k + 1) * perSample - 1], absolute: 1e-6)
    }
  }

  /// As above; the penalty is smooth.
  @Test("k3's coefficient is its derivative, 0 at the reference")
  func k3() {
    let (new, reference) = ([-1.2, -1.0, -0.7], [-1.0, -1.1, -0.9])
    func share(_ new: [Double]) -> (value: Double, coefficient: Double) {
      SampleObjective.k3(
        chunk: TrainedChunk(new: new, old: new), reference: reference, beta: 0.3, stepWeight: 0.25)
    }
    let sides = [1e-5, -1e-5].map { share([new[0], new[1] + $0, new[2]]).value }
    expectClose(share(new).coefficient, (sides[0] - sides[1]) / 2e-5, absolute: 1e-10)
    let d = (0.2 - 0.1 - 0.2) / 3
    expectClose(share(new).value, -0.3 * (exp(d) - 1 - d) * 0.75, relative: 1e-12)
    #expect(share(reference) == (0, 0))
  }

  @Test("log-probabilities that are not finite are refused by step")
  func refusals() {
    let bad = [TrainedChunk(new: [0], old: [0]), TrainedChunk(new: [0, .nan], old: [0, 1])]
    let error = #expect(throws: ObjectiveError.self) {
      try SampleObjective(advantage: 1, chunks: bad, ratio: .chunk, clip: clip, samples: 1)
    }
    #expect(
      error?.description.hasPrefix("step 1 of trained chunk 1: log-probability nan now and 1.0") == true)
    #expect(throws: ObjectiveError.notFinite(chunk: 0, step: 0, new: 800, old: 0)) {
      try SampleObjective(
        advantage: 1, chunks: [TrainedChunk(new: [800], old: [0])], ratio: .step, clip: clip, samples: 1)
    }
  }
}
