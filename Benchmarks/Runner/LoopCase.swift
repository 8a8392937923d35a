import ChunkGRPO
import FlowModels
import FlowTraining
import Foundation
import Torch
import TorchNN

/// The rollout of one group, or an update over stored trajectories: what grows with group, steps, chunks and tokens.
final class LoopCase: Case {
  private let engine: Engine
  private let policy: Policy
  private let rule: PolicyUpdate
  private let table: TransitionTable
  private let initial: Tensor
  private let conditions: [Condition]
  private let random: RandomPlan
  private let rows: Int
  /// What is updated; nil measures the rollout.
  private var stored: (samples: [UpdateSample], trajectories: Trajectories)?

  init(_ p: Parameters) throws {
    let c = try Configuration.load(file: URL(filePath: try need(p.config, "config")))
    engine = try Engine(c)
    random = RandomPlan(seed: c.seed)
    policy = try Policy(c.trainable, engine.network.modules, device: engine.device, seeds: random)
    table = try TransitionTable(
      schedule: try NoiseSchedule.training(steps: c.sampling.steps, shift: c.sampling.shift),
      kind: StepKind(rawValue: c.sampling.step.rawValue)!, eta: c.sampling.eta,
      stochastic: c.sampling.trainableSteps)
    let (group, shape) = (c.group.size, engine.latentShape)
    rows = min(group, c.optim.microBatch)
    var stream = random.stream(.initialNoise)
    initial = try Tensor(stream.normals(count: shape.reduce(group, *)), shape: [group] + shape)
    let prompts = try PromptFile.load(file: URL(filePath: c.prompts.file), split: c.prompts.split)
    conditions = [Condition](repeating: try engine.encoder(prompts[0].text), count: group)
    rule = PolicyUpdate(
      network: engine.network, table: table, guidance: nil, microBatch: rows, ratio: .chunk,
      clip: ClipRange(low: c.loss.clip[0], high: c.loss.clip[1]))
    if let updates = p.updates { try take(updates[0], try Inputs(p.inputs)) }
    guard p.name == "update" else { return }
    let (size, trained) = (try need(p.chunk, "chunk"), try need(p.trained, "trained"))
    let samples = (0..<group).map { s in
      UpdateSample(
        row: s, advantage: s % 2 == 0 ? 1 : -1,
        chunks: stride(from: 0, to: trained, by: size).map { ($0..<min($0 + size, trained), 1) })
    }
    stored = (samples, try rollout())
  }

  /// Trajectories of the reference and what its first update trains on: [sample, first step, end].
  private func take(_ update: [[Int]], _ inputs: Inputs) throws {
    let (advantages, states) = (try inputs("advantages").doubles(), try inputs("states"))
    let old = try inputs("output")
    let samples = Dictionary(grouping: update, by: { $0[0] }).sorted { $0.key < $1.key }.map {
      sample, chunks in
      UpdateSample(row: sample, advantage: advantages[sample], chunks: chunks.map { ($0[1]..<$0[2], 1) })
    }
    stored = (
      samples,
      Trajectories(
        states: states, clean: try states[0].clone(),
        logProbabilities: try (0..<old.size(0)).map { try old[$0].doubles() })
    )
  }

  private func rollout() throws -> Trajectories {
    try Rollout(table: table, guidance: nil, batch: rows, fillsRows: true)
      .sample(engine.network, initial: initial, conditions: conditions) { sample, step, out in
        var stream = random.stream(.stepNoise, sample: sample, step: step)
        stream.fillNormal(out)
      }
  }

  func prepare() throws { for tensor in policy.parameters.values { try tensor.clearGrad() } }

  func run() throws -> [String: Double] {
    guard let stored else {
      let states = try rollout().states
      return ["stored": Double(4 * states.count)]
    }
    _ = try rule.accumulate(stored.samples, stored.trajectories, conditions: conditions, first: true)
    return [:]
  }

  func check() throws -> [String: Tensor] {
    let (samples, trajectories) = try need(stored, "trajectories")
    try prepare()
    // Not the first update: that the reference's log-probabilities equal ours in every bit is not asked for.
    _ = try rule.accumulate(samples, trajectories, conditions: conditions, first: false)
    var results: [String: Tensor] = [:]
    for (name, tensor) in policy.parameters {
      results["gradient." + name] = try need(try tensor.grad(), name)
    }
    let steps = Array(0..<trajectories.logProbabilities[0].count)
    let replayed = try conditions.indices.flatMap {
      try rule.logProbabilities(row: $0, steps: steps, trajectories, conditions: conditions)
    }
    results["output"] = try Tensor(replayed, shape: [conditions.count, steps.count])
    return results
  }
}
