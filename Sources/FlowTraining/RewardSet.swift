import Dispatch
import FlowRewards
import Foundation
import Pictures
import Synchronization
import Torch

/// The rewards of a configuration.
struct RewardSet {
  /// One of them.
  struct Entry: Sendable {
    let reward: any Reward
    let settings: RewardSettings
    /// Its key in metrics and reports: the label; else the name, with the score where two rewards share a name.
    let name: String
  }
  let entries: [Entry]
  /// Names of ``entries``.
  var names: [String] { entries.map(\.name) }
  /// Whether any of them waits for others while this process can go on.
  let waits: Bool

  /// Makes every reward.
  init(_ list: [RewardSettings]) throws {
    let names = Self.names(list)
    try self.init(
      zip(list, names).map { settings, name in
        Entry(reward: try RewardFactory.make(settings), settings: settings, name: name)
      })
  }
  /// Rewards that are made already.
  init(_ entries: [Entry]) {
    self.entries = entries
    waits = entries.contains { !($0.reward is any LocalReward) }
  }

  /// Those that samples are scored with: not the ones that are only watched.
  var sampled: RewardSet { RewardSet(entries.filter { !$0.settings.watch }) }

  static func names(_ list: [RewardSettings]) -> [String] {
    list.map { entry in
      entry.label
        ?? (list.count { $0.label == nil && $0.name == entry.name } > 1
          ? "\(entry.name):\(entry.score ?? "default")" : entry.name)
    }
  }

  /// Throws for prompts that a reward can never judge.
  func check(_ prompts: [Prompt]) throws {
    let described = prompts.map(RewardPrompt.init)
    for entry in entries { try entry.reward.check(described) }
  }

  /// Throws where what a reward waits for is not there.
  ///
  /// - Parameter check: called several times a second; throws to give up.
  func prepare(check: () throws -> Void = {}) throws {
    for entry in entries where !(entry.reward is any LocalReward) {
      try waiting(check: check) { try await entry.reward.prepare() }
    }
  }

  /// All scores of `images`, [B, 3, H, W], waited for here.
  func judge(
    _ images: Tensor, _ prompts: [Prompt], check: () throws -> Void = {}
  ) throws -> Judgement {
    let pending = begin(images, prompts)
    return try pending.finish(check: check)
  }

  /// Asks the rewards that wait for others; local ones are computed when the judgement is wanted.
  func begin(_ images: Tensor, _ prompts: [Prompt]) -> PendingJudgement {
    PendingJudgement(entries, images, prompts.map(RewardPrompt.init))
  }

  /// Images judged together: local rewards hold several times what they see.
  static func slices(_ count: Int, height: Int, width: Int) -> [Range<Int>] {
    let size = max(1, (1 << 24) / (height * width))
    return stride(from: 0, to: count, by: size).map { $0..<min($0 + size, count) }
  }
}

/// What images earned, reward by reward.
struct Judgement {
  /// Each reward's scores, one an image.
  private(set) var scores: [[RewardScore]]
  /// Each reward's seconds, from the first question to the last answer.
  private(set) var seconds: [Double]

  /// Each reward's values; nil where it failed.
  var values: [[Double?]] { scores.map { $0.map(\.value) } }

  init(scores: [[RewardScore]], seconds: [Double]) { (self.scores, self.seconds) = (scores, seconds) }

  /// Parts that were judged apart, in an order given by the numbers of their images.
  init(_ parts: [(rows: [Int], judgement: Judgement)]) {
    let total = parts.reduce(0) { $0 + $1.rows.count }
    let rewards = parts.first?.judgement.scores.count ?? 0
    scores = .init(repeating: .init(repeating: RewardScore(value: nil), count: total), count: rewards)
    seconds = .init(repeating: 0, count: rewards)
    for part in parts {
      for r in scores.indices {
        for (row, score) in zip(part.rows, part.judgement.scores[r]) { scores[r][row] = score }
        seconds[r] += part.judgement.seconds[r]
      }
    }
  }
}

