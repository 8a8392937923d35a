import ChunkGRPO
import FlowModels
import FlowRewards
import Foundation
import Testing
import Torch
import TorchNN

@testable import FlowTraining

/// Training from scratch, with the built-in model's configurations.
@Suite("Pretraining")
struct PretrainingTests {
  let scratch: Scratch
  var configuration = Pretraining()

  init() throws {
    scratch = try Scratch()
    configuration.start = mini.path
    configuration.prompts.file = root.appending(path: "Data/prompts.jsonl").path
    (configuration.dtype, configuration.batch) = (.float32, 3)
    (configuration.optim.warmup, configuration.optim.weightDecay) = (1, 0)
    (configuration.evaluate.every, configuration.run.iterations) = (0, 4)
    configuration.vae.measured = 12
  }

  private func trainer(_ name: String, resume: Bool = false, _ change: (inout Pretraining) -> Void = { _ in })
    throws -> Pretrainer
  {
    var c = configuration
    c.output = scratch.path(name).path
    change(&c)
    let folder = RunFolder(scratch.path(name), command: "pretrain")
    if !resume { try folder.create(yaml: c.yaml()) }
    return try Pretrainer(c, folder: folder)
  }

  /// Every tensor of every part of a model folder, by part and key.
  private func tensors(_ folder: URL, _ parts: [String]) throws -> [String: Tensor] {
    var result: [String: Tensor] = [:]
    for part in parts {
      let name = part.hasPrefix("text_encoder") ? "model" : "diffusion_pytorch_model"
      let file = try SafetensorsFile(folder.appending(path: "\(part)/\(name).safetensors"))
      for key in file.names { result["\(part).\(key)"] = try file.require(key) }
    }
    return result
  }
  private let trained = ["transformer", "text_encoder", "text_encoder_2"]

  private func scenes(_ c: Pretraining) throws -> (SceneSource, SceneRenderer) {
    let renderer = try SceneRenderer(sprites: try Assets.locate("sprites.safetensors"))
    return (try SceneSource(c, renderer: renderer, random: RandomPlan(seed: c.seed)), renderer)
  }

  @Test(
    "drawn weights: the published spreads, a velocity of 0, the shipped model's keys, and nothing but the seed"
  )
  func initialWeights() throws {
    let folder = try ModelFolder(mini)
    func model(_ seed: UInt64) throws -> FluxScratch {
      try FluxScratch(folder, PipelineOptions(), random: RandomPlan(seed: seed))
    }
    let first = try model(3)
    var drawn: [String: Tensor] = [:]
    for (part, modules) in first.parts {
      for p in modules.parameters { drawn["\(part).\(p.key)"] = p.tensor }
    }
    let shipped = try tensors(mini, trained)
    #expect(drawn.mapValues(\.shape) == shipped.mapValues(\.shape))
    // Closed forms: Xavier's bound √(6/(in + out)) spreads by √(2/(in + out)); the others by their formula.
    func root(_ x: Double) -> Double { x.squareRoot() }
    let spreads: [String: Double] = [
      "transformer.transformer_blocks.0.attn.to_q.weight": root(2.0 / 256),
      "transformer.single_transformer_blocks.1.proj_mlp.weight": root(2.0 / 640),
      "transformer.time_text_embed.timestep_embedder.linear_1.weight": 0.02,
      "text_encoder.embeddings.token_embedding.weight": 0.02,
      "text_encoder.encoder.layers.0.mlp.fc1.weight": root(1.0 / 192),
      "text_encoder.encoder.layers.1.mlp.fc2.weight": root(1.0 / 384),
      "text_encoder_2.shared.weight": 1,
      "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.weight": root(1.0 / 4096),
      "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo.weight": root(1.0 / 256),
    ]
    for (key, expected) in spreads {
      let values = try #require(drawn[key]).detach()
      let ratio = root(try values.variance(correction: 0).item()) / expected
      // Standard error of a spread: 1/√(2n) of it; five of them.
      let bound = 5 / root(2 * Double(values.count))
      #expect(abs(ratio - 1) < bound, "\(key): \(ratio)")
    }
    for key in [
      "transformer_blocks.1.norm1.linear.weight", "norm_out.linear.weight", "proj_out.weight",
      "proj_out.bias",
    ] {
      #expect(try #require(drawn["transformer.\(key)"]).abs().amax().item() == 0)
    }
    #expect(try #require(drawn["text_encoder.final_layer_norm.weight"]).amin().item() == 1)
    let again = try model(3), other = try model(4)
    let key = "encoder.block.1.layer.0.SelfAttention.v.weight"
    func value(_ m: FluxScratch) throws -> [UInt8] {
      try #require(m.t5.modules.parameters.first { $0.key == key }).tensor.detach().bytes()
    }
    #expect(try value(first) == value(again))
    #expect(try value(first) != value(other))
    let x = try Tensor.full([2, 64, 32], 0.7)
    let velocity = try FluxFlowModel(first.transformer, grid: (8, 8)).velocity(
      x, times: try Tensor([Float(300), 900]), condition: try first.condition(["a cat", "two dogs"]),
      guidance: nil)
    #expect(try velocity.abs().amax().item() == 0)
  }

