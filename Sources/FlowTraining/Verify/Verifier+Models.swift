import ChunkGRPO
import FlowModels
import FlowRewards
import Foundation
import Torch
import TorchNN

extension Verifier {
  /// Inputs of a transformer fixture.
  private struct TransformerInputs {
    let latents, text, pooled, timestep: Tensor
    let guidance: Tensor?
    let grid: (rows: Int, columns: Int)

    init(_ data: SafetensorsFile) throws {
      latents = try data.require("in.hidden_states")
      text = try data.require("in.encoder_hidden_states")
      pooled = try data.require("in.pooled_projections")
      timestep = try data.require("in.timestep")
      guidance = try data.tensor("in.guidance")
      let ids = try data.require("in.img_ids").doubles()
      let last = ids.count - 3
      grid = (Int(ids[last + 1]) + 1, Int(ids[last + 2]) + 1)
    }

    func run(_ network: FluxTransformer) throws -> Tensor {
      try network(latents, text: text, pooled: pooled, timestep: timestep, guidance: guidance, grid: grid)
    }
  }

  mutating func fluxTransformer(_ data: SafetensorsFile) throws {
    let inputs = try TransformerInputs(data)
    let folder = try modelFolder("flux_transformer").appending(path: "transformer")
    let network = try FluxTransformer(folder: folder)
    try compare("flux_transformer float32", try withoutGrad { try inputs.run(network) }, data, "out.sample")
    guard data.shape("out_bf16.sample") != nil else { return }
    try network.place(.bfloat16, .cpu)
    network.roundsTimeToDType = true
    let half = try withoutGrad { try inputs.run(network).to(.float32) }
    try compare("flux_transformer bfloat16", half, data, "out_bf16.sample", tolerance: 3e-2)
  }

  mutating func sd3Transformer(_ data: SafetensorsFile) throws {
    let folder = try modelFolder("sd3_transformer").appending(path: "transformer")
    let network = try SD3Transformer(folder: folder)
    func run() throws -> Tensor {
      try withoutGrad {
        try network(
          try data.require("in.hidden_states"), text: try data.require("in.encoder_hidden_states"),
          pooled: try data.require("in.pooled_projections"), timestep: try data.require("in.timestep"))
      }
    }
    try compare("sd3_transformer float32", try run(), data, "out.sample")
    guard data.shape("out_bf16.sample") != nil else { return }
    try network.place(.bfloat16, .cpu)
    let half = try run().to(.float32)
    try compare("sd3_transformer bfloat16", half, data, "out_bf16.sample", tolerance: 3e-2)
  }

  mutating func fluxText(_ data: SafetensorsFile) throws {
    guard let pipeline = try pipeline("flux_text") as? FluxPipeline else {
      throw RunError("flux_text: the model folder is no FluxPipeline")
    }
    let encoders = try pipeline.encoders.models()
    let (clip, t5) = try withoutGrad {
      (try encoders.clip(try data.require("in.clip_ids")), try encoders.t5(try data.require("in.t5_ids")))
    }
    try compare("flux_text clip last_hidden", clip.last, data, "out.clip_last_hidden")
    try compare("flux_text clip pooled", clip.pooled, data, "out.clip_pooled")
    try compare("flux_text clip hidden[-2]", clip.penultimate, data, "out.clip_hidden_m2")
    try compare("flux_text t5", t5, data, "out.t5_last_hidden")
    for key in data.names where key.hasPrefix("out.t5_rel_bias_") {
      guard let n = Int(key.dropFirst("out.t5_rel_bias_".count)) else { continue }
      try compare("flux_text t5 bias \(n)", try encoders.t5.positionBias(n).squeeze(0), data, key)
    }
  }

  mutating func fluxPack(_ data: SafetensorsFile) throws {
    let latents = try data.require("in.latents")
    let packed = try FluxPipeline.pack(latents)
    let grid = (rows: latents.size(2) / 2, columns: latents.size(3) / 2)
    try compare("flux_pack packed", packed, data, "out.packed", tolerance: 0)
    try compare(
      "flux_pack unpacked", try FluxPipeline.unpack(packed, grid: grid), data, "out.unpacked", tolerance: 0)
  }

  mutating func vae(_ data: SafetensorsFile) throws {
    let vae = try AutoencoderKL(folder: try modelFolder("vae").appending(path: "vae"))
    let (decoded, encoded) = try withoutGrad {
      (try vae.decode(try data.require("in.latents")), try vae.encode(try data.require("in.image")))
    }
    try compare("vae decode", decoded, data, "out.decoded")
    try compare("vae encode mean", encoded.mean, data, "out.enc_mean")
    try compare("vae encode logvar", encoded.logVariance, data, "out.enc_logvar")
  }

