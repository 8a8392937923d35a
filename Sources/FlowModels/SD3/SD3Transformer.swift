import Foundation
import Torch
import TorchNN

/// Sizes of an SD3 or SD3.5 transformer, from `transformer/config.json`.
public struct SD3TransformerConfig: Decodable, Sendable, Equatable {
  let inChannels: Int?
  let outChannels: Int?
  let patchSize: Int?
  var numLayers: Int
  let attentionHeadDim: Int
  let numAttentionHeads: Int
  let jointAttentionDim: Int
  let captionProjectionDim: Int
  let pooledProjectionDim: Int
  let posEmbedMaxSize: Int
  let qkNorm: String?
  var dualAttentionLayers: [Int]?

  /// Latent channels, in and out.
  public var channels: Int { inChannels ?? 16 }
  /// Latent cells a token covers along each side.
  public var patch: Int { patchSize ?? 2 }
  /// Width of the token streams.
  public var width: Int { attentionHeadDim * numAttentionHeads }
  /// Latent patches that the position table covers along each side.
  public var positions: Int { posEmbedMaxSize }
  /// Width of the text embedding.
  public var textWidth: Int { jointAttentionDim }
  /// Width of the pooled text embedding.
  public var pooledWidth: Int { pooledProjectionDim }
}

/// The multimodal diffusion transformer of Stable Diffusion 3 and 3.5.
///
/// Reference: diffusers 0.42.1 SD3Transformer2DModel; dual attention and query-key norms as SD3.5-medium and -large
/// have them. Image tokens come first in the joint attention; the last block leaves the text stream alone.
public final class SD3Transformer: FlowTransformer {
  /// The sizes this was built with.
  public let config: SD3TransformerConfig
  /// Layers and parameters by checkpoint key.
  public let modules = ModuleRegistry()
  /// Kernel of every attention.
  public var attentionKernel = AttentionKernel.auto
  /// Blocks of a segment of which only the inputs are kept for the backward pass; nil keeps everything.
  public var checkpointing: Int?
  /// What the network computes in.
  public private(set) var dtype = DType.float32
  /// Where the parameters are.
  public private(set) var device = Device.cpu

  private let patches: Conv2d
  private let positions: Parameter
  private let contextEmbedder, projOut: Linear
  private let conditioning: TimeTextEmbedding
  private let blocks: [JointBlock]
  /// The modulations of all blocks and of the output norm: one product with one embedding.
  private let modulations: LinearGroup
  private let modulationSizes: [Int]

  /// Builds the network and takes every parameter of `folder`, straight to `dtype` and `device`.
  public convenience init(
    folder: URL, dtype: DType = .float32, device: Device = .cpu, weights: QuantisedWeight? = nil
  ) throws {
    let config = try ModelFolder.decode(SD3TransformerConfig.self, folder.appending(path: "config.json"))
    let checkpoint = try Checkpoint(folder: folder, dtype: dtype, device: device)
    checkpoint.quantise(weights, where: isQuantisable)
    try self.init(config: config, checkpoint: checkpoint)
    try place(dtype, device)
  }

  /// Builds the network and takes every parameter of `checkpoint`; any key that does not fit is an error.
  public init(config: SD3TransformerConfig, checkpoint: Checkpoint) throws {
    self.config = config
    guard config.captionProjectionDim == config.width else {
      throw ModelError(
        "\(checkpoint.folder.path): caption_projection_dim \(config.captionProjectionDim) must equal "
          + "num_attention_heads × attention_head_dim = \(config.width)")
    }
    guard [nil, "rms_norm"].contains(config.qkNorm) else {
      throw ModelError("\(checkpoint.folder.path): qk_norm \(config.qkNorm!) is not rms_norm or null")
    }
    let (p, r, d, patch) = (checkpoint.root, modules, config.width, config.patch)
    let e = p / "pos_embed"
    patches = try Conv2d(config.channels, d, kernel: patch, stride: patch, e / "proj", r)
    positions = r.add(
      constant: try e.parameter("pos_embed", 1, config.posEmbedMaxSize * config.posEmbedMaxSize, d))
    conditioning = try TimeTextEmbedding(
      d, pooledSize: config.pooledProjectionDim, guidance: false, p / "time_text_embed", r)
    contextEmbedder = try Linear(config.jointAttentionDim, d, p / "context_embedder", r)
    let shape = BlockShape(heads: config.numAttentionHeads, headSize: config.attentionHeadDim)
    let dual = Set(config.dualAttentionLayers ?? [])
    blocks = try (0..<config.numLayers).map {
      try JointBlock(
        shape, normed: config.qkNorm != nil, dual: dual.contains($0), last: $0 == config.numLayers - 1,
        p / "transformer_blocks" / $0, r)
    }
    let normOut = try Linear(d, 2 * d, p / "norm_out" / "linear", r)
    let outSize = patch * patch * (config.outChannels ?? config.channels)
    projOut = try Linear(d, outSize, p / "proj_out", r)
    try checkpoint.finish()
    let layers = blocks.flatMap { [$0.modulation, $0.contextModulation] } + [normOut]
    modulations = r.group(layers)
    modulationSizes = layers.map(\.outSize)
  }

