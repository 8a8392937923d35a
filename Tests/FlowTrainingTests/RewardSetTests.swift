import FlowRewards
import Foundation
import Testing
import Torch

@testable import FlowTraining

@Suite("rewards together: masks, gates, probe, waiting")
struct RewardSetTests {
  private let images: Tensor
  init() throws { images = try Tensor.zeros([3, 3, 8, 8]) }
  private let prompts = ["a", "b", "c"].map { Prompt(text: $0) }

  private func fixed(_ values: [Double?]) -> FunctionReward {
    FunctionReward { images, _ in (0..<images.size(0)).map { RewardScore(value: values[$0]) } }
  }

  @Test(
    "thresholds make 0 and 1, gates make 0 where another is not above their bar, and what failed stays nil")
  func counting() throws {
    let set = RewardSet([
      (fixed([1, 2, 3]), settings("plain")),
      (fixed([1, 2, 3]), settings("steep") { $0.threshold = 2 }),
      (
        fixed([5, 6, 7]),
        settings("gated") {
          $0.gate.reward = "plain"
          $0.gate.above = 2
        }
      ),
      (fixed([nil, 1, 2]), settings("broken")),
    ])
    let values = try set.judge(images, prompts).values
    #expect(set.counted(values) == [[1, 2, 3], [0, 1, 1], [0, 0, 7], [nil, 1, 2]])
    #expect(set.masked(values) == [true, false, false])
  }

  @Test("a failed reward masks its sample only where it counts: by weight, late weight, or as another's gate")
  func masking() throws {
    func masked(_ change: (inout RewardSettings) -> Void, gated: Bool = false) throws -> [Bool] {
      let set = RewardSet([
        (fixed([1, 2, 3]), settings("sound") { if gated { $0.gate.reward = "broken" } }),
        (fixed([1, nil, 3]), settings("broken", weight: 0, change)),
      ])
      return set.masked(try set.judge(images, prompts).values)
    }
    #expect(try masked { _ in } == [false, false, false])
    #expect(try masked { $0.weight = 1 } == [false, true, false])
    #expect(try masked { $0.lateWeight = -1 } == [false, true, false])
    #expect(try masked({ _ in }, gated: true) == [false, true, false])
  }

  @Test("NaN and infinity are no scores, and say why")
  func notNumbers() throws {
    let set = RewardSet([(fixed([.nan, .infinity, 1]), settings("odd"))])
    let judgement = try set.judge(images, prompts)
    #expect(judgement.values == [[nil, nil, 1]])
    #expect(judgement.scores[0][0].failure == "the score is nan")
    let error = #expect(throws: RewardFailure.self) { try set.checkFailures(judgement, iteration: 3) }
    #expect(
      error?.description
        == "iteration 3: reward odd failed for 2 of 3 samples, more than failure.abortAbove 0.5 allows; the last reason: "
        + "the score is inf")
    let patient = RewardSet([(fixed([.nan, .infinity, 1]), settings("odd") { $0.failure.abortAbove = 0.7 })])
    try patient.checkFailures(try patient.judge(images, prompts), iteration: 3)
  }

  @Test("too few scores are an error that names the reward")
  func wrongCount() throws {
    let set = RewardSet([(FunctionReward { _, _ in [RewardScore(value: 1)] }, settings("short"))])
    let error = #expect(throws: RunError.self) { try set.judge(images, prompts) }
    #expect(error?.description == "reward short: 1 scores for 3 images, expected one each")
  }

  // Oracle: the parts themselves.
  @Test("a judgement of parts is in the order of the images")
  func parts() throws {
    func part(_ values: [Double]) -> Judgement {
      Judgement(scores: [values.map { RewardScore(value: $0) }], seconds: [0.25])
    }
    let whole = Judgement([
      (rows: [3, 0], judgement: part([30, 0])), (rows: [2, 1], judgement: part([20, 10])),
    ])
    #expect(whole.values == [[0, 10, 20, 30]])
    #expect(whole.seconds == [0.5])
  }

  @Test("waiting rewards are asked at once and together, and given up when the check says so")
  func waits() throws {
    let slow = (0..<3).map { n in
      WaitingReward(seconds: 0.2) { images, _ in
        (0..<images.size(0)).map { RewardScore(value: Double(10 * n + $0)) }
      }
    }
    let set = RewardSet(slow.enumerated().map { ($1, settings("\($0)")) })
    #expect(set.waits)
    #expect(try set.judge(images, prompts).values == [[0, 1, 2], [10, 11, 12], [20, 21, 22]])
    struct Enough: Error {}
    let endless = WaitingReward(seconds: 600) { _, _ in [] }
    #expect(throws: Enough.self) {
      try RewardSet([(endless, settings("endless"))]).judge(images, prompts) { throw Enough() }
    }
    // Cancellation travels through the concurrent executor.
    for _ in 0..<100 where endless.cancelled == 0 { usleep(20_000) }
    #expect(endless.cancelled == 1)
  }

  @Test("the probe refuses rewards that fail, are not numbers, or cannot tell; and warns of a wrong order")
  func probe() throws {
    func probe(_ values: [Double?], failure: String? = nil) throws -> [String] {
      var warnings: [String] = []
      let reward = FunctionReward { _, _ in values.map { RewardScore(value: $0, failure: failure) } }
      try RewardSet([(reward, settings("it"))]).probe(warn: { warnings.append($0) })
      return warnings
    }
    #expect(try probe([1, 0]).isEmpty)
    #expect(try probe([0, 1]).count == 1)
    func refusal(_ values: [Double?], failure: String? = nil) -> String {
      #expect(throws: RunError.self) { try probe(values, failure: failure) }?.description ?? ""
    }
    #expect(refusal([1, 1]).contains("both score 1.0: it would teach nothing (where that is right"))
    #expect(refusal([0, 0]).contains("reward it failed its probe, the images sign.png and plane.png for"))
    #expect(refusal([.nan, 1]).hasSuffix("the score is nan"))
    #expect(refusal([nil, 1], failure: "no answer").hasSuffix("no answer"))
    let slow = RewardSet([
      (
        WaitingReward(seconds: 0.3) { _, _ in [RewardScore(value: 1), RewardScore(value: 0)] },
        settings("slow") { $0.failure.timeout = 0.1 }
      )
    ])
    let late = #expect(throws: RunError.self) { try slow.probe() }
    #expect(late?.description.contains("failure.timeout is 0.1") == true)
    // Two images may be two requests, and a repetition comes after a pause: neither is too slow.
    for (timeout, retries) in [(0.2, 0), (0.1, 1)] {
      try RewardSet([
        (
          WaitingReward(seconds: 0.3) { _, _ in [1, 0].map { RewardScore(value: $0, retries: retries) } },
          settings("patient") { $0.failure.timeout = timeout }
        )
      ]).probe()
    }
  }

  @Test("names: the label, else the name, with the score where two have one name")
  func names() {
    var labelled = RewardSettings(name: "clip", score: "cosine")
    labelled.label = "text"
    #expect(
      RewardSet.names([
        .init(name: "scenes", score: "strict"), .init(name: "scenes"), labelled, .init(name: "vivid"),
      ])
        == ["scenes:strict", "scenes:default", "text", "vivid"])
  }
}
