import Torch

/// Layer normalisation with learnt gain and bias.
public struct LayerNorm {
  let weight, bias: Parameter
  let eps: Double
  /// Takes `weight` and `bias` [size] under `path`.
  public init(_ size: Int, eps: Double, _ path: ParameterPath, _ registry: ModuleRegistry) throws {
    weight = registry.add(try path.parameter("weight", size))
    bias = registry.add(try path.parameter("bias", size))
    self.eps = eps
  }
  /// [..., size] → [..., size].
  public func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
    try x.layerNorm(try weight.value(), try bias.value(), eps: eps)
  }
}

/// Root-mean-square normalisation with learnt gain, statistics in float32.
public struct RMSNorm {
  let weight: Parameter
  let eps: Double
  /// Takes `weight` [size] under `path`.
  public init(_ size: Int, eps: Double, _ path: ParameterPath, _ registry: ModuleRegistry) throws {
    weight = registry.add(try path.parameter("weight", size))
    self.eps = eps
  }
  /// [..., size] → [..., size].
  public func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
    try x.rmsNorm(try weight.value(), eps: eps)
  }
}

/// Group normalisation of [B, C, ...] with learnt gain and bias.
public struct GroupNorm {
  let weight, bias: Parameter
  let groups: Int
  let eps: Double
  /// Takes `weight` and `bias` [channels] under `path`.
  public init(_ groups: Int, _ channels: Int, eps: Double, _ path: ParameterPath, _ registry: ModuleRegistry)
    throws
  {
    weight = registry.add(try path.parameter("weight", channels))
    bias = registry.add(try path.parameter("bias", channels))
    self.groups = groups
    self.eps = eps
  }
  /// [B, C, ...] → [B, C, ...].
  public func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
    try x.groupNorm(groups, try weight.value(), try bias.value(), eps: eps)
  }
}

/// 2-D convolution.
public struct Conv2d {
  let weight: Parameter
  let bias: Parameter?
  let stride, padding: Int
  private let prepared = Prepared<Tensor.PackedConvolution>()
  /// Takes `weight` [out, in, kernel, kernel] and, where `bias` says so, `bias` [out] under `path`.
  public init(
    _ inChannels: Int, _ outChannels: Int, kernel: Int, stride: Int = 1, padding: Int = 0,
    bias: Bool = true, _ path: ParameterPath, _ registry: ModuleRegistry
  ) throws {
    weight = registry.add(try path.parameter("weight", outChannels, inChannels, kernel, kernel))
    self.bias = bias ? registry.add(try path.parameter("bias", outChannels)) : nil
    self.stride = stride
    self.padding = padding
  }
  /// [B, in, H, W] → [B, out, H', W'], in one pass over memory where the processor can and no gradient is wanted.
  ///
  /// - Parameters:
  ///   - norm: applied first, and SiLU after it.
  ///   - upsampled: whether nearest-neighbour upsampling doubles the input's sides before the convolution.
  ///   - addend: added to the result.
  public func callAsFunction(
    _ x: Tensor, norm: GroupNorm? = nil, upsampled: Bool = false, adding addend: Tensor? = nil
  ) throws(TorchError) -> Tensor {
    let weight = try weight.value()
    let bias = try bias?.value()
    let (gain, offset) = (try norm?.weight.value(), try norm?.bias.value())
    let inputs = [x, weight, bias, gain, offset, addend].compactMap { $0 }
    if Self.fuses(x, weight, stride, padding), !(isGradEnabled && inputs.contains(where: \.requiresGrad)) {
      let packed = try prepared.form([weight], x.dtype) { () throws(TorchError) in
        try weight.packedConvolution(upsampled: upsampled)
      }
      let parts = norm.map { (groups: $0.groups, weight: gain, bias: offset, eps: $0.eps) }
      return try x.convolution(packed, bias, norm: parts, adding: addend)
    }
    var y = try norm.map { norm throws(TorchError) in try norm(x).silu() } ?? x
    if upsampled { y = try y.upsampleNearest(2) }
    y = try y.conv2d(weight, bias, stride: stride, padding: padding)
    return if let addend { try addend + y } else { y }
  }

  /// Wider ones are as fast in libtorch, which needs no second form of their weights.
  private static let widest = 128

  private static func fuses(_ x: Tensor, _ weight: Tensor, _ stride: Int, _ padding: Int) -> Bool {
    let (channels, kernel) = (weight.size(1), weight.size(2))
    return x.isFusible && x.dtype == weight.dtype && Tensor.fusesAttention(x.dtype) && stride == 1
      && [1, 3].contains(kernel) && padding == kernel / 2 && channels % 2 == 0
      && max(channels, weight.size(0)) <= widest
  }
}

/// Rows of a table picked by integer ids.
public struct Embedding {
  let weight: Parameter
  /// Takes `weight` [count, size] under `path`.
  public init(_ count: Int, _ size: Int, _ path: ParameterPath, _ registry: ModuleRegistry) throws {
    weight = registry.add(try path.parameter("weight", count, size))
  }
  /// ids [B, N] int64 → [B, N, size].
  public func callAsFunction(_ ids: Tensor) throws(TorchError) -> Tensor {
    let table = try weight.value()
    return try table.indexSelect(0, try ids.reshape(-1)).reshape(ids.shape + [table.size(1)])
  }
  /// The first `count` rows.
  public func rows(_ count: Int) throws(TorchError) -> Tensor { try weight.value()[0..<count] }
}
