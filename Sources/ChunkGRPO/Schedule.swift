import Foundation

/// What can be wrong with a schedule or a step of it.
public enum ScheduleError: Error, CustomStringConvertible, Sendable, Equatable {
  /// Noise levels must fall strictly, from at most 1 to 0.
  case levelsOutOfOrder(sigma: Double, next: Double)
  /// A schedule must begin in (0, 1] and end at 0.
  case endsOutOfRange(first: Double, last: Double)
  /// Fewer steps than the use asks for.
  case tooFewSteps(got: Int, atLeast: Int)
  /// The shift of a schedule must be positive and finite.
  case shiftOutOfRange(Double)
  /// The stochasticity must be 0 or more, and at most 1 for `cps`.
  case etaOutOfRange(kind: StepKind, eta: Double)
  /// At σ = 1 a `flow-sde` step needs the schedule's second level, in [0, 1).
  case secondLevelOutOfRange(Double)
  /// A step without noise has no log-probability.
  case deterministicStep(kind: StepKind, eta: Double, sigma: Double, next: Double)
  /// The Gaussian KL without Δ divides by the diffusion coefficient, which this kind does not have.
  case noDiffusion(kind: StepKind)
  /// The model folder's scheduler uses something that is not implemented.
  case unsupportedScheduler(option: String)
  /// A resolution-dependent shift needs a positive number of image tokens.
  case imageTokensOutOfRange(Int)

  /// What is wrong, what was expected, and the way out.
  public var description: String {
    switch self {
    case .levelsOutOfOrder(let sigma, let next):
      "noise levels \(sigma) → \(next): expected 1 ≥ σ > σ' ≥ 0; change sampling.shift or sampling.steps"
    case .endsOutOfRange(let first, let last):
      "noise schedule from \(first) to \(last): expected to begin in (0, 1] and to end at 0; check its levels"
    case .tooFewSteps(let got, let atLeast):
      "sampling.steps: expected at least \(atLeast), got \(got); raise sampling.steps"
    case .shiftOutOfRange(let shift):
      "schedule shift: expected a positive number, got \(shift); "
        + "change sampling.shift or scheduler_config.json"
    case .etaOutOfRange(let kind, let eta):
      "sampling.eta: \(kind.rawValue) expects \(kind == .cps ? "0…1" : "0 or more"), got \(eta); "
        + "its usual value is \(kind.defaultEta)"
    case .secondLevelOutOfRange(let level):
      "second noise level: a flow-sde step at σ = 1 expects it in [0, 1), got \(level); "
        + "check the schedule's levels"
    case .deterministicStep(let kind, let eta, let sigma, let next):
      "step \(sigma) → \(next) of \(kind.rawValue) with eta \(eta) adds no noise and has no log-probability: "
        + "train with sampling.step flow-sde, dance-sde or cps and a positive sampling.eta"
    case .noDiffusion(let kind):
      "loss.klForm: flowGRPO divides by a diffusion coefficient and \(kind.rawValue) has none; use exact"
    case .unsupportedScheduler(let option):
      "scheduler_config.json: \(option) is not supported; use sampling.schedule training, "
        + "or a scheduler without it"
    case .imageTokensOutOfRange(let tokens):
      "image tokens: a resolution-dependent shift expects at least 1, got \(tokens); check height and width"
    }
  }
}

/// The noise levels of one trajectory, σ_0 (noise) > … > σ_T = 0 (image), in float32 as the references store
/// them.
public struct NoiseSchedule: Sendable, Equatable {
  /// T + 1 levels, strictly falling; the last is exactly 0.
  public let sigmas: [Float]

  /// T, the number of transitions.
  public var steps: Int { sigmas.count - 1 }

  /// N = T − 1: the step into σ = 0 is sampled but never trained on.
  public var trainableSteps: Int { steps - 1 }

