import FlowModels
import FlowRewards
import Foundation
import Pictures
import Torch

/// A model as users name one: a model folder, an adapter, a checkpoint, a run, or a configuration for its untrained
/// model as a run of it would draw.
public struct ModelReference: Sendable {
  /// The configuration it was trained with, or the defaults around a model folder.
  public private(set) var configuration: Configuration
  /// What was given.
  public let name: String
  /// Sampling steps of the run it comes from.
  public private(set) var steps: Int?
  private var adapter: URL?
  private var weights: URL?
  private var base: String?

  /// Finds out what `path` is.
  ///
  /// - Parameter base: model folder for an adapter that does not say, and for hybrid inference with a whole model.
  public init(_ path: String, base: String? = nil) throws {
    name = path
    self.base = base
    let url = URL(filePath: path)
    let files = FileManager.default
    var isFolder: ObjCBool = false
    guard files.fileExists(atPath: url.path, isDirectory: &isFolder) else {
      throw RunError("\(path): no such model folder, adapter, checkpoint or run")
    }
    if !isFolder.boolValue, ["yaml", "yml"].contains(url.pathExtension) {
      configuration = try Configuration.load(file: url)
      try configuration.validate()
      steps = configuration.sampling.steps
      return
    }
    func exists(_ name: String) -> Bool { files.fileExists(atPath: url.appending(path: name).path) }
    if isFolder.boolValue, exists("model_index.json") {
      configuration = try Self.defaults(url)
      return
    }
    // A run of pretraining, whose result is a folder in it.
    if isFolder.boolValue, exists("model/model_index.json") {
      configuration = try Self.defaults(url.appending(path: "model"))
      return
    }
    // A run, a checkpoint, or an adapter inside one.
    let parent = url.deletingLastPathComponent()
    let config = [url, parent, parent.deletingLastPathComponent()].map { $0.appending(path: "config.yaml") }
      .first { files.fileExists(atPath: $0.path) }
    if let config {
      configuration = try Configuration.load(file: config)
      steps = configuration.sampling.steps
      if let base { configuration.model = base }
    } else if let base {
      configuration = try Self.defaults(URL(filePath: base))
    } else {
      throw RunError(
        "\(path): an adapter without a run around it: say which model it is for with --base MODEL")
    }
    if isFolder.boolValue, exists("metrics.jsonl") || exists("checkpoints") {
      try add(adapter: url.appending(path: "adapter").path)
    } else {
      try add(adapter: path)
    }
  }

  private static func defaults(_ folder: URL) throws -> Configuration {
    var configuration = Configuration()
    configuration.model = folder.path
    struct Size: Decodable { let sampleSize: Int? }
    let size = min(try ModelFolder(folder).config(Size.self, "vae").sampleSize ?? 1024, 1024)
    (configuration.sampling.height, configuration.sampling.width) = (size, size)
    return configuration
  }

  /// Adds a LoRA file, a PEFT folder, or a folder that holds trained weights.
  public mutating func add(adapter path: String) throws {
    let url = URL(filePath: path)
    func file(_ name: String) -> URL? {
      let candidate = url.appending(path: name)
      return FileManager.default.fileExists(atPath: candidate.path) ? candidate : nil
    }
    if let found = try LoRAFile.locate(url) {
      adapter = found
    } else if let found = file("diffusion_pytorch_model.safetensors") {
      weights = found
    } else {
      throw RunError(
        "\(path): holds no trained weights: expected pytorch_lora_weights.safetensors, diffusion_pytorch_model.safetensors "
          + "or PEFT's adapter_config.json and adapter_model.safetensors")
    }
  }

  /// Draws at another size or guidance.
  public mutating func resize(height: Int?, width: Int?, guidance: Double?, negative: String? = nil) throws {
    if let height { configuration.sampling.height = height }
    if let width { configuration.sampling.width = width }
    if let guidance { configuration.sampling.guidance = guidance }
    if let negative { configuration.sampling.negative = negative }
  }

  /// Changes keys of its configuration; `option` is what a message about a value calls it.
  ///
  /// - Throws: ``ConfigurationError`` for all that cannot be read.
  public mutating func set(
    _ options: [(option: String, key: String, value: String)]
  ) throws(ConfigurationError) {
    configuration = try configuration.changed(by: options)
  }

