import FlowRewards
import Foundation
import Testing
import Torch

@testable import FlowTraining

@Suite("rewards in training, end to end on flux-tiny")
struct RewardTrainingTests {
  let shop: Workshop
  init() throws {
    shop = try Workshop()
    shop.configuration.run.iterations = 2
    shop.configuration.run.checkpointEvery = 1
  }
  private func integers(_ name: String, _ key: String) throws -> [Int] {
    try shop.rows(name).map { try #require($0[key] as? Int, "no \(key)") }
  }

  // Oracle: the same reward computed on the training thread, byte for byte.
  @Test(
    "a reward that waits for others trains the same weights, and is asked batch by batch during the rollout")
  func waiting() throws {
    try shop.train("here") { $0.optim.microBatch = 4 }
    let remote = WaitingReward(Vivid())
    try shop.train("there", rewards: [remote]) { $0.optim.microBatch = 4 }
    #expect(try shop.trained("there") == shop.trained("here"))
    #expect(try shop.timeless("there") == shop.timeless("here"))
    // the probe, then two batches of four of the eight samples, twice
    #expect(remote.calls == 1 + 2 * 2)
    let seconds = try #require(try shop.rows("there")[0]["seconds"] as? [String: Double])
    #expect(seconds["reward/vivid"] != nil && seconds["decode"]! > 0)
  }

  // Oracle: hazard 12: advantages of the rest are those of a group without the failed one.
  @Test("a failed score masks its sample, is counted with its reason, and is never a number")
  func masks() throws {
    let flaky = FunctionReward.counting { call, images, prompts in
      // call 1 is the construction's, 2 the probe
      return try Vivid().scores(images, prompts: prompts).enumerated().map {
        $0 == 1 && call > 2 ? RewardScore(value: nil, failure: "out of order", retries: 2) : $1
      }
    }
    let warnings = try shop.train("a", rewards: [flaky])
    #expect(try integers("a", "masked") == [1, 1])
    #expect(try integers("a", "failed/vivid") == [1, 1] && integers("a", "retries/vivid") == [2, 2])
    #expect(warnings.contains { $0 == "reward vivid failed for 1 of 8 samples: out of order" })
    let valid = try shop.numbers("a", "reward/vivid")
    #expect(valid.allSatisfy { $0 > 0 && $0 < 1 })
    #expect(try shop.trained("a") != Data())
  }

  // Oracle: the run that never failed, byte for byte (hazard 13).
  @Test(
    "too many failures stop the run at the iteration before, and resuming gives what never stopping gives",
    arguments: [0.5, 1])
  func aborts(above: Double) throws {
    shop.configuration.rewards[0].failure.abortAbove = above
    try shop.train("whole")
    let dying = FunctionReward.counting { call, images, prompts in
      return call == 4  // the second iteration's
        ? prompts.map { _ in RewardScore(value: nil, failure: "the server is gone") }
        : try Vivid().scores(images, prompts: prompts)
    }
    let error = #expect(throws: RunError.self) { try shop.train("parts", rewards: [dying]) }
    let text = error?.description ?? ""
    #expect(
      text.contains(
        "iteration 2: \(above < 1 ? "reward vivid failed for 8 of 8 samples" : "no sample has a valid reward")"
      )
        && text.contains("the server is gone"))
    #expect(text.hasSuffix("go on with train --resume \(shop.folder("parts").path)"))
    #expect(try shop.checkpoints("parts").last == "iteration-000001")
    try shop.train("parts", resume: true)
    #expect(try shop.trained("parts") == shop.trained("whole"))
    #expect(try shop.timeless("parts") == shop.timeless("whole"))
  }

