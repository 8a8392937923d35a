import ChunkGRPO
import Foundation
import Testing
import Torch

@testable import FlowTraining

@Suite("dynamics and the plan of auto, on flux-tiny")
struct ChunkDynamicsTests {
  let shop: Workshop
  init() throws {
    shop = try Workshop()
    shop.configuration.sampling.steps = 9
    (shop.configuration.chunk.plan, shop.configuration.chunk.stopSize) = ("auto", 4)
    (shop.configuration.run.iterations, shop.configuration.run.checkpointEvery) = (2, 1)
  }

  // Oracle: the same trajectories one pass each, and in one batch; by their seeds they are the same, and the passes differ
  // by rounding only: 1e-5 of a float32 network.
  @Test("curves do not depend on the batch, differ by seed, prompt and sample, and follow the window")
  func curves() throws {
    var c = shop.configuration
    func measure(_ rows: Int, seed: UInt64 = 1) throws -> ChunkDynamics {
      c.optim.microBatch = rows
      return try ChunkDynamics.measure(
        try Engine(c), c.sampling, prompts: ["a red cat", "two dogs"], samples: 3, distance: .l1,
        random: RandomPlan(seed: seed))
    }
    let (all, few) = (try measure(6), try measure(2))
    #expect(all.prompts.count == 2 && all.curves.map(\.count) == [3, 3])
    #expect(all.all.allSatisfy { $0.count == 8 && $0.allSatisfy { $0 > 0 } } && all.firstStep == 0)
    for (a, b) in zip(all.all, few.all) { for (a, b) in zip(a, b) { #expect(abs(a - b) <= 1e-5 * b) } }
    #expect(Set(all.all).count == 6)
    #expect(Set(all.all + (try measure(6, seed: 2)).all).count == 12)
    c.sampling.window = .steps(first: 2, last: 5)
    let part = try measure(6)
    #expect(
      part.firstStep == 2 && part.all.allSatisfy { $0.count == 4 }
        && part.steps.map(\.sigma) == all.steps[2..<6].map(\.sigma))
  }

  @Test("prompts of a pilot: different texts, chosen by the seed")
  func prompts() {
    let texts = ["a", "b", "c", "a", "d", "e", "b", "f"]
    let chosen = (1...9).map { ChunkDynamics.choose(3, of: texts, RandomPlan(seed: $0)) }
    #expect(chosen.allSatisfy { Set($0).count == 3 && Set($0).isSubset(of: Set(texts)) })
    #expect(Set(chosen).count > 1)
    #expect(Set(ChunkDynamics.choose(20, of: texts, RandomPlan(seed: 1))) == Set(texts))
  }

  // Oracle: a run that is given the plan as a list: byte for byte the same, from the first iteration on.
  @Test("a run by auto is the run by the list it chose; the plan is recorded, and no second pilot runs")
  func recorded() throws {
    try shop.train("auto")
    let choice = try #require(try PlanChoice(in: shop.folder("auto"), steps: 8))
    let checkpoint = shop.checkpoint("auto", 2)
    #expect(try PlanChoice(in: checkpoint, steps: 8) == choice)
    #expect(choice.risk.trajectories == 12)  // three prompts to train on, four samples of each
    #expect(choice.plan.sizes.allSatisfy { 2...4 ~= $0 })
    try shop.train("list") { $0.chunk.plan = ChunkStrategy.list(choice.plan.sizes).description }
    #expect(try shop.trained("auto") == shop.trained("list"))
    #expect(try shop.timeless("auto") == shop.timeless("list"))
    let seconds = try shop.rows("auto").map { try #require($0["seconds"] as? [String: Double]) }
    #expect(seconds[0]["pilot"]! > 0)
    #expect(seconds[1]["pilot"] == nil)

    // A run that stopped after an iteration goes on with its plan.
    try shop.train("parts") { $0.run.iterations = 1 }
    try shop.train("parts", resume: true)
    let resumed = try shop.rows("parts").map { try #require($0["seconds"] as? [String: Double]) }
    #expect(resumed.map { $0["pilot"] != nil } == [true, false])
    #expect(try shop.trained("parts") == shop.trained("auto"))
  }

  @Test("a plan that is lost or of another length stops the resume, and names the way out")
  func lost() throws {
    try shop.train("run") { $0.run.iterations = 1 }
    // A checkpoint that never had one: made by a list.
    try shop.train("list") { ($0.chunk.plan, $0.run.iterations) = ("fixed:2", 1) }
    let error = #expect(throws: RunError.self) { try shop.train("list", resume: true) }
    #expect(error?.description.contains("chunks.json, the plan of chunk.plan auto, is missing") == true)
    let folder = shop.checkpoint("run", 1)
    let other = #expect(throws: RunError.self) { try PlanChoice(in: folder, steps: 5) }
    #expect(other?.description.contains("cover 8 steps, the configuration has 5 trainable") == true)
    try Data("{}".utf8).write(to: folder.appending(path: "chunks.json"))
    #expect(throws: RunError.self) { try PlanChoice(in: folder, steps: 8) }
  }
}
