import Foundation
import Testing
import Torch
import TorchNN

@testable import FlowModels

/// What every part of a model folder must refuse, and what the message must name.
struct Part: Sendable, CustomTestStringConvertible {
  let folder, file: String
  /// A parameter in `file`.
  let key: String
  var testDescription: String { folder }

  static let all = [
    Part(
      folder: "transformer", file: "diffusion_pytorch_model-00002-of-00002.safetensors",
      key: "norm_out.linear.bias"),
    Part(
      folder: "text_encoder", file: "model.safetensors",
      key: "text_model.encoder.layers.1.layer_norm1.weight"),
    Part(
      folder: "text_encoder_2", file: "model.safetensors",
      key: "encoder.block.1.layer.0.SelfAttention.q.weight"),
    Part(folder: "vae", file: "diffusion_pytorch_model.safetensors", key: "decoder.conv_in.bias"),
  ]
}

@Suite("model folders: what does not fit is refused by name")
struct ModelLoadingTests {
  let scratch: Scratch, model: URL

  init() throws {
    scratch = try Scratch()
    model = try scratch.model()
  }

  private func load() -> String { message { try Self.load(model) } }

  /// The whole folder, text encoders included.
  private static func load(_ folder: URL) throws {
    _ = try ImagePipelines.load(folder).text.encode("a cat")
  }

  private func change(_ part: Part, _ body: (inout [String: Tensor]) throws -> Void) throws {
    try rewrite(model.appending(path: "\(part.folder)/\(part.file)"), body)
  }

  private func edit(_ path: String, _ old: String, _ new: String) throws {
    let file = model.appending(path: path)
    let text = try String(contentsOf: file, encoding: .utf8)
    try #require(text.contains(old))
    try text.replacingOccurrences(of: old, with: new).write(to: file, atomically: true, encoding: .utf8)
  }

  /// The index must not promise what the shard no longer holds: that is another error.
  private func dropIndexEntry(_ key: String) throws {
    let file = model.appending(path: "transformer/diffusion_pytorch_model.safetensors.index.json")
    let object = try JSONSerialization.jsonObject(with: Data(contentsOf: file)) as? [String: Any]
    var index = try #require(object)
    var map = try #require(index["weight_map"] as? [String: String])
    map[key] = nil
    index["weight_map"] = map
    try JSONSerialization.data(withJSONObject: index).write(to: file)
  }

  @Test("the folder as shipped loads")
  func loads() throws {
    let pipeline = try FluxPipeline(ModelFolder(model))
    #expect(pipeline.granularity == 16)
    #expect(pipeline.transformer.config.inChannels == 64)
  }

  @Test("an unknown key", arguments: Part.all)
  func unknownKey(_ part: Part) throws {
    try change(part) { $0["stray.weight"] = try Tensor([Float(1)]) }
    let text = load()
    #expect(text.contains("1 keys not used (stray.weight)") && text.contains(part.folder))
  }

  @Test("a missing key", arguments: Part.all)
  func missingKey(_ part: Part) throws {
    try change(part) { $0[part.key] = nil }
    if part.folder == "transformer" { try dropIndexEntry(part.key) }
    let text = load()
    #expect(text.contains("1 parameters not set (\(part.key))") && text.contains(part.folder))
  }

  @Test("another shape", arguments: Part.all)
  func misshapen(_ part: Part) throws {
    var shape: [Int] = []
    try change(part) {
      shape = $0[part.key]!.shape
      $0[part.key] = try Tensor.zeros([3, 5])
    }
    #expect(load().contains("1 parameters of another shape (\(part.key): expected \(shape), got [3, 5])"))
  }

  @Test("NaN and infinity", arguments: Part.all, [Float.nan, -.infinity])
  func notFinite(_ part: Part, _ value: Float) throws {
    try change(part) {
      var values = try $0[part.key]!.floats()
      values[values.count / 2] = value
      $0[part.key] = try Tensor(values, shape: $0[part.key]!.shape)
    }
    #expect(load().contains("1 parameters with NaN or infinite values (\(part.key))"))
  }