  /// Prompts of a file, or of the run's or the built-in one: of the split named, the run's, or `train` where there is one.
  public func prompts(file: String?, split: String?) throws -> [Prompt] {
    let url = URL(filePath: try file ?? promptFile())
    if let split = split ?? (steps != nil && file == nil ? configuration.prompts.split : nil) {
      return try PromptFile.load(file: url, split: split)
    }
    let all = try PromptFile.load(file: url, split: "all")
    let train = all.filter { $0.split == "train" }
    return train.isEmpty ? all : train
  }

  /// Uses the arithmetic of `other`, so that the numbers of both differ by their weights only.
  mutating func computeLike(_ other: ModelReference) {
    configuration.network = other.configuration.network
    // Trained weights are loaded as they are.
    if weights != nil { configuration.network.weights = .model }
  }

  /// Embeds prompts as `other` does: at its length, from its store.
  mutating func readText(like other: ModelReference) {
    configuration.sampling.textLength = other.configuration.sampling.textLength
    configuration.prompts.embeddings = other.configuration.prompts.embeddings
  }

  /// The run's prompt file, or the built-in one.
  public func promptFile() throws -> String {
    steps != nil ? configuration.prompts.file : try Assets.locate("prompts.jsonl").path
  }

  /// Whether both draw with the same base network, so that it need not be loaded twice.
  func sharesBase(with other: ModelReference) -> Bool {
    weights == nil && other.weights == nil
      && URL(filePath: configuration.model).standardizedFileURL
        == URL(filePath: other.configuration.model).standardizedFileURL
  }

  /// The model, ready to draw.
  ///
  /// - Parameter hybrid: whether its base is wanted beside it: for an adapter that is the same network, otherwise a second
  ///   one.
  public func load(hybrid: Bool = false) throws -> Engine {
    let engine = try Engine(configuration)
    let adapter = try attach(to: engine)
    if hybrid { try addBase(to: engine, without: adapter) }
    return engine
  }

  /// Throws where no base is known: asked before hours of drawing, not after.
  func requireBase() throws {
    guard adapter != nil || weights != nil || base != nil else {
      throw RunError(
        "\(name): a whole model: say which one takes the steps after the switch with --base MODEL")
    }
  }

  /// Gives an engine with these weights its base: the network without `adapter`, or the folder it was trained from.
  func addBase(to engine: Engine, without adapter: LoRAAdapter?) throws {
    if let adapter {
      engine.base = BaseModel(engine.network, without: adapter)
      return
    }
    try requireBase()
    var reference = self
    reference.weights = nil
    if weights == nil, let base { reference.configuration.model = base }
    let other = try reference.load()
    guard other.latentShape == engine.latentShape, other.pipeline.guidance == engine.pipeline.guidance else {
      throw RunError(
        "\(reference.configuration.model): latents of \(other.latentShape), guidance \(other.pipeline.guidance); "
          + "\(name) has \(engine.latentShape), \(engine.pipeline.guidance): name the model it was trained from"
      )
    }
    engine.base = other.network
  }

  /// Adds the trained weights to a loaded base.
  func attach(to engine: Engine) throws -> LoRAAdapter? {
    if let weights {
      let file = try SafetensorsFile(weights)
      for parameter in engine.network.modules.parameters {
        try parameter.tensor.copy(from: try file.require(parameter.key))
      }
      return nil
    }
    return try adapter.map { try LoRAAdapter($0, for: engine.network.modules, device: engine.device) }
  }
}

/// One model's evaluation, or two on equal prompts and noise.
public struct Comparison {
  let tuned: ModelReference
  let base: ModelReference?
  let rewards: [Configuration.Reward]
  let prompts: [Prompt]
  let split: String
  let count, steps: Int
  let seed: UInt64

  /// Sets up a comparison of `tuned`, against `base` if there is one.
  public init(
    tuned: ModelReference, base: ModelReference?, rewards: [Configuration.Reward], prompts: [Prompt],
    split: String,
    count: Int, steps: Int, seed: UInt64
  ) {
    (self.tuned, self.base, self.rewards, self.prompts, self.split) = (tuned, base, rewards, prompts, split)
    (self.count, self.steps, self.seed) = (count, steps, seed)
  }

