import FlowModels
import Foundation
import Yams

/// Everything that is wrong with a study, found at once.
public struct StudyError: Error, CustomStringConvertible, Sendable, Equatable {
  /// One line a problem.
  public let problems: [String]
  /// All lines.
  public var description: String { problems.joined(separator: "\n       ") }
}

/// A study whose arms are resolved and known to make sense together.
public struct StudyPlan: Sendable {
  /// One arm as it will be trained, apart from seed and output.
  public struct Arm: Sendable {
    /// Its name and what it changes.
    public let arm: Study.Arm
    /// The base configuration with the study's and the arm's overrides.
    public let configuration: Configuration
    /// Images generated in training.
    public var images: Int { configuration.run.iterations * configuration.samplesPerIteration }
  }

  /// As read.
  public let study: Study
  /// The base configuration with the study's overrides.
  public let base: Configuration
  /// In the study's order.
  public let arms: [Arm]
  /// Name of the arm that the others are compared with.
  public let reference: String
  /// What the untrained model is scored with: the reference arm, as the base alone need not be valid.
  var untrained: Configuration { arms.first { $0.arm.name == reference }!.configuration }
  /// What is allowed and perhaps not meant.
  public let warnings: [String]
  /// The study's folder.
  public let folder: URL

  /// Resolves the arms.
  ///
  /// - Throws: ``StudyError`` with all problems that can be seen without loading a model.
  public init(_ study: Study) throws {
    var problems: [String] = [], warnings: [String] = []
    func require(_ condition: Bool, _ problem: @autoclosure () -> String) {
      if !condition { problems.append(problem()) }
    }
    func attempt<R>(_ place: String, _ body: () throws -> R) -> R? {
      do { return try body() } catch {
        problems.append(place.isEmpty ? "\(error)" : "\(place): \(error)")
        return nil
      }
    }
    require(!study.base.isEmpty, "base: missing; name the configuration that the arms change")
    require(!study.seeds.isEmpty, "seeds: missing; list some, such as [1, 2, 3, 4, 5]")
    require(Set(study.seeds).count == study.seeds.count, "seeds: \(study.seeds) holds one twice")
    require(study.arms.count > 0, "arms: missing; give at least one, a name with a list of key=value")
    // Its folder lies beside the study's own files.
    let taken = ["base", "logs"], extensions = ["yaml", "md", "json", "csv", "png", "svg"]
    for arm in study.arms {
      require(
        !arm.name.isEmpty && !arm.name.hasPrefix(".") && !taken.contains(arm.name)
          && !extensions.contains(where: { arm.name.hasSuffix(".\($0)") })
          && arm.name.allSatisfy { $0.isASCII && ($0.isLetter || $0.isNumber || "._+-".contains($0)) },
        "arms.\(arm.name): a name is also a folder: use letters, digits and . _ + -, and not \(taken.joined(separator: ", ")) or a file's extension"
      )
    }
    let names = study.arms.map(\.name)
    reference = study.reference ?? names.first ?? ""
    require(
      names.contains(reference) || names.isEmpty,
      "reference: \(reference) is no arm; there are \(names.joined(separator: ", "))")
    require(study.evaluate.count > 0, "evaluate.count: must be at least 1, got \(study.evaluate.count)")
    require(
      study.evaluate.steps ?? 1 > 0, "evaluate.steps: must be at least 1, got \(study.evaluate.steps ?? 0)")
    require(
      study.evaluate.every ?? 0 >= 0, "evaluate.every: must not be negative, got \(study.evaluate.every ?? 0)"
    )
    if study.seeds.count == 1 {
      warnings.append("one seed: no intervals and no tests; five or more tell arms apart")
    }

    let every = study.evaluate.every.map { ["run.evaluateEvery=\($0)"] } ?? []
    func load(_ overrides: [String]) throws -> Configuration {
      var configuration = try Configuration.load(
        file: URL(filePath: study.base), overrides: study.set + every + overrides)
      configuration.makePathsAbsolute()
      return configuration
    }
    var base: Configuration?
    if problems.isEmpty || !study.base.isEmpty { base = attempt("") { try load([]) } }
    var arms: [Arm] = []
    if let base {
      for arm in study.arms {
        guard let configuration = attempt("arm \(arm.name)", { try load(arm.overrides) }) else { continue }
        _ = attempt("arm \(arm.name)") { try configuration.validate() }
        for override in arm.overrides where (try? load([override])) == base {
          warnings.append("arm \(arm.name): \(override) changes nothing, the base says so already")
        }
        let common = ["model", "seed", "output", "prompts"].filter { key in
          configuration.differences(from: base).contains { $0.key == key || $0.key.hasPrefix("\(key).") }
        }
        require(
          common.isEmpty,
          "arm \(arm.name): changes \(common.joined(separator: ", ")), which all runs share: put it under set, or seeds and output"
        )
        if let twin = arms.first(where: { $0.configuration == configuration }) {
          problems.append("arm \(arm.name): the same as arm \(twin.arm.name); drop one")
        }
        arms.append(Arm(arm: arm, configuration: configuration))
      }
      let images = Set(arms.map(\.images))
      if study.budget == .images {
        require(
          images.count < 2,
          "arms differ in images generated (\(arms.map { "\($0.arm.name) \($0.images)" }.joined(separator: ", "))): make "
            + "run.iterations × group.promptsPerIteration × group.size equal, or set budget: none")
        for arm in arms where arm.configuration.run.stopReward != nil {
          problems.append(
            "arm \(arm.arm.name): run.stopReward ends runs early, so that arms would differ in images generated: "
              + "add run.stopReward=null under set, or set budget: none")
        }
      }
      for split in [base.prompts.split, study.evaluate.split] {
        _ = attempt("") { try PromptFile(file: URL(filePath: base.prompts.file), split: split) }
      }
      _ = attempt("rewards") {
        for text in study.evaluate.rewards { _ = try Configuration.Reward(option: text) }
        return try RewardSet(Self.rewards(study, base))
      }
      _ = attempt("") { try ModelFolder(URL(filePath: base.model)) }
      if base.run.evaluateEvery == 0 {
        warnings.append(
          "evaluate.every: 0: no learning curves, and no rewards at equal trained steps or CPU seconds")
      } else if (try? PromptFile(file: URL(filePath: base.prompts.file), split: "dev")) == nil {
        warnings.append("\(base.prompts.file): no split dev: no learning curves")
      }
    }
    guard problems.isEmpty, let base else { throw StudyError(problems: problems) }
    (self.study, self.base, self.arms, self.warnings) = (study, base, arms, warnings)
    folder = URL(filePath: study.output).standardizedFileURL
  }