  @Test("all problems of a part are listed at once")
  func together() throws {
    let part = Part.all[1]
    try change(part) {
      $0["stray"] = try Tensor([Float(1)])
      $0[part.key] = nil
      $0["text_model.final_layer_norm.bias"] = try Tensor.zeros([1])
    }
    let text = load()
    for expected in [
      "not set (\(part.key))", "another shape (text_model.final_layer_norm.bias", "not used (stray)",
    ] { #expect(text.contains(expected)) }
  }

  @Test("a shard that is cut off")
  func truncated() throws {
    let file = model.appending(path: "transformer/\(Part.all[0].file)")
    let data = try Data(contentsOf: file)
    try data.dropLast(100).write(to: file)
    #expect(load().contains("truncated"))
  }

  @Test("an index that names a shard without the key")
  func wrongIndex() throws {
    try change(Part.all[0]) { $0[Part.all[0].key] = nil }
    #expect(load().contains("the index places \(Part.all[0].key) in \(Part.all[0].file)"))
  }

  @Test("no model_index.json, no folder, no weights, no config")
  func absent() throws {
    let files = FileManager.default
    #expect(message { try Self.load(scratch.path("nowhere")) }.contains("no such folder"))
    try files.removeItem(at: model.appending(path: "text_encoder/model.safetensors"))
    #expect(load().contains("no weights: expected model.safetensors, or the same with .index.json"))
    try files.removeItem(at: model.appending(path: "vae/config.json"))
    #expect(load().contains("vae/config.json: cannot be read"))
    try files.removeItem(at: model.appending(path: "model_index.json"))
    #expect(load().contains("no model_index.json"))
  }

  @Test("another pipeline class, or none")
  func pipelineClass() throws {
    try edit("model_index.json", "\"FluxPipeline\"", "\"StableDiffusionXLPipeline\"")
    #expect(
      load().contains(
        "StableDiffusionXLPipeline is not supported; expected FluxPipeline or StableDiffusion3Pipeline"))
    try Data("{}".utf8).write(to: model.appending(path: "model_index.json"))
    #expect(load().contains("model_index.json: field _class"))
    try Data("[".utf8).write(to: model.appending(path: "model_index.json"))
    #expect(load().contains("not valid JSON"))
  }

  @Test("configurations that contradict the weights or each other")
  func contradictions() throws {
    try edit("transformer/config.json", "\"num_layers\": 2", "\"num_layers\": 3")
    let missing = load()
    #expect(missing.contains("parameters not set (transformer_blocks.2.") && missing.contains(", …"))
    try edit("transformer/config.json", "\"num_layers\": 3", "\"num_layers\": \"two\"")
    #expect(load().contains("has the wrong type"))
    try edit("transformer/config.json", "\"num_layers\": \"two\"", "\"num_layers\": 2")
    try edit("transformer/config.json", "\"attention_head_dim\": 16", "\"attention_head_dim\": 8")
    #expect(
      load().contains("axes_dims_rope [4, 6, 6] must be three even sizes with sum attention_head_dim 8"))
  }

  @Test("a scheduler option this version does not compute")
  func schedulerOption() throws {
    try edit("scheduler/scheduler_config.json", "\"use_karras_sigmas\": false", "\"use_karras_sigmas\": true")
    let text = load()
    #expect(text.contains("scheduler_config.json") && text.contains("use_karras_sigmas"))
  }

  @Test(
    "sizes that are not multiples of a token, and the nearest that are",
    arguments: [
      (40, 64, "48 × 64"), (64, 39, "64 × 32"), (0, 64, "16 × 64"), (64, -16, "64 × 16"), (8, 8, "16 × 16"),
    ])
  func resolution(_ height: Int, _ width: Int, _ near: String) throws {
    let pipeline = try ImagePipelines.load(model)
    let text = message { _ = try pipeline.grid(height: height, width: width) }
    #expect(text == "\(height) × \(width) pixels: this model takes multiples of 16, such as \(near)")
    #expect(try pipeline.grid(height: 32, width: 48) == (2, 3))
  }

  @Test("guidance missing, and guidance that the model does not embed")
  func guidance() throws {
    let inputs = try TinyInputs(batch: 2)
    let without = message { _ = try inputs.velocity(Fixtures.transformer(), guidance: nil) }
    #expect(without.contains("embeds a guidance scale: set sampling.guidance"))
    let mini = Fixtures.parity.appending(path: "../../../Models/flux-mini/transformer")
    let network = try FluxTransformer(folder: mini)
    func run(_ guidance: Tensor?) throws {
      _ = try network(
        Tensor.zeros([2, 4, 32]), text: Tensor.zeros([2, 3, 128]), pooled: Tensor.zeros([2, 96]),
        timestep: Tensor([Float(1), 0.5]), guidance: guidance, grid: (2, 2))
    }
    try run(nil)
    #expect(message { try run(try Tensor([Float(3.5), 3.5])) }.contains("embeds no guidance scale"))
  }

  @Test("latents that do not fill the grid")
  func grid() throws {
    let text = message {
      _ = try Fixtures.transformer()(
        Tensor.zeros([1, 5, 64]), text: Tensor.zeros([1, 3, 32]), pooled: Tensor.zeros([1, 24]),
        timestep: Tensor([Float(1)]), guidance: Tensor([Float(1)]), grid: (2, 3))
    }
    #expect(text == "latents of 5 tokens do not fill a grid of 2 × 3")
  }
}

