import FlowRewards
import Foundation
import Yams

// One table of fields per section drives reading, writing, the list of known keys and their order.

extension Configuration {
  /// Where a node comes from, for messages.
  struct Place {
    /// File name, or the `--set` option as written.
    let source: String
    let isFile: Bool
    private(set) var path = ""
    /// What a section could not read and went on without; all places of one source share it.
    let problems = Problems()

    init(source: String, isFile: Bool) { (self.source, self.isFile) = (source, isFile) }

    final class Problems { var list: [ConfigurationError] = [] }

    private func at(path: String) -> Place {
      var place = self
      place.path = path
      return place
    }
    subscript(key: String) -> Place { at(path: path.isEmpty ? key : "\(path).\(key)") }
    subscript(index: Int) -> Place { at(path: "\(path)[\(index)]") }

    func at(_ mark: Mark?) -> String {
      if isFile, let mark { "\(source):\(mark.line)" } else { source }
    }
    func mismatch(_ node: Node, expected: String) -> ConfigurationError {
      .wrongType(at: at(node.mark), path: path, expected: expected, got: node.summary)
    }
  }

  /// Something a YAML node can be read as.
  protocol Value {
    /// Reads `node` on top of `current`: a section keeps what `node` does not name, others do not.
    static func read(_ node: Node, over current: Self?, _ place: Place) throws(ConfigurationError) -> Self
    /// What ``read(_:over:_:)`` turns back into this value.
    var node: Node { get }
    /// Keys, where the value is a section.
    static var keys: [String] { get }
  }

  /// A value written as one scalar.
  protocol Scalar: Value {
    static var expected: String { get }
    init?(scalar: Node.Scalar)
  }

  /// A scalar that is one of a few words.
  protocol Choice: Scalar, RawRepresentable, Codable, Sendable, Equatable where RawValue == String {}

  /// A mapping with known keys. What is wrong inside is left as it was and goes to the place's problems.
  protocol Section: Value {
    init()
    static var fields: [Field<Self>] { get }
    /// Dotted keys of the whole document, where a key may have been meant that is not in this section.
    static var known: [String] { get }
  }

  /// One key of a section.
  struct Field<Parent> {
    let name: String
    let children: [String]
    let read: (inout Parent, Node, Place) throws(ConfigurationError) -> Void
    let node: (Parent) -> Node

    init<V: Value>(_ name: String, _ property: WritableKeyPath<Parent, V>) {
      self.name = name
      children = V.keys
      read = { (parent: inout Parent, node: Node, place: Place) throws(ConfigurationError) in
        parent[keyPath: property] = try V.read(node, over: parent[keyPath: property], place[name])
      }
      node = { $0[keyPath: property].node }
    }
  }

  /// Such numbers between commas; nil unless all are.
  static func counts(_ text: Substring) -> [Int]? {
    let numbers = text.split(separator: ",", omittingEmptySubsequences: false).map(count)
    return numbers.contains(nil) ? nil : numbers.compactMap { $0 }
  }

  /// A number of things: decimal digits only, and so few that no sum of such numbers overflows.
  static func count(_ text: Substring) -> Int? {
    text.count < 10 && text.allSatisfy { $0.isASCII && $0.isNumber } ? Int(text) : nil
  }
}

extension Configuration: Configuration.Section {
  static var fields: [Field<Self>] {
    [
      Field("model", \.model), Field("output", \.output), Field("seed", \.seed), Field("prompts", \.prompts),
      Field("rewards", \.rewards), Field("aggregate", \.aggregate), Field("sampling", \.sampling),
      Field("group", \.group), Field("chunk", \.chunk), Field("loss", \.loss), Field("optim", \.optim),
      Field("trainable", \.trainable), Field("ema", \.ema), Field("guards", \.guards),
      Field("network", \.network), Field("run", \.run),
    ]
  }
}

extension Configuration.Prompts: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [.init("file", \.file), .init("split", \.split), .init("embeddings", \.embeddings)]
  }
}

extension Configuration.Reward: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("name", \.name), .init("label", \.label), .init("score", \.score), .init("weight", \.weight),
      .init("lateWeight", \.lateWeight), .init("threshold", \.threshold), .init("gate", \.gate),
      .init("watch", \.watch), .init("failure", \.failure), .init("model", \.model), .init("head", \.head),
      .init("quality", \.quality), .init("language", \.language), .init("command", \.command),
      .init("url", \.url), .init("batch", \.batch), .init("concurrency", \.concurrency),
      .init("tokenVariable", \.tokenVariable), .init("template", \.template), .init("pattern", \.pattern),
      .init("scale", \.scale),
    ]
  }

  /// Without the keys that are as they are where nothing is said, which are most: name, score and weight stay.
  var node: Node {
    let defaults = Self()
    return Node(
      Self.fields.filter {
        ["name", "score", "weight"].contains($0.name) || $0.node(self) != $0.node(defaults)
      }.map { (Node($0.name), $0.node(self)) }, .implicit, .block)
  }
}