  @Test("conditions of a batch are the pipeline's of each prompt")
  func conditions() throws {
    let model = try FluxScratch(try ModelFolder(mini), PipelineOptions(), random: RandomPlan(seed: 1))
    // The shipped encoders' weights in the model that is trained, against the encoders as they are used.
    for part in ["text_encoder", "text_encoder_2"] {
      let file = try SafetensorsFile(mini.appending(path: "\(part)/model.safetensors"))
      for p in model.parts[part]!.parameters { try p.tensor.copy(from: try file.require(p.key)) }
    }
    let texts = ["a photo of two cats", "a photo of a red heart"]
    let batch = try withoutGrad { try model.condition(texts) }
    let text = try ImagePipelines.text(try ModelFolder(mini), PipelineOptions())
    let alone = try Condition.stack(try texts.map { try text.encode($0) })
    for (a, b) in zip(batch.tensors, alone.tensors) {
      // float32 products of two rows and of one round differently: values of about 1.
      #expect(try (a - b).abs().amax().item() < 1e-5)
    }
  }

  @Test("the first loss is the mean of (ε − x0)², and all parts learn from it")
  func lossAndGradients() throws {
    let trainer = try trainer("a") { $0.run.iterations = 8 }
    let (source, _) = try scenes(configuration)
    let (prompts, images) = try source.batch(0, size: 3)
    #expect(prompts.count == 3)
    let vae = try AutoencoderKL(folder: mini.appending(path: "vae"))
    let mean = try withoutGrad { try vae.encode(try images * 2 - 1).mean }
    // config.json of the shipped autoencoder.
    let clean = try FluxPipeline.pack((mean + 0.0870252326130867) * 1.1482947013147828)
    let noise = try source.noise(0, shape: clean.shape, device: .cpu)
    let expected = try (noise - clean).to(.float64).square().mean().item()
    let first = try trainer.step()
    // float32 mean of 6144 terms.
    let ratio = try #require(first.values["loss"]) / expected
    #expect(abs(ratio - 1) < 1e-5)
    try trainer.run(resume: false)
    // The first step moves the last projection only, the next ones what lies before it.
    let (before, after) = (try initial(), try tensors(trainer.model, trained))
    for (key, value) in after {
      // Queries of one token alone, and keys' biases, which softmax does not see, may stay.
      if key.hasSuffix("k_proj.bias") { continue }
      #expect(try value.bytes() != before[key]!.bytes(), "\(key)")
    }
  }

  /// Weights before training.
  private func initial() throws -> [String: Tensor] {
    let model = try FluxScratch(
      try ModelFolder(mini), PipelineOptions(), random: RandomPlan(seed: configuration.seed))
    var result: [String: Tensor] = [:]
    for (part, modules) in model.parts {
      for p in modules.parameters { result["\(part).\(p.key)"] = try p.tensor.detach() }
    }
    return result
  }

