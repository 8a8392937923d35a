import Torch

/// What a set of images looks like, to tell a better model from a collapsed one.
public struct GuardValues: Codable, Sendable, Equatable {
  /// Share of images whose every pixel is above 0.97.
  public var blank: Double
  /// Mean over groups of the mean root-mean-square pixel difference of two images of the group.
  public var diversity: Double
  /// Mean of 1 − the smallest channel: how much of the canvas is not white.
  public var ink: Double
  /// Mean Hasler–Süsstrunk colourfulness, as ``Vivid``.
  public var vivid: Double
  /// Mean ``Sharpness``; nil for images below 3 pixels a side, and in what older versions wrote.
  public var sharpness: Double?
  /// Mean ``GridEnergy``; nil for images below 18 pixels a side, and in what older versions wrote.
  public var grid: Double?

  /// Creates values measured elsewhere.
  public init(
    blank: Double, diversity: Double, ink: Double, vivid: Double, sharpness: Double? = nil,
    grid: Double? = nil
  ) {
    (self.blank, self.diversity, self.ink, self.vivid) = (blank, diversity, ink, vivid)
    (self.sharpness, self.grid) = (sharpness, grid)
  }

  /// Those that were measured, by name, in the order of reports.
  public var named: [(name: String, value: Double)] {
    [
      ("blank", blank), ("diversity", diversity), ("ink", ink), ("vivid", vivid), ("sharpness", sharpness),
      ("grid", grid),
    ]
    .compactMap { name, value in value.map { (name, $0) } }
  }

  /// Measures groups of images of one prompt each, one group after the other: beside the images there is memory for one.
  ///
  /// - Parameters:
  ///   - images: [B, 3, H, W] in 0…1, group after group.
  ///   - groupSize: images a group, at least 2, dividing B.
  ///   - blackens: whether pixels that are not finite count as black; else they are an error.
  /// - Throws: ``RewardError`` for other shapes or groups and for pixels that are not finite.
  public static func measure(_ images: Tensor, groupSize: Int, blackens: Bool = false) throws -> GuardValues {
    try checkImages(images, for: "guards", prompts: nil)
    let total = images.size(0)
    guard groupSize >= 2, total > 0, total % groupSize == 0 else {
      throw RewardError.badGroups(images: total, groupSize: groupSize)
    }
    var (blank, ink, vivid, broken) = ([Double](), [Double](), [Double](), 0)
    var (sharpness, grid) = ([Double](), [Double]())
    let side = min(images.size(2), images.size(3))
    var diversity = 0.0
    try withoutGrad {
      for start in stride(from: 0, to: total, by: groupSize) {
        // Contiguous, so that sums do not round by how the images happen to lie in memory.
        var group = try images[start..<start + groupSize].to(.float32).contiguous()
        if blackens {
          group = try group.isFinite().select(group, else: try Tensor.zeros(like: group))
        } else {
          broken += try finiteImages(group).count { !$0 }
        }
        let darkest = try group.amin([1])  // [B, H, W]
        blank += try darkest.amin([1, 2]).floats().map { $0 > 0.97 ? 1 : 0 }
        ink += try darkest.mean([1, 2]).doubles().map { 1 - $0 }
        vivid += try Vivid.values(group)
        if side >= 3 { sharpness += try Sharpness.values(group) }
        if side >= 18 { grid += try GridEnergy.values(group) }
        diversity += try self.diversity(group)
      }
    }
    guard broken == 0 else { throw RewardError.notFinite(images: broken, of: total) }
    // Every group has as many pairs, so the mean over all pairs is the mean of the groups' means.
    let pairs = Double(total) * Double(groupSize - 1) / 2
    return GuardValues(
      blank: mean(blank), diversity: diversity / pairs, ink: mean(ink), vivid: mean(vivid),
      sharpness: sharpness.isEmpty ? nil : mean(sharpness), grid: grid.isEmpty ? nil : mean(grid))
  }

  /// Sum over pairs of a group's images of their RMS difference, taken directly: the cancellation in a Gram matrix would
  /// hide the small differences that a collapse ends in.
  private static func diversity(_ group: Tensor) throws -> Double {
    let size = group.size(0)
    return try (1..<size).reduce(0) { sum, shift in
      let difference = try group[shift..<size] - group[0..<size - shift]
      return sum + (try difference.square().mean([1, 2, 3]).doubles().reduce(0) { $0 + $1.squareRoot() })
    }
  }

  /// What has collapsed since `base` was measured, each with its number and bound; empty if nothing has.
  ///
  /// Bounds: blank ≤ base + 0.02, diversity ≥ 0.8·base, ink within 0.6…1.6·base. A NaN is outside every
  /// bound.
  public func collapsed(against base: GuardValues) -> [String] {
    func range(_ name: String, _ value: Double, _ low: Double, _ high: Double) -> String? {
      if value >= low && value <= high { return nil }
      let bound = value > high ? "above \(short(high))" : "below \(short(low))"
      return "\(name) \(short(value)) is \(value.isNaN ? "not a number" : bound)"
    }
    return [
      range("blank", blank, -.infinity, base.blank + 0.02),
      range("diversity", diversity, 0.8 * base.diversity, .infinity),
      range("ink", ink, 0.6 * base.ink, 1.6 * base.ink),
    ].compactMap { $0 }
  }
}

private func mean(_ values: [Double]) -> Double { values.reduce(0, +) / Double(values.count) }

/// Four decimals without a C format string.
private func short(_ value: Double) -> String {
  value.isFinite ? "\((value * 1e4).rounded() / 1e4)" : "\(value)"
}
