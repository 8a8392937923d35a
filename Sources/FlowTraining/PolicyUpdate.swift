import ChunkGRPO
import FlowModels
import Torch
import TorchNN

/// One sample's part in an update.
public struct UpdateSample: Sendable {
  /// Row in the trajectories.
  public let row: Int
  /// A_j of each drawn chunk: one number where rewards weigh alike in all of them.
  public let advantages: [Double]
  /// The drawn chunks: the steps trained on and weight W_j.
  public let chunks: [(steps: [Int], weight: Double)]
  /// Creates a sample's part from whole chunks.
  public init(row: Int, advantage: Double, chunks: [(steps: Range<Int>, weight: Double)]) {
    self.init(row: row, advantage: advantage, steps: chunks.map { (Array($0.steps), $0.weight) })
  }
  /// Creates a sample's part from some steps of each drawn chunk.
  public init(row: Int, advantage: Double, steps chunks: [(steps: [Int], weight: Double)]) {
    self.init(row: row, advantages: chunks.map { _ in advantage }, steps: chunks)
  }
  /// Creates a sample's part from some steps of each drawn chunk and that chunk's own advantage.
  public init(row: Int, advantages: [Double], steps chunks: [(steps: [Int], weight: Double)]) {
    (self.row, self.advantages, self.chunks) = (row, advantages, chunks)
  }
  /// Whether it moves the policy at all.
  var counts: Bool { advantages.contains { $0 != 0 } }
  var stepCount: Int { chunks.reduce(0) { $0 + $1.steps.count } }
}

/// What an update measured.
public struct UpdateReport: Sendable {
  /// All ratios, sample by sample.
  public var ratios: [Double] = []
  /// How many of them the clip held.
  public var clipped = 0
  /// Σ of the samples' shares of the objective.
  public var objective = 0.0
  /// Largest |replayed − rollout log p| seen, and where.
  public var replayGap = 0.0
  /// Row and step of ``replayGap``.
  public var replayGapAt: (row: Int, step: Int)?
  /// Divergence from the reference, weighted over steps as the objective is; without β.
  public var divergence = 0.0

  fileprivate mutating func see(gap: Double, at place: (row: Int, step: Int)) {
    if gap > replayGap || gap.isNaN { (replayGap, replayGapAt) = (gap, place) }
  }

  /// Takes in the report of other samples of the same update.
  fileprivate mutating func add(_ other: UpdateReport) {
    ratios += other.ratios
    clipped += other.clipped
    objective += other.objective
    divergence += other.divergence
    if let place = other.replayGapAt { see(gap: other.replayGap, at: place) }
  }
}

/// −β·(divergence from the reference policy), added to every sample's share of the objective.
///
/// A step's divergence counts with its ω, see ``SampleObjective``: a chunk's is the mean over its steps.
public struct ReferencePenalty {
  /// How a divergence is formed.
  public enum Form: String, Sendable {
    /// mean((μ − μ_ref)²)/(2g²), Flow-GRPO's: without the step size.
    case flowGRPO
    /// mean((μ − μ_ref)²)/(2s²): the Gaussians' own, for an element.
    case exact
    /// e^d − 1 − d with d the chunk's mean of log p_ref − log p_θ.
    case k3
  }
  /// β.
  public let beta: Double
  /// The form.
  public let form: Form
  /// Runs its argument with the reference policy in the network's place.
  public let reference: (() throws -> Tensor) throws -> Tensor

  /// Creates a penalty.
  public init(beta: Double, form: Form, reference: @escaping (() throws -> Tensor) throws -> Tensor) {
    (self.beta, self.form, self.reference) = (beta, form, reference)
  }
}

/// Recomputes log-probabilities of stored transitions and back-propagates the clipped objective.
///
/// The objective touches θ only through Σ log-ratio(step), so its gradient is Σ c·∇log-ratio with coefficients known once
/// the ratios are. In the first update after a rollout they are 1. Later, samples whose trained steps fit one micro-batch
/// are done in one pass; otherwise the ratios of all come first, without gradients, and the steps follow in micro-batches
/// of any size: memory does not depend on chunks.
public struct PolicyUpdate {
  /// The network.
  public let network: TimedNetwork
  /// The steps.
  public let table: TransitionTable
  /// Guidance scale for networks that embed one.
  public let guidance: Double?
  /// Rows of every forward and backward pass: as many as the rollout's passes had.
  public let microBatch: Int
  /// Over what ratios are formed.
  public let ratio: RatioKind
  /// ε⁻ and ε⁺.
  public let clip: ClipRange
  /// How a step's log-ratio is formed; `guard` needs the anchor's means.
  public var ratioNorm = RatioNorm.none
  /// Divergence from a reference; every sample then costs passes, with advantage or without.
  public var penalty: ReferencePenalty?
  /// Called before every pass; throws to stop.
  public var beforeStep: () throws -> Void = {}

