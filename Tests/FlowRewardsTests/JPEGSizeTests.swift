import Foundation
import Testing
import Torch

@testable import FlowRewards
@testable import Pictures

@Suite("jpeg-size")
struct JPEGSizeTests {
  private func score(_ images: Tensor, _ score: String?, quality: Int? = nil) throws -> [RewardScore] {
    var settings = RewardSettings(name: "jpeg-size", score: score)
    settings.quality = quality
    return try RewardFactory.make(settings)
      .scoresNow(images, prompts: Array(repeating: RewardPrompt(text: ""), count: images.size(0)))
  }

  /// Oracle: the encoder itself, whose sizes PicturesTests compares with Pillow's.
  @Test("thousands of bytes, or minus them; both name the size")
  func values() throws {
    let images = try noise(2, side: 40, seed: 1)
    let sizes = try rgbPictures(of: images).map { Double(try $0.jpeg(quality: 95).count) / 1000 }
    let (up, down) = (try score(images, "positive"), try score(images, "negative"))
    #expect(try score(images, nil) == up)
    #expect(up.map(\.value) == sizes)
    #expect(down.map(\.value) == sizes.map { -$0 })
    #expect(up.map(\.parts) == sizes.map { ["kilobytes": $0] } && down.map(\.parts) == up.map(\.parts))
    #expect(sizes.allSatisfy { $0 > 1 && $0 < 10 })
  }

  /// Oracle: what a quality is for.
  @Test("lower quality makes smaller files; a plane is smaller than noise")
  func order() throws {
    let images = try Tensor.cat([noise(1, side: 64, seed: 2), Tensor.full([1, 3, 64, 64], 0.5)])
    let sizes = try [95, 80, 30].map { try score(images, nil, quality: $0).map { $0.value! } }
    #expect(sizes[0][0] > sizes[1][0] && sizes[1][0] > sizes[2][0])
    #expect(sizes.allSatisfy { $0[0] > $0[1] })
  }

  @Test("pixels that are not finite earn nothing", arguments: [Double.nan, .infinity])
  func notFinite(value: Double) throws {
    let images = try Tensor.cat([noise(1, side: 16, seed: 3), Tensor.full([1, 3, 16, 16], value)])
    let scores = try score(images, nil)
    #expect(scores[0].value != nil && scores[1] == .notFinite)
  }

  @Test("a quality outside 1 … 100 is refused, and other keys are", arguments: [0, 101, -5])
  func quality(value: Int) {
    #expect(
      throws: RewardError.badValue(reward: "jpeg-size", key: "quality", expected: "1 to 100", got: "\(value)")
    ) { try score(Tensor.zeros([1, 3, 8, 8]), nil, quality: value) }
    var settings = RewardSettings(name: "jpeg-size")
    settings.language = "eng"
    #expect(throws: RewardError.foreignKey(reward: "jpeg-size", key: "language", known: ["quality"])) {
      try RewardFactory.make(settings)
    }
  }

  /// Oracle: ties and limits by hand.
  @Test("pixels are rounded to the nearest level and clamped")
  func rounding() throws {
    let levels: [Float] = [-1, 0, 0.4 / 255, 0.6 / 255, 1.5 / 255, 254.4 / 255, 1, 7]
    let images = try Tensor(levels + levels + levels, shape: [1, 3, 1, 8])
    let pixels = try rgbPictures(of: images)[0].pixels
    #expect(stride(from: 0, to: 24, by: 3).map { pixels[$0] } == [0, 0, 0, 1, 2, 254, 255, 255])
    #expect(try rgbPictures(of: Tensor.zeros([0, 3, 4, 4])).isEmpty)
  }
}
