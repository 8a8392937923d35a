import Pictures
import Torch

/// Kilobytes (of 1000 bytes) of an image as a JPEG file, or minus them: how hard it is to compress, or how
/// easy.
///
/// Source: kvablack/ddpo-pytorch@1958463 ddpo_pytorch/rewards.py#L7-L30, whose incompressibility is
/// ``Score/positive`` at quality 95 and whose compressibility is ``Score/negative``. Pixels are rounded to 8
/// bits; colour is stored at half resolution, by baseline coding with the standard tables, as Pillow does it.
public struct JPEGSize: LocalReward {
  /// Which way is up.
  public enum Score: String, Sendable, CaseIterable {
    /// Large files score high.
    case positive
    /// Small files score high.
    case negative
  }
  /// libjpeg's scale.
  public static let defaultQuality = 95

  /// `jpeg-size`.
  public let name = "jpeg-size"
  let score: Score
  let quality: Int

  /// Creates the reward.
  ///
  /// - Throws: ``RewardError/badValue(reward:key:expected:got:)`` for a quality outside 1 … 100.
  public init(score: Score = .positive, quality: Int = defaultQuality) throws(RewardError) {
    guard 1...100 ~= quality else {
      throw .badValue(reward: "jpeg-size", key: "quality", expected: "1 to 100", got: "\(quality)")
    }
    (self.score, self.quality) = (score, quality)
  }

  /// A sign with a word against a grey plane, which takes fewer bytes.
  public var probe: RewardProbe { score == .positive ? .sign : RewardProbe.sign.reversed }
  /// Prompts play no part.
  public var readsPrompts: Bool { false }

  /// Sizes of images of any size, in kilobytes; part `kilobytes` is the size itself.
  public func scores(_ images: Tensor, prompts: [RewardPrompt]) throws -> [RewardScore] {
    try checkImages(images, for: name, prompts: prompts.count)
    return try zip(finiteImages(images), rgbPictures(of: images)).map { isFinite, picture in
      guard isFinite else { return .notFinite }
      let size = Double(try picture.jpeg(quality: quality).count) / 1000
      return RewardScore(value: score == .positive ? size : -size, parts: ["kilobytes": size])
    }
  }
}

extension RewardKind {
  /// Size as a JPEG file.
  static let jpegSize = RewardKind(
    "jpeg-size", keys: [.quality], scores: JPEGSize.Score.allCases.map(\.rawValue)
  ) {
    settings, _ in
    try JPEGSize(
      score: JPEGSize.Score(rawValue: settings.score!)!, quality: settings.quality ?? JPEGSize.defaultQuality)
  }
}
