import FlowRewards
import Foundation
import Testing
import Torch

@testable import FlowTraining

/// A run of a few iterations on flux-tiny, in a folder of its own.
final class Workshop {
  let scratch: Scratch
  var configuration = Configuration()

  static let prompts = """
    {"prompt": "a red cat", "tag": "one", "split": "train"}
    {"prompt": "two dogs", "tag": "two", "split": "train"}
    {"prompt": "a boat", "tag": "one", "split": "train"}
    {"prompt": "a tree", "tag": "one", "split": "dev"}
    {"prompt": "two birds", "tag": "two", "split": "dev"}
    {"prompt": "a hat", "tag": "one", "split": "dev"}

    """

  init() throws {
    scratch = try Scratch()
    let prompts = scratch.path("prompts.jsonl")
    try Data(Self.prompts.utf8).write(to: prompts)
    configuration.model = try scratch.tinyModel().path
    configuration.prompts.file = prompts.path
    configuration.rewards = [Configuration.Reward(name: "vivid")]
    (configuration.sampling.height, configuration.sampling.width) = (32, 48)
    configuration.sampling.steps = 5
    (configuration.group.size, configuration.group.promptsPerIteration) = (4, 2)
    configuration.chunk.plan = "list:1,3"
    (configuration.optim.lr, configuration.optim.maxGradNorm) = (1e-3, 1)
    (configuration.trainable.rank, configuration.trainable.alpha) = (2, 4)
    configuration.network.dtype = .float32
    (configuration.run.iterations, configuration.run.checkpointEvery) = (4, 2)
    (configuration.run.samplesEvery, configuration.run.evaluateEvery) = (0, 0)
  }

  func folder(_ name: String) -> URL { scratch.path(name) }

  /// Trains in the folder `name` and returns the warnings.
  @discardableResult
  func train(
    _ name: String, resume: Bool = false, rewards: [any Reward]? = nil,
    _ change: (inout Configuration) -> Void = { _ in }
  ) throws -> [String] {
    var c = configuration
    c.output = folder(name).path
    change(&c)
    let run = RunFolder(folder(name))
    if resume { try run.requireRun() } else { try run.create(c) }
    try c.validate()
    let names = RewardSet.names(c.rewards)
    let made = rewards.map { given in
      RewardSet(
        given.indices.map { .init(reward: given[$0], settings: c.rewards[$0], name: names[$0]) })
    }
    let trainer = try Trainer(c, folder: run, rewards: made ?? RewardSet(c.rewards))
    var warnings: [String] = []
    trainer.report = {
      switch $0 {
      case .warning(let text), .reached(let text): warnings.append(text)
      default: break
      }
    }
    try trainer.run(resume: resume)
    return warnings
  }

  /// The rows of metrics.jsonl.
  func rows(_ name: String) throws -> [[String: Any]] {
    let text = try String(contentsOf: folder(name).appending(path: "metrics.jsonl"), encoding: .utf8)
    return try text.split(separator: "\n").map {
      try #require(JSONSerialization.jsonObject(with: Data($0.utf8)) as? [String: Any])
    }
  }

  func numbers(_ name: String, _ key: String) throws -> [Double] {
    try rows(name).map { try #require($0[key] as? Double, "no \(key)") }
  }

  /// The rows without what depends on the clock, as text that compares bit for bit.
  func timeless(_ name: String) throws -> [String] {
    try rows(name).map { row in
      let kept = row.filter { $0.key != "seconds" && $0.key != "images_per_s" }
      return String(
        decoding: try JSONSerialization.data(withJSONObject: kept, options: [.sortedKeys]), as: UTF8.self)
    }
  }

  /// What other programs load, as bytes.
  func trained(_ name: String) throws -> Data {
    let adapter = folder(name).appending(path: "adapter")
    let file = try #require(
      try FileManager.default.contentsOfDirectory(atPath: adapter.path).first { $0.hasSuffix(".safetensors") }
    )
    return try Data(contentsOf: adapter.appending(path: file))
  }

  func checkpoint(_ name: String, _ iteration: Int) -> URL {
    folder(name).appending(path: "checkpoints/iteration-00000\(iteration)")
  }

  func checkpoints(_ name: String) throws -> [String] {
    try FileManager.default.contentsOfDirectory(
      atPath: folder(name).appending(path: "checkpoints").path
    ).sorted()
  }
}
