import ChunkGRPO
import Foundation
import Torch
import TorchNN

/// Sizes of a FLUX transformer, from `transformer/config.json`.
public struct FluxTransformerConfig: Decodable, Sendable, Equatable {
  /// Channels of a packed latent token, in and out.
  public var inChannels = 64
  /// Double-stream blocks.
  public var numLayers = 19
  /// Single-stream blocks.
  public var numSingleLayers = 38
  /// Width of one attention head.
  public var attentionHeadDim = 128
  /// Attention heads.
  public var numAttentionHeads = 24
  /// Width of the T5 embedding.
  public var jointAttentionDim = 4096
  /// Width of CLIP's pooled embedding.
  public var pooledProjectionDim = 768
  /// Whether a guidance scale is embedded (dev: yes, schnell: no).
  public var guidanceEmbeds = false
  /// Rotary dimensions of the axes (text, row, column).
  public var axesDimsRope = [16, 56, 56]

  var width: Int { attentionHeadDim * numAttentionHeads }

  enum CodingKeys: String, CodingKey {
    case inChannels, numLayers, numSingleLayers, attentionHeadDim, numAttentionHeads
    case jointAttentionDim, pooledProjectionDim, guidanceEmbeds, axesDimsRope
  }

  /// Absent fields take FLUX.1's values, as in the reference.
  public init(from decoder: any Decoder) throws {
    let c = try decoder.container(keyedBy: CodingKeys.self)
    func int(_ key: CodingKeys, _ value: Int) throws -> Int {
      try c.decodeIfPresent(Int.self, forKey: key) ?? value
    }
    inChannels = try int(.inChannels, 64)
    numLayers = try int(.numLayers, 19)
    numSingleLayers = try int(.numSingleLayers, 38)
    attentionHeadDim = try int(.attentionHeadDim, 128)
    numAttentionHeads = try int(.numAttentionHeads, 24)
    jointAttentionDim = try int(.jointAttentionDim, 4096)
    pooledProjectionDim = try int(.pooledProjectionDim, 768)
    guidanceEmbeds = try c.decodeIfPresent(Bool.self, forKey: .guidanceEmbeds) ?? false
    axesDimsRope = try c.decodeIfPresent([Int].self, forKey: .axesDimsRope) ?? [16, 56, 56]
  }
}

/// FLUX.1's rectified-flow transformer.
///
/// Reference: black-forest-labs/flux@802fb47 src/flux/model.py; keys and the order scale, shift of `norm_out` as in
/// diffusers 0.42.1 FluxTransformer2DModel.
public final class FluxTransformer: FlowTransformer {
  /// The sizes this was built with.
  public let config: FluxTransformerConfig
  /// Layers and parameters by checkpoint key.
  public let modules = ModuleRegistry()
  /// Kernel of every attention.
  public var attentionKernel = AttentionKernel.auto
  /// Whether t and guidance are multiplied by 1000 in the network's dtype, as diffusers does (bfloat16 rounds
  /// 973 to 972), instead of in float32.
  public var roundsTimeToDType = false
  /// Blocks of a segment of which only the inputs are kept for the backward pass, which computes the rest
  /// again; nil keeps everything. Segments are counted among the double and among the single blocks, the last
  /// may be shorter.
  public var checkpointing: Int?
  /// What the network computes in.
  public private(set) var dtype = DType.float32
  /// Where the parameters are.
  public private(set) var device = Device.cpu

  private let xEmbedder, contextEmbedder, projOut: Linear
  private let conditioning: TimeTextEmbedding
  private let doubleBlocks: [DoubleBlock]
  private let singleBlocks: [SingleBlock]
  /// The modulations of all blocks and of the output norm: one product with one embedding.
  private let modulations: LinearGroup
  private let modulationSizes: [Int]
  private var rotations: [RotationKey: Tensor] = [:]

  private struct RotationKey: Hashable {
    let textTokens, rows, columns: Int
  }

  /// Builds the network and takes every parameter of `folder`, straight to `dtype` and `device`.
  public convenience init(
    folder: URL, dtype: DType = .float32, device: Device = .cpu, weights: QuantisedWeight? = nil
  ) throws {
    let config = try ModelFolder.decode(FluxTransformerConfig.self, folder.appending(path: "config.json"))
    let checkpoint = try Checkpoint(folder: folder, dtype: dtype, device: device)
    checkpoint.quantise(weights, where: isQuantisable)
    try self.init(config: config, checkpoint: checkpoint)
    try place(dtype, device)
  }

