import Foundation
import Yams

extension Configuration {
  /// Reads a YAML file, then applies `overrides`, each `a.b.c=value` with the value in YAML.
  ///
  /// `model`, `output` and `prompts.file` may be relative to the current directory or, where only the folder of
  /// the file has them, to that folder: then they become absolute. Overrides are relative to the former.
  /// - Throws: ``ConfigurationError`` for a file that cannot be read, bad YAML, unknown keys and wrong types.
  ///   Values are judged by ``validate()``.
  public static func load(
    file: URL, overrides: [String] = []
  ) throws(ConfigurationError) -> Configuration {
    var configuration = try parse(try text(of: file), source: file.relativePath)
    configuration.resolvePaths(against: file.absoluteURL.deletingLastPathComponent())
    return try configuration.applying(overrides)
  }

  /// Reads YAML text; `source` is its name in messages. Paths are left as they are.
  public static func load(
    yaml: String, source: String, overrides: [String] = []
  ) throws(ConfigurationError) -> Configuration {
    try parse(yaml, source: source).applying(overrides)
  }

  /// The configuration of a resumed run: `base` with overrides that cannot change its results' meaning.
  /// - Throws: ``ConfigurationError/fixedOnResume(at:path:)`` for keys that would make it another run.
  public static func applyResume(
    base: Configuration, overrides: [String]
  ) throws(ConfigurationError) -> Configuration {
    let configuration = try base.applying(overrides)
    for text in overrides {
      let override = try Override(text)
      for path in override.leaves where !(path.hasPrefix("run.") || resumableKeys.contains(path)) {
        throw .fixedOnResume(at: override.place.source, path: path)
      }
    }
    return configuration
  }

  /// The whole configuration as YAML, in a fixed order; reading it gives an equal value.
  public func yaml() -> String {
    do { return try serialize(node: node, width: -1, allowUnicode: true) } catch {
      preconditionFailure("a configuration always has a YAML form: \(error)")
    }
  }

  private static let resumableKeys = [
    "network.checkpointing", "network.attention", "optim.microBatch", "optim.offload",
  ]
  static var resumable: String { "run.*, " + resumableKeys.joined(separator: ", ") }
}

extension Configuration {
  /// The UTF-8 text of a file.
  static func text(of file: URL) throws(ConfigurationError) -> String {
    let name = file.relativePath
    let data: Data
    do { data = try Data(contentsOf: file) } catch {
      throw .unreadable(file: name, reason: FileProblem.reason(file))
    }
    if let bad = FileProblem.invalidUTF8(data) {
      throw .unreadable(file: name, reason: "not UTF-8 at byte \(bad.offset), line \(bad.line)")
    }
    return String(decoding: data, as: UTF8.self)
  }

  /// Makes paths independent of the current directory, so that a run can be continued and evaluated from any;
  /// ``output`` is left as it is.
  public mutating func makePathsAbsolute() {
    func absolute(_ path: inout String) { path = URL(filePath: path).standardizedFileURL.path }
    absolute(&model)
    absolute(&prompts.file)
    if !["auto", "memory"].contains(prompts.embeddings) { absolute(&prompts.embeddings) }
  }

  private static func parse(_ yaml: String, source: String) throws(ConfigurationError) -> Configuration {
    let place = Place(source: source, isFile: true)
    let text = yaml.hasPrefix("\u{FEFF}") ? String(yaml.dropFirst()) : yaml
    guard let node = try compose(text, place), !node.isNull else { throw .empty(source: source) }
    return try read(node, over: nil, place)
  }

  static func compose(_ yaml: String, _ place: Place) throws(ConfigurationError) -> Node? {
    do {
      return try Yams.compose(yaml: yaml)
    } catch YamlError.duplicatedKeysInMapping(let keys, let context) {
      throw .duplicateKey(at: place.at(context.mark), key: keys.joined(separator: ", "))
    } catch YamlError.scanner(let context, let problem, let mark, _),
      YamlError.parser(let context, let problem, let mark, _),
      YamlError.composer(let context, let problem, let mark, _)
    {
      let whole = context.map { $0.text + (place.isFile ? " on line \($0.mark.line), " : ", ") } ?? ""
      throw .syntax(at: place.at(mark), reason: whole + problem)
    } catch YamlError.reader(let problem, _, _, _) {
      throw .syntax(at: place.source, reason: problem)
    } catch {
      throw .syntax(at: place.source, reason: "\(error)")
    }
  }

  /// One `--set`, as the nested mapping it stands for.
  struct Override {
    let place: Place
    let node: Node

    init(_ text: String) throws(ConfigurationError) {
      let parts = text.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      let keys = parts[0].split(separator: ".", omittingEmptySubsequences: false).map {
        $0.trimmingCharacters(in: .whitespaces)
      }
      guard parts.count == 2, !keys.contains("") else { throw .malformedOverride(text: text) }
      place = Place(source: "--set \(text)", isFile: false)
      let value = try Configuration.compose(String(parts[1]), place) ?? Node("null", .implicit, .plain)
      node = keys.reversed().reduce(value) { Node([(Node($1), $0)]) }
    }

    /// Dotted paths of everything that is set.
    var leaves: [String] { Self.leaves(node, "") }

    private static func leaves(_ node: Node, _ path: String) -> [String] {
      guard case .mapping(let mapping) = node else { return [path] }
      return mapping.flatMap { key, value in
        leaves(value, path.isEmpty ? key.string ?? "" : "\(path).\(key.string ?? "")")
      }
    }
  }

  private func applying(_ overrides: [String]) throws(ConfigurationError) -> Configuration {
    var configuration = self
    for text in overrides {
      let override = try Override(text)
      configuration = try Configuration.read(override.node, over: configuration, override.place)
    }
    return configuration
  }

  /// Turns a relative `path` that only `folder` has into an absolute one.
  static func resolve(_ path: inout String, against folder: URL) {
    let beside = folder.appendingPathComponent(path).standardizedFileURL.path
    let files = FileManager.default
    if !path.isEmpty, !path.hasPrefix("/"), !files.fileExists(atPath: path), files.fileExists(atPath: beside)
    {
      path = beside
    }
  }

  private mutating func resolvePaths(against folder: URL) {
    func resolve(_ path: inout String) { Self.resolve(&path, against: folder) }
    resolve(&model)
    resolve(&output)
    resolve(&prompts.file)
    if !["auto", "memory"].contains(prompts.embeddings) { resolve(&prompts.embeddings) }
  }
}

/// What two readers of text files say about files they cannot read.
enum FileProblem {
  static func reason(_ file: URL) -> String {
    var isFolder: ObjCBool = false
    guard FileManager.default.fileExists(atPath: file.path, isDirectory: &isFolder) else {
      return file.path == file.relativePath ? "no such file" : "no such file, looked for \(file.path)"
    }
    return isFolder.boolValue ? "is a folder, expected a file" : "cannot be opened; check its permissions"
  }

  /// Where the first byte sequence that is not UTF-8 begins, if there is one.
  static func invalidUTF8(_ data: Data) -> (offset: Int, line: Int)? {
    if String(data: data, encoding: .utf8) != nil { return nil }
    var parser = Unicode.UTF8.ForwardParser()
    var bytes = data.makeIterator()
    var (offset, line) = (0, 1)
    while true {
      switch parser.parseScalar(from: &bytes) {
      case .valid(let scalar):
        offset += scalar.count
        if scalar.first == UInt8(ascii: "\n") { line += 1 }
      case .error: return (offset, line)
      case .emptyInput: return nil
      }
    }
  }
}
