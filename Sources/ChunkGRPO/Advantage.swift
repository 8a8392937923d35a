/// What groups of rewards need and did not get.
public enum AdvantageError: Error, CustomStringConvertible, Sendable, Equatable {
  /// A group of one has no advantage relative to anything.
  case groupTooSmall(group: Int, size: Int)
  /// An unmasked reward is infinite or not a number.
  case notFinite(group: Int, sample: Int, reward: Double)
  /// The mask or another reward has a different shape.
  case shapeMismatch(expected: Int, got: Int)
  /// One weight for each reward.
  case weightCount(rewards: Int, weights: Int)

  /// What is wrong, what was expected, and the way out.
  public var description: String {
    switch self {
    case .groupTooSmall(let group, let size):
      "group \(group) has \(size) \(size == 1 ? "sample" : "samples"), expected at least 2: raise group.size"
    case .notFinite(let group, let sample, let reward):
      "reward of sample \(sample) in group \(group) is \(reward), expected a finite number: "
        + "mask samples whose reward failed"
    case .shapeMismatch(let expected, let got):
      "rewards and masks must have one entry a sample: expected \(expected), got \(got)"
    case .weightCount(let rewards, let weights):
      "rewards: expected \(rewards) weights, one a reward, got \(weights)"
    }
  }
}

/// Which standard deviation divides a group's centred rewards.
public enum AdvantageStd: String, Codable, CaseIterable, Sendable {
  /// The group's own.
  case group
  /// That of all samples of the iteration, over all groups.
  case global
}

/// The rewards of one prompt seen so far, as far as advantages need them: `group.statistics: running`.
///
/// Two runs that add the same batches in the same order have the same bits, and a single batch has those of its own
/// mean and standard deviation.
public struct RewardStatistics: Sendable, Equatable {
  /// How many.
  public private(set) var count = 0
  /// Their mean.
  public private(set) var mean = 0.0
  /// Σ (R − mean)².
  public private(set) var squares = 0.0
  /// The smallest and the largest.
  public private(set) var low = Double.infinity, high = -Double.infinity

  /// No rewards yet.
  public init() {}

  /// Takes in finite rewards, all at once.
  ///
  /// Chan, Golub, LeVeque: the squares of two parts about the common mean differ from those about their own by
  /// δ²·n·m/(n + m), δ being the difference of their means.
  public mutating func add(_ rewards: [Double]) {
    guard !rewards.isEmpty else { return }
    let own = rewards.reduce(0, +) / Double(rewards.count)
    let about = rewards.reduce(0) { $0 + ($1 - own) * ($1 - own) }
    let (n, m) = (Double(count), Double(rewards.count))
    let delta = own - mean
    (mean, squares) =
      count == 0
      ? (own, about)
      : (
        mean + delta * m / (n + m), squares + about + delta * delta * n * m / (n + m)
      )
    count += rewards.count
    (low, high) = (min(low, rewards.min()!), max(high, rewards.max()!))
  }

  /// With n − 1; 0 for fewer than two.
  public var standardDeviation: Double { count > 1 ? (squares / Double(count - 1)).squareRoot() : 0 }
  /// Whether two of them differ: asked of the rewards, as equal ones can leave rounding noise.
  public var varies: Bool { count > 1 && low != high }

  /// Everything, to be stored; ``init(values:)`` restores it bit for bit.
  public var values: [Double] { [Double(count), mean, squares, low, high] }
  /// From ``values``; nil for anything else.
  public init?(values: [Double]) {
    guard values.count == 5, let count = Int(exactly: values[0]), count >= 0 else { return nil }
    (self.count, mean, squares, low, high) = (count, values[1], values[2], values[3], values[4])
  }
}

/// Group-relative advantages A_k = (R_k − mean) / (std + 1e-8), std with n − 1.
public struct Advantages: Sendable, Equatable {
  /// One advantage a sample, group after group; 0 for masked samples.
  public let values: [Double]
  /// Groups whose unmasked rewards (with running statistics: those of the prompt so far) are all equal or fewer than
  /// two: their advantages are 0.
  public let zeroGroups: Int
  /// Samples left out because their reward failed.
  public let masked: Int

  /// The advantages of one group.
  ///
  /// - Parameters:
  ///   - rewards: one a sample.
  ///   - masked: true for samples to leave out; nil leaves out none.
  ///   - clamp: largest magnitude.
  /// - Throws: ``AdvantageError``.
  public static func group(
    rewards: [Double], masked: [Bool]? = nil, clamp: Double = 5
  ) throws(AdvantageError) -> Advantages {
    try groups(rewards: [rewards], masked: masked.map { [$0] }, clamp: clamp)
  }