  /// Builds the network and takes every parameter of `checkpoint`; any key that does not fit is an error.
  public init(config: FluxTransformerConfig, checkpoint: Checkpoint) throws {
    self.config = config
    guard config.axesDimsRope.reduce(0, +) == config.attentionHeadDim, config.axesDimsRope.count == 3,
      config.axesDimsRope.allSatisfy({ $0 % 2 == 0 })
    else {
      throw ModelError(
        "\(checkpoint.folder.path)/config.json: axes_dims_rope \(config.axesDimsRope) must be three even sizes with sum attention_head_dim \(config.attentionHeadDim)"
      )
    }
    let (p, r, d) = (checkpoint.root, modules, config.width)
    xEmbedder = try Linear(config.inChannels, d, p / "x_embedder", r)
    contextEmbedder = try Linear(config.jointAttentionDim, d, p / "context_embedder", r)
    conditioning = try TimeTextEmbedding(
      d, pooledSize: config.pooledProjectionDim, guidance: config.guidanceEmbeds, p / "time_text_embed", r)
    let shape = BlockShape(heads: config.numAttentionHeads, headSize: config.attentionHeadDim)
    doubleBlocks = try (0..<config.numLayers).map {
      try DoubleBlock(shape, p / "transformer_blocks" / $0, r)
    }
    singleBlocks = try (0..<config.numSingleLayers).map {
      try SingleBlock(shape, p / "single_transformer_blocks" / $0, r)
    }
    let normOut = try Linear(d, 2 * d, p / "norm_out" / "linear", r)
    projOut = try Linear(d, config.inChannels, p / "proj_out", r)
    try checkpoint.finish()
    let layers =
      doubleBlocks.flatMap { [$0.modulation, $0.contextModulation] } + singleBlocks.map(\.modulation) + [
        normOut
      ]
    modulations = r.group(layers)
    modulationSizes = layers.map(\.outSize)
  }

  /// Moves the network to `dtype` and `device`.
  public func place(_ dtype: DType, _ device: Device) throws(TorchError) {
    try modules.place(dtype, device)
    self.dtype = dtype
    self.device = device
    rotations = [:]
  }

  /// One forward pass.
  ///
  /// - Parameters:
  ///   - latents: packed image tokens [B, rows·columns, in_channels].
  ///   - text: T5 embedding [B, L, joint_attention_dim].
  ///   - pooled: CLIP embedding [B, pooled_projection_dim].
  ///   - timestep: σ in 0 … 1, [B] float32; multiplied by 1000 inside, as in the reference.
  ///   - guidance: [B] float32 where the network embeds one.
  ///   - grid: rows and columns of the image tokens.
  /// - Returns: velocity [B, rows·columns, in_channels] in the network's dtype.
  public func callAsFunction(
    _ latents: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor, guidance: Tensor?,
    grid: (rows: Int, columns: Int)
  ) throws -> Tensor {
    let batch = latents.size(0)
    guard latents.size(1) == grid.rows * grid.columns else {
      throw ModelError(
        "latents of \(latents.size(1)) tokens do not fill a grid of \(grid.rows) × \(grid.columns)")
    }
    guard (guidance != nil) == config.guidanceEmbeds else {
      throw ModelError(
        config.guidanceEmbeds
          ? "this model embeds a guidance scale: set sampling.guidance, e.g. 3.5"
          : "this model embeds no guidance scale: leave guidance out")
    }
    /// In 0 … 1000.
    func scaled(_ t: Tensor) throws(TorchError) -> Tensor {
      try (try t.to(roundsTimeToDType ? dtype : .float32) * 1000).to(.float32)
    }
    let embedding = try conditioning(
      try scaled(timestep), guidance: try guidance.map(scaled), pooled: pooled, dtype: dtype
    ).silu()
    let modulation = try modulations(embedding).narrow(0, 0, batch).unsqueeze(1).split(modulationSizes, -1)
    var x = try xEmbedder(try latents.to(dtype))
    var y = try contextEmbedder(try text.to(dtype))
    let textTokens = y.size(1)
    let rotation = try rotation(RotationKey(textTokens: textTokens, rows: grid.rows, columns: grid.columns))
    // Modulations come in as inputs: they have a graph of their own where they are trained.
    for segment in segments(doubleBlocks.count) {
      let parts = [x, y] + modulation[(2 * segment.lowerBound)..<(2 * segment.upperBound)]
      let streams = try kept(parts) { [doubleBlocks, attentionKernel] t in
        var (x, y) = (t[0], t[1])
        for (k, i) in segment.enumerated() {
          (x, y) = try doubleBlocks[i](x, y, t[2 + 2 * k], t[3 + 2 * k], rotation, attentionKernel)
        }
        return [x, y]
      }
      (x, y) = (streams[0], streams[1])
    }
    var joint = try Tensor.cat([y, x], 1)
    let first = 2 * doubleBlocks.count
    for segment in segments(singleBlocks.count) {
      let parts = [joint] + modulation[(first + segment.lowerBound)..<(first + segment.upperBound)]
      joint = try kept(parts) { [singleBlocks, attentionKernel] t in
        var joint = t[0]
        for (k, i) in segment.enumerated() {
          joint = try singleBlocks[i](joint, t[1 + k], rotation, attentionKernel)
        }
        return [joint]
      }[0]
    }
    x = try joint.narrow(1, textTokens, grid.rows * grid.columns)
    let out = try modulation[modulation.count - 1].chunk(2, -1)  // scale first here, unlike in the blocks
    return try projOut(try modulated(x, shift: out[1], scale: out[0]))
  }