  /// Creates an update rule.
  public init(
    network: TimedNetwork, table: TransitionTable, guidance: Double?, microBatch: Int, ratio: RatioKind,
    clip: ClipRange
  ) {
    self.network = network
    self.table = table
    self.guidance = guidance
    self.microBatch = microBatch
    self.ratio = ratio
    self.clip = clip
  }

  private struct Entry { let row, step: Int }

  /// Adds −∇(objective) of `samples` to the gradients of the trainable parameters.
  ///
  /// - Parameters:
  ///   - samples: all samples of the update: those with advantage 0 count in S and, without a penalty, cost nothing.
  ///   - trajectories: where their states and old log-probabilities are.
  ///   - conditions: one a row.
  ///   - first: whether θ is still the policy that sampled, so that replayed log-probabilities must be equal.
  public func accumulate(
    _ samples: [UpdateSample], _ trajectories: Trajectories, conditions: [Condition], first: Bool
  ) throws -> UpdateReport {
    var report = UpdateReport()
    let active = active(samples)
    // θ has not moved: every ratio is 1 before any pass, and the replay gap tells if a pass says otherwise.
    let known = first && penalty == nil
    let alone = !known && active.allSatisfy { $0.stepCount <= microBatch }
    for group in alone ? packed(active) : [active] {
      let entries = entries(group)
      let passes = passes(entries.count)
      func shares(_ rows: [[Double]]?) throws -> Shares {
        try self.shares(group, rows, trajectories, of: samples.count, measuresGap: first)
      }
      // Coefficients need every ratio: known, from passes ahead, or from the group's only pass.
      var ahead = known ? try shares(nil) : nil
      if ahead == nil, passes.count > 1 {
        ahead = try shares(
          passes.flatMap { range in
            try withoutGrad { try columns(Array(entries[range]), trajectories, conditions).rows() }
          })
      }
      var replayed: [[Double]] = []
      for range in passes {
        let columns = try columns(Array(entries[range]), trajectories, conditions)
        replayed += try columns.rows()
        let slopes = try (ahead ?? shares(replayed)).slopes[range]
        let gradient = try Tensor(slopes.flatMap { $0.map { Float($0) } }, shape: columns.shape)
        try network.backward(columns, gradient.to(columns.device))
      }
      report.add(try shares(replayed).report)
    }
    return report
  }

  /// The same trajectories with what the network says now as the policy that ratios are taken against.
  ///
  /// Replays the trained steps of the samples that ``accumulate(_:_:conditions:first:)`` replays, without gradients and
  /// in passes of as many rows; others keep their anchor. Done before the first update, ratios start at 1 also where
  /// a rollout's passes round otherwise; where they do not, not a bit changes.
  public func anchored(
    _ samples: [UpdateSample], _ trajectories: Trajectories, conditions: [Condition]
  ) throws -> Trajectories {
    var result = trajectories
    if ratioNorm == .guard { result.anchor.means = try Tensor.zeros(like: trajectories.states) }
    let all = entries(active(samples))
    for range in passes(all.count) {
      let entries = Array(all[range])
      try withoutGrad {
        let replay = try replay(entries, trajectories, conditions)
        let residuals = try table.meanSquaredResidual(replay.next, replay.mean).doubles()
        for (i, entry) in entries.enumerated() {
          result.anchor.logProbabilities[entry.row][entry.step] = table.logProbability(
            meanSquaredResidual: residuals[i], step: entry.step)
          try result.anchor.means?[entry.step][entry.row].copy(from: try replay.mean[i])
        }
      }
    }
    return result
  }

