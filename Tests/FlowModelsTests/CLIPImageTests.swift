import Foundation
import Testing
import Torch

@testable import FlowModels

/// Oracle: Pillow 12.0.0 (Tools/reference/make_clip_inputs.py). Bytes are integers: equality, no tolerance.
@Suite("CLIP images")
struct CLIPImageTests {
  private static let file = Result {
    try SafetensorsFile(Fixtures.clip.appending(path: "resize.safetensors"))
  }
  private static let edge = 16

  private func bytes(_ key: String) throws -> BicubicResize.Image<UInt8> {
    let tensor = try Self.file.get().require(key)
    return BicubicResize.Image(
      values: try tensor.array(), height: tensor.size(0), width: tensor.size(1), channels: 3)
  }

  @Test("resized bytes are Pillow's: up, down, one side, odd sizes, sides of one pixel", arguments: 0..<14)
  func resize(_ i: Int) throws {
    let expected = try bytes("resize.\(i).out")
    let ours = BicubicResize.resize(
      try bytes("resize.\(i).in"), height: expected.height, width: expected.width)
    #expect(ours.values == expected.values)
  }

  // Pillow sums each pass in float64 and stores float32; we sum in float32: some units of 2⁻²³.
  @Test("resized floats keep fractions and overshoot", arguments: 0..<14)
  func resizeFloat(_ i: Int) throws {
    let source = try bytes("resize.\(i).in")
    let expected = try Self.file.get().require("resize.\(i).float")
    let image = BicubicResize.Image(
      values: source.values.map { Float($0) / 255 }, height: source.height, width: source.width, channels: 3)
    let ours = BicubicResize.resize(image, height: expected.size(0), width: expected.size(1))
    let worst = zip(ours.values, try expected.floats()).map { abs($0 - $1) }.max() ?? .infinity
    #expect(worst < 3e-6)
  }

  /// The processor's result back in levels 0 … 255, [height, width, 3].
  private func square(_ i: Int, _ fit: CLIPImageProcessor.Fit, bytes: Bool = true) throws -> [Float] {
    let image = try self.bytes("square.\(i).in")
    let processor = CLIPImageProcessor(
      size: Self.edge, fit: fit, mean: [0, 0, 0], deviation: [1, 1, 1], bytes: bytes)
    let pixels = try processor(image.values, height: image.height, width: image.width)
    let plane = Self.edge * Self.edge
    return (0..<plane).flatMap { at in (0..<3).map { pixels[$0 * plane + at] * 255 } }
  }

  @Test("crop as transformers, crop as torchvision, squash, longest side with zeros", arguments: 0..<9)
  func squares(_ i: Int) throws {
    let fits: [(String, CLIPImageProcessor.Fit)] = [
      ("transformers", .shortestEdge(Self.edge, halves: .down)),
      ("torchvision", .shortestEdge(Self.edge, halves: .toNearestOrEven)), ("squash", .squash),
      ("longest", .longestEdge),
    ]
    for (name, fit) in fits {
      let levels = try square(i, fit).map { UInt8($0.rounded()) }
      #expect(levels == (try bytes("square.\(i).\(name)").values), "\(name)")
    }
    let float = try square(i, .longestEdge, bytes: false)
    let expected = try Self.file.get().require("square.\(i).hpsv2").floats()
    // As above, times 255.
    #expect((zip(float, expected).map { abs($0 - $1 * 255) }.max() ?? .infinity) < 1e-3)
  }

  @Test("the two crops differ where half a pixel is to be rounded (16 from 29 and 23 columns)")
  func cropsDiffer() throws {
    #expect(try bytes("square.2.transformers").values != bytes("square.2.torchvision").values)
  }

