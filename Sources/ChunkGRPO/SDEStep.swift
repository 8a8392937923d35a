import Foundation

/// How a transition adds noise.
public enum StepKind: String, Codable, CaseIterable, Sendable {
  /// Flow-GRPO's SDE, g = η·√(σ / (1 − σ)).
  case flowSDE = "flow-sde"
  /// Dance-GRPO's SDE, g = η.
  case danceSDE = "dance-sde"
  /// Coefficient-preserving sampling: the noise replaces part of the predicted noise.
  case cps
  /// No noise: x + Δ·v.
  case ode

  /// The value of η its authors use.
  public var defaultEta: Double {
    switch self {
    case .flowSDE: 0.7
    case .danceSDE: 0.3
    case .cps: 0.8
    case .ode: 0
    }
  }
}

/// Weights of one transition, x' = a·x + b·v + s·ε with ε ~ N(0, I); all four kinds are linear in x and v.
///
/// With Δ = σ' − σ:
/// - `flow-sde` and `dance-sde`: a = 1 + g²Δ/(2σ), b = (1 + g²(1 − σ)/(2σ))·Δ, s = g·√(−Δ). Dance-GRPO writes
///   a score, −(x − (1 − σ)x̂0)/σ² = −(x + (1 − σ)v)/σ as x̂0 = x − σv, which gives the same a and b with g =
///   η.
/// - `cps`: x̂0·(1 − σ') + x̂1·r with r = √(σ'² − s²) = σ'·cos(ηπ/2), x̂1 = x + (1 − σ)v and s =
///   σ'·sin(ηπ/2), so a = 1 − σ' + r and b = r(1 − σ) − σ(1 − σ').
///
/// Sources: yifan123/flow_grpo@ac4c86e flow_grpo/diffusers_patch/sd3_sde_with_logprob.py#L47-L50, arXiv
/// 2505.07818 (Dance-GRPO), arXiv 2509.05952 (CPS). At σ = 1 the variance of `flow-sde` is infinite: as in
/// L47, `secondLevel` then replaces σ in `1 − σ` under the root only.
public struct SDEStep: Sendable, Equatable {
  /// How the noise is added.
  public let kind: StepKind
  /// σ, the level the step leaves.
  public let sigma: Double
  /// σ', the level it reaches.
  public let next: Double
  /// η, the stochasticity.
  public let eta: Double
  /// `a`, the weight of the current latent.
  public let stateWeight: Double
  /// `b`, the weight of the predicted velocity; negative.
  public let velocityWeight: Double
  /// `s`, the standard deviation of the added noise; 0 makes the step deterministic.
  public let noiseScale: Double
  /// `g`, the diffusion coefficient of the SDE; 0 for `cps` and `ode`, which have none.
  public let diffusion: Double

  /// Δ = σ' − σ, negative.
  public var delta: Double { next - sigma }

  /// Whether noise is added; only then is there a log-probability.
  public var isStochastic: Bool { noiseScale > 0 }

  /// |∂μ/∂v| / s: how far the velocity moves the mean, in standard deviations; infinite without noise.
  public var sensitivity: Double { abs(velocityWeight) / noiseScale }

  /// Creates the step from `sigma` to `next`; time runs from noise (1) to image (0).
  ///
  /// - Parameters:
  ///   - kind: how noise is added.
  ///   - sigma: current noise level, in (0, 1].
  ///   - next: following level, in [0, sigma).
  ///   - eta: stochasticity; 0 is the ODE for every kind.
  ///   - secondLevel: the schedule's second level, in [0, 1); read by `flow-sde` at σ = 1 only.
  /// - Throws: ``ScheduleError/levelsOutOfOrder(sigma:next:)``, ``ScheduleError/etaOutOfRange(kind:eta:)`` or
  ///   ``ScheduleError/secondLevelOutOfRange(_:)``.
  public init(
    kind: StepKind, sigma: Double, next: Double, eta: Double, secondLevel: Double
  ) throws(ScheduleError) {
    guard sigma <= 1, sigma > next, next >= 0 else { throw .levelsOutOfOrder(sigma: sigma, next: next) }
    guard eta >= 0, eta.isFinite, kind != .cps || eta <= 1 else {
      throw .etaOutOfRange(kind: kind, eta: eta)
    }
    let delta = next - sigma
    (self.kind, self.sigma, self.next, self.eta) = (kind, sigma, next, eta)
    switch kind {
    case .flowSDE, .danceSDE:
      let level = sigma == 1 ? secondLevel : sigma
      guard kind == .danceSDE || (level >= 0 && level < 1) else { throw .secondLevelOutOfRange(level) }
      diffusion = kind == .danceSDE ? eta : eta * (sigma / (1 - level)).squareRoot()
      let drift = diffusion * diffusion / (2 * sigma)
      stateWeight = 1 + drift * delta
      velocityWeight = (1 + drift * (1 - sigma)) * delta
      noiseScale = diffusion * (-delta).squareRoot()
    case .cps:
      diffusion = 0
      let kept = next * cos(eta * .pi / 2)
      stateWeight = 1 - next + kept
      velocityWeight = kept * (1 - sigma) - sigma * (1 - next)
      noiseScale = next * sin(eta * .pi / 2)
    case .ode:
      (diffusion, stateWeight, velocityWeight, noiseScale) = (0, 1, delta, 0)
    }
  }

  /// The log-probability of a stored next latent, averaged over its elements.
  ///
  /// - Parameter meanSquaredResidual: mean of (x' − μ)² over the latent's elements.
  /// - Returns: −msr/(2s²) − log s − ½·log 2π in nats; for `cps` −msr, as its authors do.
  /// - Precondition: ``isStochastic``; `NoiseSchedule.trainingSteps` has refused the others.
  public func logProbability(meanSquaredResidual: Double) -> Double {
    precondition(isStochastic, "a step without noise has no log-probability")
    if kind == .cps { return -meanSquaredResidual }
    return -meanSquaredResidual / (2 * noiseScale * noiseScale) - log(noiseScale) - 0.5 * log(2 * .pi)
  }

  /// The factor that turns mean((μ_θ − μ_ref)²) into the step's KL to the reference.
  ///
  /// - Parameter exact: 1/(2s²), the KL of the two Gaussians; otherwise 1/(2g²), Flow-GRPO's form without Δ.
  /// - Throws: ``ScheduleError/deterministicStep(kind:eta:sigma:next:)``, or
  ///   ``ScheduleError/noDiffusion(kind:)`` for `cps` without `exact`.
  public func klWeight(exact: Bool) throws(ScheduleError) -> Double {
    guard isStochastic else {
      throw .deterministicStep(kind: kind, eta: eta, sigma: sigma, next: next)
    }
    guard exact || kind != .cps else { throw .noDiffusion(kind: kind) }
    let scale = exact ? noiseScale : diffusion
    return 1 / (2 * scale * scale)
  }
}
