import ChunkGRPO
import Torch

/// The steps of one schedule as tensors: everything between the network's output and a log-probability.
///
/// All of it is float32: a bfloat16 velocity term alone moves log p by eight clip widths. Rollout and replay call
/// the same functions on rows of coefficients, so that equal inputs give equal bits.
public struct TransitionTable {
  /// Levels and network times.
  public let schedule: NoiseSchedule
  /// Coefficients of every step, the last one included.
  public let steps: [SDEStep]
  /// What the network is told at each step, in 0 … 1000.
  public let times: [Float]
  /// The way through all of ``steps``.
  let path: SamplingPath

  /// Steps inside `stochastic` are of `kind`, the others deterministic.
  public init(
    schedule: NoiseSchedule, kind: StepKind, eta: Double, stochastic: Range<Int>, truncatedTimes: Bool = false
  ) throws {
    self.schedule = schedule
    path = try SamplingPath(schedule, kind: kind, eta: eta, stochastic: [stochastic])
    steps = path.moves.map(\.step)
    times = schedule.networkTimes(truncated: truncatedTimes)
  }

  /// Mean of x_{i+1}: a·x + b·v, row r being at step `rows[r]`.
  ///
  /// - Parameters: x, v [B, ...] float32.
  public func mean(_ x: Tensor, _ v: Tensor, _ rows: [Int]) throws(TorchError) -> Tensor {
    try mean(x, v, rows.map { steps[$0] })
  }

  /// The same for a step a row, which need not be among ``steps``.
  func mean(_ x: Tensor, _ v: Tensor, _ steps: [SDEStep]) throws(TorchError) -> Tensor {
    let a = try column(steps.map(\.stateWeight), like: x)
    let b = try column(steps.map(\.velocityWeight), like: x)
    return try x * a + v * b
  }

  /// x_{i+1} = mean + s·ε.
  public func sample(_ mean: Tensor, noise: Tensor, _ rows: [Int]) throws(TorchError) -> Tensor {
    try sample(mean, noise: noise, rows.map { steps[$0] })
  }

  /// The same for a step a row.
  func sample(_ mean: Tensor, noise: Tensor, _ steps: [SDEStep]) throws(TorchError) -> Tensor {
    try mean + noise * column(steps.map(\.noiseScale), like: mean)
  }

  /// Mean over elements of (x_{i+1} − mean)², [B].
  public func meanSquaredResidual(_ next: Tensor, _ mean: Tensor) throws(TorchError) -> Tensor {
    try (next - mean).square().mean(Array(1..<mean.rank))
  }

  /// mean((x_{i+1} − μ_old)·(μ − μ_old)) over elements, [B]: s times the mean of ε·(μ − μ_old), ε being
  /// the noise that was sampled.
  func drift(_ next: Tensor, _ mean: Tensor, from old: Tensor) throws(TorchError) -> Tensor {
    try ((next - old) * (mean - old)).mean(Array(1..<mean.rank))
  }

  /// ``RatioNorm/guard``'s log-ratio of a step from its ``drift(_:_:from:)``, to which it is proportional.
  func normalisedChange(drift: Double, step: Int) -> Double { drift / steps[step].noiseScale }

  /// x̂0 = x − σ·v, the clean latents the network has in mind at the level of `levels[r]` in row r.
  public func cleanEstimate(_ x: Tensor, _ v: Tensor, _ levels: [Int]) throws(TorchError) -> Tensor {
    try x - v * column(levels.map { Double(schedule.sigmas[$0]) }, like: x)
  }

  /// log p of a stored x_{i+1}, mean over elements, in nats.
  public func logProbability(meanSquaredResidual value: Double, step: Int) -> Double {
    steps[step].logProbability(meanSquaredResidual: value)
  }

  /// d(log p)/d(mean squared residual) at step `i`.
  public func logProbabilitySlope(step i: Int) -> Double {
    let step = steps[i]
    return step.kind == .cps ? -1 : -1 / (2 * step.noiseScale * step.noiseScale)
  }
}

/// One float32 factor a row, shaped to multiply `x`.
func column(_ values: [Double], like x: Tensor) throws(TorchError) -> Tensor {
  try Tensor(values.map { Float($0) }, shape: [values.count] + [Int](repeating: 1, count: x.rank - 1))
    .to(x.device)
}
