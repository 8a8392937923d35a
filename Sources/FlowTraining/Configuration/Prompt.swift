import Foundation

/// One prompt with what is known about its scene, in GenEval's metadata form.
public struct Prompt: Codable, Sendable, Equatable {
  /// So many objects of one class that the scene must hold.
  public struct Item: Codable, Sendable, Equatable {
    /// Class name, such as `cat`; `class` in JSON.
    public var name: String
    /// Colour the objects must have.
    public var color: String?
    /// Number of objects, at least 1.
    public var count: Int

    /// Creates an entry.
    public init(name: String, color: String? = nil, count: Int = 1) {
      (self.name, self.color, self.count) = (name, color, count)
    }

    enum CodingKeys: String, CodingKey {
      case name = "class"
      case color, count
    }
  }

  /// The text given to the model; `prompt` in JSON.
  public var text: String
  /// Category.
  public var tag: String?
  /// Part of the file it belongs to.
  public var split: String?
  /// Objects the scene must hold.
  public var include: [Item]
  /// Where the first entry lies as seen from the second: `left of`, `right of`, `above` or `below`.
  public var relation: String?
  /// The whole JSON object as it was read, with keys this type does not know.
  public var raw: String

  /// Creates a prompt; `raw` defaults to an object with the text alone.
  public init(
    text: String, tag: String? = nil, split: String? = nil, include: [Item] = [], relation: String? = nil,
    raw: String? = nil
  ) {
    (self.text, self.tag, self.split, self.include, self.relation) = (text, tag, split, include, relation)
    self.raw = raw ?? Prompt.object(text)
  }

  /// Reads one JSON object; only `prompt` is required.
  public init(from decoder: any Decoder) throws {
    let values = try decoder.container(keyedBy: CodingKeys.self)
    text = try values.decode(String.self, forKey: .text)
    tag = try values.decodeIfPresent(String.self, forKey: .tag)
    split = try values.decodeIfPresent(String.self, forKey: .split)
    include = try values.decodeIfPresent([Item].self, forKey: .include) ?? []
    relation =
      try values.decodeIfPresent(String.self, forKey: .relation)
      ?? Self.relation(try values.decodeIfPresent([Position].self, forKey: .include) ?? [])
    raw = try values.decodeIfPresent(String.self, forKey: .raw) ?? Prompt.object(text)
  }

  /// Whether there is nothing but the text.
  var isPlain: Bool { raw == Prompt.object(text) }

  enum CodingKeys: String, CodingKey {
    case text = "prompt"
    case tag, split, include, relation, raw
  }

  /// Where GenEval says that an entry lies: `"position": ["left of", 0]`, seen from the entry of that index.
  ///
  /// Source: djghosh13/geneval@5348fb5 prompts/create_prompts.py, generate_position_sample.
  private struct Position: Decodable {
    let relation: String?
    let index: Int
    private enum CodingKeys: String, CodingKey { case position }
    init(from decoder: any Decoder) throws {
      let values = try decoder.container(keyedBy: CodingKeys.self)
      guard values.contains(.position), try !values.decodeNil(forKey: .position) else {
        (relation, index) = (nil, 0)
        return
      }
      var list = try values.nestedUnkeyedContainer(forKey: .position)
      let relation = try list.decode(String.self)
      guard Prompt.opposite[relation] != nil else {
        throw DecodingError.dataCorruptedError(
          forKey: .position, in: values,
          debugDescription: "expected left of, right of, above or below, got \"\(relation)\"")
      }
      (self.relation, index) = (relation, try list.decode(Int.self))
    }
  }

  private static let opposite = [
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
  ]

  /// ``relation`` of two entries as GenEval places them; of more it says nothing, they stay in ``raw``.
  private static func relation(_ positions: [Position]) -> String? {
    guard positions.count == 2 else { return nil }
    if let first = positions[0].relation, positions[0].index == 1 { return first }
    if let second = positions[1].relation, positions[1].index == 0 { return opposite[second] }
    return nil
  }

  /// A JSON object with the text alone.
  private static func object(_ text: String) -> String { object([("prompt", text)]) }

