import Foundation
import Testing
import Torch
import TorchNN

@testable import FlowModels

@Suite("LoRA adapters")
struct LoRAFileTests {
  let inputs: TinyInputs
  let network: FluxTransformer
  let base: [Float]
  let scratch: Scratch

  init() throws {
    inputs = try TinyInputs(batch: 3)
    network = try Fixtures.transformer()
    base = try inputs.velocity(network)
    scratch = try Scratch()
  }

  private func fresh(_ targets: [String], rank: Int = 4, alpha: Double = 8) throws -> LoRAAdapter {
    try LoRAAdapter(network.modules, rank: rank, alpha: alpha, targets: targets) { path, count in
      (0..<count).map { Float(($0 * 7 + path.count) % 19) / 9.5 - 1 }
    }
  }

  /// Makes B of every layer non-zero, so that the adapter shows.
  private func stir(_ adapter: LoRAAdapter) throws {
    for (path, layer) in adapter.layers {
      try layer.up.copy(from: Fixtures.normals(layer.up.shape, path) * 0.1)
    }
  }

  // B = 0: adding a zero product changes no bit, so no tolerance.
  @Test(
    "a fresh adapter leaves the output as it was, bit for bit",
    arguments: [["to_q", "to_v"], ["all-linear"]])
  func freshIsBase(_ targets: [String]) throws {
    let adapter = try fresh(targets)
    #expect(try adapter.layers.values.contains { try $0.down.floats().contains { $0 != 0 } })
    #expect(try inputs.velocity(network) == base)
  }

  @Test("fresh A lies within ±1/√in (PEFT's Kaiming uniform with a = √5)")
  func initialRange() throws {
    let down = try #require(try fresh(["ff.net.2"]).layers["transformer_blocks.0.ff.net.2"]).down
    #expect(down.shape == [4, 128])
    let bound = 1 / Float(128).squareRoot()
    let values = try down.floats()
    #expect(values.allSatisfy { abs($0) <= bound } && values.contains { abs($0) > 0.9 * bound })
  }

  @Test("disabling restores the base bit for bit, enabling brings the adapter back")
  func disabling() throws {
    let adapter = try fresh(["all-linear"])
    try stir(adapter)
    let tuned = try inputs.velocity(network)
    #expect(largestDifference(tuned, base) > 1e-2)
    adapter.disable()
    #expect(try inputs.velocity(network) == base)
    adapter.enable()
    #expect(try inputs.velocity(network) == tuned)
  }

  // Alpha folded into B rounds once where scale · B rounded once before: 1e-6 of the largest output.
  @Test(
    "written and read again it gives the same output; alpha/rank is folded into B", arguments: [3.0, 4, 8])
  func roundTrip(_ alpha: Double) throws {
    let adapter = try fresh(["to_q", "to_k", "to_v", "to_out.0", "proj_mlp"], alpha: alpha)
    try stir(adapter)
    let tuned = try inputs.velocity(network)
    let file = scratch.path("pytorch_lora_weights.safetensors")
    try adapter.write(to: file)

    let written = try SafetensorsFile(file)
    #expect(written.names.count == 2 * adapter.layers.count)
    #expect(written.names.allSatisfy { $0.hasPrefix("transformer.") && !$0.hasSuffix(".alpha") })
    let layer = "transformer_blocks.1.attn.to_out.0"
    let up = try written.require("transformer.\(layer).lora_B.weight").floats()
    #expect(up == (try adapter.layers[layer]!.up.floats()).map { $0 * Float(alpha / 4) })

    let other = try Fixtures.transformer()
    let read = try LoRAAdapter(file, for: other.modules)
    #expect(read.layers.values.allSatisfy { $0.scale == 1 })
    #expect(largestDifference(try inputs.velocity(other), tuned) < 1e-6)
  }

  // MARK: - scale: alpha/rank, however the file says it. The oracle is the weights merged by hand.

  /// The output with W + scale·B·A in place of every adapted W.
  private func merged(_ scale: Double) throws -> [Float] {
    let file = try SafetensorsFile(Fixtures.lora)
    let merged = try Fixtures.transformer()
    for name in file.names where name.hasSuffix("lora_A.weight") {
      let stem = String(name.dropLast(".lora_A.weight".count))
      let product = try file.require(stem + ".lora_B.weight").matmul(try file.require(name))
      let linear = try #require(merged.modules.linears[String(stem.dropFirst("transformer.".count))])
      try linear.weight.tensor.copy(from: try linear.weight.tensor + product * scale)
    }
    return try inputs.velocity(merged)
  }

  private func read(_ file: URL) throws -> [Float] {
    let adapter = try LoRAAdapter(file, for: network.modules)
    defer { adapter.disable() }
    return try inputs.velocity(network)
  }

  /// The fixture's tensors with other metadata.
  private func write(
    _ metadata: [String: String], _ change: (inout [String: Tensor]) throws -> Void = { _ in }
  )
    throws -> URL
  {
    let source = try SafetensorsFile(Fixtures.lora)
    var tensors: [String: Tensor] = [:]
    for name in source.names { tensors[name] = try source.require(name) }
    try change(&tensors)
    let file = scratch.path("adapter.safetensors")
    try Safetensors.write(tensors, metadata: metadata, to: file)
    return file
  }

