import CTorch

/// Element types this package uses; raw values are libtorch's scalar types.
public enum DType: Int32, Sendable, CaseIterable {
  case uint8 = 0
  case int8 = 1
  case int32 = 3
  case int64 = 4
  case float16 = 5
  case float32 = 6
  case float64 = 7
  case complex64 = 9
  case bool = 11
  case bfloat16 = 15
  /// e4m3 with one NaN and no infinity: magnitudes up to 448.
  case float8 = 24

  /// Bytes of one element.
  public var size: Int {
    switch self {
    case .uint8, .int8, .bool, .float8: 1
    case .float16, .bfloat16: 2
    case .int32, .float32: 4
    case .int64, .float64, .complex64: 8
    }
  }

  /// Whether values are real floating-point numbers.
  public var isFloatingPoint: Bool {
    switch self {
    case .float8, .float16, .bfloat16, .float32, .float64: true
    default: false
    }
  }
}

/// Swift types whose arrays convert to and from tensors without interpretation.
public protocol TorchScalar: Sendable, BitwiseCopyable {
  /// The tensor element type with this memory layout.
  static var dtype: DType { get }
}
extension Float: TorchScalar {
  /// Stored as is.
  public static var dtype: DType { .float32 }
}
extension Double: TorchScalar {
  /// Stored as is.
  public static var dtype: DType { .float64 }
}
extension Int64: TorchScalar {
  /// Stored as is.
  public static var dtype: DType { .int64 }
}
extension Int32: TorchScalar {
  /// Stored as is.
  public static var dtype: DType { .int32 }
}
extension Int8: TorchScalar {
  /// Stored as is.
  public static var dtype: DType { .int8 }
}
extension UInt8: TorchScalar {
  /// Stored as is.
  public static var dtype: DType { .uint8 }
}

/// Where a tensor lives.
public enum Device: Sendable, Hashable, CustomStringConvertible {
  case cpu
  case cuda(Int)

  var code: Int32 { Int32(self == .cpu ? CTORCH_CPU : CTORCH_CUDA) }
  var index: Int32 { if case .cuda(let i) = self { Int32(i) } else { 0 } }

  /// For people.
  public var description: String { if case .cuda(let i) = self { "cuda:\(i)" } else { "cpu" } }
}