/// Scores that are being waited for.
final class PendingJudgement {
  private let entries: [RewardSet.Entry]
  private let images: Tensor
  private let prompts: [RewardPrompt]
  private var questions: [Int: Question] = [:]

  /// One reward's answer, from the thread that gets it to the one that waits.
  private final class Question: Sendable {
    let done = DispatchSemaphore(value: 0)
    let answer = Mutex<(Result<[RewardScore], any Error>, seconds: Double)?>(nil)
    let task: Mutex<Task<Void, Never>?> = Mutex(nil)
  }

  init(_ entries: [RewardSet.Entry], _ images: Tensor, _ prompts: [RewardPrompt]) {
    (self.entries, self.images, self.prompts) = (entries, images, prompts)
    for (i, entry) in entries.enumerated() where !(entry.reward is any LocalReward) {
      let question = Question()
      questions[i] = question
      let task = Task.detached(executorPreference: QuestionExecutor.shared) { [images, prompts] in
        let start = ContinuousClock.now
        let outcome: Result<[RewardScore], any Error>
        do { outcome = .success(try await entry.reward.score(images, prompts: prompts)) } catch {
          outcome = .failure(error)
        }
        question.answer.withLock { $0 = (outcome, start.duration(to: .now).inSeconds) }
        question.done.signal()
      }
      question.task.withLock { $0 = task }
    }
  }

  deinit {
    for question in questions.values { question.task.withLock { $0?.cancel() } }
  }

  /// The scores. Local rewards are computed first, while the others are still asked.
  ///
  /// - Parameter check: called several times a second; throws to give up.
  func finish(check: () throws -> Void = {}) throws -> Judgement {
    var scores = [[RewardScore]](repeating: [], count: entries.count)
    var seconds = [Double](repeating: 0, count: entries.count)
    for (i, entry) in entries.enumerated() {
      guard let local = entry.reward as? any LocalReward else { continue }
      let start = ContinuousClock.now
      for range in RewardSet.slices(prompts.count, height: images.size(2), width: images.size(3)) {
        try check()
        scores[i] += try local.scores(images[range], prompts: Array(prompts[range]))
      }
      seconds[i] = start.duration(to: .now).inSeconds
    }
    for (i, question) in questions {
      while question.done.wait(timeout: .now() + .milliseconds(100)) == .timedOut { try check() }
      let (result, spent) = question.answer.withLock { $0! }
      (scores[i], seconds[i]) = (try result.get(), spent)
    }
    for (entry, scores) in zip(entries, scores) where scores.count != prompts.count {
      throw RunError(
        "reward \(entry.name): \(scores.count) scores for \(prompts.count) images, expected one each")
    }
    // Whatever a reward says: a number that is none is no score.
    return Judgement(
      scores: scores.map { scores in
        scores.map { score in
          guard let value = score.value, !value.isFinite else { return score }
          var score = score
          (score.value, score.failure) = (nil, "the score is \(value)")
          return score
        }
      }, seconds: seconds)
  }
}

extension RewardSet {
  /// How raw scores count: thresholds and gates applied; nil where a reward failed.
  func counted(_ values: [[Double?]]) -> [[Double?]] {
    zip(entries, values).map { entry, own in
      let gate = entry.settings.gate.reward.flatMap(names.firstIndex)
      return own.indices.map { i in
        guard var value = own[i] else { return nil }
        if let threshold = entry.settings.threshold { value = value >= threshold ? 1 : 0 }
        guard let gate else { return value }
        return values[gate][i].map { $0 > entry.settings.gate.above ? value : 0 }
      }
    }
  }

  /// Samples that cannot be trained on: a reward that counts, in any chunk or as a gate, has failed.
  func masked(_ values: [[Double?]]) -> [Bool] {
    let gates = Set(entries.compactMap(\.settings.gate.reward))
    let needed = zip(entries, values).filter { entry, _ in
      entry.settings.weight != 0 || entry.settings.lateWeight ?? 0 != 0 || gates.contains(entry.name)
    }
    return (values.first ?? []).indices.map { i in needed.contains { $0.1[i] == nil } }
  }

