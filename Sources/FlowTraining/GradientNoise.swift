import ChunkGRPO
import Foundation
import Torch

/// How many images an update needs before its gradient points anywhere: measured for each reward of a configuration.
public struct GradientNoise: Codable, Sendable {
  /// One reward, or all of them as the configuration weighs them.
  public struct Row: Codable, Sendable {
    /// The reward's name, or `all`.
    public let reward: String
    /// Groups whose samples had different rewards; the others give no gradient.
    public let groups: Int
    /// Signal and noise of one group's gradient.
    public let scale: NoiseScale
    /// Images of an update at which signal and noise are equal, with the ends of its 95 % interval; null where 0 cannot
    /// be excluded.
    public let images: Double?, imagesLow: Double?, imagesHigh: Double?
    /// Cosine to expect between two updates of the configuration.
    public let cosine: Double
  }
  /// Each reward that is trained on, then all.
  public let rows: [Row]
  /// Groups measured, and their size.
  public let groups: Int, groupSize: Int
  /// Images of an update as configured.
  public let imagesOfUpdate: Int

  /// Draws `groups` groups of the untrained model and back-propagates each alone, once for each reward.
  ///
  /// All of their gradients are held in memory at once, on the CPU: 4 bytes for each trained value and group.
  /// - Parameters:
  ///   - configuration: says what is sampled and trained; its `loss.kl` is left out.
  ///   - progress: told of groups done and in all.
  public static func measure(
    _ configuration: Configuration, groups: Int, progress: (Int, Int) -> Void = { _, _ in }
  ) throws -> GradientNoise {
    let updated = configuration.samplesPerIteration / configuration.optim.updatesPerIteration
    var c = configuration
    (c.group.promptsPerIteration, c.optim.updatesPerIteration, c.loss.kl) = (groups, 1, 0)
    (c.group.statistics, c.guards.action, c.run.evaluateEvery, c.run.stopReward) = (.group, .off, 0, nil)
    c.rewards.removeAll(where: \.watch)
    let trainer = try Trainer(c, folder: RunFolder(URL(filePath: c.output)))
    try trainer.probeRewards()
    let rows = try trainer.gradientNoise(progress)
    return GradientNoise(
      rows: rows.map { name, used, scale in
        func images(_ groups: Double?) -> Double? { groups.map { $0 * Double(c.group.size) } }
        let ends = scale.scaleCI95
        return Row(
          reward: name, groups: used, scale: scale, images: images(scale.scale), imagesLow: images(ends.low),
          imagesHigh: images(ends.high), cosine: scale.cosine(groups: max(1, updated / c.group.size)))
      }, groups: groups, groupSize: c.group.size, imagesOfUpdate: updated)
  }
}

extension Trainer {
  /// One rollout, and for each reward (and all of them) the noise scale of its groups' gradients.
  fileprivate func gradientNoise(
    _ progress: (Int, Int) -> Void
  ) throws -> [(name: String, used: Int, scale: NoiseScale)] {
    var (clock, row) = (Stopwatch(), MetricsRow())
    let batch = samplesOfIteration()
    let conditions = try batch.map { try engine.encoder($0.prompt.text) }
    let courses = try courses(batch)
    let (trajectories, _, asked) = try sampleAndDecode(batch, conditions, courses, &clock)
    let judgement = try Judgement(asked.map { ($0.rows, try $0.pending.finish(check: Interruption.check)) })
    try sampled.checkFailures(judgement, iteration: 1)
    let names = sampled.names
    var targets: [(name: String, weights: [Double]?)] = names.indices.compactMap { r in
      let settings = sampled.entries[r].settings
      guard settings.weight != 0 || settings.lateWeight ?? 0 != 0 else { return nil }
      return (names[r], names.indices.map { $0 == r ? (settings.weight < 0 ? -1 : 1) : 0 })
    }
    targets = targets.count > 1 ? targets + [("all", nil)] : [(targets[0].name, nil)]
    let (size, rule) = (configuration.group.size, updateRule())
    let parameters = policy.parameters.sorted { $0.key < $1.key }.map(\.value)
    let groups = batch.count / size
    return try targets.enumerated().map { number, target in
      let advantages = try advantages(judgement.values, batch, weights: target.weights, &row).0
      let samples = try drawChunks(batch, courses, trajectories, advantages, &row)
      let gradients = try (0..<groups).map { g in
        progress(number * groups + g, targets.count * groups)
        for parameter in parameters { try parameter.clearGrad() }
        _ = try rule.accumulate(
          Array(samples[(g * size)..<((g + 1) * size)]), trajectories, conditions: conditions, first: true)
        return try Tensor.cat(
          parameters.map { parameter in
            try (parameter.grad() ?? Tensor.zeros(like: parameter)).detach().reshape([parameter.count])
              .to(.float32).to(.cpu)
          })
      }
      for parameter in parameters { try parameter.clearGrad() }
      let sum = try gradients.dropFirst().reduce(gradients[0].clone()) { try $0 + $1 }
      func product(_ a: Tensor, _ b: Tensor) throws -> Double {
        try (a.to(.float64) * b.to(.float64)).sum([0]).doubles()[0]
      }
      let squares = try gradients.map { try product($0, $0) }
      return (
        target.name, squares.count { $0 > 0 },
        try NoiseScale(squares: squares, withSum: gradients.map { try product($0, sum) })
      )
    }
  }
}
