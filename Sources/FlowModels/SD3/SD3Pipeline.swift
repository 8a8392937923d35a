import ChunkGRPO
import Foundation
import Torch
import TorchNN

/// A whole Stable Diffusion 3 or 3.5 folder: three text encoders, transformer, autoencoder, scheduler.
///
/// Reference: diffusers 0.42.1 StableDiffusion3Pipeline.
public final class SD3Pipeline: ImagePipeline {
  /// The folder it came from.
  public let folder: ModelFolder
  /// The network that is sampled and trained.
  public let transformer: SD3Transformer
  /// Two CLIPs and T5.
  public let encoders: SD3TextEncoders
  /// Between latents and images.
  public let autoencoder: AutoencoderKL
  /// The folder's inference schedule.
  public let scheduler: FlowMatchScheduler

  /// The network that is sampled and trained.
  public var network: any FlowTransformer { transformer }
  /// The text encoders.
  public var text: any TextEncoding { encoders }
  /// By a second pass.
  public var guidance: GuidanceKind { .classifierFree }

  /// Loads the transformer and the autoencoder; text encoders follow when a prompt is encoded.
  public init(_ folder: ModelFolder, _ options: PipelineOptions = .init()) throws {
    self.folder = folder
    scheduler = try folder.scheduler()
    autoencoder = try folder.autoencoder(options)
    transformer = try SD3Transformer(
      folder: folder.part("transformer"), dtype: options.dtype, device: options.device,
      weights: options.weights)
    transformer.attentionKernel = options.attention
    transformer.checkpointing = options.checkpointing
    let c = transformer.config
    encoders = try SD3TextEncoders(
      folder, device: options.device, textLength: options.textLength, width: c.jointAttentionDim)
    try agree(
      encoders.pooledWidth, c.pooledProjectionDim,
      "the CLIPs' projection_dims together and pooled_projection_dim differ")
    if let width = encoders.t5Width {
      try agree(width, c.jointAttentionDim, "T5's width and joint_attention_dim differ")
    }
    try agree(autoencoder.config.latentChannels, c.channels, "latent channels and in_channels differ")
  }

  /// [C, h, w].
  public func latentShape(_ grid: TokenGrid) -> [Int] {
    let patch = transformer.config.patch
    return [transformer.config.channels, patch * grid.rows, patch * grid.columns]
  }

  /// Latents [B, C, h, w] → images [B, 3, H, W] in 0 … 1, float32.
  public func decode(_ latents: Tensor, grid: TokenGrid) throws -> Tensor {
    try withoutGrad { try autoencoder.images(latents) }
  }

  /// The inference schedule a diffusers StableDiffusion3Pipeline would use: shifted twice.
  public func schedule(steps: Int, grid: TokenGrid) throws -> NoiseSchedule {
    try scheduler.sd3Schedule(steps: steps)
  }

  /// The transformer as a ``FlowModel``; its latents carry their own grid.
  public func flowModel(grid: TokenGrid) -> any FlowModel { SD3FlowModel(transformer) }
}

/// SD3's text side: the hidden states of two CLIPs beside each other, padded and followed by T5's.
public final class SD3TextEncoders: TextEncoding {
  /// Folders of the encoders' weights; T5's only where the model has one.
  public let folders: [URL]
  /// Folders of the tokenizers.
  public let tokenizerFolders: [URL]
  /// Width of T5's embedding; nil for a model without T5, whose tokens are zeros.
  let t5Width: Int?
  let pooledWidth: Int
  private let device: Device
  private let width: Int
  private let clipTokenizers: [CLIPTokenizer]
  private let t5Tokenizer: T5Tokenizer?
  private let clipLength, t5Length: Int
  private var loaded: (clips: [CLIPTextEncoder], t5: T5Encoder?)?