  /// Cosines and sines in turn, [S, headSize]: angles in float64, table in float32; text tokens sit at the origin.
  private func rotation(_ key: RotationKey) throws -> Tensor {
    if let table = rotations[key] { return table }
    var values: [Float] = []
    values.reserveCapacity((key.textTokens + key.rows * key.columns) * config.attentionHeadDim)
    func append(_ position: [Int]) {
      for (axis, size) in config.axesDimsRope.enumerated() {
        for i in stride(from: 0, to: size, by: 2) {
          let angle = Double(position[axis]) / Foundation.pow(10000, Double(i) / Double(size))
          values += [Float(Foundation.cos(angle)), Float(Foundation.sin(angle))]
        }
      }
    }
    for _ in 0..<key.textTokens { append([0, 0, 0]) }
    for row in 0..<key.rows { for column in 0..<key.columns { append([0, row, column]) } }
    let shape = [key.textTokens + key.rows * key.columns, config.attentionHeadDim]
    let table = try Tensor(values, shape: shape).to(device)
    rotations[key] = table
    return table
  }
}

/// Image and text streams with joint attention; text tokens come first.
///
/// Source: black-forest-labs/flux@802fb47 src/flux/modules/layers.py, DoubleStreamBlock.
private struct DoubleBlock {
  let modulation, contextModulation: Linear
  private let shape: BlockShape
  private let qkv, contextQKV: LinearGroup
  private let norm, contextNorm: QueryKeyNorm
  private let out, contextOut: Linear
  private let feedForward, contextFeedForward: FeedForward

  init(_ shape: BlockShape, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    self.shape = shape
    let (d, a) = (shape.width, p / "attn")
    func joined(_ names: [String]) throws -> LinearGroup {
      r.group(try names.map { try Linear(d, d, a / $0, r) })
    }
    modulation = try Linear(d, 6 * d, p / "norm1" / "linear", r)
    contextModulation = try Linear(d, 6 * d, p / "norm1_context" / "linear", r)
    qkv = try joined(["to_q", "to_k", "to_v"])
    contextQKV = try joined(["add_q_proj", "add_k_proj", "add_v_proj"])
    norm = try QueryKeyNorm(shape.headSize, "norm_q", "norm_k", a, r)
    contextNorm = try QueryKeyNorm(shape.headSize, "norm_added_q", "norm_added_k", a, r)
    out = try Linear(d, d, a / "to_out" / 0, r)
    contextOut = try Linear(d, d, a / "to_add_out", r)
    feedForward = try FeedForward(d, p / "ff", r)
    contextFeedForward = try FeedForward(d, p / "ff_context", r)
  }

  /// x [B, image tokens, width], y [B, text tokens, width]; modulations [B, 1, 6·width].
  func callAsFunction(
    _ x: Tensor, _ y: Tensor, _ modulation: Tensor, _ contextModulation: Tensor, _ rotation: Tensor,
    _ kernel: AttentionKernel
  ) throws(TorchError) -> (Tensor, Tensor) {
    let m = try modulation.chunk(6, -1)
    let c = try contextModulation.chunk(6, -1)
    let mixed = try jointAttention(
      [
        try contextQKV(try modulated(y, shift: c[0], scale: c[1])),
        try qkv(try modulated(x, shift: m[0], scale: m[1])),
      ], norms: [contextNorm, norm], rotation: rotation, shape, kernel)
    var x = try gated(x, m[2], try out(mixed[1]))
    x = try gated(x, m[5], try feedForward(try modulated(x, shift: m[3], scale: m[4])))
    var y = try gated(y, c[2], try contextOut(mixed[0]))
    y = try gated(y, c[5], try contextFeedForward(try modulated(y, shift: c[3], scale: c[4])))
    return (x, y)
  }
}

/// One stream of text and image tokens; attention and MLP in parallel.
///
/// Source: black-forest-labs/flux@802fb47 src/flux/modules/layers.py, SingleStreamBlock.
private struct SingleBlock {
  let modulation: Linear
  private let shape: BlockShape
  private let projections: LinearGroup
  private let norm: QueryKeyNorm
  private let out: Linear

  init(_ shape: BlockShape, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    self.shape = shape
    let (d, a) = (shape.width, p / "attn")
    modulation = try Linear(d, 3 * d, p / "norm" / "linear", r)
    var members = try ["to_q", "to_k", "to_v"].map { try Linear(d, d, a / $0, r) }
    members.append(try Linear(d, 4 * d, p / "proj_mlp", r))
    projections = r.group(members)
    norm = try QueryKeyNorm(shape.headSize, "norm_q", "norm_k", a, r)
    out = try Linear(5 * d, d, p / "proj_out", r)
  }

  /// x [B, tokens, width]; modulation [B, 1, 3·width].
  func callAsFunction(
    _ x: Tensor, _ modulation: Tensor, _ rotation: Tensor, _ kernel: AttentionKernel
  ) throws(TorchError) -> Tensor {
    let m = try modulation.chunk(3, -1)
    let all = try projections(try modulated(x, shift: m[0], scale: m[1]))
    let mixed = try jointAttention([all], norms: [norm], rotation: rotation, shape, kernel)
    return try gated(x, m[2], try out(mixed[0]))
  }
}