  /// Takes levels as they are.
  ///
  /// - Throws: ``ScheduleError/tooFewSteps(got:atLeast:)``, ``ScheduleError/endsOutOfRange(first:last:)`` or
  ///   ``ScheduleError/levelsOutOfOrder(sigma:next:)``.
  public init(sigmas: [Float]) throws(ScheduleError) {
    guard sigmas.count > 1 else { throw .tooFewSteps(got: sigmas.count - 1, atLeast: 1) }
    guard sigmas[0] > 0, sigmas[0] <= 1, sigmas[sigmas.count - 1] == 0 else {
      throw .endsOutOfRange(first: Double(sigmas[0]), last: Double(sigmas[sigmas.count - 1]))
    }
    // negated so that NaN is out of order too
    if let i = (1..<sigmas.count).first(where: { !(sigmas[$0 - 1] > sigmas[$0]) }) {
      throw .levelsOutOfOrder(sigma: Double(sigmas[i - 1]), next: Double(sigmas[i]))
    }
    self.sigmas = sigmas
  }

  /// The training schedule: u = linspace(1, 0, T + 1), σ = s·u / (1 + (s − 1)·u), every operation in float32.
  ///
  /// Bit for bit what torch computes: its linspace walks from both ends with a fused multiply-add.
  /// - Throws: ``ScheduleError``, also when `shift` is so far from 1 that float32 levels coincide.
  public static func training(steps: Int, shift: Double) throws(ScheduleError) -> NoiseSchedule {
    guard steps > 0 else { throw .tooFewSteps(got: steps, atLeast: 1) }
    guard shift > 0, shift.isFinite else { throw .shiftOutOfRange(shift) }
    let count = steps + 1
    let stride = Float(-1) / Float(steps)
    let levels = (0..<count).map { i -> Float in
      let u =
        i < count / 2
        ? Float(1).addingProduct(stride, Float(i)) : Float(0).addingProduct(-stride, Float(steps - i))
      return shifted(u, by: shift)
    }
    return try NoiseSchedule(sigmas: levels)
  }

  /// What the network is told for each of the T steps: 1000·σ_i in float32.
  ///
  /// - Parameter truncated: drop the fraction, as GCPO, Dance-GRPO and MixGRPO do.
  public func networkTimes(truncated: Bool) -> [Float] {
    sigmas.dropLast().map { truncated ? (1000 * $0).rounded(.towardZero) : 1000 * $0 }
  }

  /// The transition σ_i → σ_{i+1}.
  ///
  /// - Throws: ``ScheduleError/etaOutOfRange(kind:eta:)``.
  public func step(_ i: Int, kind: StepKind, eta: Double) throws(ScheduleError) -> SDEStep {
    try SDEStep(
      kind: kind, sigma: Double(sigmas[i]), next: Double(sigmas[i + 1]), eta: eta,
      secondLevel: Double(sigmas[1]))
  }

  /// All T transitions, the last one included.
  ///
  /// - Throws: ``ScheduleError/etaOutOfRange(kind:eta:)``.
  public func allSteps(kind: StepKind, eta: Double) throws(ScheduleError) -> [SDEStep] {
    var steps: [SDEStep] = []
    for i in 0..<self.steps { steps.append(try step(i, kind: kind, eta: eta)) }
    return steps
  }

  /// The N = T − 1 transitions that have a log-probability and are trained on.
  ///
  /// - Throws: ``ScheduleError/tooFewSteps(got:atLeast:)`` below T = 2 and
  ///   ``ScheduleError/deterministicStep(kind:eta:sigma:next:)`` when a step adds no noise.
  public func trainingSteps(kind: StepKind, eta: Double) throws(ScheduleError) -> [SDEStep] {
    guard steps > 1 else { throw .tooFewSteps(got: steps, atLeast: 2) }
    let trained = try allSteps(kind: kind, eta: eta).dropLast()
    if let bad = trained.first(where: { !$0.isStochastic }) {
      throw .deterministicStep(kind: kind, eta: eta, sigma: bad.sigma, next: bad.next)
    }
    return Array(trained)
  }
}

/// s·u / (1 + (s − 1)·u) in the precision of `u`, the scalars rounded to it once.
private func shifted<F: BinaryFloatingPoint>(_ u: F, by shift: Double) -> F {
  F(shift) * u / (1 + F(shift - 1) * u)
}

