import Foundation
import Torch
import TorchNN

/// CLIP's text transformer, with a projection where the checkpoint holds one.
///
/// Reference: transformers 5.23.0 CLIPTextModel and CLIPTextModelWithProjection; keys with and without the
/// prefix `text_model.` are accepted.
public final class CLIPTextEncoder {
  /// Sizes from `config.json`.
  public struct Config: Decodable, Sendable {
    let vocabSize, hiddenSize, intermediateSize, numHiddenLayers, numAttentionHeads: Int
    let maxPositionEmbeddings: Int
    let hiddenAct: String?
    let layerNormEps: Double?
    let eosTokenId: Int?
    /// Stated by models without a projection too: the key `text_projection.weight` decides.
    let projectionDim: Int?
    let architectures: [String]?
  }

  /// The sizes this was built with.
  public let config: Config
  /// Layers and parameters by checkpoint key.
  public let modules = ModuleRegistry()
  /// Longest sequence the positions cover.
  public var maxLength: Int { config.maxPositionEmbeddings }
  private let tokens, positions: Embedding
  private let layers: [Layer]
  private let finalNorm: LayerNorm
  private let projection: Linear?

  /// Builds the encoder and takes every parameter of `folder`.
  public convenience init(folder: URL) throws {
    let config = try ModelFolder.decode(Config.self, folder.appending(path: "config.json"))
    try self.init(config: config, checkpoint: try Checkpoint(folder: folder, names: ["model"]))
  }

  /// Builds the encoder and takes every parameter of `checkpoint`; any key that does not fit is an error.
  public init(config: Config, checkpoint: Checkpoint) throws {
    self.config = config
    let activation = config.hiddenAct ?? "quick_gelu"
    guard ["quick_gelu", "gelu"].contains(activation) else {
      throw ModelError(
        "\(checkpoint.folder.path)/config.json: hidden_act \(activation) is not one of quick_gelu, gelu")
    }
    let prefixed = checkpoint.keys.contains { $0.hasPrefix("text_model.") }
    let p = prefixed ? checkpoint.root / "text_model" : checkpoint.root
    let (c, r) = (config, modules)
    let eps = c.layerNormEps ?? 1e-5
    tokens = try Embedding(c.vocabSize, c.hiddenSize, p / "embeddings" / "token_embedding", r)
    positions = try Embedding(
      c.maxPositionEmbeddings, c.hiddenSize, p / "embeddings" / "position_embedding", r)
    layers = try (0..<c.numHiddenLayers).map {
      try Layer(c, eps: eps, quick: activation == "quick_gelu", p / "encoder" / "layers" / $0, r)
    }
    finalNorm = try LayerNorm(c.hiddenSize, eps: eps, p / "final_layer_norm", r)
    let projects =
      checkpoint.contains("text_projection.weight")
      || c.architectures?.contains("CLIPTextModelWithProjection") ?? false
    let size = c.projectionDim ?? 512
    projection =
      projects ? try Linear(c.hiddenSize, size, bias: false, checkpoint.root / "text_projection", r) : nil
    // Older exporters wrote the constant 0, 1, 2, … as a tensor.
    try checkpoint.finish { $0.hasSuffix("embeddings.position_ids") }
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
  public func callAsFunction(_ ids: Tensor) throws -> Output {
    let n = ids.size(1)
    guard n <= maxLength else { throw ModelError("\(n) tokens exceed CLIP's \(maxLength) positions") }
    let hidden = try tokens(ids)
    var x = try hidden + positions.rows(n)
    let rows = try Tensor.arange(to: Double(n)).unsqueeze(1)
    let columns = try Tensor.arange(to: Double(n)).unsqueeze(0)
    let masked = try Tensor.full([n, n], -Double.infinity)
    let mask = try columns.greater(rows).select(masked, else: try Tensor.zeros([n, n])).to(x.dtype).to(
      x.device)
    var penultimate = x
    for layer in layers {
      penultimate = x
      x = try layer(x, mask)
    }
    let last = try finalNorm(x)
    // The published configs say eos 2 and mean "the largest id"; the others name the token.
    let scores = config.eosTokenId ?? 2 == 2 ? ids : try ids.equal(Double(config.eosTokenId!)).to(.int64)
    let end = try scores.argmax(-1).reshape(-1, 1, 1).expand(-1, 1, config.hiddenSize)
    let pooled = try last.gather(1, end).squeeze(1)
    return Output(last: last, pooled: pooled, penultimate: penultimate, projected: try projection?(pooled))
  }

  private struct Layer {
    let norm1, norm2: LayerNorm
    let qkv: LinearGroup
    let out, fc1, fc2: Linear
    let heads: Int
    let quick: Bool
    init(_ c: Config, eps: Double, quick: Bool, _ p: ParameterPath, _ r: ModuleRegistry) throws {
      let d = c.hiddenSize
      norm1 = try LayerNorm(d, eps: eps, p / "layer_norm1", r)
      norm2 = try LayerNorm(d, eps: eps, p / "layer_norm2", r)
      qkv = r.group(try ["q_proj", "k_proj", "v_proj"].map { try Linear(d, d, p / "self_attn" / $0, r) })
      out = try Linear(d, d, p / "self_attn" / "out_proj", r)
      fc1 = try Linear(d, c.intermediateSize, p / "mlp" / "fc1", r)
      fc2 = try Linear(c.intermediateSize, d, p / "mlp" / "fc2", r)
      heads = c.numAttentionHeads
      self.quick = quick
    }
    func callAsFunction(_ x: Tensor, _ mask: Tensor) throws(TorchError) -> Tensor {
      let s = x.shape
      let qkv = try qkv(try norm1(x)).reshape(s[0], s[1], 3, heads, s[2] / heads).permute(2, 0, 3, 1, 4)
      let mixed = try Tensor.attention(try qkv[0], try qkv[1], try qkv[2], mask: mask)
      let x = try x + out(try mixed.transpose(1, 2).reshape(s))
      let hidden = try fc1(try norm2(x))
      return try x + fc2(quick ? try hidden.quickGELU() : try hidden.gelu())
    }
  }
}