  @Test(
    "resuming gives the weights of a run that was never stopped; the folder loads, draws and is evaluated")
  func resume() throws {
    func metrics(_ name: String) throws -> [[String: Double]] {
      try String(contentsOf: scratch.path("\(name)/metrics.jsonl"), encoding: .utf8).split(separator: "\n")
        .map {
          let row = try JSONSerialization.jsonObject(with: Data($0.utf8)) as? [String: Any] ?? [:]
          return row.filter { $0.key != "images_per_s" }.compactMapValues { $0 as? Double }
        }
    }
    let settings: (inout Pretraining) -> Void = {
      ($0.evaluate.every, $0.evaluate.steps, $0.dtype, $0.run.checkpointEvery) = (4, 2, .auto, 2)
      $0.evaluate.split = "few"
      $0.prompts.file = scratch.path("prompts.jsonl").path
    }
    let line = #"{"prompt": "a photo of a cat", "include": [{"class": "cat", "count": 1}], "split": "few"}"#
    try Data("\(line)\n".utf8).write(to: scratch.path("prompts.jsonl"))
    try trainer("whole", settings).run(resume: false)
    try FileManager.default.copyItem(at: scratch.path("whole"), to: scratch.path("cut"))
    // What a kill in the middle of the last checkpoint leaves.
    for name in ["model", "checkpoints/iteration-000004/training.safetensors"] {
      try FileManager.default.removeItem(at: scratch.path("cut/\(name)"))
    }
    let cut = try trainer("cut", resume: true, settings)
    var warnings: [String] = []
    cut.report = { if case .warning(let text) = $0 { warnings.append(text) } }
    try cut.run(resume: true)
    #expect(warnings.count == 1 && warnings[0].contains("training.safetensors is missing"))
    let (a, b) = (try tensors(scratch.path("whole/model"), trained), try tensors(cut.model, trained))
    for (key, value) in a { #expect(try value.bytes() == b[key]!.bytes(), "\(key)") }
    #expect(try metrics("whole") == metrics("cut"))
    let last = try #require(try metrics("cut").last)
    #expect(last["iteration"] == 4)
    let graded = try #require(last["eval/scenes:graded"])
    #expect(graded >= 0 && graded <= 1)
    // The average, not the last weights: what the checkpoint calls average.
    let state = try TrainingState.read(scratch.path("cut/checkpoints/iteration-000004"))
    let key = "transformer.proj_out.weight"
    #expect(try b[key]!.bytes() == state["average.\(key)"]!.bytes())
    #expect(try b[key]!.bytes() != state["parameter.\(key)"]!.bytes())
    let engine = try ModelReference(cut.model.path).load()
    #expect(try engine.draw(["a photo of a cat"], count: 1, steps: 1, seed: 1).shape == [1, 3, 64, 64])
    let left = try FileManager.default.contentsOfDirectory(atPath: scratch.path("cut").path).sorted()
    #expect(left == ["LATEST", "checkpoints", "config.yaml", "metrics.jsonl", "model"])
  }

  @Test("flow matching learns: the loss falls well below that of a velocity of 0")
  func learns() throws {
    let trainer = try trainer("l") {
      ($0.batch, $0.run.iterations, $0.optim.warmup, $0.ema) = (4, 28, 5, 0)
    }
    var losses: [Double] = []
    trainer.report = { if case .iteration(let row, _) = $0 { losses.append(row.values["loss"]!) } }
    try trainer.run(resume: false)
    // Latents have variance 1, so that a velocity of 0 costs 2; losses of batches of 4 spread by about 0.15.
    #expect(abs(losses[0] - 2) < 0.5)
    let end = losses.suffix(8).reduce(0, +) / 8
    #expect(end < 1.75, "\(losses)")
  }

  @Test("the shipped autoencoder restores rendered scenes so that all of them are recognised")
  func shippedAutoencoder() throws {
    var c = configuration
    c.seed = 9
    let (prompts, images) = try scenes(c).0.batch(0, size: 24)
    let vae = try AutoencoderKL(folder: mini.appending(path: "vae"))
    let restored = try withoutGrad {
      try (vae.decode(try vae.encode(try images * 2 - 1).mean) * 0.5 + 0.5).clamp(0, 1)
    }
    let verifier = try ScenesVerifier(sprites: try Assets.locate("sprites.safetensors"), score: .strict)
    for score in try verifier.scores(restored, prompts: prompts.map(RewardPrompt.init)) {
      #expect(score.value == 1)
    }
  }

  @Test(
    "an autoencoder learns, its folder has the shipped one's keys, and its latents mean 0 and deviation 1")
  func autoencoder() throws {
    let trainer = try trainer("vae") {
      ($0.part, $0.run.iterations, $0.ema, $0.optim.warmup) = (.vae, 16, 0, 4)
    }
    var losses: [Double] = []
    trainer.report = { if case .iteration(let row, _) = $0 { losses.append(row.values["loss"]!) } }
    try trainer.run(resume: false)
    let (start, end) = (losses.prefix(4).reduce(0, +), losses.suffix(4).reduce(0, +))
    #expect(end < 0.7 * start, "\(losses)")
    let written = try tensors(trainer.model, ["vae"])
    #expect(try written.mapValues(\.shape) == tensors(mini, ["vae"]).mapValues(\.shape))
    // The scenes it was measured on, counted down from the last iteration there is.
    let vae = try AutoencoderKL(folder: trainer.model.appending(path: "vae"))
    let (source, _) = try scenes(trainer.configuration)
    let images = try (0..<4).map { try source.batch(Int(UInt32.max) - $0, size: 3).images }
    let means = try withoutGrad { try vae.encode(try Tensor.cat(images) * 2 - 1).mean }
    struct Stated: Decodable { let scalingFactor, shiftFactor: Double }
    let stated = try ModelFolder(trainer.model).config(Stated.self, "vae")
    let latents = try (means - stated.shiftFactor).to(.float64) * stated.scalingFactor
    // float32 latents of about 1; the batch has other neighbours than when measured.
    let (mean, variance) = (try latents.mean().item(), try latents.variance(correction: 0).item())
    #expect(abs(mean) < 1e-5)
    #expect(abs(variance - 1) < 1e-4)
    // Everything else is as it was: the folder draws.
    #expect(
      try ModelReference(trainer.model.path).load().draw(["a cat"], count: 1, steps: 1, seed: 1).shape[0] == 1
    )
  }

