import ChunkGRPO
import FlowModels
import FlowTraining
import Foundation
import Torch
import TorchNN

// A flow model that draws points of the plane instead of images: what it takes to use the library for a model of one's own.
// Anything that predicts a velocity is a FlowModel; sampling, chunks, ratios and updates are the same as for images.

/// A velocity in the plane: a perceptron of x and of waves in σ.
final class VelocityField: FlowModel {
  let modules = ModuleRegistry()
  private let layers: [Linear]

  init(width: Int, random: RandomPlan) throws {
    let root = Checkpoint(blank: URL(filePath: "density")).root
    let sizes = [10, width, width, 2]
    layers = try (0..<3).map { [modules] i in
      try Linear(sizes[i], sizes[i + 1], root / "layers" / i, modules)
    }
    try modules.makeTrainable()
    try WeightInitialisation.convolutional.fill(modules, part: "density", random: random)
  }

  /// x [B, 2] → v [B, 2]; there is nothing to be conditioned on or guided by.
  func velocity(_ x: Tensor, times: Tensor, condition: Condition, guidance: Double?) throws -> Tensor {
    let angles = try (times.reshape(-1, 1) / 1000) * Tensor([Float](arrayLiteral: 1, 2, 4, 8)) * .pi
    let inputs = try Tensor.cat([x, try angles.cos(), try angles.sin()], 1)
    return try layers[2](layers[1](layers[0](inputs).silu()).silu())
  }
}

/// Eight narrow Gaussians on a circle; a model of them; and a reward to tune it by.
struct Density {
  static let radius = 2.0
  static let deviation = 0.25
  /// Centres, by angle.
  static let modes = (0..<8).map { k -> SIMD2<Double> in
    let angle = Double(k) * .pi / 4
    return [radius * cos(angle), radius * sin(angle)]
  }

  let random: RandomPlan
  let field: VelocityField

  init(seed: UInt64) throws {
    random = RandomPlan(seed: seed)
    field = try VelocityField(width: 64, random: random)
  }

  /// Highest on the rightmost Gaussian, and still felt from its neighbours.
  static func reward(_ point: SIMD2<Double>) -> Double {
    let offset = point - modes[0]
    return exp(-(offset * offset).sum() / (2 * reach * reach))
  }
  static let reach = 1.5

  /// Mean of `reward` to the power `n` over the density itself: a product of Gaussians is one.
  static func moment(_ n: Double) -> Double {
    let (narrow, wide) = (reach * reach / n, reach * reach / n + deviation * deviation)
    return modes.reduce(0) { sum, mode in
      let offset = mode - modes[0]
      return sum + narrow / wide * exp(-(offset * offset).sum() / (2 * wide)) / Double(modes.count)
    }
  }

  /// What is watched while the reward rises: a spoiled model draws between the Gaussians, or only one of them.
  struct Guards {
    let reward: Double
    /// Mean distance to the nearest centre.
    let distance: Double
    /// How many of the eight get at least a hundredth of the points.
    let modes: Int

    init(_ points: [SIMD2<Double>]) {
      let nearest = points.map { point in
        Density.modes.map { (($0 - point) * ($0 - point)).sum().squareRoot() }.enumerated()
          .min { $0.element < $1.element }!
      }
      let count = Double(points.count)
      reward = points.map(Density.reward).reduce(0, +) / count
      distance = nearest.map(\.element).reduce(0, +) / count
      let counts = Dictionary(grouping: nearest, by: \.offset).mapValues { Double($0.count) }
      modes = counts.values.filter { $0 >= count / 100 }.count
    }
  }

  private func optimizer(_ rate: Double) throws -> AdamW {
    let parameters = field.modules.parameters.map { ($0.key, $0.tensor) }
    return try AdamW(
      Dictionary(uniqueKeysWithValues: parameters), AdamW.Options(learningRate: rate, weightDecay: 0))
  }