  /// log p_θ of the stored transitions of `row` at `steps`, without gradients.
  public func logProbabilities(
    row: Int, steps: [Int], _ trajectories: Trajectories, conditions: [Condition]
  ) throws -> [Double] {
    let residuals = try withoutGrad {
      let replay = try replay(steps.map { Entry(row: row, step: $0) }, trajectories, conditions)
      return try table.meanSquaredResidual(replay.next, replay.mean).doubles()
    }
    return zip(steps, residuals).map { table.logProbability(meanSquaredResidual: $1, step: $0) }
  }

  /// The samples that cost passes.
  private func active(_ samples: [UpdateSample]) -> [UpdateSample] {
    samples.filter { $0.counts || penalty != nil }
  }

  private func entries(_ samples: [UpdateSample]) -> [Entry] {
    samples.flatMap { sample in sample.chunks.flatMap { $0.steps.map { Entry(row: sample.row, step: $0) } } }
  }

  /// Ranges of entries, one a pass. All passes are filled up to as many rows as the rollout's had: none may have more.
  private func passes(_ count: Int) -> [Range<Int>] {
    let (even, rows) = (Batches(count, of: microBatch), max(microBatch, fewestRows))
    guard even.largest > rows else { return Array(even) }
    return stride(from: 0, to: count, by: rows).map { $0..<min($0 + rows, count) }
  }

  /// Whole samples packed into micro-batches: the long ones first, each where there is room.
  private func packed(_ samples: [UpdateSample]) -> [[UpdateSample]] {
    var groups: [(samples: [UpdateSample], room: Int)] = []
    let order = samples.indices.sorted { (samples[$1].stepCount, $0) < (samples[$0].stepCount, $1) }
    for sample in order.map({ samples[$0] }) {
      let place =
        groups.firstIndex { $0.room >= sample.stepCount }
        ?? {
          groups.append(([], microBatch))
          return groups.count - 1
        }()
      groups[place].samples.append(sample)
      groups[place].room -= sample.stepCount
    }
    return groups.map(\.samples)
  }

  /// One pass over stored transitions: the states they reached and the means the network gives them now; with a
  /// `penalty` also its reference's means, without gradient. All [rows, ...], of which there may be more than entries.
  private func replay(
    _ entries: [Entry], _ trajectories: Trajectories, _ conditions: [Condition],
    penalty: ReferencePenalty? = nil
  ) throws -> (rows: [Entry], next: Tensor, mean: Tensor, reference: Tensor?) {
    try beforeStep()
    let rows = filled(entries, to: max(microBatch, fewestRows))
    let (x, next) = (try gather(trajectories.states, rows), try gather(trajectories.states, rows, ahead: 1))
    let times = try Tensor(rows.map { table.times[$0.step] }).to(x.device)
    let condition = try Condition.stack(rows.map { conditions[$0.row] })
    func mean() throws -> Tensor {
      let v = try network.velocity(x, times: times, condition: condition, guidance: guidance)
      return try table.mean(x, v, rows.map(\.step))
    }
    // The reference first: where it takes the place of the weights, they are back before a graph holds them.
    let reference = try penalty?.reference { try withoutGrad { try mean() } }
    return (rows, next, try mean(), reference)
  }

  /// Rows of [steps, S, ...] at each entry, or so many steps ahead of it.
  private func gather(_ values: Tensor, _ rows: [Entry], ahead: Int = 0) throws -> Tensor {
    let (shape, samples) = (values.shape, values.size(1))
    let index = rows.map { Int64(($0.step + ahead) * samples + $0.row) }
    return try values.reshape([shape[0] * shape[1]] + shape[2...])
      .indexSelect(0, try Tensor(index).to(values.device))
  }

  /// What the objective reads of each transition, [entries, 1 to 3]: the mean squared residual; to normalise ratios,
  /// what ``TransitionTable/normalisedChange(drift:step:)`` takes; with a penalty mean((μ − μ_ref)²), or for k3 the
  /// reference's residual.
  private func columns(
    _ entries: [Entry], _ trajectories: Trajectories, _ conditions: [Condition]
  ) throws -> Tensor {
    let (rows, next, mean, reference) = try replay(entries, trajectories, conditions, penalty: penalty)
    var columns = [try table.meanSquaredResidual(next, mean)]
    if ratioNorm == .guard {
      guard let means = trajectories.anchor.means else {
        throw RunError(
          "loss.ratioNorm: guard needs the means of the sampled steps, these trajectories have none")
      }
      columns.append(try table.drift(next, mean, from: try gather(means, rows)))
    }
    if let penalty, let reference {
      columns.append(try table.meanSquaredResidual(penalty.form == .k3 ? next : mean, reference))
    }
    return try Tensor.stack(columns, 1).narrow(0, 0, entries.count)
  }