  /// Moves the network to `dtype` and `device`.
  public func place(_ dtype: DType, _ device: Device) throws(TorchError) {
    try modules.place(dtype, device)
    self.dtype = dtype
    self.device = device
  }

  /// One forward pass.
  ///
  /// - Parameters:
  ///   - latents: [B, C, h, w], h and w multiples of the patch size.
  ///   - text: [B, L, joint_attention_dim].
  ///   - pooled: [B, pooled_projection_dim].
  ///   - timestep: 0 … 1000, [B] float32.
  /// - Returns: velocity like `latents`, in the network's dtype.
  public func callAsFunction(
    _ latents: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor
  ) throws -> Tensor {
    let (s, patch) = (latents.shape, config.patch)
    guard s.count == 4, s[1] == config.channels, s[2] % patch == 0, s[3] % patch == 0 else {
      throw ModelError(
        "latents \(s): expected [B, \(config.channels), h, w] with h and w multiples of \(patch)")
    }
    let (rows, columns) = (s[2] / patch, s[3] / patch)
    guard max(rows, columns) <= config.posEmbedMaxSize else {
      throw ModelError(
        "\(rows) × \(columns) patches exceed the position table of \(config.posEmbedMaxSize) a side: "
          + "use a smaller image")
    }
    let embedding = try conditioning(timestep, guidance: nil, pooled: pooled, dtype: dtype).silu()
    let modulation = try modulations(embedding).narrow(0, 0, s[0]).unsqueeze(1).split(modulationSizes, -1)
    let tokens = try patches(try latents.to(dtype)).reshape(s[0], config.width, rows * columns)
    var x = try tokens.transpose(1, 2) + croppedPositions(rows, columns)
    var y = try contextEmbedder(try text.to(dtype))
    // Modulations come in as inputs: they have a graph of their own where they are trained.
    for segment in segments(blocks.count) {
      let parts = [x, y] + modulation[(2 * segment.lowerBound)..<(2 * segment.upperBound)]
      let streams = try kept(parts) { [blocks, attentionKernel] t in
        var (x, y) = (t[0], t[1])
        for (k, i) in segment.enumerated() {
          (x, y) = try blocks[i](x, y, t[2 + 2 * k], t[3 + 2 * k], attentionKernel)
        }
        // The last block hands the text stream on untouched: an output must not be an input.
        return segment.upperBound == blocks.count ? [x] : [x, y]
      }
      x = streams[0]
      if streams.count == 2 { y = streams[1] }
    }
    let out = try modulation[modulation.count - 1].chunk(2, -1)  // scale first here, unlike in the blocks
    let v = try projOut(try modulated(x, shift: out[1], scale: out[0]))
    return try v.reshape(s[0], rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
      .reshape(s[0], -1, s[2], s[3])
  }

  /// The centre of the position table [1, rows·columns, width].
  func croppedPositions(_ rows: Int, _ columns: Int) throws(TorchError) -> Tensor {
    let side = config.posEmbedMaxSize
    return try positions.value().reshape(side, side, config.width)
      .narrow(0, (side - rows) / 2, rows).narrow(1, (side - columns) / 2, columns)
      .reshape(1, rows * columns, config.width)
  }
}

/// Attention of the image tokens among themselves: the second one of SD3.5-medium's first blocks.
private struct ImageAttention {
  private let shape: BlockShape
  private let qkv: LinearGroup
  private let norm: QueryKeyNorm?
  private let out: Linear
  init(_ shape: BlockShape, normed: Bool, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    self.shape = shape
    let d = shape.width
    qkv = r.group(try ["to_q", "to_k", "to_v"].map { try Linear(d, d, p / $0, r) })
    norm = normed ? try QueryKeyNorm(shape.headSize, "norm_q", "norm_k", p, r) : nil
    out = try Linear(d, d, p / "to_out" / 0, r)
  }
  /// [B, S, width] → the same.
  func callAsFunction(_ x: Tensor, _ kernel: AttentionKernel) throws(TorchError) -> Tensor {
    try out(try jointAttention([try qkv(x)], norms: [norm], rotation: nil, shape, kernel)[0])
  }
}

/// Image and text streams with joint attention; image tokens come first.
///
/// Reference: diffusers 0.42.1 JointTransformerBlock.
private struct JointBlock {
  let modulation, contextModulation: Linear
  private let shape: BlockShape
  private let qkv, contextQKV: LinearGroup
  private let norm, contextNorm: QueryKeyNorm?
  private let out: Linear
  private let dual: ImageAttention?
  private let feedForward: FeedForward
  /// The text stream's own layers; the last block has none.
  private let context: (out: Linear, feedForward: FeedForward)?

