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

/// Classifier-free guidance: v⁻ + g·(v⁺ − v⁻), both branches in one batch.
///
/// Source: arXiv 2207.12598; rollout and replay call the same code, so that both see the same velocity.
public final class GuidedFlowModel: FlowModel {
  private let base: any FlowModel
  private let negative: Condition

  /// Guides `base` away from `negative`, one row.
  public init(_ base: any FlowModel, negative: Condition) {
    self.base = base
    self.negative = negative
  }

  /// The base network's.
  public var modules: ModuleRegistry { base.modules }

  /// The guided velocity; a scale of 1 or none is the base's own.
  public func velocity(_ latents: Tensor, times: Tensor, condition: Condition, guidance: Double?) throws
    -> Tensor
  {
    guard let guidance, guidance > 1 else {
      return try base.velocity(latents, times: times, condition: condition, guidance: nil)
    }
    let rows = latents.size(0)
    let both = Condition(
      try zip(condition.tensors, negative.tensors).map { positive, negative in
        let repeated = try negative.indexSelect(
          0, try Tensor([Int64](repeating: 0, count: rows)).to(negative.device))
        return try Tensor.cat([positive, repeated.to(positive.dtype)])
      })
    let v = try base.velocity(
      try Tensor.cat([latents, latents]), times: try Tensor.cat([times, times]), condition: both,
      guidance: nil)
    let (positive, negative) = (try v[0..<rows], try v[rows..<(2 * rows)])
    return try negative + (try positive - negative) * guidance
  }
}

/// A model folder or setting that cannot be used, and the way out.
public struct ModelError: Error, CustomStringConvertible, Sendable, Equatable {
  /// What is wrong, where, and what to do.
  public let description: String
  /// Creates the error.
  public init(_ description: String) { self.description = description }
}
