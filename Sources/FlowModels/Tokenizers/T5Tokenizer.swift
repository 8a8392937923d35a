import Foundation

/// T5's SentencePiece unigram model: text normalised by the model's own map, then the best-scoring split.
///
/// Works on UTF-8 bytes: pieces are whole scalars, so every match ends between two scalars.
///
/// Source: google/sentencepiece@v0.2.0 src/sentencepiece_model.proto, src/normalizer.cc, src/unigram_model.cc.
public struct T5Tokenizer: Sendable {
  /// Ids of `<pad>`, `</s>` and `<unk>` (0, 1 and 2 in every published T5).
  public let pad, end, unknown: Int64

  private let pieces: PieceTrie
  private let characters: CharacterMap?
  /// Score of a scalar that no piece covers: 10 below the worst piece.
  private let unknownScore: Double

  /// Reads `spiece.model`.
  ///
  /// - Throws: ``TokenizerError`` when the file is missing, damaged, or not a plain unigram model.
  public init(folder: URL) throws(TokenizerError) {
    let path = folder.appendingPathComponent("spiece.model").path
    let bytes = [UInt8](try TokenizerError.read("spiece.model", in: folder))
    var pieces = PieceTrie(), characters: CharacterMap?
    var named: [String: Int64] = [:], unknown: Int64?, worst = Double.infinity, count: Int32 = 0
    var trained = false, normalized = false
    do {
      try Protobuf.forEachField(of: bytes[...]) { field, value throws(Protobuf.Damage) in
        switch (field, value) {
        case (1, .bytes(let message)):
          let piece = try SentencePiece(message)
          switch piece.kind {
          case .normal:
            pieces.insert(piece.text, id: count, score: piece.score)
            worst = min(worst, piece.score)
          case .unknown: unknown = Int64(count)
          case .control: named[String(decoding: piece.text, as: UTF8.self)] = Int64(count)
          case .unused: break
          }
          count += 1
        case (2, .bytes(let message)):
          trained = true
          // model_type, treat_whitespace_as_suffix, byte_fallback
          try Protobuf.expect(defaults: [3: 1, 24: 0, 35: 0], in: message)
        case (3, .bytes(let message)):
          normalized = true
          // add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
          try Protobuf.expect(defaults: [3: 1, 4: 1, 5: 1], in: message)
          try Protobuf.forEachField(of: message) { field, value throws(Protobuf.Damage) in
            if field == 2, case .bytes(let map) = value, !map.isEmpty { characters = try CharacterMap(map) }
          }
        default: break
        }
      }
    } catch {
      switch error {
      case .damaged(let problem): throw .malformed(path: path, problem: problem)
      case .unsupported(let feature): throw .unsupported(path: path, feature: feature)
      }
    }
    guard trained, normalized else {  // they follow the pieces, so a file cut between two pieces ends here
      throw .malformed(path: path, problem: "no trainer or normalizer settings after \(count) pieces")
    }
    guard let unknown, let end = named["</s>"], let pad = named["<pad>"], worst.isFinite else {
      throw .malformed(path: path, problem: "\(count) pieces without <unk>, </s>, <pad> or any text piece")
    }
    (self.pad, self.end, self.unknown) = (pad, end, unknown)
    (self.pieces, self.characters, unknownScore) = (pieces, characters, worst - 10)
  }

  /// The pieces of `text`, `</s>`, padding; a text that is too long keeps its first `length` − 1 pieces.
  ///
  /// - Precondition: `length` is at least 1 (`</s>`).
  public func encode(_ text: String, length: Int) -> TokenizedText {
    precondition(length >= 1, "T5Tokenizer.encode: length \(length), need at least 1 for </s>")
    let tokens = split(normalize(text))
    var ids = tokens.prefix(length - 1) + [end]
    ids += repeatElement(pad, count: length - ids.count)
    return TokenizedText(ids: Array(ids), truncated: max(0, tokens.count - (length - 1)))
  }

  /// "▁": marks the start of a word.
  private static let space = Array("\u{2581}".utf8)

  /// The character map, single spaces only, and each word led by ▁.
  private func normalize(_ text: String) -> [UInt8] {
    let mapped = characters?.apply(Array(text.utf8)) ?? Array(text.utf8)
    return mapped.split(separator: UInt8(ascii: " ")).flatMap { Self.space + $0 }
  }

