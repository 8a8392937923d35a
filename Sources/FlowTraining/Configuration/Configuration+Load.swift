import Foundation
import Yams

extension Configuration {
  /// Reads a YAML file, then applies `overrides`, each `a.b.c=value` with the value in YAML.
  ///
  /// `model`, `output`, `prompts.file` and the paths of rewards may be relative to the current directory or, where only the folder of
  /// the file has them, to that folder: then they become absolute. Overrides are relative to the former.
  /// - Throws: ``ConfigurationError`` for a file that cannot be read, bad YAML, unknown keys and wrong types.
  ///   Values are judged by ``validate()``; with keys that cannot be read, here, so that all is said at once.
  public static func load(
    file: URL, overrides: [String] = []
  ) throws(ConfigurationError) -> Configuration {
    let folder = file.absoluteURL.deletingLastPathComponent()
    return try read(try text(of: file), source: file.relativePath, overrides) {
      $0.resolvePaths(against: folder)
    }
  }

  /// Reads YAML text; `source` is its name in messages. Paths are left as they are.
  public static func load(
    yaml: String, source: String, overrides: [String] = []
  ) throws(ConfigurationError) -> Configuration {
    try read(yaml, source: source, overrides) { _ in }
  }

  /// The configuration of a resumed run: `base` with overrides that cannot change its results' meaning.
  /// - Throws: ``ConfigurationError/fixedOnResume(at:path:)`` for keys that would make it another run.
  public static func applyResume(
    base: Configuration, overrides: [String]
  ) throws(ConfigurationError) -> Configuration {
    var configuration = base
    var problems = configuration.apply(overrides)
    for override in overrides.compactMap({ try? Override($0) }) {
      for path in override.leaves where !(path.hasPrefix("run.") || resumableKeys.contains(path)) {
        problems.append(.fixedOnResume(at: override.place.source, path: path))
      }
    }
    if let error = ConfigurationError(problems) { throw error }
    return configuration
  }

  /// The whole configuration as YAML, in a fixed order; reading it gives an equal value.
  public func yaml() -> String {
    do { return try serialize(node: node, width: -1, allowUnicode: true) } catch {
      preconditionFailure("a configuration always has a YAML form: \(error)")
    }
  }

  /// Keys with other values than in `other`, with both as YAML.
  func differences(from other: Configuration) -> [(path: String, value: String, other: String)] {
    func leaves(_ node: Node, _ path: String) -> [(path: String, value: String)] {
      guard case .mapping(let mapping) = node else {
        let text = (try? serialize(node: node, width: -1)) ?? ""
        return [(path, text.split(separator: "\n").joined(separator: " "))]
      }
      return mapping.flatMap { leaves($1, (path.isEmpty ? "" : path + ".") + ($0.string ?? "")) }
    }
    // Every configuration has all keys, in one order.
    return zip(leaves(node, ""), leaves(other.node, "")).filter { $0.value != $1.value }
      .map { ($0.path, $0.value, $1.value) }
  }

  /// Whether a run that goes on may have another value: what ``applyResume(base:overrides:)`` sets, and where things are.
  static func mayDiffer(_ path: String) -> Bool {
    path.hasPrefix("run.") || resumableKeys.contains(path)
      || ["model", "output", "prompts.file", "prompts.embeddings", "network.memory"].contains(path)
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
    changeRewardPaths(absolute)
  }

  private static func read(
    _ yaml: String, source: String, _ overrides: [String], between: (inout Configuration) -> Void
  ) throws(ConfigurationError) -> Configuration {
    let place = Place(source: source, isFile: true)
    let text = yaml.hasPrefix("\u{FEFF}") ? String(yaml.dropFirst()) : yaml
    guard let node = try compose(text, place), !node.isNull else { throw .empty(source: source) }
    var configuration = try read(node, over: nil, place)
    between(&configuration)
    let unread = place.problems.list + configuration.apply(overrides)
    guard !unread.isEmpty else { return configuration }
    // Other mistakes too, unless they may come from what could not be read.
    let paths = Set(unread.compactMap(\.path))
    let others = configuration.problems.filter { problem in
      !"\(problem)".split { !($0.isLetter || $0.isNumber || ".[]".contains($0)) }.contains {
        paths.contains(String($0))
      }
    }
    throw ConfigurationError(unread + others)!
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

    init(_ text: String, named name: String? = nil) throws(ConfigurationError) {
      let parts = text.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      let keys = parts[0].split(separator: ".", omittingEmptySubsequences: false).map {
        $0.trimmingCharacters(in: .whitespaces)
      }
      guard parts.count == 2, !keys.contains("") else { throw .malformedOverride(text: text) }
      place = Place(source: name ?? "--set \(text)", isFile: false)
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

  /// This configuration with the values of other options than `--set`.
  func changed(
    by options: [(option: String, key: String, value: String)]
  ) throws(ConfigurationError) -> Configuration {
    var configuration = self
    let unread = configuration.apply(
      options.map { "\($0.key)=\($0.value)" }, named: options.map { "\($0.option) \($0.value)" })
    if let error = ConfigurationError(unread) { throw error }
    return configuration
  }

  /// Applies what can be read of `overrides`, and returns what cannot.
  private mutating func apply(_ overrides: [String], named names: [String]? = nil) -> [ConfigurationError] {
    var unread: [ConfigurationError] = []
    for (i, text) in overrides.enumerated() {
      do throws(ConfigurationError) {
        let override = try Override(text, named: names?[i])
        self = try Configuration.read(override.node, over: self, override.place)
        unread += override.place.problems.list
      } catch {
        unread.append(error)
      }
    }
    return unread
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
    changeRewardPaths(resolve)
  }

  /// Applies `body` to the paths of rewards' files: models and heads that are not names on a server, and a program that
  /// is named by its path.
  private mutating func changeRewardPaths(_ body: (inout String) -> Void) {
    for i in rewards.indices {
      if rewards[i].url == nil, rewards[i].model != nil { body(&rewards[i].model!) }
      if rewards[i].head != nil { body(&rewards[i].head!) }
      if rewards[i].command.first?.contains("/") == true { body(&rewards[i].command[0]) }
    }
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
