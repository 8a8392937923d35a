import ChunkGRPO
import FlowRewards

/// Everything that decides a training run: what `train` reads from YAML and stores in the run folder and in
/// every checkpoint.
///
/// The initial values below are the only place where defaults are written; YAML keys carry the names of the
/// properties. A value of this type may still be nonsense: call ``validate()`` before using it.
public struct Configuration: Codable, Sendable, Equatable {
  /// Folder of the model, in the diffusers layout.
  public var model = "Models/flux-mini"
  /// Run folder to write.
  public var output = "runs/demo"
  /// Key of the counter-based generator.
  public var seed: UInt64 = 1
  /// Where the training prompts come from.
  public var prompts = Prompts()
  /// What is maximised; several rewards are combined by ``aggregate``.
  public var rewards = [Reward(name: "scenes", score: "graded")]
  /// How several rewards become one number.
  public var aggregate = Aggregate.sum
  /// How trajectories are sampled.
  public var sampling = Sampling()
  /// How many samples an iteration has.
  public var group = Group()
  /// How trajectories are cut into chunks, and which are trained on.
  public var chunk = Chunk()
  /// The clipped objective.
  public var loss = Loss()
  /// AdamW and the division of an iteration into updates.
  public var optim = Optim()
  /// Which weights are trained.
  public var trainable = Trainable()
  /// Exponential moving average of the trained weights.
  public var ema = EMA()
  /// What watches for a reward that is raised at the expense of the images.
  public var guards = Guards()
  /// How the network is computed.
  public var network = Network()
  /// How long the run is and what it writes.
  public var run = Run()

  /// Every default.
  public init() {}

  /// Samples of one iteration of a validated configuration, over all devices.
  public var samplesPerIteration: Int { group.promptsPerIteration * group.size }
}

extension Configuration {
  /// The prompt file and the part of it to train on.
  public struct Prompts: Codable, Sendable, Equatable {
    /// JSON lines with metadata, or plain text (`.txt`) with one prompt a line.
    public var file = "Data/prompts.jsonl"
    /// Name of a split in the file, or `all`.
    public var split = "train"
    /// Where text embeddings are kept: `auto`, `memory`, or the folder that `chunkgrpo encode` wrote.
    public var embeddings = "auto"
    /// Every default.
    public init() {}
  }

  /// One term of the reward.
  public typealias Reward = RewardSettings

  /// How several rewards become one number.
  public enum Aggregate: String, Choice, CaseIterable {
    /// Weighted sum of the raw scores.
    case sum
    /// Weighted sum of each reward's z-score within its group.
    case normalised
    /// Weighted sum of the rewards' own advantages, not standardised again.
    case advantages
  }

  /// How trajectories are sampled.
  public struct Sampling: Codable, Sendable, Equatable {
    /// Sampling steps T; the last is never trained on.
    public var steps = 17
    /// Shift of the training schedule.
    public var shift = 3.0
    /// Guidance scale; nil where the model takes none.
    public var guidance: Double? = 3.5
    /// What classifier-free guidance leads away from.
    public var negative = ""
    /// T5 tokens; nil for the model's own number.
    public var textLength: Int?
    /// Image height in pixels.
    public var height = 64
    /// Image width in pixels.
    public var width = 64
    /// Kind of stochastic step.
    public var step = Step.flowSDE
    /// Stochasticity η of a step.
    public var eta = 0.7
    /// Steps that are stochastic and trained on; the others follow the ODE.
    public var window = Window.all
    /// Most moves of each run of deterministic steps, of second order; nil takes every step.
    public var coarse: Int?
    /// Whether deterministic steps before the window are computed once for a group.
    public var prefix = Prefix.each
    /// Which samples start from the same noise.
    public var sharedNoise = SharedNoise.group
    /// Latent that is decoded and scored.
    public var decode = Decode.x0
    /// Where the noise levels come from.
    public var schedule = Schedule.training
    /// The time the network is given.
    public var time = Time.exact
    /// Every default.
    public init() {}

    /// Steps with a log-probability that chunks are planned for: the window without the last, which goes to σ = 0; of
    /// windows that move, the first.
    public var trainableSteps: Range<Int> {
      let all = 0..<max(steps - 1, 0)
      switch window {
      case .all, .drawn: return all
      case .steps(let first, let last):
        return first <= last && last < .max ? all.clamped(to: first..<last + 1) : 0..<0
      case .sliding(let width, _, _), .random(let width): return width <= all.count ? 0..<width : 0..<0
      }
    }

