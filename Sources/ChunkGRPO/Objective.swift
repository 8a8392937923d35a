import Foundation

/// Over which steps a probability ratio is formed: the configuration's `chunk.ratio`.
public enum RatioKind: String, Codable, CaseIterable, Sendable {
  /// One for each step, whatever the plan.
  case step
  /// One for each chunk: the geometric mean over its steps, the paper's choice.
  case chunk
  /// One for all trained steps of the sample, whatever the plan.
  case sequence
}

/// How a step's log-ratio is formed: the configuration's `loss.ratioNorm`.
public enum RatioNorm: String, Codable, CaseIterable, Sendable {
  /// log p_θ − log p_old.
  case none
  /// GRPO-Guard's RatioNorm, s·(log p_θ − log p_old + mean((μ_θ − μ_old)²)/(2s²)), log p that of the Gaussian for
  /// every kind of step.
  ///
  /// Inserting x' = μ_old + s·ε turns it into mean(ε·(μ_θ − μ_old)), which is how it is evaluated: linear in μ_θ, its
  /// mean over ε is 0 for every θ, where log p_θ − log p_old falls with (μ_θ − μ_old)² and lets the upper end of
  /// the clip range idle; and its spread, |μ_θ − μ_old| over the root of the number of elements, no longer has the
  /// step's 1/s. A ratio is still the exponential of the mean over its steps. At ratio 1 the gradient of a step is s
  /// times that without. Clip ranges do not carry over; published with 2e-6.
  ///
  /// Source: arXiv 2510.22319 (GRPO-Guard), "RatioNorm"; its reweighting by 1/(−Δ) is `chunk.timeWeight: guard`.
  case `guard`
}

/// A ratio r is clipped to 1 − low … 1 + high.
public struct ClipRange: Sendable, Equatable, Codable {
  /// ε⁻.
  public let low: Double
  /// ε⁺.
  public let high: Double

  /// A clip range from its two widths, both 0 or more.
  public init(low: Double, high: Double) { (self.low, self.high) = (low, high) }
}

/// A log-probability that cannot be trained on.
public enum ObjectiveError: Error, CustomStringConvertible, Sendable, Equatable {
  /// The change of a step's log-probability is not finite, or its ratio overflows.
  case notFinite(chunk: Int, step: Int, new: Double, old: Double)

  /// What is wrong, what was expected, and the way out.
  public var description: String {
    switch self {
    case .notFinite(let chunk, let step, let new, let old):
      "step \(step) of trained chunk \(chunk): log-probability \(new) now and \(old) at rollout, expected "
        + "finite numbers with a finite ratio; lower optim.lr, or resume from an earlier checkpoint"
    }
  }
}

/// The log-probabilities of one trained chunk.
public struct TrainedChunk: Sendable, Equatable {
  /// log p_θ of each step.
  public let new: [Double]
  /// log p_old of each step, as many.
  public let old: [Double]
  /// The log-ratio of each step: log p_θ − log p_old, or what ``RatioNorm`` makes of it.
  public let changes: [Double]
  /// W_j.
  public let weight: Double

  /// Log-probabilities of at least one step under both policies, its log-ratios if they are not their difference, and
  /// the chunk's positive weight.
  public init(new: [Double], old: [Double], changes: [Double]? = nil, weight: Double = 1) {
    precondition(!new.isEmpty && new.count == old.count, "a chunk needs both log-probabilities of every step")
    precondition(changes.map { $0.count == new.count } ?? true, "a chunk needs the log-ratio of every step")
    precondition(weight > 0, "a chunk's weight must be positive")
    (self.new, self.old, self.weight) = (new, old, weight)
    self.changes = changes ?? zip(new, old).map { $0 - $1 }
  }
}

/// One sample's share of the clipped objective, to be **maximised**, and its derivatives.
///
/// With ω_j = W_j / (cs_j·ΣW) for every step of trained chunk j (so that Σ ω over the trained steps is 1) the
/// share is the sum over ratios of Ω·min(r·A, clip(r)·A) / S, where Ω is the sum of ω over the ratio's steps
/// and
/// - `chunk`: r_j = exp(mean over the chunk of log p_θ − log p_old), Ω = W_j / ΣW;
/// - `step`: r_i = exp(log p_θ − log p_old), Ω = ω_j;
/// - `sequence`: r = exp(Σ ω·(log p_θ − log p_old)), Ω = 1.
///
/// With a ``RatioNorm`` its log-ratio stands for log p_θ − log p_old.
///
/// In all three ∂/∂log p_θ(i), or by that log-ratio, is A·r·u·ω / S with u = 0 where the clip holds the objective constant: at ratio
/// 1 they are the same numbers. The clip is one-sided: u = 1 if (A > 0 and r ≤ 1 + ε⁺) or (A < 0 and r ≥ 1 −
/// ε⁻).
///
/// Rewards that weigh otherwise in late chunks give a chunk an advantage A_j of its own: it stands for A in the ratios of
/// that chunk, and `sequence` has Σ Ω_j·min(r·A_j, clip(r)·A_j) / S with Ω_j = W_j / ΣW.
public struct SampleObjective: Sendable, Equatable {
  /// ∂value/∂(log-ratio) for each trained chunk and step; without a ``RatioNorm`` that is ∂value/∂log p_θ and a
  /// minimiser's loss −Σ coefficient·log p_θ.
  public let coefficients: [[Double]]
  /// ω/S of each trained chunk: the factor of each of its steps in a per-step penalty, such as the Gaussian
  /// KL.
  public let stepWeights: [Double]
  /// The ratios, one for each step, chunk or sample.
  public let ratios: [Double]
  /// Where the clip stops the gradient, one for each ratio; false where the advantage is 0.
  public let clipped: [Bool]
  /// The share itself.
  public let value: Double

