import Foundation
import Torch
import TorchNN

/// CLIP's text transformer, with a projection where the checkpoint holds one.
///
/// Reference: transformers 5.23.0 CLIPTextModel and CLIPTextModelWithProjection; keys with and without the
/// prefix `text_model.` are accepted. ``CLIPModel`` builds it from open_clip's names too.
public final class CLIPTextEncoder {
  /// Sizes from `config.json`, or from the `text_config` of a ``CLIPModel``; absent fields take the
  /// reference's defaults.
  public struct Config: Decodable, Sendable {
    var vocabSize = 49408
    var hiddenSize = 512
    var intermediateSize = 2048
    var numHiddenLayers = 12
    var numAttentionHeads = 8
    var maxPositionEmbeddings = 77
    var hiddenAct = "quick_gelu"
    var layerNormEps = 1e-5
    /// The published value 2 means "the largest id".
    var eosTokenId = 2
    /// Stated by models without a projection too: the key `text_projection.weight` decides.
    var projectionDim = 512
    var architectures: [String] = []

    init() {}

    enum CodingKeys: String, CodingKey {
      case vocabSize, hiddenSize, intermediateSize, numHiddenLayers, numAttentionHeads, maxPositionEmbeddings
      case hiddenAct, layerNormEps, eosTokenId, projectionDim, architectures
    }

    /// Reads snake-case keys converted by the decoder.
    public init(from decoder: any Decoder) throws {
      let c = try decoder.container(keyedBy: CodingKeys.self)
      try c.read(.vocabSize, into: &vocabSize)
      try c.read(.hiddenSize, into: &hiddenSize)
      try c.read(.intermediateSize, into: &intermediateSize)
      try c.read(.numHiddenLayers, into: &numHiddenLayers)
      try c.read(.numAttentionHeads, into: &numAttentionHeads)
      try c.read(.maxPositionEmbeddings, into: &maxPositionEmbeddings)
      try c.read(.hiddenAct, into: &hiddenAct)
      try c.read(.layerNormEps, into: &layerNormEps)
      try c.read(.eosTokenId, into: &eosTokenId)
      try c.read(.projectionDim, into: &projectionDim)
      try c.read(.architectures, into: &architectures)
    }

    var layers: CLIPLayerShape {
      CLIPLayerShape(
        size: hiddenSize, hidden: intermediateSize, heads: numAttentionHeads, eps: layerNormEps,
        activation: hiddenAct)
    }
  }

  /// The sizes this was built with.
  public let config: Config
  /// Layers and parameters by checkpoint key.
  public let modules: ModuleRegistry
  /// Longest sequence the positions cover.
  public var maxLength: Int { config.maxPositionEmbeddings }
  private let tokens: Embedding
  private let positions: Parameter
  private let layers: [CLIPLayer]
  private let finalNorm: LayerNorm
  private let projection: CLIPProjection?

  /// Builds the encoder and takes every parameter of `folder`; any key that does not fit is an error.
  public convenience init(folder: URL, dtype: DType = .float32, device: Device = .cpu) throws {
    let config = try ModelFolder.decode(Config.self, folder.appending(path: "config.json"))
    try self.init(
      config: config,
      checkpoint: try Checkpoint(folder: folder, names: ["model"], dtype: dtype, device: device))
  }

  /// Builds the encoder and takes every parameter of `checkpoint`; any key that does not fit is an error.
  public convenience init(config: Config, checkpoint: Checkpoint) throws {
    try config.layers.check("\(checkpoint.folder.path)/config.json")
    let projects =
      checkpoint.contains("text_projection.weight")
      || config.architectures.contains("CLIPTextModelWithProjection")
    let prefixed = checkpoint.keys.contains { $0.hasPrefix("text_model.") }
    try self.init(
      config, .transformers, projectionSize: projects ? config.projectionDim : nil, checkpoint.root,
      tower: prefixed ? checkpoint.root / "text_model" : checkpoint.root, ModuleRegistry())
    // Older exporters wrote the constant 0, 1, 2, … as a tensor.
    try checkpoint.finish { $0.hasSuffix("embeddings.position_ids") }
  }

  /// Takes the tower's parameters under `tower` and the projection's under `root`.
  init(
    _ c: Config, _ naming: CLIPNaming, projectionSize: Int?, _ root: ParameterPath, tower p: ParameterPath,
    _ r: ModuleRegistry
  ) throws {
    (config, modules) = (c, r)
    switch naming {
    case .transformers:
      tokens = try Embedding(c.vocabSize, c.hiddenSize, p / "embeddings" / "token_embedding", r)
      positions = r.add(
        try (p / "embeddings" / "position_embedding").parameter(
          "weight", c.maxPositionEmbeddings, c.hiddenSize))
    case .openCLIP:
      tokens = try Embedding(c.vocabSize, c.hiddenSize, p / "token_embedding", r)
      positions = r.add(try p.parameter("positional_embedding", c.maxPositionEmbeddings, c.hiddenSize))
    }
    layers = try CLIPLayer.stack(c.numHiddenLayers, c.layers, naming, p, r)
    finalNorm = try LayerNorm(
      c.hiddenSize, eps: c.layerNormEps, p / (naming == .transformers ? "final_layer_norm" : "ln_final"), r)
    projection = try projectionSize.map {
      try CLIPProjection(c.hiddenSize, $0, naming, root, "text_projection", r)
    }
  }

  /// What one pass gives.
  public struct Output {
    /// Normalised last hidden state [B, N, hidden].
    public let last: Tensor
    /// The same at the end-of-text token [B, hidden]: FLUX's pooled embedding.
    public let pooled: Tensor
    /// Hidden state before the last layer [B, N, hidden].
    public let penultimate: Tensor
    /// The pooled embedding, projected [B, projection_dim]: SD3's; nil for a model without projection.
    public let projected: Tensor?
  }

  /// ids [B, N] int64 → hidden states.
  ///
  /// - Parameter attentionMask: [B, N], 0 for tokens that no other attends to. Padding after the end token
  ///   needs none: attention looks back only.
  /// - Throws: ``ModelError`` for more tokens than positions.
  public func callAsFunction(_ ids: Tensor, attentionMask: Tensor? = nil) throws -> Output {
    let n = ids.size(1)
    guard n <= maxLength else { throw ModelError("\(n) tokens exceed CLIP's \(maxLength) positions") }
    var x = try tokens(ids) + positions.value()[0..<n]
    let rows = try Tensor.arange(to: Double(n)).unsqueeze(1)
    let columns = try Tensor.arange(to: Double(n)).unsqueeze(0)
    var hidden = try columns.greater(rows)
    if let attentionMask {
      let padding = try attentionMask.to(.cpu).equal(0).reshape(-1, 1, 1, n)
      hidden = try hidden.logicalOr(padding)
    }
    let shape = hidden.shape
    let mask = try hidden.select(try Tensor.full(shape, -Double.infinity), else: try Tensor.zeros(shape))
      .to(x.dtype).to(x.device)
    var penultimate = x
    for layer in layers {
      penultimate = x
      x = try layer(x, mask: mask)
    }
    let last = try finalNorm(x)
    // The published configs say eos 2 and mean "the largest id"; the others name the token.
    let scores = config.eosTokenId == 2 ? ids : try ids.equal(Double(config.eosTokenId)).to(.int64)
    let end = try scores.argmax(-1).reshape(-1, 1, 1).expand(-1, 1, config.hiddenSize)
    let pooled = try last.gather(1, end).squeeze(1)
    return Output(last: last, pooled: pooled, penultimate: penultimate, projected: try projection?(pooled))
  }
}