extension RewardSettings.Gate: Configuration.Section {
  static var fields: [Configuration.Field<Self>] { [.init("reward", \.reward), .init("above", \.above)] }
}

extension RewardSettings.Failure: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("timeout", \.timeout), .init("retries", \.retries), .init("abortAbove", \.abortAbove),
      .init("allowTie", \.allowTie),
    ]
  }
}

extension Configuration.Sampling: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("steps", \.steps), .init("shift", \.shift), .init("guidance", \.guidance),
      .init("negative", \.negative), .init("textLength", \.textLength),
      .init("height", \.height), .init("width", \.width), .init("step", \.step), .init("eta", \.eta),
      .init("window", \.window), .init("coarse", \.coarse), .init("prefix", \.prefix),
      .init("sharedNoise", \.sharedNoise), .init("decode", \.decode),
      .init("schedule", \.schedule), .init("time", \.time),
    ]
  }
}

extension Configuration.Group: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("size", \.size), .init("promptsPerIteration", \.promptsPerIteration),
      .init("statistics", \.statistics),
    ]
  }
}

extension Configuration.Chunk: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("plan", \.plan), .init("ratio", \.ratio), .init("timeWeight", \.timeWeight),
      .init("draw", \.draw), .init("fraction", \.fraction), .init("stepFraction", \.stepFraction),
      .init("lateBelow", \.lateBelow),
      .init("stopSize", \.stopSize), .init("minChunk", \.minChunk), .init("distance", \.distance),
    ]
  }
}

extension Configuration.Loss: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("clip", \.clip), .init("advantageClip", \.advantageClip),
      .init("advantageStd", \.advantageStd), .init("kl", \.kl), .init("klForm", \.klForm),
      .init("anchor", \.anchor), .init("ratioNorm", \.ratioNorm),
    ]
  }
}

extension Configuration.Optim: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("lr", \.lr), .init("weightDecay", \.weightDecay), .init("betas", \.betas), .init("eps", \.eps),
      .init("maxGradNorm", \.maxGradNorm), .init("updatesPerIteration", \.updatesPerIteration),
      .init("microBatch", \.microBatch), .init("state", \.state), .init("offload", \.offload),
    ]
  }
}

extension Configuration.Trainable: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [.init("kind", \.kind), .init("rank", \.rank), .init("alpha", \.alpha), .init("targets", \.targets)]
  }
}

extension Configuration.EMA: Configuration.Section {
  static var fields: [Configuration.Field<Self>] { [.init("decay", \.decay)] }
}

extension Configuration.Guards: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("action", \.action), .init("blank", \.blank), .init("diversity", \.diversity),
      .init("ink", \.ink), .init("sharpness", \.sharpness), .init("grid", \.grid),
    ]
  }
}

extension Configuration.Network: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("dtype", \.dtype), .init("timeRounding", \.timeRounding), .init("attention", \.attention),
      .init("checkpointing", \.checkpointing), .init("memory", \.memory), .init("weights", \.weights),
      .init("vae", \.vae), .init("decodeDtype", \.decodeDtype),
    ]
  }
}

extension Configuration.Run: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("iterations", \.iterations), .init("checkpointEvery", \.checkpointEvery),
      .init("keep", \.keep), .init("samplesEvery", \.samplesEvery),
      .init("evaluateEvery", \.evaluateEvery), .init("stopReward", \.stopReward),
      .init("stopAbove", \.stopAbove),
    ]
  }
}

// MARK: - Reading and writing

extension Configuration.Value {
  static var keys: [String] { [] }
}

extension Configuration.Section {
  static var keys: [String] { fields.map(\.name) }
  static var known: [String] { dotted(Configuration.fields) }

  /// Names of `fields` and, dotted, of the fields in them.
  static func dotted<Parent>(_ fields: [Configuration.Field<Parent>]) -> [String] {
    fields.flatMap { section in [section.name] + section.children.map { "\(section.name).\($0)" } }
  }

  static func read(
    _ node: Node, over current: Self?, _ place: Configuration.Place
  ) throws(ConfigurationError) -> Self {
    guard case .mapping(let mapping) = node else { throw place.mismatch(node, expected: "a mapping") }
    var section = current ?? Self()
    let fields = fields
    for (key, value) in mapping {
      let name = key.scalar?.string ?? key.summary
      guard let field = fields.first(where: { $0.name == name }) else {
        place.problems.list.append(
          .unknownKey(
            at: place.at(key.mark), path: place[name].path,
            nearest: Configuration.nearestKey(
              to: name, among: fields.map(\.name), in: place, elsewhere: known)))
        continue
      }
      do { try field.read(&section, value, place) } catch { place.problems.list.append(error) }
    }
    return section
  }

  var node: Node { Node(Self.fields.map { (Node($0.name), $0.node(self)) }, .implicit, .block) }
}

extension Configuration.Scalar {
  static func read(
    _ node: Node, over current: Self?, _ place: Configuration.Place
  ) throws(ConfigurationError) -> Self {
    guard case .scalar(let scalar) = node, !node.isNull, let value = Self(scalar: scalar) else {
      throw place.mismatch(node, expected: expected)
    }
    return value
  }
}

