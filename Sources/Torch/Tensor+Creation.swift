import CTorch

extension Tensor {
  /// Copies `values`, row-major, into a new CPU tensor of `shape`.
  public convenience init<S: TorchScalar>(_ values: [S], shape: [Int]) throws(TorchError) {
    guard values.count == shape.reduce(1, &*) else {
      throw TorchError("Tensor", "\(values.count) values do not fill shape \(shape)")
    }
    var out: ctorch_tensor?
    let status = values.withUnsafeBytes { bytes in
      withInts(shape) {
        ctorch_from_data(&out, bytes.baseAddress ?? UnsafeRawPointer(bitPattern: 8), S.dtype.rawValue, $0, $1)
      }
    }
    guard status == 0, let out else { throw failure("Tensor", []) }
    self.init(owning: out)
  }

  /// Copies `values` into a new one-dimensional CPU tensor.
  public convenience init<S: TorchScalar>(_ values: [S]) throws(TorchError) {
    try self.init(values, shape: [values.count])
  }

  /// A tensor of `shape` with every element `value`.
  public static func full(
    _ shape: [Int], _ value: Double, dtype: DType = .float32, device: Device = .cpu
  ) throws(TorchError) -> Tensor {
    try produce("full", []) { out in
      withInts(shape) { ctorch_full(out, $0, $1, value, dtype.rawValue, device.code, device.index) }
    }
  }
  /// Zeros of `shape`.
  public static func zeros(
    _ shape: [Int], dtype: DType = .float32, device: Device = .cpu
  ) throws(TorchError) -> Tensor {
    try full(shape, 0, dtype: dtype, device: device)
  }
  /// Zeros with the shape, dtype and device of `other`.
  public static func zeros(like other: Tensor) throws(TorchError) -> Tensor {
    try full(other.shape, 0, dtype: other.dtype, device: other.device)
  }
  /// `start`, `start + step`, … below `end`.
  public static func arange(
    _ start: Double = 0, to end: Double, by step: Double = 1, dtype: DType = .float32
  ) throws(TorchError) -> Tensor {
    try produce("arange", []) { ctorch_arange($0, start, end, step, dtype.rawValue) }
  }

  /// A view of memory owned elsewhere; `owner` lives as long as any tensor on it.
  static func view(
    of address: UnsafeMutableRawPointer, dtype: DType, shape: [Int], owner: AnyObject
  ) throws(TorchError) -> Tensor {
    let context = Unmanaged.passRetained(owner)
    do throws(TorchError) {
      return try produce("view", []) { out in
        withInts(shape) {
          ctorch_from_memory(
            out, address, dtype.rawValue, $0, $1,
            { Unmanaged<AnyObject>.fromOpaque($0!).release() }, context.toOpaque())
        }
      }
    } catch {
      context.release()
      throw error
    }
  }

  /// The elements, row-major, converted to `S`'s dtype.
  public func array<S: TorchScalar>(of type: S.Type = S.self) throws(TorchError) -> [S] {
    let source = dtype == S.dtype ? self : try self.to(S.dtype)
    let total = count
    var status: Int32 = 0
    let values = [S](unsafeUninitializedCapacity: total) { buffer, initialized in
      status = ctorch_read(source.handle, buffer.baseAddress, total * MemoryLayout<S>.stride)
      initialized = total
    }
    try check("array", [self], status)
    return values
  }
  /// The elements as `Float`.
  public func floats() throws(TorchError) -> [Float] { try array() }
  /// The elements as `Double`.
  public func doubles() throws(TorchError) -> [Double] { try array() }
  /// The elements as `Int64`.
  public func int64s() throws(TorchError) -> [Int64] { try array() }

  /// The elements' bytes, row-major, in the tensor's own dtype.
  public func bytes() throws(TorchError) -> [UInt8] {
    let total = count * dtype.size
    var status: Int32 = 0
    let values = [UInt8](unsafeUninitializedCapacity: total) { buffer, initialized in
      status = ctorch_read(handle, buffer.baseAddress, total)
      initialized = total
    }
    try check("bytes", [self], status)
    return values
  }

  /// The value of a one-element tensor.
  public func item() throws(TorchError) -> Double {
    let values = try doubles()
    guard values.count == 1 else { throw TorchError("item", "expected one element", operands: [summary]) }
    return values[0]
  }

  /// Converted to `dtype`; the same tensor if it has it already.
  public func to(_ dtype: DType) throws(TorchError) -> Tensor {
    if self.dtype == dtype { return self }
    return try produce("to", [self]) { ctorch_to_dtype($0, handle, dtype.rawValue) }
  }
  /// Moved to `device`; the same tensor if it is there already.
  public func to(_ device: Device) throws(TorchError) -> Tensor {
    if self.device == device { return self }
    return try produce("to", [self]) { ctorch_to_device($0, handle, device.code, device.index) }
  }

  /// Overwrites the elements with those of `source`, of the same shape; not recorded for gradients.
  public func copy(from source: Tensor) throws(TorchError) {
    try check("copy", [self, source], ctorch_copy_(handle, source.handle))
  }
  /// Adds `alpha * other` in place; not recorded for gradients.
  public func addInPlace(_ other: Tensor, alpha: Double = 1) throws(TorchError) {
    try check("addInPlace", [self, other], ctorch_add_(handle, other.handle, alpha))
  }
  /// Multiplies in place; not recorded for gradients.
  public func multiplyInPlace(_ factor: Double) throws(TorchError) {
    try check("multiplyInPlace", [self], ctorch_mul_scalar_(handle, factor))
  }
}