  @Test("configurations: YAML there and back, the cosine, and errors that name the key")
  func configurations() throws {
    var c = configuration
    (c.optim.warmup, c.run.iterations, c.optim.lr, c.part) = (10, 1000, 1e-3, .vae)
    #expect(try Pretraining.load(yaml: c.yaml(), source: "x") == c)
    // Closed form: a tenth of the rise, half-way of the cosine, its end.
    #expect(abs(c.learningRate(0) - 1e-4) < 1e-15)
    #expect(abs(c.learningRate(500) - 5e-4) < 1e-15)
    #expect(c.learningRate(999) < 1e-8)
    func problem(_ yaml: String) -> String {
      message { try Pretraining.load(yaml: yaml, source: "p.yaml").validate() }
    }
    #expect(problem("optim: {learningrate: 1}").contains("p.yaml:1: optim.learningrate is not a key"))
    #expect(problem("part: unet").contains("part: expected one of flow, vae, got \"unet\""))
    #expect(problem("ema: 1").contains("ema: expected a number in [0, 1)"))
    #expect(problem("run: {iterations: 0}").contains("run.iterations: expected at least 1"))
    #expect(problem("optim: {betas: [0.9]}").contains("optim.betas: expected two numbers"))
    let sd3 = parity.appending(path: "sd3-tiny").path
    #expect(
      message { _ = try trainer("s") { $0.start = sd3 } }.contains(
        "cannot be pretrained; expected FluxPipeline"))
    #expect(message { _ = try trainer("n") { $0.start = "/nowhere" } }.contains("/nowhere: no such folder"))
    let one = try trainer("one") { $0.run.iterations = 1 }
    try one.run(resume: false)
    #expect(message { _ = try trainer("one") }.contains("continue that run with pretrain --resume"))
  }
}
