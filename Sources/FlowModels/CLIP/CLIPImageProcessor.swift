import Dispatch
import Foundation
import Synchronization
import Torch

/// Makes of an image of any size what CLIP's vision tower takes: resized as by Pillow, to the grey level, and
/// normalised.
public struct CLIPImageProcessor: Sendable, Equatable {
  /// How an image comes to be square.
  public enum Fit: Sendable, Equatable {
    /// The shorter side becomes `edge`, then the middle is cut out. The cut's offset, where it is half a
    /// pixel, is rounded by `halves`: down in transformers, to even in torchvision (open_clip).
    case shortestEdge(Int, halves: FloatingPointRoundingRule)
    /// Both sides are resized, whatever their ratio.
    case squash
    /// The longer side is resized to the size, the rest filled with zeros on both sides.
    case longestEdge
  }

  /// Mean and deviation of OpenAI's training images, by channel.
  public static let openAIMean: [Float] = [0.48145466, 0.4578275, 0.40821073]
  /// See ``openAIMean``.
  public static let openAIDeviation: [Float] = [0.26862954, 0.26130258, 0.27577711]

  /// Side of the square result.
  public var size: Int
  /// How it becomes square.
  public var fit: Fit
  /// Subtracted from values in 0 … 1, by channel.
  public var mean: [Float]
  /// Divides what is left, by channel.
  public var deviation: [Float]
  /// Whether resized values are bytes, as in Pillow's images; HPSv2 resizes floats, which keep fractions and
  /// overshoot.
  public var bytes: Bool

  /// Creates a processor; mean and deviation are OpenAI's unless given.
  public init(
    size: Int, fit: Fit, mean: [Float] = openAIMean, deviation: [Float] = openAIDeviation, bytes: Bool = true
  ) {
    (self.size, self.fit, self.mean, self.deviation, self.bytes) = (size, fit, mean, deviation, bytes)
  }

  /// RGB bytes [height, width, 3] → normalised pixels [3, size, size], row-major both.
  ///
  /// - Throws: ``ModelError`` when `image` does not fill the size, or the result would have no row or column.
  public func callAsFunction(_ image: [UInt8], height: Int, width: Int) throws(ModelError) -> [Float] {
    guard height > 0, width > 0, image.count == height * width * 3 else {
      throw ModelError("\(image.count) bytes are not an RGB image of \(height) × \(width) pixels")
    }
    let square: [Float]
    if bytes {
      let resized = try fitted(
        BicubicResize.Image(values: image, height: height, width: width, channels: 3), zero: 0)
      square = resized.values.map { Float($0) / 255 }
    } else {
      let values = image.map { Float($0) / 255 }
      square = try fitted(
        BicubicResize.Image(values: values, height: height, width: width, channels: 3), zero: 0
      ).values
    }
    var result: [Float] = []
    result.reserveCapacity(square.count)
    for channel in 0..<3 {
      for i in stride(from: channel, to: square.count, by: 3) {
        result.append((square[i] - mean[channel]) / deviation[channel])
      }
    }
    return result
  }

  /// Images [B, H, W, 3] uint8 → normalised pixels [B, 3, size, size] float32, on the CPU, an image a thread.
  public func callAsFunction(_ images: Tensor) throws -> Tensor {
    let s = images.shape
    guard s.count == 4, s[3] == 3, images.dtype == .uint8 else {
      throw ModelError("images \(images.dtype)\(s): expected uint8 [B, height, width, 3]")
    }
    let values = try images.array(of: UInt8.self)
    let each = s[1] * s[2] * 3
    let results = Mutex([Result<[Float], ModelError>?](repeating: nil, count: s[0]))
    DispatchQueue.concurrentPerform(iterations: s[0]) { i in
      let image = Array(values[(i * each)..<((i + 1) * each)])
      let result = Result { () throws(ModelError) in try self(image, height: s[1], width: s[2]) }
      results.withLock { $0[i] = result }
    }
    var pixels: [Float] = []
    pixels.reserveCapacity(s[0] * 3 * size * size)
    for result in results.withLock({ $0 }) { pixels += try result!.get() }
    return try Tensor(pixels, shape: [s[0], 3, size, size])
  }

  /// `image` as a square of ``size``.
  private func fitted<S: BicubicSample>(
    _ image: BicubicResize.Image<S>, zero: S
  ) throws(ModelError) -> BicubicResize.Image<S> {
    let (height, width) = resizedSides(image.height, image.width)
    guard height > 0, width > 0 else {
      throw ModelError(
        "an image of \(image.height) × \(image.width) pixels is too narrow for \(size) × \(size)")
    }
    let resized = BicubicResize.resize(image, height: height, width: width)
    if height == size, width == size { return resized }
    let top: Int
    let left: Int
    switch fit {
    case .shortestEdge(_, let halves):
      top = Int((Double(height - size) / 2).rounded(halves))
      left = Int((Double(width - size) / 2).rounded(halves))
    case .squash, .longestEdge:  // negative: rows and columns of zeros
      (top, left) = (-((size - height) / 2), -((size - width) / 2))
    }
    var values = [S](repeating: zero, count: size * size * image.channels)
    for row in max(-top, 0)..<min(size, height - top) {
      for column in max(-left, 0)..<min(size, width - left) {
        for channel in 0..<image.channels {
          let from = ((row + top) * width + column + left) * image.channels + channel
          values[(row * size + column) * image.channels + channel] = resized.values[from]
        }
      }
    }
    return BicubicResize.Image(values: values, height: size, width: size, channels: image.channels)
  }

