import Foundation
import Torch
import TorchNN

/// CLIP: text and image embeddings in one space, and a learnt scale of their cosine.
///
/// Reference: transformers 5.23.0 CLIPModel, open_clip 3.3.0 CLIP. A folder of either naming loads.
public final class CLIPModel {
  /// Sizes of both towers.
  public struct Config: Sendable {
    /// The text tower's.
    public var text: CLIPTextEncoder.Config
    /// The vision tower's.
    public var vision: CLIPVisionEncoder.Config
    /// Size of the common space.
    public var projectionDim: Int
    /// How the checkpoint names its parameters.
    var naming: CLIPNaming
  }

  /// The sizes this was built with.
  public let config: Config
  /// Layers and parameters by checkpoint key.
  public let modules = ModuleRegistry()
  /// The text tower, projecting.
  public let text: CLIPTextEncoder
  /// The vision tower, projecting.
  public let vision: CLIPVisionEncoder
  private let logScale: Parameter

  /// Builds the model of `folder` and takes every parameter: `open_clip_config.json` and
  /// `open_clip_model.safetensors` (or `model.safetensors`), or transformers' `config.json` and
  /// `model.safetensors`.
  ///
  /// - Parameters:
  ///   - activation: `gelu` or `quick_gelu` in place of the configuration's; open_clip's own configurations
  ///     leave it to the name of the model (`ViT-H-14-quickgelu`).
  ///   - blank: reads no weights and takes next to no memory: for what the configuration tells.
  public convenience init(folder: URL, activation: String? = nil, blank: Bool = false) throws {
    var config = try Config(folder: folder)
    if let activation { (config.text.hiddenAct, config.vision.hiddenAct) = (activation, activation) }
    let checkpoint =
      blank
      ? Checkpoint(blank: folder) : try Checkpoint(folder: folder, names: ["open_clip_model", "model"])
    try self.init(config: config, checkpoint: checkpoint)
  }

  /// Builds the model and takes every parameter of `checkpoint`; any key that does not fit is an error.
  public init(config: Config, checkpoint: Checkpoint) throws {
    let source = checkpoint.folder.path
    try config.text.layers.check("\(source): text tower")
    try config.vision.layers.check("\(source): vision tower")
    guard config.vision.patchSize > 0, config.vision.imageSize % config.vision.patchSize == 0 else {
      throw ModelError(
        "\(source): images of \(config.vision.imageSize) pixels do not divide into patches of \(config.vision.patchSize)"
      )
    }
    self.config = config
    let (p, naming, size) = (checkpoint.root, config.naming, config.projectionDim)
    let paths = naming == .transformers ? (p / "text_model", p / "vision_model") : (p, p / "visual")
    text = try CLIPTextEncoder(config.text, naming, projectionSize: size, p, tower: paths.0, modules)
    vision = try CLIPVisionEncoder(config.vision, naming, projectionSize: size, p, tower: paths.1, modules)
    logScale = modules.add(try p.parameter("logit_scale"))
    // Constants that older exporters wrote as tensors.
    try checkpoint.finish { $0.hasSuffix("embeddings.position_ids") || $0 == "attn_mask" }
  }

  /// ids [B, N] int64 → unit vectors [B, projection_dim].
  ///
  /// - Parameter attentionMask: as in ``CLIPTextEncoder/callAsFunction(_:attentionMask:)``.
  public func embedText(_ ids: Tensor, attentionMask: Tensor? = nil) throws -> Tensor {
    try Self.normalized(try text(ids, attentionMask: attentionMask).projected!)
  }

  /// Normalised images [B, 3, size, size] → unit vectors [B, projection_dim].
  public func embedImages(_ pixels: Tensor) throws -> Tensor { try Self.normalized(try vision(pixels)) }

  /// exp(logit_scale) as a scalar tensor: what PickScore multiplies the cosine by.
  public func scale() throws -> Tensor { try logScale.value().exp() }

  /// Cosine of matching rows [B, D] of unit vectors: CLIPScore, HPSv2 → [B].
  public static func cosine(_ a: Tensor, _ b: Tensor) throws(TorchError) -> Tensor { try (a * b).sum([-1]) }

  private static func normalized(_ x: Tensor) throws(TorchError) -> Tensor {
    try x / x.square().sum([-1], keep: true).sqrt()
  }
}

