/// An operation libtorch refused, with the shapes it was given.
public struct TorchError: Error, CustomStringConvertible, Sendable, Equatable {
  /// Operation as named in this module, e.g. `matmul`.
  public let operation: String
  /// What went wrong, in libtorch's words or ours.
  public let message: String
  /// Shape and dtype of each operand, in call order.
  public let operands: [String]

  /// Creates an error for `operation` on `operands`.
  public init(_ operation: String, _ message: String, operands: [String] = []) {
    self.operation = operation
    self.message = message
    self.operands = operands
  }

  /// For people.
  public var description: String {
    "\(operation)(\(operands.joined(separator: ", "))): \(message)"
  }
}