    /// ``trainableSteps`` of one group in one iteration of a validated configuration.
    ///
    /// `sliding` stays for `iterations`, moves on by `stride`, last to the end, and begins anew; `random` draws from
    /// `generator`, every place alike.
    func window(iteration: Int, using generator: inout some RandomNumberGenerator) -> Range<Int> {
      let room = max(steps - 1, 0) - trainableSteps.count
      switch window {
      case .all, .drawn, .steps: return trainableSteps
      case .random(let width):
        let start = generator.index(below: room + 1)
        return start..<(start + width)
      case .sliding(let width, let stride, let iterations):
        let places = (room + stride - 1) / stride + 1
        let start = min(iteration / iterations % places * stride, room)
        return start..<(start + width)
      }
    }

    /// Kinds of steps x_i → x_{i+1} ~ N(μ, s²).
    public enum Step: String, Choice, CaseIterable {
      /// Flow-GRPO's stochastic differential equation.
      case flowSDE = "flow-sde"
      /// Dance-GRPO's stochastic differential equation.
      case danceSDE = "dance-sde"
      /// Coefficient-preserving sampling, η in 0…1.
      case cps
      /// The deterministic Euler step, which cannot be trained on.
      case ode
    }
    /// Steps that are stochastic.
    public enum Window: Sendable, Equatable {
      /// Every step.
      case all
      /// Steps `first` to `last`, both included; written `first-last`.
      case steps(first: Int, last: Int)
      /// `width` steps that move by `stride` every so many iterations; written `sliding:width,stride,iterations`.
      case sliding(width: Int, stride: Int, iterations: Int)
      /// `width` steps, drawn anew for each group; written `random:width`.
      case random(width: Int)
      /// Those of the chunks drawn for a group.
      case drawn
    }
    /// What becomes of deterministic steps before the window.
    public enum Prefix: String, Choice, CaseIterable {
      /// Every sample computes its own.
      case each
      /// Samples of a group, which start from the same noise, share them.
      case shared
    }
    /// Samples that start from the same noise.
    public enum SharedNoise: String, Choice, CaseIterable {
      /// Those of one prompt.
      case group
      /// Those of one device batch.
      case batch
      /// None.
      case none
    }
    /// The latent that is decoded and scored.
    public enum Decode: String, Choice, CaseIterable {
      /// The last forward pass's estimate of the clean image.
      case x0
      /// The end of the noisy trajectory.
      case xT
    }
    /// The source of the noise levels.
    public enum Schedule: String, Choice, CaseIterable {
      /// Uniform levels from 1 to 0, shifted once by ``Configuration/Sampling/shift``.
      case training
      /// The scheduler in the model's folder.
      case model
    }
    /// The time given to the network.
    public enum Time: String, Choice, CaseIterable {
      /// 1000·σ.
      case exact
      /// 1000·σ without its fraction.
      case truncated
    }
  }

  /// How many samples an iteration has.
  public struct Group: Codable, Sendable, Equatable {
    /// Samples of one prompt.
    public var size = 12
    /// Prompts of one iteration, over all devices.
    public var promptsPerIteration = 4
    /// Rewards that an advantage compares with.
    public var statistics = Statistics.group
    /// Every default.
    public init() {}

    /// Rewards whose mean is subtracted and whose standard deviation divides.
    public enum Statistics: String, Choice, CaseIterable {
      /// Those of the group.
      case group
      /// All that samples of the prompt have had in the run so far, these included.
      case running
    }
  }

  /// How trajectories are cut into chunks, and which are trained on.
  public struct Chunk: Codable, Sendable, Equatable {
    /// `step`, `sequence`, `fixed:n`, `list:a,b,…`, `adaptive`, `adaptive-shared` or `auto`.
    public var plan = "list:2,3,4,7"
    /// Steps that share one ratio.
    public var ratio = Ratio.chunk
    /// Weights of the trained chunks.
    public var timeWeight = TimeWeight.perChunk
    /// `uniform`, `weighted`, `weighted:softmax` or `only:a,b,…`.
    public var draw = "uniform"
    /// Share of a sample's chunks that is drawn.
    public var fraction = 0.5
    /// Share of a drawn chunk's steps that is trained on.
    public var stepFraction = 1.0
    /// Noise level below which a chunk that begins there is late: rewards may weigh otherwise in it (`lateWeight`).
    public var lateBelow = 0.8
    /// Adaptive plans: pieces up to this size are not split.
    public var stopSize = 7
    /// Adaptive plans: shorter runs join a neighbour.
    public var minChunk = 2
    /// Adaptive plans: how far two latents are apart.
    public var distance = Distance.l1
    /// Every default.
    public init() {}

