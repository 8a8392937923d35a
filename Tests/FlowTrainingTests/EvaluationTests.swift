import ChunkGRPO
import FlowModels
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
    #expect(report.mean == first.perPrompt["vivid"]!.reduce(0) { $0 + $1! } / 3)
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

  // MARK: - hybrid inference

  /// Latents after Euler steps written out, the first `tuned` of them by one network: x' = x + Δ·v.
  private func composition(_ a: Engine, _ b: Engine, tuned: Int, steps: Int) throws -> Tensor {
    let sigmas = try a.pipeline.schedule(steps: steps, grid: a.grid).sigmas
    let plan = RandomPlan(seed: 1)
    let condition = try Condition.stack([try a.encoder("a cat"), try a.encoder("a cat")])
    var x = try a.noise((0..<2).map { plan.stream(.evaluationNoise, prompt: "a cat", sample: $0) })
    for i in 0..<steps {
      let times = try Tensor.full([2], Double(1000 * sigmas[i]))
      let v = try withoutGrad {
        try (i < tuned ? a : b).network.velocity(x, times: times, condition: condition, guidance: 3.5)
      }
      x = try x + v * Double(sigmas[i + 1] - sigmas[i])
    }
    return try a.decode(x)
  }

  // S = N and S = 0 are the same functions of the same numbers: no tolerance. Between them the oracle is Euler's
  // rule written out on two separate engines; 1e-5 is float32 rounding of coefficients through three steps and a decoder.
  @Test("the first S steps tuned, the others base", arguments: [Configuration.Trainable.Kind.lora, .full])
  func hybrid(_ kind: Configuration.Trainable.Kind) throws {
    shop.configuration.network.dtype = .float32
    try shop.train("run") { c in
      c.trainable.kind = kind
      if kind == .full { c.optim.lr = 1e-4 }
    }
    let tuned = try ModelReference(shop.folder("run").path)
    let engine = try tuned.load(hybrid: true)
    let alone = try tuned.load()
    let base = try Engine(tuned.configuration)
    func draw(_ engine: Engine, _ step: Int?) throws -> Tensor {
      try engine.draw(["a cat"], count: 2, steps: 3, seed: 1, switchStep: step)
    }
    let (first, last) = (try draw(alone, nil).floats(), try draw(base, nil).floats())
    #expect(first != last)
    #expect(try draw(engine, 3).floats() == first && draw(engine, nil).floats() == first)
    #expect(try draw(engine, 0).floats() == last)
    for step in 0...3 {
      let expected = try composition(alone, base, tuned: step, steps: 3)
      #expect(relativeError(try draw(engine, step).doubles(), try expected.doubles()) < 1e-5)
    }
    #expect(try draw(engine, 1).floats() != draw(engine, 2).floats())
    #expect(message { _ = try draw(engine, 4) }.contains("expected 0 to 3"))
    #expect(message { _ = try draw(alone, 1) }.contains("loaded with its base"))
  }

  @Test("a sweep of switch steps: a report each, the last the tuned model's and the first the base's own")
  func sweep() throws {
    try shop.train("run")
    let (tuned, base) = (try reference(shop.folder("run").path), try reference(shop.configuration.model))
    func comparison(_ against: ModelReference?) -> Comparison {
      Comparison(
        tuned: tuned, base: against, rewards: shop.configuration.rewards, prompts: prompts, split: "dev",
        count: 2, steps: 4, seed: 5)
    }
    let reports = try comparison(base).run(switches: [0, 2, 4])
    #expect(reports.map(\.switchStep) == [0, 2, 4])
    #expect(reports[0].paired?.difference == 0)
    let whole = try comparison(base).run()
    #expect(
      reports[2].mean == whole.mean && reports[2].paired?.p == whole.paired?.p && whole.switchStep == nil)
    #expect(reports[1].mean != reports[0].mean && reports[1].mean != reports[2].mean)
    #expect(reports.allSatisfy { $0.ci95?.count == 2 && $0.paired?.ci95.count == 2 })
  }

  @Test("a whole model needs to be told its base; one of another kind is refused")
  func hybridBase() throws {
    let plain = try reference(shop.configuration.model)
    #expect(message { _ = try plain.load(hybrid: true) }.contains("--base MODEL"))
    let other = try reference(shop.configuration.model, base: parity.appending(path: "sd3-tiny").path)
    #expect(message { _ = try other.load(hybrid: true) }.contains("name the model it was trained from"))
    let same = try reference(shop.configuration.model, base: shop.configuration.model)
    let engine = try same.load(hybrid: true)
    let images = try engine.draw(["a cat"], count: 2, steps: 3, seed: 1, switchStep: 1)
    #expect(try images.floats() == self.images(same))
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
