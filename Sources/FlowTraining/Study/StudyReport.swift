import ChunkGRPO
import FlowRewards
import Foundation

/// What a study found: the contract of its `--json` and of study.json. The statistical unit is the seed.
///
/// Everything that a clock measured is under ``Arm/clock``; the rest is a function of the study alone, however often
/// it was stopped.
public struct StudyReport: Encodable, Sendable {
  /// Values over seeds.
  public struct Values: Encodable, Sendable {
    /// Arithmetic mean.
    public let mean: Double
    /// Student-t interval of the mean; null for one seed.
    public let ci95: [Double]?
    /// One a seed, in the order of ``Arm/seeds``.
    public let values: [Double]
    init(_ values: [Double]) throws {
      let summary = try Summary(values)
      (mean, ci95, self.values) = (summary.mean, summary.ci95.map { [$0.low, $0.high] }, values)
    }
  }
  /// A mean difference over seeds that both arms have, with its interval; null for one seed.
  public struct Difference: Encodable, Sendable {
    /// Mean of this arm − the reference arm.
    public let difference: Double
    /// Student-t interval; null for one seed.
    public let ci95: [Double]?
    init(_ values: [Double]) throws {
      let summary = try Summary(values)
      (difference, ci95) = (summary.mean, summary.ci95.map { [$0.low, $0.high] })
    }
  }
  /// What one arm reached in one reward.
  public struct Reward: Encodable, Sendable {
    /// Score of the trained models.
    public let final: Values
    /// Score above the untrained model's.
    public let gain: Values
    /// Gain on the dev split after as many trained steps as every run reached; absent without learning curves.
    public let gainAtEqualSteps: Values?
    /// Of those, paired by seed against the reference arm.
    public let gainAtEqualStepsAgainst: Difference?
  }
  /// What a clock measured of one arm.
  public struct Clock: Encodable, Sendable {
    /// Wall-clock seconds of a run's rollouts, decoding, rewards and updates.
    public let seconds: Values
    /// CPU seconds of the same.
    public let cpuSeconds: Values
    /// Reward name → gain over the CPU seconds spent on it.
    public let gainPerCPUSecond: [String: Values]
    /// Reward name → gain on the dev split after as many CPU seconds as every run took.
    public let gainAtEqualCPUSeconds: [String: Values]
    /// Of those, paired by seed against the reference arm.
    public let gainAtEqualCPUSecondsAgainst: [String: Difference]
  }
  /// One arm.
  public struct Arm: Encodable, Sendable {
    /// Its name.
    public let name: String
    /// What it changes.
    public let overrides: [String]
    /// Seeds that are trained and scored.
    public let seeds: [UInt64]
    /// Images generated in one run.
    public let images: Values
    /// Steps trained on in one run.
    public let trainedSteps: Values
    /// Forward passes of one run, one a row.
    public let networkPasses: Values
    /// By name.
    public let rewards: [String: Reward]
    /// Guards of the trained models, means over seeds; absent for one image a prompt.
    public let guards: GuardValues?
    /// Seeds at which a guard collapsed against the untrained model, with what did.
    public let collapsed: [String]
    /// What a clock measured.
    public let clock: Clock
  }
  /// An arm against the reference arm in one reward: the paired t-test over seeds.
  public struct Comparison: Encodable, Sendable {
    /// The arm and the reward.
    public let arm, reward: String
    /// Mean of arm − reference.
    public let difference: Double
    /// Its Student-t interval.
    public let ci95: [Double]
    /// Two-sided p-value.
    public let p: Double
    /// Holm's correction of ``p`` for all comparisons of the study.
    public let pHolm: Double
    /// True difference that this many seeds with this spread find four times in five at the 5 % level.
    public let detectable: Double
    /// Seeds that both arms have.
    public let n: Int
  }
  /// One arm's learning curve in one reward, over the seeds it has.
  public struct Curve: Encodable, Sendable {
    /// The arm and the reward.
    public let arm, reward: String
    /// Iterations, images generated and trained steps (mean over seeds) at the points.
    public let iterations: [Int], images: [Int], trainedSteps: [Double]
    /// Mean over seeds on the dev split, and that mean with the ends of the gain's interval; no ends for one seed.
    ///
    /// Each seed looks at dev with noise of its own, equal for all arms: that part of the spread says nothing of training.
    public let mean, low, high: [Double]
  }

