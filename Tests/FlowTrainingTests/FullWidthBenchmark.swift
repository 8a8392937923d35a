import ChunkGRPO
import FlowModels
import Foundation
import Testing
import Torch
import TorchNN

@testable import FlowTraining

/// FLUX.1-dev's real widths, as far as 24 GiB of host memory go: `CHUNKGRPO_BENCHMARK=1 swift test --filter FullWidth`.
@Suite(
  "full width", .serialized,
  .enabled(if: ProcessInfo.processInfo.environment["CHUNKGRPO_BENCHMARK"] != nil, "set CHUNKGRPO_BENCHMARK=1")
)
struct FullWidthBenchmark {
  let scratch: Scratch
  let blueprint: TransformerBlueprint

  init() throws {
    scratch = try Scratch()
    let model = scratch.path("flux1-dev")
    try FileManager.default.createDirectory(
      at: model.appending(path: "transformer"), withIntermediateDirectories: true)
    try Data(#"{"_class_name": "FluxPipeline"}"#.utf8).write(to: model.appending(path: "model_index.json"))
    // The published configuration.
    let config = """
      {"_class_name": "FluxTransformer2DModel", "attention_head_dim": 128, "guidance_embeds": true,
       "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19,
       "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768}
      """
    try Data(config.utf8).write(to: model.appending(path: "transformer/config.json"))
    blueprint = try TransformerBlueprint(try ModelFolder(model))
  }

  /// Blocks of the real widths in bfloat16 with random weights, made in memory.
  private func network(_ blocks: [Int], checkpointing: Int?) throws -> any FlowTransformer {
    var options = PipelineOptions()
    (options.dtype, options.checkpointing) = (.bfloat16, checkpointing)
    let network = try blueprint.build(blocks, options)
    // One table of normals, read at many offsets: billions of draws would take minutes.
    var stream = RandomPlan(seed: 3).stream(.parameterInit)
    let table = try Tensor(stream.normals(count: 1 << 22)).to(.bfloat16)
    for (i, parameter) in network.modules.parameters.enumerated() {
      let flat = try parameter.tensor.reshape(-1)
      let scale = 1 / Double(parameter.tensor.shape.last!).squareRoot()
      var start = 0
      while start < flat.count {
        let offset = (i * 7919 + start / 65536) % (1 << 20)
        let count = min(flat.count - start, 3 << 20)
        try flat.narrow(0, start, count).copy(from: try table.narrow(0, offset, count) * scale)
        start += count
      }
    }
    return network
  }

  private func say(_ text: String) { print("full width: \(text)") }
  private func timed<R>(_ body: () throws -> R) rethrows -> (R, Double) {
    let start = Date()
    let result = try body()
    return (result, Date().timeIntervalSince(start))
  }
  private func gib(_ bytes: Int) -> String { String(format: "%.2f GiB", Double(bytes) / 1_073_741_824) }

  @Test("half of the blocks: a forward pass at 512 px and a LoRA backward pass with checkpointing")
  func halfDepth() throws {
    let blocks = [10, 19]
    let network = try network(blocks, checkpointing: 1)
    let parameters = network.modules.parameters.reduce(0) { $0 + $1.tensor.count }
    let grid: TokenGrid = (32, 32)
    let model = blueprint.flowModel(network, grid: grid)
    let condition = Condition([
      try Tensor.full([1, 512, 4096], 0.1).to(.bfloat16), try Tensor.full([1, 768], 0.1),
    ])
    var stream = RandomPlan(seed: 4).stream(.initialNoise)
    let x = try Tensor(stream.normals(count: 1024 * 64), shape: [1, 1024, 64])
    let times = try Tensor([Float(700)])
    func velocity() throws -> Tensor {
      try model.velocity(x, times: times, condition: condition, guidance: 3.5)
    }
    let (forward, bytes) = try TorchRuntime.peakAllocation {
      try timed { try withoutGrad { try velocity() } }
    }
    #expect(try forward.0.allFinite())
    say(
      "\(parameters) parameters; forward pass \(String(format: "%.1f", forward.1)) s, \(gib(bytes)) beside the weights"
    )

    let adapter = try LoRAAdapter(network.modules, rank: 16, alpha: 32, targets: ["attention+mlp"]) {
      path, count in
      var stream = RandomPlan(seed: 5).stream(.parameterInit, prompt: path)
      return (0..<count).map { _ in Float(2 * stream.uniform() - 1) }
    }
    let ((_, seconds), peak) = try TorchRuntime.peakAllocation {
      try timed { try (try velocity() - x).square().mean().backward() }
    }
    let gradients = try adapter.layers.values.map { try #require(try $0.up.grad()) }
    #expect(try gradients.allSatisfy { try $0.allFinite() })
    #expect(try gradients.contains { try $0.square().sum().item() > 0 })
    say(
      "forward and backward of LoRA, block checkpointing: \(String(format: "%.1f", seconds)) s, \(gib(peak)) beside the weights"
    )
  }

  /// Estimates by the published configurations; text encoders, which are not there, come on top while encoding.
  @Test(
    "memory of the presets",
    arguments: ["flux1-dev", "flux1-dev-24gb", "flux1-schnell", "sd3.5-medium", "sd3.5-large"])
  func presets(_ name: String) throws {
    let flux = name.hasPrefix("flux")
    let transformer =
      ["flux1-dev": "flux1-dev", "flux1-dev-24gb": "flux1-dev", "flux1-schnell": "flux1-schnell"][name]
      ?? name.replacingOccurrences(of: ".", with: "")
    let model = scratch.path(name)
    func add(_ part: String, _ published: String) throws {
      let found = try #require(PublishedModel.all.first { $0.name == published })
      try FileManager.default.createDirectory(
        at: model.appending(path: part), withIntermediateDirectories: true)
      try Data(found.configuration.utf8).write(to: model.appending(path: "\(part)/config.json"))
    }
    try add("transformer", "\(transformer).transformer")
    try add("vae", "flux-sd3.vae")
    try add("text_encoder", flux ? "clip-l.text(flux)" : "clip-l.text_proj(sd3)")
    try add(flux ? "text_encoder_2" : "text_encoder_3", "t5-v1_1-xxl.encoder")
    if !flux { try add("text_encoder_2", "clip-g.text_proj(sd3)") }
    let tiny = parity.appending(path: flux ? "flux-tiny" : "sd3-tiny")
    for part in ["tokenizer", "tokenizer_2"] + (flux ? [] : ["tokenizer_3"]) {
      try FileManager.default.copyItem(at: tiny.appending(path: part), to: model.appending(path: part))
    }
    let pipeline = flux ? "FluxPipeline" : "StableDiffusion3Pipeline"
    try Data(#"{"_class_name": "\#(pipeline)"}"#.utf8).write(to: model.appending(path: "model_index.json"))
    try Data("a cat\n".utf8).write(to: scratch.path("prompts.txt"))
    var c = try Configuration.load(file: root.appending(path: "Presets/\(name).yaml"))
    (c.model, c.prompts.file) = (model.path, scratch.path("prompts.txt").path)
    let (estimate, seconds) = try timed { try MemoryModel.fit(c, available: 1 << 50).estimate }
    let parts = (estimate.standing + estimate.phases).map { "\($0.name) \(gib($0.bytes))" }.joined(
      separator: ", ")
    say(
      "\(name): \(estimate.parameters) parameters, \(estimate.trainable) trainable, peak \(gib(estimate.peak)) "
        + "(\(parts)), estimated in \(String(format: "%.0f", seconds)) s")
    #expect(estimate.peak > 0)
  }

  @Test("loading a sharded folder takes little more than the model")
  func loading() throws {
    let folder = scratch.path("sharded")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    let config = scratch.path("flux1-dev/transformer/config.json")
    let text = try String(contentsOf: config, encoding: .utf8)
      .replacingOccurrences(of: "\"num_layers\": 19", with: "\"num_layers\": 1")
      .replacingOccurrences(of: "\"num_single_layers\": 38", with: "\"num_single_layers\": 1")
    try Data(text.utf8).write(to: folder.appending(path: "config.json"))
    var total = 0
    var largest = 0
    do {
      let source = try network([1, 1], checkpointing: nil)
      var map: [String: String] = [:]
      var shards: [[String: Tensor]] = [[:], [:], [:]]
      for parameter in source.modules.parameters {
        let shard = min(total / (320 << 20), 2)
        shards[shard][parameter.key] = parameter.tensor
        map[parameter.key] = "diffusion_pytorch_model-0000\(shard + 1)-of-00003.safetensors"
        total += 2 * parameter.tensor.count
      }
      for (i, shard) in shards.enumerated() {
        let file = folder.appending(path: "diffusion_pytorch_model-0000\(i + 1)-of-00003.safetensors")
        try Safetensors.write(shard, metadata: ["format": "pt"], to: file)
        largest = max(largest, shard.values.reduce(0) { $0 + 2 * $1.count })
      }
      let index = try JSONSerialization.data(withJSONObject: ["weight_map": map])
      try index.write(to: folder.appending(path: "diffusion_pytorch_model.safetensors.index.json"))
    }
    let before = try TorchRuntime.residentMemory()
    try TorchRuntime.resetPeakMemory()
    let (network, seconds) = try timed { try FluxTransformer(folder: folder, dtype: .bfloat16) }
    let beyond = try TorchRuntime.peakMemory() - before - total
    say(
      "model of \(gib(total)) in shards of at most \(gib(largest)) loaded in \(String(format: "%.1f", seconds)) s; "
        + "peak beyond the model \(gib(max(beyond, 0)))")
    #expect(Double(beyond) < 1.2 * Double(largest))
    #expect(network.modules.parameters.count > 0)
  }
}
