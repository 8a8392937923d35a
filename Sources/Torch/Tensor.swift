import CTorch

/// A reference to a libtorch tensor, released when the last Swift reference goes.
///
/// Operations throw ``TorchError`` instead of trapping. A tensor may cross threads, but two threads must not
/// change one tensor at once: training keeps to one thread.
public final class Tensor: @unchecked Sendable {
  let handle: ctorch_tensor

  init(owning handle: ctorch_tensor) { self.handle = handle }
  deinit { ctorch_tensor_free(handle) }

  /// Sizes of the dimensions, outermost first.
  public var shape: [Int] {
    let rank = Int(ctorch_rank(handle))
    return [Int](unsafeUninitializedCapacity: rank) { buffer, count in
      buffer.withMemoryRebound(to: Int64.self) { ctorch_sizes(handle, $0.baseAddress) }
      count = rank
    }
  }
  /// Number of dimensions.
  public var rank: Int { Int(ctorch_rank(handle)) }
  /// Number of elements.
  public var count: Int { shape.reduce(1, *) }
  /// Element type.
  public var dtype: DType { DType(rawValue: ctorch_dtype(handle))! }
  /// Where the elements are.
  public var device: Device {
    var kind: Int32 = 0
    var index: Int32 = 0
    ctorch_device(handle, &kind, &index)
    return kind == Int32(CTORCH_CPU) ? .cpu : .cuda(Int(index))
  }
  /// Size of dimension `i`, counted from the end when negative.
  public func size(_ i: Int) -> Int {
    let s = shape
    return s[i < 0 ? s.count + i : i]
  }

  var summary: String { "\(dtype)\(shape)" }
}

extension Tensor: CustomStringConvertible {
  /// For people.
  public var description: String { "Tensor(\(shape), \(dtype), \(device))" }
}

/// The library and its process-wide settings.
public enum TorchRuntime {
  /// Version of the libtorch that `libctorch.so` was built against.
  public static var version: String { String(cString: ctorch_torch_version()) }
  /// Tensor references handed out and not yet released: the leak test's counter.
  public static var liveTensors: Int { Int(ctorch_live_tensors()) }
  /// Threads used inside one operation.
  public static var threads: Int { Int(ctorch_num_threads()) }
  /// Sets the threads used inside one operation.
  public static func setThreads(_ count: Int) throws(TorchError) {
    try check("setThreads", [], ctorch_set_num_threads(Int32(count)))
  }
  /// Whether a CUDA device is usable.
  public static var cudaAvailable: Bool { ctorch_cuda_available() }
  /// Whether the CPU multiplies bfloat16 natively (192 against 68 GFLOP/s per core where measured).
  public static var nativeBFloat16: Bool { ctorch_has_bfloat16_matmul() }

  /// False when `libctorch.so` was built from another `ctorch.h`.
  static let abiMatches = ctorch_abi_version() == CTORCH_ABI_VERSION
}

func failure(_ operation: StaticString, _ operands: [Tensor?]) -> TorchError {
  guard TorchRuntime.abiMatches else {
    return TorchError(
      "\(operation)",
      "lib/libctorch.so has interface \(ctorch_abi_version()), this build expects \(CTORCH_ABI_VERSION): run make build"
    )
  }
  // libtorch appends several lines of advice; the first says what happened.
  let message = String(cString: ctorch_last_error())
  let firstLine = message.split(separator: "\n").first.map(String.init) ?? message
  return TorchError(
    "\(operation)", firstLine, operands: operands.compactMap { $0?.summary })
}

func check(
  _ operation: StaticString, _ operands: @autoclosure () -> [Tensor?], _ status: Int32
) throws(TorchError) {
  guard status == 0, TorchRuntime.abiMatches else { throw failure(operation, operands()) }
}

/// Runs one C call that hands out a tensor; the operands are named only if it fails.
func produce(
  _ operation: StaticString, _ operands: @autoclosure () -> [Tensor?],
  _ body: (UnsafeMutablePointer<ctorch_tensor?>) -> Int32
) throws(TorchError) -> Tensor {
  var out: ctorch_tensor?
  guard TorchRuntime.abiMatches, body(&out) == 0, let out else { throw failure(operation, operands()) }
  return Tensor(owning: out)
}

func withInts<R>(_ values: [Int], _ body: (UnsafePointer<Int64>?, Int32) -> R) -> R {
  values.withUnsafeBufferPointer { buffer in
    buffer.withMemoryRebound(to: Int64.self) { body($0.baseAddress, Int32($0.count)) }
  }
}

func withHandles<R>(_ tensors: [Tensor], _ body: (UnsafePointer<ctorch_tensor?>?, Int32) -> R) -> R {
  withExtendedLifetime(tensors) {
    tensors.map { Optional($0.handle) }.withUnsafeBufferPointer { body($0.baseAddress, Int32($0.count)) }
  }
}
