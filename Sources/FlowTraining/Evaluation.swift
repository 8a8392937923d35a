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
  /// Reward name → mean over each prompt's images, in prompt order; nil where none has a valid score.
  public let perPrompt: [String: [Double?]]
  /// Reward name → images without a valid score, and why the last has none; absent where all have one.
  public let failures: [String: Failures]
  /// Means over all groups; nil for one image a prompt, which has no diversity.
  public let guards: GuardValues?
  /// The first image of each prompt asked for, by prompt.
  public let pictures: [Int: Image]

  /// Images that a reward could not score.
  public struct Failures: Codable, Sendable, Equatable {
    /// How many.
    public var images: Int
    /// Why the last of them.
    public var reason: String
  }

  /// Draws and scores `count` images of each prompt.
  ///
  /// Rewards that wait for others answer while the next images are drawn.
  /// - Parameters:
  ///   - switchStep: see ``Engine/draw(_:count:steps:seed:switchStep:check:)``.
  ///   - keep: numbers of the prompts whose first image is kept.
  static func run(
    _ engine: Engine, _ prompts: [Prompt], _ rewards: RewardSet, count: Int, steps: Int, seed: UInt64,
    switchStep: Int? = nil, keep: Set<Int> = [], check: @escaping () throws -> Void = {},
    progress: (Int) -> Void = { _ in }
  ) throws -> Evaluation {
    var perPrompt = Dictionary(uniqueKeysWithValues: rewards.names.map { ($0, [Double?]()) })
    var failures: [String: Failures] = [:]
    var pictures: [Int: Image] = [:]
    var guards: [(GuardValues, Int)] = []
    func take(_ judgement: Judgement) {
      for (name, scores) in zip(rewards.names, judgement.scores) {
        for start in stride(from: 0, to: scores.count, by: count) {
          let valid = scores[start..<(start + count)].compactMap(\.value)
          perPrompt[name]!.append(valid.isEmpty ? nil : valid.reduce(0, +) / Double(valid.count))
        }
        let failed = scores.filter { $0.value == nil }
        guard let last = failed.last else { continue }
        let before = failures[name]?.images ?? 0
        failures[name] = Failures(
          images: before + failed.count, reason: last.failure ?? "the score is not a number")
      }
    }
    var asked: PendingJudgement?
    // Whole prompts a block, so that groups stay together.
    for block in Batches(prompts.count, of: max(engine.batch / count, 1)) {
      let some = Array(prompts[block])
      let images = try engine.draw(
        some.map(\.text), count: count, steps: steps, seed: seed, switchStep: switchStep, check: check)
      if let asked { take(try asked.finish(check: check)) }
      asked = rewards.begin(images, some.flatMap { [Prompt](repeating: $0, count: count) })
      if !rewards.waits {
        take(try asked!.finish(check: check))
        asked = nil
      }
      if count > 1 { guards.append((try GuardValues.measure(images, groupSize: count), some.count)) }
      for (i, number) in block.enumerated() where keep.contains(number) {
        pictures[number] = try Image(try images[i * count])
      }
      progress(block.upperBound)
    }
    if let asked { take(try asked.finish(check: check)) }
    return Evaluation(
      prompts: prompts, samplesPerPrompt: count, perPrompt: perPrompt, failures: failures,
      guards: guards.isEmpty ? nil : GuardValues.mean(guards),
      pictures: pictures)
  }

  /// Mean of a reward over the prompts that have one; NaN for none.
  func mean(_ name: String) -> Double {
    let values = perPrompt[name]!.compactMap { $0 }
    return values.isEmpty ? .nan : values.reduce(0, +) / Double(values.count)
  }
}

extension GuardValues {
  /// Mean over blocks of groups, weighted by their number.
  static func mean(_ parts: [(GuardValues, Int)]) -> GuardValues {
    let total = Double(parts.reduce(0) { $0 + $1.1 })
    func average(_ field: (GuardValues) -> Double?) -> Double? {
      let values = parts.map { (field($0.0), Double($0.1)) }
      guard values.allSatisfy({ $0.0 != nil }) else { return nil }
      return values.reduce(0) { $0 + $1.0! * $1.1 } / total
    }
    return GuardValues(
      blank: average(\.blank)!, diversity: average(\.diversity)!, ink: average(\.ink)!,
      vivid: average(\.vivid)!,
      sharpness: average(\.sharpness), grid: average(\.grid))
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

    init(_ values: [Double?]) throws {
      let summary = try Summary(values.compactMap { $0 })
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
    /// Over the prompts that have a score on both sides.
    init(_ values: [Double?], against base: [Double?]) throws {
      let test = try PairedTest(
        differences: zip(values, base).compactMap { a, b in a.flatMap { a in b.map { a - $0 } } })
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
    /// Images without a valid score, left out of their prompt's mean; absent if there are none.
    public let failures: Evaluation.Failures?
    /// The other model's.
    public let failuresAgainst: Evaluation.Failures?
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
      for case (let prompt, let value?) in zip(e.prompts, e.perPrompt[name]!) {
        groups[prompt.tag ?? "untagged", default: []].append(value)
      }
      return try groups.mapValues(Part.init)
    }
    var parts: [String: RewardPart] = [:]
    for (evaluation, which) in [(evaluation, model), (base, againstName ?? "")] {
      guard let evaluation else { continue }
      if let name = order.first(where: { evaluation.perPrompt[$0]!.allSatisfy { $0 == nil } }) {
        throw RunError(
          "reward \(name) gave no valid score for any image of \(which): "
            + (evaluation.failures[name]?.reason ?? "the scores are not numbers"))
      }
    }
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
        paired: try base.map { try Paired(values, against: $0.perPrompt[name]!) }, against: against,
        failures: evaluation.failures[name], failuresAgainst: base?.failures[name])
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