/// numpy's float64 linspace, start + i·step; all uses round to float32, so its exact end needs no care.
private func linspace(_ start: Double, _ end: Double, _ count: Int) -> [Double] {
  (0..<count).map { Double($0) * ((end - start) / Double(max(count - 1, 1))) + start }
}

/// A model folder's `scheduler/scheduler_config.json` (diffusers' FlowMatchEulerDiscreteScheduler).
///
/// Absent fields take that class's defaults; unknown fields are ignored. Source: diffusers 0.42.1,
/// schedulers/scheduling_flow_match_euler_discrete.py, `__init__` and `set_timesteps`.
public struct FlowMatchScheduler: Codable, Sendable, Equatable {
  /// The curve of a resolution-dependent shift.
  public enum TimeShiftType: String, Codable, Sendable {
    /// e^μ / (e^μ + 1/t − 1).
    case exponential
    /// μ / (μ + 1/t − 1).
    case linear
  }

  /// Scale between σ and what the network is told.
  public var numTrainTimesteps = 1000
  /// Static shift, used unless ``useDynamicShifting``.
  public var shift = 1.0
  /// Whether the shift follows the number of image tokens.
  public var useDynamicShifting = false
  /// μ at ``baseImageSeqLen`` tokens.
  public var baseShift = 0.5
  /// μ at ``maxImageSeqLen`` tokens.
  public var maxShift = 1.15
  /// Tokens at which μ is ``baseShift``.
  public var baseImageSeqLen = 256
  /// Tokens at which μ is ``maxShift``.
  public var maxImageSeqLen = 4096
  /// Where the last level before 0 is stretched to; nil leaves it.
  public var shiftTerminal: Double?
  /// The curve of the dynamic shift.
  public var timeShiftType = TimeShiftType.exponential
  /// Options switched on in the file that change the levels or the sampler and that we do not have.
  public private(set) var unsupportedOptions: [String] = []

  private enum CodingKeys: String, CodingKey, CaseIterable {
    case numTrainTimesteps = "num_train_timesteps"
    case shift
    case useDynamicShifting = "use_dynamic_shifting"
    case baseShift = "base_shift"
    case maxShift = "max_shift"
    case baseImageSeqLen = "base_image_seq_len"
    case maxImageSeqLen = "max_image_seq_len"
    case shiftTerminal = "shift_terminal"
    case timeShiftType = "time_shift_type"
    case invertSigmas = "invert_sigmas"
    case useKarrasSigmas = "use_karras_sigmas"
    case useExponentialSigmas = "use_exponential_sigmas"
    case useBetaSigmas = "use_beta_sigmas"
    case stochasticSampling = "stochastic_sampling"

    static let switches = [
      invertSigmas, useKarrasSigmas, useExponentialSigmas, useBetaSigmas, stochasticSampling,
    ]
  }

  /// The class's defaults: no shift.
  public init() {}

  /// Reads the file's fields, each of them optional.
  public init(from decoder: any Decoder) throws {
    let fields = try decoder.container(keyedBy: CodingKeys.self)
    func read<T: Decodable>(_ key: CodingKeys, into value: inout T) throws {
      if let given = try fields.decodeIfPresent(T.self, forKey: key) { value = given }
    }
    try read(.numTrainTimesteps, into: &numTrainTimesteps)
    try read(.shift, into: &shift)
    try read(.useDynamicShifting, into: &useDynamicShifting)
    try read(.baseShift, into: &baseShift)
    try read(.maxShift, into: &maxShift)
    try read(.baseImageSeqLen, into: &baseImageSeqLen)
    try read(.maxImageSeqLen, into: &maxImageSeqLen)
    try read(.timeShiftType, into: &timeShiftType)
    shiftTerminal = try fields.decodeIfPresent(Double.self, forKey: .shiftTerminal)
    unsupportedOptions = try CodingKeys.switches
      .filter { try fields.decodeIfPresent(Bool.self, forKey: $0) == true }.map(\.rawValue)
  }