  /// Flow matching: the velocity at x_σ = (1 − σ)·x0 + σ·ε is to be ε − x0. The same 64 batches are gone through again and again.
  ///
  /// - Returns: the mean loss of the last tenth.
  func pretrain(iterations: Int, batch: Int) throws -> Double {
    let batches = try (0..<64).map { i in
      var choice = random.stream(.pretraining, iteration: i)
      var normal = random.stream(.pretraining, iteration: i, step: 1)
      let centres = (0..<batch).flatMap { _ in
        let mode = Self.modes[choice.index(below: 8)]
        return [Float(mode.x), Float(mode.y)]
      }
      let spread = try Tensor(normal.normals(count: 2 * batch), shape: [batch, 2]) * Self.deviation
      return (
        clean: try Tensor(centres, shape: [batch, 2]) + spread,
        noise: try Tensor(normal.normals(count: 2 * batch), shape: [batch, 2]),
        sigma: try Tensor((0..<batch).map { _ in Float(choice.uniform()) }, shape: [batch, 1])
      )
    }
    let adam = try optimizer(0)
    var losses: [Double] = []
    for i in 0..<iterations {
      let (clean, noise, sigma) = batches[i % batches.count]
      let v = try field.velocity(
        clean + (noise - clean) * sigma, times: try sigma.reshape(-1) * 1000, condition: Condition([]),
        guidance: nil)
      let loss = try (v - (noise - clean)).square().mean()
      try loss.backward()
      adam.options.learningRate = 5e-3 * (1 - Double(i) / Double(iterations))
      try adam.step()
      if i >= iterations - iterations / 10 { losses.append(try loss.detach().item()) }
    }
    return losses.reduce(0, +) / Double(losses.count)
  }

  /// Points drawn by the ODE.
  func draw(_ count: Int) throws -> [SIMD2<Double>] {
    let schedule = try NoiseSchedule.training(steps: 40, shift: 1)
    let table = try TransitionTable(schedule: schedule, kind: .ode, eta: 0, stochastic: 0..<0)
    var stream = random.stream(.evaluationNoise)
    let drawn = try Rollout(table: table, guidance: nil, batch: count).sample(
      field, initial: try Tensor(stream.normals(count: 2 * count), shape: [count, 2]),
      conditions: [Condition](repeating: Condition([]), count: count)
    ) { _, _, _ in }
    return try points(drawn.clean)
  }

  private func points(_ x: Tensor) throws -> [SIMD2<Double>] {
    let values = try x.doubles()
    return stride(from: 0, to: values.count, by: 2).map { [values[$0], values[$0 + 1]] }
  }

  /// What one iteration of Chunk-GRPO saw.
  struct Iteration {
    /// Mean reward of the points it drew.
    let reward: Double
    /// Ratios of its first update, and the largest difference of replayed log-probabilities from the rollout's.
    let ratios: [Double], replayGap: Double
  }

  /// Chunk-GRPO: ten steps in chunks of three, one group of `size` points an iteration, two updates.
  func tune(iterations: Int, size: Int, rate: Double) throws -> [Iteration] {
    let schedule = try NoiseSchedule.training(steps: 10, shift: 1)
    let table = try TransitionTable(schedule: schedule, kind: .flowSDE, eta: 0.7, stochastic: 0..<9)
    let plan = try ChunkStrategy("fixed:3").plan(steps: 9)
    let network = TimedNetwork(field)
    let adam = try optimizer(rate)
    // Passes of rollout and update have equally many rows: equal inputs then give equal bits, and the first ratios are 1.
    let rollout = Rollout(table: table, guidance: nil, batch: size, fillsRows: true)
    let rule = PolicyUpdate(
      network: network, table: table, guidance: nil, microBatch: size, ratio: .chunk,
      clip: ClipRange(low: 0.2, high: 0.2))
    let conditions = [Condition](repeating: Condition([]), count: size)
    return try (0..<iterations).map { i in
      var start = random.stream(.initialNoise, iteration: i)
      let trajectories = try rollout.sample(
        network, initial: try Tensor(start.normals(count: 2 * size), shape: [size, 2]), conditions: conditions
      ) { sample, step, out in
        var stream = random.stream(.stepNoise, iteration: i, sample: sample, step: step)
        stream.fillNormal(out)
      }
      let rewards = try points(trajectories.clean).map(Self.reward)
      let advantages = try Advantages.groups(
        rewards: [rewards], masked: [[Bool](repeating: false, count: size)], std: .group, clamp: 5)
      let samples = (0..<size).map { s in
        UpdateSample(row: s, advantage: advantages.values[s], chunks: plan.ranges.map { ($0, 1) })
      }
      var first: UpdateReport?
      for part in [samples[..<(size / 2)], samples[(size / 2)...]] {
        let report = try rule.accumulate(
          Array(part), trajectories, conditions: conditions, first: first == nil)
        first = first ?? report
        _ = try adam.clipGradients(maxNorm: 1)
        try adam.step()
      }
      return Iteration(
        reward: rewards.reduce(0, +) / Double(size), ratios: first!.ratios, replayGap: first!.replayGap)
    }
  }
}
