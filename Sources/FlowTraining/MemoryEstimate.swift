import ChunkGRPO
import FlowModels
import FlowRewards
import Foundation
import Torch
import TorchNN

/// How much memory a run takes, part by part, for a number of rows a pass.
public struct MemoryEstimate: Encodable, Sendable {
  /// What is held at a time, and why.
  public struct Part: Encodable, Sendable {
    /// What it is.
    public let name: String
    /// Bytes.
    public let bytes: Int
  }
  /// `optim.microBatch` that this is for.
  public let microBatch: Int
  /// Parameters of the transformer, and those that are trained.
  public let parameters, trainable: Int
  /// What is there from beginning to end.
  public let standing: [Part]
  /// What the phases of an iteration add; only one is there at a time.
  public let phases: [Part]
  /// Bytes at the worst moment.
  public var peak: Int { standing.reduce(0) { $0 + $1.bytes } + (phases.map(\.bytes).max() ?? 0) }
}

/// Learns what a configuration takes without loading its weights.
///
/// Weights, moments and stored trajectories are counted. What a pass through the network takes is measured on models of
/// a few zero blocks with the real widths, dtypes, adapters and checkpointing, on a few tokens, and extended linearly in
/// blocks, rows and tokens: attention kernels that hold a square of the tokens run on short sequences only, which are
/// measured at their own length.
public struct MemoryModel {
  private let configuration: Configuration
  private let parameters, trainable: Int
  private let standing: [MemoryEstimate.Part]
  private let encoders: Int
  private let latents, pixels: Int
  private let snapshot: Int
  private let rolloutPass, updatePass: Line
  private let decodePass: Line
  private let judging, probing: Int
  private let autoencoder: AutoencoderKL

  /// Measures; takes a second for small models and some ten for FLUX.1.
  public init(_ configuration: Configuration) throws {
    let c = configuration
    self.configuration = c
    let folder = try ModelFolder(URL(filePath: c.model))
    var options = Engine.options(c)
    let device = options.device
    options.device = .cpu
    let text = try ImagePipelines.text(folder, options)
    let blueprint = try TransformerBlueprint(folder)
    autoencoder = try AutoencoderKL(
      config: folder.config(AutoencoderKL.Config.self, "vae"),
      checkpoint: Checkpoint(blank: folder.part("vae")))
    autoencoder.passes = options.passes
    let side = 2 * autoencoder.downscale
    let grid = try tokenGrid(height: c.sampling.height, width: c.sampling.width, granularity: side)

    // What is counted.
    let layers = try blueprint.layers()
    parameters = layers.parameters.reduce(0) { $0 + $1.tensor.count }
    var targets: [String] = []
    var trained = 0
    if c.trainable.kind == .lora {
      targets = try LoRATargets(c.trainable.targets).select(layers.linears.keys)
      trained = targets.reduce(0) {
        let layer = layers.linears[$1]!
        return $0 + c.trainable.rank * (layer.inSize + layer.outSize)
      }
    } else {
      trained = layers.parameters.reduce(0) { $0 + (layers.isTrainable($1) ? $1.tensor.count : 0) }
    }
    trainable = trained
    let full = c.trainable.kind == .full
    var weights = full ? 4 * trained : 0
    for parameter in layers.parameters where !full || !layers.isTrainable(parameter) {
      let linear = parameter.key.hasSuffix(".weight") ? String(parameter.key.dropLast(7)) : ""
      let oneByte = options.weights != nil && layers.linears[linear] != nil && isQuantisable(linear)
      weights += parameter.tensor.count * (oneByte ? 1 : options.dtype.size)
      if !full, !oneByte, let layer = layers.linears[linear],
        LinearGroup.packs(inSize: layer.inSize, options.dtype, options.device)
      {
        weights += 2 * parameter.tensor.count * options.dtype.size
      }
    }
    let moments = c.optim.state == .int8 ? Int(2.03 * Double(trained)) : 8 * trained
    let average = c.ema.decay > 0 ? 4 * trained : 0
    latents = blueprint.latentShape(grid).reduce(4, *)
    pixels = 3 * c.sampling.height * c.sampling.width * 4
    let t5Tokens = text.lengths.last!
    let textTokens = blueprint.guidance == .classifierFree ? text.lengths[0] + t5Tokens : t5Tokens
    let wide = (text.memory ?? 0) > 4 << 30
    let conditionDType: DType = wide && blueprint.guidance != .classifierFree ? .bfloat16 : .float32
    let condition =
      textTokens * blueprint.textWidth * conditionDType.size + blueprint.pooledWidth * 4
    let prompts = try PromptFile(file: URL(filePath: c.prompts.file), split: c.prompts.split).prompts
    let inMemory =
      c.prompts.embeddings == "memory" || (c.prompts.embeddings == "auto" && text.bytes ?? 0 <= 1 << 28)
    let rewards = try Self.judge(c, prompts)
    (judging, probing) = (rewards.pass, rewards.probe)
    standing = [
      .init(name: "transformer", bytes: weights),
      .init(
        name: "autoencoder",
        bytes: autoencoder.modules.parameters.reduce(0) { $0 + $1.tensor.count } * options.decodeDType.size),
      .init(name: "adapter", bytes: full ? 0 : 4 * trained),
      .init(name: "optimizer", bytes: c.optim.offload && device != .cpu ? 0 : moments),
      .init(name: "moving average", bytes: average),
      .init(name: "reference policy", bytes: full && c.loss.kl > 0 ? 4 * trained : 0),
      .init(name: "rewards", bytes: rewards.weights),
      .init(
        name: "text embeddings",
        bytes: inMemory ? prompts.count * condition : min(prompts.count * condition, 1 << 30)),
    ].filter { $0.bytes > 0 }
    snapshot = 4 * trained + moments + average
    encoders = text.memory ?? 0

    // What is measured.
    let tokens = grid.rows * grid.columns + textTokens
    let explicit = device == .cpu && tokens <= 256 && options.attention != .sdpa
    options.attention = explicit ? options.attention : .sdpa
    let probe = Probe(
      blueprint: blueprint, options: options, configuration: c, targets: targets, layers: layers,
      textDType: conditionDType)
    (rolloutPass, updatePass) = try probe.lines(grid, textTokens, exact: explicit)
    decodePass = try Self.decode(autoencoder, options.decodeDType)
  }

