import ChunkGRPO
import FlowRewards
import Foundation
import Torch

/// Scenes to train on, without end: sample s of iteration i is a function of (seed, i, s) alone.
struct SceneSource {
  /// What the random numbers of a sample are for.
  enum Use: Int { case scene, level, noise }

  let count: Int
  private let prompts: [(weight: Double, prompts: [Prompt])]
  private let renderer: SceneRenderer
  private let random: RandomPlan

  /// Checks that every prompt has a scene that can be drawn.
  init(_ configuration: Pretraining, renderer: SceneRenderer, random: RandomPlan) throws {
    let file = URL(filePath: configuration.prompts.file)
    let all = try PromptFile(file: file, split: configuration.prompts.split).prompts
    for prompt in all { try renderer.requireDrawable(RewardPrompt(prompt)) }
    count = all.count
    let groups = Dictionary(grouping: all) { $0.tag ?? "" }.sorted { $0.key < $1.key }
    prompts = groups.map { (SceneRenderer.categoryWeights[$0.key] ?? 1, $0.value) }
    (self.renderer, self.random) = (renderer, random)
  }

  func stream(_ use: Use, _ iteration: Int, _ sample: Int) -> RandomStream {
    random.stream(.pretraining, iteration: iteration, sample: sample, step: use.rawValue)
  }

  /// Prompts and their images [size, 3, 64, 64] in 0 … 1: categories by weight, prompts of a category alike.
  func batch(_ iteration: Int, size: Int) throws -> (prompts: [Prompt], images: Tensor) {
    var streams = (0..<size).map { stream(.scene, iteration, $0) }
    let total = prompts.reduce(0) { $0 + $1.weight }
    let chosen = streams.indices.map { s in
      var place = streams[s].uniform() * total
      let group = prompts.first {
        place -= $0.weight
        return place < 0
      }
      let list = (group ?? prompts[prompts.count - 1]).prompts
      return list[streams[s].index(below: list.count)]
    }
    return (chosen, try renderer.render(chosen.map(RewardPrompt.init), using: streams))
  }

  /// Standard normal numbers of `shape`, one stream a sample.
  func noise(_ iteration: Int, shape: [Int], device: Device) throws -> Tensor {
    let each = shape.dropFirst().reduce(1, *)
    var values: [Float] = []
    for s in 0..<shape[0] {
      var stream = stream(.noise, iteration, s)
      values += stream.normals(count: each)
    }
    return try Tensor(values, shape: shape).to(device)
  }
}
