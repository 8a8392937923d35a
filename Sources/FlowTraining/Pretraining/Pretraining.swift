import FlowModels
import Foundation
import Yams

/// What `pretrain` reads from YAML: how a model folder is trained from scratch on rendered scenes.
///
/// The initial values are those the built-in model was trained with.
public struct Pretraining: Sendable, Equatable {
  /// What a run trains.
  public enum Part: String, Configuration.Choice, CaseIterable {
    /// Transformer and text encoders, by flow matching.
    case flow
    /// The autoencoder.
    case vae
  }

  /// Captions and the scenes they describe.
  public struct Prompts: Sendable, Equatable {
    /// JSON lines with metadata.
    public var file = "Data/prompts.jsonl"
    /// Name of a split in the file, or `all`: a base model knows every scene.
    public var split = "all"
    /// Every default.
    public init() {}
  }

  /// The noise levels trained at: σ = sigmoid(mean + deviation·n), n standard normal (arXiv 2403.03206, section 3.1).
  public struct Times: Sendable, Equatable {
    /// Of the logit; above 0 noisy images are trained on more.
    public var mean = 0.3
    /// Of the logit.
    public var deviation = 1.0
    /// Every default.
    public init() {}
  }

  /// AdamW; the rate rises linearly over `warmup` iterations and falls as a cosine to 0 at the end.
  public struct Optim: Sendable, Equatable {
    /// Highest learning rate.
    public var lr = 2e-3
    /// Iterations of the rise.
    public var warmup = 100
    /// Decoupled weight decay.
    public var weightDecay = 0.01
    /// Decay rates of the two moments: exactly two numbers.
    public var betas = [0.9, 0.98]
    /// Added to the root of the second moment.
    public var eps = 1e-8
    /// Gradient norm above which the gradient is scaled down.
    public var maxGradNorm = 1.0
    /// Every default.
    public init() {}
  }

  /// The autoencoder's training.
  public struct Autoencoder: Sendable, Equatable {
    /// Weight of the divergence from the standard normal, averaged over the elements of a latent.
    public var kl = 2e-3
    /// Scenes by which mean and spread of the latents are measured at the end.
    public var measured = 480
    /// Every default.
    public init() {}
  }

  /// How the model is looked at on the way.
  public struct Look: Sendable, Equatable {
    /// Iterations between evaluations; 0 makes none.
    public var every = 500
    /// Split of the prompt file.
    public var split = "dev"
    /// Images of each prompt.
    public var count = 1
    /// Sampling steps.
    public var steps = 16
    /// Every default.
    public init() {}
  }

  /// How long the run is and what it keeps.
  public struct Run: Sendable, Equatable {
    /// Optimizer steps.
    public var iterations = 5900
    /// Iterations between checkpoints.
    public var checkpointEvery = 200
    /// Checkpoints that stay.
    public var keep = 2
    /// Every default.
    public init() {}
  }

  /// Model folder whose configurations and tokenizers are taken, and whose weights where they are not trained; `init` in YAML.
  public var start = "Models/flux-mini"
  /// Run folder to write.
  public var output = "runs/pretrain"
  /// Key of the counter-based generator.
  public var seed: UInt64 = 1
  /// What is trained.
  public var part = Part.flow
  /// What is drawn.
  public var prompts = Prompts()
  /// Images of an iteration.
  public var batch = 48
  /// Precision of the transformer's products.
  public var dtype = Configuration.Network.DType.auto
  /// Noise levels.
  public var times = Times()
  /// The optimizer.
  public var optim = Optim()
  /// Share of the average of the weights kept at a step; the average is what is evaluated and written.
  public var ema = 0.998
  /// The autoencoder's training.
  public var vae = Autoencoder()
  /// How the model is looked at on the way.
  public var evaluate = Look()
  /// How long the run is.
  public var run = Run()

  /// Every default.
  public init() {}

  /// Reads a YAML file, then applies `overrides`, each `a.b.c=value`; paths may be relative to the current directory or to the
  /// file's folder.
  ///
  /// - Throws: ``ConfigurationError`` for a file that cannot be read, bad YAML, unknown keys and wrong types.
  public static func load(file: URL, overrides: [String] = []) throws(ConfigurationError) -> Pretraining {
    var result = try load(yaml: try Configuration.text(of: file), source: file.relativePath)
    let folder = file.absoluteURL.deletingLastPathComponent()
    Configuration.resolve(&result.start, against: folder)
    Configuration.resolve(&result.output, against: folder)
    Configuration.resolve(&result.prompts.file, against: folder)
    for text in overrides {
      let override = try Configuration.Override(text)
      result = try read(override.node, over: result, override.place)
      if let error = ConfigurationError(override.place.problems.list) { throw error }
    }
    return result
  }

  /// Reads YAML text; `source` is its name in messages.
  public static func load(yaml: String, source: String) throws(ConfigurationError) -> Pretraining {
    let place = Configuration.Place(source: source, isFile: true)
    guard let node = try Configuration.compose(yaml, place), !node.isNull else {
      throw .empty(source: source)
    }
    let result = try read(node, over: nil, place)
    if let error = ConfigurationError(place.problems.list) { throw error }
    return result
  }