    /// Steps that share one ratio.
    public enum Ratio: String, Choice, CaseIterable {
      /// None: one ratio a step.
      case step
      /// Those of one chunk.
      case chunk
      /// The whole trajectory.
      case sequence
    }
    /// Weights of the trained chunks.
    public enum TimeWeight: String, Choice, CaseIterable {
      /// 1 for every chunk.
      case perChunk
      /// 1 for every step.
      case none
      /// The inverse of each step's sensitivity to the velocity.
      case equalised
      /// g/η.
      case tempflow
      /// 1/(−Δσ).
      case `guard`
    }
    /// Distance of consecutive latents.
    public enum Distance: String, Choice, CaseIterable {
      /// Relative 1-norm.
      case l1
      /// Relative 2-norm.
      case l2
      /// 1 − cosine.
      case cosine
    }
  }

  /// The clipped objective.
  public struct Loss: Codable, Sendable, Equatable {
    /// Clip range of the ratio below and above 1: exactly two numbers.
    public var clip = [5e-5, 5e-5]
    /// Bound on the magnitude of an advantage.
    public var advantageClip = 5.0
    /// Samples whose standard deviation divides the advantages.
    public var advantageStd = AdvantageStd.group
    /// Weight β of the divergence from the reference policy.
    public var kl = 0.0
    /// Form of the divergence.
    public var klForm = KLForm.flowGRPO
    /// Where old log-probabilities come from.
    public var anchor = Anchor.rollout
    /// How a step's log-ratio is formed.
    public var ratioNorm = RatioNorm.none
    /// Every default.
    public init() {}

    /// Whether a rollout has to keep the means of its steps.
    var keepsMeans: Bool { ratioNorm == .guard && anchor == .rollout }

    /// How a step's log-ratio is formed.
    public enum RatioNorm: String, Choice, CaseIterable {
      /// The difference of log-probabilities.
      case none
      /// GRPO-Guard's: without its bias, times s.
      case `guard`
    }

    /// Samples whose standard deviation divides the advantages.
    public enum AdvantageStd: String, Choice, CaseIterable {
      /// Those of the prompt.
      case group
      /// All of the iteration.
      case global
    }
    /// Form of the divergence.
    public enum KLForm: String, Choice, CaseIterable {
      /// (μ − μ_ref)²/(2g²), without the step size.
      case flowGRPO
      /// (μ − μ_ref)²/(2s²).
      case exact
      /// e^d − 1 − d, from log-probabilities.
      case k3
    }
    /// Where old log-probabilities come from.
    public enum Anchor: String, Choice, CaseIterable {
      /// The rollout.
      case rollout
      /// One replay in the update's own batch geometry.
      case replay
    }
  }

  /// AdamW and the division of an iteration into updates.
  public struct Optim: Codable, Sendable, Equatable {
    /// Learning rate.
    public var lr = 1e-5
    /// Decoupled weight decay.
    public var weightDecay = 1e-4
    /// Decay rates of the two moments: exactly two numbers.
    public var betas = [0.9, 0.999]
    /// Added to the root of the second moment.
    public var eps = 1e-8
    /// Gradient norm above which the gradient is scaled down.
    public var maxGradNorm = 0.01
    /// Optimizer steps of one iteration.
    public var updatesPerIteration = 2
    /// Steps that are back-propagated at once; changes memory and speed only.
    public var microBatch = 48
    /// How the moments are kept.
    public var state = State.float32
    /// Whether the moments live in host memory; changes memory and speed only.
    public var offload = false
    /// Every default.
    public init() {}

    /// How the moments are kept.
    public enum State: String, Choice, CaseIterable {
      /// 8 bytes a trained parameter.
      case float32
      /// 2 bytes a trained parameter: codes of 8 bits in blocks with a scale.
      case int8
    }
  }

