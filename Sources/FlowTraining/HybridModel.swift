import FlowModels
import Torch
import TorchNN

/// One network until a trajectory reaches a noise level, another from there on.
///
/// Reward hacking sits in the late, fine steps: ending with the base model hides it (hybrid inference of MixGRPO and
/// Chunk-GRPO, 30 of 50 steps tuned).
final class HandoverModel: FlowModel {
  private let first, last: any FlowModel
  private let time: Float

  /// `last` takes the steps whose network time, which falls along a trajectory, is `time` or less.
  init(_ first: any FlowModel, then last: any FlowModel, from time: Float) {
    (self.first, self.last, self.time) = (first, last, time)
  }

  /// Those of the first network.
  var modules: ModuleRegistry { first.modules }

  /// That of one of the networks; all rows must be on the same side.
  func velocity(_ latents: Tensor, times: Tensor, condition: Condition, guidance: Double?) throws -> Tensor {
    let late = Set(try times.floats().map { $0 <= time })
    precondition(late.count == 1, "rows of one pass are at the same step")
    return try (late.contains(true) ? last : first).velocity(
      latents, times: times, condition: condition, guidance: guidance)
  }
}

/// A network without the adapter that is attached to it.
final class BaseModel: FlowModel {
  private let network: any FlowModel
  private let adapter: LoRAAdapter

  init(_ network: any FlowModel, without adapter: LoRAAdapter) {
    (self.network, self.adapter) = (network, adapter)
  }

  /// Those of the network.
  var modules: ModuleRegistry { network.modules }

  /// That of the base.
  func velocity(_ latents: Tensor, times: Tensor, condition: Condition, guidance: Double?) throws -> Tensor {
    try adapter.without {
      try network.velocity(latents, times: times, condition: condition, guidance: guidance)
    }
  }
}