  /// A JSON object of strings, in this order.
  static func object(_ fields: [(key: String, value: String)]) -> String {
    let encoder = JSONEncoder()
    encoder.outputFormatting = .withoutEscapingSlashes
    // Strings always encode.
    func quoted(_ text: String) -> String { String(decoding: try! encoder.encode(text), as: UTF8.self) }
    return "{" + fields.map { "\(quoted($0.key)):\(quoted($0.value))" }.joined(separator: ",") + "}"
  }
}

/// The prompts of one split of a file, and what a user should know about them.
public struct PromptFile: Sendable, Equatable {
  /// Prompts of the split, in the file's order.
  public let prompts: [Prompt]
  /// Texts that the file has more than once, with their lines: randomness is keyed by text, so that copies in
  /// one split get the same noise, and copies in two splits leak one into the other.
  public let warnings: [String]

  /// Prompts of `split` (`all`: every prompt) in `file`.
  ///
  /// A `.txt` file holds one prompt a line, a `.csv` file (RFC 4180) a column `prompt` under a header, any other file
  /// one JSON object a line, as GenEval's metadata does. Blank lines are skipped.
  public static func load(file: URL, split: String) throws(PromptError) -> [Prompt] {
    try PromptFile(file: file, split: split).prompts
  }

  /// As ``load(file:split:)``, with warnings.
  public init(file: URL, split: String) throws(PromptError) {
    let name = file.relativePath
    let data: Data
    do { data = try Data(contentsOf: file) } catch {
      throw .unreadable(file: name, reason: FileProblem.reason(file))
    }
    if let bad = FileProblem.invalidUTF8(data) {
      throw .notUTF8(file: name, line: bad.line, byte: bad.offset)
    }
    var text = Substring(String(decoding: data, as: UTF8.self))
    if text.hasPrefix("\u{FEFF}") { text.removeFirst() }
    let all =
      switch file.pathExtension.lowercased() {
      case "csv": try Self.table(text, name)
      case "txt": try Self.lines(text, name) { Prompt(text: $0) }
      default: try Self.lines(text, name, Self.parse)
      }
    guard !all.isEmpty else { throw .empty(file: name) }
    prompts = all.map(\.prompt).filter { split == "all" || $0.split == split }
    guard !prompts.isEmpty else {
      throw .noPrompt(file: name, split: split, present: Set(all.compactMap(\.prompt.split)).sorted())
    }
    let copies = Dictionary(grouping: all) { $0.prompt.text }.values.filter { $0.count > 1 }
    warnings = copies.sorted { $0[0].line < $1[0].line }.map { copies in
      let places = copies.map { "line \($0.line)" + ($0.prompt.split.map { " (\($0))" } ?? "") }
      return "\(name): \"\(copies[0].prompt.text)\" appears \(copies.count) times: "
        + places.joined(separator: ", ")
    }
  }

  private typealias Located = (prompt: Prompt, line: Int)

  /// A prompt for each line that is not blank.
  private static func lines(
    _ text: Substring, _ name: String, _ read: (String) throws -> Prompt
  ) throws(PromptError) -> [Located] {
    var all: [Located] = []
    // "\r\n" is one Character, so a Windows file splits as well.
    let lines = text.split(omittingEmptySubsequences: false) { $0 == "\n" || $0 == "\r\n" }
    for (index, line) in lines.enumerated() {
      let content = line.trimmingCharacters(in: .whitespaces)
      guard !content.isEmpty else { continue }
      do { all.append((try read(content), index + 1)) } catch {
        throw .badLine(file: name, line: index + 1, reason: reason(error))
      }
    }
    return all
  }