  /// Writes every field under its published name.
  public func encode(to encoder: any Encoder) throws {
    var fields = encoder.container(keyedBy: CodingKeys.self)
    try fields.encode(numTrainTimesteps, forKey: .numTrainTimesteps)
    try fields.encode(shift, forKey: .shift)
    try fields.encode(useDynamicShifting, forKey: .useDynamicShifting)
    try fields.encode(baseShift, forKey: .baseShift)
    try fields.encode(maxShift, forKey: .maxShift)
    try fields.encode(baseImageSeqLen, forKey: .baseImageSeqLen)
    try fields.encode(maxImageSeqLen, forKey: .maxImageSeqLen)
    try fields.encode(shiftTerminal, forKey: .shiftTerminal)
    try fields.encode(timeShiftType, forKey: .timeShiftType)
    for key in CodingKeys.switches {
      try fields.encode(unsupportedOptions.contains(key.rawValue), forKey: key)
    }
  }

  /// μ of the dynamic shift: the line through (baseImageSeqLen, baseShift) and (maxImageSeqLen, maxShift).
  public func dynamicShift(imageTokens: Int) -> Double {
    let slope = (maxShift - baseShift) / Double(maxImageSeqLen - baseImageSeqLen)
    return Double(imageTokens) * slope + (baseShift - slope * Double(baseImageSeqLen))
  }

  /// The levels a FLUX pipeline samples with: linspace(1, 1/N, N), shifted once, stretched if asked, then 0.
  ///
  /// - Parameters:
  ///   - steps: N.
  ///   - imageTokens: packed image tokens, (height / 16)·(width / 16); read by the dynamic shift only.
  /// - Throws: ``ScheduleError``.
  public func fluxSchedule(steps: Int, imageTokens: Int) throws(ScheduleError) -> NoiseSchedule {
    try check(steps: steps)
    var levels = linspace(1, 1 / Double(steps), steps).map { Float($0) }  // the pipeline hands over float32
    if useDynamicShifting {
      guard imageTokens > 0 else { throw .imageTokensOutOfRange(imageTokens) }
      let mu = dynamicShift(imageTokens: imageTokens)
      let weight = Float(timeShiftType == .exponential ? exp(mu) : mu)
      levels = levels.map { weight / (weight + (1 / $0 - 1)) }
    } else {
      levels = levels.map { shifted($0, by: shift) }
    }
    return try NoiseSchedule(sigmas: stretched(levels) + [0])
  }

  /// The levels an SD3 pipeline samples with, shifted **twice**: linspace(1, shift(1/1000), N), shifted
  /// again, then 0.
  ///
  /// - Throws: ``ScheduleError``; a dynamic shift needs levels from the pipeline and is refused.
  public func sd3Schedule(steps: Int) throws(ScheduleError) -> NoiseSchedule {
    try check(steps: steps)
    guard !useDynamicShifting else { throw .unsupportedScheduler(option: "use_dynamic_shifting") }
    // the constructor shifts float32 levels, set_timesteps continues from them in float64, in units of
    // timesteps
    let scale = Double(numTrainTimesteps)
    let last = shifted(Float(1) / Float(numTrainTimesteps), by: shift)
    let first = shifted(Float(1), by: shift)
    let levels = linspace(Double(first) * scale, Double(last) * scale, steps)
      .map { shifted($0 / scale, by: shift) }
    return try NoiseSchedule(sigmas: stretched(levels).map { Float($0) } + [0])
  }

  private func check(steps: Int) throws(ScheduleError) {
    if let option = unsupportedOptions.first { throw .unsupportedScheduler(option: option) }
    guard steps > 0 else { throw .tooFewSteps(got: steps, atLeast: 1) }
    guard shift > 0, shift.isFinite else { throw .shiftOutOfRange(shift) }
  }

  /// Rescales 1 − σ so that the last level lands on ``shiftTerminal``.
  private func stretched<F: BinaryFloatingPoint>(_ levels: [F]) -> [F] {
    guard let terminal = shiftTerminal, terminal != 0, let last = levels.last, last < 1 else { return levels }
    let factor = (1 - last) / F(1 - terminal)
    return levels.map { 1 - (1 - $0) / factor }
  }
}