  /// The estimate for `microBatch` rows a pass.
  public func estimate(microBatch: Int) -> MemoryEstimate {
    let c = configuration
    let samples = c.samplesPerIteration
    let rows = Batches(samples, of: microBatch).largest
    // x_0 … x_T and the clean estimates; means of steps where ratios are normalised.
    let means = c.loss.ratioNorm == .guard ? c.sampling.steps : 0
    let trajectories = (c.sampling.steps + 2 + means) * samples * latents
    let (height, width) = (c.sampling.height, c.sampling.width)
    let together =
      switch autoencoder.passes(count: rows, height: height, width: width) {
      case .plain, .auto: rows * height * width
      case .sliced: height * width
      case .tiled: min(autoencoder.tileSize * autoencoder.tileSize, height * width)
      }
    return MemoryEstimate(
      microBatch: microBatch, parameters: parameters, trainable: trainable, standing: standing,
      phases: [
        .init(name: "encoding prompts", bytes: encoders),
        // x_0, the noise and the state of a pass beside the stored trajectories.
        .init(
          name: "sampling", bytes: trajectories + samples * latents + 4 * rows * latents + rolloutPass(rows)),
        .init(name: "decoding", bytes: trajectories + samples * pixels + decodePass(together)),
        .init(name: "rewards", bytes: trajectories + samples * pixels + judging),
        // Before the first iteration: of small images more than all samples take.
        .init(name: "trying rewards", bytes: probing),
        .init(name: "updating", bytes: trajectories + snapshot + 4 * rows * latents + updatePass(rows)),
      ])
  }

  /// The largest `microBatch` whose estimate stays within `bytes`; nil if even 2 does not.
  public func largest(within bytes: Int) -> MemoryEstimate? {
    var best: MemoryEstimate?
    var (low, high) = (2, max(configuration.samplesPerIteration, 2))
    while low <= high {
      let middle = (low + high) / 2
      let estimate = estimate(microBatch: middle)
      if estimate.peak <= bytes {
        best = estimate
        low = middle + 1
      } else {
        high = middle - 1
      }
    }
    return best
  }

