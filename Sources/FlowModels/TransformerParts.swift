import Foundation
import Torch
import TorchNN

/// Sizes of an attention.
struct BlockShape {
  let heads, headSize: Int
  var width: Int { heads * headSize }
}

/// `LayerNorm(x)·(1 + scale) + shift`, without learnt gain.
func modulated(_ x: Tensor, shift: Tensor, scale: Tensor) throws(TorchError) -> Tensor {
  if x.isFusible { return try x.modulatedNorm(shift: shift, scale: scale, eps: 1e-6) }
  return try shift.adding(product: try x.layerNorm(eps: 1e-6), try scale + 1)
}

/// `x + gate·y`.
func gated(_ x: Tensor, _ gate: Tensor, _ y: Tensor) throws(TorchError) -> Tensor {
  try x.isFusible ? x.adding(gate: gate, y) : x.adding(product: gate, y)
}

/// Source: black-forest-labs/flux@802fb47 src/flux/modules/layers.py#L52-L60.
struct MLPEmbedder {
  let linear1, linear2: Linear
  init(_ inSize: Int, _ size: Int, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    linear1 = try Linear(inSize, size, p / "linear_1", r)
    linear2 = try Linear(size, size, p / "linear_2", r)
  }
  /// [B, inSize] → [B, size].
  func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor { try linear2(linear1(x).silu()) }
}

/// Gains of the query and key norms [2, 1, headSize], applied together.
struct QueryKeyNorm {
  let query, key: Parameter
  init(_ size: Int, _ queryName: String, _ keyName: String, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    query = r.add(try (p / queryName).parameter("weight", size))
    key = r.add(try (p / keyName).parameter("weight", size))
  }
  /// [2, D] in float32.
  func gains() throws(TorchError) -> Tensor {
    try Tensor.stack([try query.value(), try key.value()]).to(.float32)
  }
}

/// Two layers with a tanh-GELU between, four times as wide inside.
struct FeedForward {
  let proj, out: Linear
  init(_ size: Int, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    proj = try Linear(size, 4 * size, p / "net" / 0 / "proj", r)
    out = try Linear(4 * size, size, p / "net" / 2, r)
  }
  func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
    try out(proj(x).gelu(tanhApproximation: true))
  }
}

/// Attention of every stream's tokens over those of all streams; queries and keys normalised and rotated in float32.
///
/// - Parameters:
///   - projections: [B, Sᵢ, 3·H·D + tailᵢ] a stream: queries, keys, values, then what goes through a tanh-GELU.
///   - norms: of each stream's queries and keys; nil for none.
///   - rotation: [ΣSᵢ, D] float32, cosines and sines in turn; nil for none.
/// - Returns: [B, Sᵢ, H·D + tailᵢ] a stream, in its dtype.
func jointAttention(
  _ projections: [Tensor], norms: [QueryKeyNorm?], rotation: Tensor?, _ shape: BlockShape,
  _ kernel: AttentionKernel
) throws(TorchError) -> [Tensor] {
  var gains: [Tensor] = []
  for case let norm? in norms { gains.append(try norm.gains()) }
  let tokens = projections.reduce(0) { $0 + $1.size(1) }
  if kernel.isFused(projections[0]) {
    return try Tensor.jointAttention(
      projections, gains: gains, rotation: rotation, heads: shape.heads, headSize: shape.headSize, eps: 1e-6)
  }
  var (pairs, values): ([Tensor], [Tensor]) = ([], [])
  for (i, x) in projections.enumerated() {
    let heads = try x.narrow(-1, 0, 3 * shape.width)
      .reshape(x.size(0), x.size(1), 3, shape.heads, shape.headSize)
    var qk = try heads.narrow(2, 0, 2).to(.float32)
    if !gains.isEmpty { qk = try qk.rmsNorm(nil, eps: 1e-6) * gains[i].unsqueeze(1) }
    pairs.append(qk)
    values.append(try heads.select(2, 2))
  }
  var qk = try Tensor.cat(pairs, 1)
  if let rotation {
    let angles = try rotation.reshape([tokens, 1, 1, shape.headSize / 2, 2]).viewAsComplex()
    let complex = try qk.reshape([qk.size(0), tokens, 2, shape.heads, shape.headSize / 2, 2]).viewAsComplex()
    qk = try (complex * angles).viewAsReal().reshape(qk.shape)
  }
  qk = try qk.to(projections[0].dtype).permute(2, 0, 3, 1, 4).contiguous()
  let v = try Tensor.cat(values, 1).transpose(1, 2).contiguous()
  let mixed = try attention(try qk[0], try qk[1], v, kernel: kernel).split(projections.map { $0.size(1) }, 1)
  var outputs: [Tensor] = []
  for (x, part) in zip(projections, mixed) {
    let tail = try x.narrow(-1, 3 * shape.width, x.size(2) - 3 * shape.width)
    outputs.append(
      tail.size(-1) == 0 ? part : try Tensor.cat([part, try tail.gelu(tanhApproximation: true)], -1))
  }
  return outputs
}

extension AttentionKernel {
  /// Whether one pass does norms, rotation and attention.
  func isFused(_ x: Tensor) -> Bool { self == .auto && x.isFusible && Tensor.fusesAttention(x.dtype) }
}

/// The embedding of time, guidance and pooled text that modulates every block.
///
/// Reference: diffusers 0.42.1 CombinedTimestep(Guidance)TextProjEmbeddings.
struct TimeTextEmbedding {
  private let time, text: MLPEmbedder
  private let guidance: MLPEmbedder?

  init(_ width: Int, pooledSize: Int, guidance: Bool, _ p: ParameterPath, _ r: ModuleRegistry) throws {
    time = try MLPEmbedder(256, width, p / "timestep_embedder", r)
    self.guidance = guidance ? try MLPEmbedder(256, width, p / "guidance_embedder", r) : nil
    text = try MLPEmbedder(pooledSize, width, p / "text_embedder", r)
  }

  /// [B'  ≥ B, width] in `dtype`, rows padded to a multiple of 32.
  ///
  /// Padding: float32 products with few rows depend on their number in the last bit, and rollout and replay
  /// batches differ in size; the ratio must be exactly 1.
  ///
  /// - Parameters:
  ///   - time, guidance: in 0 … 1000, [B] float32.
  ///   - pooled: [B, pooledSize].
  func callAsFunction(
    _ time: Tensor, guidance: Tensor?, pooled: Tensor, dtype: DType
  ) throws(TorchError) -> Tensor {
    func padded(_ t: Tensor) throws(TorchError) -> Tensor {
      let extra = (32 - t.size(0) % 32) % 32
      return extra == 0 ? t : try t.pad(t.rank == 1 ? [0, extra] : [0, 0, 0, extra])
    }
    var sum = try self.time(try sinusoid(try padded(time)).to(dtype))
    if let embedder = self.guidance, let guidance {
      sum = try sum + embedder(try sinusoid(try padded(guidance)).to(dtype))
    }
    return try sum + text(try padded(pooled).to(dtype))
  }

  /// [B] → [B, 256]: cosines then sines, period up to 10,000.
  private func sinusoid(_ t: Tensor) throws(TorchError) -> Tensor {
    let frequencies = try (Tensor.arange(to: 128) * (-log(10000.0)) / 128).exp().to(t.device)
    let angles = try t.unsqueeze(1) * frequencies.unsqueeze(0)
    return try Tensor.cat([try angles.cos(), try angles.sin()], -1)
  }
}
