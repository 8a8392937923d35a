import ChunkGRPO
import Foundation
import Testing
import Torch

@testable import FlowTraining

@Suite("options of training, end to end on flux-tiny")
struct TrainerOptionsTests {
  let shop: Workshop
  init() throws {
    shop = try Workshop()
    shop.configuration.sampling.steps = 9
    shop.configuration.chunk.plan = "list:2,3,3"
    shop.configuration.run.iterations = 2
    shop.configuration.run.checkpointEvery = 1
  }

  private func integers(_ name: String, _ key: String) throws -> [Int] {
    try shop.rows(name).map { try #require($0[key] as? Int, "no \(key)") }
  }

  private func apply(_ overrides: [String], to c: inout Configuration) throws {
    let base = c.yaml()
    c = try Configuration.load(yaml: base, source: "base", overrides: overrides)
  }

  /// Hazards 1 and 13: exact, no tolerance.
  @Test(
    "every option: replay is exact, weights move, and a run in two parts equals one, byte for byte",
    arguments: [
      ["chunk.plan=adaptive", "chunk.stopSize=3"],
      ["chunk.plan=adaptive-shared", "chunk.draw=weighted", "chunk.distance=cosine"],
      ["chunk.plan=auto", "chunk.stopSize=4", "chunk.draw=weighted"],
      ["chunk.draw=weighted:softmax", "chunk.stepFraction=0.5"],
      ["loss.kl=0.5"], ["loss.kl=0.5", "loss.klForm=exact", "sampling.step=cps", "sampling.eta=0.8"],
      ["loss.kl=0.5", "loss.klForm=k3", "optim.microBatch=2"],
      ["loss.kl=0.5", "trainable.kind=full", "optim.lr=1.0e-4"],
      ["loss.ratioNorm=guard", "loss.clip=[2.0e-6, 2.0e-6]"],
      ["loss.ratioNorm=guard", "loss.anchor=replay", "loss.kl=0.5", "loss.klForm=k3", "optim.microBatch=3"],
      ["group.statistics=running"],
      ["group.statistics=running", "loss.advantageStd=global", "loss.anchor=replay"],
      ["sampling.window=sliding:3,2,1", "chunk.plan=list:1,2"],
      ["sampling.window=random:3", "chunk.plan=adaptive", "chunk.stopSize=2", "chunk.minChunk=1"],
      [
        "sampling.window=random:3", "chunk.plan=list:1,2", "sampling.coarse=2", "sampling.prefix=shared",
        "sampling.step=cps", "sampling.eta=0.8",
      ],
      ["sampling.window=drawn", "sampling.coarse=2", "sampling.prefix=shared", "optim.microBatch=3"],
      ["sampling.window=drawn", "chunk.plan=step", "chunk.stepFraction=0.5", "sampling.step=dance-sde"],
    ])
  func exact(_ overrides: [String]) throws {
    try shop.train("whole") { try? apply(overrides, to: &$0) }
    try shop.train("parts") {
      try? apply(overrides + ["run.iterations=1"], to: &$0)
    }
    #expect(try shop.trained("parts") != shop.trained("whole"))
    try shop.train("parts", resume: true) { try? apply(overrides, to: &$0) }
    #expect(try shop.trained("parts") == shop.trained("whole"))
    #expect(try shop.timeless("parts") == shop.timeless("whole"))
    #expect(try shop.numbers("whole", "replay_gap") == [0, 0])
    #expect(try shop.numbers("whole", "grad_norm").allSatisfy { $0 > 0 })
    let stored = try Configuration.load(file: shop.folder("whole").appending(path: "config.yaml"))
    #expect(stored != shop.configuration, "the overrides did not arrive")
    if stored.loss.kl > 0 {
      // The first update's policy is its own reference in the first iteration; from then on it moves away.
      let divergence = try shop.numbers("whole", "kl")
      #expect(divergence.allSatisfy { $0 > 0 } && divergence[0] < divergence[1])
    }
  }

  // Oracle: the bounds of the definition, and that weights follow trajectories, which the seed changes.
  @Test("adaptive plans and weighted draws follow the trajectories and are logged")
  func followsTrajectories() throws {
    func train(_ name: String, _ plan: String, seed: UInt64) throws -> [[String: Any]] {
      try shop.train(name) { c in
        (c.chunk.plan, c.chunk.draw, c.seed) = (plan, "weighted", seed)
        (c.chunk.stopSize, c.chunk.minChunk, c.sampling.steps) = (5, 2, 17)
      }
      return try shop.rows(name)
    }
    var probabilities: Set<[Double]> = []
    for (plan, seed) in [("adaptive", 1), ("adaptive-shared", 1), ("adaptive-shared", 2), ("fixed:4", 1)] {
      for row in try train("\(plan) \(seed)", plan, seed: UInt64(seed)) {
        let sizes = try #require(row["chunk_sizes"] as? [Int])
        let p = try #require(row["draw_p"] as? [Double])
        let inclusion = try #require(row["draw_inclusion"] as? [Double])
        #expect(sizes.reduce(0, +) == 16 && sizes.allSatisfy { 2...5 ~= $0 } && p.count == sizes.count)
        #expect(abs(p.reduce(0, +) - 1) < 1e-12)  // rounding of K quotients
        // half of the chunks are drawn; the quadrature's 1e-10
        #expect(abs(inclusion.reduce(0, +) - Double(max(1, sizes.count / 2))) < 1e-9)
        #expect(p.allSatisfy { $0 > 0 } && Set(p).count > 1)
        probabilities.insert(p)
        let plans = row["plans"] as? Int
        #expect(plan == "adaptive" ? 1...8 ~= (plans ?? 0) : plans == nil)
      }
    }
    // "adaptive" and "adaptive-shared" log one plan, and train on others after the first update; all else differs.
    #expect(probabilities.count >= 7)
  }

  // Oracle: the run that anchors in the rollout; where passes are bit-equal not a byte may differ.
  @Test(
    "old log-probabilities from a replay: the same run for one more pass over the trained steps",
    arguments: ["none", "guard"])
  func replayedAnchor(_ norm: String) throws {
    let common = ["loss.ratioNorm=\(norm)", "optim.microBatch=4"]
    try shop.train("rollout") { try? apply(common, to: &$0) }
    try shop.train("replay") { try? apply(common + ["loss.anchor=replay"], to: &$0) }
    #expect(try shop.trained("replay") == shop.trained("rollout"))
    func rest(_ name: String) throws -> [String] {
      try shop.timeless(name).map { $0.replacing(/"(rows_update|network_passes)":\d+/, with: "") }
    }
    #expect(try rest("replay") == rest("rollout"))
    for key in ["rows_update", "network_passes"] {
      let extra = zip(try integers("replay", key), try integers("rollout", key)).map { $0 - $1 }
      // passes of 4 rows each
      #expect(extra == (try integers("rollout", "trained_steps").map { ($0 + 3) / 4 * 4 }))
    }
  }

  // The mean and spread over all rewards so far are those of the group the first time, and others from then on.
  @Test("running statistics differ from the group's once a prompt comes again")
  func runningStatistics() throws {
    shop.configuration.run.iterations = 3
    try shop.train("group")
    try shop.train("running") { $0.group.statistics = .running }
    let (group, running) = (try shop.timeless("group"), try shop.timeless("running"))
    // three prompts, two an iteration: the second iteration repeats one
    #expect(running[0] == group[0] && running[2] != group[2])
    #expect(try shop.trained("running") != shop.trained("group"))
    let stored = try SafetensorsFile(shop.checkpoint("running", 3).appending(path: "training.safetensors"))
    let rows = try stored.require("rewards").doubles()
    #expect(stride(from: 0, to: 15, by: 5).map { rows[$0] } == [8, 8, 8])
    #expect(
      try !SafetensorsFile(shop.checkpoint("group", 3).appending(path: "training.safetensors")).names
        .contains("rewards"))
    // Another prompt file under the same run is found out.
    try Data(#"{"prompt": "a red cat", "split": "train"}"#.utf8).write(to: shop.folder("prompts.jsonl"))
    #expect(
      message {
        try shop.train("running", resume: true) { ($0.group.statistics, $0.run.iterations) = (.running, 4) }
      }.contains("rewards are those of 3 prompts"))
  }

