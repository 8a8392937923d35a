import ChunkGRPO
import FlowRewards
import Foundation
import Testing
import Torch

@testable import FlowTraining

@Suite("training, end to end on flux-tiny")
struct TrainerTests {
  let shop: Workshop
  init() throws { shop = try Workshop() }

  @Test(
    "metrics rows have the contract's keys; replay is exact; weights move (oracle: config.md, Run folder)")
  func metrics() throws {
    let warnings = try shop.train("run") {
      ($0.run.samplesEvery, $0.run.evaluateEvery) = (2, 2)
    }
    #expect(warnings == [])
    let rows = try shop.rows("run")
    #expect(rows.map { $0["iteration"] as? Int } == [1, 2, 3, 4])
    #expect(rows.map { $0["update"] as? Int } == [2, 4, 6, 8])
    for row in rows {
      for key in [
        "reward_mean", "reward_std", "reward/vivid", "ratio_dev", "clip_share", "grad_norm", "replay_gap",
        "images_per_s", "guards/blank", "guards/diversity", "guards/ink", "guards/vivid",
      ] {
        let value = try #require(row[key] as? Double, "no \(key)")
        #expect(value.isFinite, "\(key) is \(value)")
      }
      #expect(row["replay_gap"] as? Double == 0)  // hazard 1: float32 and equal geometry
      #expect(row["zero_groups"] as? Int == 0 && row["masked"] as? Int == 0)
      #expect(row["chunk_sizes"] as? [Int] == [1, 3] && row["draw_p"] as? [Double] == [0.5, 0.5])
      let seconds = try #require(row["seconds"] as? [String: Double])
      for part in MetricsRow.parts { #expect(try #require(seconds[part]) > 0) }
      #expect(row["grad_norm"] as? Double ?? 0 > 0)
      // the only reward has weight 1; guards measure the same colourfulness by the same function
      #expect(row["reward_mean"] as? Double == row["reward/vivid"] as? Double)
      // means of the same 8 numbers, summed in another way
      #expect(abs(try #require(row["guards/vivid"] as? Double) - (row["reward_mean"] as? Double ?? 0)) < 1e-9)
    }
    // The second update of an iteration sees moved weights.
    #expect(try shop.numbers("run", "ratio_dev").allSatisfy { $0 > 0 && $0 < 0.1 })
    #expect(rows.map { $0["eval/vivid"] is Double } == [false, true, false, true])
    #expect(rows.map { $0["eval/guards/ink"] is Double } == [false, true, false, true])
    #expect(try shop.checkpoints("run") == ["iteration-000002", "iteration-000004"])
    let latest = try String(contentsOf: shop.folder("run").appending(path: "LATEST"), encoding: .utf8)
    #expect(latest == "iteration-000004\n")
    let samples = shop.folder("run").appending(path: "samples").path
    #expect(
      try FileManager.default.contentsOfDirectory(atPath: samples).sorted() == [
        "iteration-000002.png", "iteration-000004.png",
      ])
    let adapter = try SafetensorsFile(
      shop.folder("run").appending(path: "adapter/pytorch_lora_weights.safetensors"))
    let ups = adapter.names.filter { $0.hasSuffix("lora_B.weight") }
    #expect(!ups.isEmpty)
    #expect(try ups.allSatisfy { try adapter.require($0).floats().contains { $0 != 0 } })
    let stored = try Configuration.load(file: shop.folder("run").appending(path: "config.yaml"))
    #expect(stored.run.iterations == 4 && stored.sampling.steps == 5)
  }

