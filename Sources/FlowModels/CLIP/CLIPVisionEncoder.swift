import Torch
import TorchNN

/// CLIP's vision transformer: patches and a class token, whose last state is projected.
///
/// Reference: transformers 5.23.0 CLIPVisionModel, open_clip 3.3.0 VisionTransformer. ``CLIPModel`` builds
/// it.
public final class CLIPVisionEncoder {
  /// Sizes from the `vision_config` of a ``CLIPModel``; absent fields take the reference's defaults.
  public struct Config: Decodable, Sendable {
    var hiddenSize = 768
    var intermediateSize = 3072
    var numHiddenLayers = 12
    var numAttentionHeads = 12
    var numChannels = 3
    /// Pixels of a side of the square image, and of a patch.
    var imageSize = 224
    var patchSize = 32
    var hiddenAct = "quick_gelu"
    var layerNormEps = 1e-5

    init() {}

    enum CodingKeys: String, CodingKey {
      case hiddenSize, intermediateSize, numHiddenLayers, numAttentionHeads, numChannels, imageSize
      case patchSize, hiddenAct, layerNormEps
    }

    /// Reads snake-case keys converted by the decoder.
    public init(from decoder: any Decoder) throws {
      let c = try decoder.container(keyedBy: CodingKeys.self)
      try c.read(.hiddenSize, into: &hiddenSize)
      try c.read(.intermediateSize, into: &intermediateSize)
      try c.read(.numHiddenLayers, into: &numHiddenLayers)
      try c.read(.numAttentionHeads, into: &numAttentionHeads)
      try c.read(.numChannels, into: &numChannels)
      try c.read(.imageSize, into: &imageSize)
      try c.read(.patchSize, into: &patchSize)
      try c.read(.hiddenAct, into: &hiddenAct)
      try c.read(.layerNormEps, into: &layerNormEps)
    }

    var layers: CLIPLayerShape {
      CLIPLayerShape(
        size: hiddenSize, hidden: intermediateSize, heads: numAttentionHeads, eps: layerNormEps,
        activation: hiddenAct)
    }
    /// Patches along a side.
    var grid: Int { imageSize / patchSize }
  }

  /// The sizes this was built with.
  public let config: Config
  /// Pixels of a side of the images it takes.
  public var imageSize: Int { config.imageSize }
  private let patches: Conv2d
  private let classToken, positions: Parameter
  private let preNorm, postNorm: LayerNorm
  private let layers: [CLIPLayer]
  private let projection: CLIPProjection

  /// Takes the tower's parameters under `tower` and transformers' projection under `root`.
  init(
    _ c: Config, _ naming: CLIPNaming, projectionSize: Int, _ root: ParameterPath, tower p: ParameterPath,
    _ r: ModuleRegistry
  ) throws {
    config = c
    let (d, places) = (c.hiddenSize, c.grid * c.grid + 1)
    func convolution(_ path: ParameterPath) throws -> Conv2d {
      try Conv2d(c.numChannels, d, kernel: c.patchSize, stride: c.patchSize, bias: false, path, r)
    }
    switch naming {
    case .transformers:
      let e = p / "embeddings"
      classToken = r.add(try e.parameter("class_embedding", d))
      patches = try convolution(e / "patch_embedding")
      positions = r.add(try (e / "position_embedding").parameter("weight", places, d))
      preNorm = try LayerNorm(d, eps: c.layerNormEps, p / "pre_layrnorm", r)  // so spelt in the files
      postNorm = try LayerNorm(d, eps: c.layerNormEps, p / "post_layernorm", r)
      projection = try CLIPProjection(d, projectionSize, naming, root, "visual_projection", r)
    case .openCLIP:
      classToken = r.add(try p.parameter("class_embedding", d))
      patches = try convolution(p / "conv1")
      positions = r.add(try p.parameter("positional_embedding", places, d))
      preNorm = try LayerNorm(d, eps: c.layerNormEps, p / "ln_pre", r)
      postNorm = try LayerNorm(d, eps: c.layerNormEps, p / "ln_post", r)
      projection = try CLIPProjection(d, projectionSize, naming, p, "proj", r)
    }
    layers = try CLIPLayer.stack(c.numHiddenLayers, c.layers, naming, p, r)
  }

  /// Most bytes of float32 that a pass over `count` images holds beside them.
  public func passBytes(_ count: Int) -> Int {
    // In the MLP: what goes around it and its input, then the hidden layer and three steps of its activation.
    let places = count * (config.grid * config.grid + 1)
    return 4 * places * (2 * config.hiddenSize + 4 * config.intermediateSize)
  }

  /// Normalised images [B, channels, size, size] → projected embedding [B, projection_dim].
  ///
  /// - Throws: ``ModelError`` for images of another size.
  public func callAsFunction(_ pixels: Tensor) throws -> Tensor {
    let s = pixels.shape
    guard s.count == 4, s[1] == config.numChannels, s[2] == imageSize, s[3] == imageSize else {
      throw ModelError(
        "images \(s): CLIP's vision tower takes [B, \(config.numChannels), \(imageSize), \(imageSize)]")
    }
    let d = config.hiddenSize
    let cells = try patches(pixels).reshape(s[0], d, config.grid * config.grid).transpose(1, 2)
    let first = try classToken.value().reshape(1, 1, d).expand(s[0], 1, d)
    var x = try preNorm(try Tensor.cat([first, cells], 1) + positions.value())
    for layer in layers { x = try layer(x) }
    return try projection(try postNorm(try x.select(1, 0)))
  }
}
