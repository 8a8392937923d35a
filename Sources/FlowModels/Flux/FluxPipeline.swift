import ChunkGRPO
import Foundation
import Torch
import TorchNN

/// A whole FLUX model folder: text encoders, transformer, autoencoder, scheduler and tokenizers.
public final class FluxPipeline {
  /// The folder it came from.
  public let folder: ModelFolder
  /// The network that is sampled and trained.
  public let transformer: FluxTransformer
  /// CLIP, for the pooled embedding.
  public let clip: CLIPTextEncoder
  /// T5, for the token embeddings.
  public let t5: T5Encoder
  /// Between latents and images.
  public let autoencoder: AutoencoderKL
  /// The folder's inference schedule.
  public let scheduler: FlowMatchScheduler
  private let clipTokenizer: CLIPTokenizer
  private let t5Tokenizer: T5Tokenizer
  private let t5Length: Int

  /// Loads every part; the transformer in `dtype`, the encoders and the autoencoder as stored.
  ///
  /// - Parameter textLength: T5 tokens; nil for the folder's `model_max_length`.
  public init(_ url: URL, dtype: DType = .float32, device: Device = .cpu, textLength: Int? = nil) throws {
    folder = try ModelFolder(url)
    guard folder.pipeline == "FluxPipeline" else {
      throw ModelError(
        "\(url.path)/model_index.json: \(folder.pipeline) is not supported; expected FluxPipeline")
    }
    transformer = try FluxTransformer(folder: folder.part("transformer"))
    try transformer.place(dtype, device)
    clip = try CLIPTextEncoder(folder: folder.part("text_encoder"))
    t5 = try T5Encoder(folder: folder.part("text_encoder_2"))
    autoencoder = try AutoencoderKL(folder: folder.part("vae"))
    for registry in [clip.modules, t5.modules, autoencoder.modules] { try registry.place(.float32, device) }
    scheduler = try folder.config(FlowMatchScheduler.self, "scheduler", "scheduler_config.json")
    if !scheduler.unsupportedOptions.isEmpty {
      throw ModelError(
        "\(url.path)/scheduler/scheduler_config.json: \(scheduler.unsupportedOptions.joined(separator: ", ")) not supported"
      )
    }
    clipTokenizer = try CLIPTokenizer(folder: folder.part("tokenizer"))
    t5Tokenizer = try T5Tokenizer(folder: folder.part("tokenizer_2"))
    struct TokenizerConfig: Decodable { let modelMaxLength: Int? }
    let stated = try? folder.config(TokenizerConfig.self, "tokenizer_2", "tokenizer_config.json")
      .modelMaxLength
    self.t5Length = textLength ?? min(stated ?? 512, 512)
    try checkParts()
  }

  private func checkParts() throws {
    let c = transformer.config
    func agree(_ a: Int, _ b: Int, _ text: String) throws {
      guard a == b else { throw ModelError("\(folder.url.path): \(text): \(a) against \(b)") }
    }
    try agree(
      clip.config.hiddenSize, c.pooledProjectionDim, "CLIP's width and pooled_projection_dim differ")
    try agree(t5.config.dModel, c.jointAttentionDim, "T5's width and joint_attention_dim differ")
    try agree(
      4 * autoencoder.config.latentChannels, c.inChannels, "four latent channels and in_channels differ")
  }

  /// Pixels a packed token covers along each side: sizes must be multiples of it.
  public var granularity: Int { 2 * autoencoder.downscale }

  /// Rows and columns of the packed token grid of an image.
  public func grid(height: Int, width: Int) throws -> (rows: Int, columns: Int) {
    guard height > 0, width > 0, height % granularity == 0, width % granularity == 0 else {
      throw ModelError("\(height) × \(width) pixels: this model takes multiples of \(granularity)")
    }
    return (height / granularity, width / granularity)
  }

  /// Token ids and how many tokens did not fit.
  public struct Tokens: Sendable {
    /// CLIP and T5 ids, padded.
    public let clip, t5: TokenizedText
  }