extension CLIPModel.Config {
  /// Reads `open_clip_config.json` where there is one, `config.json` otherwise.
  public init(folder: URL) throws {
    let file = folder.appending(path: "open_clip_config.json")
    let open = FileManager.default.fileExists(atPath: file.path)
    let read = open ? file : folder.appending(path: "config.json")
    guard let data = try? Data(contentsOf: read) else { throw ModelError("\(read.path): cannot be read") }
    try self.init(json: data, openCLIP: open, source: read.path)
  }

  /// Reads a configuration's text: open_clip's, or transformers'.
  ///
  /// - Parameter source: where it came from, for errors.
  public init(json: Data, openCLIP: Bool, source: String) throws {
    if openCLIP {
      let file = try ModelFolder.decode(OpenCLIPConfig.self, json, source)
      try self.init(file.modelCfg, source: source)
    } else {
      let file = try ModelFolder.decode(TransformersConfig.self, json, source)
      self.init(
        text: file.textConfig, vision: file.visionConfig, projectionDim: file.projectionDim ?? 512,
        naming: .transformers)
    }
  }

  /// transformers' `config.json`.
  private struct TransformersConfig: Decodable {
    let textConfig: CLIPTextEncoder.Config
    let visionConfig: CLIPVisionEncoder.Config
    let projectionDim: Int?
  }

  /// open_clip's `open_clip_config.json`.
  private struct OpenCLIPConfig: Decodable {
    struct Model: Decodable {
      let embedDim: Int
      let quickGelu: Bool?
      let visionCfg: Vision
      let textCfg: Text
    }
    struct Vision: Decodable {
      let imageSize, layers, width, headWidth, patchSize: Int?
      let mlpRatio: Double?
      // What would change the computation and is not computed here.
      let timmModelName, poolType: String?
      let attentionalPool, noLnPre, finalLnAfterPool, globalAveragePool: Bool?
    }
    struct Text: Decodable {
      let contextLength, vocabSize, width, heads, layers: Int?
      let mlpRatio: Double?
      let hfModelName, poolType: String?
      let embedCls, noCausalMask, finalLnAfterPool: Bool?
    }
    let modelCfg: Model
  }

  /// The reference's defaults stand in for absent fields.
  private init(_ c: OpenCLIPConfig.Model, source: String) throws(ModelError) {
    let (v, t) = (c.visionCfg, c.textCfg)
    let refused = [
      "vision_cfg.timm_model_name": v.timmModelName != nil,
      "vision_cfg.pool_type": ![nil, "tok"].contains(v.poolType),
      "vision_cfg.attentional_pool": v.attentionalPool == true, "vision_cfg.no_ln_pre": v.noLnPre == true,
      "vision_cfg.final_ln_after_pool": v.finalLnAfterPool == true,
      "vision_cfg.global_average_pool": v.globalAveragePool == true,
      "text_cfg.hf_model_name": t.hfModelName != nil,
      "text_cfg.pool_type": ![nil, "argmax"].contains(t.poolType),
      "text_cfg.embed_cls": t.embedCls == true, "text_cfg.no_causal_mask": t.noCausalMask == true,
      "text_cfg.final_ln_after_pool": t.finalLnAfterPool == true,
    ].filter(\.value).keys.sorted()
    guard refused.isEmpty else {
      throw ModelError(
        "\(source): \(refused.joined(separator: ", ")) not supported; expected a plain ViT with a causal text tower"
      )
    }
    var (text, vision) = (CLIPTextEncoder.Config(), CLIPVisionEncoder.Config())
    let activation = c.quickGelu == true ? "quick_gelu" : "gelu"
    (text.hiddenAct, vision.hiddenAct) = (activation, activation)
    text.vocabSize = t.vocabSize ?? 49408
    text.maxPositionEmbeddings = t.contextLength ?? 77
    text.hiddenSize = t.width ?? 512
    text.intermediateSize = Int(Double(text.hiddenSize) * (t.mlpRatio ?? 4))
    text.numAttentionHeads = t.heads ?? 8
    text.numHiddenLayers = t.layers ?? 12
    vision.imageSize = v.imageSize ?? 224
    vision.patchSize = v.patchSize ?? 16
    vision.hiddenSize = v.width ?? 768
    vision.intermediateSize = Int(Double(vision.hiddenSize) * (v.mlpRatio ?? 4))
    vision.numAttentionHeads = vision.hiddenSize / max(v.headWidth ?? 64, 1)
    vision.numHiddenLayers = v.layers ?? 12
    self.init(text: text, vision: vision, projectionDim: c.embedDim, naming: .openCLIP)
  }
}
