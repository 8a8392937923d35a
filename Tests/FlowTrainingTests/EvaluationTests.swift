import Foundation
import Testing
import Torch

@testable import FlowTraining

@Suite("evaluation and model references")
struct EvaluationTests {
  let shop: Workshop
  let prompts: [Prompt]

  init() throws {
    shop = try Workshop()
    // What a bare model folder is computed in, so that equal models give equal bits whatever they are named by.
    shop.configuration.network.dtype = .auto
    shop.configuration.loss.clip = [1, 1]  // bfloat16 need not replay exactly
    prompts = try PromptFile.load(file: shop.folder("prompts.jsonl"), split: "dev")
  }

  private func reference(_ path: String, base: String? = nil) throws -> ModelReference {
    var reference = try ModelReference(path, base: base)
    try reference.resize(height: 32, width: 48, guidance: nil)
    return reference
  }

  private func compare(
    _ tuned: ModelReference, _ base: ModelReference?, count: Int = 3, seed: UInt64 = 5, picture: URL? = nil
  ) throws -> EvaluationReport {
    try Comparison(
      tuned: tuned, base: base, rewards: shop.configuration.rewards, prompts: prompts, split: "dev",
      count: count, steps: 4, seed: seed
    ).run(picture: picture)
  }

  private func images(_ reference: ModelReference) throws -> [Float] {
    try reference.load().draw(["a cat"], count: 2, steps: 3, seed: 1).floats()
  }

  // MARK: - evaluation

  // Equal noise and equal weights: no bit may differ, so the difference is exactly 0.
  @Test("one model evaluated twice gives the same numbers; the paired difference is exactly 0")
  func equalNoise() throws {
    let engine = try reference(shop.configuration.model).load()
    let rewards = try RewardSet(shop.configuration.rewards)
    func evaluate(_ seed: UInt64) throws -> Evaluation {
      try Evaluation.run(engine, prompts, rewards, count: 3, steps: 4, seed: seed)
    }
    let (first, second) = (try evaluate(5), try evaluate(5))
    #expect(first.perPrompt == second.perPrompt && first.guards == second.guards)
    #expect(try evaluate(6).perPrompt != first.perPrompt)

    let base = try reference(shop.configuration.model)
    let report = try compare(base, base)
    #expect(report.paired?.difference == 0)
    #expect(report.paired?.ci95 == [0, 0] && report.paired?.p == 1)
    #expect(report.rewards["vivid"]?.against?["all"]?.mean == report.mean)
    #expect(report.collapsed == [])
    #expect(report.mean == first.perPrompt["vivid"]!.reduce(0, +) / 3)
  }

  @Test("the statistical unit is the prompt: n = prompts, whatever the number of images", arguments: [2, 4])
  func unit(_ count: Int) throws {
    let report = try compare(try reference(shop.configuration.model), nil, count: count)
    #expect(report.nPrompts == 3 && report.samplesPerPrompt == count)
    #expect(report.perCategory.mapValues(\.n) == ["one": 2, "two": 1])
    #expect(report.perCategory["two"]?.ci95 == nil)
    #expect(report.paired == nil && report.collapsed == nil)
    let means = ["one": 2.0, "two": 1].map { report.perCategory[$0.key]!.mean * $0.value }
    // a mean of three numbers summed in two orders
    #expect(abs(means.reduce(0, +) / 3 - report.mean) < 1e-12)
  }