  /// Viterbi: the split with the highest sum of scores; neighbouring unknown scalars share one id.
  private func split(_ text: [UInt8]) -> [Int64] {
    var score = [Double](repeating: -.infinity, count: text.count + 1)
    var origin = [(start: Int, id: Int64)](repeating: (0, unknown), count: text.count + 1)
    score[0] = 0
    var start = 0
    while start < text.count {
      let next = start + utf8Width(text[start], limit: text.count - start)
      var single = false
      pieces.forEachPrefix(of: text, from: start) { end, piece in
        single = single || end == next
        if score[start] + piece.score > score[end] {
          (score[end], origin[end]) = (score[start] + piece.score, (start, Int64(piece.id)))
        }
      }
      if !single, score[start] + unknownScore > score[next] {
        (score[next], origin[next]) = (score[start] + unknownScore, (start, unknown))
      }
      start = next
    }
    var ids: [Int64] = [], end = text.count
    while end > 0 {
      let (start, id) = origin[end]
      if id != unknown || ids.last != unknown { ids.append(id) }
      end = start
    }
    return ids.reversed()
  }
}

/// Bytes of the scalar that `lead` opens, at most `limit`.
private func utf8Width(_ lead: UInt8, limit: Int) -> Int {
  min(limit, lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4)
}

/// Pieces by their bytes; one dictionary of edges, so that a lookup neither slices nor copies the text.
private struct PieceTrie: Sendable {
  struct Piece { let id: Int32, score: Double }

  private var edges: [UInt64: Int] = [:]
  private var pieces: [Piece?] = [nil]

  private static func edge(_ node: Int, _ byte: UInt8) -> UInt64 { UInt64(node) << 8 | UInt64(byte) }

  mutating func insert(_ text: ArraySlice<UInt8>, id: Int32, score: Double) {
    var node = 0
    for byte in text {
      if let next = edges[Self.edge(node, byte)] {
        node = next
      } else {
        edges[Self.edge(node, byte)] = pieces.count
        node = pieces.count
        pieces.append(nil)
      }
    }
    pieces[node] = Piece(id: id, score: score)
  }

  /// Calls `body` with the end of every piece that starts at `start`, shortest first.
  func forEachPrefix(of text: [UInt8], from start: Int, _ body: (_ end: Int, Piece) -> Void) {
    var node = 0
    for index in start..<text.count {
      guard let next = edges[Self.edge(node, text[index])] else { return }
      node = next
      if let piece = pieces[node] { body(index + 1, piece) }
    }
  }
}

/// SentencePiece's `precompiled_charsmap`: a double-array trie of sequences, then their replacements.
///
/// Units are as in darts-clone: bits 0–7 and 31 label, bit 8 "has a value", bit 9 and 10–30 the offset.
private struct CharacterMap: Sendable {
  private let units: [UInt32]
  private let replacements: [UInt8]

  init(_ blob: ArraySlice<UInt8>) throws(Protobuf.Damage) {
    func word(_ index: Int) -> UInt32 {
      (0..<4).reduce(0) { $0 | UInt32(blob[blob.startIndex + index + $1]) << (8 * $1) }
    }
    guard blob.count >= 4, case let size = Int(word(0)), size >= 4, size % 4 == 0, size <= blob.count - 4,
      blob.last == 0 || size == blob.count - 4
    else { throw .damaged("the character map does not hold the table its header announces") }
    units = (1...(size / 4)).map { word($0 * 4) }
    replacements = Array(blob.dropFirst(4 + size))
    // A unit with bit 31 is a value: the offset of a replacement, each of which ends with a zero byte.
    let limit = replacements.count
    guard units.allSatisfy({ $0 >> 31 == 0 || Int($0 & 0x7FFF_FFFF) < limit }) else {
      throw .damaged("the character map points past its replacements")
    }
  }

  /// Replaces the longest known sequence at each position; other scalars pass through.
  func apply(_ text: [UInt8]) -> [UInt8] {
    var out: [UInt8] = [], index = 0
    out.reserveCapacity(text.count)
    while index < text.count {
      if let (length, replacement) = longest(text, from: index) {
        out += replacements[replacement...].prefix { $0 != 0 }
        index += length
      } else {
        let width = utf8Width(text[index], limit: text.count - index)
        out += text[index..<(index + width)]
        index += width
      }
    }
    return out
  }