  // Hazard 13: bytes, no tolerance.
  @Test("two iterations and two more equal four, byte for byte", arguments: ["lora", "full", "average"])
  func resume(_ kind: String) throws {
    func change(_ c: inout Configuration) {
      c.trainable.kind = Configuration.Trainable.Kind(rawValue: kind) ?? .lora
      if kind == "average" { c.ema.decay = 0.5 }
      (c.run.samplesEvery, c.run.evaluateEvery) = (3, 2)
      if kind == "full" { c.optim.lr = 1e-4 }
    }
    try shop.train("whole", change)
    try shop.train("parts") {
      change(&$0)
      $0.run.iterations = 2
    }
    #expect(try shop.trained("parts") != shop.trained("whole"))
    let warnings = try shop.train("parts", resume: true, change)
    #expect(warnings == [])
    #expect(try shop.trained("parts") == shop.trained("whole"))
    #expect(try shop.timeless("parts") == shop.timeless("whole"))
    for iteration in [2, 4] {
      let file = "training.safetensors"
      #expect(
        try Data(contentsOf: shop.checkpoint("parts", iteration).appending(path: file))
          == Data(contentsOf: shop.checkpoint("whole", iteration).appending(path: file)))
    }
    guard kind == "lora" else { return }
    // Two runs with one configuration are one run; another seed is not.
    try shop.train("again", change)
    #expect(try shop.trained("again") == shop.trained("whole"))
    try shop.train("other") {
      change(&$0)
      $0.seed = 2
    }
    #expect(try shop.trained("other") != shop.trained("whole"))
  }

  @Test(
    "a run ends at the first evaluation that reaches its goal, with a checkpoint; a goal out of reach changes nothing"
  )
  func goal() throws {
    func change(_ c: inout Configuration) {
      (c.run.evaluateEvery, c.run.checkpointEvery, c.run.stopReward) = (3, 5, "vivid")
    }
    try shop.train("early") { c in
      change(&c)
      c.run.stopAbove = -1
    }
    #expect(try shop.rows("early").map { $0["iteration"] as? Int } == [1, 2, 3])
    #expect(try shop.checkpoints("early") == ["iteration-000003"])
    try shop.train("late") { c in
      change(&c)
      c.run.stopAbove = 10
    }
    #expect(try shop.rows("late").count == 4)
    #expect(try shop.timeless("late").prefix(3) == shop.timeless("early")[...])
  }

  // Oracle: closed form. B is 0 before the first step, so that its average after one is (1 − d)·B, exact in
  // float32 for d = 3/4; A's average moves a quarter of the way.
  @Test(
    "the moving average is kept beside the weights, evaluated and exported; training goes on with the weights"
  )
  func movingAverage() throws {
    func change(_ c: inout Configuration) {
      (c.run.iterations, c.run.checkpointEvery, c.optim.updatesPerIteration) = (1, 1, 1)
    }
    try shop.train("plain", change)
    try shop.train("averaged") {
      change(&$0)
      $0.ema.decay = 0.75
    }
    func state(_ name: String) throws -> SafetensorsFile {
      try SafetensorsFile(shop.checkpoint(name, 1).appending(path: "training.safetensors"))
    }
    let (plain, averaged) = (try state("plain"), try state("averaged"))
    let exported = try SafetensorsFile(
      shop.folder("averaged").appending(path: "adapter/pytorch_lora_weights.safetensors"))
    let ups = averaged.names.filter { $0.hasPrefix("parameter.") && $0.hasSuffix("lora_B.weight") }
    #expect(!ups.isEmpty)
    for name in ups {
      let layer = name.dropFirst("parameter.".count)
      let trained = try averaged.require(name).floats()
      #expect(try plain.require(name).floats() == trained)
      let average = try averaged.require("average.\(layer)").floats()
      #expect(average == trained.map { $0 / 4 } && average.contains { $0 != 0 })
      // The exported B carries alpha/rank = 2.
      #expect(try exported.require("transformer.\(layer)").floats() == average.map { 2 * $0 })
    }
  }

  // Hazard 1 for a model guided by a second pass: both branches run in rollout and replay alike.
  @Test(
    "SD3 trains with classifier-free guidance, its replay is exact, its position table stays",
    arguments: [
      "lora", "full",
    ])
  func sd3(_ kind: String) throws {
    let warnings = try shop.train("run") {
      $0.model = parity.appending(path: "sd3-tiny").path
      ($0.sampling.guidance, $0.sampling.negative, $0.sampling.textLength) = (4.5, "blurred", 8)
      $0.trainable.kind = Configuration.Trainable.Kind(rawValue: kind)!
      $0.run.iterations = 2
      // log p is a mean over fewer latents than FLUX's here, and ratios move further.
      $0.optim.lr = 1e-4
    }
    #expect(warnings == [])
    #expect(try shop.numbers("run", "replay_gap") == [0, 0])
    #expect(try shop.numbers("run", "grad_norm").allSatisfy { $0 > 0 && $0.isFinite })
    guard kind == "full" else { return }
    let file = "transformer/diffusion_pytorch_model.safetensors"
    let base = try SafetensorsFile(parity.appending(path: "sd3-tiny").appending(path: file))
    let trained = try SafetensorsFile(
      shop.folder("run").appending(path: "adapter/diffusion_pytorch_model.safetensors"))
    #expect(trained.names == base.names)
    let changed = try base.names.filter { try base.require($0).floats() != trained.require($0).floats() }
    #expect(!changed.contains("pos_embed.pos_embed"))
    // The last block's text-side projections of queries reach nothing that is kept; the others all move.
    #expect(changed.count > base.names.count - 8)
  }

  @Test("training from prepared embeddings needs no text encoder and is the same, byte for byte")
  func preparedEmbeddings() throws {
    try shop.train("whole")
    let model = URL(filePath: shop.configuration.model)
    let texts = Workshop.prompts.split(separator: "\n").map { line in
      String(line.split(separator: "\"")[3])
    }
    let store = shop.folder("embeddings")
    let prepared = try PromptEmbedding(model: model, output: store, textLength: nil)
    #expect(try prepared.run(texts) { _ in } == 6)
    #expect(try prepared.run(texts) { _ in } == 0)
    for part in ["text_encoder", "text_encoder_2"] {
      try FileManager.default.removeItem(at: model.appending(path: "\(part)/model.safetensors"))
    }
    func train(_ name: String, _ change: (inout Configuration) -> Void = { _ in }) throws {
      try shop.train(name) {
        $0.prompts.embeddings = store.path
        change(&$0)
      }
    }
    try train("prepared")
    #expect(try shop.trained("prepared") == shop.trained("whole"))
    #expect(try shop.timeless("prepared") == shop.timeless("whole"))
    #expect(
      message { try train("longer") { $0.sampling.textLength = 9 } }.contains("embeddings of [77, 16] tokens")
    )
    // Without the store the encoders are missed before the first rollout, and by name.
    #expect(message { try shop.train("without") }.contains("text_encoder: no weights"))
  }

  @Test("a run that died between checkpoints: its rows and its unfinished folder are forgotten")
  func crashed() throws {
    try shop.train("whole")
    try shop.train("run") { $0.run.iterations = 3 }
    try FileManager.default.removeItem(at: shop.checkpoint("run", 3))
    let stale = shop.folder("run").appending(path: "checkpoints/.unfinished-iteration-000004")
    try FileManager.default.createDirectory(at: stale, withIntermediateDirectories: true)
    try Data("half".utf8).write(to: stale.appending(path: "training.safetensors"))
    let metrics = try FileHandle(forWritingTo: shop.folder("run").appending(path: "metrics.jsonl"))
    try metrics.seekToEnd()
    try metrics.write(contentsOf: Data(#"{"iteration": 4, "upd"#.utf8))
    try metrics.close()
    #expect(try shop.train("run", resume: true) == [])
    #expect(try shop.trained("run") == shop.trained("whole"))
    #expect(try shop.timeless("run") == shop.timeless("whole"))
    #expect(try shop.checkpoints("run") == ["iteration-000002", "iteration-000004"])
  }

  @Test(
    "a damaged checkpoint is passed over with a warning, and the run ends as if nothing had happened",
    arguments: ["truncated", "state.json deleted", "state.json cut off", "byte flipped", "file deleted"])
  func damaged(_ kind: String) throws {
    try shop.train("run")
    let (trained, rows) = (try shop.trained("run"), try shop.timeless("run"))
    let checkpoint = shop.checkpoint("run", 4)
    let weights = checkpoint.appending(path: "training.safetensors")
    let state = checkpoint.appending(path: "state.json")
    var data = try Data(contentsOf: weights)
    switch kind {
    case "truncated": try data.dropLast(1000).write(to: weights)
    case "state.json deleted": try FileManager.default.removeItem(at: state)
    case "state.json cut off": try Data(contentsOf: state).dropLast(20).write(to: state)
    case "byte flipped":
      data[data.count / 2] ^= 4
      try data.write(to: weights)
    default: try FileManager.default.removeItem(at: weights)
    }
    let warnings = try shop.train("run", resume: true)
    #expect(warnings.count == 1)
    #expect(warnings.first?.contains("iteration-000004") == true)
    #expect(warnings.first?.contains("the checkpoint before it is used") == true)
    #expect(warnings.first?.contains(kind.hasPrefix("state") ? "state.json" : "training.safetensors") == true)
    #expect(try shop.trained("run") == trained)
    #expect(try shop.timeless("run") == rows)
    #expect(RunFolder(shop.folder("run")).newestCheckpoint().checkpoint?.state.iteration == 4)
  }

  @Test("a run without a checkpoint starts at 0 and says so")
  func noCheckpoint() throws {
    try shop.train("whole")
    try shop.train("run") { $0.run.iterations = 1 }
    try FileManager.default.removeItem(at: shop.checkpoint("run", 1))
    #expect(try shop.train("run", resume: true) == ["no checkpoint yet: starting at iteration 0"])
    #expect(try shop.trained("run") == shop.trained("whole"))
    #expect(try shop.timeless("run") == shop.timeless("whole"))
  }

  @Test("old checkpoints go, the newest `keep` stay")
  func keep() throws {
    try shop.train("run") { ($0.run.checkpointEvery, $0.run.keep) = (1, 2) }
    #expect(try shop.checkpoints("run") == ["iteration-000003", "iteration-000004"])
  }

  @Test("a finished run resumed does nothing")
  func finished() throws {
    try shop.train("run")
    let before = try Data(contentsOf: shop.folder("run").appending(path: "metrics.jsonl"))
    try shop.train("run", resume: true)
    #expect(try Data(contentsOf: shop.folder("run").appending(path: "metrics.jsonl")) == before)
  }

  // The noise is a function of (seed, iteration, prompt, sample, step): another micro-batch gives the same images up
  // to the rounding of the decoder's convolutions and of summed gradients; other noise would move them by 1e-2.
  @Test("micro-batch and group split change nothing but rounding", arguments: [1, 3, 5])
  func microBatch(_ size: Int) throws {
    try shop.train("whole")
    try shop.train("run") { $0.run.iterations = 2 }
    try shop.train("run", resume: true) { $0.optim.microBatch = size }
    let (whole, run) = (try shop.rows("whole"), try shop.rows("run"))
    #expect(try shop.timeless("run")[..<2] == shop.timeless("whole")[..<2])
    for (a, b) in zip(whole[2...], run[2...]) {
      for key in ["reward_mean", "reward_std", "guards/diversity", "guards/ink"] {
        let (x, y) = (try #require(a[key] as? Double), try #require(b[key] as? Double))
        #expect(abs(x - y) < 1e-5 * abs(x), "\(key): \(x), \(y)")
      }
      // Two rows a pass (size 1): a float32 product so small rounds a row by its place. A wrong state would show as 1.
      #expect(try #require(b["replay_gap"] as? Double) < (size == 1 ? 1e-6 : 1e-300))
    }
    let spread = try shop.numbers("whole", "reward_mean")
    #expect(abs(spread[2] / spread[3] - 1) > 1e-4, "other noise would show")
  }

  @Test("groups of equal rewards are counted, cost nothing and leave the weights alone")
  func zeroGroups() throws {
    let file = shop.folder("prompts.jsonl")
    let scenes = ["circle", "square", "heart"].map {
      #"{"prompt": "a photo of a \#($0)", "include": [{"class": "\#($0)", "count": 1}]}"#
    }
    try Data(scenes.joined(separator: "\n").utf8).write(to: file)
    try shop.train("run") {
      $0.prompts.split = "all"
      // An untrained model draws noise: no scene is right, every strict score is 0.
      $0.rewards = [Configuration.Reward(name: "scenes", score: "strict")]
      ($0.sampling.height, $0.sampling.width) = (64, 64)
      $0.run.iterations = 2
    }
    for row in try shop.rows("run") {
      #expect(row["zero_groups"] as? Int == 2 && row["masked"] as? Int == 0)
      // 8 samples × 5 steps are sampled, no pass at all is spent on the update.
      #expect(row["rows_rollout"] as? Int == 40 && row["rows_update"] as? Int == 0)
      #expect(row["zero_samples"] as? Int == 8 && row["trained_steps"] as? Int == 0)
      for key in ["reward_mean", "reward_std", "grad_norm", "ratio_dev", "clip_share", "replay_gap"] {
        #expect(row[key] as? Double == 0, "\(key)")
      }
    }
    let trained = try SafetensorsFile(shop.checkpoint("run", 2).appending(path: "training.safetensors"))
    let ups = trained.names.filter { $0.hasPrefix("parameter.") && $0.hasSuffix("lora_B.weight") }
    #expect(!ups.isEmpty)
    #expect(try ups.allSatisfy { try trained.require($0).floats().allSatisfy { $0 == 0 } })
    let moments = trained.names.filter { $0.hasPrefix("optimizer.") }
    #expect(
      try !moments.isEmpty && moments.allSatisfy { try trained.require($0).floats().allSatisfy { $0 == 0 } })
  }

  @Test("several rewards: each has its key, reward_mean is their weighted sum")
  func severalRewards() throws {
    try shop.train("run") {
      $0.rewards = [
        Configuration.Reward(name: "vivid", weight: 2),
        Configuration.Reward(name: "colourfulness", weight: -0.5),
      ]
      $0.aggregate = .normalised
      $0.run.iterations = 1
    }
    let row = try #require(try shop.rows("run").first)
    let (a, b) = (row["reward/vivid"] as? Double, row["reward/colourfulness"] as? Double)
    let value = try #require(a)
    #expect(a == b && value > 0)
    // a mean of 8 sums against a sum of means
    #expect(abs(try #require(row["reward_mean"] as? Double) - 1.5 * value) < 1e-12)
  }

  @Test("a new run into a folder that is not empty names --resume")
  func notEmpty() throws {
    let url = shop.folder("run")
    try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    try RunFolder(url).requireNew()
    try Data().write(to: url.appending(path: "notes.txt"))
    let text = message { try shop.train("run") }
    #expect(text.contains("is not empty") && text.contains("train --resume \(url.path)"))
    #expect(throws: RunError.self) { try RunFolder(url).requireNew() }
    #expect(message { try shop.train("run", resume: true) }.contains("no config.yaml"))
    #expect(message { try RunFolder(shop.folder("absent")).requireRun() }.contains("is no run folder"))
  }

  @Test("prompts longer than the encoders' limit are counted in one warning")
  func longPrompts() throws {
    let long = (0..<40).map { "word\($0)" }.joined(separator: " ")
    try Data("a cat\n\(long)\n\(long) \(long)\n".utf8).write(to: shop.folder("prompts.txt"))
    let warnings = try shop.train("run") {
      ($0.prompts.file, $0.prompts.split) = (shop.folder("prompts.txt").path, "all")
      $0.run.iterations = 1
    }
    #expect(warnings.count == 1)
    #expect(
      warnings.first?.hasPrefix("2 prompts exceed the text encoders' limit and were truncated, by up to")
        == true)
  }

  @Test("what cannot work is refused before the first rollout")
  func refused() throws {
    #expect(message { try shop.train("a") { $0.sampling.width = 40 } }.contains("multiples of 16"))
    #expect(message { try shop.train("b") { $0.sampling.guidance = nil } }.contains("sampling.guidance"))
    #expect(
      message { try shop.train("c") { $0.trainable.targets = ["query"] } }.contains("no linear layer matches")
    )
    #expect(
      message { try shop.train("d") { $0.rewards = [.init(name: "beauty")] } }.contains(
        "no reward \"beauty\""))
    #expect(message { try shop.train("e") { $0.chunk.plan = "list:2,3" } }.contains("cover 5 steps"))
    #expect(message { try shop.train("f") { $0.model = "/nowhere" } }.contains("no such folder"))
    for name in ["a", "b", "c", "d", "e", "f"] {
      #expect(
        !FileManager.default.fileExists(atPath: shop.folder(name).appending(path: "metrics.jsonl").path))
    }
  }

  @Test("the part of the work that --dry-run prints is what the run does")
  func summary() throws {
    let trainer = try Trainer(shop.configuration, folder: RunFolder(shop.folder("run")))
    let lines = Dictionary(uniqueKeysWithValues: trainer.summary)
    #expect(lines["images per iteration"] == "8" && lines["optimizer steps"] == "8")
    #expect(lines["prompts"] == "3 (train)")
    #expect(lines["chunks over steps 0…3"] == "[1, 3]")
    // One of two chunks is drawn: (1 + 3)/2 steps of 8 samples.
    #expect(lines["forward passes per iteration"] == "40 in rollouts, about 16 in updates")
    // 4 + 4·2 targets of 2 × (32 + 32): q, k, v, out in two double blocks; q, k, v in two single ones
    #expect(lines["trainable parameters"] == "\((2 * 4 + 2 * 3) * 2 * 64)")
    #expect(!FileManager.default.fileExists(atPath: shop.folder("run").path))
  }
}

