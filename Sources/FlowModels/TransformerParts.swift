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
  try shift.adding(product: try x.layerNorm(eps: 1e-6), try scale + 1)
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
  /// [B, S, 2, H, D] → the same in float32, normalised over D.
  func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
    let gains = try Tensor.stack([try query.value(), try key.value()]).to(.float32).unsqueeze(1)
    return try x.to(.float32).rmsNorm(nil, eps: 1e-6) * gains
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

/// Attends with float32 queries and keys [B, S, 2, H, D]: [B, S, H·D] in `values`' dtype.
///
/// - Parameter values: [B, S, H, D].
func attend(
  _ queriesKeys: Tensor, _ values: Tensor, _ kernel: AttentionKernel
) throws(TorchError) -> Tensor {
  let qk = try queriesKeys.to(values.dtype).permute(2, 0, 3, 1, 4).contiguous()
  return try attention(try qk[0], try qk[1], try values.transpose(1, 2).contiguous(), kernel: kernel)
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