  /// A prompt for each row under the header.
  private static func table(_ text: Substring, _ name: String) throws(PromptError) -> [Located] {
    let rows: [CSV.Row]
    do { rows = try CSV.rows(text) } catch {
      throw .badLine(file: name, line: error.line, reason: error.reason)
    }
    guard let header = rows.first else { throw .empty(file: name) }
    func bad(_ row: CSV.Row, _ reason: String) -> PromptError {
      .badLine(file: name, line: row.line, reason: reason)
    }
    let columns = header.fields
    guard let column = columns.firstIndex(of: "prompt") else {
      throw bad(
        header,
        "no column \"prompt\"; the first row names the columns, and it has \(columns.joined(separator: ", "))"
      )
    }
    if let twin = columns.first(where: { name in columns.filter { $0 == name }.count > 1 }) {
      throw bad(header, "two columns are called \"\(twin)\"")
    }
    var all: [Located] = []
    for row in rows.dropFirst() {
      guard row.fields.count == columns.count else {
        throw bad(row, "expected \(columns.count) fields as in the header, got \(row.fields.count)")
      }
      guard !row.fields[column].allSatisfy(\.isWhitespace) else { throw bad(row, "prompt: empty") }
      func value(_ key: String) -> String? {
        columns.firstIndex(of: key).map { row.fields[$0] }.flatMap { $0.isEmpty ? nil : $0 }
      }
      let prompt = Prompt(
        text: row.fields[column], tag: value("tag"), split: value("split"),
        raw: Prompt.object(zip(columns, row.fields).map { (key: $0, value: $1) }))
      all.append((prompt, row.line))
    }
    return all
  }

  private static func parse(_ line: String) throws -> Prompt {
    var prompt = try JSONDecoder().decode(Prompt.self, from: Data(line.utf8))
    guard !prompt.text.allSatisfy(\.isWhitespace) else { throw Nonsense(reason: "prompt: empty") }
    for (index, item) in prompt.include.enumerated() where item.count < 1 {
      throw Nonsense(reason: "include[\(index)].count: expected at least 1, got \(item.count)")
    }
    prompt.raw = line
    return prompt
  }

  private struct Nonsense: Error { let reason: String }

  private static func reason(_ error: any Error) -> String {
    if let nonsense = error as? Nonsense { return nonsense.reason }
    func at(_ path: [any CodingKey]) -> String {
      path.reduce("") { text, key in
        key.intValue.map { "\(text)[\($0)]" } ?? (text.isEmpty ? "" : text + ".") + key.stringValue
      }
    }
    func prefix(_ path: [any CodingKey]) -> String { path.isEmpty ? "" : at(path) + ": " }
    switch error as? DecodingError {
    case .keyNotFound(let key, let context):
      return prefix(context.codingPath) + "no \"\(key.stringValue)\" field"
    case .typeMismatch(let type, let context), .valueNotFound(let type, let context):
      return prefix(context.codingPath) + "expected \(kind(type))"
    case .dataCorrupted(let context) where !context.codingPath.isEmpty:
      return prefix(context.codingPath) + context.debugDescription
    default: return "not a JSON object"
    }
  }

  private static func kind(_ type: any Any.Type) -> String {
    switch type {
    case is String.Type: "a string"
    case is Int.Type: "an integer"
    case is [Any].Type: "a list"
    default: "an object"
    }
  }
}

/// What is wrong with a prompt file.
public enum PromptError: Error, CustomStringConvertible, Sendable, Equatable {
  /// The file cannot be opened.
  case unreadable(file: String, reason: String)
  /// The file has no prompt at all.
  case empty(file: String)
  /// The file is not UTF-8; `byte` counts from 0, `line` from 1.
  case notUTF8(file: String, line: Int, byte: Int)
  /// A line is not a prompt.
  case badLine(file: String, line: Int, reason: String)
  /// The file has prompts, but none in the split.
  case noPrompt(file: String, split: String, present: [String])

  /// One line: what, where, expected, got, and the way out.
  public var description: String {
    switch self {
    case .unreadable(let file, let reason): "\(file): \(reason); change prompts.file"
    case .empty(let file): "\(file): no prompt in it"
    case .notUTF8(let file, let line, let byte):
      "\(file):\(line): not UTF-8 at byte \(byte); save it as UTF-8"
    case .badLine(let file, let line, let reason): "\(file):\(line): \(reason)"
    case .noPrompt(let file, let split, []):
      "\(file): no prompt in split \(split), the file has no splits; ask for the split all"
    case .noPrompt(let file, let split, let present):
      "\(file): no prompt in split \(split); the file has \(present.joined(separator: ", ")) (or all)"
    }
  }
}