@Suite("run folder")
struct RunFolderTests {
  private func save(_ run: RunFolder, _ iteration: Int, keep: Int) throws {
    try run.save(iteration: iteration, update: 2 * iteration, keep: keep) {
      try Data("weights \(iteration)".utf8).write(to: $0.appending(path: "a.bin"))
    }
  }

  @Test("a checkpoint written after a newer one was found damaged stays", arguments: [1, 2])
  func keepsWhatItWrote(_ keep: Int) throws {
    let scratch = try Scratch()
    let run = RunFolder(scratch.path("run"))
    for iteration in [7, 8, 9] { try save(run, iteration, keep: 3) }
    for iteration in [8, 9] {
      try Data().write(to: scratch.path("run/checkpoints/iteration-00000\(iteration)/a.bin"))
    }
    let (found, warnings) = run.newestCheckpoint()
    #expect(found?.state.iteration == 7 && warnings.count == 2)
    try save(run, 8, keep: keep)
    #expect(run.newestCheckpoint().checkpoint?.state.iteration == 8)
    #expect(run.newestCheckpoint().checkpoint?.state.update == 16)
  }

  @Test("a checkpoint of a later format is not guessed at")
  func laterFormat() throws {
    let scratch = try Scratch()
    let run = RunFolder(scratch.path("run"))
    try save(run, 1, keep: 2)
    let file = scratch.path("run/checkpoints/iteration-000001/state.json")
    let text = try String(contentsOf: file, encoding: .utf8)
    try text.replacingOccurrences(of: "\"format\" : 1", with: "\"format\" : 2")
      .write(to: file, atomically: true, encoding: .utf8)
    let (found, warnings) = run.newestCheckpoint()
    #expect(found == nil && warnings.first?.contains("checkpoint format 2, this version reads 1") == true)
  }

  @Test("a body that throws leaves no checkpoint behind")
  func failedSave() throws {
    struct Full: Error {}
    let scratch = try Scratch()
    let run = RunFolder(scratch.path("run"))
    try save(run, 1, keep: 2)
    #expect(throws: Full.self) { try run.save(iteration: 2, update: 4, keep: 2) { _ in throw Full() } }
    #expect(run.newestCheckpoint().checkpoint?.state.iteration == 1)
    try save(run, 2, keep: 2)
    #expect(run.newestCheckpoint().checkpoint?.state.iteration == 2)
  }
}
