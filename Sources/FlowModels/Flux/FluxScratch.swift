import ChunkGRPO
import Foundation
import Torch
import TorchNN

/// A FLUX model whose transformer and text encoders are trained together from drawn weights: configurations, tokenizers and
/// autoencoder come from a folder.
///
/// All trained weights are float32 leaves. The encoders also compute in float32, as they do when the model is used: gradients
/// of embeddings are sums over all tokens of a batch, too long for bfloat16.
public final class FluxScratch {
  /// The network that predicts velocities.
  public let transformer: FluxTransformer
  /// What gives the pooled embedding and the token embeddings.
  public let clip: CLIPTextEncoder, t5: T5Encoder
  /// Between latents and images; not trained.
  public let autoencoder: AutoencoderKL
  private let text: FluxTextEncoders
  private let device: Device
  private var ids: [String: [Tensor]] = [:]

  /// Draws all weights but the autoencoder's from `random`.
  ///
  /// - Parameter options: dtype of the transformer, device, kernel and text length.
  /// - Throws: ``ModelError`` for another kind of model, parts that do not fit together, or a model that embeds a guidance
  ///   scale, which only a distilled one can learn.
  public init(_ folder: ModelFolder, _ options: PipelineOptions, random: RandomPlan) throws {
    guard folder.pipeline == "FluxPipeline" else {
      throw ModelError("\(folder.url.path): \(folder.pipeline) cannot be pretrained; expected FluxPipeline")
    }
    device = options.device
    text = try FluxTextEncoders(folder, device: device, textLength: options.textLength)
    autoencoder = try folder.autoencoder(options)
    func blank(_ part: String) -> Checkpoint { Checkpoint(blank: folder.part(part)) }
    let config = try folder.config(FluxTransformerConfig.self, "transformer")
    transformer = try FluxTransformer(config: config, checkpoint: blank("transformer"))
    clip = try CLIPTextEncoder(
      config: try folder.config(CLIPTextEncoder.Config.self, "text_encoder"),
      checkpoint: blank("text_encoder"))
    t5 = try T5Encoder(
      config: try folder.config(T5Encoder.Config.self, "text_encoder_2"), checkpoint: blank("text_encoder_2"))
    for (name, got, expected) in [
      ("pooled_projection_dim", config.pooledProjectionDim, text.clipWidth),
      ("joint_attention_dim", config.jointAttentionDim, text.t5Width),
      ("in_channels", config.inChannels, 4 * autoencoder.config.latentChannels),
    ] where got != expected {
      throw ModelError(
        "\(folder.url.path)/transformer/config.json: \(name): expected \(expected), as the other parts have it, got \(got)"
      )
    }
    guard !config.guidanceEmbeds else {
      throw ModelError(
        "\(folder.url.path)/transformer/config.json: guidance_embeds: only a distilled model has it; set it to false"
      )
    }
    transformer.attentionKernel = options.attention
    try transformer.place(options.dtype, device)
    try clip.modules.place(.float32, device)
    try t5.modules.place(.float32, device)
    for (part, modules) in parts {
      try modules.makeTrainable()
      let rule: WeightInitialisation =
        switch part {
        case "transformer": .diffusionTransformer
        case "text_encoder": .clip(clip.config)
        default: .t5(t5.config)
        }
      try rule.fill(modules, part: part, random: random)
    }
  }

  /// What is trained, by the part's name in the folder.
  public var parts: [String: ModuleRegistry] {
    ["transformer": transformer.modules, "text_encoder": clip.modules, "text_encoder_2": t5.modules]
  }

  /// The conditions of `prompts`, with gradients: T5 [B, L, joint] and pooled CLIP [B, pooled].
  public func condition(_ prompts: [String]) throws -> Condition {
    let rows = try prompts.map { prompt in
      if let known = ids[prompt] { return known }
      let tokens = try text.tokens(prompt).map { try Tensor($0.ids, shape: [1, $0.ids.count]).to(device) }
      ids[prompt] = tokens
      return tokens
    }
    return Condition([
      try t5(try Tensor.cat(rows.map { $0[1] })), try clip(try Tensor.cat(rows.map { $0[0] })).pooled,
    ])
  }

  /// Images [B, 3, H, W] in 0 … 1 → packed latents [B, tokens, channels] as the network takes them: the means of the
  /// autoencoder's distributions, shifted and scaled.
  public func latents(_ images: Tensor) throws -> Tensor {
    try withoutGrad {
      let mean = try autoencoder.encode(try images.to(device) * 2 - 1).mean
      let c = autoencoder.config
      return try FluxPipeline.pack((mean - (c.shiftFactor ?? 0)) * (c.scalingFactor ?? 1)).contiguous()
    }
  }
}
