import Foundation
import Torch
import TorchNN

/// The encoder of T5 v1.1: relative position bias from the first block, no 1/√d, no padding mask.
///
/// Reference: transformers 5.23.0 T5EncoderModel.
public final class T5Encoder {
  /// Sizes from `config.json`.
  public struct Config: Decodable, Sendable {
    let vocabSize, dModel, dKv, dFf, numLayers, numHeads: Int
    let relativeAttentionNumBuckets: Int?
    let relativeAttentionMaxDistance: Int?
    let layerNormEpsilon: Double?
    let feedForwardProj: String?
  }

  /// The sizes this was built with.
  public let config: Config
  /// Layers and parameters by checkpoint key.
  public let modules = ModuleRegistry()
  private let shared, bias: Embedding
  private let blocks: [Block]
  private let finalNorm: RMSNorm

  /// Builds the encoder and takes every parameter of `folder`.
  public convenience init(folder: URL) throws {
    let config = try ModelFolder.decode(Config.self, folder.appending(path: "config.json"))
    try self.init(config: config, checkpoint: try Checkpoint(folder: folder, names: ["model"]))
  }

  /// Builds the encoder and takes every parameter of `checkpoint`; any key that does not fit is an error.
  public init(config: Config, checkpoint: Checkpoint) throws {
    self.config = config
    let activation = config.feedForwardProj ?? "gated-gelu"
    guard activation == "gated-gelu" else {
      throw ModelError(
        "\(checkpoint.folder.path)/config.json: feed_forward_proj \(activation) is not gated-gelu")
    }
    let (p, c, r) = (checkpoint.root, config, modules)
    let eps = c.layerNormEpsilon ?? 1e-6
    shared = try Embedding(c.vocabSize, c.dModel, p / "shared", r)
    let blockPath = p / "encoder" / "block"
    bias = try Embedding(
      c.relativeAttentionNumBuckets ?? 32, c.numHeads,
      blockPath / 0 / "layer" / 0 / "SelfAttention" / "relative_attention_bias", r)
    blocks = try (0..<c.numLayers).map { try Block(c, eps: eps, blockPath / $0 / "layer", r) }
    finalNorm = try RMSNorm(c.dModel, eps: eps, p / "encoder" / "final_layer_norm", r)
    try checkpoint.finish { $0 == "encoder.embed_tokens.weight" }  // the same tensor under a second name
  }

  /// ids [B, N] int64 → [B, N, d_model]; padding is attended to, as FLUX does.
  public func callAsFunction(_ ids: Tensor) throws -> Tensor {
    var x = try shared(ids)
    let bias = try positionBias(ids.size(1)).to(x.dtype)
    for block in blocks { x = try block(x, bias) }
    return try finalNorm(x)
  }

  /// Attention bias [1, heads, n, n] by bucketed distance.
  ///
  /// Source: transformers 5.23.0 T5Attention._relative_position_bucket, bidirectional: half the buckets a side,
  /// exact up to a quarter, then logarithmic up to the maximal distance (logarithm in float32).
  public func positionBias(_ n: Int) throws -> Tensor {
    let half = (config.relativeAttentionNumBuckets ?? 32) / 2
    let exact = half / 2
    let farthest = Float(config.relativeAttentionMaxDistance ?? 128)
    var buckets: [Int64] = []
    for query in 0..<n {
      for key in 0..<n {
        let distance = abs(key - query)
        var bucket = distance
        if distance >= exact {
          let steps =
            Foundation.log(Float(distance) / Float(exact))
            / Float(Foundation.log(Double(farthest) / Double(exact)))
          bucket = min(half - 1, exact + Int(steps * Float(half - exact)))
        }
        buckets.append(Int64(bucket + (key > query ? half : 0)))
      }
    }
    let ids = try Tensor(buckets, shape: [n, n]).to(modules.parameters[0].tensor.device)
    return try bias(ids).permute(2, 0, 1).unsqueeze(0).contiguous()
  }

  private struct Block {
    let norm1, norm2: RMSNorm
    let qkv, gated: LinearGroup
    let out, down: Linear
    let heads, headSize, hidden: Int
    init(_ c: Config, eps: Double, _ p: ParameterPath, _ r: ModuleRegistry) throws {
      let inner = c.numHeads * c.dKv
      let (a, f) = (p / 0 / "SelfAttention", p / 1 / "DenseReluDense")
      norm1 = try RMSNorm(c.dModel, eps: eps, p / 0 / "layer_norm", r)
      norm2 = try RMSNorm(c.dModel, eps: eps, p / 1 / "layer_norm", r)
      qkv = r.group(try ["q", "k", "v"].map { try Linear(c.dModel, inner, bias: false, a / $0, r) })
      out = try Linear(inner, c.dModel, bias: false, a / "o", r)
      gated = r.group(try ["wi_0", "wi_1"].map { try Linear(c.dModel, c.dFf, bias: false, f / $0, r) })
      down = try Linear(c.dFf, c.dModel, bias: false, f / "wo", r)
      (heads, headSize, hidden) = (c.numHeads, c.dKv, c.dFf)
    }
    func callAsFunction(_ x: Tensor, _ bias: Tensor) throws(TorchError) -> Tensor {
      let s = x.shape
      let qkv = try qkv(try norm1(x)).reshape(s[0], s[1], 3, heads, headSize).permute(2, 0, 3, 1, 4)
      let mixed = try Tensor.attention(try qkv[0], try qkv[1], try qkv[2], mask: bias, scale: 1)
      let x = try x + out(try mixed.transpose(1, 2).reshape(s[0], s[1], heads * headSize))
      let parts = try gated(try norm2(x)).split([hidden, hidden], -1)
      return try x + down(try parts[0].gelu(tanhApproximation: true) * parts[1])
    }
  }
}