  @Test("a batch is its images; what is no image is refused")
  func batch() throws {
    let image = try Self.file.get().require("square.0.in")
    let processor = CLIPImageProcessor(size: Self.edge, fit: .squash)
    let pixels = try processor(try Tensor.stack([image, image]))
    #expect(pixels.shape == [2, 3, 16, 16] && pixels.dtype == .float32)
    let one = try processor(try image.array(), height: image.size(0), width: image.size(1))
    #expect(try pixels[0].floats() == one)
    #expect(try pixels[1].floats() == one)
    // (0/255 − mean)/deviation of black, by channel
    let black = try processor([UInt8](repeating: 0, count: 12), height: 2, width: 2)
    for c in 0..<3 {
      let expected = -CLIPImageProcessor.openAIMean[c] / CLIPImageProcessor.openAIDeviation[c]
      #expect(black[c * 256] == expected)
    }
    #expect(
      message { _ = try processor([1, 2, 3], height: 2, width: 2) }
        == "3 bytes are not an RGB image of 2 × 2 pixels")
    #expect(
      message { _ = try processor(try image.to(.float32).unsqueeze(0)) }
        == "images float32[1, 37, 53, 3]: expected uint8 [B, height, width, 3]")
    let narrow = CLIPImageProcessor(size: 8, fit: .longestEdge)
    #expect(
      message { _ = try narrow([UInt8](repeating: 0, count: 300), height: 1, width: 100) }
        == "an image of 1 × 100 pixels is too narrow for 8 × 8")
  }

  // MARK: - Configurations. Oracle: the published files' forms.

  private func processor(_ files: [String: String]) throws -> CLIPImageProcessor {
    let scratch = try Scratch()
    for (name, text) in files { try Data(text.utf8).write(to: scratch.path(name)) }
    return try CLIPImageProcessor(folder: scratch.url)
  }
  private static let config =
    #"{"text_config": {}, "vision_config": {"image_size": 224}, "projection_dim": 8}"#

  @Test("preprocessor_config.json, new form, old form and absent")
  func transformersConfig() throws {
    let expected = CLIPImageProcessor(size: 224, fit: .shortestEdge(224, halves: .down))
    let new = #"{"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "resample": 3}"#
    let old =
      #"{"size": 224, "crop_size": 224, "do_center_crop": true, "do_resize": true, "do_normalize": true}"#
    for text in [new, old, "{}"] {
      let files = ["config.json": Self.config, "preprocessor_config.json": text]
      #expect(try processor(files) == expected)
    }
    #expect(try processor(["config.json": Self.config]) == expected)
    let whole = #"{"size": {"height": 224, "width": 224}, "do_center_crop": false, "image_mean": [0, 0, 0]}"#
    let squashed = try processor(["config.json": Self.config, "preprocessor_config.json": whole])
    #expect(squashed == CLIPImageProcessor(size: 224, fit: .squash, mean: [0, 0, 0]))
  }

  @Test(
    "what is not computed is refused, naming the file",
    arguments: [
      (#"{"resample": 2}"#, "only bicubic resizing (resample 3)"),
      (#"{"do_normalize": false}"#, "rescaling by 1/255 and normalising are supported"),
      (#"{"crop_size": 336}"#, "do not come out as the 224 × 224"),
      (#"{"size": {"shortest_edge": 100}}"#, "size 100 is below crop_size 224"),
      (#"{"size": {"shortest_edge": 224}, "do_center_crop": false}"#, "size must be 224 × 224"),
      (#"{"image_std": [1, 0, 1]}"#, "std above 0"),
    ])
  func refused(_ text: String, _ expected: String) throws {
    let text = message {
      _ = try processor(["config.json": Self.config, "preprocessor_config.json": text])
    }
    #expect(text.contains(expected))
  }

  @Test("open_clip's preprocess_cfg: squash of DFN, shortest when absent, longest")
  func openCLIPConfig() throws {
    func config(_ preprocess: String) -> [String: String] {
      let model = #"{"embed_dim": 8, "vision_cfg": {"image_size": 378}, "text_cfg": {}}"#
      return ["open_clip_config.json": #"{"model_cfg": \#(model)\#(preprocess)}"#]
    }
    #expect(
      try processor(config(""))
        == CLIPImageProcessor(
          size: 378, fit: .shortestEdge(378, halves: .toNearestOrEven)))
    let dfn = #", "preprocess_cfg": {"interpolation": "bicubic", "resize_mode": "squash", "mean": [0, 0, 1]}"#
    #expect(try processor(config(dfn)) == CLIPImageProcessor(size: 378, fit: .squash, mean: [0, 0, 1]))
    #expect(
      try processor(config(#", "preprocess_cfg": {"resize_mode": "longest"}"#)).fit == .longestEdge)
    #expect(
      message { _ = try processor(config(#", "preprocess_cfg": {"resize_mode": "fill"}"#)) }
        .contains("resize_mode fill is not one of"))
    #expect(
      message { _ = try processor(config(#", "preprocess_cfg": {"interpolation": "bilinear"}"#)) }
        .contains("only interpolation bicubic"))
  }
}