  /// The share of one sample whose chunks all have the advantage A.
  ///
  /// - Throws: ``ObjectiveError/notFinite(chunk:step:new:old:)``.
  public init(
    advantage: Double, chunks: [TrainedChunk], ratio: RatioKind, clip: ClipRange, samples: Int
  ) throws(ObjectiveError) {
    try self.init(
      advantages: chunks.map { _ in advantage }, chunks: chunks, ratio: ratio, clip: clip, samples: samples)
  }

  /// The share of one sample, from its trained chunks and their advantages.
  ///
  /// - Parameters:
  ///   - advantages: A_j, one a chunk.
  ///   - chunks: the sample's trained chunks, at least one.
  ///   - ratio: over what ratios are formed.
  ///   - clip: ε⁻ and ε⁺.
  ///   - samples: S, the samples of the update, those with zero advantage and masked ones included.
  /// - Throws: ``ObjectiveError/notFinite(chunk:step:new:old:)``.
  public init(
    advantages: [Double], chunks: [TrainedChunk], ratio: RatioKind, clip: ClipRange, samples: Int
  ) throws(ObjectiveError) {
    precondition(!chunks.isEmpty && samples > 0, "an objective needs a trained chunk and a sample")
    precondition(advantages.count == chunks.count, "an objective needs an advantage for every chunk")
    let total = chunks.reduce(0) { $0 + $1.weight }
    let omega = chunks.map { $0.weight / (Double($0.new.count) * total) }
    let changes = chunks.map(\.changes)
    for (j, change) in changes.enumerated() {
      if let i = change.firstIndex(where: { !exp($0).isFinite || !$0.isFinite }) {
        throw .notFinite(chunk: j, step: i, new: chunks[j].new[i], old: chunks[j].old[i])
      }
    }
    let perStep: [[Double]]  // the ratio each step belongs to
    switch ratio {
    case .step:
      perStep = changes.map { $0.map { exp($0) } }
      ratios = perStep.flatMap { $0 }
    case .chunk:
      ratios = changes.map { exp($0.reduce(0, +) / Double($0.count)) }
      perStep = zip(ratios, changes).map { r, change in change.map { _ in r } }
    case .sequence:
      let r = exp(zip(omega, changes).reduce(0) { $0 + $1.0 * $1.1.reduce(0, +) })
      ratios = [r]
      perStep = changes.map { $0.map { _ in r } }
    }
    func passes(_ r: Double, _ advantage: Double) -> Bool {
      (advantage > 0 && r <= 1 + clip.high) || (advantage < 0 && r >= 1 - clip.low)
    }
    func clippedShare(_ r: Double, _ advantage: Double) -> Double {
      min(r * advantage, min(max(r, 1 - clip.low), 1 + clip.high) * advantage)
    }
    stepWeights = omega.map { $0 / Double(samples) }
    if ratio == .sequence, Set(advantages).count > 1 {
      // One ratio under several advantages: every step moves it, and with it the shares of all chunks.
      let (r, parts) = (ratios[0], zip(advantages, chunks).map { ($0, $1.weight / total) })
      let slope = parts.reduce(0) { $0 + (passes(r, $1.0) ? $1.0 * $1.1 : 0) }
      coefficients = zip(perStep, omega).map { ratios, omega in
        ratios.map { _ in slope * r * omega / Double(samples) }
      }
      clipped = [parts.contains { $0.0 != 0 } && !parts.contains { passes(r, $0.0) }]
      value = parts.reduce(0) { $0 + clippedShare(r, $1.0) * $1.1 } / Double(samples)
      return
    }
    let terms = zip(zip(perStep, omega), advantages).map { (ratios: $0.0, omega: $0.1, advantage: $1) }
    coefficients = terms.map { ratios, omega, advantage in
      ratios.map { passes($0, advantage) ? advantage * $0 * omega / Double(samples) : 0 }
    }
    clipped =
      switch ratio {
      case .sequence: [advantages[0] != 0 && !passes(ratios[0], advantages[0])]
      case .chunk: terms.map { $0.advantage != 0 && !passes($0.ratios[0], $0.advantage) }
      case .step:
        terms.flatMap { term in term.ratios.map { term.advantage != 0 && !passes($0, term.advantage) } }
      }
    value = terms.reduce(0) { sum, term in
      // a ratio shared by several steps enters with the sum of their ω
      term.ratios.reduce(sum) { $0 + term.omega * clippedShare($1, term.advantage) / Double(samples) }
    }
  }

  /// What the k3 penalty −β·(e^d − 1 − d), d = mean over the chunk of log p_ref − log p_θ, adds to the
  /// objective.
  ///
  /// - Parameters:
  ///   - chunk: the chunk's log-probabilities; `new` is read.
  ///   - reference: log p_ref of each step.
  ///   - beta: β.
  ///   - stepWeight: the chunk's entry in ``stepWeights``.
  /// - Returns: the chunk's share of the objective, and what to add to the coefficient of each of its steps.
  public static func k3(
    chunk: TrainedChunk, reference: [Double], beta: Double, stepWeight: Double
  ) -> (value: Double, coefficient: Double) {
    precondition(reference.count == chunk.new.count, "k3 needs the reference log-probability of every step")
    let size = Double(reference.count)
    let d = zip(reference, chunk.new).reduce(0) { $0 + $1.0 - $1.1 } / size
    return (-beta * (expm1(d) - d) * stepWeight * size, beta * expm1(d) * stepWeight)
  }
}