  @Test("a prompt's noise depends on its text and number, not on the other prompts or the batch")
  func noiseByPrompt() throws {
    let base = try reference(shop.configuration.model)
    let engine = try base.load()
    let both = try engine.draw(["a cat", "a boat"], count: 2, steps: 3, seed: 1)
    let alone = try engine.draw(["a boat"], count: 2, steps: 3, seed: 1)
    // Latents are equal bit for bit; the decoder's convolutions round by batch.
    #expect(
      relativeError(try both[2..<4].doubles(), try alone.doubles()) < 1e-5)
    #expect(relativeError(try both[0..<2].doubles(), try alone.doubles()) > 1e-3)
  }

  @Test("tuned against base: both sides as if evaluated alone, and the sign turns with the sides")
  func paired() throws {
    try shop.train("run")
    let tuned = try reference(shop.folder("run").path)
    let base = try reference(shop.configuration.model)
    let picture = shop.folder("grid.png")
    let report = try compare(tuned, base, picture: picture)
    let (alone, baseAlone) = (try compare(tuned, nil), try compare(base, nil))
    #expect(report.mean == alone.mean && report.guards == alone.guards)
    #expect(report.rewards["vivid"]?.against?["all"]?.mean == baseAlone.mean)
    #expect(report.guardsAgainst == baseAlone.guards)
    let difference = try #require(report.paired?.difference)
    #expect(difference != 0)
    #expect(abs(difference - (alone.mean - baseAlone.mean)) < 1e-12)  // Doubles summed in another order
    let turned = try compare(base, tuned)
    #expect(turned.paired?.difference == -difference)
    #expect(try Data(contentsOf: picture).starts(with: [0x89, 0x50, 0x4E, 0x47]))
    let encoder = JSONEncoder()
    encoder.keyEncodingStrategy = .convertToSnakeCase
    let object = try JSONSerialization.jsonObject(with: encoder.encode(report)) as? [String: Any]
    for key in ["n_prompts", "samples_per_prompt", "mean", "ci95", "per_category", "paired", "guards"] {
      #expect(object?[key] != nil, "contract key \(key)")
    }
  }

  // MARK: - what a path can name

  @Test("run, checkpoint, adapter folder and adapter file name one model; elsewhere a file needs --base")
  func references() throws {
    try shop.train("run")
    let run = shop.folder("run")
    let file = run.appending(path: "adapter/pytorch_lora_weights.safetensors")
    let tuned = try images(try reference(run.path))
    let base = try images(try reference(shop.configuration.model))
    #expect(tuned != base)
    for path in [
      shop.checkpoint("run", 4).path, run.appending(path: "adapter").path, file.path,
      shop.checkpoint("run", 4).appending(path: "pytorch_lora_weights.safetensors").path,
    ] {
      let found = try reference(path)
      #expect(found.steps == 5 && found.configuration.model == shop.configuration.model)
      #expect(try images(found) == tuned, "\(path)")
    }
    #expect(try images(try reference(shop.checkpoint("run", 2).path)) != tuned)
    #expect(try reference(run.path).promptFile() == shop.configuration.prompts.file)

    let elsewhere = try Scratch()
    let copy = elsewhere.path("style.safetensors")
    try FileManager.default.copyItem(at: file, to: copy)
    #expect(message { _ = try ModelReference(copy.path) }.contains("--base MODEL"))
    let based = try reference(copy.path, base: shop.configuration.model)
    #expect(based.steps == nil)
    #expect(try images(based) == tuned)
    var added = try reference(shop.configuration.model)
    try added.add(adapter: copy.path)
    #expect(try images(added) == tuned)
  }

  @Test("a run with all weights trained loads its own weights")
  func fullWeights() throws {
    shop.configuration.network.dtype = .float32  // weights are kept as they are stored
    try shop.train("run") {
      $0.trainable.kind = .full
      ($0.optim.lr, $0.run.iterations) = (1e-4, 2)
    }
    let found = try reference(shop.folder("run").path)
    let file = try SafetensorsFile(
      shop.folder("run").appending(path: "adapter/diffusion_pytorch_model.safetensors"))
    let engine = try found.load()
    for parameter in engine.network.modules.parameters {
      #expect(try parameter.tensor.floats() == file.require(parameter.key).floats())
    }
    let tuned = try images(found)
    try shop.train("base") {
      $0.trainable.kind = .full
      ($0.optim.lr, $0.run.iterations) = (1e-30, 1)
    }
    #expect(try tuned != images(try reference(shop.folder("base").path)))
    // What was exported is a transformer folder of its own.
    let exported = shop.folder("run").appending(path: "adapter")
    #expect(FileManager.default.fileExists(atPath: exported.appending(path: "config.json").path))
    #expect(!found.sharesBase(with: try reference(shop.configuration.model)))
  }

  // Hazard 9: the sides may differ in their weights only; bfloat16 on one side moves rewards as much as training.
  @Test("both sides are computed in the tuned model's dtype, also when two models are loaded")
  func equalPrecision() throws {
    shop.configuration.network.dtype = .float32
    try shop.train("run") {
      $0.trainable.kind = .full
      ($0.optim.lr, $0.run.iterations) = (1e-4, 1)
    }
    let base = try reference(shop.configuration.model)
    let report = try compare(try reference(shop.folder("run").path), base)
    let rewards = try RewardSet(shop.configuration.rewards)
    let engine = try Engine(shop.configuration)
    let alone = try Evaluation.run(engine, prompts, rewards, count: 3, steps: 4, seed: 5)
    #expect(report.guardsAgainst == alone.guards)
  }

  @Test("a base folder brings its own size")
  func baseFolder() throws {
    let found = try ModelReference(shop.configuration.model)
    #expect(found.steps == nil && found.configuration.sampling.height == 64)
    #expect(found.configuration.sampling.width == 64)
  }

  @Test("nonsense is refused with what was expected")
  func nonsense() throws {
    let scratch = try Scratch()
    #expect(
      message { _ = try ModelReference(scratch.path("absent").path) }
        .hasSuffix("no such model folder, adapter, checkpoint or run"))
    #expect(message { _ = try ModelReference(scratch.url.path) }.contains("--base MODEL"))
    #expect(
      message { _ = try ModelReference(scratch.url.path, base: shop.configuration.model) }
        .contains("holds no trained weights: expected pytorch_lora_weights.safetensors"))
    let text = scratch.path("notes.txt")
    try Data("hello".utf8).write(to: text)
    #expect(
      message { _ = try ModelReference(text.path, base: shop.configuration.model) }.contains(
        "holds no trained weights"))
    let fake = scratch.path("fake.safetensors")
    try Data("hello".utf8).write(to: fake)
    let found = try reference(fake.path, base: shop.configuration.model)
    #expect(message { _ = try found.load() }.contains("too short for a safetensors file"))
    #expect(
      message { _ = try ModelReference(fake.path, base: scratch.url.path) }.contains("no model_index.json"))
  }
}