  /// Arm that the others are compared with.
  public let reference: String
  /// What all arms have equally much of.
  public let budget: String
  /// Seeds asked for.
  public let seeds: [UInt64]
  /// Runs that are trained and scored, and runs asked for.
  public let runsDone: Int, runs: Int
  /// Score of the untrained model by reward.
  public let base: [String: Double]
  /// Guards of the untrained model.
  public let baseGuards: GuardValues?
  /// Arms with at least one finished run.
  public let arms: [Arm]
  /// All arms against the reference, in all rewards; empty with fewer than two common seeds.
  public let comparisons: [Comparison]
  /// Trained steps at which `gainAtEqualSteps` compares; null without learning curves.
  public let equalSteps: Double?
  /// Learning curves on the dev split.
  public let curves: [Curve]
  /// What a reader should know.
  public let notes: [String]

  /// A finished run with its curve: cumulated costs at the iterations where dev was looked at, from 0.
  struct Run {
    let run: StudyRun
    let scores: StudyRun.Scores
    let rows: [StudyRun.Row]
    /// Dev scores of the untrained model, by reward.
    let start: [String: Double]
    let dev: [Point]
    struct Point {
      let iteration: Int
      let steps, cpuSeconds: Double
      /// By reward.
      let gains: [String: Double]
    }

    init(_ run: StudyRun, _ scores: StudyRun.Scores, start: [String: Double]?) throws {
      (self.run, self.scores, self.start, rows) = (run, scores, start ?? [:], try run.rows())
      guard let start else {
        dev = []
        return
      }
      var points = [Point(iteration: 0, steps: 0, cpuSeconds: 0, gains: start.mapValues { _ in 0 })]
      var (steps, cpu) = (0.0, 0.0)
      for row in rows {
        (steps, cpu) = (steps + row.trainedSteps, cpu + row.cpuSeconds)
        if !row.dev.isEmpty {
          let gains = row.dev.compactMap { name, value in start[name].map { (name, value - $0) } }
          points.append(
            Point(
              iteration: row.iteration, steps: steps, cpuSeconds: cpu,
              gains: Dictionary(uniqueKeysWithValues: gains)))
        }
      }
      dev = points
    }

    /// The gain in `reward` between the points of its curve; nil outside of them.
    func value(_ reward: String, at x: Double, of axis: KeyPath<Point, Double>) -> Double? {
      let points = dev.filter { $0.gains[reward] != nil }
      guard let after = points.firstIndex(where: { $0[keyPath: axis] >= x }) else { return nil }
      let (b, y) = (points[after], points[after].gains[reward]!)
      if b[keyPath: axis] == x { return y }
      guard after > 0 else { return nil }
      let a = points[after - 1]
      let share = (x - a[keyPath: axis]) / (b[keyPath: axis] - a[keyPath: axis])
      return a.gains[reward]! * (1 - share) + y * share
    }
  }

