import ChunkGRPO
import FlowModels
import Foundation
import Testing
import Torch
import TorchNN

@testable import FlowTraining

/// flux-tiny on 2 × 3 tokens with its trajectories: small enough to differentiate in milliseconds.
final class Bench {
  static let grid = (rows: 2, columns: 3)
  let transformer: FluxTransformer
  let network: TimedNetwork
  let table: TransitionTable
  let conditions: [Condition]
  let initial: Tensor
  let steps, samples: Int
  let eta: Double

  init(
    kind: StepKind = .flowSDE, steps: Int = 6, samples: Int = 6, dtype: DType = .float32,
    trainable: Bool = false, window: Range<Int>? = nil
  ) throws {
    (self.steps, self.samples, eta) = (steps, samples, kind.defaultEta)
    transformer = try FluxTransformer(folder: tiny.appending(path: "transformer"))
    if trainable { try transformer.modules.makeTrainable() }
    if dtype != .float32 { try transformer.place(dtype, .cpu) }
    network = TimedNetwork(FluxFlowModel(transformer, grid: Bench.grid))
    table = try TransitionTable(
      schedule: try NoiseSchedule.training(steps: steps, shift: 3), kind: kind, eta: kind.defaultEta,
      stochastic: window ?? 0..<(steps - 1))
    conditions = try (0..<samples).map {
      Condition([try Bench.normals([1, 5, 32], "text \($0)"), try Bench.normals([1, 24], "pooled \($0)")])
    }
    initial = try Bench.normals([samples, 6, 64], "x0")
  }

  static func normals(_ shape: [Int], _ name: String) throws -> Tensor {
    var stream = RandomPlan(seed: 3).stream(.parameterInit, prompt: name)
    return try Tensor(stream.normals(count: shape.reduce(1, *)), shape: shape)
  }

  static func noise(_ sample: Int, _ step: Int, _ out: UnsafeMutableBufferPointer<Float>) {
    var stream = RandomPlan(seed: 3).stream(.stepNoise, sample: sample, step: step)
    stream.fillNormal(out)
  }

  func rollout(batch: Int = 48, fillsRows: Bool = false, keepsMeans: Bool = false) throws -> Trajectories {
    var sampler = Rollout(table: table, guidance: 3.5, batch: batch, fillsRows: fillsRows)
    sampler.keepsMeans = keepsMeans
    return try sampler.sample(network, initial: initial, conditions: conditions, noise: Bench.noise)
  }

  func rule(microBatch: Int, ratio: RatioKind = .chunk, clip: ClipRange = ClipRange(low: 5e-5, high: 5e-5))
    -> PolicyUpdate
  {
    PolicyUpdate(
      network: network, table: table, guidance: 3.5, microBatch: microBatch, ratio: ratio, clip: clip)
  }

  /// All gradients in one list, which are then forgotten.
  func takeGradient() throws -> [Double] {
    var all: [Double] = []
    for parameter in transformer.modules.parameters {
      if let gradient = try parameter.tensor.grad() { all += try gradient.doubles() }
      try parameter.tensor.clearGrad()
    }
    return all
  }

  func gradient(
    _ samples: [UpdateSample], _ trajectories: Trajectories, microBatch: Int, ratio: RatioKind = .chunk,
    clip: ClipRange = ClipRange(low: 5e-5, high: 5e-5), norm: RatioNorm = .none, first: Bool = true
  ) throws -> (values: [Double], report: UpdateReport) {
    var rule = rule(microBatch: microBatch, ratio: ratio, clip: clip)
    rule.ratioNorm = norm
    let report = try rule.accumulate(samples, trajectories, conditions: conditions, first: first)
    return (try takeGradient(), report)
  }

  /// Moves every weight a little, as an optimizer step would.
  func perturb(by size: Double) throws {
    for parameter in transformer.modules.parameters {
      let delta = try Bench.normals(parameter.tensor.shape, parameter.key) * size
      try parameter.tensor.copy(from: try parameter.tensor.detach() + delta)
    }
  }

  /// Velocities of stored states in one pass, one row an entry.
  func velocity(_ entries: [(row: Int, step: Int)], _ t: Trajectories) throws -> Tensor {
    try network.velocity(
      try states(entries, t, ahead: 0), times: try Tensor(entries.map { table.times[$0.step] }),
      condition: try Condition.stack(entries.map { conditions[$0.row] }), guidance: 3.5)
  }

