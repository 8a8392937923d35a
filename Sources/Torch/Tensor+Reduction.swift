import CTorch

extension Tensor {
  /// Sum over `dims`, or over everything.
  public func sum(_ dims: [Int] = [], keep: Bool = false) throws(TorchError) -> Tensor {
    try produce("sum", [self]) { out in withInts(dims) { ctorch_sum(out, handle, $0, $1, keep) } }
  }
  /// Mean over `dims`, or over everything.
  public func mean(_ dims: [Int] = [], keep: Bool = false) throws(TorchError) -> Tensor {
    try produce("mean", [self]) { out in withInts(dims) { ctorch_mean(out, handle, $0, $1, keep) } }
  }
  /// Largest element over `dims`, or over everything.
  public func amax(_ dims: [Int] = [], keep: Bool = false) throws(TorchError) -> Tensor {
    try produce("amax", [self]) { out in withInts(dims) { ctorch_amax(out, handle, $0, $1, keep) } }
  }
  /// Smallest element over `dims`, or over everything.
  public func amin(_ dims: [Int] = [], keep: Bool = false) throws(TorchError) -> Tensor {
    try produce("amin", [self]) { out in withInts(dims) { ctorch_amin(out, handle, $0, $1, keep) } }
  }
  /// Variance over `dims`, or over everything; `correction` 1 divides by n − 1.
  public func variance(
    _ dims: [Int] = [], correction: Double = 1, keep: Bool = false
  ) throws(TorchError) -> Tensor {
    try produce("variance", [self]) { out in
      withInts(dims) { ctorch_var(out, handle, $0, $1, correction, keep) }
    }
  }
  /// Index (int64) of the first largest entry of `dim`.
  public func argmax(_ dim: Int, keep: Bool = false) throws(TorchError) -> Tensor {
    try produce("argmax", [self]) { ctorch_argmax($0, handle, Int64(dim), keep) }
  }
  /// Smallest entry of `dim` and its index (int64).
  public func minimum(along dim: Int, keep: Bool = false) throws(TorchError) -> (
    values: Tensor, indices: Tensor
  ) {
    var values: ctorch_tensor?
    let indices = try produce("minimum", [self]) { ctorch_min_dim(&values, $0, handle, Int64(dim), keep) }
    return (Tensor(owning: values!), indices)
  }
  /// Exponentials of `dim`, normalised to sum 1.
  public func softmax(_ dim: Int) throws(TorchError) -> Tensor {
    try produce("softmax", [self]) { ctorch_softmax($0, handle, Int64(dim)) }
  }
  /// Whether every element is finite.
  public func allFinite() throws(TorchError) -> Bool {
    if count == 0 { return true }
    // libtorch has no isfinite for float8.
    let values = dtype == .float8 ? try to(.float32) : self
    return try values.isFinite().to(.uint8).amin().item() == 1
  }
}
