import Torch
import TorchNN

/// How a checkpoint names CLIP's parameters.
enum CLIPNaming {
  /// transformers: `encoder.layers.0.self_attn.q_proj`; query, key and value apart.
  case transformers
  /// open_clip: `transformer.resblocks.0.attn.in_proj_weight`; query, key and value in one matrix.
  case openCLIP
}

/// Sizes that both towers' layers are made of.
struct CLIPLayerShape {
  var size, hidden, heads: Int
  var eps: Double
  /// `quick_gelu` or `gelu`.
  var activation: String

  /// Refuses what the layers do not compute, naming `source`.
  func check(_ source: String) throws(ModelError) {
    guard ["quick_gelu", "gelu"].contains(activation) else {
      throw ModelError("\(source): hidden_act \(activation) is not one of quick_gelu, gelu")
    }
    guard heads > 0, size % heads == 0 else {
      throw ModelError("\(source): width \(size) does not divide into \(heads) heads")
    }
  }
}

/// One transformer layer of either tower: normalisation first, then attention; the same, then the MLP.
///
/// Reference: transformers 5.23.0 CLIPEncoderLayer, open_clip 3.3.0 ResidualAttentionBlock.
struct CLIPLayer {
  private let norm1, norm2: LayerNorm
  private let qkv: LinearGroup
  private let out, fc1, fc2: Linear
  private let heads: Int
  private let quick: Bool

  init(_ s: CLIPLayerShape, _ naming: CLIPNaming, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    let d = s.size
    (heads, quick) = (s.heads, s.activation == "quick_gelu")
    switch naming {
    case .transformers:
      norm1 = try LayerNorm(d, eps: s.eps, p / "layer_norm1", r)
      let attention = p / "self_attn"
      qkv = r.group(try ["q_proj", "k_proj", "v_proj"].map { try Linear(d, d, attention / $0, r) })
      out = try Linear(d, d, attention / "out_proj", r)
      norm2 = try LayerNorm(d, eps: s.eps, p / "layer_norm2", r)
      fc1 = try Linear(d, s.hidden, p / "mlp" / "fc1", r)
      fc2 = try Linear(s.hidden, d, p / "mlp" / "fc2", r)
    case .openCLIP:
      norm1 = try LayerNorm(d, eps: s.eps, p / "ln_1", r)
      let attention = p / "attn"
      qkv = r.group([try Linear(d, 3 * d, names: ("in_proj_weight", "in_proj_bias"), attention, r)])
      out = try Linear(d, d, attention / "out_proj", r)
      norm2 = try LayerNorm(d, eps: s.eps, p / "ln_2", r)
      fc1 = try Linear(d, s.hidden, p / "mlp" / "c_fc", r)
      fc2 = try Linear(s.hidden, d, p / "mlp" / "c_proj", r)
    }
  }

  /// All layers of a tower under the tower's path `p`.
  static func stack(
    _ count: Int, _ shape: CLIPLayerShape, _ naming: CLIPNaming, _ p: ParameterPath, _ r: ModuleRegistry
  ) throws -> [CLIPLayer] {
    let path = naming == .transformers ? p / "encoder" / "layers" : p / "transformer" / "resblocks"
    return try (0..<count).map { try CLIPLayer(shape, naming, path / $0, r) }
  }

  /// x [B, N, size], mask broadcast to [B, heads, N, N] → [B, N, size].
  func callAsFunction(_ x: Tensor, mask: Tensor? = nil) throws(TorchError) -> Tensor {
    let s = x.shape
    let qkv = try qkv(try norm1(x)).reshape(s[0], s[1], 3, heads, s[2] / heads).permute(2, 0, 3, 1, 4)
    let mixed = try Tensor.attention(try qkv[0], try qkv[1], try qkv[2], mask: mask)
    // Sums go into the products' fresh tensors: a pass over memory and an allocation less.
    let attended = try out(try mixed.transpose(1, 2).reshape(s))
    try attended.addInPlace(x)
    let hidden = try fc1(try norm2(attended))
    let result = try fc2(quick ? try hidden.quickGELU() : try hidden.gelu())
    try result.addInPlace(attended)
    return result
  }
}

/// A tower's last product, without bias: transformers stores it as a layer [out, in], open_clip as a matrix
/// [in, out].
struct CLIPProjection {
  private let layer: Linear?
  private let matrix: Parameter?

  /// Takes `name`, with `.weight` in transformers' naming, under `p`.
  init(
    _ inSize: Int, _ outSize: Int, _ naming: CLIPNaming, _ p: ParameterPath, _ name: String,
    _ r: ModuleRegistry
  ) throws {
    switch naming {
    case .transformers: (layer, matrix) = (try Linear(inSize, outSize, bias: false, p / name, r), nil)
    case .openCLIP: (layer, matrix) = (nil, r.add(try p.parameter(name, inSize, outSize)))
    }
  }

  /// [B, in] → [B, out].
  func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
    if let layer { return try layer(x) }
    return try x.matmul(try matrix!.value())
  }
}