  /// Draws and scores; `picture` receives a grid of before and after.
  public func run(picture: URL? = nil, progress: (String, Int) -> Void = { _, _ in }) throws
    -> EvaluationReport
  {
    try run(switches: [nil], picture: picture, progress: progress)[0]
  }

  /// The same once for each switch step, by hybrid inference: the base model is drawn with once.
  ///
  /// - Parameters:
  ///   - switches: steps that the tuned model takes before its own base does the others; nil for all of them.
  ///   - picture: shows the last one.
  ///   - warn: told of rewards that behave oddly on their probe.
  public func run(
    switches: [Int?], picture: URL? = nil, progress: (String, Int) -> Void = { _, _ in },
    warn: (String) -> Void = { _ in }
  ) throws -> [EvaluationReport] {
    let hybrid = switches.contains { $0 != nil }
    if hybrid { try tuned.requireBase() }
    let set = try RewardSet(rewards)
    try set.check(prompts)
    try set.probe(warn: warn)
    let shown = picture == nil ? [] : Self.shown(prompts)
    func evaluate(_ engine: Engine, _ name: String, switchStep: Int? = nil) throws -> Evaluation {
      try Evaluation.run(
        engine, prompts, set, count: count, steps: steps, seed: seed, switchStep: switchStep,
        keep: Set(shown),
        progress: { progress(name, $0) })
    }
    let engine = try Engine(tuned.configuration)
    var before: Evaluation?
    if let base {
      var reference = base
      reference.computeLike(tuned)
      try reference.resize(
        height: tuned.configuration.sampling.height, width: tuned.configuration.sampling.width,
        guidance: tuned.configuration.sampling.guidance, negative: tuned.configuration.sampling.negative)
      reference.readText(like: tuned)
      if base.sharesBase(with: tuned) {
        let adapter = try reference.attach(to: engine)
        before = try evaluate(engine, base.name)
        adapter?.disable()
      } else {
        before = try evaluate(try reference.load(), base.name)
      }
    }
    let adapter = try tuned.attach(to: engine)
    if hybrid { try tuned.addBase(to: engine, without: adapter) }
    return try switches.map { step in
      let after = try evaluate(
        engine, tuned.name + (step.map { ", base after \($0) steps" } ?? ""), switchStep: step)
      if let picture, let before { try Self.draw(before, after, shown, names: set.names, to: picture) }
      return try EvaluationReport(
        after, against: before, order: set.names, steps: steps, switchStep: step, seed: seed, split: split,
        model: tuned.name, againstName: base?.name)
    }
  }

  /// Two prompts of each tag, spread over the list.
  private static func shown(_ prompts: [Prompt]) -> [Int] {
    var byTag: [String: [Int]] = [:]
    for (i, prompt) in prompts.enumerated() { byTag[prompt.tag ?? "", default: []].append(i) }
    let most = byTag.count > 1 ? 2 : 12
    return byTag.sorted { $0.key < $1.key }.flatMap { _, list in
      stride(from: 0, to: list.count, by: max(1, list.count / most)).prefix(most).map { list[$0] }
    }
  }

  private static func draw(
    _ before: Evaluation, _ after: Evaluation, _ shown: [Int], names: [String], to file: URL
  ) throws {
    func cell(_ evaluation: Evaluation, _ i: Int) -> Grid.Cell {
      let scores = names.map { name in
        "\(name) " + (evaluation.perPrompt[name]![i].map { String(format: "%.2f", $0) } ?? "failed")
      }
      return Grid.Cell(evaluation.pictures[i], caption: scores.joined(separator: "  "))
    }
    let rows = shown.map { i in Grid.Row(before.prompts[i].text, cells: [cell(before, i), cell(after, i)]) }
    let scale = max(1, 128 / (before.pictures.values.first?.width ?? 128))
    try Grid(
      title: "base and tuned, equal noise",
      columns: ["base", "tuned"], rows: rows,
      scale: scale
    ).render().write(png: file)
  }
}
