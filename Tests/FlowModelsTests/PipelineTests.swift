import Foundation
import Testing
import Torch
import TorchNN

@testable import FlowModels

/// v = slope·x + the condition's first entry: everything about guidance can be worked out by hand.
private final class Affine: FlowModel {
  let modules = ModuleRegistry()
  var passes = 0
  func velocity(_ latents: Tensor, times: Tensor, condition: Condition, guidance: Double?) throws -> Tensor {
    passes += 1
    #expect(guidance == nil)
    return try latents * times.reshape(-1, 1) + condition.tensors[0]
  }
}

@Suite("pipelines and prompt embeddings")
struct PipelineTests {
  let scratch: Scratch
  init() throws { scratch = try Scratch() }

  // Oracle: closed form; all numbers are exact in float32.
  @Test("classifier-free guidance is v⁻ + g·(v⁺ − v⁻), in one pass; a scale of 1 asks for no second branch")
  func guided() throws {
    let base = Affine()
    let negative = Condition([try Tensor([Float(-1), 4], shape: [1, 2])])
    let model = GuidedFlowModel(base, negative: negative)
    let x = try Tensor([Float(1), 2, 3, 4], shape: [2, 2])
    let times = try Tensor([Float(2), 3])
    let condition = Condition([try Tensor([Float(10), 20, 30, 40], shape: [2, 2])])
    func run(_ scale: Double?) throws -> [Float] {
      try model.velocity(x, times: times, condition: condition, guidance: scale).floats()
    }
    // t·x + c⁻ + g·(c⁺ − c⁻)
    let expected: [Float] = [50.5, 80, 147.5, 178]  // 2 − 1 + 49.5, 4 + 4 + 72, 9 − 1 + 139.5, 12 + 4 + 162
    #expect(try run(4.5) == expected)
    #expect(base.passes == 1)
    let plain: [Float] = [12, 24, 39, 52]
    #expect(try run(1) == plain && run(nil) == plain)
  }

  @Test("an SD3 folder without T5 conditions on zeros in its place")
  func withoutT5() throws {
    let model = scratch.path("sd3")
    try FileManager.default.copyItem(at: Fixtures.parity.appending(path: "sd3-tiny"), to: model)
    let whole = try ImagePipelines.load(model).text.encode("a cat")
    for part in ["text_encoder_3", "tokenizer_3"] {
      try FileManager.default.removeItem(at: model.appending(path: part))
    }
    let pipeline = try ImagePipelines.load(model)
    let condition = try pipeline.text.encode("a cat")
    #expect(condition.tensors[0].shape == [1, 77 + 256, 48] && condition.tensors[1].shape == [1, 40])
    #expect(try condition.tensors[0].narrow(1, 0, 77).floats() == whole.tensors[0].narrow(1, 0, 77).floats())
    #expect(try condition.tensors[0].narrow(1, 77, 256).floats().allSatisfy { $0 == 0 })
  }

  @Test("latents that are too large for SD3's position table are refused")
  func positions() throws {
    let network = try SD3Transformer(folder: Fixtures.parity.appending(path: "sd3-tiny/transformer"))
    let text = message {
      _ = try network(
        Tensor.zeros([1, 16, 32, 8]), text: Tensor.zeros([1, 3, 48]), pooled: Tensor.zeros([1, 40]),
        timestep: Tensor([Float(1)]))
    }
    #expect(text.contains("16 × 4 patches exceed the position table of 12 a side"))
  }

  @Test("stored embeddings come back bit for bit; other encoders, other lengths and damage are refused")
  func store() throws {
    let model = try scratch.model()
    var options = PipelineOptions()
    options.textLength = 12
    let folder = try ModelFolder(model)
    let text = try ImagePipelines.text(folder, options)
    let store = try EmbeddingStore(scratch.path("store"), for: text)
    let condition = try text.encode("a red cat")
    try store.save(condition, truncated: 3, for: "a red cat")
    #expect(store.contains("a red cat") && !store.contains("a red cat "))
    let again = try EmbeddingStore(scratch.path("store"), for: text)
    let loaded = try #require(try again.load("a red cat"))
    #expect(loaded.truncated == 3)
    #expect(
      try loaded.condition.tensors.map { try $0.floats() } == condition.tensors.map { try $0.floats() })
    #expect(try again.load("another") == nil)

    options.textLength = 13
    let longer = try ImagePipelines.text(folder, options)
    #expect(
      message { _ = try EmbeddingStore(scratch.path("store"), for: longer) }
        .contains("embeddings of [77, 12] tokens, the model is set to [77, 13]"))
    try rewrite(model.appending(path: "text_encoder/model.safetensors")) {
      let key = "text_model.final_layer_norm.bias"
      $0[key] = try $0[key]! + 1
    }
    options.textLength = 12
    let other = try ImagePipelines.text(folder, options)
    #expect(
      message { _ = try EmbeddingStore(scratch.path("store"), for: other) }.contains("by other encoders"))
    try Data("{".utf8).write(to: scratch.path("store").appending(path: "store.json"))
    #expect(message { _ = try EmbeddingStore(scratch.path("store"), for: other) }.contains("damaged"))
  }

  @Test("no encoder and no embeddings: said with the way out")
  func neither() throws {
    let model = try scratch.model()
    for part in ["text_encoder", "text_encoder_2"] {
      try FileManager.default.removeItem(at: model.appending(path: "\(part)/model.safetensors"))
    }
    let text = try ImagePipelines.text(try ModelFolder(model), .init())
    #expect(
      message { _ = try EmbeddingStore(scratch.path("store"), for: text) }
        .contains("no text encoder here and no embeddings in"))
  }

  // Oracle: the definition; a change of any one bit anywhere must show.
  @Test("the content hash tells apart lengths, orders and single bits")
  func contentHash() {
    func hash(_ bytes: [UInt8]...) -> String {
      var hash = ContentHash()
      for part in bytes { part.withUnsafeBytes { hash.combine($0) } }
      return hash.hex
    }
    let base = [UInt8](0..<40)
    var seen: Set<String> = [hash(base), hash(base + [0]), hash(base, []), hash(Array(base.reversed()))]
    #expect(seen.count == 4)
    for bit in 0..<320 {
      var changed = base
      changed[bit / 8] ^= 1 << (bit % 8)
      seen.insert(hash(changed))
    }
    #expect(seen.count == 324)
    #expect(hash([]).count == 32)
  }
}