  /// The whole configuration as YAML, in a fixed order; reading it gives an equal value.
  public func yaml() -> String {
    do { return try serialize(node: node, width: -1, allowUnicode: true) } catch {
      preconditionFailure("a configuration always has a YAML form: \(error)")
    }
  }

  /// Makes paths independent of the current directory; ``output`` is left as it is.
  public mutating func makePathsAbsolute() {
    start = URL(filePath: start).standardizedFileURL.path
    prompts.file = URL(filePath: prompts.file).standardizedFileURL.path
  }

  /// Refuses values that make no sense.
  ///
  /// - Throws: ``ConfigurationError/invalid(path:reason:)``.
  public func validate() throws(ConfigurationError) {
    typealias Check = (holds: Bool, path: String, reason: String)
    func least(_ path: String, _ value: Int, _ bound: Int) -> Check {
      (value >= bound, path, "expected at least \(bound), got \(value)")
    }
    func positive(_ path: String, _ value: Double) -> Check {
      (value > 0 && value.isFinite, path, "expected a number above 0, got \(value)")
    }
    func notNegative(_ path: String, _ value: Double) -> Check {
      (value >= 0 && value.isFinite, path, "expected a number of 0 or more, got \(value)")
    }
    func share(_ path: String, _ value: Double) -> Check {
      (0 <= value && value < 1, path, "expected a number in [0, 1), got \(value)")
    }
    func named(_ path: String, _ text: String) -> Check {
      (!text.isEmpty, path, "expected a name, got an empty one")
    }
    var checks: [Check] = [
      named("init", start), named("output", output), named("prompts.file", prompts.file),
      named("prompts.split", prompts.split), least("batch", batch, 1),
      (batch < 1 << 16, "batch", "expected fewer than 65536, as many as have random streams, got \(batch)"),
      (times.mean.isFinite, "times.mean", "expected a finite number, got \(times.mean)"),
      positive("times.deviation", times.deviation), positive("optim.lr", optim.lr),
      least("optim.warmup", optim.warmup, 0), notNegative("optim.weightDecay", optim.weightDecay),
      (optim.betas.count == 2, "optim.betas", "expected two numbers, got \(optim.betas.count)"),
      positive("optim.eps", optim.eps), positive("optim.maxGradNorm", optim.maxGradNorm), share("ema", ema),
      notNegative("vae.kl", vae.kl), least("vae.measured", vae.measured, 1),
      least("evaluate.every", evaluate.every, 0), least("evaluate.count", evaluate.count, 1),
      least("evaluate.steps", evaluate.steps, 1), least("run.iterations", run.iterations, 1),
      least("run.checkpointEvery", run.checkpointEvery, 1), least("run.keep", run.keep, 1),
    ]
    checks += optim.betas.map { share("optim.betas", $0) }
    if let bad = checks.first(where: { !$0.holds }) { throw .invalid(path: bad.path, reason: bad.reason) }
  }

  /// Learning rate of iteration `i`, counted from 0.
  public func learningRate(_ i: Int) -> Double {
    let rise = min(1, Double(i + 1) / Double(max(optim.warmup, 1)))
    return optim.lr * rise * 0.5 * (1 + Foundation.cos(.pi * Double(i) / Double(run.iterations)))
  }
}

extension Pretraining: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("init", \.start), .init("output", \.output), .init("seed", \.seed), .init("part", \.part),
      .init("prompts", \.prompts), .init("batch", \.batch), .init("dtype", \.dtype), .init("times", \.times),
      .init("optim", \.optim), .init("ema", \.ema), .init("vae", \.vae), .init("evaluate", \.evaluate),
      .init("run", \.run),
    ]
  }
  static var known: [String] { dotted(fields) }
}

extension Pretraining.Prompts: Configuration.Section {
  static var fields: [Configuration.Field<Self>] { [.init("file", \.file), .init("split", \.split)] }
  static var known: [String] { Pretraining.known }
}

extension Pretraining.Times: Configuration.Section {
  static var fields: [Configuration.Field<Self>] { [.init("mean", \.mean), .init("deviation", \.deviation)] }
  static var known: [String] { Pretraining.known }
}

extension Pretraining.Optim: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("lr", \.lr), .init("warmup", \.warmup), .init("weightDecay", \.weightDecay),
      .init("betas", \.betas), .init("eps", \.eps), .init("maxGradNorm", \.maxGradNorm),
    ]
  }
  static var known: [String] { Pretraining.known }
}

extension Pretraining.Autoencoder: Configuration.Section {
  static var fields: [Configuration.Field<Self>] { [.init("kl", \.kl), .init("measured", \.measured)] }
  static var known: [String] { Pretraining.known }
}

extension Pretraining.Look: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [.init("every", \.every), .init("split", \.split), .init("count", \.count), .init("steps", \.steps)]
  }
  static var known: [String] { Pretraining.known }
}

extension Pretraining.Run: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("iterations", \.iterations), .init("checkpointEvery", \.checkpointEvery), .init("keep", \.keep),
    ]
  }
  static var known: [String] { Pretraining.known }
}
