import Foundation
import Synchronization

/// A reward that configurations can name: how one is made, and from what.
public struct RewardKind: Sendable {
  /// Its names, the usual one first.
  public let names: [String]
  /// Keys it reads besides those that every reward has.
  public let keys: [RewardSettings.Ingredient]
  /// Its scores, the default first; empty if there is nothing to choose.
  public let scores: [String]
  /// Makes it. The settings hold no other keys and one of the scores (nil if there are none), and the folder is that of
  /// data files, nil for ``Assets/locate(_:)``.
  let make: @Sendable (RewardSettings, URL?) throws -> any Reward

  /// Describes a reward; ``RewardFactory/register(_:)`` adds it.
  ///
  /// - Parameters:
  ///   - name: what configurations call it; `others` are further names.
  ///   - keys: what it reads besides the keys that every reward has; others are refused.
  ///   - scores: what `score` may be, the default first; empty where there is nothing to choose.
  ///   - make: makes it of settings that hold no other keys and one of `scores` (nil if there are none), and the folder
  ///     of data files, nil for ``Assets/locate(_:)``.
  public init(
    _ name: String, _ others: String..., keys: [RewardSettings.Ingredient] = [], scores: [String] = [],
    make: @escaping @Sendable (_ settings: RewardSettings, _ assets: URL?) throws -> any Reward
  ) {
    (names, self.keys, self.scores, self.make) = ([name] + others, keys, scores, make)
  }
}

/// Rewards by the names configurations use.
public enum RewardFactory {
  private static let builtIn: [RewardKind] = [
    .scenes, .vivid,
    .jpegSize, .ocr, .sharpness,
    .clip, .dfnCLIP, .pickScore, .hpsv2, .aesthetic,
    .command, .http, .judge, .pickle,
  ]

  private static let added = Mutex<[RewardKind]>([])

  /// Every reward there is, those that were registered last.
  public static var kinds: [RewardKind] { builtIn + added.withLock { $0 } }

  /// Every name ``make(_:assets:)`` knows.
  public static var names: [String] { kinds.flatMap(\.names) }

  /// Adds a reward of one's own to this process, before the first configuration is read.
  ///
  /// - Throws: ``RewardError/nameTaken(name:)``.
  public static func register(_ kind: RewardKind) throws(RewardError) {
    try added.withLock { added throws(RewardError) in
      let known = (builtIn + added).flatMap(\.names)
      if let name = kind.names.first(where: known.contains) { throw .nameTaken(name: name) }
      added.append(kind)
    }
  }

  /// The reward that `settings` describe.
  ///
  /// - Parameter assets: folder of data files such as `sprites.safetensors`; nil searches as ``Assets/locate(_:)`` does.
  /// - Throws: ``RewardError``, naming what is known instead.
  public static func make(_ settings: RewardSettings, assets: URL? = nil) throws -> any Reward {
    guard let kind = kinds.first(where: { $0.names.contains(settings.name) }) else {
      throw RewardError.unknownReward(name: settings.name, known: names)
    }
    var settings = settings
    if let score = settings.score, !kind.scores.contains(score) {
      throw RewardError.unknownScore(reward: settings.name, score: score, known: kind.scores)
    }
    if let foreign = settings.ingredients.first(where: { $0 != .score && !kind.keys.contains($0) }) {
      throw RewardError.foreignKey(
        reward: settings.name, key: foreign.rawValue, known: kind.keys.map(\.rawValue))
    }
    settings.score = settings.score ?? kind.scores.first
    return try kind.make(settings, assets)
  }

  /// The reward called `name`, of the built-in ones that need nothing else.
  public static func make(name: String, score: String? = nil, assets: URL? = nil) throws -> any Reward {
    try make(RewardSettings(name: name, score: score), assets: assets)
  }
}

extension RewardKind {
  /// The built-in task's verifier.
  static let scenes = RewardKind("scenes", scores: ScenesVerifier.Score.allCases.map(\.rawValue)) {
    let file = "sprites.safetensors"
    return try ScenesVerifier(
      sprites: $1?.appendingPathComponent(file) ?? Assets.locate(file),
      score: ScenesVerifier.Score(rawValue: $0.score!)!)
  }
  /// Colourfulness.
  static let vivid = RewardKind("vivid", "colourfulness") { settings, _ in Vivid(name: settings.name) }
}

/// Finds the data files that ship with the program.
public enum Assets {
  /// `file` in the first of these folders that holds it: `$CHUNKGRPO_DATA`; seen from the executable's
  /// folder, `../Data` and `../share/chunkgrpo/Data`; then `Data` in every folder above (a build in the
  /// checkout).
  ///
  /// - Throws: ``RewardError/assetNotFound(file:searched:)``, with every folder looked in.
  public static func locate(_ file: String) throws -> URL {
    let executable = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath()
    return try locate(
      file, in: folders(environment: ProcessInfo.processInfo.environment, executable: executable))
  }

  static func locate(_ file: String, in folders: [URL]) throws(RewardError) -> URL {
    for folder in folders {
      let url = folder.appendingPathComponent(file)
      if FileManager.default.fileExists(atPath: url.path) { return url }
    }
    throw .assetNotFound(file: file, searched: folders.map(\.path))
  }

  static func folders(environment: [String: String], executable: URL) -> [URL] {
    var folder = executable.deletingLastPathComponent()
    let prefix = folder.deletingLastPathComponent()
    var found = [
      prefix.appendingPathComponent("Data"), prefix.appendingPathComponent("share/chunkgrpo/Data"),
    ]
    if let set = environment["CHUNKGRPO_DATA"], !set.isEmpty {
      found.insert(URL(fileURLWithPath: set), at: 0)
    }
    while true {
      let candidate = folder.appendingPathComponent("Data")
      if !found.contains(candidate) { found.append(candidate) }
      if folder.path == "/" { return found }
      folder.deleteLastPathComponent()
    }
  }
}
