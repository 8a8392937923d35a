import Foundation
import Pictures
import Torch

/// How much of the text that the prompt puts in quotes can be read in the image: 1 − min(d, n)/n, with n the
/// length of that text and d its edit distance from what tesseract reads, 0 where it is contained in that.
///
/// Both texts are compared in lower case and without spaces and line breaks, by Unicode scalars in composed
/// form. Source: yifan123/flow_grpo@ac4c86e flow_grpo/ocr.py#L31-L60, which reads with PaddleOCR and
/// knows straight quotes only.
///
/// Every image is enlarged by the smallest whole factor that makes its shorter side at least 300 pixels. It
/// is read as it is and, until the text is found, again without its background, taken over squares of a 16th
/// and of an 8th of the shorter side (``withoutBackground(_:window:)``); the smallest d counts. Tesseract was
/// made for pages: large clear letters are read reliably, ornate or tilted ones are not.
public struct OCR: LocalReward {
  /// `ocr`.
  public let name = "ocr"
  private let engine: Tesseract
  /// Pixels of the shorter side below which an image is enlarged.
  static let side = 300
  /// Parts of the shorter side over which backgrounds are taken.
  static let windows = [16, 8]

  /// Creates the reward with tesseract's data for `language`, e.g. `eng` or `deu+eng`.
  ///
  /// - Throws: ``OCRError`` where the library or the data is missing.
  public init(language: String = "eng") throws(OCRError) {
    engine = try Tesseract(language: language)
  }

  /// Throws ``OCRError/noQuotedText(prompts:count:)`` unless every prompt quotes a text.
  public func check(_ prompts: [RewardPrompt]) throws {
    let bad = prompts.filter { Self.target(of: $0.text) == nil }
    guard bad.isEmpty else {
      throw OCRError.noQuotedText(prompts: bad.prefix(3).map(\.text), count: bad.count)
    }
  }

  /// Scores of images of any size; part `characters` counts what was read, without spaces.
  public func scores(_ images: Tensor, prompts: [RewardPrompt]) throws -> [RewardScore] {
    try checkImages(images, for: name, prompts: prompts.count)
    try check(prompts)
    let finite = try finiteImages(images)
    return try zip(zip(rgbPictures(of: images), finite), prompts).map { image, prompt in
      guard image.1 else { return .notFinite }
      return try score(image.0, target: Self.target(of: prompt.text)!)
    }
  }

  private func score(_ image: Pictures.Image, target: String) throws -> RewardScore {
    let target = Self.folded(target)
    let picture = try image.enlarged(Self.factor(image.width, image.height))
    var (read, distance) = ([Unicode.Scalar](), Int.max)
    for window in [nil] + Self.windows.map(Optional.init) where distance > 0 {
      let text =
        if let window {
          engine.read(
            Self.withoutBackground(picture, window: window), width: picture.width, height: picture.height,
            channels: 1)
        } else {
          engine.read(picture.pixels, width: picture.width, height: picture.height, channels: 3)
        }
      guard let text else { return RewardScore(value: nil, failure: "tesseract failed") }
      let found = Self.folded(text)
      let other = Self.distance(from: target, to: found)
      if other < distance { (read, distance) = (found, other) }
    }
    return RewardScore(
      value: 1 - Double(min(distance, target.count)) / Double(target.count),
      parts: ["characters": Double(read.count)])
  }

  /// How much an image is enlarged before it is read.
  static func factor(_ width: Int, _ height: Int) -> Int { max(1, (side - 1) / min(width, height) + 1) }

  // MARK: - Text

  /// The first text in straight or curly double quotes, without outer spaces; nil if there is none but blanks.
  static func target(of prompt: String) -> String? {
    guard let open = prompt.firstIndex(where: { $0 == "\"" || $0 == "“" }) else { return nil }
    let rest = prompt[prompt.index(after: open)...]
    guard let close = rest.firstIndex(of: prompt[open] == "“" ? "”" : "\"") else { return nil }
    let text = rest[..<close].trimmingCharacters(in: .whitespacesAndNewlines)
    return folded(text).isEmpty ? nil : text
  }

  /// `text` in lower case, composed, without white space.
  static func folded(_ text: String) -> [Unicode.Scalar] {
    text.lowercased().precomposedStringWithCanonicalMapping.unicodeScalars
      .filter { !$0.properties.isWhitespace }
  }

  /// Edit distance, or 0 where `read` contains `target`.
  static func distance(from target: [Unicode.Scalar], to read: [Unicode.Scalar]) -> Int {
    read.firstRange(of: target) != nil ? 0 : editDistance(target, read)
  }

  // MARK: - Background

  /// The picture in grey, dark where it differs from what surrounds it: white letters on a red sign and red
  /// letters on a white one become dark letters on white.
  ///
  /// One byte a pixel: 255 minus the largest difference of a channel from the background. That is the median
  /// over a square of about a `window`th of the shorter side, of which the strokes of a letter fill less than
  /// half, taken on a picture reduced to at most 128 blocks along its longer side.
  static func withoutBackground(_ picture: Pictures.Image, window: Int) -> [UInt8] {
    let (width, height) = (picture.width, picture.height)
    let block = (max(width, height) - 1) / 128 + 1
    let (columns, rows) = ((width - 1) / block + 1, (height - 1) / block + 1)
    let radius = max(1, min(columns, rows) / (2 * window))
    return picture.pixels.withUnsafeBufferPointer { pixels in
      var result = [UInt8](repeating: 255, count: width * height)
      for channel in 0..<3 {
        var reduced = [UInt8](repeating: 0, count: rows * columns)
        for row in 0..<rows {
          for column in 0..<columns {
            var (sum, count) = (0, 0)
            for y in row * block..<min((row + 1) * block, height) {
              for x in column * block..<min((column + 1) * block, width) {
                sum += Int(pixels[3 * (y * width + x) + channel])
                count += 1
              }
            }
            reduced[row * columns + column] = UInt8((sum + count / 2) / count)
          }
        }
        let background = medians(reduced, rows: rows, columns: columns, radius: radius)
        for y in 0..<height {
          for x in 0..<width {
            let value = Int(pixels[3 * (y * width + x) + channel])
            let difference = abs(value - Int(background[y / block * columns + x / block]))
            result[y * width + x] = min(result[y * width + x], UInt8(255 - difference))
          }
        }
      }
      return result
    }
  }

  /// Medians over the part of a square of 2·`radius` + 1 that lies in the image; of two middle values the
  /// upper.
  static func medians(_ values: [UInt8], rows: Int, columns: Int, radius: Int) -> [UInt8] {
    var result = [UInt8](repeating: 0, count: rows * columns)
    for row in 0..<rows {
      let lines = max(0, row - radius)...min(rows - 1, row + radius)
      var histogram = [Int](repeating: 0, count: 256)
      var count = 0
      func column(_ x: Int, _ step: Int) {
        guard 0..<columns ~= x else { return }
        for line in lines { histogram[Int(values[line * columns + x])] += step }
        count += step * lines.count
      }
      for x in 0..<radius { column(x, 1) }
      for x in 0..<columns {
        column(x + radius, 1)
        column(x - radius - 1, -1)
        var (level, below) = (0, histogram[0])
        while below <= count / 2 {
          level += 1
          below += histogram[level]
        }
        result[row * columns + x] = UInt8(level)
      }
    }
    return result
  }
}

extension RewardKind {
  /// Quoted text.
  static let ocr = RewardKind("ocr", keys: [.language]) { settings, _ in
    try OCR(language: settings.language ?? "eng")
  }
}
