import ChunkGRPO
import Foundation
import Torch
import TorchNN

/// A whole FLUX model folder: text encoders, transformer, autoencoder, scheduler and tokenizers.
public final class FluxPipeline: ImagePipeline {
  /// The folder it came from.
  public let folder: ModelFolder
  /// The network that is sampled and trained.
  public let transformer: FluxTransformer
  /// CLIP and T5.
  public let encoders: FluxTextEncoders
  /// Between latents and images.
  public let autoencoder: AutoencoderKL
  /// The folder's inference schedule.
  public let scheduler: FlowMatchScheduler

  /// The network that is sampled and trained.
  public var network: any FlowTransformer { transformer }
  /// The text encoders.
  public var text: any TextEncoding { encoders }
  /// Embedded by -dev, not taken by -schnell.
  public var guidance: GuidanceKind { transformer.config.guidanceEmbeds ? .embedded : .none }

  /// Loads the transformer and the autoencoder; text encoders follow when a prompt is encoded.
  public init(_ folder: ModelFolder, _ options: PipelineOptions = .init()) throws {
    self.folder = folder
    encoders = try FluxTextEncoders(folder, device: options.device, textLength: options.textLength)
    scheduler = try folder.scheduler()
    autoencoder = try folder.autoencoder(options)
    transformer = try FluxTransformer(
      folder: folder.part("transformer"), dtype: options.dtype, device: options.device,
      weights: options.weights)
    transformer.attentionKernel = options.attention
    transformer.checkpointing = options.checkpointing
    transformer.roundsTimeToDType = options.roundsTimeToDType
    let c = transformer.config
    try agree(
      encoders.clipWidth, c.pooledProjectionDim, "CLIP's width and pooled_projection_dim differ")
    try agree(encoders.t5Width, c.jointAttentionDim, "T5's width and joint_attention_dim differ")
    try agree(
      4 * autoencoder.config.latentChannels, c.inChannels, "four latent channels and in_channels differ")
  }

  /// [tokens, channels].
  public func latentShape(_ grid: TokenGrid) -> [Int] {
    [grid.rows * grid.columns, transformer.config.inChannels]
  }

  /// Packed latents [B, rows·columns, 4·C] → images [B, 3, H, W] in 0 … 1, float32.
  public func decode(_ latents: Tensor, grid: TokenGrid) throws -> Tensor {
    try withoutGrad { try autoencoder.images(try Self.unpack(latents, grid: grid)) }
  }

  /// The inference schedule a diffusers FluxPipeline would use.
  public func schedule(steps: Int, grid: TokenGrid) throws -> NoiseSchedule {
    try scheduler.fluxSchedule(steps: steps, imageTokens: grid.rows * grid.columns)
  }

  /// Latents [B, C, 2·rows, 2·columns] → tokens [B, rows·columns, 4·C].
  public static func pack(_ x: Tensor) throws(TorchError) -> Tensor {
    let s = x.shape
    return try x.reshape(s[0], s[1], s[2] / 2, 2, s[3] / 2, 2).permute(0, 2, 4, 1, 3, 5)
      .reshape(s[0], s[2] / 2 * (s[3] / 2), 4 * s[1])
  }

  /// Inverse of ``pack(_:)``.
  public static func unpack(_ x: Tensor, grid: TokenGrid) throws(TorchError) -> Tensor {
    let s = x.shape
    return try x.reshape(s[0], grid.rows, grid.columns, s[2] / 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
      .reshape(s[0], s[2] / 4, 2 * grid.rows, 2 * grid.columns)
  }

  /// The transformer as a ``FlowModel`` on one token grid.
  public func flowModel(grid: TokenGrid) -> any FlowModel { FluxFlowModel(transformer, grid: grid) }
}

/// FLUX's text side: CLIP for the pooled embedding, T5 for the tokens.
public final class FluxTextEncoders: TextEncoding {
  /// Folders of the two encoders' weights.
  public let folders: [URL]
  /// Folders of the two tokenizers.
  public let tokenizerFolders: [URL]
  let clipWidth, t5Width: Int
  private let device: Device
  private let clipTokenizer: CLIPTokenizer
  private let t5Tokenizer: T5Tokenizer
  private let clipLength, t5Length: Int
  private var loaded: (clip: CLIPTextEncoder, t5: T5Encoder)?

  init(_ folder: ModelFolder, device: Device, textLength: Int?) throws {
    self.device = device
    folders = ["text_encoder", "text_encoder_2"].map(folder.part)
    tokenizerFolders = ["tokenizer", "tokenizer_2"].map(folder.part)
    let clip = try folder.config(CLIPTextEncoder.Config.self, "text_encoder")
    clipWidth = clip.hiddenSize
    t5Width = try folder.config(T5Encoder.Config.self, "text_encoder_2").dModel
    clipTokenizer = try CLIPTokenizer(folder: tokenizerFolders[0])
    t5Tokenizer = try T5Tokenizer(folder: tokenizerFolders[1])
    clipLength = min(clip.maxPositionEmbeddings, clipTokenizer.maximumLength)
    t5Length = try folder.textLength(textLength, standard: 512, tokenizer: "tokenizer_2")
  }

  /// CLIP's and T5's tokens.
  public var lengths: [Int] { [clipLength, t5Length] }

  /// The two encoders, loaded if need be.
  public func models() throws -> (clip: CLIPTextEncoder, t5: T5Encoder) {
    if let loaded { return loaded }
    let models = (
      clip: try CLIPTextEncoder(folder: folders[0], device: device),
      t5: try T5Encoder(folder: folders[1], dtype: encoderDType(folders[1]), device: device)
    )
    loaded = models
    return models
  }

  /// Forgets the weights.
  public func release() { loaded = nil }

  /// CLIP's and T5's ids, padded.
  public func tokens(_ prompt: String) -> [TokenizedText] {
    [clipTokenizer.encode(prompt, length: clipLength), t5Tokenizer.encode(prompt, length: t5Length)]
  }

  /// T5 embedding [1, L, joint] and CLIP's pooled embedding [1, pooled] of one prompt.
  public func encode(_ tokens: [TokenizedText]) throws -> Condition {
    let models = try models()
    return try withoutGrad {
      let ids = try tokens.map { try Tensor($0.ids, shape: [1, $0.ids.count]).to(device) }
      return Condition([try models.t5(ids[1]), try models.clip(ids[0]).pooled])
    }
  }
}

/// A FLUX transformer on a fixed token grid.
public final class FluxFlowModel: FlowModel {
  private let transformer: FluxTransformer
  private let grid: TokenGrid
  /// Layers and parameters by checkpoint key.
  public var modules: ModuleRegistry { transformer.modules }

  /// Wraps `transformer` on `grid`.
  public init(_ transformer: FluxTransformer, grid: TokenGrid) {
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
