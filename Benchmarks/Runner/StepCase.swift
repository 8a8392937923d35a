import ChunkGRPO
import FlowModels
import FlowTraining
import Foundation
import Torch

/// A whole RL step: rollout, decode, rewards, advantages, updates.
///
/// The step is the trainer's first, again and again: the same noise and the same draws, weights that move on.
final class StepCase: Case {
  private let trainer: Trainer
  let facts: [String: Any]

  init(_ p: Parameters) throws {
    let configuration = try Configuration.load(file: URL(filePath: try need(p.config, "config")))
    trainer = try Trainer(configuration, folder: RunFolder(URL(filePath: configuration.output)))
    facts = ["updates": try Self.updates(configuration, prompt: trainer.prompts[0].text)]
  }

  /// What each update trains on, as the trainer draws it for a single prompt: lists of [sample, first step, end].
  private static func updates(_ c: Configuration, prompt: String) throws -> [[[Int]]] {
    let plan = try ChunkStrategy(c.chunk.plan).plan(steps: c.sampling.trainableSteps.count)
    let random = RandomPlan(seed: c.seed)
    let draw = try ChunkDraw(c.chunk.draw)
    var order = random.stream(.sampleOrder, iteration: 0)
    let samples = order.shuffled(c.group.size)
    let parts = c.optim.updatesPerIteration
    return try (0..<parts).map { u in
      try samples[(samples.count * u / parts)..<(samples.count * (u + 1) / parts)].flatMap { sample in
        var stream = random.stream(.chunkDraw, iteration: 0, prompt: prompt, sample: sample)
        return try draw.draw(from: plan, fraction: c.chunk.fraction, using: &stream).map {
          [sample, plan.ranges[$0].lowerBound, plan.ranges[$0].upperBound]
        }
      }
    }
  }

  func run() throws -> [String: Double] { try trainer.step().seconds }

  /// The prompt as a condition, for the reference's loops.
  func check() throws -> [String: Tensor] {
    let condition = try trainer.engine.encoder(trainer.prompts[0].text)
    return ["text": condition.tensors[0], "pooled": condition.tensors[1]]
  }
}