  static func rewards(_ study: Study, _ base: Configuration) -> [Configuration.Reward] {
    guard !study.evaluate.rewards.isEmpty else {
      return base.rewards.map { reward in
        // How it counts in training is nothing that a score depends on.
        var reward = reward
        (reward.weight, reward.lateWeight, reward.threshold, reward.gate) = (1, nil, nil, .init())
        reward.watch = false
        return reward
      }
    }
    return study.evaluate.rewards.compactMap { try? Configuration.Reward(option: $0) }
  }
  /// What trained models are scored by.
  var rewards: [Configuration.Reward] { Self.rewards(study, base) }
  /// Names of ``rewards`` in reports.
  public var rewardNames: [String] { RewardSet.names(rewards) }

  /// Whether there will be learning curves.
  var hasCurves: Bool {
    base.run.evaluateEvery > 0
      && (try? PromptFile(file: URL(filePath: base.prompts.file), split: "dev")) != nil
  }

  /// All runs, seed by seed, so that a study that is stopped has compared all arms at the first seeds.
  public var runs: [StudyRun] {
    study.seeds.flatMap { seed in
      arms.map { arm in
        var configuration = arm.configuration
        let url = folder.appending(path: "\(arm.arm.name)/seed-\(seed)")
        (configuration.seed, configuration.output) = (seed, url.path)
        return StudyRun(arm: arm.arm.name, seed: seed, configuration: configuration, folder: url)
      }
    }
  }

  /// The command line that starts `run`.
  func trainArguments(_ run: StudyRun) -> [String] {
    let overrides =
      study.set + (study.evaluate.every.map { ["run.evaluateEvery=\($0)"] } ?? [])
      + arms.first { $0.arm.name == run.arm }!.arm.overrides
      + ["seed=\(run.seed)", "output=\(run.folder.path.yamlScalar)"]
    return ["train", study.base] + overrides.flatMap { ["--set", $0] }
  }

  /// The command line that scores `model`, a run or a configuration.
  func evaluateArguments(_ model: String, split: String, count: Int, steps: Int, seed: UInt64) -> [String] {
    [
      "evaluate", model, "--prompts", base.prompts.file, "--split", split, "--count", String(count),
      "--steps", String(steps),
      "--seed", String(seed),
    ] + rewards.flatMap { ["--reward", $0.text] } + ["--json"]
  }
  /// As above, for what trained models are scored on.
  func evaluateArguments(_ model: String) -> [String] {
    evaluateArguments(
      model, split: study.evaluate.split, count: study.evaluate.count,
      steps: study.evaluate.steps ?? base.sampling.steps, seed: study.evaluate.seed)
  }
}

extension Configuration {
  /// Dotted keys whose values differ, with this configuration's value and the other's as YAML.
  func differences(from other: Configuration) -> [(key: String, here: String, there: String)] {
    func leaves(_ node: Node, _ path: String) -> [(String, String)] {
      if case .mapping(let mapping) = node {
        return mapping.flatMap { key, value in
          leaves(value, path.isEmpty ? key.string ?? "" : "\(path).\(key.string ?? "")")
        }
      }
      let text = (try? serialize(node: node, width: -1, allowUnicode: true)) ?? ""
      return [(path, text.split(separator: "\n").filter { $0 != "..." }.joined(separator: "; "))]
    }
    return zip(leaves(node, ""), leaves(other.node, "")).filter { $0.1 != $1.1 }.map { ($0.0, $0.1, $1.1) }
  }
}

extension Configuration.Reward {
  /// What ``init(option:)`` reads: `name` or `name:score` if that says all, else a mapping in one line.
  var text: String {
    if self == .init(name: name, score: score) { return score.map { "\(name):\($0)" } ?? name }
    guard case .mapping(var mapping) = node else { preconditionFailure("a reward is a mapping") }
    mapping.style = .flow
    let text = (try? serialize(node: .mapping(mapping), width: -1, allowUnicode: true)) ?? ""
    return text.split(separator: "\n").joined(separator: " ")
  }
}

extension String {
  /// As a YAML scalar on a command line.
  var yamlScalar: String {
    allSatisfy { $0.isASCII && ($0.isLetter || $0.isNumber || "/._+-".contains($0)) }
      ? self
      : "\"" + replacingOccurrences(of: "\\", with: "\\\\").replacingOccurrences(of: "\"", with: "\\\"")
        + "\""
  }
}