  init(
    _ shape: BlockShape, normed: Bool, dual: Bool, last: Bool, _ p: ParameterPath, _ r: ModuleRegistry
  ) throws {
    self.shape = shape
    let (d, a) = (shape.width, p / "attn")
    func joined(_ names: [String]) throws -> LinearGroup {
      r.group(try names.map { try Linear(d, d, a / $0, r) })
    }
    modulation = try Linear(d, (dual ? 9 : 6) * d, p / "norm1" / "linear", r)
    contextModulation = try Linear(d, (last ? 2 : 6) * d, p / "norm1_context" / "linear", r)
    qkv = try joined(["to_q", "to_k", "to_v"])
    contextQKV = try joined(["add_q_proj", "add_k_proj", "add_v_proj"])
    norm = normed ? try QueryKeyNorm(shape.headSize, "norm_q", "norm_k", a, r) : nil
    contextNorm = normed ? try QueryKeyNorm(shape.headSize, "norm_added_q", "norm_added_k", a, r) : nil
    out = try Linear(d, d, a / "to_out" / 0, r)
    self.dual = dual ? try ImageAttention(shape, normed: normed, p / "attn2", r) : nil
    feedForward = try FeedForward(d, p / "ff", r)
    context = last ? nil : (try Linear(d, d, a / "to_add_out", r), try FeedForward(d, p / "ff_context", r))
  }

  /// x [B, image tokens, width], y [B, text tokens, width]; modulations [B, 1, n·width].
  func callAsFunction(
    _ x: Tensor, _ y: Tensor, _ modulation: Tensor, _ contextModulation: Tensor, _ kernel: AttentionKernel
  ) throws(TorchError) -> (Tensor, Tensor) {
    let m = try modulation.chunk(dual == nil ? 6 : 9, -1)
    let c = try contextModulation.chunk(context == nil ? 2 : 6, -1)
    // The last block's text modulation comes as scale, shift.
    let (shift, scale) = context == nil ? (c[1], c[0]) : (c[0], c[1])
    let mixed = try jointAttention(
      [
        try qkv(try modulated(x, shift: m[0], scale: m[1])),
        try contextQKV(try modulated(y, shift: shift, scale: scale)),
      ], norms: [norm, contextNorm], rotation: nil, shape, kernel)
    var hidden = try gated(x, m[2], try out(mixed[0]))
    if let dual {
      // Normalised from the block's input, like the first attention's.
      let second = try dual(try modulated(x, shift: m[6], scale: m[7]), kernel)
      hidden = try gated(hidden, m[8], second)
    }
    hidden = try gated(hidden, m[5], try feedForward(try modulated(hidden, shift: m[3], scale: m[4])))
    guard let context else { return (hidden, y) }
    var y = try gated(y, c[2], try context.out(mixed[1]))
    y = try gated(y, c[5], try context.feedForward(try modulated(y, shift: c[3], scale: c[4])))
    return (hidden, y)
  }
}