  private func resizedSides(_ height: Int, _ width: Int) -> (height: Int, width: Int) {
    switch fit {
    case .squash: return (size, size)
    case .shortestEdge(let edge, _):
      let long = Int(Double(edge * max(height, width)) / Double(min(height, width)))
      return height <= width ? (edge, long) : (long, edge)
    case .longestEdge:
      let scale = Double(size) / Double(max(height, width))
      func scaled(_ side: Int) -> Int { Int((Double(side) * scale).rounded(.toNearestOrEven)) }
      return (scaled(height), scaled(width))
    }
  }
}

extension CLIPImageProcessor {
  /// What a CLIP folder asks for: `open_clip_config.json`'s preprocess_cfg, or `preprocessor_config.json`;
  /// without either, the shorter side of the vision tower's size and OpenAI's mean and deviation.
  ///
  /// - Throws: ``ModelError`` for steps that are not computed here.
  public init(folder: URL) throws {
    let size = try CLIPModel.Config(folder: folder).vision.imageSize
    let files = FileManager.default
    let open = folder.appending(path: "open_clip_config.json")
    let processor = folder.appending(path: "preprocessor_config.json")
    if files.fileExists(atPath: open.path) {
      let file = try ModelFolder.decode(OpenCLIPFile.self, open)
      try self.init(file.preprocessCfg ?? OpenCLIPFile.Preprocess(), size: size, source: open.path)
    } else if files.fileExists(atPath: processor.path) {
      try self.init(ModelFolder.decode(ProcessorFile.self, processor), size: size, source: processor.path)
    } else {
      self.init(size: size, fit: .shortestEdge(size, halves: .down))
    }
    guard mean.count == 3, deviation.count == 3, deviation.allSatisfy({ $0 > 0 }) else {
      throw ModelError("\(folder.path): image mean and std must be three numbers each, std above 0")
    }
  }

  private struct OpenCLIPFile: Decodable {
    struct Preprocess: Decodable {
      var mean: [Float]?
      var std: [Float]?
      var interpolation: String?
      var resizeMode: String?
      var fillColor: Double?
    }
    let preprocessCfg: Preprocess?
  }

  private init(_ c: OpenCLIPFile.Preprocess, size: Int, source: String) throws(ModelError) {
    let modes: [String: Fit] = [
      "shortest": .shortestEdge(size, halves: .toNearestOrEven), "squash": .squash, "longest": .longestEdge,
    ]
    let mode = c.resizeMode ?? "shortest"
    guard let fit = modes[mode] else {
      throw ModelError("\(source): resize_mode \(mode) is not one of \(modes.keys.sorted())")
    }
    guard [nil, "bicubic"].contains(c.interpolation), c.fillColor ?? 0 == 0 else {
      throw ModelError("\(source): only interpolation bicubic and fill_color 0 are supported")
    }
    self.init(size: size, fit: fit, mean: c.mean ?? Self.openAIMean, deviation: c.std ?? Self.openAIDeviation)
  }

  private struct ProcessorFile: Decodable {
    /// Newer files say which side they mean, older ones give a number.
    struct Size: Decodable {
      var shortestEdge, height, width: Int?
      private enum CodingKeys: CodingKey { case shortestEdge, height, width }
      init(from decoder: any Decoder) throws {
        if let number = try? decoder.singleValueContainer().decode(Int.self) {
          (shortestEdge, height, width) = (number, number, number)
          return
        }
        let c = try decoder.container(keyedBy: CodingKeys.self)
        shortestEdge = try c.decodeIfPresent(Int.self, forKey: .shortestEdge)
        height = try c.decodeIfPresent(Int.self, forKey: .height)
        width = try c.decodeIfPresent(Int.self, forKey: .width)
      }
    }
    let size, cropSize: Size?
    let resample: Int?
    let doResize, doCenterCrop, doRescale, doNormalize: Bool?
    let rescaleFactor: Double?
    let imageMean, imageStd: [Float]?
  }

  private init(_ c: ProcessorFile, size: Int, source: String) throws(ModelError) {
    let crops = c.doCenterCrop ?? true
    let sides = crops ? c.cropSize : c.size
    let supported =
      ![c.doResize, c.doRescale, c.doNormalize].contains(false) && c.resample ?? 3 == 3
      && abs((c.rescaleFactor ?? 1 / 255) * 255 - 1) < 1e-6
    guard supported else {
      throw ModelError(
        "\(source): only bicubic resizing (resample 3), rescaling by 1/255 and normalising are supported")
    }
    guard sides?.height ?? size == size, sides?.width ?? size == size else {
      throw ModelError("\(source): images do not come out as the \(size) × \(size) that the model takes")
    }
    let fit: Fit
    if let edge = crops ? c.size?.shortestEdge ?? (c.size == nil ? size : nil) : nil {
      guard edge >= size else { throw ModelError("\(source): size \(edge) is below crop_size \(size)") }
      fit = .shortestEdge(edge, halves: .down)
    } else {
      guard c.size?.height == size, c.size?.width == size else {
        throw ModelError("\(source): size must be \(size) × \(size), or a shortest_edge that is cropped")
      }
      fit = .squash
    }
    self.init(
      size: size, fit: fit, mean: c.imageMean ?? Self.openAIMean,
      deviation: c.imageStd ?? Self.openAIDeviation)
  }
}
