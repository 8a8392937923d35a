import CTorch

extension Tensor {
  /// The same elements in another shape; one size may be −1.
  public func reshape(_ shape: [Int]) throws(TorchError) -> Tensor {
    try produce("reshape", [self]) { out in withInts(shape) { ctorch_reshape(out, handle, $0, $1) } }
  }
  /// The same elements in another shape; one size may be −1.
  public func reshape(_ shape: Int...) throws(TorchError) -> Tensor { try reshape(shape) }
  /// Dimensions reordered.
  public func permute(_ dims: Int...) throws(TorchError) -> Tensor {
    try produce("permute", [self]) { out in withInts(dims) { ctorch_permute(out, handle, $0, $1) } }
  }
  /// Two dimensions swapped.
  public func transpose(_ a: Int, _ b: Int) throws(TorchError) -> Tensor {
    try produce("transpose", [self]) { ctorch_transpose($0, handle, Int64(a), Int64(b)) }
  }
  /// `length` entries of dimension `dim` from `start`, without a copy.
  public func narrow(_ dim: Int, _ start: Int, _ length: Int) throws(TorchError) -> Tensor {
    try produce("narrow", [self]) { ctorch_narrow($0, handle, Int64(dim), Int64(start), Int64(length)) }
  }
  /// Entries `range` of the first dimension, without a copy.
  public subscript(_ range: Range<Int>) -> Tensor {
    get throws(TorchError) { try narrow(0, range.lowerBound, range.count) }
  }
  /// Entry `index` of the first dimension, without a copy.
  public subscript(_ index: Int) -> Tensor {
    get throws(TorchError) { try select(0, index) }
  }
  /// Entry `index` of dimension `dim`, without a copy.
  public func select(_ dim: Int, _ index: Int) throws(TorchError) -> Tensor {
    try produce("select", [self]) { ctorch_select($0, handle, Int64(dim), Int64(index)) }
  }
  /// Equal parts of dimension `dim`, without a copy.
  public func chunk(_ parts: Int, _ dim: Int) throws(TorchError) -> [Tensor] {
    let total = (-rank..<rank).contains(dim) ? size(dim) : -1
    guard parts > 0, total >= 0, total % parts == 0 else {
      throw TorchError("chunk", "dimension \(dim) does not split into \(parts)", operands: [summary])
    }
    var result: [Tensor] = []
    for i in 0..<parts { result.append(try narrow(dim, i * (total / parts), total / parts)) }
    return result
  }
  /// Parts of the given sizes of dimension `dim`, without a copy.
  public func split(_ sizes: [Int], _ dim: Int) throws(TorchError) -> [Tensor] {
    var result: [Tensor] = []
    var start = 0
    for size in sizes {
      result.append(try narrow(dim, start, size))
      start += size
    }
    return result
  }
  /// Entries `index` (int64) of dimension `dim`, copied.
  public func indexSelect(_ dim: Int, _ index: Tensor) throws(TorchError) -> Tensor {
    try produce("indexSelect", [self, index]) { ctorch_index_select($0, handle, Int64(dim), index.handle) }
  }
  /// Entries picked along `dim` by `index` (int64, same rank).
  public func gather(_ dim: Int, _ index: Tensor) throws(TorchError) -> Tensor {
    try produce("gather", [self, index]) { ctorch_gather($0, handle, Int64(dim), index.handle) }
  }
  /// A dimension of size 1 inserted at `dim`.
  public func unsqueeze(_ dim: Int) throws(TorchError) -> Tensor {
    try produce("unsqueeze", [self]) { ctorch_unsqueeze($0, handle, Int64(dim)) }
  }
  /// Dimension `dim`, of size 1, removed.
  public func squeeze(_ dim: Int) throws(TorchError) -> Tensor {
    try produce("squeeze", [self]) { ctorch_squeeze($0, handle, Int64(dim)) }
  }
  /// Size-1 dimensions repeated to `shape` without a copy; −1 keeps a size.
  public func expand(_ shape: Int...) throws(TorchError) -> Tensor { try expand(shape) }
  /// Size-1 dimensions repeated to `shape` without a copy; −1 keeps a size.
  public func expand(_ shape: [Int]) throws(TorchError) -> Tensor {
    try produce("expand", [self]) { out in withInts(shape) { ctorch_expand(out, handle, $0, $1) } }
  }
  /// Each entry of `dim` repeated in place: a, a, b, b, …
  public func repeatInterleave(_ repeats: Int, _ dim: Int) throws(TorchError) -> Tensor {
    try produce("repeatInterleave", [self]) {
      ctorch_repeat_interleave($0, handle, Int64(repeats), Int64(dim))
    }
  }
  /// Constant padding, last dimension first: [left, right, top, bottom, …].
  public func pad(_ padding: [Int], value: Double = 0) throws(TorchError) -> Tensor {
    try produce("pad", [self]) { out in withInts(padding) { ctorch_pad(out, handle, $0, $1, value) } }
  }
  /// Tensors joined along `dim`.
  public static func cat(_ tensors: [Tensor], _ dim: Int = 0) throws(TorchError) -> Tensor {
    try produce("cat", tensors) { out in withHandles(tensors) { ctorch_cat(out, $0, $1, Int64(dim)) } }
  }
  /// Tensors of one shape joined along a new dimension.
  public static func stack(_ tensors: [Tensor], _ dim: Int = 0) throws(TorchError) -> Tensor {
    try produce("stack", tensors) { out in withHandles(tensors) { ctorch_stack(out, $0, $1, Int64(dim)) } }
  }
}
