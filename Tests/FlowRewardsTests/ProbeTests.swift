import CCairo
import Foundation
import Testing
import Torch

@testable import FlowRewards
@testable import Pictures

/// The images that rewards are tried with before a run, `Data/probe/*.png`, and what made them.
///
/// After a change that is meant: `RECORD_PROBES=1 swift test --filter ProbeTests`, and look at them.
@Suite("probe images")
struct ProbeTests {
  static let isRecording = ProcessInfo.processInfo.environment["RECORD_PROBES"] != nil

  static func folder() throws -> URL {
    try Assets.locate("sprites.safetensors").deletingLastPathComponent().appending(path: "probe")
  }
  static func image(_ name: String) throws -> Tensor {
    try tensor([Image(png: folder().appending(path: name))])
  }

  /// A red sign that says OPEN, a tree, a meadow and the sky.
  static func sign() throws -> Image {
    let canvas = try Canvas(width: 256, height: 256)
    func box(_ x: Double, _ y: Double, _ width: Double, _ height: Double, _ hex: UInt32) {
      canvas.fill([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], Colour(hex), alpha: 1)
    }
    box(0, 0, 256, 220, 0x5AA9E6)
    box(0, 220, 256, 36, 0x5AA04A)
    box(80, 130, 10, 95, 0x705030)
    box(8, 40, 168, 90, 0xB01010)
    canvas.font(size: 40, bold: true)
    canvas.text("OPEN", x: 92, y: 99, Colour(0xFFF2B0), anchor: .middle)
    box(212, 150, 10, 75, 0x6B4423)
    canvas.fill(
      (0..<72).map { i in
        let angle = Double(i) / 36 * .pi
        return (217 + 30 * cos(angle), 122 + 43 * sin(angle))
      }, Colour(0x1F7A2E), alpha: 1)
    return try canvas.image()
  }

  /// The first seeded drawing in which the verifier finds all of the scene.
  static func scene() throws -> Image {
    let renderer = try SceneRenderer(sprites: Assets.locate("sprites.safetensors"))
    let prompt = RewardProbe.scene.prompt
    var beside = prompt
    beside.scene?.relation = "left of"
    return try rgbPictures(of: renderer.render([beside], using: [Seeded(state: 3)]))[0]
  }

  static func made() throws -> [(name: String, image: Image)] {
    [
      ("sign.png", try sign()),
      ("plane.png", Image(width: 256, height: 256, red: 128, green: 128, blue: 128)),
      ("scene.png", try scene()), ("canvas.png", Image(width: 64, height: 64)),
    ]
  }

  /// Oracle: the generator above. Letters differ a little between versions of the font library.
  @Test("the committed images are those of the generator, and small")
  func committed() throws {
    for (name, image) in try Self.made() {
      let file = try Self.folder().appending(path: name)
      if Self.isRecording { try image.write(png: file) }
      #expect(try Data(contentsOf: file).count < 40_000)
      let stored = try Image(png: file)
      try #require(stored.width == image.width && stored.height == image.height)
      let difference = zip(stored.pixels, image.pixels).reduce(0) { $0 + abs(Int($1.0) - Int($1.1)) }
      let limit = name == "sign.png" ? 1.0 : 0
      #expect(Double(difference) / Double(image.pixels.count) <= limit, "\(name)")
    }
  }

  /// Oracle: which image shows what the prompt says, by eye.
  @Test(
    "native rewards rank their probe as promised",
    arguments: [
      ("scenes", "strict"), ("scenes", "graded"), ("vivid", nil), ("ocr", nil), ("sharpness", nil),
      ("jpeg-size", "positive"), ("jpeg-size", "negative"),
    ] as [(String, String?)])
  func ranks(name: String, score: String?) throws {
    let reward = try RewardFactory.make(name: name, score: score)
    let probe = reward.probe
    try reward.check([probe.prompt])
    let values = try [probe.better, probe.worse].map { file in
      let score = try reward.scoresNow(Self.image(file), prompts: [probe.prompt])[0]
      return try #require(score.value)
    }
    #expect(values[0] > values[1], "\(values)")
    if name == "scenes" { #expect(values[0] == 1) }
    if name == "ocr" { #expect(values == [1, 0]) }
  }
}

/// [B, 3, H, W] of pictures of one size.
func tensor(_ pictures: [Image]) throws -> Tensor {
  let (height, width) = (pictures[0].height, pictures[0].width)
  let values = pictures.flatMap { picture in
    (0..<3).flatMap { channel in
      stride(from: channel, to: picture.pixels.count, by: 3).map { Float(picture.pixels[$0]) / 255 }
    }
  }
  return try Tensor(values, shape: [pictures.count, 3, height, width])
}