  // Oracle: the run that shares nothing; passes of equally many rows, so not a byte may differ.
  @Test(
    "a prefix computed once for a group changes nothing but the number of passes",
    arguments: [
      (["sampling.window=4-6", "chunk.plan=list:1,2"], 72, 8 * 5 + 4 * 4),
      (["sampling.window=4-6", "chunk.plan=list:1,2", "sampling.coarse=2"], 8 * 7, 8 * 5 + 4 * 2),
      (["sampling.window=drawn", "chunk.draw=only:2"], 72, 8 * 4 + 4 * 5),
      (["sampling.window=4-6", "chunk.plan=list:1,2", "sampling.sharedNoise=batch"], 72, 8 * 5 + 4 * 4),
    ])
  func sharedPrefix(_ overrides: [String], _ each: Int, _ shared: Int) throws {
    // passes of 4 rows: the prefixes of both groups fill one of them, by halves
    try shop.train("each") { try? apply(overrides + ["optim.microBatch=4"], to: &$0) }
    try shop.train("shared") {
      try? apply(overrides + ["optim.microBatch=4", "sampling.prefix=shared"], to: &$0)
    }
    #expect(try shop.trained("shared") == shop.trained("each"))
    #expect(try integers("each", "rows_rollout") == [each, each])
    #expect(try integers("shared", "rows_rollout") == [shared, shared])
    func rest(_ name: String) throws -> [String] {
      try shop.timeless(name).map { $0.replacing(/"(rows_rollout|network_passes)":\d+/, with: "") }
    }
    #expect(try rest("shared") == rest("each"))
  }

