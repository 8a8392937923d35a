import Foundation
import Testing
import Torch

@testable import FlowRewards
@testable import Pictures

/// Words in large letters, one a line.
private func page(
  _ lines: String..., side: Int = 256, size: Double = 40, ink: UInt32 = 0, paper: UInt32 = 0xFFFFFF
)
  throws -> Image
{
  let canvas = try Canvas(width: side, height: side)
  let end = Double(side)
  canvas.fill([(0, 0), (end, 0), (end, end), (0, end)], Colour(paper), alpha: 1)
  canvas.font(size: size, bold: true)
  for (i, line) in lines.enumerated() {
    let y = end * Double(i + 1) / Double(lines.count + 1) + size * 0.36
    canvas.text(line, x: end / 2, y: y, Colour(ink), anchor: .middle)
  }
  return try canvas.image()
}

@Suite("ocr")
struct OCRTests {
  /// Oracle: textbook distances, and the definition's corners.
  @Test(
    "edit distance",
    arguments: [
      ("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2),
      ("intention", "execution", 5), ("open", "open", 0), ("open", "opne", 2),
    ])
  func editDistance(a: String, b: String, expected: Int) {
    #expect(FlowRewards.editDistance(a, b) == expected)
    #expect(FlowRewards.editDistance(b, a) == expected)
  }

  /// Oracle: flow_grpo's rule, by hand.
  @Test("case and spaces do not count, what is contained is found, accents are composed")
  func distances() {
    func distance(_ target: String, _ read: String) -> Int {
      OCR.distance(from: OCR.folded(target), to: OCR.folded(read))
    }
    #expect(distance("New York", "newyork\n") == 0)
    #expect(distance("OPEN", "we are\nop en daily") == 0)
    #expect(distance("OPEN", "OPN") == 1)
    #expect(distance("OPEN", "") == 4)
    #expect(distance("caf\u{E9}", "CAFE\u{301}") == 0)
    #expect(distance("STRASSE", "straße") == 2)
  }

  @Test(
    "the text is what the first pair of double quotes holds",
    arguments: [
      (#"a sign that says "OPEN" and "SHUT""#, "OPEN"), ("a sign, “Hello World”, in chalk", "Hello World"),
      (#"“a "b" c” d"#, #"a "b" c"#), (#"x " y " z"#, "y"), ("it's 'open'", nil), (#"one " alone"#, nil),
      (#"empty "" and "full""#, nil), ("“ ” x", nil), ("", nil),
    ] as [(String, String?)])
  func targets(prompt: String, expected: String?) {
    #expect(OCR.target(of: prompt) == expected)
  }

  /// Oracle: what was drawn. Large dark letters are read without mistakes.
  @Test("exact scores of drawn words")
  func scores() throws {
    let reward = try RewardFactory.make(name: "ocr")
    func score(_ image: Image, _ text: String) throws -> RewardScore {
      try reward.scoresNow(tensor([image]), prompts: [RewardPrompt(text: "a page with \"\(text)\"")])[0]
    }
    let open = try page("OPEN")
    #expect(try score(open, "open") == RewardScore(value: 1, parts: ["characters": 4]))
    // One letter more: 1 of 5 is missing. Others: none in common, so that all 3 count, not 4.
    #expect(try score(open, "opens").value == 1 - 1.0 / 5)
    #expect(try score(open, "pen").value == 1)
    #expect(try score(open, "xyz").value == 0)
    #expect(try score(page("Hello", "World"), "HELLO world").value == 1)
    // 64 pixels, enlarged; white on red; nothing at all.
    #expect(try score(page("OPEN", side: 64, size: 18), "OPEN").value == 1)
    #expect(try score(page("OPEN", ink: 0xFFFFFF, paper: 0xC01818), "OPEN").value == 1)
    #expect(
      try score(Image(width: 64, height: 64), "OPEN") == RewardScore(value: 0, parts: ["characters": 0]))
  }

  @Test("images of one call keep their order; one that is not finite earns nothing")
  func order() throws {
    let reward = try OCR()
    let images = try Tensor.cat([
      tensor([page("HOUSE", size: 30), page("RIVER", size: 30)]), Tensor.full([1, 3, 256, 256], .nan),
    ])
    let prompts = ["HOUSE", "RIVER", "RIVER"].map { RewardPrompt(text: "\"\($0)\"") }
    let scores = try reward.scores(images, prompts: prompts)
    #expect(scores.map(\.value) == [1, 1, nil] && scores[2].failure == RewardScore.notFinite.failure)
  }

  @Test("prompts without quoted text are refused, the first of them named")
  func check() throws {
    let reward = try OCR()
    try reward.check([RewardPrompt(text: "\"a\""), RewardPrompt(text: "“b”")])
    let prompts = (0..<5).map { RewardPrompt(text: $0 == 1 ? "\"x\"" : "prompt \($0)") }
    #expect(throws: OCRError.noQuotedText(prompts: ["prompt 0", "prompt 2", "prompt 3"], count: 4)) {
      try reward.check(prompts)
    }
    let text = OCRError.noQuotedText(prompts: ["a cat"], count: 1).description
    #expect(text.contains("'a cat'") && text.contains("double quotes"))
  }

  @Test("a missing library or language says what to install")
  func missing() throws {
    let names = ["libno-such-thing.so.9", "libnor-this.so"]
    let error = #expect(throws: OCRError.self) { try Tesseract(language: "eng", libraries: names) }
    for word in names + ["apt-get install libtesseract5 tesseract-ocr-eng"] {
      #expect("\(try #require(error))".contains(word))
    }
    #expect(throws: OCRError.foreignLibrary(path: "libm.so.6", missing: "TessBaseAPICreate")) {
      try Tesseract(language: "eng", libraries: ["libm.so.6"])
    }
    var settings = RewardSettings(name: "ocr")
    settings.language = "tlh_Latn"
    let language = #expect(throws: OCRError.self) { try RewardFactory.make(settings) }
    for word in ["\"tlh_Latn\"", "tesseract-ocr-tlh-latn", "TESSDATA_PREFIX"] {
      #expect("\(try #require(language))".contains(word), "\(language!)")
    }
  }

  @Test(
    "enlarged by the smallest whole factor to 300 pixels",
    arguments: [(64, 64, 5), (256, 512, 2), (300, 300, 1), (299, 1000, 2), (1024, 1024, 1), (1, 7, 300)])
  func factor(width: Int, height: Int, factor: Int) {
    #expect(OCR.factor(width, height) == factor)
  }

  /// Oracle: sorting.
  @Test("medians of sliding squares", arguments: [1, 3, 20])
  func medians(radius: Int) {
    var generator = Seeded(state: 9)
    let (rows, columns) = (13, 17)
    let values = (0..<rows * columns).map { _ in UInt8.random(in: 0...255, using: &generator) }
    let found = OCR.medians(values, rows: rows, columns: columns, radius: radius)
    for row in 0..<rows {
      for column in 0..<columns {
        let window = (max(0, row - radius)...min(rows - 1, row + radius)).flatMap { y in
          (max(0, column - radius)...min(columns - 1, column + radius)).map { values[y * columns + $0] }
        }.sorted()
        #expect(found[row * columns + column] == window[window.count / 2])
      }
    }
  }

  /// Oracle: the definition on a picture of two colours.
  @Test("strokes are dark on white, whatever their colours")
  func background() throws {
    for (paper, ink) in [(UInt8(200), UInt8(20)), (20, 200)] {
      var image = Image(width: 120, height: 90, red: paper, green: paper, blue: 90)
      for y in 20..<70 { for x in 58..<62 { image.pixels[3 * (y * 120 + x)] = ink } }
      let grey = OCR.withoutBackground(image, window: 8)
      for y in 0..<90 {
        for x in 0..<120 {
          #expect(grey[y * 120 + x] == ((20..<70).contains(y) && (58..<62).contains(x) ? 75 : 255))
        }
      }
    }
  }
}
