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
public final class FluxTransformer {
  /// The sizes this was built with.
  public let config: FluxTransformerConfig
  /// Layers and parameters by checkpoint key.
  public let modules = ModuleRegistry()
  /// Kernel of every attention.
  public var attentionKernel = AttentionKernel.auto
  /// Whether t and guidance are multiplied by 1000 in the network's dtype, as diffusers does (bfloat16 rounds
  /// 973 to 972), instead of in float32.
  public var roundsTimeToDType = false
  /// What the network computes in.
  public private(set) var dtype = DType.float32
  /// Where the parameters are.
  public private(set) var device = Device.cpu

  private let xEmbedder, contextEmbedder, projOut: Linear
  private let timeEmbedder, textEmbedder: MLPEmbedder
  private let guidanceEmbedder: MLPEmbedder?
  private let doubleBlocks: [DoubleBlock]
  private let singleBlocks: [SingleBlock]
  /// The modulations of all blocks and of the output norm: one product with one embedding.
  private let modulations: LinearGroup
  private let modulationSizes: [Int]
  private var rotations: [RotationKey: Tensor] = [:]

  private struct RotationKey: Hashable {
    let textTokens, rows, columns: Int
  }

  /// Builds the network and takes every parameter of `folder`; any key that does not fit is an error.
  public convenience init(folder: URL) throws {
    let config = try ModelFolder.decode(FluxTransformerConfig.self, folder.appending(path: "config.json"))
    try self.init(config: config, checkpoint: try Checkpoint(folder: folder))
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
    let t = p / "time_text_embed"
    timeEmbedder = try MLPEmbedder(256, d, t / "timestep_embedder", r)
    guidanceEmbedder = config.guidanceEmbeds ? try MLPEmbedder(256, d, t / "guidance_embedder", r) : nil
    textEmbedder = try MLPEmbedder(config.pooledProjectionDim, d, t / "text_embedder", r)
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
    let embedding = try embed(timestep, guidance, pooled).silu()
    let modulation = try modulations(embedding).narrow(0, 0, batch).unsqueeze(1).split(modulationSizes, -1)
    var x = try xEmbedder(try latents.to(dtype))
    var y = try contextEmbedder(try text.to(dtype))
    let textTokens = y.size(1)
    let rotation = try rotation(RotationKey(textTokens: textTokens, rows: grid.rows, columns: grid.columns))
    for (i, block) in doubleBlocks.enumerated() {
      (x, y) = try block(x, y, modulation[2 * i], modulation[2 * i + 1], rotation, attentionKernel)
    }
    var joint = try Tensor.cat([y, x], 1)
    for (i, block) in singleBlocks.enumerated() {
      joint = try block(joint, modulation[2 * doubleBlocks.count + i], rotation, attentionKernel)
    }
    x = try joint.narrow(1, textTokens, grid.rows * grid.columns)
    let out = try modulation[modulation.count - 1].chunk(2, -1)  // scale first here, unlike in the blocks
    return try projOut(try modulated(x, shift: out[1], scale: out[0]))
  }

  /// Embedding of time, guidance and pooled text [B', width], rows padded to a multiple of 32.
  ///
  /// Padding: float32 products with few rows depend on their number in the last bit, and rollout and replay
  /// batches differ in size; the ratio must be exactly 1.
  private func embed(_ timestep: Tensor, _ guidance: Tensor?, _ pooled: Tensor) throws -> Tensor {
    func padded(_ t: Tensor) throws(TorchError) -> Tensor {
      let extra = (32 - t.size(0) % 32) % 32
      return extra == 0 ? t : try t.pad(t.rank == 1 ? [0, extra] : [0, 0, 0, extra])
    }
    func scaled(_ t: Tensor) throws(TorchError) -> Tensor {
      try (try padded(t).to(roundsTimeToDType ? dtype : .float32) * 1000).to(.float32)
    }
    var sum = try timeEmbedder(try sinusoid(try scaled(timestep)).to(dtype))
    if let guidanceEmbedder, let guidance {
      sum = try sum + guidanceEmbedder(try sinusoid(try scaled(guidance)).to(dtype))
    }
    return try sum + textEmbedder(try padded(pooled).to(dtype))
  }

  /// [B] → [B, 256]: cosines then sines, period up to 10,000.
  private func sinusoid(_ t: Tensor) throws(TorchError) -> Tensor {
    let frequencies = try (Tensor.arange(to: 128) * (-log(10000.0)) / 128).exp().to(device)
    let angles = try t.unsqueeze(1) * frequencies.unsqueeze(0)
    return try Tensor.cat([try angles.cos(), try angles.sin()], -1)
  }

