import ChunkGRPO
import FlowRewards
import Foundation
import Pictures
import Torch

/// Scores of one model on a set of prompts.
public struct Evaluation: Sendable {
  /// The prompts, in order.
  public let prompts: [Prompt]
  /// Images of each prompt.
  public let samplesPerPrompt: Int
  /// Reward name → mean over each prompt's images, in prompt order.
  public let perPrompt: [String: [Double]]
  /// Means over all groups; nil for one image a prompt, which has no diversity.
  public let guards: GuardValues?
  /// The first image of each prompt asked for, by prompt.
  public let pictures: [Int: Image]

  /// Draws and scores `count` images of each prompt.
  ///
  /// - Parameters:
  ///   - switchStep: see ``Engine/draw(_:count:steps:seed:switchStep:check:)``.
  ///   - keep: numbers of the prompts whose first image is kept.
  static func run(
    _ engine: Engine, _ prompts: [Prompt], _ rewards: RewardSet, count: Int, steps: Int, seed: UInt64,
    switchStep: Int? = nil, keep: Set<Int> = [], check: @escaping () throws -> Void = {},
    progress: (Int) -> Void = { _ in }
  ) throws -> Evaluation {
    var perPrompt = Dictionary(uniqueKeysWithValues: rewards.names.map { ($0, [Double]()) })
    var pictures: [Int: Image] = [:]
    var guards: [(GuardValues, Int)] = []
    // Whole prompts a block, so that groups stay together.
    for block in Batches(prompts.count, of: max(engine.batch / count, 1)) {
      let some = Array(prompts[block])
      let images = try engine.draw(
        some.map(\.text), count: count, steps: steps, seed: seed, switchStep: switchStep, check: check)
      let scores = try rewards.score(images, some.flatMap { [Prompt](repeating: $0, count: count) })
      for (name, values) in zip(rewards.names, scores) {
        for i in some.indices {
          let group = values[(i * count)..<((i + 1) * count)]
          guard let valid = Optional(group.compactMap { $0 }), !valid.isEmpty else {
            throw RunError("reward \(name) gave no valid score for \"\(some[i].text)\"")
          }
          perPrompt[name]!.append(valid.reduce(0, +) / Double(valid.count))
        }
      }
      if count > 1 { guards.append((try GuardValues.measure(images, groupSize: count), some.count)) }
      for (i, number) in block.enumerated() where keep.contains(number) {
        pictures[number] = try Image(try images[i * count])
      }
      progress(block.upperBound)
    }
    return Evaluation(
      prompts: prompts, samplesPerPrompt: count, perPrompt: perPrompt,
      guards: guards.isEmpty ? nil : GuardValues.mean(guards),
      pictures: pictures)
  }
}

extension GuardValues {
  /// Mean over blocks of groups, weighted by their number.
  static func mean(_ parts: [(GuardValues, Int)]) -> GuardValues {
    let total = Double(parts.reduce(0) { $0 + $1.1 })
    func average(_ field: KeyPath<GuardValues, Double>) -> Double {
      parts.reduce(0) { $0 + $1.0[keyPath: field] * Double($1.1) } / total
    }
    return GuardValues(
      blank: average(\.blank), diversity: average(\.diversity), ink: average(\.ink), vivid: average(\.vivid))
  }
}

extension Image {
  /// An image tensor [3, H, W] in 0 … 1.
  public init(_ tensor: Tensor) throws {
    let shape = tensor.shape
    try self.init(planar: try tensor.floats(), width: shape[2], height: shape[1])
  }
}

/// What `evaluate` reports: the contract of its `--json`.
public struct EvaluationReport: Codable, Sendable {
  /// Mean and 95 % interval over prompts.
  public struct Part: Codable, Sendable {
    /// Prompts.
    public let n: Int
    /// Mean over prompts of the mean over their images.
    public let mean: Double
    /// Student-t interval; null for one prompt.
    public let ci95: [Double]?

    init(_ values: [Double]) throws {
      let summary = try Summary(values)
      (n, mean, ci95) = (summary.n, summary.mean, summary.ci95.map { [$0.low, $0.high] })
    }
  }
  /// Paired comparison by prompt: tuned − base.
  public struct Paired: Codable, Sendable {
    /// Mean difference.
    public let difference: Double
    /// Student-t interval of the difference.
    public let ci95: [Double]
    /// Two-sided p-value.
    public let p: Double
    init(_ values: [Double], against base: [Double]) throws {
      let test = try PairedTest(differences: zip(values, base).map { $0 - $1 })
      (difference, ci95, p) = (test.difference, [test.ci95.low, test.ci95.high], test.p)
    }
  }
  /// One reward.
  public struct RewardPart: Codable, Sendable {
    /// Over all prompts.
    public let mean: Double
    /// Interval of ``mean``.
    public let ci95: [Double]?
    /// By the prompts' tags.
    public let perCategory: [String: Part]
    /// Against the other model.
    public let paired: Paired?
    /// The other model's own numbers.
    public let against: [String: Part]?
  }

  /// Prompts.
  public let nPrompts: Int
  /// Images of each.
  public let samplesPerPrompt: Int
  /// The first reward's mean.
  public let mean: Double
  /// The first reward's interval.
  public let ci95: [Double]?
  /// The first reward by category.
  public let perCategory: [String: Part]
  /// The first reward against the other model.
  public let paired: Paired?
  /// Guards of this model; absent for one image a prompt.
  public let guards: GuardValues?
  /// Guards of the other model.
  public let guardsAgainst: GuardValues?
  /// What the guards say against the other model; empty if nothing collapsed.
  public let collapsed: [String]?
  /// Every reward by name.
  public let rewards: [String: RewardPart]
  /// Sampling steps.
  public let steps: Int
  /// How many of them the tuned model took before its base; absent where it took all.
  public let switchStep: Int?
  /// Seed of the noise.
  public let seed: UInt64
  /// Part of the prompt file.
  public let split: String
  /// What was evaluated.
  public let model: String
  /// What it was compared with.
  public let against: String?

  init(
    _ evaluation: Evaluation, against base: Evaluation?, order: [String], steps: Int, switchStep: Int?,
    seed: UInt64,
    split: String, model: String, againstName: String?
  ) throws {
    func categories(_ e: Evaluation, _ name: String) throws -> [String: Part] {
      var groups: [String: [Double]] = [:]
      for (prompt, value) in zip(e.prompts, e.perPrompt[name]!) {
        groups[prompt.tag ?? "untagged", default: []].append(value)
      }
      return try groups.mapValues(Part.init)
    }
    var parts: [String: RewardPart] = [:]
    for name in order {
      let values = evaluation.perPrompt[name]!
      let whole = try Part(values)
      var against: [String: Part]?
      if let base {
        against = try categories(base, name)
        against!["all"] = try Part(base.perPrompt[name]!)
      }
      parts[name] = RewardPart(
        mean: whole.mean, ci95: whole.ci95, perCategory: try categories(evaluation, name),
        paired: try base.map { try Paired(values, against: $0.perPrompt[name]!) }, against: against)
    }
    let first = parts[order[0]]!
    (nPrompts, samplesPerPrompt) = (evaluation.prompts.count, evaluation.samplesPerPrompt)
    (mean, ci95, perCategory, paired) = (first.mean, first.ci95, first.perCategory, first.paired)
    guards = evaluation.guards
    guardsAgainst = base?.guards
    collapsed = base?.guards.flatMap { evaluation.guards?.collapsed(against: $0) }
    rewards = parts
    self.switchStep = switchStep
    (self.steps, self.seed, self.split, self.model, self.against) = (steps, seed, split, model, againstName)
  }
}
