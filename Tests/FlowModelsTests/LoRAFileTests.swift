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

  private func alphas(_ value: Float, _ tensors: inout [String: Tensor]) throws {
    for name in tensors.keys where name.hasSuffix("lora_A.weight") {
      tensors[String(name.dropLast("lora_A.weight".count)) + "alpha"] = try Tensor([value], shape: [])
    }
  }

  @Test("alpha tensors and metadata: refused, as in diffusers, unless they agree")
  func alphaTensorsAndMetadata() throws {
    let metadata = try SafetensorsFile(Fixtures.lora).metadata
    var file = try write(metadata) { try alphas(12, &$0) }
    let text = message { _ = try read(file) }
    #expect(text.contains("alpha tensor 12.0/4 and lora_adapter_metadata (scale 2.0) disagree"))
    #expect(text.contains("and 29 more layers") && text.contains("remove one"))
    file = try write(metadata) { try alphas(8, &$0) }
    #expect(try LoRAFile(file).scaling == .both)
    #expect(largestDifference(try read(file), try merged(2)) < 2e-5)
  }

  /// The fixture's tensors under another prefix and other names.
  private func renamed(_ prefix: String, _ naming: LoRAFile.Naming, alpha: Float?) throws -> URL {
    try write(["format": "pt"]) { tensors in
      if let alpha { try alphas(alpha, &tensors) }
      for (name, tensor) in tensors {
        tensors[name] = nil
        var other = prefix + name.dropFirst("transformer.".count)
        if naming == .downUp {
          other = other.replacing("lora_A", with: "lora_down").replacing("lora_B", with: "lora_up")
        }
        tensors[other] = tensor
      }
    }
  }

  @Test(
    "every prefix, with lora_A or lora_down, with alpha (12/4) or without (1)", arguments: LoRAFile.prefixes,
    LoRAFile.Naming.allCases)
  func forms(_ prefix: String, _ naming: LoRAFile.Naming) throws {
    for (alpha, scale) in [(Float(12), 3.0), (nil, 1)] {
      let file = try renamed(prefix, naming, alpha: alpha)
      let lora = try LoRAFile(file)
      #expect(lora.prefix == prefix && lora.naming == naming && lora.layers.count == 30)
      #expect(lora.scaling == (alpha == nil ? .none : .alphaTensors))
      #expect(lora.architecture == .flux)
      #expect(largestDifference(try read(file), try merged(scale)) < 2e-5)
    }
  }

  @Test("two forms in one file, and alpha for some layers only, are refused")
  func mixedForms() throws {
    var file = try write([:]) { tensors in
      let name = "transformer_blocks.0.attn.to_q.lora_A.weight"
      tensors[name] = tensors.removeValue(forKey: "transformer." + name)
    }
    #expect(
      message { _ = try read(file) }.contains(#"keys of different forms in one file ("", "transformer.")"#))
    file = try write([:]) { tensors in
      tensors["transformer.transformer_blocks.0.attn.to_q.alpha"] = try Tensor([Float(8)], shape: [])
    }
    #expect(message { _ = try read(file) }.contains("29 of 30 layers have no alpha tensor"))
    file = try write([:]) { tensors in
      try alphas(8, &tensors)
      tensors["transformer.transformer_blocks.0.attn.to_q.alpha"] = try Tensor([Float(8), 8])
    }
    #expect(message { _ = try read(file) }.contains("attn.to_q.alpha: expected one finite number"))
  }

  // MARK: - PEFT folders

  /// The fixture as a PEFT folder with these settings on top of r = 4, lora_alpha = 8.
  private func peft(_ settings: [String: Any]) throws -> URL {
    let folder = scratch.path("peft")
    try? FileManager.default.removeItem(at: folder)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    let file = try renamed("base_model.model.", .loraAB, alpha: nil)
    try FileManager.default.moveItem(at: file, to: folder.appending(path: "adapter_model.safetensors"))
    let config: [String: Any] = ["peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"]
    try JSONSerialization.data(withJSONObject: config.merging(settings) { $1 })
      .write(to: folder.appending(path: "adapter_config.json"))
    return folder
  }

  // Oracle: LoRA's alpha/r and rsLoRA's alpha/√r (arXiv 2312.03732, eq. 5), merged by hand.
  @Test("PEFT folder: alpha/r, or alpha/√r with use_rslora; the file alone reads its folder's settings too")
  func peftFolder() throws {
    #expect(largestDifference(try read(try peft([:])), try merged(2)) < 2e-5)
    #expect(largestDifference(try read(try peft(["use_rslora": true])), try merged(4)) < 2e-5)
    let file = try peft([:]).appending(path: "adapter_model.safetensors")
    #expect(largestDifference(try read(file), try merged(2)) < 2e-5)
    try FileManager.default.removeItem(at: scratch.path("peft/adapter_config.json"))
    #expect(message { _ = try read(file) }.contains("adapter_config.json must lie beside it"))
  }

  @Test("PEFT patterns: regular expressions for the end of a path, one value a layer")
  func peftPatterns() throws {
    let layers = try LoRAFile(
      peft(["alpha_pattern": ["attn.to_q": 4, "^single_.*to_k": 2, #"ff\.net\.\d"#: 12]])
    ).layers
    func scale(_ path: String) -> Double? { layers.first { $0.path == path }?.scale }
    #expect(scale("transformer_blocks.0.attn.to_q") == 1)
    #expect(scale("single_transformer_blocks.1.attn.to_k") == 0.5)
    #expect(scale("transformer_blocks.1.attn.to_k") == 2)
    #expect(scale("transformer_blocks.1.ff.net.2") == 3)
    #expect(scale("transformer_blocks.1.ff_context.net.2") == 2)
    let both = try peft(["alpha_pattern": ["to_q": 4, "attn.to_q": 2]])
    #expect(message { _ = try read(both) }.contains("several patterns of adapter_config.json: alpha_pattern"))
    let rank = try peft(["rank_pattern": ["attn.to_q": 2]])
    #expect(
      message { _ = try read(rank) }.contains(
        "attn.to_q: adapter_config.json says rank 2, the factors have 4"))
  }

  @Test(
    "PEFT options that change the mathematics are refused by name",
    arguments: [
      ("use_dora", true as any Sendable), ("bias", "all"), ("modules_to_save", ["proj_out"]),
      ("fan_in_fan_out", true), ("peft_type", "LOHA"), ("init_lora_weights", "pissa_niter_16"),
      ("layer_replication", [[0, 2]]), ("lora_alpha", NSNull()),
    ])
  func refusedOptions(_ option: String, _ value: any Sendable) throws {
    let text = message { _ = try read(try peft([option: value])) }
    #expect(text.contains("adapter_config.json: \(option)"))
    #expect(network.modules.linears.values.allSatisfy { $0.adapter == nil })
  }

  @Test("pickles are refused with the command that converts them", arguments: ["bin", "pt", "ckpt"])
  func pickles(_ type: String) throws {
    let file = scratch.path("adapter_model.\(type)")
    try Data([0x80, 2]).write(to: file)
    for url in [file, scratch.url] {
      let text = message { _ = try read(url) }
      #expect(text.contains("a pickle") && text.contains("weights_only=True"))
      #expect(
        text.contains("torch.load('adapter_model.\(type)'") && text.contains("'adapter_model.safetensors'"))
    }
  }

  @Test("neither form: 1, as diffusers does")
  func noAlpha() throws {
    #expect(largestDifference(try read(write(["format": "pt"])), try merged(1)) < 2e-5)
  }

  @Test("alpha_pattern names layers with another alpha")
  func alphaPattern() throws {
    let json =
      #"{"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_q": 4}}"#
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

  /// A file whose only layer is `path`, in → out.
  private func single(_ path: String, _ inSize: Int = 32, _ outSize: Int = 32) throws -> URL {
    try write([:]) {
      $0 = [
        path + ".lora_A.weight": try Tensor.zeros([4, inSize]),
        path + ".lora_B.weight": try Tensor.zeros([outSize, 4]),
      ]
    }
  }

  @Test("layers that the model does not have are listed, with what they are of where that shows")
  func otherModel() throws {
    let file = try write([:]) {
      $0["transformer.transformer_blocks.7.attn.to_q.lora_A.weight"] = try Tensor.zeros([4, 32])
      $0["transformer.transformer_blocks.7.attn.to_q.lora_B.weight"] = try Tensor.zeros([32, 4])
    }
    let text = message { _ = try read(file) }
    #expect(
      text.contains("1 of 31 layers are not in this model (transformer.transformer_blocks.7.attn.to_q.lora_A")
    )
    #expect(text.contains("adapter.safetensors") && text.contains("trained for another model?"))
    let medium = try single("transformer.transformer_blocks.13.attn.to_q", 1536, 1536)
    #expect(message { _ = try read(medium) }.contains("the adapter is for SD3, the model is FLUX.1"))
    for (path, what) in [
      ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "a UNet (Stable Diffusion"),
      ("lora_unet_double_blocks_0_img_attn_qkv", "FLUX.1 in Black Forest Labs' own names"),
      ("diffusion_model.joint_blocks.0.x_block.attn.qkv", "SD3 in Stability AI's own names"),
    ] { #expect(message { _ = try read(try single(path)) }.contains("keys are of \(what)")) }
    #expect(network.modules.linears.values.allSatisfy { $0.adapter == nil })
  }

  @Test("keys of a text encoder, of DoRA, and of no adapter: an error that names them, nothing is attached")
  func keysThatWouldNotApply() throws {
    for (name, words) in [
      ("text_encoder.text_model.a.lora_A.weight", "1 keys adapt a text encoder"),
      ("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector", "DoRA is not supported"),
      ("transformer.transformer_blocks.0.attn.to_q.lora_B.bias", "1 keys belong to no LoRA layer"),
    ] {
      let text = message { _ = try read(try write([:]) { $0[name] = try Tensor.zeros([4]) }) }
      #expect(text.contains("\(words) ") && text.contains(name))
    }
    #expect(network.modules.linears.values.allSatisfy { $0.adapter == nil })
  }

  @Test("factors of other sizes, ranks that differ, a factor without its twin, NaN, and no adapter at all")
  func badFactors() throws {
    let layer = "transformer_blocks.0.attn.to_q"
    let stem = "transformer." + layer
    var file = try write([:]) { $0[stem + ".lora_A.weight"] = try Tensor.zeros([4, 16]) }
    #expect(
      message { _ = try read(file) }.contains(
        "1 of 30 layers do not fit: \(layer): A [4, 16] and B [32, 4] do not fit a layer 32 → 32"))
    file = try write([:]) { $0[stem + ".lora_A.weight"] = try Tensor.zeros([3, 32]) }
    #expect(message { _ = try read(file) }.contains("\(layer): A [3, 32] and B [32, 4]: expected [rank, in]"))
    file = try write([:]) { $0[stem + ".lora_A.weight"] = try Tensor.zeros([4, 32], dtype: .int32) }
    #expect(
      message { _ = try read(file) }.contains("\(layer): factors of int32 and float32, not floating-point"))
    file = try write([:]) { $0[stem + ".lora_B.weight"] = nil }
    #expect(
      message { _ = try read(file) }.contains(
        "\(stem).lora_A.weight stands alone: \(layer).lora_B.weight missing"))
    file = try write([:]) { $0[stem + ".lora_A.weight"] = nil }
    #expect(
      message { _ = try read(file) }.contains(
        "\(stem).lora_B.weight stands alone: \(layer).lora_A.weight missing"))
    file = try write([:]) { $0[stem + ".lora_B.weight"] = try Tensor.full([32, 4], .nan) }
    #expect(message { _ = try read(file) }.contains("attn.to_q: NaN or infinite values"))
    file = try write([:]) { $0 = [:] }
    #expect(message { _ = try read(file) }.contains("holds no LoRA layer"))
    #expect(message { _ = try read(scratch.path("nothing.safetensors")) }.contains("no LoRA adapter"))
    #expect(network.modules.linears.values.allSatisfy { $0.adapter == nil })
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

  /// Linear layers of a published transformer, path → [out, in], from the shapes its files have.
  private func published(_ name: String) throws -> [String: [Int]] {
    let gunzip = Process()
    let output = Pipe()
    gunzip.executableURL = URL(filePath: "/usr/bin/env")
    gunzip.arguments = [
      "gzip", "-dc", Fixtures.parity.appending(path: "shapes/\(name).transformer.json.gz").path,
    ]
    gunzip.standardOutput = output
    try gunzip.run()
    let data = output.fileHandleForReading.readDataToEndOfFile()
    gunzip.waitUntilExit()
    let shapes = try #require(try JSONSerialization.jsonObject(with: data) as? [String: [Int]])
    return Dictionary(
      uniqueKeysWithValues: shapes.filter { $0.key.hasSuffix(".weight") && $0.value.count == 2 }
        .map { (String($0.key.dropLast(".weight".count)), $0.value) })
  }

  // Oracle: blocks times layers a block, by the architecture. FLUX.1-dev: 19 double blocks with 8 projections
  // and 4 MLP layers, 38 single ones with 3 and 2. SD3.5-medium: 24 with 8 and 4, of which the last has no
  // to_add_out and no ff_context, and 13 with attn2's 4.
  @Test(
    "presets on published models",
    arguments: [
      ("flux1-dev", "attention", 19 * 8 + 38 * 3), ("flux1-dev", "attention+mlp", 19 * 12 + 38 * 5),
      ("flux1-dev", "all-linear", 504), ("sd35-medium", "attention", 24 * 8 - 1 + 13 * 4),
      ("sd35-medium", "attention+mlp", 24 * 12 - 3 + 13 * 4), ("sd35-large", "attention", 38 * 8 - 1),
    ])
  func presets(_ model: String, _ preset: String, _ count: Int) throws {
    let sizes = try published(model)
    let paths = try LoRATargets([preset]).select(sizes.keys)
    #expect(paths.count == count)
    if preset != "all-linear" {
      #expect(!paths.contains("proj_out") && !paths.contains { $0.contains("norm") })
    }
  }

  @Test("attn.to_k does not take attn2.to_k; a regular expression matches whole paths")
  func targetForms() throws {
    let paths = try published("sd35-medium").keys
    #expect(try LoRATargets(["attn.to_k"]).select(paths).count == 24)
    #expect(try LoRATargets(["attn2.to_k"]).select(paths).count == 13)
    #expect(try LoRATargets(["to_k"]).select(paths).count == 37)
    #expect(try LoRATargets([#"/transformer_blocks\.[0-4]\.attn\.to_[qk]/"#]).select(paths).count == 10)
    #expect(try LoRATargets(["/.*/"]).select(paths).count == paths.count)
    #expect(
      message { _ = try LoRATargets(["/to_k/"]).select(paths) }.contains("no linear layer matches /to_k/"))
    #expect(message { _ = try LoRATargets(["/to_(k/"]) }.contains("/to_(k/ is not a regular expression"))
  }

  @Test("published models are told by names and sizes")
  func architectures() throws {
    let expected: [(String, ModelArchitecture)] = [
      ("flux1-dev", .flux), ("flux1-schnell", .flux), ("sd35-medium", .sd35Medium),
      ("sd35-large", .sd35Large),
    ]
    for (name, architecture) in expected {
      let sizes = try published(name)
      #expect(ModelArchitecture.recognise(sizes) == architecture)
      // From the attention of the first block alone too, as far as it differs.
      let first = sizes.filter { $0.key.hasPrefix("transformer_blocks.0.attn") }
      #expect(ModelArchitecture.recognise(first) == architecture)
    }
  }
}
