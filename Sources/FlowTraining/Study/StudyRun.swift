import FlowRewards
import Foundation
import Torch

/// One arm at one seed: an ordinary run folder with a summary of what it scored.
public struct StudyRun: Sendable {
  /// Name of the arm.
  public let arm: String
  /// Seed of the run.
  public let seed: UInt64
  /// What it is trained with.
  public let configuration: Configuration
  /// Where.
  public let folder: URL

  /// How far a run is.
  public enum State: Sendable {
    /// Nothing is there.
    case new
    /// Trained for some iterations, perhaps all, but not scored.
    case started(iterations: Int)
    /// Trained and scored.
    case done(Scores)

    /// Of a run that is done.
    public var scores: Scores? { if case .done(let scores) = self { scores } else { nil } }
  }

  /// For people.
  public var name: String { "arm \(arm), seed \(seed)" }
  var summaryFile: URL { folder.appending(path: "summary.json") }
  var configFile: URL { RunFolder(folder).configFile }

  /// What is in the folder.
  ///
  /// - Parameter arguments: the command line that scores; a score by another one does not count.
  /// - Throws: ``RunError`` if the folder holds a run of another configuration, or was changed after it was scored.
  public func state(scoredBy arguments: [String]) throws -> State {
    guard FileManager.default.fileExists(atPath: configFile.path) else {
      // Leftovers of a start that was killed are no run.
      try RunFolder(folder).requireNew()
      return .new
    }
    let stored = try Configuration.load(file: configFile)
    // A memory budget chooses the micro-batch; where the folder lies does not matter.
    let changes = configuration.differences(from: stored).filter {
      $0.key != "output" && !($0.key == "optim.microBatch" && configuration.network.memory != nil)
    }
    guard changes.isEmpty else {
      let list = changes.map { "\($0.key) \($0.there), now \($0.here)" }.joined(separator: "; ")
      throw RunError(
        "\(name): \(folder.path) was trained with \(list): give the arm another name, or remove the folder")
    }
    let done = try rows().count
    guard let data = try? Data(contentsOf: summaryFile),
      let summary = try? JSONDecoder().decode(Summary.self, from: data), summary.arguments == arguments
    else { return .started(iterations: done) }
    guard try summary.files == files() else {
      throw RunError("\(name): \(folder.path) was changed after it was scored: remove it, to train it again")
    }
    return .done(summary.scores)
  }

  /// What `evaluate` found, as far as a study needs it.
  public struct Scores: Codable, Sendable, Equatable {
    /// One reward.
    public struct Part: Codable, Sendable, Equatable {
      /// Over prompts.
      public let mean: Double
    }
    /// By name.
    public let rewards: [String: Part]
    /// Absent for one image a prompt.
    public let guards: GuardValues?
  }

  private struct Summary: Codable {
    let arguments: [String]
    let files: [String: String]
    let scores: Scores
  }

  /// Checksums of what a finished run consists of.
  private func files() throws -> [String: String] {
    let adapter = RunFolder(folder).adapter
    let trained = try FileManager.default.contentsOfDirectory(atPath: adapter.path).map { "adapter/\($0)" }
    return try Dictionary(
      uniqueKeysWithValues: (["config.yaml", "metrics.jsonl"] + trained).map {
        ($0, RunFolder.checksum(try Data(contentsOf: folder.appending(path: $0), options: .mappedIfSafe)))
      })
  }

  /// Keeps what `evaluate` printed: from then on the run is done.
  func finish(_ output: Data, arguments: [String]) throws {
    try AtomicFile.write(
      try Self.encode(Summary(arguments: arguments, files: try files(), scores: try Self.scores(output))),
      to: summaryFile)
  }

  static func scores(_ output: Data) throws -> Scores { try JSONDecoder().decode(Scores.self, from: output) }

  static func encode(_ value: some Encodable) throws -> Data {
    let encoder = JSONEncoder()
    encoder.keyEncodingStrategy = .convertToSnakeCase
    encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
    return try encoder.encode(value)
  }

  // MARK: what training wrote

  /// One row of the metrics: what the iteration did, and where a look at the dev split was due, what it saw.
  struct Row {
    let iteration: Int
    let trainedSteps, networkPasses: Double
    /// Of rollout, decode, reward and update.
    let seconds, cpuSeconds: Double
    let parts: [String: Double]
    /// Reward name → mean on the dev split.
    let dev: [String: Double]
  }

  /// Iterations that have a row, at the most one of them cut off.
  var iterationsDone: Int {
    FileManager.default.contents(atPath: RunFolder(folder).metricsFile.path)?.count {
      $0 == UInt8(ascii: "\n")
    } ?? 0
  }

  /// Whole rows, in order.
  func rows() throws -> [Row] {
    guard let data = FileManager.default.contents(atPath: RunFolder(folder).metricsFile.path) else {
      return []
    }
    return data.split(separator: UInt8(ascii: "\n")).compactMap { line in
      guard let row = try? JSONSerialization.jsonObject(with: Data(line)) as? [String: Any],
        let iteration = row["iteration"] as? Int
      else { return nil }
      let seconds = row["seconds"] as? [String: Double] ?? [:]
      let dev = row.compactMap { key, value -> (String, Double)? in
        guard key.hasPrefix("eval/"), !key.hasPrefix("eval/guards/"), let x = value as? Double else {
          return nil
        }
        return (String(key.dropFirst(5)), x)
      }
      return Row(
        iteration: iteration, trainedSteps: row["trained_steps"] as? Double ?? 0,
        networkPasses: row["network_passes"] as? Double ?? 0,
        seconds: MetricsRow.parts.reduce(0) { $0 + (seconds[$1] ?? 0) },
        cpuSeconds: seconds["cpu"] ?? 0, parts: seconds, dev: Dictionary(uniqueKeysWithValues: dev))
    }
  }
}
