import FlowRewards
import Torch

/// The standard deviation of the grey values: a flat image scores 0, one half black and half white 0.5.
struct Contrast: LocalReward {
  let name = "contrast"
  var readsPrompts: Bool { false }

  func scores(_ images: Tensor, prompts: [RewardPrompt]) throws -> [RewardScore] {
    try checkImages(images, for: name, prompts: prompts.count)
    let values = try withoutGrad {
      try images.to(.float32).mean([1]).variance([1, 2], correction: 0).sqrt().doubles()
    }
    return values.map { $0.isFinite ? RewardScore(value: $0) : .notFinite }
  }
}
