import FlowModels
import Foundation
import TorchNN

/// A published model: what its configuration says, and the class that must want exactly its keys and shapes.
struct PublishedModel: Sendable {
  /// Builds the model of a configuration from a checkpoint.
  typealias Build = @Sendable (_ configuration: Data, _ checkpoint: Checkpoint) throws -> ModuleRegistry

  /// What its list of keys and shapes is called, without `.json.gz`.
  let name: String
  /// The published configuration, less fields that no class here reads.
  let configuration: String
  /// Nil while no class computes it.
  let build: Build?

  init(_ name: String, _ configuration: String, _ build: Build?) {
    (self.name, self.configuration, self.build) = (name, configuration, build)
  }

  /// All that are known.
  static let all = [
    PublishedModel("flux1-dev.transformer", flux(guidance: true), transformer),
    PublishedModel("flux1-schnell.transformer", flux(guidance: false), transformer),
    PublishedModel("sd35-medium.transformer", sd35Medium, sd3),
    PublishedModel("sd35-large.transformer", sd35Large, sd3),
    PublishedModel("flux-sd3.vae", vae) { try AutoencoderKL(config: decode($0), checkpoint: $1).modules },
    PublishedModel("t5-v1_1-xxl.encoder", t5) { try T5Encoder(config: decode($0), checkpoint: $1).modules },
    PublishedModel("clip-l.text(flux)", text(768, 12, 12, "quick_gelu"), textEncoder),
    PublishedModel("clip-l.text_proj(sd3)", text(768, 12, 12, "quick_gelu", projects: true), textEncoder),
    PublishedModel("clip-g.text_proj(sd3)", text(1280, 32, 20, "gelu", projects: true), textEncoder),
    PublishedModel(
      "clip-vit-large-patch14",
      clip(text(768, 12, 12, "quick_gelu"), vision(1024, 24, 16, "quick_gelu"), 768)
    ) { try clipModel($0, $1, openCLIP: false) },
    PublishedModel(
      "pickscore_v1(clip-h)", clip(text(1024, 24, 16, "gelu"), vision(1280, 32, 16, "gelu"), 1024)
    ) { try clipModel($0, $1, openCLIP: false) },
    PublishedModel("hpsv2(open_clip ViT-H-14)", openCLIP(imageSize: 224, quickGELU: false)) {
      try clipModel($0, $1, openCLIP: true)
    },
    PublishedModel("dfn5b(open_clip ViT-H-14-378)", openCLIP(imageSize: 378, quickGELU: true)) {
      try clipModel($0, $1, openCLIP: true)
    },
  ]

  // MARK: classes

  private static let transformer: Build = {
    try FluxTransformer(config: decode($0), checkpoint: $1).modules
  }
  private static let sd3: Build = { try SD3Transformer(config: decode($0), checkpoint: $1).modules }
  private static let textEncoder: Build = {
    try CLIPTextEncoder(config: decode($0), checkpoint: $1).modules
  }
  private static func clipModel(
    _ configuration: Data, _ checkpoint: Checkpoint, openCLIP: Bool
  ) throws -> ModuleRegistry {
    let source = checkpoint.folder.path
    let config = try CLIPModel.Config(json: configuration, openCLIP: openCLIP, source: source)
    return try CLIPModel(config: config, checkpoint: checkpoint).modules
  }
  private static func decode<C: Decodable>(_ data: Data) throws -> C {
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    return try decoder.decode(C.self, from: data)
  }

  // MARK: configurations

  private static func flux(guidance: Bool) -> String {
    """
    {"_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "guidance_embeds": \(guidance),
     "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19,
     "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768}
    """
  }

  private static let sd35Medium = """
    {"_class_name": "SD3Transformer2DModel", "attention_head_dim": 64, "caption_projection_dim": 1536,
     "dual_attention_layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], "in_channels": 16,
     "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
     "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "sample_size": 128}
    """

  private static let sd35Large = """
    {"_class_name": "SD3Transformer2DModel", "attention_head_dim": 64, "caption_projection_dim": 2432,
     "dual_attention_layers": [], "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 38,
     "num_layers": 38, "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048,
     "pos_embed_max_size": 192, "qk_norm": "rms_norm", "sample_size": 128}
    """

  private static let vae = """
    {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
     "force_upcast": true, "in_channels": 3, "latent_channels": 16, "layers_per_block": 2,
     "mid_block_add_attention": true, "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024,
     "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_post_quant_conv": false, "use_quant_conv": false}
    """

  private static let t5 = """
    {"model_type": "t5", "d_ff": 10240, "d_kv": 64, "d_model": 4096, "feed_forward_proj": "gated-gelu",
     "layer_norm_epsilon": 1e-06, "num_heads": 64, "num_layers": 24, "relative_attention_max_distance": 128,
     "relative_attention_num_buckets": 32, "vocab_size": 32128}
    """

  private static func text(
    _ width: Int, _ layers: Int, _ heads: Int, _ activation: String, projects: Bool = false
  ) -> String {
    """
    {"architectures": ["\(projects ? "CLIPTextModelWithProjection" : "CLIPTextModel")"], "bos_token_id": 0,
     "eos_token_id": 2, "hidden_act": "\(activation)", "hidden_size": \(width),
     "intermediate_size": \(4 * width), "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
     "num_attention_heads": \(heads), "num_hidden_layers": \(layers), "pad_token_id": 1,
     "projection_dim": \(width), "vocab_size": 49408}
    """
  }

  private static func vision(_ width: Int, _ layers: Int, _ heads: Int, _ activation: String) -> String {
    """
    {"hidden_act": "\(activation)", "hidden_size": \(width), "image_size": 224, "intermediate_size": \(4 * width),
     "layer_norm_eps": 1e-05, "num_attention_heads": \(heads), "num_hidden_layers": \(layers), "patch_size": 14}
    """
  }

  private static func clip(_ text: String, _ vision: String, _ size: Int) -> String {
    """
    {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": \(size), "text_config": \(text),
     "vision_config": \(vision)}
    """
  }

  private static func openCLIP(imageSize: Int, quickGELU: Bool) -> String {
    """
    {"model_cfg": {"embed_dim": 1024, "quick_gelu": \(quickGELU),
      "vision_cfg": {"image_size": \(imageSize), "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
      "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}}}
    """
  }
}
