import Foundation
import Testing
import Torch
import TorchNN

@testable import FlowModels

/// Oracle: W + scale·B·A written out by hand, and the files of the model that was merged into.
@Suite("merging an adapter")
struct ModelMergeTests {
  let scratch: Scratch
  let inputs: TinyInputs

  init() throws {
    scratch = try Scratch()
    inputs = try TinyInputs(batch: 2)
  }

  private func files(_ folder: URL) throws -> [String] {
    try FileManager.default.subpathsOfDirectory(atPath: folder.path).sorted()
  }
  private func merge(_ model: URL, scale: Double = 1, adapter: URL = Fixtures.lora) throws -> (
    URL, ModelMerge.Report
  ) {
    let out = scratch.path("merged")
    return (out, try ModelMerge.merge(model, try LoRAFile(adapter), scale: scale, to: out))
  }

  // Same sums in another order: 1e-6 a layer over some 40 layers.
  @Test("the merged folder draws as base and adapter do, and has the same files")
  func output() throws {
    let network = try Fixtures.transformer()
    let base = try inputs.velocity(network)
    _ = try LoRAAdapter(Fixtures.lora, for: network.modules)
    let (out, report) = try merge(Fixtures.tiny)
    let merged = try inputs.velocity(FluxTransformer(folder: out.appending(path: "transformer")))
    #expect(largestDifference(merged, try inputs.velocity(network)) < 2e-5)
    #expect(largestDifference(merged, base) > 1e-2)
    #expect(report.layers == 30 && report.leftOut.isEmpty)
    #expect(
      report.shards == (1...2).map { "diffusion_pytorch_model-0000\($0)-of-00002.safetensors" })
    #expect(try files(out) == files(Fixtures.tiny))
    let shards = Set(report.shards.map { "transformer/" + $0 })
    for name in try files(Fixtures.tiny) where name.contains("/") && !shards.contains(name) {
      #expect(
        FileManager.default.contentsEqual(
          atPath: out.appending(path: name).path, andPath: Fixtures.tiny.appending(path: name).path),
        "\(name)")
    }
  }

  @Test("every weight: adapted ones are W + scale·B·A rounded once to their dtype, the others bit for bit")
  func weights() throws {
    let model = try scratch.model()
    let adapter = try SafetensorsFile(Fixtures.lora)
    let names = try FileManager.default.contentsOfDirectory(atPath: model.appending(path: "transformer").path)
      .filter { $0.hasSuffix(".safetensors") }
    // One shard in bfloat16, the other in float16.
    for (name, dtype) in zip(names.sorted(), [DType.bfloat16, .float16]) {
      try rewrite(model.appending(path: "transformer/\(name)")) { tensors in
        for (key, tensor) in tensors { tensors[key] = try tensor.to(dtype) }
      }
    }
    let (out, _) = try merge(model, scale: 0.5)
    var adapted = 0
    for name in names {
      let before = try SafetensorsFile(model.appending(path: "transformer/\(name)"))
      let after = try SafetensorsFile(out.appending(path: "transformer/\(name)"))
      #expect(after.names == before.names && after.metadata == before.metadata)
      for key in before.names {
        let (old, new) = (try before.require(key), try after.require(key))
        let stem = "transformer." + key.dropLast(".weight".count)
        guard let down = try adapter.tensor(stem + ".lora_A.weight") else {
          #expect(try new.bytes() == old.bytes(), "\(key)")
          continue
        }
        adapted += 1
        // alpha/r is 2 in this file: 0.5 · 2 = 1. In float64, so that only the stored value's rounding is
        // left: half a unit in the last of bfloat16's 8 or float16's 11 bits, and float32's noise on a tie.
        let product = try adapter.require(stem + ".lora_B.weight").to(.float64).matmul(try down.to(.float64))
        let expected = try (try old.to(.float64) + product).doubles()
        let unit = old.dtype == .bfloat16 ? 0x1p-8 : 0x1p-11
        for (got, want) in zip(try new.doubles(), expected) {
          #expect(abs(got - want) <= 1.001 * unit * abs(want) + 1e-7, "\(key)")
        }
      }
    }
    #expect(adapted == 30)
  }

  @Test("links of a hub cache are resolved; weights without the adapter and hidden files are left out")
  func hubCache() throws {
    let model = try scratch.model()
    let blobs = scratch.path("blobs")
    try FileManager.default.createDirectory(at: blobs, withIntermediateDirectories: true)
    for (i, name) in try files(model).enumerated() {
      let file = model.appending(path: name)
      var isFolder: ObjCBool = false
      _ = FileManager.default.fileExists(atPath: file.path, isDirectory: &isFolder)
      if isFolder.boolValue { continue }
      try FileManager.default.moveItem(at: file, to: blobs.appending(path: "\(i)"))
      try FileManager.default.createSymbolicLink(at: file, withDestinationURL: blobs.appending(path: "\(i)"))
    }
    let before = try files(model)
    for name in [".cache", "flux1-dev.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors"] {
      try Data("old".utf8).write(to: model.appending(path: name))
    }
    let (out, report) = try merge(model)
    #expect(
      report.leftOut == ["flux1-dev.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors"])
    #expect(try files(out) == before)
    for name in before {
      let type = try FileManager.default.attributesOfItem(atPath: out.appending(path: name).path)[.type]
      #expect(type as? FileAttributeType != .typeSymbolicLink, "\(name)")
    }
    // Other weights take no second place on the disk.
    func inode(_ file: URL) throws -> Int? {
      try FileManager.default.attributesOfItem(atPath: file.path)[.systemFileNumber] as? Int
    }
    let vae = "vae/diffusion_pytorch_model.safetensors"
    #expect(
      try inode(out.appending(path: vae)) == inode(model.appending(path: vae).resolvingSymlinksInPath()))
  }

  @Test("a failure leaves nothing behind; what is there already is left alone")
  func failures() throws {
    let model = try scratch.model()
    struct Stop: Error {}
    let before = try files(scratch.url)
    let out = scratch.path("merged")
    #expect(throws: Stop.self) {
      try ModelMerge.merge(model, try LoRAFile(Fixtures.lora), to: out) { _, done, _ in
        if done == 20 { throw Stop() }
      }
    }
    #expect(try files(scratch.url) == before)
    let shard = model.appending(path: "transformer/diffusion_pytorch_model-00002-of-00002.safetensors")
    try rewrite(shard) { tensors in
      for (key, tensor) in tensors { tensors[key] = try tensor.to(.float16) }
    }
    #expect(
      message { _ = try merge(model, scale: 1e7) }.contains("beyond the range of float16; lower --scale"))
    #expect(try files(scratch.url) == before)
    try Data("mine".utf8).write(to: out)
    #expect(message { _ = try merge(model) }.contains("merged is there already and is not an empty folder"))
    #expect(try Data(contentsOf: out) == Data("mine".utf8))
    try FileManager.default.removeItem(at: out)
    try FileManager.default.createDirectory(at: out, withIntermediateDirectories: true)
    _ = try merge(model)
    #expect(FileManager.default.fileExists(atPath: out.appending(path: "model_index.json").path))
    let nowhere = scratch.path("no/where")
    let text = message { _ = try ModelMerge.merge(model, try LoRAFile(Fixtures.lora), to: nowhere) }
    #expect(text.contains("/no: cannot be written"))
  }

  @Test("integer weights and an adapter that does not fit are refused before anything is written")
  func refusals() throws {
    let model = try scratch.model()
    let shard = model.appending(path: "transformer/diffusion_pytorch_model-00001-of-00002.safetensors")
    let key = "transformer_blocks.0.attn.to_q.weight"
    try rewrite(shard) { tensors in tensors[key] = try tensors[key]?.to(.uint8) }
    #expect(message { _ = try merge(model) }.contains("\(key): uint8 weights cannot take an adapter"))
    try rewrite(shard) { tensors in tensors[key] = nil }
    let before = try files(scratch.url)
    let text = message { _ = try merge(model) }
    #expect(text.contains("does not hold it") || text.contains("1 of 30 layers are not in this model"))
    #expect(try files(scratch.url) == before)
  }

  // MARK: - full fine-tuning

  /// A transformer folder as a run writes it: every tensor of `model` in float32, moved by `change`.
  private func trained(
    _ model: URL, _ change: (inout [String: Tensor]) throws -> Void = { _ in }
  ) throws -> URL {
    let (part, folder) = (model.appending(path: "transformer"), scratch.path("trained"))
    try? FileManager.default.removeItem(at: folder)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    try FileManager.default.copyItem(
      at: part.appending(path: "config.json"), to: folder.appending(path: "config.json"))
    var tensors: [String: Tensor] = [:]
    for shard in try Checkpoint(folder: part).shards {
      for key in shard.names { tensors[key] = try shard.require(key).to(.float32) + 0.001 }
    }
    try change(&tensors)
    try Safetensors.write(tensors, to: folder.appending(path: "diffusion_pytorch_model.safetensors"))
    return folder
  }

  // Oracle: the trained values, rounded by PyTorch's own conversion.
  @Test("trained weights replace the model's: every value, in the model's dtype, files and index")
  func replacement() throws {
    let model = try scratch.model()
    let shard = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
    try rewrite(model.appending(path: shard)) { tensors in
      for (key, tensor) in tensors { tensors[key] = try tensor.to(.bfloat16) }
    }
    let folder = try trained(model)
    let out = scratch.path("replaced")
    let report = try ModelMerge.replace(model, by: folder, to: out)
    let weights = try SafetensorsFile(folder.appending(path: "diffusion_pytorch_model.safetensors"))
    #expect(report.replaced == weights.names.count && report.layers == 0 && report.shards.count == 2)
    #expect(try files(out) == files(model))
    for name in report.shards {
      let before = try SafetensorsFile(model.appending(path: "transformer/\(name)"))
      let after = try SafetensorsFile(out.appending(path: "transformer/\(name)"))
      #expect(after.names == before.names && after.metadata == before.metadata)
      for key in before.names {
        let (old, new) = (try before.require(key), try after.require(key))
        #expect(new.dtype == old.dtype && new.dtype == (shard.hasSuffix(name) ? .bfloat16 : .float32))
        #expect(try new.bytes() == weights.require(key).to(old.dtype).bytes(), "\(key)")
      }
    }
    // The folder itself, its file, and the run around it name the same.
    for named in [folder, folder.appending(path: "diffusion_pytorch_model.safetensors")] {
      #expect(ModelMerge.trainedTransformer(named)?.path == folder.path)
    }
    try FileManager.default.moveItem(at: folder, to: scratch.path("adapter"))
    #expect(ModelMerge.trainedTransformer(scratch.url)?.path == scratch.path("adapter").path)
    #expect(ModelMerge.trainedTransformer(model) == nil)
  }

  @Test("weights that are not this model's, or not numbers, are refused and nothing is written")
  func replacementRefused() throws {
    let model = try scratch.model()
    let key = "context_embedder.weight"
    func text(_ words: [String], _ change: (inout [String: Tensor]) throws -> Void) throws {
      let folder = try trained(model, change)
      let before = try files(scratch.url)
      let text = message { _ = try ModelMerge.replace(model, by: folder, to: scratch.path("out")) }
      for word in words { #expect(text.contains(word), "\(word): \(text)") }
      #expect(try files(scratch.url) == before)
    }
    try text(["trained: does not fit", "1 tensors of the model are missing (\(key))"]) { $0[key] = nil }
    try text(["1 tensors are not in the model (extra)"]) { $0["extra"] = try Tensor([1.0]) }
    try text(["\(key): expected [32, 32], got [32]", "name the model that was trained"]) {
      $0[key] = try Tensor.zeros([32])
    }
    try text(["\(key): NaN or infinite values", "earlier checkpoint"]) {
      $0[key] = try Tensor.zeros([32, 32]) * .nan
    }
    let folder = try trained(model)
    let config = folder.appending(path: "config.json")
    let stored = try String(contentsOf: config, encoding: .utf8)
    try stored.replacingOccurrences(of: "\"num_layers\": 2", with: "\"num_layers\": 3")
      .write(to: config, atomically: true, encoding: .utf8)
    func replace() -> String {
      message { _ = try ModelMerge.replace(model, by: folder, to: scratch.path("out")) }
    }
    #expect(replace().contains("config.json: num_layers: expected 2 as in"))
    try FileManager.default.removeItem(at: config)
    #expect(replace().contains("config.json: missing or not a JSON object"))
    // Versions and paths are no difference.
    try stored.replacingOccurrences(of: "\"_diffusers_version\": \"", with: "\"_diffusers_version\": \"9")
      .write(to: config, atomically: true, encoding: .utf8)
    for name in try files(model.appending(path: "transformer")) where name.hasSuffix(".safetensors") {
      try rewrite(model.appending(path: "transformer/\(name)")) { tensors in
        for (key, tensor) in tensors { tensors[key] = try tensor.to(.float16) }
      }
    }
    try rewrite(folder.appending(path: "diffusion_pytorch_model.safetensors")) {
      $0[key] = try Tensor.zeros([32, 32]) + 1e6
    }
    #expect(replace().contains("\(key): has values beyond the range of float16"))
    #expect(!FileManager.default.fileExists(atPath: scratch.path("out").path))
  }
}
