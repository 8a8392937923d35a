import Torch
import TorchNN

/// What a network is conditioned on: tensors with one row a sample.
public struct Condition: Sendable {
  /// Each [B, ...].
  public var tensors: [Tensor]
  /// Wraps `tensors`.
  public init(_ tensors: [Tensor]) { self.tensors = tensors }
  /// The conditions of several samples, one below the other.
  public static func stack(_ rows: [Condition]) throws(TorchError) -> Condition {
    guard let first = rows.first else { return Condition([]) }
    var result: [Tensor] = []
    for i in first.tensors.indices { result.append(try Tensor.cat(rows.map { $0.tensors[i] })) }
    return Condition(result)
  }
}

/// A flow-matching network: anything that predicts a velocity can be trained, images or not.
public protocol FlowModel: AnyObject {
  /// The velocity dx/dσ at noise level σ.
  ///
  /// - Parameters:
  ///   - latents: x [B, ...], float32.
  ///   - times: what the network is told of σ, in 0 … 1000: [B] float32.
  ///   - condition: B rows.
  ///   - guidance: embedded guidance scale, for networks that take one.
  /// - Returns: v like `latents`, float32.
  func velocity(_ latents: Tensor, times: Tensor, condition: Condition, guidance: Double?) throws -> Tensor
  /// Layers and parameters by checkpoint key.
  var modules: ModuleRegistry { get }
}

/// A model folder or setting that cannot be used, and the way out.
public struct ModelError: Error, CustomStringConvertible, Sendable, Equatable {
  /// What is wrong, where, and what to do.
  public let description: String
  /// Creates the error.
  public init(_ description: String) { self.description = description }
}
