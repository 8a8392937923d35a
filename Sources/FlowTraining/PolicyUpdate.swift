import ChunkGRPO
import FlowModels
import Torch
import TorchNN

/// One sample's part in an update.
public struct UpdateSample: Sendable {
  /// Row in the trajectories.
  public let row: Int
  /// A.
  public let advantage: Double
  /// The drawn chunks: the steps trained on and weight W_j.
  public let chunks: [(steps: [Int], weight: Double)]
  /// Creates a sample's part from whole chunks.
  public init(row: Int, advantage: Double, chunks: [(steps: Range<Int>, weight: Double)]) {
    self.init(row: row, advantage: advantage, steps: chunks.map { (Array($0.steps), $0.weight) })
  }
  /// Creates a sample's part from some steps of each drawn chunk.
  public init(row: Int, advantage: Double, steps chunks: [(steps: [Int], weight: Double)]) {
    self.row = row
    self.advantage = advantage
    self.chunks = chunks
  }
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
/// The objective touches θ only through Σ log p_θ(step), so its gradient is Σ c·∇log p with coefficients known once
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
    let active = samples.filter { $0.advantage != 0 || penalty != nil }
    func entries(_ group: [UpdateSample]) -> [Entry] {
      group.flatMap { sample in sample.chunks.flatMap { $0.steps.map { Entry(row: sample.row, step: $0) } } }
    }
    if first, penalty == nil {
      // θ has not moved: every ratio is 1 before any pass, and the replay gap tells if a pass says otherwise.
      let all = entries(active)
      let weights = try weights(active, nil, trajectories, samples.count, first, &report)
      report = UpdateReport()
      var values: [[Double]] = []
      for range in passes(all.count) {
        let residuals = try self.residuals(Array(all[range]), trajectories, conditions)
        values += try residuals.rows()
        try network.backward(residuals, try gradient(weights[range], like: residuals))
      }
      _ = try self.weights(active, values, trajectories, samples.count, first, &report)
      return report
    }
    if active.allSatisfy({ $0.stepCount <= microBatch }) {
      for group in packed(active) {
        let residuals = try self.residuals(entries(group), trajectories, conditions)
        let weights = try weights(group, try residuals.rows(), trajectories, samples.count, first, &report)
        try network.backward(residuals, try gradient(weights[...], like: residuals))
      }
      return report
    }
    let all = entries(active)
    var values: [[Double]] = []
    for range in passes(all.count) {
      values += try withoutGrad { try residuals(Array(all[range]), trajectories, conditions).rows() }
    }
    let weights = try weights(active, values, trajectories, samples.count, first, &report)
    for range in passes(all.count) {
      let residuals = try self.residuals(Array(all[range]), trajectories, conditions)
      try network.backward(residuals, try gradient(weights[range], like: residuals))
    }
    return report
  }

  /// log p_θ of the stored transitions of `row` at `steps`, without gradients.
  public func logProbabilities(
    row: Int, steps: [Int], _ trajectories: Trajectories, conditions: [Condition]
  ) throws -> [Double] {
    let values = try withoutGrad {
      try residuals(steps.map { Entry(row: row, step: $0) }, trajectories, conditions).rows()
    }
    return zip(steps, values).map { table.logProbability(meanSquaredResidual: $1[0], step: $0) }
  }

  /// Ranges of entries, one a pass. All passes are filled up to as many rows as the rollout's had: none may have more.
  private func passes(_ count: Int) -> [Range<Int>] {
    let (even, rows) = (Batches(count, of: microBatch), max(microBatch, 2))
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

  /// Mean squared residuals [entries, 1 or 2] of stored transitions under the network as it is now; with a penalty beside
  /// them mean((μ − μ_ref)²), or for k3 the reference's residuals, which have no gradient.
  private func residuals(
    _ entries: [Entry], _ trajectories: Trajectories, _ conditions: [Condition]
  ) throws -> Tensor {
    try beforeStep()
    // Never one: a single row rounds differently from several.
    let rows = filled(entries, to: max(microBatch, 2))
    let samples = trajectories.states.size(1)
    let shape = trajectories.states.shape
    let flat = try trajectories.states.reshape([shape[0] * shape[1]] + shape[2...])
    func states(_ ahead: Int) throws -> Tensor {
      let index = rows.map { Int64(($0.step + ahead) * samples + $0.row) }
      return try flat.indexSelect(0, try Tensor(index).to(flat.device))
    }
    let x = try states(0)
    let times = try Tensor(rows.map { table.times[$0.step] }).to(x.device)
    let condition = try Condition.stack(rows.map { conditions[$0.row] })
    func mean() throws -> Tensor {
      let v = try network.velocity(x, times: times, condition: condition, guidance: guidance)
      return try table.mean(x, v, rows.map(\.step))
    }
    let (next, now) = (try states(1), try mean())
    var columns = [try table.meanSquaredResidual(next, now)]
    if let penalty {
      let reference = try penalty.reference { try withoutGrad { try mean() } }
      columns.append(try table.meanSquaredResidual(penalty.form == .k3 ? next : now, reference))
    }
    return try Tensor.stack(columns, 1).narrow(0, 0, entries.count)
  }

  /// Coefficients of −objective with respect to each entry's values; without values, as if log p were the rollout's.
  private func weights(
    _ samples: [UpdateSample], _ values: [[Double]]?, _ trajectories: Trajectories, _ total: Int,
    _ first: Bool, _ report: inout UpdateReport
  ) throws -> [[Double]] {
    var next = 0
    var result: [[Double]] = []
    for sample in samples {
      var beside: [[Double]] = []
      let chunks = sample.chunks.map { chunk in
        let old = chunk.steps.map { trajectories.logProbabilities[sample.row][$0] }
        guard let values else { return TrainedChunk(new: old, old: old, weight: chunk.weight) }
        let mine = values[next..<(next + chunk.steps.count)]
        next += chunk.steps.count
        if penalty != nil { beside.append(mine.map { $0[1] }) }
        let new = zip(chunk.steps, mine).map {
          table.logProbability(meanSquaredResidual: $1[0], step: $0)
        }
        return TrainedChunk(new: new, old: old, weight: chunk.weight)
      }
      if first {
        for (chunk, steps) in zip(chunks, sample.chunks.map(\.steps)) {
          for (i, step) in steps.enumerated() {
            let gap = abs(chunk.new[i] - chunk.old[i])
            if gap > report.replayGap || gap.isNaN {
              report.replayGap = gap
              report.replayGapAt = (sample.row, step)
            }
          }
        }
      }
      let share = try SampleObjective(
        advantage: sample.advantage, chunks: chunks, ratio: ratio, clip: clip, samples: total)
      report.ratios += share.ratios
      report.clipped += share.clipped.filter { $0 }.count
      report.objective += share.value
      for (j, chunk) in chunks.enumerated() {
        let (steps, omega) = (sample.chunks[j].steps, share.stepWeights[j])
        var coefficients = share.coefficients[j]
        var divergences: [Double] = []
        switch penalty?.form {
        case nil: break
        case .k3:
          let reference = zip(steps, beside[j]).map {
            table.logProbability(meanSquaredResidual: $1, step: $0)
          }
          let k3 = SampleObjective.k3(
            chunk: chunk, reference: reference, beta: penalty!.beta, stepWeight: omega)
          coefficients = coefficients.map { $0 + k3.coefficient }
          divergences = steps.map { _ in 0 }
          report.objective += k3.value
          report.divergence -= k3.value / penalty!.beta
        case .flowGRPO, .exact:
          divergences = try steps.map {
            try penalty!.beta * omega * table.steps[$0].klWeight(exact: penalty!.form == .exact)
          }
          let value = zip(divergences, beside[j]).reduce(0) { $0 + $1.0 * $1.1 }
          report.objective -= value
          report.divergence += value / penalty!.beta
        }
        for (i, step) in steps.enumerated() {
          let slope = -coefficients[i] * table.logProbabilitySlope(step: step)
          result.append(penalty == nil ? [slope] : [slope, divergences[i]])
        }
      }
    }
    return result
  }

  private func gradient(_ weights: ArraySlice<[Double]>, like residuals: Tensor) throws(TorchError) -> Tensor
  {
    try Tensor(weights.flatMap { $0.map { Float($0) } }, shape: residuals.shape).to(residuals.device)
  }
}

extension Tensor {
  /// The rows of a matrix.
  fileprivate func rows() throws(TorchError) -> [[Double]] {
    let (values, width) = (try doubles(), size(1))
    return stride(from: 0, to: values.count, by: width).map { Array(values[$0..<($0 + width)]) }
  }
}
