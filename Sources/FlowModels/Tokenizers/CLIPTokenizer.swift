import Foundation

/// CLIP's lower-cased byte-level BPE: NFC, whitespace collapsed, lower case, split into words, merged by
/// rank.
///
/// All work is on Unicode scalars and bytes: Swift's `Character` would join marks, emoji and CR-LF that the
/// reference treats one code point at a time.
///
/// Source: openai/CLIP@0848ed7 clip/simple_tokenizer.py#L62-L127; checked against transformers'
/// CLIPTokenizer.
public struct CLIPTokenizer: Sendable {
  /// Whose tokenizer is followed; vocabulary and merges are the same.
  public enum Style: Sendable {
    /// transformers': `<|startoftext|>`, `<|endoftext|>` and the padding token, as configured, in a text are
    /// those tokens wherever they stand: where padding is `!`, as for SD3's second encoder, so is every `!`.
    case transformers
    /// open_clip's: text is cleaned first (quotes, HTML references, full-width forms), the tokens are spelt
    /// `<start_of_text>` and `<end_of_text>`, and id 0 fills the rest.
    case openCLIP
  }

  /// `model_max_length` of the configuration, 77 when it names none.
  public let maximumLength: Int
  /// Ids of `<|startoftext|>`, of `<|endoftext|>`, and of the token that fills the rest.
  public let start, end, pad: Int64

  /// Id of each byte inside a word, and of each byte that ends one.
  private let inner, final: [Int32]
  /// By the pair of ids that it joins; a lower rank goes first.
  private let merges: [Pair: Merge]

  private struct Pair: Hashable { let left, right: Int32 }
  private struct Merge { let rank, id: Int32 }

  private static let startToken = "<|startoftext|>", endToken = "<|endoftext|>"
  private let style: Style
  /// Tokens that transformers cuts out of a text before anything else is done to it.
  private let special: [(text: [Unicode.Scalar], id: Int64)]
  /// How start and end token are written in a text, then what is one word as well.
  private let whole: [[Unicode.Scalar]]

  /// Reads `vocab.json`, `merges.txt` and, when there is one, `tokenizer_config.json`.
  ///
  /// - Throws: ``TokenizerError`` for a missing or malformed file, or one that contradicts another.
  public init(folder: URL, style: Style = .transformers) throws(TokenizerError) {
    self.style = style
    let special =
      style == .transformers ? [Self.startToken, Self.endToken] : ["<start_of_text>", "<end_of_text>"]
    whole = (special + ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]).map { Array($0.unicodeScalars) }
    let vocabularyPath = folder.appendingPathComponent("vocab.json").path
    let settings = try Settings(folder: folder)
    // String keys compare by canonical equivalence; the byte alphabet has no combining marks, so none collide.
    let vocabulary: [String: Int32]
    do {
      vocabulary = try JSONDecoder().decode(
        [String: Int32].self, from: TokenizerError.read("vocab.json", in: folder))
    } catch let error as TokenizerError { throw error } catch {
      throw .malformed(path: vocabularyPath, problem: "not a JSON object from token to id")
    }
    guard Set(vocabulary.values).count == vocabulary.count, vocabulary.values.allSatisfy({ $0 >= 0 }) else {
      throw .malformed(path: vocabularyPath, problem: "ids are negative or used twice")
    }
    func id(_ token: String) throws(TokenizerError) -> Int32 {
      if let id = vocabulary[token] { return id }
      throw .malformed(path: vocabularyPath, problem: "no id for the token \"\(token)\"")
    }
    (start, end) = (Int64(try id(Self.startToken)), Int64(try id(Self.endToken)))
    pad = style == .openCLIP ? 0 : Int64(try id(settings.pad))
    self.special =
      style == .openCLIP
      ? []
      : [(Self.startToken, start), (Self.endToken, end), (settings.pad, pad)].map {
        (Array($0.0.unicodeScalars), $0.1)
      }
    maximumLength = settings.length
    var inner: [Int32] = [], final: [Int32] = []
    for symbol in Self.byteSymbols {
      inner.append(try id(String(symbol)))
      final.append(try id(String(symbol) + "</w>"))
    }
    (self.inner, self.final) = (inner, final)

