import Foundation

/// Rewards by the names configurations use.
public enum RewardFactory {
  /// Every name ``make(name:score:assets:)`` knows.
  public static let names = ["scenes", "vivid", "colourfulness"]

  /// The reward called `name`.
  ///
  /// - Parameters:
  ///   - name: `scenes`, or `vivid` alias `colourfulness`.
  ///   - score: for `scenes`, `graded` (nil) or `strict`; the others have none.
  ///   - assets: folder of `sprites.safetensors`; nil searches as ``Assets/locate(_:)`` does.
  /// - Throws: ``RewardError``, naming what is known instead.
  public static func make(name: String, score: String? = nil, assets: URL? = nil) throws -> any Reward {
    switch name {
    case "scenes":
      let known = ScenesVerifier.Score.allCases.map(\.rawValue)
      guard let kind = ScenesVerifier.Score(rawValue: score ?? "graded") else {
        throw RewardError.unknownScore(reward: name, score: score ?? "", known: known)
      }
      let file = "sprites.safetensors"
      return try ScenesVerifier(
        sprites: assets?.appendingPathComponent(file) ?? Assets.locate(file), score: kind)
    case "vivid", "colourfulness":
      if let score { throw RewardError.unknownScore(reward: name, score: score, known: []) }
      return Vivid(name: name)
    default: throw RewardError.unknownReward(name: name, known: names)
    }
  }
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