@Suite("FLUX transformer: what rollout and replay rely on")
struct FluxTransformerTests {
  /// Products of two rows round alike with those of more on processors with AVX-512; with AVX2 alone (AMD EPYC) from
  /// three on. Rollout and replay do not rely on it: their passes have equally many rows.
  private let leastRows = TorchRuntime.nativeBFloat16 ? 2 : 3

  // Hazard 1: clip ranges are 5e-5, so rows must not depend on their number in any bit; no tolerance.
  @Test("float32 velocities of n rows equal those rows of a batch of 48, bit for bit")
  func batchInvariance() throws {
    let inputs = try TinyInputs(batch: 48)
    let network = try Fixtures.transformer()
    let whole = try inputs.velocity(network)
    let each = whole.count / 48
    for n in leastRows...33 {
      #expect(try inputs.velocity(network, first: n) == Array(whole[..<(n * each)]), "batch of \(n)")
    }
  }

  @Test("the same with an adapter and with all weights trainable", arguments: [true, false])
  func batchInvarianceTrained(_ adapter: Bool) throws {
    let inputs = try TinyInputs(batch: 48)
    let network = try Fixtures.transformer()
    if adapter { _ = try LoRAAdapter(Fixtures.lora, for: network.modules) }
    if !adapter { try network.modules.makeTrainable() }
    let whole = try inputs.velocity(network)
    for n in [leastRows, 3, 5, 7, 16, 31, 33] {
      #expect(
        try inputs.velocity(network, first: n) == Array(whole[..<(n * whole.count / 48)]), "batch of \(n)")
    }
  }

  @Test("rows do not depend on their neighbours' values")
  func neighbours() throws {
    let inputs = try TinyInputs(batch: 6)
    let network = try Fixtures.transformer()
    let whole = try inputs.velocity(network)
    let order = try Tensor([Int64(3), 0, 5, 1, 4, 2])
    let condition = Condition([
      try inputs.text.indexSelect(0, order), try inputs.pooled.indexSelect(0, order),
    ])
    let shuffled = try withoutGrad {
      try FluxFlowModel(network, grid: inputs.grid).velocity(
        inputs.latents.indexSelect(0, order), times: inputs.times.indexSelect(0, order), condition: condition,
        guidance: 3.5
      ).floats()
    }
    let each = whole.count / 6
    for (row, source) in try order.int64s().enumerated() {
      let expected = whole[(Int(source) * each)..<((Int(source) + 1) * each)]
      #expect(shuffled[(row * each)..<((row + 1) * each)].elementsEqual(expected))
    }
  }

  @Test("both attention kernels agree")
  func kernels() throws {
    let inputs = try TinyInputs(batch: 3)
    let network = try Fixtures.transformer()
    network.attentionKernel = .math
    let math = try inputs.velocity(network)
    network.attentionKernel = .sdpa
    // one function in two orders of summation: float32 rounding over four blocks, a wrong scale gives 1e-1
    #expect(largestDifference(try inputs.velocity(network), math) < 1e-5)
  }

  @Test("packing is undone by unpacking, and puts a 2 × 2 block of a channel side by side")
  func packing() throws {
    let x = try Tensor((0..<(2 * 3 * 4 * 6)).map(Float.init), shape: [2, 3, 4, 6])
    let packed = try FluxPipeline.pack(x)
    #expect(packed.shape == [2, 6, 12])
    #expect(try FluxPipeline.unpack(packed, grid: (2, 3)).floats() == x.floats())
    // token (row 1, column 2), channel 1: pixels (2…3, 4…5) of that channel
    #expect(Array(try packed[0][5].floats()[4..<8]) == [40, 41, 46, 47] as [Float])
  }
}
