import ChunkGRPO
import FlowModels
import FlowRewards
import Foundation
import Torch
import TorchNN

/// A loaded model and what is needed to draw with it: shared by training, sampling and evaluation.
public final class Engine {
  /// The model.
  public let pipeline: any ImagePipeline
  /// The network on the image's token grid, guided where the model is guided by a second pass.
  public let network: TimedNetwork
  /// Prompts as conditions.
  public let encoder: PromptEncoder
  /// Rows and columns of image tokens.
  public let grid: TokenGrid
  /// Rows of one forward pass.
  public let batch: Int
  /// The network without what training made of it, for drawings that end with it: ``ModelReference/load(hybrid:)``.
  var base: (any FlowModel)?
  private let guidance: Double?

  /// Loads the model folder of `configuration`.
  public init(_ configuration: Configuration) throws {
    let c = configuration
    let options = Self.options(c)
    pipeline = try ImagePipelines.load(URL(filePath: c.model), options)
    grid = try pipeline.grid(height: c.sampling.height, width: c.sampling.width)
    encoder = try PromptEncoder(c.prompts.embeddings, pipeline.text, device: options.device)
    batch = c.optim.microBatch
    let model = pipeline.flowModel(grid: grid)
    switch pipeline.guidance {
    case .none:
      guidance = nil
      network = TimedNetwork(model)
    case .embedded:
      guard let scale = c.sampling.guidance else {
        throw RunError("sampling.guidance: this model embeds a guidance scale; set one, e.g. 3.5")
      }
      guidance = scale
      network = TimedNetwork(model)
    case .classifierFree:
      guidance = c.sampling.guidance
      network =
        guidance ?? 1 > 1
        ? TimedNetwork(
          GuidedFlowModel(model, negative: try encoder(c.sampling.negative)), passesOfRow: 2)
        : TimedNetwork(model)
    }
  }

  /// How `c` has its model loaded.
  static func options(_ c: Configuration) -> PipelineOptions {
    var options = PipelineOptions()
    options.device = TorchRuntime.cudaAvailable ? .cuda(0) : .cpu
    options.dtype =
      switch c.network.dtype {
      case .float32: .float32
      case .bfloat16: .bfloat16
      case .auto: options.device != .cpu || TorchRuntime.nativeBFloat16 ? .bfloat16 : .float32
      }
    options.textLength = c.sampling.textLength
    options.attention = AttentionKernel(rawValue: c.network.attention.rawValue)!
    options.roundsTimeToDType = c.network.timeRounding == .model
    options.weights = QuantisedWeight(rawValue: c.network.weights.rawValue)
    options.checkpointing = c.network.checkpointing.segment
    options.decodeDType = c.network.decodeDtype == .bfloat16 ? .bfloat16 : .float32
    options.passes = AutoencoderKL.Passes(rawValue: c.network.vae.rawValue)!
    return options
  }

  /// Where the network is.
  public var device: Device { pipeline.network.device }
  /// Shape of one sample's latents.
  public var latentShape: [Int] { pipeline.latentShape(grid) }

  /// The schedule of training trajectories.
  func trainingSchedule(_ sampling: Configuration.Sampling) throws -> NoiseSchedule {
    switch sampling.schedule {
    case .training: try NoiseSchedule.training(steps: sampling.steps, shift: sampling.shift)
    case .model: try pipeline.schedule(steps: sampling.steps, grid: grid)
    }
  }

  /// A sampler over `table`.
  ///
  /// - Parameter rows: rows of every forward pass, filled up where a batch is short; nil for batches as they come.
  func rollout(_ table: TransitionTable, rows: Int? = nil) -> Rollout {
    Rollout(table: table, guidance: guidance, batch: rows ?? batch, fillsRows: rows != nil)
  }

  /// An update rule over `table`.
  func update(_ table: TransitionTable, microBatch: Int, ratio: RatioKind, clip: ClipRange) -> PolicyUpdate {
    PolicyUpdate(
      network: network, table: table, guidance: guidance, microBatch: microBatch, ratio: ratio, clip: clip)
  }

  /// Latents [S, …] → images [S, 3, H, W] in 0 … 1, decoded in batches.
  public func decode(_ latents: Tensor) throws -> Tensor {
    var parts: [Tensor] = []
    for range in Batches(latents.size(0), of: batch) {
      parts.append(try pipeline.decode(try latents[range], grid: grid))
    }
    return try Tensor.cat(parts)
  }

  /// Standard normal latents, one a stream: [S, …].
  func noise(_ streams: [RandomStream]) throws -> Tensor {
    let each = latentShape.reduce(1, *)
    var streams = streams
    let values = [Float](unsafeUninitializedCapacity: each * streams.count) { buffer, count in
      for i in streams.indices {
        streams[i].fillNormal(UnsafeMutableBufferPointer(rebasing: buffer[(i * each)..<((i + 1) * each)]))
      }
      count = each * streams.count
    }
    return try Tensor(values, shape: [streams.count] + latentShape).to(device)
  }

  /// Images of `prompts`, `count` each, by the model's own schedule and the ODE: [prompts·count, 3, H, W].
  ///
  /// x_0 is a function of (seed, prompt, sample): two models given the same arguments see the same noise.
  ///
  /// - Parameter switchStep: hybrid inference: this many steps, 0 … `steps`, with this model and the others with its base,
  ///   which must have been loaded beside it; nil takes this model to the end.
  public func draw(
    _ prompts: [String], count: Int, steps: Int, seed: UInt64, switchStep: Int? = nil,
    check: @escaping () throws -> Void = {}
  )
    throws -> Tensor
  {
    let plan = RandomPlan(seed: seed)
    let schedule = try pipeline.schedule(steps: steps, grid: grid)
    let table = try TransitionTable(schedule: schedule, kind: .ode, eta: 0, stochastic: 0..<0)
    var streams: [RandomStream] = []
    var conditions: [Condition] = []
    for prompt in prompts {
      let condition = try encoder(prompt)
      for sample in 0..<count {
        streams.append(plan.stream(.evaluationNoise, prompt: prompt, sample: sample))
        conditions.append(condition)
      }
    }
    var sampler = rollout(table)
    sampler.beforeStep = check
    var model: any FlowModel = network
    if let step = switchStep {
      guard let base, 0...steps ~= step else {
        throw RunError(
          "switch step \(step): expected 0 to \(steps), the sampling steps, and a model loaded with its base beside it"
        )
      }
      model = HandoverModel(network, then: base, from: step < steps ? table.times[step] : -.infinity)
    }
    let result = try sampler.sample(model, initial: try noise(streams), conditions: conditions) { _, _, _ in }
    return try decode(result.clean)
  }
}
