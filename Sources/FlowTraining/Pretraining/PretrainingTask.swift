import ChunkGRPO
import FlowModels
import FlowRewards
import Foundation
import Torch
import TorchNN

/// What is trained from scratch: the loss of a batch, and what comes of it.
protocol PretrainingTask {
  /// Trained layers by the name of their part in the model folder.
  var parts: [String: ModuleRegistry] { get }
  /// The mean loss of a batch, a float32 scalar with a graph, and numbers for the metrics.
  func loss(_ iteration: Int, _ clock: inout Stopwatch) throws -> (loss: Tensor, values: [String: Double])
  /// Fields of the parts' config.json that training decides; called with the weights that are written.
  func settings() throws -> [String: [String: Double]]
  /// Scores on `prompts`, with the weights that are written; `write` makes a model folder of them.
  func evaluate(_ prompts: [Prompt], write: (URL) throws -> Void, scratch: URL) throws -> [String: Double]
}

/// Transformer and text encoders, by flow matching: x_σ = (1 − σ)x0 + σε, and the velocity is to be ε − x0.
///
/// Source: arXiv 2210.02747, eq. 23, with noise at σ = 1; levels as in arXiv 2403.03206, section 3.1.
final class FlowTask: PretrainingTask {
  private let model: FluxScratch
  private let configuration: Pretraining
  private let scenes: SceneSource
  private let network: FluxFlowModel
  private let rewards: RewardSet
  var parts: [String: ModuleRegistry] { model.parts }

  init(
    _ c: Pretraining, _ folder: ModelFolder, _ options: PipelineOptions, _ scenes: SceneSource,
    _ random: RandomPlan
  )
    throws
  {
    (configuration, self.scenes) = (c, scenes)
    model = try FluxScratch(folder, options, random: random)
    let granularity = 2 * model.autoencoder.downscale
    let grid = try tokenGrid(height: SceneRenderer.side, width: SceneRenderer.side, granularity: granularity)
    network = FluxFlowModel(model.transformer, grid: grid)
    rewards = try RewardSet([
      .init(name: "scenes", score: "strict"), .init(name: "scenes", score: "graded"), .init(name: "vivid"),
    ])
  }

  func loss(_ iteration: Int, _ clock: inout Stopwatch) throws -> (loss: Tensor, values: [String: Double]) {
    let size = configuration.batch
    let (batch, clean) = try clock.time("scenes") {
      let (prompts, images) = try scenes.batch(iteration, size: size)
      return (prompts, try model.latents(images))
    }
    let levels = (0..<size).map { s -> Float in
      var stream = scenes.stream(.level, iteration, s)
      let logit =
        configuration.times.mean + configuration.times.deviation * Double(stream.normals(count: 1)[0])
      return Float(1 / (1 + exp(-logit)))
    }
    let device = model.transformer.device
    let noise = try scenes.noise(iteration, shape: clean.shape, device: device)
    let sigma = try Tensor(levels, shape: [size, 1, 1]).to(device)
    let noisy = try clean + (noise - clean) * sigma
    let velocity = try clock.time("forward") {
      try network.velocity(
        noisy, times: try sigma.reshape(-1) * 1000, condition: try model.condition(batch.map(\.text)),
        guidance: nil)
    }
    return (try (velocity - (noise - clean)).square().mean(), [:])
  }

  func settings() -> [String: [String: Double]] { [:] }

  /// As `chunkgrpo evaluate` scores the folder that would be written now.
  func evaluate(_ prompts: [Prompt], write: (URL) throws -> Void, scratch: URL) throws -> [String: Double] {
    try? FileManager.default.removeItem(at: scratch)
    defer { try? FileManager.default.removeItem(at: scratch) }
    try write(scratch)
    let engine = try ModelReference(scratch.path).load()
    let (count, steps) = (configuration.evaluate.count, configuration.evaluate.steps)
    let evaluation = try Evaluation.run(
      engine, prompts, rewards, count: count, steps: steps, seed: configuration.seed,
      check: Interruption.check)
    return Dictionary(uniqueKeysWithValues: rewards.names.map { ($0, evaluation.mean($0)) })
  }
}