  init(_ folder: ModelFolder, device: Device, textLength: Int?, width: Int) throws {
    (self.device, self.width) = (device, width)
    // The pipeline may be published without T5: "text_encoder_3": [null, null].
    let hasT5 = FileManager.default.fileExists(
      atPath: folder.part("text_encoder_3").appending(path: "config.json").path)
    folders = (["text_encoder", "text_encoder_2"] + (hasT5 ? ["text_encoder_3"] : [])).map(folder.part)
    tokenizerFolders = (["tokenizer", "tokenizer_2"] + (hasT5 ? ["tokenizer_3"] : [])).map(folder.part)
    let clips = try ["text_encoder", "text_encoder_2"].map {
      try folder.config(CLIPTextEncoder.Config.self, $0)
    }
    pooledWidth = clips.reduce(0) { $0 + $1.projectionDim }
    t5Width = hasT5 ? try folder.config(T5Encoder.Config.self, "text_encoder_3").dModel : nil
    clipTokenizers = try tokenizerFolders.prefix(2).map { try CLIPTokenizer(folder: $0) }
    t5Tokenizer = hasT5 ? try T5Tokenizer(folder: tokenizerFolders[2]) : nil
    let limits = clips.map(\.maxPositionEmbeddings) + clipTokenizers.map(\.maximumLength)
    clipLength = limits.min()!
    t5Length = try folder.textLength(textLength, standard: 256, tokenizer: "tokenizer_3")
    let joined = clips.reduce(0) { $0 + $1.hiddenSize }
    guard joined <= width else {
      throw ModelError(
        "\(folder.url.path): the CLIPs' widths add up to \(joined), joint_attention_dim is \(width)")
    }
  }

  /// The CLIPs' tokens and T5's.
  public var lengths: [Int] { [clipLength, clipLength, t5Length] }

  private func models() throws -> (clips: [CLIPTextEncoder], t5: T5Encoder?) {
    if let loaded { return loaded }
    let clips = try folders.prefix(2).map { try CLIPTextEncoder(folder: $0, device: device) }
    let t5 = try folders.dropFirst(2).first.map {
      try T5Encoder(folder: $0, dtype: encoderDType($0), device: device)
    }
    loaded = (clips, t5)
    return (clips, t5)
  }

  /// Forgets the weights.
  public func release() { loaded = nil }

  /// The ids of both CLIPs and, where there is one, of T5, padded.
  public func tokens(_ prompt: String) -> [TokenizedText] {
    clipTokenizers.map { $0.encode(prompt, length: clipLength) }
      + (t5Tokenizer.map { [$0.encode(prompt, length: t5Length)] } ?? [])
  }

  /// Token embeddings [1, 77 + L, joint] and the pooled embedding [1, pooled] of one prompt.
  public func encode(_ tokens: [TokenizedText]) throws -> Condition {
    let models = try models()
    return try withoutGrad {
      let ids = try tokens.map { try Tensor($0.ids, shape: [1, $0.ids.count]).to(device) }
      let outputs = try zip(models.clips, ids).map { try $0($1) }
      let pooled = try zip(outputs, folders).map { output, folder in
        guard let projected = output.projected else {
          throw ModelError("\(folder.path): no text_projection.weight, which this pipeline needs")
        }
        return projected
      }
      let clip = try Tensor.cat(outputs.map(\.penultimate), -1)
      let padded = try clip.pad([0, width - clip.size(-1)])
      let t5 = try models.t5.map { try $0(ids[2]).to(.float32) }
      let rest = try t5 ?? Tensor.zeros([1, t5Length, width], device: device)
      return Condition([try Tensor.cat([padded, rest], 1), try Tensor.cat(pooled, -1)])
    }
  }
}

/// An SD3 transformer as a flow model.
public final class SD3FlowModel: FlowModel {
  private let transformer: SD3Transformer
  /// Layers and parameters by checkpoint key.
  public var modules: ModuleRegistry { transformer.modules }

  /// Wraps `transformer`.
  public init(_ transformer: SD3Transformer) { self.transformer = transformer }

  /// See ``FlowModel/velocity(_:times:condition:guidance:)``; latents are [B, C, h, w], the condition is the
  /// token embeddings [B, L, joint] and the pooled embedding [B, pooled]. Guidance is the wrapper's affair.
  public func velocity(_ latents: Tensor, times: Tensor, condition: Condition, guidance: Double?) throws
    -> Tensor
  {
    try transformer(
      latents, text: condition.tensors[0], pooled: condition.tensors[1], timestep: times
    ).to(.float32)
  }
}