  // Tolerance of these: x(W + sBA)ᵀ and xWᵀ + s(xAᵀ)Bᵀ round differently, 1e-6 a layer over some 40 layers.
  @Test("alpha in the metadata, as diffusers writes it: 8/4")
  func metadataAlpha() throws {
    #expect(largestDifference(try read(Fixtures.lora), try merged(2)) < 2e-5)
    #expect(largestDifference(try merged(1), try merged(2)) > 1e-3, "the scale must matter here")
  }

  @Test("an alpha tensor beside each layer wins over the metadata")
  func alphaTensor() throws {
    let metadata = try SafetensorsFile(Fixtures.lora).metadata
    let file = try write(metadata) { tensors in
      for name in tensors.keys where name.hasSuffix("lora_A.weight") {
        tensors[String(name.dropLast("lora_A.weight".count)) + "alpha"] = try Tensor([Float(12)], shape: [])
      }
    }
    #expect(largestDifference(try read(file), try merged(3)) < 2e-5)
  }

  @Test("neither form: 1, as diffusers does")
  func noAlpha() throws {
    #expect(largestDifference(try read(write(["format": "pt"])), try merged(1)) < 2e-5)
  }

  @Test("alpha_pattern names layers with another alpha")
  func alphaPattern() throws {
    let json = #"{"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_q": 4}}"#
    let file = try write(["lora_adapter_metadata": json])
    let adapter = try LoRAAdapter(file, for: network.modules)
    #expect(adapter.layers["transformer_blocks.0.attn.to_q"]?.scale == 1)
    #expect(adapter.layers["transformer_blocks.0.attn.to_k"]?.scale == 2)
    #expect(adapter.layers["single_transformer_blocks.1.attn.to_q"]?.scale == 1)
  }

  // MARK: - files that do not fit

  @Test("metadata that is not JSON")
  func badMetadata() throws {
    let file = try write(["lora_adapter_metadata": "{"])
    #expect(message { _ = try read(file) }.contains("lora_adapter_metadata is not a JSON object"))
  }

  @Test("keys of another model are listed")
  func otherModel() throws {
    let file = try write([:]) {
      $0["transformer.transformer_blocks.7.attn.to_q.lora_A.weight"] = try Tensor.zeros([4, 32])
      $0["transformer.transformer_blocks.7.attn.to_q.lora_B.weight"] = try Tensor.zeros([32, 4])
      $0["text_encoder.a.lora_A.weight"] = try Tensor.zeros([4, 32])
    }
    let text = message { _ = try read(file) }
    #expect(
      text.contains("3 keys fit no layer of the model") && text.contains("transformer_blocks.7.attn.to_q"))
    #expect(text.contains("text_encoder.a.lora_A.weight") && text.contains("adapter.safetensors"))
    #expect(network.modules.linears.values.allSatisfy { $0.adapter == nil })
  }

  @Test("factors of other sizes, a factor without its twin, NaN, and no adapter at all")
  func badFactors() throws {
    let stem = "transformer.transformer_blocks.0.attn.to_q"
    var file = try write([:]) { $0[stem + ".lora_A.weight"] = try Tensor.zeros([4, 16]) }
    #expect(
      message { _ = try read(file) }.contains(
        "transformer_blocks.0.attn.to_q: A [4, 16] and B [32, 4] do not fit a layer 32 → 32"))
    file = try write([:]) { $0[stem + ".lora_B.weight"] = nil }
    #expect(message { _ = try read(file) }.contains("no tensor \(stem).lora_B.weight"))
    file = try write([:]) { $0[stem + ".lora_A.weight"] = nil }
    #expect(
      message { _ = try read(file) }.contains("1 keys fit no layer of the model (\(stem).lora_B.weight)"))
    file = try write([:]) { $0[stem + ".lora_B.weight"] = try Tensor.full([32, 4], .nan) }
    #expect(message { _ = try read(file) }.contains("attn.to_q: NaN or infinite values"))
    file = try write([:]) { $0 = [:] }
    #expect(message { _ = try read(file) }.contains("holds no LoRA layer"))
  }

  // MARK: - targets

  @Test("targets that match nothing are named, with what the model has")
  func unknownTargets() throws {
    let text = message { _ = try fresh(["to_q", "query", "o_proj"]) }
    #expect(text.contains("no linear layer matches query, o_proj; the model has "))
    for name in ["attn.to_q", "attn.add_k_proj", "ff.net.0.proj", "proj_mlp", "x_embedder"] {
      #expect(text.contains(name))
    }
  }

  @Test("a target matches whole components: to_k takes no add_k_proj, to_out.0 no to_add_out")
  func wholeComponents() throws {
    let paths = try fresh(["to_k", "to_out.0"]).layers.keys.sorted()
    #expect(
      paths == [
        "single_transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.attn.to_k",
        "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.1.attn.to_k", "transformer_blocks.1.attn.to_out.0",
      ])
    let one = try fresh(["k_proj", "add_k_proj"].filter { $0 == "add_k_proj" })
    #expect(one.layers.count == 2)
    #expect(message { _ = try fresh(["k_proj"]) }.contains("matches k_proj"))
  }

  @Test("all-linear takes every linear layer, a whole path exactly one")
  func allLinear() throws {
    #expect(Set(try fresh(["all-linear"]).layers.keys) == Set(network.modules.linears.keys))
    let one = try fresh(["transformer_blocks.0.attn.to_q"])
    #expect(Array(one.layers.keys) == ["transformer_blocks.0.attn.to_q"])
    #expect(Set(one.parameters.keys.map { $0.suffix(13) }) == ["lora_A.weight", "lora_B.weight"])
  }
}