  /// Chooses `optim.microBatch` for `network.memory`, and refuses what does not fit into it or into what the device has.
  ///
  /// - Returns: the configuration to run with, and its estimate.
  public static func fit(
    _ configuration: Configuration, available: Int? = nil
  ) throws -> (configuration: Configuration, estimate: MemoryEstimate) {
    var c = configuration
    let model = try MemoryModel(c)
    func gib(_ bytes: Int) -> String { String(format: "%.2f GiB", Double(bytes) / 1_073_741_824) }
    let ways =
      "lower optim.microBatch, set network.checkpointing=block or network.weights=int8, embed the prompts ahead "
      + "with chunkgrpo encode, or draw smaller images"
    if let limit = c.network.memoryBytes {
      guard let best = model.largest(within: limit) else {
        throw RunError(
          "network.memory: \(c.network.memory!) is too little: about \(gib(model.estimate(microBatch: 2).peak)) are needed "
            + "with 2 rows a pass; \(ways)")
      }
      c.optim.microBatch = best.microBatch
    }
    let estimate = model.estimate(microBatch: c.optim.microBatch)
    let device = Engine.options(c).device
    let present = try available ?? TorchRuntime.availableMemory(device)
    guard estimate.peak <= present else {
      throw RunError(
        "about \(gib(estimate.peak)) of memory are needed, \(gib(present)) are free on \(device): \(ways)")
    }
    return (c, estimate)
  }

  /// Bytes of the rewards' models, and of what judges images beside them: models a batch at a time, other rewards a
  /// slice at a time, or the guards a group at a time.
  private static func judge(_ c: Configuration, _ prompts: [Prompt]) throws -> (
    weights: Int, pass: Int, probe: Int
  ) {
    let (height, width) = (c.sampling.height, c.sampling.width)
    let pair = try Tensor.zeros([2, 3, height, width], device: .cpu)
    let prompt = prompts[0]
    var models: [RewardMemory] = []
    let rewards = RewardSet(
      try RewardSet(c.rewards).entries.filter { entry in
        guard let local = entry.reward as? any LocalReward else { return false }
        guard let memory = local.memory(height: height, width: width) else { return true }
        models.append(memory)
        return false
      })
    let weights = Dictionary(models.map { ($0.model, $0.weights) }, uniquingKeysWith: max).values.reduce(0, +)
    func bytes(_ body: () throws -> Void) throws -> Int { try TorchRuntime.peakAllocation(body).bytes / 2 }
    let reward = try bytes { _ = try rewards.judge(pair, [prompt, prompt]) }
    // Of a whole group: what a transform of the pixel grid takes once is most of it for small images.
    let size = c.group.size
    let group = try Tensor.zeros([size, 3, height, width], device: .cpu)
    let guards = try TorchRuntime.peakAllocation {
      _ = try GuardValues.measure(group, groupSize: size, blackens: true)
    }.bytes
    let slice = RewardSet.slices(c.samplesPerIteration, height: height, width: width)[0].count
    let probe = try TorchRuntime.peakAllocation { try rewards.probe() }.bytes
    return (weights, max(slice * reward, models.map(\.call).max() ?? 0, guards), probe)
  }

  /// bytes of a decoding pass by pixels.
  private static func decode(_ autoencoder: AutoencoderKL, _ dtype: DType) throws -> Line {
    try autoencoder.place(dtype, .cpu)
    let passes = autoencoder.passes
    defer { autoencoder.passes = passes }
    autoencoder.passes = .plain
    func measure(_ cells: Int) throws -> Double {
      // Two images: libtorch convolves a single small one by another kernel.
      let shape = [2, autoencoder.config.latentChannels, cells, cells]
      let z = try Tensor.zeros(shape)
      return Double(try TorchRuntime.peakAllocation { try withoutGrad { try autoencoder.images(z) } }.bytes)
    }
    // The first pass lays out weights for the kernels once.
    _ = try measure(4)
    let (small, large) = (try measure(4), try measure(8))
    let pixels = { (cells: Int) in Double(2 * cells * cells * autoencoder.downscale * autoencoder.downscale) }
    let slope = (large - small) / (pixels(8) - pixels(4))
    return Line(constant: max(small - slope * pixels(4), 0), row: slope)
  }
}

/// bytes = constant + row · rows.
private struct Line {
  var constant = 0.0
  var row = 0.0
  func callAsFunction(_ rows: Int) -> Int { Int(max(constant + row * Double(rows), 0)) }
}

/// Passes of small models of zeros, whose memory is counted by libtorch's allocator.
private struct Probe {
  let blueprint: TransformerBlueprint
  let options: PipelineOptions
  let configuration: Configuration
  let targets: [String]
  let layers: ModuleRegistry
  let textDType: DType