  /// Computes everything from what is on disk.
  ///
  /// - Parameters:
  ///   - scores: of finished runs.
  ///   - base: what the untrained model scored.
  ///   - starts: seed → dev scores of the untrained model, the first point of that seed's curves.
  init(
    _ plan: StudyPlan, scores: [(StudyRun, StudyRun.Scores)], base: StudyRun.Scores,
    starts: [UInt64: [String: Double]]
  ) throws {
    let runs = try scores.map { try Run($0.0, $0.1, start: starts[$0.0.seed]) }
    let names = plan.rewardNames
    let byArm = Dictionary(grouping: runs) { $0.run.arm }
    func last(_ axis: KeyPath<Run.Point, Double>) -> Double? {
      let ends = runs.compactMap { $0.dev.last?[keyPath: axis] }
      return ends.count == runs.count ? ends.min() : nil
    }
    let equalSteps = last(\.steps), equalCPU = last(\.cpuSeconds)

    /// One value a run of `arm`, nil unless every run has it.
    func values(_ arm: String, _ value: (Run) -> Double?) -> [UInt64: Double]? {
      let found = (byArm[arm] ?? []).map { ($0.run.seed, value($0)) }
      guard !found.isEmpty, found.allSatisfy({ $0.1 != nil }) else { return nil }
      return Dictionary(uniqueKeysWithValues: found.map { ($0.0, $0.1!) })
    }
    func ordered(_ values: [UInt64: Double]) -> [Double] { plan.study.seeds.compactMap { values[$0] } }
    /// Differences to the reference arm at the seeds that both have.
    func differences(_ arm: String, _ value: (Run) -> Double?) -> [Double]? {
      guard arm != plan.reference, let mine = values(arm, value), let others = values(plan.reference, value)
      else { return nil }
      let common = plan.study.seeds.filter { mine[$0] != nil && others[$0] != nil }
      return common.isEmpty ? nil : common.map { mine[$0]! - others[$0]! }
    }

    var comparisons: [(Comparison, Int)] = []
    var reports: [Arm] = []
    for arm in plan.arms {
      let name = arm.arm.name
      guard let mine = byArm[name] else { continue }
      func over(_ value: (Run) -> Double) throws -> Values { try Values(ordered(values(name, value)!)) }
      let cpu = { (run: Run) in run.rows.reduce(0) { $0 + $1.cpuSeconds } }
      var rewards: [String: Reward] = [:]
      var (perSecond, atCPU, atCPUAgainst) = ([String: Values](), [String: Values](), [String: Difference]())
      for reward in names {
        let final = { (run: Run) in run.scores.rewards[reward]?.mean }
        guard let finals = values(name, final) else {
          throw RunError(
            "arm \(name): a score of \(reward) is missing; remove summary.json of its runs and run the study again"
          )
        }
        let start = base.rewards[reward]?.mean ?? 0
        let atSteps = { (run: Run) in equalSteps.flatMap { run.value(reward, at: $0, of: \.steps) } }
        let atSeconds = { (run: Run) in equalCPU.flatMap { run.value(reward, at: $0, of: \.cpuSeconds) } }
        rewards[reward] = Reward(
          final: try Values(ordered(finals)), gain: try over { final($0)! - start },
          gainAtEqualSteps: try values(name, atSteps).map { try Values(ordered($0)) },
          gainAtEqualStepsAgainst: try differences(name, atSteps).map(Difference.init))
        if mine.allSatisfy({ cpu($0) > 0 }) {
          perSecond[reward] = try over { (final($0)! - start) / cpu($0) }
        }
        atCPU[reward] = try values(name, atSeconds).map { try Values(ordered($0)) }
        atCPUAgainst[reward] = try differences(name, atSeconds).map(Difference.init)
        if let found = differences(name, final), found.count > 1 {
          let test = try PairedTest(differences: found)
          let spread = try Summary(found).standardDeviation
          comparisons.append(
            (
              Comparison(
                arm: name, reward: reward, difference: test.difference,
                ci95: [test.ci95.low, test.ci95.high], p: test.p,
                pHolm: test.p, detectable: try PairedPower.detectableEffect(pairs: found.count) * spread,
                n: found.count), found.count
            ))
        }
      }
      let guards = mine.compactMap(\.scores.guards)
      reports.append(
        Arm(
          name: name, overrides: arm.arm.overrides,
          seeds: plan.study.seeds.filter { seed in mine.contains { $0.run.seed == seed } },
          images: try over { Double($0.rows.count * arm.configuration.samplesPerIteration) },
          trainedSteps: try over { $0.rows.reduce(0) { $0 + $1.trainedSteps } },
          networkPasses: try over { $0.rows.reduce(0) { $0 + $1.networkPasses } }, rewards: rewards,
          guards: guards.count == mine.count ? .mean(guards.map { ($0, 1) }) : nil,
          collapsed: mine.compactMap { run in
            let broken = base.guards.flatMap { run.scores.guards?.collapsed(against: $0) } ?? []
            return broken.isEmpty ? nil : "seed \(run.run.seed): \(broken.joined(separator: ", "))"
          },
          clock: Clock(
            seconds: try over { $0.rows.reduce(0) { $0 + $1.seconds } }, cpuSeconds: try over(cpu),
            gainPerCPUSecond: perSecond, gainAtEqualCPUSeconds: atCPU,
            gainAtEqualCPUSecondsAgainst: atCPUAgainst)))
    }
    let corrected = holm(comparisons.map(\.0.p))
    self.comparisons = zip(comparisons, corrected).map { row, p in
      Comparison(
        arm: row.0.arm, reward: row.0.reward, difference: row.0.difference, ci95: row.0.ci95, p: row.0.p,
        pHolm: p,
        detectable: row.0.detectable, n: row.0.n)
    }
    arms = reports
    curves = try plan.arms.flatMap { arm in
      try names.compactMap { try Self.curve($0, byArm[arm.arm.name] ?? [], arm) }
    }
    (reference, budget, seeds) = (plan.reference, plan.study.budget.rawValue, plan.study.seeds)
    (runsDone, self.runs, self.equalSteps) = (runs.count, plan.runs.count, equalSteps)
    self.base = Dictionary(
      uniqueKeysWithValues: names.compactMap { name in base.rewards[name].map { (name, $0.mean) } })
    baseGuards = base.guards
    notes = Self.notes(plan, runs, self.comparisons)
  }