  /// What samples contribute, and the derivatives of −objective by each of their entries' columns.
  private struct Shares {
    var report = UpdateReport()
    var slopes: [[Double]] = []
  }

  /// - Parameter replayed: rows of ``columns(_:_:_:)``; nil where every ratio is 1.
  private func shares(
    _ samples: [UpdateSample], _ replayed: [[Double]]?, _ trajectories: Trajectories, of total: Int,
    measuresGap: Bool
  ) throws -> Shares {
    var result = Shares()
    var next = 0
    for sample in samples {
      let rows = sample.chunks.map { chunk in
        defer { next += chunk.steps.count }
        return replayed.map { Array($0[next..<(next + chunk.steps.count)]) }
      }
      let chunks = zip(sample.chunks, rows).map { chunk, rows in
        let old = chunk.steps.map { trajectories.anchor.logProbabilities[sample.row][$0] }
        guard let rows else { return TrainedChunk(new: old, old: old, weight: chunk.weight) }
        let each = Array(zip(chunk.steps, rows))
        return TrainedChunk(
          new: each.map { table.logProbability(meanSquaredResidual: $1[0], step: $0) }, old: old,
          changes: ratioNorm == .guard ? each.map { table.normalisedChange(drift: $1[1], step: $0) } : nil,
          weight: chunk.weight)
      }
      let share = try SampleObjective(
        advantages: sample.advantages, chunks: chunks, ratio: ratio, clip: clip, samples: total)
      result.report.ratios += share.ratios
      result.report.clipped += share.clipped.filter { $0 }.count
      result.report.objective += share.value
      for (j, chunk) in chunks.enumerated() {
        let steps = sample.chunks[j].steps
        if measuresGap {
          let sampled = trajectories.logProbabilities[sample.row]
          for (i, step) in steps.enumerated() {
            result.report.see(gap: abs(chunk.new[i] - sampled[step]), at: (sample.row, step))
          }
        }
        let penalised = try penalise(
          chunk, steps, beside: rows[j]?.compactMap(\.last), omega: share.stepWeights[j], &result.report)
        for (i, step) in steps.enumerated() {
          let (ratio, slope) = (share.coefficients[j][i], table.logProbabilitySlope(step: step))
          switch ratioNorm {
          case .none: result.slopes.append([-(ratio + penalised.logProbability) * slope])
          case .guard:
            result.slopes.append(
              [-penalised.logProbability * slope, -ratio * table.normalisedChange(drift: 1, step: step)])
          }
          if penalty != nil { result.slopes[result.slopes.count - 1].append(penalised.beside[i]) }
        }
      }
    }
    return result
  }

  /// A chunk's share of the penalty: what it adds to the coefficient of each log p and, for each step, the slope by the
  /// column of the reference.
  private func penalise(
    _ chunk: TrainedChunk, _ steps: [Int], beside: [Double]?, omega: Double, _ report: inout UpdateReport
  ) throws -> (logProbability: Double, beside: [Double]) {
    let none = steps.map { _ in 0.0 }
    guard let penalty, let beside else { return (0, none) }
    switch penalty.form {
    case .k3:
      let reference = zip(steps, beside).map { table.logProbability(meanSquaredResidual: $1, step: $0) }
      let k3 = SampleObjective.k3(chunk: chunk, reference: reference, beta: penalty.beta, stepWeight: omega)
      report.objective += k3.value
      report.divergence -= k3.value / penalty.beta
      return (k3.coefficient, none)
    case .flowGRPO, .exact:
      let slopes = try steps.map {
        try penalty.beta * omega * table.steps[$0].klWeight(exact: penalty.form == .exact)
      }
      let value = zip(slopes, beside).reduce(0) { $0 + $1.0 * $1.1 }
      report.objective -= value
      report.divergence += value / penalty.beta
      return (0, slopes)
    }
  }
}

extension Tensor {
  /// The rows of a matrix.
  fileprivate func rows() throws(TorchError) -> [[Double]] {
    let (values, width) = (try doubles(), size(1))
    return stride(from: 0, to: values.count, by: width).map { Array(values[$0..<($0 + width)]) }
  }
}
