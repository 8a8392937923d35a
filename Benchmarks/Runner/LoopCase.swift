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
    guard p.name == "update" else { return }
    let (size, trained) = (try need(p.chunk, "chunk"), try need(p.trained, "trained"))
    let samples = (0..<group).map { s in
      UpdateSample(
        row: s, advantage: s % 2 == 0 ? 1 : -1,
        chunks: stride(from: 0, to: trained, by: size).map { ($0..<min($0 + size, trained), 1) })
    }
    stored = (samples, try rollout())
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

  func check() throws -> [String: Tensor] { [:] }
}
