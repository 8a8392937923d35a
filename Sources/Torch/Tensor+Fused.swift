import CTorch

/// Operations in one pass over memory where libtorch needs several, with gradients; each has a plain form that tests
/// compare it with. Work is cut by shapes alone: equal inputs give equal bits whatever the number of threads.
extension Tensor {
  /// Whether ``modulatedNorm(shift:scale:eps:)``, ``adding(gate:_:)`` and
  /// ``jointAttention(_:gains:rotation:heads:headSize:eps:)`` take this tensor: float32 or bfloat16 on the CPU.
  public var isFusible: Bool { ctorch_fusible(handle) }

  /// Whether the processor has the small matrix products that joint attention is made of.
  public static func fusesAttention(_ dtype: DType) -> Bool { ctorch_attention_fusible(dtype.rawValue) }

  /// `LayerNorm(self)·(1 + scale) + shift` over the last dimension, computed in float32.
  ///
  /// - Parameters: self [B, S, D]; shift, scale [B, 1, D], all of one dtype.
  public func modulatedNorm(shift: Tensor, scale: Tensor, eps: Double) throws(TorchError) -> Tensor {
    try produce("modulatedNorm", [self, shift, scale]) {
      ctorch_modulated_norm($0, handle, shift.handle, scale.handle, eps)
    }
  }

  /// `self + gate·y`, computed in float32: self and y [B, S, D], gate [B, 1, D].
  public func adding(gate: Tensor, _ y: Tensor) throws(TorchError) -> Tensor {
    try produce("gatedAdd", [self, gate, y]) { ctorch_gated_add($0, handle, gate.handle, y.handle) }
  }

  /// Attention of every stream's tokens over those of all streams, `softmax(q·kᵀ/√D)·v`, scores in float32.
  ///
  /// - Parameters:
  ///   - projections: [B, Sᵢ, 3·H·D + tailᵢ] a stream: queries, keys and values, each head by head, then what goes
  ///     through a tanh-GELU.
  ///   - gains: [2, D] a stream, of the RMS norms of queries and keys; empty for none.
  ///   - rotation: [ΣSᵢ, D] float32, cosine and sine of each pair's angle in turn, tokens in the streams' order.
  ///   - eps: of the norms.
  /// - Returns: [B, Sᵢ, H·D + tailᵢ] a stream: mixed values, then the GELU's.
  public static func jointAttention(
    _ projections: [Tensor], gains: [Tensor], rotation: Tensor?, heads: Int, headSize: Int, eps: Double
  ) throws(TorchError) -> [Tensor] {
    var outputs = [ctorch_tensor?](repeating: nil, count: projections.count)
    let status = withHandles(projections) { x, count in
      withHandles(gains) { norms, _ in
        ctorch_joint_attention(
          &outputs, x, gains.isEmpty ? nil : norms, count, rotation?.handle, Int64(heads), Int64(headSize),
          eps)
      }
    }
    try check("jointAttention", projections + gains, status)
    return outputs.map { Tensor(owning: $0!) }
  }

  /// One layer's low-rank factors in a joined product.
  public struct Adapter {
    /// A [rank, in] and B [rows, rank], float32 leaves.
    public let down, up: Tensor
    let scale: Double
    let start: Int
    /// Adds `scale·B·A` from row `start` of the product's output on.
    public init(down: Tensor, up: Tensor, scale: Double, start: Int) {
      (self.down, self.up, self.scale, self.start) = (down, up, scale, start)
    }
  }

  /// `x·Wᵀ + b + (x·downᵀ)·upᵀ`, with gradients to self and to the adapters' leaves.
  ///
  /// - Parameters:
  ///   - weight: [out, in], frozen; `bias` [out].
  ///   - down, up: the factors of all adapters side by side in self's dtype, [R, in] and [out, R]: `up` holds
  ///     `scale·B` of each in its own rows and columns, zeros elsewhere.
  public func adaptedLinear(
    _ weight: Tensor, _ bias: Tensor?, down: Tensor, up: Tensor, _ adapters: [Adapter]
  ) throws(TorchError) -> Tensor {
    try produce("adaptedLinear", [self, weight, bias, down, up]) { out in
      withHandles(adapters.map(\.down)) { downs, count in
        withHandles(adapters.map(\.up)) { ups, _ in
          withInts(adapters.map(\.start)) { starts, _ in
            ctorch_adapted_linear(
              out, handle, weight.handle, bias?.handle, down.handle, up.handle, downs, ups,
              adapters.map(\.scale), starts, count)
          }
        }
      }
    }
  }

