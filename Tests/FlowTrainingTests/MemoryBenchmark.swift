import ChunkGRPO
import FlowModels
import Foundation
import Testing
import Torch
import TorchNN

@testable import FlowTraining

/// Prints the tables of Benchmarks/RESULTS.md; not part of the tests.
@Suite(
  "Memory options, measured",
  .enabled(if: ProcessInfo.processInfo.environment["CHUNKGRPO_BENCHMARK"] != nil), .serialized)
struct MemoryBenchmark {
  private func configuration(
    _ dtype: Configuration.Network.DType, _ weights: Configuration.Network.Weights = .model
  ) -> Configuration {
    var c = Configuration()
    c.model = mini.path
    (c.network.dtype, c.network.weights) = (dtype, weights)
    return c
  }

  @Test("quality of one-byte weights on flux-mini: velocity, pixels, rewards")
  func oneByteWeights() throws {
    let prompts = try PromptFile(file: root.appending(path: "Data/prompts.jsonl"), split: "test").prompts
    let rewards = try RewardSet([.init(name: "vivid"), .init(name: "scenes", score: "graded")])
    let (steps, seed) = (17, UInt64(1))
    var states: Tensor?
    var reference: [String: (velocity: Tensor, images: Tensor, scores: [[Double]])] = [:]
    print("| network | weights | velocity | pixels | vivid | scenes |\n|---|---|---|---|---|---|")
    for (dtype, weights) in [
      (Configuration.Network.DType.float32, Configuration.Network.Weights.model), (.float32, .int8),
      (.float32, .fp8),
      (.bfloat16, .model), (.bfloat16, .int8), (.bfloat16, .fp8),
    ] {
      let engine = try Engine(configuration(dtype, weights))
      let table = try TransitionTable(
        schedule: try engine.pipeline.schedule(steps: steps, grid: engine.grid), kind: .ode, eta: 0,
        stochastic: 0..<0)
      let few = prompts.prefix(32)
      let conditions = try few.map { try engine.encoder($0.text) }
      if states == nil {
        let streams = few.map { RandomPlan(seed: seed).stream(.evaluationNoise, prompt: $0.text, sample: 0) }
        states = try engine.rollout(table).sample(
          engine.network, initial: try engine.noise(streams), conditions: conditions
        ) { _, _, _ in }.states
      }
      let velocity = try withoutGrad {
        try Tensor.stack(
          try [0, 4, 8, 12, 16].map { step in
            try engine.network.velocity(
              try states![step], times: try Tensor.full([conditions.count], Double(table.times[step])),
              condition: try Condition.stack(conditions), guidance: 3.5)
          })
      }
      let images = try engine.draw(prompts.map(\.text), count: 1, steps: steps, seed: seed)
      let scores = try rewards.judge(images, prompts).values.map { $0.map { $0 ?? 0 } }
      if weights == .model { reference[dtype.rawValue] = (velocity, images, scores) }
      /// Against the same dtype's own weights, and against float32's.
      func against(_ name: String) throws -> (Double, Double) {
        let base = reference[name]!
        let (v, p) = (try velocity - base.velocity, try images - base.images)
        return (
          try (v.square().sum() / base.velocity.square().sum()).sqrt().item(), try p.abs().mean().item() * 255
        )
      }
      let (own, full) = (try against(dtype.rawValue), try against("float32"))
      let cells = try zip(scores, reference[dtype.rawValue]!.scores).map { mine, base in
        let mean = try Summary(mine).mean
        guard weights != .model else { return String(format: "%.4f", mean) }
        let change = try PairedTest(differences: zip(mine, base).map { $0 - $1 })
        return String(
          format: "%.4f: %+.4f [%+.4f, %+.4f]", mean, change.difference, change.ci95.low, change.ci95.high)
      }
      print(
        String(
          format: "| %@ | %@ | %.4f (%.4f) | %.2f (%.2f) | ", dtype.rawValue, weights.rawValue, own.0, full.0,
          own.1,
          full.1) + cells.joined(separator: " | ") + " |")
    }
  }

  @Test("what decoding in bfloat16 moves on flux-mini: pixels, rewards")
  func decoding() throws {
    let prompts = try PromptFile(file: root.appending(path: "Data/prompts.jsonl"), split: "test").prompts
    let few = Array(prompts.prefix(48))
    let rewards = try RewardSet([.init(name: "vivid"), .init(name: "scenes", score: "graded")])
    var found: [(images: Tensor, scores: [[Double]])] = []
    for dtype in Configuration.Network.DecodeDType.allCases {
      var c = configuration(.bfloat16)
      c.network.decodeDtype = dtype
      let images = try Engine(c).draw(few.map(\.text), count: 1, steps: 17, seed: 1)
      found.append((images, try rewards.judge(images, few).values.map { $0.map { $0 ?? 0 } }))
    }
    let levels = try (found[1].images - found[0].images).abs() * 255
    print(
      String(
        format: "pixels: mean %.3f, at most %.1f of 255", try levels.mean().item(), try levels.amax().item()))
    for (name, (full, half)) in zip(rewards.names, zip(found[0].scores, found[1].scores)) {
      let change = try PairedTest(differences: zip(half, full).map { $0 - $1 })
      print(
        String(
          format: "%@: %.4f, %.4f: %+.5f [%+.5f, %+.5f]", name, try Summary(full).mean,
          try Summary(half).mean,
          change.difference, change.ci95.low, change.ci95.high))
    }
  }

  @Test("peak memory and time of one forward and backward pass of 48 rows")
  func checkpointing() throws {
    let engine = try Engine(configuration(.bfloat16))
    _ = try Policy(
      Configuration.Trainable(), engine.network.modules, device: engine.device, seeds: RandomPlan(seed: 1))
    let condition = try Condition.stack([Condition](repeating: try engine.encoder("a red cat"), count: 48))
    let x = try Tensor.full([48] + engine.latentShape, 0.3)
    let times = try Tensor.full([48], 500)
    func pass() throws -> Tensor {
      try engine.network.velocity(x, times: times, condition: condition, guidance: 3.5).square().mean()
    }
    _ = try withoutGrad { try pass() }
    let start = try TorchRuntime.residentMemory()
    print("| checkpointing | peak above the loaded model, MiB | seconds |\n|---|---|---|")
    // From little memory to much: what the C library's heap has once taken it keeps.
    for (name, every) in [("block", 1), ("every:2", 2), ("every:4", 4), ("none", nil)] as [(String, Int?)] {
      engine.pipeline.network.checkpointing = every
      try TorchRuntime.resetPeakMemory()
      var seconds: [Double] = []
      for _ in 0..<4 {
        let clock = ContinuousClock.now
        try pass().backward()
        seconds.append((ContinuousClock.now - clock) / .seconds(1))
      }
      let peak = try TorchRuntime.peakMemory() - start
      print(String(format: "| %@ | %d | %.2f |", name, peak >> 20, seconds.dropFirst().min()!))
    }
  }
}