  func states(_ entries: [(row: Int, step: Int)], _ t: Trajectories, ahead: Int) throws -> Tensor {
    try Tensor.stack(try entries.map { try t.states[$0.step + ahead][$0.row] })
  }

  /// The objective as it is defined, in one float64 graph from the velocity on, and its gradient.
  func literal(
    _ samples: [UpdateSample], _ t: Trajectories, ratio: RatioKind, clip: ClipRange, norm: RatioNorm = .none
  ) throws -> (value: Double, ratios: [Double], gradient: [Double]) {
    let entries = samples.flatMap { s in s.chunks.flatMap { $0.steps.map { (row: s.row, step: $0) } } }
    let v = try velocity(entries, t).to(.float64)
    let x = try states(entries, t, ahead: 0).to(.float64)
    let next = try states(entries, t, ahead: 1).to(.float64)
    var logs: [Tensor] = []
    /// GRPO-Guard's (log-ratio + mean((μ − μ_old)²)/(2s²))·s, as published: both terms, log-ratio and bias.
    var normalised: [Tensor] = []
    let old = try norm == .guard ? t.anchor.means!.to(.float64) : nil
    for (e, entry) in entries.enumerated() {
      let sigma = Double(table.schedule.sigmas[entry.step])
      let delta = Double(table.schedule.sigmas[entry.step + 1]) - sigma
      let level = entry.step == 0 ? Double(table.schedule.sigmas[1]) : sigma
      let g2 = eta * eta * sigma / (1 - level)
      let mean =
        try x[e] * (1 + g2 * delta / (2 * sigma)) + v[e] * ((1 + g2 * (1 - sigma) / (2 * sigma)) * delta)
      let variance = g2 * -delta
      if let old {
        let before = try old[entry.step][entry.row]
        let logRatio =
          try ((next[e] - before).square().mean() - (next[e] - mean).square().mean()) * (0.5 / variance)
        let bias = try (mean - before).square().mean() * (0.5 / variance)
        normalised.append(try (logRatio + bias) * variance.squareRoot())
      }
      logs.append(
        try (next[e] - mean).square().mean() * (-1 / (2 * variance)) + (-0.5 * log(2 * Double.pi * variance)))
    }
    var objective = try Tensor.zeros([], dtype: .float64)
    var ratios: [Double] = []
    var at = 0
    for s in samples {
      let total = s.chunks.reduce(0) { $0 + $1.weight }
      /// min(r·A, clip(r)·A) of the ratio whose logarithm is given
      func clipped(_ logRatio: Tensor) throws -> Tensor {
        let r = try logRatio.exp()
        ratios.append(try r.item())
        return try (r * s.advantages[0]).minimum(try r.clamp(1 - clip.low, 1 + clip.high) * s.advantages[0])
      }
      var sequence = try Tensor.zeros([], dtype: .float64)
      var share = try Tensor.zeros([], dtype: .float64)
      for chunk in s.chunks {
        let change = try chunk.steps.map { step in
          defer { at += 1 }
          return try norm == .guard ? normalised[at] : logs[at] - t.logProbabilities[s.row][step]
        }
        let size = Double(chunk.steps.count)
        switch ratio {
        case .chunk:
          share = try share + clipped(try Tensor.stack(change).mean()) * (chunk.weight / total)
        case .step:
          for c in change { share = try share + clipped(c) * (chunk.weight / total / size) }
        case .sequence:
          sequence = try sequence + Tensor.stack(change).mean() * (chunk.weight / total)
        }
      }
      if ratio == .sequence { share = try clipped(sequence) }
      objective = try objective + share * (1 / Double(samples.count))
    }
    try objective.neg().backward()
    return (try objective.item(), ratios, try takeGradient())
  }
}

/// Counts the rows that go through a network.
final class CountingModel: FlowModel {
  let base: any FlowModel
  var passes: [Int] = []
  init(_ base: any FlowModel) { self.base = base }
  var modules: ModuleRegistry { base.modules }
  func velocity(_ latents: Tensor, times: Tensor, condition: Condition, guidance: Double?) throws -> Tensor {
    passes.append(latents.size(0))
    return try base.velocity(latents, times: times, condition: condition, guidance: guidance)
  }
}