  /// Tokenizes one prompt.
  public func tokens(_ prompt: String) -> Tokens {
    let clipLength = min(clip.maxLength, clipTokenizer.maximumLength)
    return Tokens(
      clip: clipTokenizer.encode(prompt, length: clipLength), t5: t5Tokenizer.encode(prompt, length: t5Length)
    )
  }

  /// T5 embedding [1, L, joint] and CLIP's pooled embedding [1, pooled] of one prompt.
  ///
  /// One prompt a pass, so that the result does not depend on its neighbours in a batch.
  public func encode(_ prompt: String) throws -> Condition { try encode(tokens(prompt)) }

  /// The same from token ids.
  public func encode(_ tokens: Tokens) throws -> Condition {
    try withoutGrad {
      let clipIDs = try Tensor(tokens.clip.ids, shape: [1, tokens.clip.ids.count]).to(transformer.device)
      let t5IDs = try Tensor(tokens.t5.ids, shape: [1, tokens.t5.ids.count]).to(transformer.device)
      return Condition([try t5(t5IDs), try clip(clipIDs).pooled])
    }
  }

  /// Packed latents [B, rows·columns, 4·C] → images [B, 3, H, W] in 0 … 1, float32.
  public func decode(_ latents: Tensor, grid: (rows: Int, columns: Int)) throws -> Tensor {
    try withoutGrad { try autoencoder.images(try Self.unpack(latents, grid: grid)) }
  }

  /// The inference schedule a diffusers FluxPipeline would use.
  public func schedule(steps: Int, grid: (rows: Int, columns: Int)) throws -> NoiseSchedule {
    try scheduler.fluxSchedule(steps: steps, imageTokens: grid.rows * grid.columns)
  }

  /// Latents [B, C, 2·rows, 2·columns] → tokens [B, rows·columns, 4·C].
  public static func pack(_ x: Tensor) throws(TorchError) -> Tensor {
    let s = x.shape
    return try x.reshape(s[0], s[1], s[2] / 2, 2, s[3] / 2, 2).permute(0, 2, 4, 1, 3, 5)
      .reshape(s[0], s[2] / 2 * (s[3] / 2), 4 * s[1])
  }

  /// Inverse of ``pack(_:)``.
  public static func unpack(_ x: Tensor, grid: (rows: Int, columns: Int)) throws(TorchError) -> Tensor {
    let s = x.shape
    return try x.reshape(s[0], grid.rows, grid.columns, s[2] / 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
      .reshape(s[0], s[2] / 4, 2 * grid.rows, 2 * grid.columns)
  }

  /// The transformer as a ``FlowModel`` on one token grid.
  public func flowModel(grid: (rows: Int, columns: Int)) -> FluxFlowModel {
    FluxFlowModel(transformer, grid: grid)
  }
}

/// A FLUX transformer on a fixed token grid.
public final class FluxFlowModel: FlowModel {
  private let transformer: FluxTransformer
  private let grid: (rows: Int, columns: Int)
  /// Layers and parameters by checkpoint key.
  public var modules: ModuleRegistry { transformer.modules }

  /// Wraps `transformer` on `grid`.
  public init(_ transformer: FluxTransformer, grid: (rows: Int, columns: Int)) {
    self.transformer = transformer
    self.grid = grid
  }

  /// See ``FlowModel/velocity(_:times:condition:guidance:)``; latents are packed tokens, the condition is
  /// T5 [B, L, joint] and pooled CLIP [B, pooled].
  public func velocity(_ latents: Tensor, times: Tensor, condition: Condition, guidance: Double?) throws
    -> Tensor
  {
    // Divided by 1000 here and multiplied inside, in float32, as the reference pipeline does.
    let scale = try guidance.map { try Tensor.full([latents.size(0)], $0, device: latents.device) }
    return try transformer(
      latents, text: condition.tensors[0], pooled: condition.tensors[1], timestep: try times / 1000,
      guidance: transformer.config.guidanceEmbeds ? scale : nil, grid: grid
    ).to(.float32)
  }
}
