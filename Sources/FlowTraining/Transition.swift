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

  /// Steps inside `stochastic` are of `kind`, the others deterministic.
  public init(
    schedule: NoiseSchedule, kind: StepKind, eta: Double, stochastic: Range<Int>, truncatedTimes: Bool = false
  ) throws {
    self.schedule = schedule
    let noisy = try schedule.allSteps(kind: kind, eta: eta)
    let plain = try schedule.allSteps(kind: .ode, eta: 0)
    // The last step, into σ = 0, is sampled like the others and never trained on.
    steps = noisy.indices.map { i in
      stochastic.contains(i) || (i == noisy.count - 1 && stochastic.upperBound == i) ? noisy[i] : plain[i]
    }
    times = schedule.networkTimes(truncated: truncatedTimes)
  }

  /// One coefficient of each row's step, shaped to multiply latents of `rank` dimensions.
  private func column(
    _ rows: [Int], _ rank: Int, _ device: Device, _ value: (SDEStep) -> Double
  ) throws(TorchError) -> Tensor {
    let shape = [rows.count] + [Int](repeating: 1, count: rank - 1)
    return try Tensor(rows.map { Float(value(steps[$0])) }, shape: shape).to(device)
  }

  /// Mean of x_{i+1}: a·x + b·v, row r being at step `rows[r]`.
  ///
  /// - Parameters: x, v [B, ...] float32.
  public func mean(_ x: Tensor, _ v: Tensor, _ rows: [Int]) throws(TorchError) -> Tensor {
    let a = try column(rows, x.rank, x.device, \.stateWeight)
    let b = try column(rows, x.rank, x.device, \.velocityWeight)
    return try x * a + v * b
  }

  /// x_{i+1} = mean + s·ε.
  public func sample(_ mean: Tensor, noise: Tensor, _ rows: [Int]) throws(TorchError) -> Tensor {
    try mean + noise * column(rows, mean.rank, mean.device, \.noiseScale)
  }

  /// Mean over elements of (x_{i+1} − mean)², [B].
  public func meanSquaredResidual(_ next: Tensor, _ mean: Tensor) throws(TorchError) -> Tensor {
    try (next - mean).square().mean(Array(1..<mean.rank))
  }

  /// x̂0 = x − σ·v, the clean latents the network has in mind at step `i`.
  public func cleanEstimate(_ x: Tensor, _ v: Tensor, step i: Int) throws(TorchError) -> Tensor {
    try x - v * Double(schedule.sigmas[i])
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