  @Test("--dry-run counts the rollout's network evaluations; what repeats add is counted by the run")
  func summary() throws {
    func line(_ overrides: [String]) throws -> String {
      var c = shop.configuration
      try apply(overrides, to: &c)
      let lines = try Trainer(c, folder: RunFolder(shop.folder("run"))).summary
      return try #require(lines.first { $0.0 == "forward passes per iteration" }).1
    }
    // 8 samples of 2 groups; half of 3 chunks of 2, 3, 3 steps is one of them
    #expect(try line([]) == "72 in rollouts, about 21 in updates")
    let window = ["sampling.window=4-6", "chunk.plan=list:1,2"]
    #expect(try line(window + ["sampling.prefix=shared"]) == "48 in rollouts, about 12 in updates")
    #expect(try line(window + ["sampling.coarse=1"]) == "40 in rollouts, about 12 in updates")
    #expect(
      try line(["sampling.window=drawn", "chunk.draw=only:2", "sampling.coarse=1", "sampling.prefix=shared"])
        == "about 34 in rollouts, about 24 in updates")
    #expect(try line(["chunk.plan=adaptive"]) == "72 in rollouts, updates follow the latents")
  }

  @Test("a share of a chunk's steps: only those are replayed")
  func stepFraction() throws {
    for (share, each) in [("1", 3), ("0.6", 1), ("0.7", 2)] {
      try shop.train(share) { c in
        (c.chunk.plan, c.chunk.draw) = ("list:2,3,3", "only:1")
        (c.chunk.stepFraction, c.run.iterations, c.optim.microBatch) = (Double(share)!, 1, 8)
      }
      #expect(try integers(share, "trained_steps") == [8 * each])
      // two updates of 4 samples in passes of 8 rows: one pass for 4 or 8 steps, two for 12
      #expect(try integers(share, "rows_update") == [each == 3 ? 32 : 16])
      #expect(try integers(share, "rows_rollout") == [72])
    }
  }
}