  mutating func fluxLoRA(_ data: SafetensorsFile) throws {
    let settings = try settings("flux_lora")
    guard let adapterName = settings["adapter"] as? String else {
      throw RunError("flux_lora.json: no adapter")
    }
    let network = try FluxTransformer(folder: try modelFolder("flux_lora").appending(path: "transformer"))
    let file = folder.appending(path: adapterName).appending(path: "pytorch_lora_weights.safetensors")
    let adapter = try LoRAAdapter(file, for: network.modules)
    let inputs = try TransformerInputs(
      try SafetensorsFile(io.appending(path: "flux_transformer.safetensors")))
    let out = try inputs.run(network)
    try (out * data.require("in.w")).mean().backward()
    try compare("flux_lora forward", out, data, "out.sample")
    var (ours, theirs): ([Tensor], [Tensor]) = ([], [])
    for name in adapter.parameters.keys.sorted() {
      guard let gradient = try adapter.parameters[name]!.grad() else {
        throw RunError("no gradient for \(name)")
      }
      ours.append(try gradient.reshape(-1))
      theirs.append(try data.require("grad." + name).reshape(-1))
    }
    let error = try Self.relative(try Tensor.cat(ours), try Tensor.cat(theirs))
    record("flux_lora gradients (\(ours.count) tensors)", error: error, tolerance: 1e-4)
  }

  /// A whole text-to-image run, from the prompts' texts.
  mutating func imagePipeline(_ name: String, _ data: SafetensorsFile) throws {
    let settings = try settings(name)
    let tolerance = settings["tolerance"] as? Double ?? 1e-4
    let latents = try data.require("in.latents")
    guard let steps = settings["steps"] as? Int ?? data.shape("out.latents_by_step")?[0] else {
      throw RunError("\(name).json: steps is missing, and there is no out.latents_by_step")
    }
    let folder = try ModelFolder(try modelFolder(name))
    // An SD3 prompt begins with CLIP's 77 tokens.
    let before = folder.pipeline == "StableDiffusion3Pipeline" ? 77 : 0
    let length =
      settings["max_sequence_length"] as? Int ?? data.shape("out.prompt_embeds").map { $0[1] - before }
    let pipeline = try pipeline(name, textLength: length)
    let shape = latents.shape
    let scale = pipeline.autoencoder.downscale
    guard let height = settings["height"] as? Int ?? (shape.count == 4 ? shape[2] * scale : nil),
      let width = settings["width"] as? Int ?? (shape.count == 4 ? shape[3] * scale : nil)
    else {
      throw RunError("\(name).json: height and width are missing")
    }
    let grid = try pipeline.grid(height: height, width: width)
    let prompts = try storedPrompts(data, count: shape[0])
    let tokens = try prompts.map { try pipeline.text.tokens($0) }
    let conditions = try tokens.map { try pipeline.text.encode($0) }
    let condition = try Condition.stack(conditions)
    for (key, ids) in [
      ("in.clip_ids", tokens.flatMap { $0[0].ids }), ("in.t5_ids", tokens.flatMap { $0.last!.ids }),
    ] where data.shape(key) != nil {
      let differing = zip(ids, try data.require(key).int64s()).filter { $0 != $1 }.count
      record("\(name) \(key.dropFirst(3))", error: Double(differing), tolerance: 0)
    }
    var network = pipeline.flowModel(grid: grid)
    let guidance = settings["guidance"] as? Double
    if pipeline.guidance == .classifierFree, guidance ?? 1 > 1 {
      let negative = try pipeline.text.encode(settings["negative_prompt"] as? String ?? "")
      network = GuidedFlowModel(network, negative: negative)
      if let expected = data.shape("out.negative_prompt_embeds") {
        let rows = [Condition](repeating: negative, count: expected[0])
        let stacked = try Condition.stack(rows)
        try compare(
          "\(name) negative prompt_embeds", stacked.tensors[0], data, "out.negative_prompt_embeds")
        try compare("\(name) negative pooled", stacked.tensors[1], data, "out.negative_pooled")
      }
    }
    let schedule = try pipeline.schedule(steps: steps, grid: grid)
    let table = try TransitionTable(schedule: schedule, kind: .ode, eta: 0, stochastic: 0..<0)
    let rollout = Rollout(table: table, guidance: guidance, batch: shape[0])
    let run = try rollout.sample(network, initial: latents, conditions: conditions) { _, _, _ in }
    let image = try pipeline.decode(run.clean, grid: grid)
    if data.shape("out.sigmas") != nil {
      record(
        "\(name) sigmas", error: try Self.relative(schedule.sigmas, try data.require("out.sigmas")),
        tolerance: 1e-6)
    }
    try compare("\(name) prompt_embeds", condition.tensors[0], data, "out.prompt_embeds")
    try compare("\(name) pooled", condition.tensors[1], data, "out.pooled")
    let byStep = try run.states.narrow(0, 1, steps)
    try compare("\(name) latents by step", byStep, data, "out.latents_by_step", tolerance: tolerance)
    try compare("\(name) image", image, data, "out.image", tolerance: tolerance)
  }

