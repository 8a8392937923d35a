import ChunkGRPO
import FlowModels
import FlowRewards
import Foundation
import Torch
import TorchNN

/// Trains a model folder from scratch: rendered scenes → loss → gradients → weights and their average → checkpoints → a model
/// folder.
///
/// Every random number is a function of the seed, the iteration and the sample, so that a run that was killed and resumed
/// gives the weights of one that was not.
public final class Pretrainer {
  /// The resolved configuration.
  public let configuration: Pretraining
  /// Called on the training thread.
  public var report: (TrainingEvent) -> Void = { _ in }
  /// Iterations done.
  public private(set) var iteration = 0
  /// The model folder that is written at the end.
  public var model: URL { folder.url.appending(path: "model") }

  private let folder: RunFolder
  private let source: ModelFolder
  private let task: any PretrainingTask
  private let scenes: SceneSource
  private let state: TrainingState
  private let dtype: DType
  private let evaluationPrompts: [Prompt]
  private var saved = -1
  private var boundary: [String: Tensor]?

  /// Builds the model, draws its weights and checks what can be checked before the first iteration.
  public init(_ configuration: Pretraining, folder: RunFolder) throws {
    try configuration.validate()
    let c = configuration
    (self.configuration, self.folder) = (c, folder)
    source = try ModelFolder(URL(filePath: c.start))
    let random = RandomPlan(seed: c.seed)
    let renderer = try SceneRenderer(sprites: try Assets.locate("sprites.safetensors"))
    scenes = try SceneSource(c, renderer: renderer, random: random)
    var network = Configuration()
    network.network.dtype = c.dtype
    let options = Engine.options(network)
    (task, dtype) =
      switch c.part {
      case .flow: (try FlowTask(c, source, options, scenes, random), options.dtype)
      case .vae: (try AutoencoderTask(c, source, options, scenes, renderer, random), .float32)
      }
    var parameters: [String: Tensor] = [:]
    for (part, modules) in task.parts {
      for p in modules.parameters where p.tensor.requiresGrad { parameters["\(part).\(p.key)"] = p.tensor }
    }
    let optimizer = try AdamW(
      parameters,
      AdamW.Options(
        learningRate: c.optim.lr, beta1: c.optim.betas[0], beta2: c.optim.betas[1], epsilon: c.optim.eps,
        weightDecay: c.optim.weightDecay))
    let average = c.ema > 0 ? try WeightAverage(parameters, decay: c.ema) : nil
    state = TrainingState(parameters: parameters, optimizer: optimizer, average: average)
    let file = URL(filePath: c.prompts.file)
    evaluationPrompts =
      c.evaluate.every > 0 ? try PromptFile(file: file, split: c.evaluate.split).prompts : []
    for prompt in evaluationPrompts { try renderer.requireDrawable(RewardPrompt(prompt)) }
  }

  /// Counts for `--dry-run`.
  public var summary: [(String, String)] {
    let c = configuration
    let counts = task.parts.sorted { $0.key < $1.key }.map { part, modules in
      ("parameters of \(part)", "\(modules.parameters.reduce(0) { $0 + $1.tensor.count })")
    }
    return [("prompts", "\(scenes.count) (\(c.prompts.split))")] + counts + [
      ("network dtype", "\(dtype)"), ("optimizer steps", "\(c.run.iterations)"),
      ("images", "\(c.run.iterations * c.batch)"),
    ]
  }

  /// Trains to the end, from the newest whole checkpoint of the folder if `resume`, and writes the model folder.
  public func run(resume: Bool) throws {
    if resume, let found = try folder.rewind({ report(.warning($0)) }) {
      _ = try state.load(try TrainingState.read(found.folder))
      (iteration, saved) = (found.iteration, found.iteration)
    }
    let total = configuration.run.iterations
    while iteration < total {
      do {
        try Interruption.check()
        let row = try step()
        iteration += 1
        boundary = nil
        try folder.append(row)
        report(.iteration(row, of: total))
      } catch let interrupted as Interrupted {
        if let boundary { _ = try state.load(boundary) }
        if saved != iteration { try save() }
        throw interrupted
      }
      if iteration % configuration.run.checkpointEvery == 0 || iteration == total { try save() }
    }
    if !FileManager.default.fileExists(atPath: model.path) { try writeModel(to: model) }
  }

  /// One optimizer step, and an evaluation where it is due.
  func step() throws -> MetricsRow {
    var clock = Stopwatch()
    var row = MetricsRow()
    let (c, optimizer) = (configuration, state.optimizer)
    (row.iteration, row.update) = (iteration + 1, iteration + 1)
    let (loss, values) = try task.loss(iteration, &clock)
    row.values = values
    row.values["loss"] = try loss.detach().item()
    try clock.time("backward") { try loss.backward() }
    let due = c.evaluate.every > 0 && row.iteration % c.evaluate.every == 0
    // Until the iteration is done this is the state that a signal falls back to.
    if due { boundary = try state.snapshot(update: iteration) }
    try clock.time("update") {
      let norm = try optimizer.clipGradients(maxNorm: c.optim.maxGradNorm)
      guard norm.isFinite else {
        throw RunError(
          "iteration \(row.iteration): the gradient's norm is \(norm); lower optim.lr in a new run")
      }
      optimizer.options.learningRate = c.learningRate(iteration)
      try optimizer.step()
      try state.average?.update()
      (row.values["grad_norm"], row.values["lr"]) = (norm, optimizer.options.learningRate)
    }
    row.seconds = clock.seconds
    row.values["images_per_s"] = Double(c.batch) / clock.seconds.values.reduce(0, +)
    if due {
      let scores = try averaged {
        try task.evaluate(
          evaluationPrompts, write: writeModel, scratch: folder.url.appending(path: ".unfinished-evaluation"))
      }
      for (name, value) in scores { row.values["eval/\(name)"] = value }
    }
    return row
  }

  /// Runs `body` with the weights that are written: the average where one is kept.
  private func averaged<R>(_ body: () throws -> R) throws -> R {
    try state.average?.withAverage(body) ?? body()
  }

  private func writeModel(to url: URL) throws {
    try averaged {
      let weights = try task.parts.mapValues { modules in
        try Dictionary(uniqueKeysWithValues: modules.parameters.map { ($0.key, try $0.tensor.detach()) })
      }
      try ModelAssembly.write(source, weights: weights, settings: try task.settings(), to: url)
    }
  }

  private func save() throws {
    try folder.save(iteration: iteration, update: iteration, keep: configuration.run.keep) { target in
      try TrainingState.write(try state.snapshot(update: iteration), iteration: iteration, to: target)
    }
    saved = iteration
    report(.checkpoint("iteration \(iteration)"))
  }
}
