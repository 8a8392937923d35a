import Foundation
import Yams

/// What `study` reads from YAML: arms, which are named changes of one configuration, to be trained at equal seeds.
public struct Study: Sendable, Equatable {
  /// One arm.
  public struct Arm: Sendable, Equatable {
    /// Also the name of its folder.
    public var name: String
    /// Changes of the base configuration, each `a.b.c=value`.
    public var overrides: [String]
    /// Creates an arm.
    public init(_ name: String, _ overrides: [String] = []) {
      (self.name, self.overrides) = (name, overrides)
    }
  }

  /// What is measured.
  public struct Evaluation: Sendable, Equatable {
    /// Part of the prompt file that trained models are scored on.
    public var split = "test"
    /// Images of each prompt.
    public var count = 4
    /// Sampling steps; nil for the base configuration's.
    public var steps: Int?
    /// Seed of the noise, common to all runs.
    public var seed: UInt64 = 1
    /// Iterations between evaluations on the dev split, the learning curve; nil for the base configuration's.
    public var every: Int?
    /// Rewards as `name` or `name:score`; empty for the base configuration's.
    public var rewards: [String] = []
    /// Every default.
    public init() {}
  }

  /// How many runs train side by side.
  public enum Parallel: Sendable, Equatable {
    /// As many as there are cores and memory for.
    case auto
    /// So many.
    case processes(Int)
  }

  /// What all arms have equally much of.
  public enum Budget: String, Configuration.Choice, CaseIterable {
    /// Images generated in training.
    case images
    /// Nothing: each arm trains as it says.
    case none
  }

  /// Configuration file that the arms change.
  public var base = ""
  /// Folder of the study.
  public var output = "runs/study"
  /// Overrides common to all arms.
  public var set: [String] = []
  /// Arms, in the order of the file.
  public var arms: [Arm] = []
  /// Arm that the others are compared with; nil for the first.
  public var reference: String?
  /// Each arm is trained once a seed.
  public var seeds: [UInt64] = []
  /// What is measured.
  public var evaluate = Evaluation()
  /// How many runs train side by side.
  public var parallel = Parallel.auto
  /// What all arms have equally much of.
  public var budget = Budget.images

  /// An empty study, to be filled in.
  public init() {}

  /// Reads a YAML file; `base` and `output` may be relative to the current directory or to the file's folder.
  ///
  /// - Throws: ``ConfigurationError`` for a file that cannot be read, bad YAML, unknown keys and wrong types.
  public static func load(file: URL) throws(ConfigurationError) -> Study {
    var study = try load(yaml: try Configuration.text(of: file), source: file.relativePath)
    let folder = file.absoluteURL.deletingLastPathComponent()
    Configuration.resolve(&study.base, against: folder)
    Configuration.resolve(&study.output, against: folder)
    return study
  }

  /// Reads YAML text; `source` is its name in messages.
  ///
  /// - Throws: ``ConfigurationError`` as ``load(file:)`` does.
  public static func load(yaml: String, source: String) throws(ConfigurationError) -> Study {
    let place = Configuration.Place(source: source, isFile: true)
    let text = yaml.hasPrefix("\u{FEFF}") ? String(yaml.dropFirst()) : yaml
    guard let node = try Configuration.compose(text, place), !node.isNull else {
      throw .invalid(path: source, reason: "empty; a study needs base, arms and seeds")
    }
    let study = try read(node, over: nil, place)
    if let error = ConfigurationError(place.problems.list) { throw error }
    return study
  }
}

/// `arms:`, a mapping whose order counts.
struct ArmList: Configuration.Value {
  var arms: [Study.Arm] = []

  static func read(
    _ node: Node, over current: Self?, _ place: Configuration.Place
  ) throws(ConfigurationError) -> Self {
    guard case .mapping(let mapping) = node else {
      throw place.mismatch(node, expected: "a mapping of names to lists of key=value")
    }
    var list = ArmList()
    for (key, value) in mapping {
      let name = key.scalar?.string ?? key.summary
      list.arms.append(
        .init(name, value.isNull ? [] : try [String].read(value, over: nil, place[name])))
    }
    return list
  }
  var node: Node { Node(arms.map { (Node($0.name), $0.overrides.node) }) }
}

extension Study: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("base", \.base), .init("output", \.output), .init("set", \.set), .init("arms", \.armList),
      .init("reference", \.reference),
      .init("seeds", \.seeds), .init("evaluate", \.evaluate), .init("parallel", \.parallel),
      .init("budget", \.budget),
    ]
  }
  static var known: [String] { dotted(fields) }

  private var armList: ArmList {
    get { ArmList(arms: arms) }
    set { arms = newValue.arms }
  }
}

extension Study.Evaluation: Configuration.Section {
  static var fields: [Configuration.Field<Self>] {
    [
      .init("split", \.split), .init("count", \.count), .init("steps", \.steps), .init("seed", \.seed),
      .init("every", \.every), .init("rewards", \.rewards),
    ]
  }
  static var known: [String] { Study.known }
}

extension Study.Parallel: Configuration.Choice {
  static var expected: String { "auto or a number of processes, at least 1" }
  /// Reads `auto` or a number; nil for anything else.
  public init?(rawValue: String) {
    if rawValue == "auto" {
      self = .auto
    } else if let n = Configuration.count(rawValue[...]), n > 0 {
      self = .processes(n)
    } else {
      return nil
    }
  }
  /// The YAML text.
  public var rawValue: String {
    switch self {
    case .auto: "auto"
    case .processes(let n): String(n)
    }
  }
}