  /// A frozen bfloat16 layer on the CPU, with or without adapters, laid out for the processor's matrix units.
  public struct PackedLinear {
    let parts: [Tensor?]
  }

  /// Lays `self` [out, in] and its adapters' joined factors out; all sizes must be even.
  public func packedLinear(_ bias: Tensor?, down: Tensor?, up: Tensor?) throws(TorchError) -> PackedLinear {
    var parts = [ctorch_tensor?](repeating: nil, count: 5)
    let status = ctorch_pack_linear(&parts, handle, bias?.handle, down?.handle, up?.handle)
    try check("packedLinear", [self, bias, down, up], status)
    return PackedLinear(parts: parts.map { $0.map(Tensor.init(owning:)) })
  }

  /// ``adaptedLinear(_:_:down:up:_:)`` from a layout: one pass over x, sums in float32 and rounded once.
  public func linear(_ packed: PackedLinear, _ adapters: [Adapter]) throws(TorchError) -> Tensor {
    try produce("packedLinear", [self]) { out in
      withExtendedLifetime(packed.parts) {
        withHandles(adapters.map(\.down)) { downs, count in
          withHandles(adapters.map(\.up)) { ups, _ in
            withInts(adapters.map(\.start)) { starts, _ in
              ctorch_packed_linear(
                out, handle, packed.parts.map { $0?.handle }, downs, ups, adapters.map(\.scale), starts, count
              )
            }
          }
        }
      }
    }
  }

  /// The same of layers that are trained themselves, from a layout of their values in bfloat16.
  ///
  /// - Parameters:
  ///   - layers: weights [rows, in] and biases [rows], float32 leaves; all have a bias or none has.
  public func linear(
    _ packed: PackedLinear, trained layers: [(weight: Tensor, bias: Tensor?)]
  ) throws(TorchError) -> Tensor {
    var (starts, next): ([Int], Int) = ([], 0)
    for layer in layers {
      starts.append(next)
      next += layer.weight.size(0)
    }
    let biases = layers.compactMap(\.bias)
    return try produce("packedLinear", [self]) { out in
      withExtendedLifetime(packed.parts) {
        withHandles(layers.map(\.weight)) { weights, count in
          withHandles(biases) { biases, given in
            withInts(starts) { starts, _ in
              ctorch_packed_trained_linear(
                out, handle, packed.parts.map { $0?.handle }, weights, given == count ? biases : nil, starts,
                count)
            }
          }
        }
      }
    }
  }

  /// A weight [O, C, k, k] laid out for ``convolution(_:_:norm:adding:)``.
  public struct PackedConvolution {
    let layout: Tensor
    let channels: Int
  }

  /// Lays `self` [O, C, k, k] out for convolutions of stride 1 and padding k/2: k is 1 or 3, C even.
  ///
  /// - Parameter upsampled: (k = 3) the input's sides are doubled by nearest-neighbour upsampling first: each pixel of
  ///   four then has 2 × 2 weights of its own, sums of these.
  public func packedConvolution(upsampled: Bool = false) throws(TorchError) -> PackedConvolution {
    let layout = try produce("packedConvolution", [self]) { ctorch_pack_convolution($0, handle, upsampled) }
    return PackedConvolution(layout: layout, channels: size(0))
  }

  /// `conv(silu(groupNorm(self))) + addend` in one pass, on the CPU and without gradients; all arithmetic but that of
  /// bfloat16 products' factors is float32.
  ///
  /// - Parameters:
  ///   - packed: of self's dtype; `bias` [O].
  ///   - norm: groups, gain and bias [C]; nil for neither norm nor SiLU.
  ///   - addend: of the result's shape and dtype.
  /// - Returns: [B, O, H, W], or [B, O, 2·H, 2·W], with channels last in memory, as is best for self.
  public func convolution(
    _ packed: PackedConvolution, _ bias: Tensor?,
    norm: (groups: Int, weight: Tensor?, bias: Tensor?, eps: Double)? = nil, adding addend: Tensor? = nil
  ) throws(TorchError) -> Tensor {
    try produce("convolution", [self, packed.layout, bias, norm?.weight, norm?.bias, addend]) {
      ctorch_convolution(
        $0, handle, packed.layout.handle, bias?.handle, Int64(packed.channels), Int64(norm?.groups ?? 0),
        norm?.weight?.handle, norm?.bias?.handle, norm?.eps ?? 0, addend?.handle)
    }
  }

  /// Grows with every change in place: equal versions of one tensor hold equal values.
  public var version: Int { Int(ctorch_version(handle)) }
}