  /// Which weights are trained.
  public struct Trainable: Codable, Sendable, Equatable {
    /// Adapter or everything.
    public var kind = Kind.lora
    /// Rank of the adapter.
    public var rank = 16
    /// Scale of the adapter, divided by the rank.
    public var alpha = 32.0
    /// Names of the linear layers that get an adapter; a single name may be written without brackets.
    public var targets = ["to_q", "to_k", "to_v", "to_out.0"]
    /// Every default.
    public init() {}

    /// Adapter or everything.
    public enum Kind: String, Choice, CaseIterable {
      /// A low-rank adapter.
      case lora
      /// All weights; rank, alpha and targets are ignored.
      case full
    }
  }

  /// Exponential moving average of the trained weights.
  public struct EMA: Codable, Sendable, Equatable {
    /// Share of the old average kept at an optimizer step; 0 turns the average off.
    public var decay = 0.0
    /// Every default.
    public init() {}
  }

  /// What watches for a reward that is raised at the expense of the images, on the dev split every `run.evaluateEvery`
  /// iterations. Bands are around what was measured before training.
  public struct Guards: Codable, Sendable, Equatable {
    /// What happens when a guard leaves its band while the trained reward rises.
    public var action = Action.warn
    /// How much the share of blank images may rise.
    public var blank = 0.02
    /// Smallest diversity within groups, as a factor of the baseline.
    public var diversity = 0.8
    /// Band of ink, as factors of the baseline: two numbers.
    public var ink = [0.6, 1.6]
    /// Band of sharpness, as factors of the baseline: two numbers.
    public var sharpness = [0.5, 2.0]
    /// Band of the spectral energy on pixel grids, as factors of the baseline: two numbers.
    public var grid = [0.0, 2.0]
    /// Every default.
    public init() {}

    /// What happens when a guard leaves its band while the trained reward rises.
    public enum Action: String, Choice, CaseIterable {
      /// A warning with the iteration.
      case warn
      /// The run ends, with the adapter of the best evaluation whose guards were all inside.
      case stop
      /// Nothing is compared, and nothing measured before training.
      case off
    }
  }

  /// How the network is computed.
  public struct Network: Codable, Sendable, Equatable {
    /// Precision of matrix products.
    public var dtype = DType.auto
    /// Precision of the time before its embedding.
    public var timeRounding = TimeRounding.float32
    /// Attention implementation.
    public var attention = Attention.auto
    /// Activations recomputed in the backward pass.
    public var checkpointing = Checkpointing.none
    /// Memory to stay within, such as `80GiB`: the largest `optim.microBatch` that does is used; nil takes that given.
    public var memory: String?
    /// How the frozen weights of the transformer's blocks are kept.
    public var weights = Weights.model
    /// How images go through the autoencoder.
    public var vae = VAE.auto
    /// Precision of the autoencoder; rewards see float32 images either way.
    public var decodeDtype = DecodeDType.float32
    /// Every default.
    public init() {}

    /// Precision of matrix products.
    public enum DType: String, Choice, CaseIterable {
      /// The best the device computes fast.
      case auto
      /// 32 bits.
      case float32
      /// 16 bits, float32's exponent.
      case bfloat16
    }
    /// Precision of the time before its embedding.
    public enum TimeRounding: String, Choice, CaseIterable {
      /// 32 bits.
      case float32
      /// That of the model's weights.
      case model
    }
    /// Attention implementation.
    public enum Attention: String, Choice, CaseIterable {
      /// The fastest the device has.
      case auto
      /// Explicit softmax of the products.
      case math
      /// The fused kernel.
      case sdpa
    }
    /// Activations recomputed in the backward pass.
    public enum Checkpointing: Sendable, Equatable {
      /// None.
      case none
      /// Those of every block.
      case block
      /// Those of segments of n consecutive blocks, of which only the inputs are kept; written `every:n`.
      case every(Int)
    }
    /// How the frozen weights of the transformer's blocks are kept.
    public enum Weights: String, Choice, CaseIterable {
      /// In the network's dtype.
      case model
      /// 8-bit integers with a scale for each row.
      case int8
      /// 8-bit floating point (e4m3) with a scale for each row.
      case fp8
    }
    /// Precision of the autoencoder.
    public enum DecodeDType: String, Choice, CaseIterable {
      /// 32 bits.
      case float32
      /// 16 bits, float32's exponent; norms and sums stay in 32.
      case bfloat16
    }
    /// How images go through the autoencoder.
    public enum VAE: String, Choice, CaseIterable {
      /// By size: all at once, image by image or tile by tile.
      case auto
      /// All of a batch at once.
      case plain
      /// Image by image.
      case sliced
      /// Tile by tile.
      case tiled
    }
  }