  // Oracle: chunks that begin below σ = 0.8 of T 5, shift 3 are those from step 2 on (σ 1, 0.92, 0.82, 0.67, 0.43).
  @Test("a reward without late weight gives late chunks no advantage, and early chunks theirs")
  func late() throws {
    func train(_ name: String, draw: String, lateWeight: Double?) throws -> [String: Any] {
      try shop.train(name) { c in
        (c.chunk.plan, c.chunk.draw, c.run.iterations) = ("list:3,1", draw, 1)
        c.rewards[0].lateWeight = lateWeight
      }
      return try shop.rows(name)[0]
    }
    #expect(try train("early", draw: "only:0", lateWeight: 0)["zero_samples"] as? Int == 0)
    #expect(try train("late", draw: "only:1", lateWeight: 0)["zero_samples"] as? Int == 8)
    #expect(try train("late-too", draw: "only:1", lateWeight: 2)["zero_samples"] as? Int == 0)
    // A factor of the only reward is standardised away, up to the 1e-8 beside the standard deviation of about 1e-2.
    _ = try train("same", draw: "only:1", lateWeight: nil)
    let (same, doubled) = (
      try shop.numbers("same", "grad_norm")[0], try shop.numbers("late-too", "grad_norm")[0]
    )
    #expect(abs(same - doubled) < 1e-4 * same && same > 0)
    #expect(try shop.numbers("late", "grad_norm") == [0])
  }

  @Test("aggregate advantages: two rewards that contradict each other leave nothing to learn")
  func contradiction() throws {
    try shop.train("a") { c in
      c.aggregate = .advantages
      c.rewards = [.init(name: "vivid"), .init(name: "colourfulness", weight: -1)]
      c.run.iterations = 1
    }
    #expect(try integers("a", "zero_groups") == [2])
    #expect(try shop.rows("a")[0]["grad_norm"] as? Double == 0)
  }
}

@Suite("guards and held-out rewards during training")
struct GuardWatchTests {
  let shop: Workshop
  init() throws {
    shop = try Workshop()
    shop.configuration.run.iterations = 4
    (shop.configuration.run.evaluateEvery, shop.configuration.run.checkpointEvery) = (1, 1)
    shop.configuration.optim.lr = 1e-2
    shop.configuration.guards.diversity = 0
    shop.configuration.guards.ink = [0, 100]
    shop.configuration.guards.sharpness = [0, 1e6]
    shop.configuration.guards.grid = [0, 1e6]
  }

  // Oracle: a held-out reward that is the trained one's opposite falls whenever that one rises.
  @Test("a held-out reward that falls while the trained one rises is a warning, and is not scored on samples")
  func heldOut() throws {
    shop.configuration.rewards = [.init(name: "vivid"), .init(name: "function")]
    shop.configuration.rewards[1].label = "opposite"
    shop.configuration.rewards[1].watch = true
    let opposite = FunctionReward { images, prompts in
      try Vivid().scores(images, prompts: prompts).map { RewardScore(value: -$0.value!) }
    }
    try shop.train("a", rewards: [Vivid(), opposite])
    let rows = try shop.rows("a")
    #expect(rows.allSatisfy { $0["reward/opposite"] == nil && $0["eval/opposite"] != nil })
    let base = try JSONDecoder().decode(
      GuardWatch.Baseline.self, from: Data(contentsOf: shop.folder("a").appending(path: "baseline.json")))
    #expect(abs(base.trained + base.rewards["opposite"]!.reduce(0) { $0 + $1! } / 3) < 1e-12)
    for row in rows {
      #expect(abs((row["eval/vivid"] as! Double) + (row["eval/opposite"] as! Double)) < 1e-12)
    }
  }

  // Oracle: paired t over four prompts: differences −1 ± 0.1 exclude 0, −1 ± 2 do not.
  @Test("a held-out reward is outside its band when the interval of its paired difference lies below 0")
  func band() throws {
    let prompts = (0..<5).map { Prompt(text: "\($0)") }
    func evaluation(_ trained: [Double?], _ watched: [Double?]) -> Evaluation {
      Evaluation(
        prompts: prompts, samplesPerPrompt: 1, perPrompt: ["trained": trained, "watched": watched],
        failures: [:],
        guards: nil, pictures: [:])
    }
    let nothing = FunctionReward { _, _ in [] }
    var watch = GuardWatch(
      Configuration.Guards(),
      RewardSet([
        (nothing, settings("trained", weight: 2)), (nothing, settings("watched") { $0.watch = true }),
      ]))
    _ = watch.begin(evaluation([1, 1, 1, 1, 1], [5, 5, 5, 5, 5]))
    #expect(watch.baseline?.trained == 2)
    let fallen = evaluation([2, 1, 1, 1, nil], [3.9, 4.1, 4, 4, nil])
    #expect(watch.hasRisen(fallen) && watch.trained(fallen) == 2.5)
    #expect(watch.outside(fallen).count == 1)
    #expect(watch.outside(fallen).first?.hasPrefix("held-out watched has changed by -1.0 [") == true)
    #expect(watch.outside(evaluation([2, 2, 2, 2, 2], [2, 6, 2, 6, 4])).isEmpty)
    #expect(!watch.hasRisen(evaluation([1, 1, 1, 1, 0], [0, 0, 0, 0, 0])))
  }