  /// Throws if more of a reward's scores failed than its policy allows, or nothing is left to train on.
  func checkFailures(_ judgement: Judgement, iteration: Int) throws {
    for (entry, scores) in zip(entries, judgement.scores) {
      let failed = scores.filter { $0.value == nil }
      let share = Double(failed.count) / Double(max(scores.count, 1))
      guard share > entry.settings.failure.abortAbove else { continue }
      throw RewardFailure(
        "iteration \(iteration): reward \(entry.name) failed for \(failed.count) of \(scores.count) samples, "
          + "more than failure.abortAbove \(entry.settings.failure.abortAbove) allows; the last reason: "
          + (failed.last?.failure ?? "the score is not a number"))
    }
    let masked = masked(judgement.values)
    guard masked.isEmpty || masked.contains(false) else {
      let last = judgement.scores.joined().last { $0.value == nil }
      throw RewardFailure(
        "iteration \(iteration): no sample has a valid reward; the last reason: "
          + (last?.failure ?? "the score is not a number"))
    }
  }
}

/// A reward failed too often: the run stops at the iteration before, and can be resumed.
struct RewardFailure: Error, CustomStringConvertible {
  let description: String
  init(_ description: String) { self.description = description }
}

// MARK: - The probe

extension RewardSet {
  /// Tries every reward on two shipped images of known order, before anything depends on it.
  ///
  /// - Parameter warn: told of a reward that prefers the image it should not.
  /// - Throws: ``RunError`` for a reward that fails, gives both the same score, or takes longer than its timeout.
  func probe(check: () throws -> Void = {}, warn: (String) -> Void = { _ in }) throws {
    for entry in entries {
      let probe = entry.reward.probe
      let images = try Tensor(
        pictures: [probe.better, probe.worse].map { try Image(png: Assets.locate("probe/\($0)")) })
      try RewardSet([entry]).prepare(check: check)
      let start = ContinuousClock.now
      let judgement = try PendingJudgement(
        [entry], images, [probe.prompt, probe.prompt]
      ).finish(check: check)
      let (seconds, timeout) = (start.duration(to: .now).inSeconds, entry.settings.failure.timeout)
      let scores = judgement.scores[0]
      func refuse(_ reason: String) -> RunError {
        RunError(
          "reward \(entry.name) failed its probe, the images \(probe.better) and \(probe.worse) for "
            + "\"\(probe.prompt.text)\": \(reason)")
      }
      if let failed = scores.first(where: { $0.value == nil }) {
        throw refuse(failed.failure ?? "no score")
      }
      let (better, worse) = (scores[0].value!, scores[1].value!)
      if better == worse {
        guard entry.settings.failure.allowTie else {
          throw refuse(
            "both score \(better): it would teach nothing (where that is right, as for a detector that sees nothing in a "
              + "drawing: failure.allowTie: true)")
        }
        warn(
          "reward \(entry.name) gives both images of its probe \(better): see with chunkgrpo score that it tells pictures of "
            + "your prompts apart")
      }
      // Each image may have been a request of its own. Where one was repeated there were pauses too, and every try had
      // an end.
      guard scores.contains(where: { $0.retries > 0 }) || seconds <= timeout * Double(scores.count) else {
        throw refuse(
          "it took \(Int(seconds.rounded(.up))) s, failure.timeout is \(timeout): raise it, or use something faster"
        )
      }
      if better < worse {
        warn(
          "reward \(entry.name) scores \(probe.worse) (\(worse)) above \(probe.better) (\(better)) for "
            + "\"\(probe.prompt.text)\": is it what you mean to raise?")
      }
    }
  }
}

extension Duration {
  var inSeconds: Double { Double(components.seconds) + Double(components.attoseconds) * 1e-18 }
}

extension RewardPrompt {
  init(_ prompt: Prompt) {
    let scene =
      prompt.include.isEmpty
      ? nil
      : Scene(
        include: prompt.include.map { Scene.Entry(name: $0.name, color: $0.color, count: $0.count) },
        relation: prompt.relation)
    self.init(
      text: prompt.text, scene: scene, tag: prompt.tag ?? "", metadata: prompt.isPlain ? nil : prompt.raw)
  }
}