  private func longest(_ text: [UInt8], from start: Int) -> (length: Int, replacement: Int)? {
    var best: (Int, Int)?
    var position = Self.offset(units[0])
    for index in start..<text.count {
      position ^= Int(text[index])
      guard position < units.count, units[position] & 0x8000_00FF == UInt32(text[index]) else { break }
      let unit = units[position]
      position ^= Self.offset(unit)
      // A damaged table can lead anywhere; where that is no value, the sequence counts as unknown.
      if unit >> 8 & 1 == 1, position < units.count, units[position] >> 31 == 1 {
        best = (index + 1 - start, Int(units[position] & 0x7FFF_FFFF))
      }
    }
    return best
  }

  private static func offset(_ unit: UInt32) -> Int { Int(unit >> 10) << Int((unit & 0x200) >> 6) }
}

/// One entry of the vocabulary.
private struct SentencePiece {
  enum Kind { case normal, unknown, control, unused }

  var text: ArraySlice<UInt8> = [], score = 0.0, kind = Kind.normal

  init(_ message: ArraySlice<UInt8>) throws(Protobuf.Damage) {
    var type: UInt64 = 1
    try Protobuf.forEachField(of: message) { field, value throws(Protobuf.Damage) in
      switch (field, value) {
      case (1, .bytes(let bytes)): text = bytes
      case (2, .fixed32(let bits)): score = Double(Float(bitPattern: bits))
      case (3, .varint(let value)): type = value
      default: break
      }
    }
    switch type {
    case 1: kind = .normal
    case 2: kind = .unknown
    case 3: kind = .control
    case 5: kind = .unused
    default: throw .unsupported("a piece of type \(type) (user-defined or byte)")
    }
    guard !text.isEmpty, String(validating: text, as: UTF8.self) != nil, score.isFinite else {
      throw .damaged("a piece is empty, not UTF-8, or without a finite score")
    }
  }
}

/// Just enough of the protobuf wire format, every length checked.
private enum Protobuf {
  enum Value { case varint(UInt64), fixed32(UInt32), fixed64, bytes(ArraySlice<UInt8>) }
  enum Damage: Error { case damaged(String), unsupported(String) }

  static func forEachField(
    of message: ArraySlice<UInt8>, _ body: (_ field: UInt64, Value) throws(Damage) -> Void
  ) throws(Damage) {
    var rest = message
    func varint() throws(Damage) -> UInt64 {
      var value: UInt64 = 0
      for shift in stride(from: 0, to: 64, by: 7) {
        guard let byte = rest.popFirst() else { throw .damaged("the file ends inside a number") }
        value |= UInt64(byte & 0x7F) << shift
        if byte < 0x80 { return value }
      }
      throw .damaged("a number runs over 64 bits")
    }
    func take(_ count: UInt64) throws(Damage) -> ArraySlice<UInt8> {
      guard count <= UInt64(rest.count) else {
        throw .damaged("a field of \(count) bytes where only \(rest.count) are left")
      }
      defer { rest = rest.dropFirst(Int(count)) }
      return rest.prefix(Int(count))
    }
    while !rest.isEmpty {
      let key = try varint()
      switch key & 7 {
      case 0: try body(key >> 3, .varint(try varint()))
      case 1:
        _ = try take(8)
        try body(key >> 3, .fixed64)
      case 2: try body(key >> 3, .bytes(try take(try varint())))
      case 5: try body(key >> 3, .fixed32(try take(4).reversed().reduce(0) { $0 << 8 | UInt32($1) }))
      default: throw .damaged("an unknown wire type \(key & 7)")
      }
    }
  }

  /// Settings of the message that must have, or default to, the given value.
  static func expect(defaults: [UInt64: UInt64], in message: ArraySlice<UInt8>) throws(Damage) {
    try forEachField(of: message) { field, value throws(Damage) in
      if case .varint(let value) = value, let expected = defaults[field], value != expected {
        throw .unsupported("SentencePiece setting \(field) = \(value) (expected \(expected))")
      }
    }
  }
}