extension Configuration.Choice {
  init?(scalar: Node.Scalar) { self.init(rawValue: scalar.string) }
  var node: Node { rawValue.node }
}

extension Configuration.Choice where Self: CaseIterable {
  static var expected: String { "one of " + allCases.map(\.rawValue).joined(separator: ", ") }
}

extension String: Configuration.Scalar {
  static var expected: String { "a string" }
  init?(scalar: Node.Scalar) { self = scalar.string }
  // Quoted where the plain text would read as null, a number or a date, for the sake of other readers too.
  var node: Node { (try? represented()) ?? Node(self, .implicit, .doubleQuoted) }
}

extension Bool: Configuration.Scalar {
  static var expected: String { "true or false" }
  init?(scalar: Node.Scalar) {
    guard scalar.isPlain, let value = Bool(scalar.string) else { return nil }
    self = value
  }
  var node: Node { Node(description, .implicit, .plain) }
}

extension Int: Configuration.Scalar {
  static var expected: String { "an integer" }
  init?(scalar: Node.Scalar) {
    guard scalar.isPlain else { return nil }
    self.init(scalar.string)
  }
  var node: Node { Node(description, .implicit, .plain) }
}

extension UInt64: Configuration.Scalar {
  static var expected: String { "an integer from 0 to 2^64 - 1" }
  init?(scalar: Node.Scalar) {
    guard scalar.isPlain else { return nil }
    self.init(scalar.string)
  }
  var node: Node { Node(description, .implicit, .plain) }
}

extension Double: Configuration.Scalar {
  static var expected: String { "a finite number" }
  init?(scalar: Node.Scalar) {
    // Double(_:) alone would also take hexadecimal digits, "nan" and "infinity".
    guard scalar.isPlain, scalar.string.allSatisfy({ "+-.0123456789eE".contains($0) }),
      let value = Double(scalar.string), value.isFinite
    else { return nil }
    self = value
  }
  var node: Node { Node(yamlText, .implicit, .plain) }

  /// Shortest text that reads back as this number; YAML 1.1 readers need a point before an exponent.
  var yamlText: String {
    let parts = description.split(separator: "e", maxSplits: 1)
    if parts.count == 2 { return parts[0].contains(".") ? description : "\(parts[0]).0e\(parts[1])" }
    return description.hasSuffix(".0") ? String(description.dropLast(2)) : description
  }
}

extension Optional: Configuration.Value where Wrapped: Configuration.Scalar {
  static func read(
    _ node: Node, over current: Self?, _ place: Configuration.Place
  ) throws(ConfigurationError) -> Self {
    node.isNull ? nil : try Wrapped.read(node, over: nil, place)
  }
  var node: Node { self?.node ?? Node("null", .implicit, .plain) }
}

extension Array: Configuration.Value where Element: Configuration.Value {
  /// A lone scalar is a list of one; a list replaces the list before it.
  static func read(
    _ node: Node, over current: Self?, _ place: Configuration.Place
  ) throws(ConfigurationError) -> Self {
    switch node {
    case .sequence(let nodes):
      var values: Self = []
      for (index, node) in nodes.enumerated() {
        values.append(try Element.read(node, over: nil, place[index]))
      }
      return values
    case .scalar where !node.isNull && Element.keys.isEmpty:
      return [try Element.read(node, over: nil, place)]
    default: throw place.mismatch(node, expected: "a list")
    }
  }
  var node: Node { Node(map(\.node), .implicit, isEmpty || Element.keys.isEmpty ? .flow : .block) }
}

extension Node {
  var isNull: Bool {
    guard case .scalar(let scalar) = self else { return false }
    return scalar.isPlain && ["", "~", "null", "Null", "NULL"].contains(scalar.string)
  }

  /// A few words for messages.
  var summary: String {
    switch self {
    case .mapping: return "a mapping"
    case .sequence: return "a list"
    case .alias: return "an alias"
    case .scalar(let scalar):
      if isNull { return "null" }
      let text = scalar.string.count > 60 ? scalar.string.prefix(60) + "…" : scalar.string
      return scalar.isPlain && Double(text) != nil ? text : "\"\(text)\""
    }
  }
}

extension Node.Scalar {
  fileprivate var isPlain: Bool { style == .plain || style == .any }
}

// MARK: - Nearest key

extension Configuration {
  /// The dotted key the writer probably meant: the same name in another section, otherwise the key of this
  /// section with the smallest edit distance.
  static func nearestKey(
    to name: String, among keys: [String], in place: Place, elsewhere: [String]
  ) -> String {
    let name = normal(name)
    let best = keys.map { ($0, editDistance(name, normal($0))) }.min { $0.1 < $1.1 }!
    if best.1 > 0, let twin = elsewhere.first(where: { normal($0.split(separator: ".").last!) == name }) {
      return twin
    }
    return place[best.0].path
  }

  private static func normal(_ key: some StringProtocol) -> String {
    key.lowercased().filter { $0 != "_" && $0 != "-" }
  }
}