  /// Unit complex numbers [S, 1, 1, headSize/2]: angles in float64, table in float32; text tokens sit at the origin.
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
    let shape = [key.textTokens + key.rows * key.columns, 1, 1, config.attentionHeadDim / 2, 2]
    let table = try Tensor(values, shape: shape).viewAsComplex().to(device)
    rotations[key] = table
    return table
  }
}

struct BlockShape {
  let heads, headSize: Int
  var width: Int { heads * headSize }
}

/// `LayerNorm(x)·(1 + scale) + shift`, without learnt gain.
func modulated(_ x: Tensor, shift: Tensor, scale: Tensor) throws(TorchError) -> Tensor {
  try shift.adding(product: try x.layerNorm(eps: 1e-6), try scale + 1)
}

/// Source: black-forest-labs/flux@802fb47 src/flux/modules/layers.py#L52-L60.
struct MLPEmbedder {
  let linear1, linear2: Linear
  init(_ inSize: Int, _ size: Int, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    linear1 = try Linear(inSize, size, p / "linear_1", r)
    linear2 = try Linear(size, size, p / "linear_2", r)
  }
  /// [B, inSize] → [B, size].
  func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor { try linear2(linear1(x).silu()) }
}

/// Gains of the query and key norms [2, 1, headSize], applied together.
struct QueryKeyNorm {
  let query, key: Parameter
  init(_ size: Int, _ queryName: String, _ keyName: String, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    query = r.add(try (p / queryName).parameter("weight", size))
    key = r.add(try (p / keyName).parameter("weight", size))
  }
  /// [B, S, 2, H, D] → the same in float32, normalised over D.
  func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
    let gains = try Tensor.stack([try query.value(), try key.value()]).to(.float32).unsqueeze(1)
    return try x.to(.float32).rmsNorm(nil, eps: 1e-6) * gains
  }
}

/// Rotates float32 queries and keys [B, S, 2, H, D] and attends: [B, S, H·D] in `values`' dtype.
///
/// - Parameter values: [B, S, H, D].
private func attend(
  _ queriesKeys: Tensor, _ values: Tensor, _ rotation: Tensor, _ kernel: AttentionKernel
) throws(TorchError) -> Tensor {
  let s = queriesKeys.shape
  let pairs = try queriesKeys.reshape([s[0], s[1], 2, s[3], s[4] / 2, 2]).viewAsComplex()
  let rotated = try (pairs * rotation).viewAsReal().reshape(s).to(values.dtype)
  let qk = try rotated.permute(2, 0, 3, 1, 4).contiguous()
  return try attention(try qk[0], try qk[1], try values.transpose(1, 2).contiguous(), kernel: kernel)
}

private struct FeedForward {
  let proj, out: Linear
  init(_ size: Int, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    proj = try Linear(size, 4 * size, p / "net" / 0 / "proj", r)
    out = try Linear(4 * size, size, p / "net" / 2, r)
  }
  func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
    try out(proj(x).gelu(tanhApproximation: true))
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
    func heads(_ joined: Tensor) throws(TorchError) -> Tensor {
      try joined.reshape(joined.size(0), joined.size(1), 3, shape.heads, shape.headSize)
    }
    let image = try heads(try qkv(try modulated(x, shift: m[0], scale: m[1])))
    let text = try heads(try contextQKV(try modulated(y, shift: c[0], scale: c[1])))
    let qk = try Tensor.cat(
      [try contextNorm(try text.narrow(2, 0, 2)), try norm(try image.narrow(2, 0, 2))], 1)
    let values = try Tensor.cat([try text.select(2, 2), try image.select(2, 2)], 1)
    let mixed = try attend(qk, values, rotation, kernel)
    let parts = try mixed.split([y.size(1), x.size(1)], 1)
    var x = try x.adding(product: m[2], try out(parts[1]))
    x = try x.adding(product: m[5], try feedForward(try modulated(x, shift: m[3], scale: m[4])))
    var y = try y.adding(product: c[2], try contextOut(parts[0]))
    y = try y.adding(product: c[5], try contextFeedForward(try modulated(y, shift: c[3], scale: c[4])))
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
    let d = shape.width
    let all = try projections(try modulated(x, shift: m[0], scale: m[1]))
    let qkv = try all.narrow(-1, 0, 3 * d).reshape(x.size(0), x.size(1), 3, shape.heads, shape.headSize)
    let mixed = try attend(try norm(try qkv.narrow(2, 0, 2)), try qkv.select(2, 2), rotation, kernel)
    let hidden = try all.narrow(-1, 3 * d, 4 * d).gelu(tanhApproximation: true)
    return try x.adding(product: m[2], try out(try Tensor.cat([mixed, hidden], -1)))
  }
}
