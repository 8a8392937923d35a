import Torch

/// Hasler and Süsstrunk's colourfulness, on pixels in 0…1: √(σ²_rg + σ²_yb) + 0.3·√(μ²_rg + μ²_yb) with
/// rg = R − G and yb = (R + G)/2 − B, standard deviations over all pixels of an image (population).
///
/// Source: Hasler & Süsstrunk, Measuring colourfulness in natural images, SPIE 5007 (2003), the metric that
/// needs no CIELab. A grey image scores 0; the scenes of the built-in task lie near 0.25.
public struct Vivid: LocalReward {
  /// The name it was made under.
  public let name: String

  /// Creates the reward under one of its names.
  public init(name: String = "vivid") { self.name = name }

  /// Prompts play no part.
  public var readsPrompts: Bool { false }

  /// Colourfulness of images of any size.
  public func scores(_ images: Tensor, prompts: [RewardPrompt]) throws -> [RewardScore] {
    try checkImages(images, for: name, prompts: prompts.count)
    return try Self.values(images).map { RewardScore(value: $0.isFinite ? $0 : nil) }
  }

  /// Colourfulness of each image of [B, 3, H, W]; not finite where the pixels are not.
  static func values(_ images: Tensor) throws -> [Double] {
    guard images.size(0) > 0 else { return [] }
    return try withoutGrad {
      let x = try images.to(.float32)
      let (r, g, b) = (try x.select(1, 0), try x.select(1, 1), try x.select(1, 2))
      let opponents = try Tensor.stack([r - g, (r + g) * 0.5 - b], 1)  // [B, 2, H, W]
      let spread = try opponents.variance([2, 3], correction: 0).sum([1]).sqrt()
      let offset = try opponents.mean([2, 3]).square().sum([1]).sqrt()
      return try (spread + offset * 0.3).doubles()
    }
  }
}
