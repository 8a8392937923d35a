import Torch

/// Variance of the Laplacian of the luma: how much fine detail an image has, noise included.
///
/// The luma is Y = 0.299·R + 0.587·G + 0.114·B of pixels in 0…1 (ITU-R BT.601), the kernel
/// [0 1 0; 1 −4 1; 0 1 0], applied where it fits (H − 2 × W − 2 places), and the variance that of the
/// population. OpenCV's `cv2.Laplacian(grey, CV_64F).var()` is about 255² times as large: its pixels run to
/// 255, and it continues the image beyond its edges.
///
/// Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000 (measure LAPV).
/// A constant image and a linear gradient score 0; white noise of variance s² in the luma scores 20·s².
public struct Sharpness: LocalReward {
  /// `sharpness`.
  public let name = "sharpness"

  /// Creates the reward.
  public init() {}

  /// Prompts play no part.
  public var readsPrompts: Bool { false }

  /// Sharpness of images of at least 3 × 3 pixels.
  public func scores(_ images: Tensor, prompts: [RewardPrompt]) throws -> [RewardScore] {
    try checkImages(images, for: name, prompts: prompts.count)
    return try Self.values(images).map {
      $0.isFinite ? RewardScore(value: $0) : .notFinite
    }
  }

  /// Sharpness of each image of [B, 3, H, W]; not finite where the pixels are not.
  ///
  /// - Throws: ``RewardError/badImages(consumer:shape:expected:)`` for sides below 3.
  public static func values(_ images: Tensor) throws -> [Double] {
    try requireSides(images, 3, for: "sharpness")
    guard images.size(0) > 0 else { return [] }
    return try withoutGrad { try laplacian(images).variance([1, 2], correction: 0).doubles() }
  }

  /// The Laplacian of the luma, [B, H − 2, W − 2] in float32.
  static func laplacian(_ images: Tensor) throws -> Tensor {
    let x = try images.to(.float32)
    let luma = try x.select(1, 0) * 0.299 + x.select(1, 1) * 0.587 + x.select(1, 2) * 0.114
    let (height, width) = (images.size(2) - 2, images.size(3) - 2)
    func part(_ dy: Int, _ dx: Int) throws -> Tensor {
      try luma.narrow(1, 1 + dy, height).narrow(2, 1 + dx, width)
    }
    // In pairs, so that a constant cancels exactly.
    return try (part(-1, 0) + part(1, 0)) + (part(0, -1) + part(0, 1)) - part(0, 0) * 4
  }

  static func requireSides(_ images: Tensor, _ least: Int, for consumer: String) throws {
    try checkImages(images, for: consumer, prompts: nil)
    guard images.size(2) >= least, images.size(3) >= least else {
      throw RewardError.badImages(
        consumer: consumer, shape: images.shape, expected: "sides of at least \(least) pixels")
    }
  }
}

/// How much of an image's fine structure repeats on a lattice of pixels: what a network that works in patches
/// leaves behind when it fails.
///
/// With z the Laplacian of the luma as in ``Sharpness``, its last rows and columns left out so that its sides
/// h and w are multiples of the period p, and its mean subtracted:
///
///   G_p = Σ_{(k,l) ∈ Λ_p} |ẑ(k,l)|² / (Σ_{(k,l)} |ẑ(k,l)|² + h²w²·ε),   Λ_p = {(k,l) : h/p divides k, w/p
/// divides l}
///
/// the share of the spectral energy at the p² frequencies of a p × p lattice. It is computed in space: by
/// Parseval's theorem G_p = mean(m²) / (mean(z²) + ε), with m the mean of all p × p tiles of z. ε = 10⁻⁴, the
/// square of a hundredth of the range: ripples that nobody can see count as none, so that flat images score
/// 0.
///
/// The Laplacian weights frequencies as the eye does seams, and keeps the jump between opposite edges of an
/// image, which a transform of the luma would take for detail, out of it. Periods that divide p are included:
/// p = 16 also finds a lattice of 8. What repeats exactly scores near 1, smooth gradients 0, and white noise
/// p²/(h·w) on average, the lattice's share of the frequencies.
public enum GridEnergy {
  /// Energy of the 16-pixel lattice; of the 8-pixel one for images with a side below 34.
  ///
  /// - Parameter images: [B, 3, H, W] in 0…1, sides of at least 18.
  /// - Returns: B numbers in 0…1; not finite where the pixels are not.
  /// - Throws: ``RewardError/badImages(consumer:shape:expected:)``.
  public static func values(_ images: Tensor) throws -> [Double] {
    try Sharpness.requireSides(images, 18, for: "grid energy")
    return try values(images, period: min(images.size(2), images.size(3)) < 34 ? 8 : 16)
  }

  /// Energy of the lattice of `period` pixels.
  ///
  /// - Throws: ``RewardError/badImages(consumer:shape:expected:)`` for images without two whole tiles along
  /// each side.
  public static func values(_ images: Tensor, period p: Int) throws -> [Double] {
    precondition(p > 0, "GridEnergy: period \(p), need at least 1")
    try Sharpness.requireSides(images, 2 * p + 2, for: "grid energy")
    guard images.size(0) > 0 else { return [] }
    return try withoutGrad {
      var z = try Sharpness.laplacian(images)
      let (rows, columns) = (z.size(1) / p, z.size(2) / p)
      z = try z.narrow(1, 0, rows * p).narrow(2, 0, columns * p)
      z = try z - z.mean([1, 2], keep: true)
      let tile = try z.reshape(-1, rows, p, columns, p).mean([1, 3])  // [B, p, p]
      return try (tile.square().mean([1, 2]) / (z.square().mean([1, 2]) + 1e-4)).doubles()
    }
  }
}

extension RewardKind {
  /// Variance of the Laplacian.
  static let sharpness = RewardKind("sharpness") { _, _ in Sharpness() }
}
