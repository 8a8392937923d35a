import ChunkGRPO
import FlowModels
import Foundation
import Testing
import Torch
import TorchNN

@testable import FlowTraining

/// Oracle: the same run with everything kept in full.
@Suite("Memory options")
struct MemoryTests {
  private let samples = [
    UpdateSample(row: 0, advantage: 1.2, chunks: [(0..<2, 1), (2..<5, 0.5)]),
    UpdateSample(row: 2, advantage: -0.7, chunks: [(1..<3, 1)]),
  ]

  // flux-tiny has two double and two single blocks: segments of 1, of 2, and longer than there are blocks.
  @Test(
    "checkpointed segments give every gradient of full training, bit for bit in float32",
    arguments: [1, 2, 3])
  func fullGradients(_ every: Int) throws {
    let bench = try Bench(trainable: true)
    let trajectories = try bench.rollout()
    let plain = try bench.gradient(samples, trajectories, microBatch: 4)
    bench.transformer.checkpointing = every
    let saved = try bench.gradient(samples, trajectories, microBatch: 4)
    #expect(plain.values.count > 1000 && plain.values.contains { $0 != 0 })
    #expect(saved.values == plain.values && saved.report.replayGap == 0)
  }

  @Test(
    "adapters on every layer, modulations included, get the same gradients, bit for bit", arguments: [1, 2])
  func adapterGradients(_ every: Int) throws {
    let bench = try Bench()
    let adapter = try LoRAAdapter(bench.transformer.modules, rank: 2, alpha: 4, targets: ["all-linear"]) {
      path, n in
      var stream = RandomPlan(seed: 5).stream(.parameterInit, prompt: path)
      return stream.normals(count: n)
    }
    for (name, tensor) in adapter.parameters where name.hasSuffix("lora_B.weight") {
      try tensor.copy(from: try Bench.normals(tensor.shape, name) * 0.1)
    }
    func gradients() throws -> [String: [UInt8]] {
      defer { for tensor in adapter.parameters.values { try? tensor.clearGrad() } }
      _ = try bench.gradient(samples, trajectories, microBatch: 4)
      return try adapter.parameters.mapValues { try #require(try $0.grad()).bytes() }
    }
    let trajectories = try bench.rollout()
    let plain = try gradients()
    bench.transformer.checkpointing = every
    #expect(try gradients() == plain)
  }

  @Test("a run with checkpointed blocks writes the same adapter and metrics, byte for byte")
  func checkpointedRun() throws {
    let shop = try Workshop()
    try shop.train("kept") { $0.run.iterations = 2 }
    try shop.train("block") { c in (c.run.iterations, c.network.checkpointing) = (2, .block) }
    #expect(try shop.trained("block") == shop.trained("kept"))
    #expect(try shop.timeless("block") == shop.timeless("kept"))
  }

  @Test(
    "replay equals rollout with quantised weights and checkpointed segments, in float32 and bfloat16",
    arguments: [Configuration.Network.Weights.model, .int8, .fp8],
    [Configuration.Network.DType.float32, .bfloat16])
  func replay(_ weights: Configuration.Network.Weights, _ dtype: Configuration.Network.DType) throws {
    let shop = try Workshop()
    try shop.train("run") { c in
      c.run.iterations = 1
      (c.network.weights, c.network.checkpointing, c.network.dtype) = (weights, .every(2), dtype)
    }
    #expect(try shop.numbers("run", "replay_gap") == [0])
    #expect(try shop.numbers("run", "grad_norm")[0] > 0)
  }

  @Test("attention and MLP of the blocks are quantised, what steers them is not; one byte a weight")
  func quantisedLayers() throws {
    let transformer = try FluxTransformer(folder: tiny.appending(path: "transformer"))
    try transformer.modules.quantise(.int8, where: isQuantisable)
    let layers = transformer.modules.linears
    let kept = layers.filter { $0.value.weight.tensor.dtype == .float32 }.keys
    #expect(
      Set(kept) == [
        "x_embedder", "context_embedder", "norm_out.linear", "proj_out",
        "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.guidance_embedder.linear_1", "time_text_embed.guidance_embedder.linear_2",
        "time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2",
        "transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear",
        "transformer_blocks.1.norm1.linear", "transformer_blocks.1.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear", "single_transformer_blocks.1.norm.linear",
      ])
    #expect(layers.filter { $0.value.weight.tensor.dtype == .int8 }.count == 2 * 12 + 2 * 5)
  }

  @Test(
    "moments in codes: a run resumes as if never stopped, byte for byte; offloaded moments change nothing")
  func coded() throws {
    let shop = try Workshop()
    func change(_ c: inout Configuration) {
      (c.trainable.kind, c.optim.state, c.optim.lr) = (.full, .int8, 1e-5)
    }
    try shop.train("whole") { change(&$0) }
    try shop.train("half") {
      change(&$0); $0.run.iterations = 2
    }
    try shop.train("half", resume: true) { change(&$0) }
    #expect(try shop.trained("half") == shop.trained("whole"))
    #expect(try shop.timeless("half") == shop.timeless("whole"))
    try shop.train("offloaded") {
      change(&$0); $0.optim.offload = true
    }
    #expect(try shop.trained("offloaded") == shop.trained("whole"))
    let state = try SafetensorsFile(shop.checkpoint("whole", 4).appending(path: "training.safetensors"))
    #expect(state.names.contains { $0.hasSuffix(".rootScale") && state.dtype($0) == .float32 })
    #expect(state.names.contains { $0.hasSuffix(".root") && state.dtype($0) == .uint8 })
  }

  @Test("a fully trained model is drawn with its own weights, whatever a quantised one beside it uses")
  func trainedBesideQuantised() throws {
    let shop = try Workshop()
    try shop.train("full") { c in (c.trainable.kind, c.run.iterations) = (.full, 1) }
    try shop.train("lora") { c in (c.network.weights, c.run.iterations) = (.int8, 1) }
    var full = try ModelReference(shop.folder("full").path)
    full.computeLike(try ModelReference(shop.folder("lora").path))
    #expect(full.configuration.network.weights == .model)
    _ = try full.load()
  }
}