  /// Most bytes held by one pass of `rows` samples, its gradients included if `grad`.
  private func peak(
    _ network: any FlowTransformer, _ rows: Int, _ grid: TokenGrid, _ textTokens: Int, grad: Bool,
    counted: Bool = true
  ) throws -> Double {
    let one = Condition([
      try Tensor.zeros([1, textTokens, blueprint.textWidth]).to(textDType),
      try Tensor.zeros([1, blueprint.pooledWidth]),
    ])
    var model = blueprint.flowModel(network, grid: grid)
    if blueprint.guidance == .classifierFree { model = GuidedFlowModel(model, negative: one) }
    let latents = try Tensor.zeros([rows] + blueprint.latentShape(grid))
    let times = try Tensor.full([rows], 500)
    let scale = blueprint.guidance == .none ? nil : configuration.sampling.guidance ?? 1
    func run() throws {
      let condition = try Condition.stack([Condition](repeating: one, count: rows))
      let v = try model.velocity(latents, times: times, condition: condition, guidance: scale)
      if grad {
        let loss = try (v - latents).square().mean(Array(1..<v.rank))
        try loss.backward(try Tensor.full([rows], 1))
      }
    }
    func pass() throws { grad ? try run() : try withoutGrad { try run() } }
    // Joining projections frees their members' weights, of which the watch knows nothing: not in a counted pass.
    if !counted { try pass() }
    let bytes = counted ? try TorchRuntime.peakAllocation { try pass() }.bytes : 0
    for parameter in network.modules.parameters { try parameter.tensor.clearGrad() }
    for layer in network.modules.linears.values {
      try layer.adapter?.down.clearGrad()
      try layer.adapter?.up.clearGrad()
    }
    return Double(bytes)
  }

  /// A network of `blocks` with what the configuration trains.
  private func network(_ blocks: [Int]) throws -> any FlowTransformer {
    let network = try blueprint.build(blocks, options)
    if configuration.trainable.kind == .full {
      try network.modules.makeTrainable()
    } else {
      let here = targets.filter { network.modules.linears[$0] != nil }
      // A pattern may name blocks that are not here; any layer is better than none.
      _ = try LoRAAdapter(
        network.modules, rank: configuration.trainable.rank, alpha: configuration.trainable.alpha,
        targets: here.isEmpty ? ["all-linear"] : here
      ) { _, count in [Float](repeating: 0, count: count) }
    }
    return network
  }

  /// Bytes by rows of a pass without and with gradients, at `grid` and `textTokens`.
  ///
  /// - Parameter exact: measures at these sizes; otherwise at a few tokens.
  func lines(_ grid: TokenGrid, _ textTokens: Int, exact: Bool) throws -> (
    rollout: Line, update: Line
  ) {
    let segment = options.checkpointing ?? 1
    let first = blueprint.blocks.map { min($0, segment) }
    /// Points to measure at: rows, grid, text tokens.
    let points: [(rows: Int, grid: TokenGrid, text: Int)] =
      exact
      ? [(2, grid, textTokens), (4, grid, textTokens)]
      : [(2, (4, 4), 16), (2, (8, 4), 16), (2, (4, 4), 32), (4, (4, 4), 16)]
    func measure(_ network: any FlowTransformer, grad: Bool) throws -> [Double] {
      // Once before: stacks of weights are made in the first pass.
      _ = try peak(network, points[0].rows, points[0].grid, points[0].text, grad: grad, counted: false)
      return try points.map { try peak(network, $0.rows, $0.grid, $0.text, grad: grad) }
    }
    /// Values at `points` as a line in rows, at the sizes asked for.
    func line(_ values: [Double]) -> Line {
      if exact {
        let row = (values[1] - values[0]) / 2
        return Line(constant: values[0] - 2 * row, row: row)
      }
      let image = (values[1] - values[0]) / (2 * 16)
      let text = (values[2] - values[0]) / (2 * 16)
      let row = (values[3] - values[0]) / 2 - 16 * image - 16 * text
      let constant = values[0] - 2 * (row + 16 * image + 16 * text)
      return Line(
        constant: constant,
        row: row + image * Double(grid.rows * grid.columns) + text * Double(textTokens))
    }
    let base = try network(first)
    let rollout = line(try measure(base, grad: false))
    let update = try measure(base, grad: true)
    var total = update
    for kind in blueprint.blocks.indices where blueprint.blocks[kind] > first[kind] {
      var more = first
      more[kind] = min(first[kind] + segment, blueprint.blocks[kind])
      let added = Double(more[kind] - first[kind])
      let values = try measure(try network(more), grad: true)
      let times = Double(blueprint.blocks[kind] - first[kind]) / added
      for i in total.indices { total[i] += (values[i] - update[i]) * times }
    }
    return (rollout, line(total))
  }
}