    let text = try TokenizerError.read("merges.txt", in: folder)
    let mergesPath = folder.appendingPathComponent("merges.txt").path
    var merges: [Pair: Merge] = [:], rank: Int32 = 0
    let lines = text.split(separator: UInt8(ascii: "\n"), omittingEmptySubsequences: false)
    for (number, line) in lines.enumerated() {
      let line = line.last == UInt8(ascii: "\r") ? line.dropLast() : line
      if line.isEmpty || (number == 0 && line.starts(with: "#version".utf8)) { continue }
      let parts = line.split(separator: UInt8(ascii: " ")).map { String(decoding: $0, as: UTF8.self) }
      guard parts.count == 2, let left = vocabulary[parts[0]], let right = vocabulary[parts[1]],
        let joined = vocabulary[parts[0] + parts[1]]
      else {
        throw .malformed(
          path: mergesPath,
          problem: "line \(number + 1) is not two tokens of vocab.json that join to a third")
      }
      merges[Pair(left: left, right: right)] = Merge(rank: rank, id: joined)
      rank += 1
    }
    self.merges = merges
  }

  /// Start token, the words of `text`, end token, padding; a text that is too long keeps its end token.
  ///
  /// - Precondition: `length` is at least 2 (start and end).
  public func encode(_ text: String, length: Int) -> TokenizedText {
    precondition(length >= 2, "CLIPTokenizer.encode: length \(length), need at least 2 for start and end")
    var ids = [start], truncated = 0
    func add(_ tokens: [Int64]) {
      let room = min(tokens.count, length - 1 - ids.count)
      ids += tokens[..<room]
      truncated += tokens.count - room
    }
    for (part, token) in parts(text) {
      for word in words(clean(part)) {
        add(word.elementsEqual(whole[0]) ? [start] : word.elementsEqual(whole[1]) ? [end] : merge(word))
      }
      if let token { add([token]) }
    }
    ids.append(end)
    ids += [Int64](repeating: pad, count: length - ids.count)
    return TokenizedText(ids: ids, truncated: truncated)
  }

  /// `text` cut at ``special`` tokens: what stands before one, and its id.
  private func parts(_ text: String) -> [(String, Int64?)] {
    let scalars = Array(text.unicodeScalars)
    var parts: [(String, Int64?)] = []
    var begin = 0, at = 0
    func piece(_ end: Int) -> String {
      var view = String.UnicodeScalarView()
      view.append(contentsOf: scalars[begin..<end])
      return String(view)
    }
    while at < scalars.count {
      if let hit = special.first(where: { !$0.text.isEmpty && scalars[at...].starts(with: $0.text) }) {
        parts.append((piece(at), hit.id))
        at += hit.text.count
        begin = at
      } else {
        at += 1
      }
    }
    return parts + [(piece(scalars.count), nil)]
  }

  /// One word's ids: its bytes, then the pair of lowest rank joined everywhere until no pair is left.
  private func merge(_ word: ArraySlice<Unicode.Scalar>) -> [Int64] {
    var bytes = word.flatMap { Array(UTF8.encode($0)!) }
    let last = bytes.removeLast()
    var ids = bytes.map { inner[Int($0)] } + [final[Int(last)]]
    while true {
      var best: (pair: Pair, merge: Merge)?
      for index in 1..<max(ids.count, 1) {
        let pair = Pair(left: ids[index - 1], right: ids[index])
        if let merge = merges[pair], merge.rank < best?.merge.rank ?? .max { best = (pair, merge) }
      }
      guard let (pair, merge) = best else { return ids.map(Int64.init) }
      var joined: [Int32] = [], index = 0
      while index < ids.count {
        let hit = index + 1 < ids.count && ids[index] == pair.left && ids[index + 1] == pair.right
        joined.append(hit ? merge.id : ids[index])
        index += hit ? 2 : 1
      }
      ids = joined
    }
  }

  /// NFC or what open_clip does, runs of whitespace to one space, lower case.
  func clean(_ text: String) -> [Unicode.Scalar] {
    let scalars =
      style == .openCLIP
      ? OpenCLIPText.clean(text) : Array(text.precomposedStringWithCanonicalMapping.unicodeScalars)
    let words = scalars.split(whereSeparator: Self.isSpace)
    return Self.lowercased(Array(words.joined(separator: CollectionOfOne(" " as Unicode.Scalar))))
  }

  /// Python's `str.lower`: each scalar's full mapping, but a capital sigma that ends a word becomes ς.
  private static func lowercased(_ text: [Unicode.Scalar]) -> [Unicode.Scalar] {
    func cased(_ neighbours: some Sequence<Unicode.Scalar>) -> Bool {
      neighbours.first { !$0.properties.isCaseIgnorable }?.properties.isCased ?? false
    }
    return text.indices.flatMap { index -> [Unicode.Scalar] in
      if text[index].isASCII { return Array(text[index].properties.lowercaseMapping.unicodeScalars) }
      if text[index] == "Σ", cased(text[..<index].reversed()), !cased(text[(index + 1)...]) { return ["ς"] }
      return Array(text[index].properties.lowercaseMapping.unicodeScalars)
    }
  }

  /// Matches of `<|startoftext|>|<|endoftext|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+`,
  /// with the style's own start and end token.
  private func words(_ text: [Unicode.Scalar]) -> [ArraySlice<Unicode.Scalar>] {
    let kinds = text.map(Self.kind)
    var words: [ArraySlice<Unicode.Scalar>] = [], start = 0
    while start < text.count {
      var end = start + 1
      if let hit = whole.first(where: { text[start...].starts(with: $0) }) {
        end = start + hit.count
      } else if kinds[start] != .number {  // numbers are split into single digits
        while end < text.count, kinds[end] == kinds[start] { end += 1 }
      }
      if kinds[start] != .space { words.append(text[start..<end]) }
      start = end
    }
    return words
  }

  private enum Kind { case space, letter, number, other }

  private static func kind(_ scalar: Unicode.Scalar) -> Kind {
    if isSpace(scalar) { return .space }
    return switch scalar.properties.generalCategory {
    case .uppercaseLetter, .lowercaseLetter, .titlecaseLetter, .modifierLetter, .otherLetter: .letter
    case .decimalNumber, .letterNumber, .otherNumber: .number
    default: .other
    }
  }

  /// Python's `str.isspace`, which unlike White_Space counts the separators U+001C to U+001F.
  private static func isSpace(_ scalar: Unicode.Scalar) -> Bool {
    scalar.properties.isWhitespace || (0x1C...0x1F).contains(scalar.value)
  }

  /// The printable stand-in of each byte in `vocab.json`: itself, or the next free one from U+0100 on.
  private static let byteSymbols: [Character] = {
    var free: UInt32 = 0x100
    return (0..<256 as Range<UInt32>).map { byte in
      if (33...126).contains(byte) || (161...172).contains(byte) || byte >= 174 {
        return Character(Unicode.Scalar(byte)!)
      }
      defer { free += 1 }
      return Character(Unicode.Scalar(free)!)
    }
  }()

  /// What `tokenizer_config.json` says; older and newer files write the pad token as text or as an object.
  private struct Settings: Decodable {
    var pad = CLIPTokenizer.endToken
    var length = 77

    private enum Keys: String, CodingKey {
      case pad = "pad_token"
      case length = "model_max_length"
    }
    private struct AddedToken: Decodable { let content: String }

    init(folder: URL) throws(TokenizerError) {
      let file = folder.appendingPathComponent("tokenizer_config.json")
      guard FileManager.default.fileExists(atPath: file.path) else { return }
      do {
        let data = try TokenizerError.read(file.lastPathComponent, in: folder)
        self = try JSONDecoder().decode(Self.self, from: data)
      } catch let error as TokenizerError { throw error } catch {
        throw .malformed(path: file.path, problem: "not a JSON object")
      }
    }

    init(from decoder: any Decoder) throws {
      let values = try decoder.container(keyedBy: Keys.self)
      if let token = try? values.decode(AddedToken.self, forKey: .pad) { pad = token.content }
      if let token = try? values.decode(String.self, forKey: .pad) { pad = token }
      // "No limit" is written as 1e30.
      if let limit = try? values.decode(Double.self, forKey: .length), (2...65536).contains(limit) {
        length = Int(limit)
      }
    }
  }
}