  /// The prompts of a pipeline fixture: its own metadata, or the first of flux_text_prompts.json.
  private func storedPrompts(_ data: SafetensorsFile, count: Int) throws -> [String] {
    if let text = data.metadata["prompts"] {
      return try JSONDecoder().decode([String].self, from: Data(text.utf8))
    }
    return Array(try promptFixture().prompts.prefix(count))
  }

  struct PromptFixture: Decodable {
    let prompts: [String]
    let clipIds, t5Ids: [[Int64]]
  }
  func promptFixture() throws -> PromptFixture {
    let file = io.appending(path: "flux_text_prompts.json")
    guard let data = try? Data(contentsOf: file) else { throw RunError("\(file.path): missing") }
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    return try decoder.decode(PromptFixture.self, from: data)
  }

  /// Token ids by the model folder's own tokenizers.
  static func tokens(_ v: inout Verifier) throws {
    let model = try v.modelFolder("flux_text")
    let clip = try CLIPTokenizer(folder: model.appending(path: "tokenizer"))
    let t5 = try T5Tokenizer(folder: model.appending(path: "tokenizer_2"))
    let fixture = try v.promptFixture()
    let ours = zip(fixture.prompts, zip(fixture.clipIds, fixture.t5Ids)).map { prompt, expected in
      (clip.encode(prompt, length: expected.0.count).ids, t5.encode(prompt, length: expected.1.count).ids)
    }
    let clipMisses = zip(ours, fixture.clipIds).filter { $0.0 != $1 }.count
    let t5Misses = zip(ours, fixture.t5Ids).filter { $0.1 != $1 }.count
    v.record(
      "tokens clip (\(ours.count) prompts)", error: Double(clipMisses), tolerance: 0,
      note: "prompts that differ")
    v.record(
      "tokens t5 (\(ours.count) prompts)", error: Double(t5Misses), tolerance: 0, note: "prompts that differ")
  }

  /// Token ids by the published vocabularies, the folder's own or those of ``vocabulariesVariable``.
  static func realTokens(_ v: inout Verifier) throws {
    struct Case: Decodable {
      let prompt: String
      let clip77: [Int64]?
      let t5: [Int64]
    }
    let places = [v.folder.appending(path: "vocabularies"), v.vocabularies].compactMap { $0 }
    func find(_ name: String) -> URL? {
      places.map { $0.appending(path: name) }.first { FileManager.default.fileExists(atPath: $0.path) }
    }
    guard let clipFolder = find("clip"), let t5Folder = find("t5") else {
      let searched = places.map(\.path).joined(separator: " and ")
      v.unsupported(
        "tokens_real_vocab",
        "no clip and t5 to tokenize with in \(searched); \(vocabulariesVariable) names a folder of them")
      return
    }
    let cases = try JSONDecoder().decode(
      [Case].self, from: Data(contentsOf: v.io.appending(path: "tokens_real_vocab.json")))
    let (clip, t5) = (try CLIPTokenizer(folder: clipFolder), try T5Tokenizer(folder: t5Folder))
    let misses = cases.filter { c in
      t5.encode(c.prompt, length: 4096).ids.prefix(c.t5.count) != c.t5[...]
        || (c.clip77.map { clip.encode(c.prompt, length: 77).ids != $0 } ?? false)
    }
    v.record(
      "tokens_real_vocab (\(cases.count) prompts)", error: Double(misses.count), tolerance: 0,
      note: "prompts that differ")
  }

  /// The scenes verifier on its own images.
  static func scenes(_ v: inout Verifier) throws {
    let file = v.folder.appending(path: "verifier.safetensors")
    let data = try SafetensorsFile(file)
    let listed = v.folder.appending(path: "prompts.jsonl")
    let prompts = try PromptFile(file: listed, split: "all").prompts
    let byText = Dictionary(prompts.map { ($0.text, $0) }) { first, _ in first }
    guard let names = data.metadata["prompts"] else {
      throw RunError("\(file.path): no prompts in its metadata")
    }
    let wanted = try JSONDecoder().decode([String].self, from: Data(names.utf8)).map { text in
      guard let prompt = byText[text] else { throw RunError("\(listed.path): no prompt \"\(text)\"") }
      return RewardPrompt(prompt)
    }
    let images = try data.require("in.images")
    for score in ["strict", "graded"] {
      let reward = try RewardFactory.make(name: "scenes", score: score)
      let values = try reward.scoresNow(images, prompts: wanted).map { Float($0.value ?? .nan) }
      let expected = try data.require("out.\(score)").floats()
      let worst = zip(values, expected).map { Double(abs($0 - $1)) }.reduce(0, Self.worse)
      v.record(
        "scenes \(score) (\(values.count) images)", error: worst, tolerance: 1e-6,
        note: "largest absolute difference")
    }
  }
}
