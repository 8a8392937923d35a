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
    relation = try values.decodeIfPresent(String.self, forKey: .relation)
    raw = try values.decodeIfPresent(String.self, forKey: .raw) ?? Prompt.object(text)
  }

  enum CodingKeys: String, CodingKey {
    case text = "prompt"
    case tag, split, include, relation, raw
  }

  private static func object(_ text: String) -> String {
    // A dictionary of strings always encodes.
    String(decoding: try! JSONEncoder().encode(["prompt": text]), as: UTF8.self)
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
  /// A `.txt` file holds one prompt a line, any other file one JSON object a line. Blank lines are skipped.
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
    let isText = file.pathExtension.lowercased() == "txt"
    var all: [(prompt: Prompt, line: Int)] = []
    var text = Substring(String(decoding: data, as: UTF8.self))
    if text.hasPrefix("\u{FEFF}") { text.removeFirst() }
    // "\r\n" is one Character, so a Windows file splits as well.
    let lines = text.split(omittingEmptySubsequences: false) { $0 == "\n" || $0 == "\r\n" }
    for (index, line) in lines.enumerated() {
      let content = line.trimmingCharacters(in: .whitespaces)
      guard !content.isEmpty else { continue }
      let prompt: Prompt
      do { prompt = isText ? Prompt(text: content) : try Self.parse(content) } catch {
        throw .badLine(file: name, line: index + 1, reason: Self.reason(error))
      }
      all.append((prompt, index + 1))
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