/// The autoencoder: 4·MSE + L1 + ½·L1 of neighbouring pixels' differences + `vae.kl`·KL, images in −1 … 1.
final class AutoencoderTask: PretrainingTask {
  private let autoencoder: AutoencoderKL
  private let configuration: Pretraining
  private let scenes: SceneSource
  private let renderer: SceneRenderer
  private let verifier: ScenesVerifier
  private let random: RandomPlan
  private let device: Device
  var parts: [String: ModuleRegistry] { ["vae": autoencoder.modules] }

  init(
    _ c: Pretraining, _ folder: ModelFolder, _ options: PipelineOptions, _ scenes: SceneSource,
    _ renderer: SceneRenderer,
    _ random: RandomPlan
  ) throws {
    (configuration, self.scenes, self.renderer, self.random) = (c, scenes, renderer, random)
    device = options.device
    autoencoder = try AutoencoderKL(
      config: try folder.config(AutoencoderKL.Config.self, "vae"),
      checkpoint: Checkpoint(blank: folder.part("vae")))
    try autoencoder.modules.place(.float32, device)
    try autoencoder.modules.makeTrainable()
    try WeightInitialisation.convolutional.fill(autoencoder.modules, part: "vae", random: random)
    verifier = try ScenesVerifier(sprites: try Assets.locate("sprites.safetensors"), score: .strict)
  }

  func loss(_ iteration: Int, _ clock: inout Stopwatch) throws -> (loss: Tensor, values: [String: Double]) {
    let images = try clock.time("scenes") {
      try scenes.batch(iteration, size: configuration.batch).images.to(device) * 2 - 1
    }
    return try clock.time("forward") {
      let (mean, logVariance) = try autoencoder.encode(images)
      let noise = try scenes.noise(iteration, shape: mean.shape, device: device)
      let error = try autoencoder.decode(try mean + (logVariance * 0.5).exp() * noise) - images
      let square = try error.square().mean()
      // Differences are linear: those of the error are the errors of the differences.
      let n = error.size(-1) - 1
      let edges =
        try (error.narrow(3, 1, n) - error.narrow(3, 0, n)).abs().mean()
        + (error.narrow(2, 1, n) - error.narrow(2, 0, n)).abs().mean()
      let kl = try (mean.square() + logVariance.exp() - logVariance - 1).mean() * 0.5
      let loss = try square * 4 + error.abs().mean() + edges * 0.5 + kl * configuration.vae.kl
      return (loss, ["mse": try square.detach().item(), "kl": try kl.detach().item()])
    }
  }

  /// Images in 0 … 1 → means of their latents.
  private func measure(_ images: Tensor) throws -> Tensor {
    try withoutGrad { try autoencoder.encode(try images.to(device) * 2 - 1).mean }
  }

  /// Shift and scale that give latents mean 0 and deviation 1, by scenes of iterations that no run reaches.
  func settings() throws -> [String: [String: Double]] {
    var (sum, squares, count) = (0.0, 0.0, 0.0)
    for (i, range) in Batches(configuration.vae.measured, of: configuration.batch).enumerated() {
      let iteration = Int(UInt32.max) - i
      let latents = try measure(try scenes.batch(iteration, size: range.count).images).to(.float64)
      sum += try latents.sum().item()
      squares += try latents.square().sum().item()
      count += Double(latents.count)
    }
    let mean = sum / count
    let deviation = (squares / count - mean * mean).squareRoot()
    return ["vae": ["shift_factor": mean, "scaling_factor": 1 / deviation]]
  }

  /// Strict score and squared error (of images in 0 … 1) of reconstructions.
  func evaluate(_ prompts: [Prompt], write: (URL) throws -> Void, scratch: URL) throws -> [String: Double] {
    let described = prompts.map(RewardPrompt.init)
    var (strict, error) = (0.0, 0.0)
    for range in Batches(prompts.count, of: configuration.batch) {
      try Interruption.check()
      let streams = range.map { random.stream(.evaluationNoise, prompt: prompts[$0].text) }
      let images = try renderer.render(Array(described[range]), using: streams)
      let restored = try withoutGrad {
        try (autoencoder.decode(try measure(images)) * 0.5 + 0.5).clamp(0, 1).to(.cpu)
      }
      let scores = try verifier.scores(restored, prompts: Array(described[range]))
      strict += scores.reduce(0) { $0 + ($1.value ?? 0) }
      error += try (restored - images).square().mean().item() * Double(range.count)
    }
    return ["scenes:strict": strict / Double(prompts.count), "mse": error / Double(prompts.count)]
  }
}