  /// The advantages of all groups of an iteration, gathered from all devices.
  ///
  /// - Parameters:
  ///   - rewards: one list a group.
  ///   - masked: true for samples to leave out, shaped like `rewards`; nil leaves out none.
  ///   - std: which standard deviation divides.
  ///   - clamp: largest magnitude.
  ///   - running: for each group the rewards of its prompt seen so far, these included: their mean and standard
  ///     deviation then stand for the group's own; nil for the group's own.
  /// - Returns: values in the order of `rewards`, flattened.
  /// - Throws: ``AdvantageError``.
  public static func groups(
    rewards: [[Double]], masked: [[Bool]]? = nil, std: AdvantageStd = .group, clamp: Double = 5,
    running: [RewardStatistics]? = nil
  ) throws(AdvantageError) -> Advantages {
    precondition(running.map { $0.count == rewards.count } ?? true, "running statistics: one a group")
    let masked = masked ?? rewards.map { $0.map { _ in false } }
    guard masked.count == rewards.count else {
      throw .shapeMismatch(expected: rewards.count, got: masked.count)
    }
    for (g, group) in rewards.enumerated() { try check(group, masked: masked[g], group: g) }
    let kept = zip(rewards, masked).map { zip($0, $1).filter { !$1 }.map(\.0) }
    let all = kept.flatMap { $0 }
    let global = std == .global && !all.isEmpty ? moments(all).standardDeviation : nil
    let statistics = running ?? kept.map(statistics)
    let values = rewards.indices.flatMap { g in
      standardised(rewards[g], masked: masked[g], statistics[g], standardDeviation: global)
        .map { min(max($0, -clamp), clamp) }
    }
    return Advantages(
      values: values, zeroGroups: statistics.filter { !$0.varies }.count,
      masked: masked.reduce(0) { $0 + $1.filter { $0 }.count })
  }

  /// Groups of sums that are advantages already: ``RewardAggregate/advantages``.
  public static func summed(_ sums: [[Double]], masked: [[Bool]], clamp: Double = 5) -> Advantages {
    Advantages(
      values: sums.flatMap { $0.map { min(max($0, -clamp), clamp) } },
      zeroGroups: sums.count { $0.allSatisfy { $0 == 0 } },
      masked: masked.reduce(0) { $0 + $1.count { $0 } })
  }

  /// Refuses groups below two samples, shapes that differ and unmasked rewards that are not finite.
  fileprivate static func check(_ rewards: [Double], masked: [Bool], group: Int) throws(AdvantageError) {
    guard rewards.count > 1 else { throw .groupTooSmall(group: group, size: rewards.count) }
    guard masked.count == rewards.count else {
      throw .shapeMismatch(expected: rewards.count, got: masked.count)
    }
    for (i, reward) in rewards.enumerated() where !masked[i] && !reward.isFinite {
      throw .notFinite(group: group, sample: i, reward: reward)
    }
  }
}

/// Those of `rewards` alone.
private func statistics(_ rewards: [Double]) -> RewardStatistics {
  var result = RewardStatistics()
  result.add(rewards)
  return result
}

/// (R − mean) / (std + 1e-8) of the unmasked members, 0 for the others and when all of the statistics are equal.
private func standardised(
  _ rewards: [Double], masked: [Bool], _ statistics: RewardStatistics, standardDeviation: Double? = nil
) -> [Double] {
  guard statistics.varies else { return rewards.map { _ in 0 } }
  let divisor = (standardDeviation ?? statistics.standardDeviation) + 1e-8
  return zip(rewards, masked).map { $1 ? 0 : ($0 - statistics.mean) / divisor }
}

/// How several rewards become one: the configuration's `aggregate`.
public enum RewardAggregate: String, Codable, CaseIterable, Sendable {
  /// Σ w_k R_k.
  case sum
  /// Σ w_k z_k, each reward first standardised within its group (0 where it is equal for all); standardised again as
  /// the advantages of one reward are. With `loss.advantageStd: global` that is GDPO's normalisation over the batch.
  case normalised
  /// Σ w_k A_k, A_k the clamped advantages of each reward alone: the sum is not standardised again, so that a group
  /// where rewards contradict each other moves little.
  ///
  /// Source: Tencent-Hunyuan/MixGRPO@e5cdd6a fastvideo/train_grpo_flux.py, `advantage_aggr`.
  case advantages

  /// The combined rewards of one group.
  ///
  /// - Parameters:
  ///   - rewards: for each reward, one value a sample.
  ///   - weights: one for each reward.
  ///   - masked: samples to leave out of the statistics; theirs is 0.
  ///   - clamp: largest magnitude of an advantage, for `advantages`, whose sums are clamped by ``Advantages/summed(_:masked:clamp:)``.
  /// - Throws: ``AdvantageError``.
  public func combine(
    rewards: [[Double]], weights: [Double], masked: [Bool]? = nil, clamp: Double = 5
  ) throws(AdvantageError) -> [Double] {
    guard let first = rewards.first, rewards.count == weights.count else {
      throw .weightCount(rewards: rewards.count, weights: weights.count)
    }
    let masked = masked ?? first.map { _ in false }
    var total = [Double](repeating: 0, count: first.count)
    for (reward, weight) in zip(rewards, weights) {
      guard reward.count == first.count else {
        throw .shapeMismatch(expected: first.count, got: reward.count)
      }
      try Advantages.check(reward, masked: masked, group: 0)
      let kept = zip(reward, masked).filter { !$1 }.map(\.0)
      var values = self == .sum ? reward : standardised(reward, masked: masked, statistics(kept))
      if self == .advantages { values = values.map { min(max($0, -clamp), clamp) } }
      for i in total.indices where !masked[i] { total[i] += weight * values[i] }
    }
    return total
  }
}