  @Test("action stop ends the run and ships the best adapter whose guards were inside")
  func stops() throws {
    // Inside until the third evaluation: the guard is a reward of our own, by the number of its evaluations.
    let guardian = FunctionReward.counting { call, images, prompts in
      // construction, probe, baseline; then one evaluation of three prompts an iteration
      return prompts.indices.map { RewardScore(value: Double(call > 5 ? -1 : 1) + Double($0) * 1e-3) }
    }
    shop.configuration.guards.action = .stop
    shop.configuration.rewards = [.init(name: "vivid"), .init(name: "function")]
    shop.configuration.rewards[1].watch = true
    let events = try shop.train("a", rewards: [Vivid(), guardian])
    let rows = try shop.rows("a")
    let stop = try #require(events.last)
    #expect(
      rows.count == 3 && stop.contains("iteration 3: the reward rises, but held-out function has changed by"))
    let best = rows[0]["eval/vivid"] as! Double >= rows[1]["eval/vivid"] as! Double ? 1 : 2
    #expect(stop.hasSuffix("the run ends with the adapter of iteration \(best), the best before"))
    let kept = shop.checkpoint("a", best).appending(path: "pytorch_lora_weights.safetensors")
    if FileManager.default.fileExists(atPath: kept.path) {
      #expect(try shop.trained("a") == Data(contentsOf: kept))
    }
    let last = shop.checkpoint("a", 3).appending(path: "pytorch_lora_weights.safetensors")
    #expect(try shop.trained("a") != Data(contentsOf: last))
  }

  @Test("an evaluation that a reward failed in says so, with the reason, and the run goes on")
  func evaluationsWithoutScores() throws {
    let dying = FunctionReward.counting { call, images, prompts in
      // construction, probe, rollout, evaluation
      return call == 4
        ? prompts.map { _ in RewardScore(value: nil, failure: "the server is gone") }
        : try Vivid().scores(images, prompts: prompts)
    }
    let warnings = try shop.train("a", rewards: [dying]) {
      $0.guards.action = .off
      $0.run.iterations = 1
    }
    #expect(warnings == ["evaluation: reward vivid failed for 6 of 6 images: the server is gone"])
    let row = try shop.rows("a")[0]
    #expect(row["eval/vivid"] is NSNull && row["eval/failed/vivid"] as? Int == 6)
  }

  @Test("bands of guards: each side, with number and bound")
  func bands() {
    var base = GuardValues(blank: 0.01, diversity: 0.2, ink: 0.1, vivid: 0.3)
    let bands = Configuration.Guards()
    #expect(base.outside(bands, base: base).isEmpty)
    base.ink = 0.17
    #expect(
      base.outside(bands, base: GuardValues(blank: 0.01, diversity: 0.2, ink: 0.1, vivid: 0.3))
        == ["ink 0.17 is above 0.16"])
    let collapsed = GuardValues(blank: 0.5, diversity: .nan, ink: 0.01, vivid: 0)
    #expect(collapsed.outside(bands, base: base).count == 3)
  }

  @Test("off measures nothing before training")
  func off() throws {
    try shop.train("a") {
      $0.guards.action = .off
      $0.run.iterations = 1
    }
    #expect(!FileManager.default.fileExists(atPath: shop.folder("a").appending(path: "baseline.json").path))
    #expect(try shop.rows("a")[0]["guards_outside"] == nil)
  }
}