  /// Points that all of an arm's runs have; nil where there is none but the start.
  private static func curve(_ reward: String, _ runs: [Run], _ arm: StudyPlan.Arm) throws -> Curve? {
    let tables = runs.map { run in
      Dictionary(
        uniqueKeysWithValues: run.dev.filter { $0.gains[reward] != nil }.map { ($0.iteration, $0) })
    }
    let iterations = (tables.first?.keys.sorted() ?? []).filter { i in tables.allSatisfy { $0[i] != nil } }
    guard iterations.contains(where: { $0 > 0 }) else { return nil }
    let points = iterations.map { i in tables.map { $0[i]! } }
    let summaries = try points.map { try Summary($0.map { $0.gains[reward]! }) }
    let start = runs.reduce(0) { $0 + $1.start[reward]! } / Double(runs.count)
    return Curve(
      arm: arm.arm.name, reward: reward, iterations: iterations,
      images: iterations.map { $0 * arm.configuration.samplesPerIteration },
      trainedSteps: points.map { $0.reduce(0) { $0 + $1.steps } / Double($0.count) },
      mean: summaries.map { start + $0.mean }, low: summaries.compactMap { $0.ci95.map { start + $0.low } },
      high: summaries.compactMap { $0.ci95.map { start + $0.high } })
  }

  private static func notes(_ plan: StudyPlan, _ runs: [Run], _ comparisons: [Comparison]) -> [String] {
    var notes = plan.warnings
    if runs.count < plan.runs.count {
      notes.append("\(runs.count) of \(plan.runs.count) runs are done: intervals and tests are over those")
    }
    if !comparisons.isEmpty, !comparisons.contains(where: { $0.pHolm < 0.05 }) {
      notes.append(
        "no difference is significant: smaller true differences than those under \"detectable\" are more likely missed than "
          + "one time in five; this is no evidence that the arms are equal")
    }
    return notes
  }

  /// The report as JSON, keys sorted and in snake case.
  public func json() throws -> Data { try StudyRun.encode(self) }
}