  /// How long the run is and what it writes.
  public struct Run: Codable, Sendable, Equatable {
    /// Iterations of the whole run.
    public var iterations = 50
    /// Iterations between checkpoints.
    public var checkpointEvery = 5
    /// Checkpoints kept.
    public var keep = 2
    /// Iterations between sample grids; 0 writes none.
    public var samplesEvery = 5
    /// Iterations between evaluations; 0 makes none.
    public var evaluateEvery = 10
    /// Reward whose mean on the dev split ends the run early when it reaches ``stopAbove``; nil runs all iterations.
    public var stopReward: String?
    /// The mean that ``stopReward`` is to reach.
    public var stopAbove = 0.0
    /// Every default.
    public init() {}
  }
}

extension Configuration.Sampling.Window: Configuration.Choice {
  /// Whether its place differs between groups or iterations.
  var moves: Bool {
    switch self {
    case .all, .steps: false
    case .sliding, .random, .drawn: true
    }
  }

  static var expected: String {
    "all, first-last such as 0-4, sliding:width,stride,iterations, random:width or drawn"
  }

  /// Reads `all`, `first-last`, `sliding:w`, `sliding:w,s,n`, `random:w` or `drawn`; nil for anything else.
  public init?(rawValue: String) {
    let parts = rawValue.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
    switch (parts[0], parts.count == 2 ? Configuration.counts(parts[1]) : nil) {
    case ("all", nil) where parts.count == 1: self = .all
    case ("drawn", nil) where parts.count == 1: self = .drawn
    // what MixGRPO moves by, and when
    case ("sliding", let n?) where n.count == 1: self = .sliding(width: n[0], stride: 1, iterations: 25)
    case ("sliding", let n?) where n.count == 3:
      self = .sliding(width: n[0], stride: n[1], iterations: n[2])
    case ("random", let n?) where n.count == 1: self = .random(width: n[0])
    default: self.init(ends: rawValue)
    }
  }

  private init?(ends rawValue: String) {
    let ends = rawValue.split(separator: "-", omittingEmptySubsequences: false).map(Configuration.count)
    guard ends.count == 2, let first = ends[0], let last = ends[1] else { return nil }
    self = .steps(first: first, last: last)
  }

  /// The YAML text.
  public var rawValue: String {
    switch self {
    case .all: "all"
    case .steps(let first, let last): "\(first)-\(last)"
    case .sliding(let width, let stride, let iterations): "sliding:\(width),\(stride),\(iterations)"
    case .random(let width): "random:\(width)"
    case .drawn: "drawn"
    }
  }
}

extension Configuration.Network {
  /// ``memory`` in bytes; nil if there is none, or it cannot be read.
  public var memoryBytes: Int? {
    guard let memory else { return nil }
    let units = ["KiB": 1024.0, "MiB": 1_048_576, "GiB": 1_073_741_824, "MB": 1e6, "GB": 1e9]
    for (unit, size) in units where memory.hasSuffix(unit) {
      let number = memory.dropLast(unit.count).trimmingCharacters(in: .whitespaces)
      guard let value = Double(scalar: .init(number)), value > 0, value * size < 1e18 else { return nil }
      return Int(value * size)
    }
    return nil
  }
}

extension Configuration.Network.Checkpointing: Configuration.Choice {
  /// Blocks of a segment; nil where nothing is recomputed.
  var segment: Int? {
    switch self {
    case .none: nil
    case .block: 1
    case .every(let n): n
    }
  }

  static var expected: String { "none, block or every:n" }

  /// Reads `none`, `block` or `every:n`; nil for anything else.
  public init?(rawValue: String) {
    switch rawValue {
    case "none": self = .none
    case "block": self = .block
    default:
      guard rawValue.hasPrefix("every:"), let n = Configuration.count(rawValue.dropFirst(6)) else {
        return nil
      }
      self = .every(n)
    }
  }

  /// The YAML text.
  public var rawValue: String {
    switch self {
    case .none: "none"
    case .block: "block"
    case .every(let n): "every:\(n)"
    }
  }
}
