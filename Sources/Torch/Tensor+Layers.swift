import CTorch

extension Tensor {
  /// `x·Wᵀ + b`: [..., in] → [..., out] with `weight` [out, in].
  public func linear(_ weight: Tensor, _ bias: Tensor? = nil) throws(TorchError) -> Tensor {
    try produce("linear", [self, weight, bias]) { ctorch_linear($0, handle, weight.handle, bias?.handle) }
  }
  /// Layer normalisation of the last dimension.
  public func layerNorm(_ weight: Tensor? = nil, _ bias: Tensor? = nil, eps: Double) throws(TorchError)
    -> Tensor
  {
    try produce("layerNorm", [self, weight, bias]) {
      ctorch_layer_norm($0, handle, weight?.handle, bias?.handle, eps)
    }
  }
  /// Group normalisation of [B, C, ...].
  public func groupNorm(
    _ groups: Int, _ weight: Tensor?, _ bias: Tensor?, eps: Double
  ) throws(TorchError) -> Tensor {
    try produce("groupNorm", [self, weight, bias]) {
      ctorch_group_norm($0, handle, Int64(groups), weight?.handle, bias?.handle, eps)
    }
  }
  /// Root-mean-square normalisation of the last dimension, statistics in float32.
  public func rmsNorm(_ weight: Tensor?, eps: Double) throws(TorchError) -> Tensor {
    try produce("rmsNorm", [self, weight]) { ctorch_rms_norm($0, handle, weight?.handle, eps) }
  }
  /// 2-D convolution of [B, C, H, W] with `weight` [O, C, kh, kw].
  public func conv2d(
    _ weight: Tensor, _ bias: Tensor?, stride: Int = 1, padding: Int = 0
  ) throws(TorchError) -> Tensor {
    try produce("conv2d", [self, weight, bias]) {
      ctorch_conv2d($0, handle, weight.handle, bias?.handle, Int64(stride), Int64(padding))
    }
  }
  /// Nearest-neighbour upsampling of [B, C, H, W] by `factor`.
  public func upsampleNearest(_ factor: Int) throws(TorchError) -> Tensor {
    try produce("upsampleNearest", [self]) { ctorch_upsample_nearest($0, handle, Double(factor)) }
  }
  /// `softmax(q·kᵀ·scale + mask)·v` for q, k, v [B, H, S, D] by libtorch's own kernels.
  ///
  /// - Parameter scale: nil for 1/√D.
  public static func attention(
    _ q: Tensor, _ k: Tensor, _ v: Tensor, mask: Tensor? = nil, scale: Double? = nil
  ) throws(TorchError) -> Tensor {
    try produce("attention", [q, k, v, mask]) {
      ctorch_attention($0, q.handle, k.handle, v.handle, mask?.handle, scale ?? 0)
    }
  }
  /// `beta·self + alpha·(b @ c)` for batches of matrices.
  public func baddbmm(
    _ b: Tensor, _ c: Tensor, beta: Double = 1, alpha: Double = 1
  ) throws(TorchError) -> Tensor {
    try produce("baddbmm", [self, b, c]) { ctorch_baddbmm($0, handle, b.handle, c.handle, beta, alpha) }
  }
  /// `self + alpha·(b @ c)` for matrices.
  public func addmm(_ b: Tensor, _ c: Tensor, alpha: Double = 1) throws(TorchError) -> Tensor {
    try produce("addmm", [self, b, c]) { ctorch_addmm($0, handle, b.handle, c.handle, alpha) }
  }
  /// Real 2-D Fourier transform of the last two dimensions, zero-padded or cut to `height` × `width`.
  public func rfft2(_ height: Int, _ width: Int) throws(TorchError) -> Tensor {
    try produce("rfft2", [self]) { ctorch_rfft2($0, handle, Int64(height), Int64(width)) }
  }
  /// Inverse of ``rfft2(_:_:)``.
  public func irfft2(_ height: Int, _ width: Int) throws(TorchError) -> Tensor {
    try produce("irfft2", [self]) { ctorch_irfft2($0, handle, Int64(height), Int64(width)) }
  }
}

extension Tensor {
  /// Rows of a matrix as one-byte numbers and one scale each: `self ≈ scales · codes`.
  ///
  /// int8: codes are integers in −127 … 127, so that every error is at most half the row's scale. float8:
  /// values relative to 448, so that every error is at most 1/16 of the value, or 2⁻¹⁰ of the scale where
  /// that is larger.
  ///
  /// - Parameter dtype: `.int8` or `.float8`.
  /// - Returns: codes like `self`, and scales [rows] in float32: the row's largest magnitude by the type's; 0
  ///   for rows of zeros.
  public func quantisedRows(_ dtype: DType) throws(TorchError) -> (codes: Tensor, scales: Tensor) {
    var codes: ctorch_tensor?
    var scales: ctorch_tensor?
    try check("quantisedRows", [self], ctorch_quantise_rows(&codes, &scales, handle, dtype.rawValue))
    return (Tensor(owning: codes!), Tensor(owning: scales!))
  }
  /// `scales · self` in `dtype`, rounded once: what ``quantisedRows(_:)`` stands for.
  public func dequantisedRows(_ scales: Tensor, _ dtype: DType) throws(TorchError) -> Tensor {
    try produce("dequantisedRows", [self, scales]) {
      ctorch_dequantise_rows($0, handle, scales.handle, dtype.rawValue)
    }
  }
  /// ``linear(_:_:)`` by `codes.dequantisedRows(scales, dtype)`, of which only the codes are kept for the
  /// backward pass.
  ///
  /// Gradients flow to `self` alone; `bias` must not need one.
  public func quantisedLinear(
    _ codes: Tensor, _ scales: Tensor, _ bias: Tensor? = nil
  ) throws(TorchError) -> Tensor {
    try produce("quantisedLinear", [self, codes, scales, bias]) {
      ctorch_quantised_linear($0, handle, codes.handle, scales.handle, bias?.handle)
    }
  }
}
