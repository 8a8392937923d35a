import Foundation
import Testing
import Torch

@testable import FlowTraining

/// Every row that the shipped fixtures must give, written down here so that a row that vanishes is a failure.
private enum Expected {
  static let steps = ["gcpo_chunk_step", "gcpo_grpo_step"].flatMap { name in
    [
      "sigmas", name == "gcpo_chunk_step" ? "ratios (8)" : "ratios (32)", "gradient norms",
      "grad_preclip.0.proj_out.weight", "grad_preclip.0.transformer_blocks.0.attn.to_q.weight",
      "grad_preclip.0.transformer_blocks.1.norm1_context.linear.bias", "grad_preclip.0.x_embedder.weight",
      "grad_preclip.1.proj_out.weight", "grad_preclip.1.transformer_blocks.0.attn.to_q.weight",
      "grad_preclip.1.transformer_blocks.1.norm1_context.linear.bias", "grad_preclip.1.x_embedder.weight",
      "param.proj_out.weight", "param.single_transformer_blocks.1.proj_out.weight",
      "param.time_text_embed.guidance_embedder.linear_1.weight",
      "param.transformer_blocks.0.attn.to_q.weight",
      "param.transformer_blocks.1.norm1_context.linear.bias", "param.x_embedder.weight",
      "gradient 0, all 112 tensors", "gradient 1, all 112 tensors", "parameters, all 112 tensors",
    ].map { "\(name) \($0)" }
  }

  static let peers =
    [
      ("gcpo_flow", 17), ("mix_flow", 17), ("dance", 17), ("gcpo_dance", 17), ("flow_grpo", 10),
      ("ff.Flow-SDE", 4), ("ff.Dance-SDE", 4), ("ff.CPS", 4),
    ].flatMap { name, steps in
      ["mean", "log_prob", "next"].map { "peer_logprob \(name) \($0) (\(steps) steps)" }
    } + [
      "peer_logprob gcpo.sigmas", "peer_logprob gcpo.timesteps_int", "peer_logprob gcpo_ode next (17 steps)",
      "peer_logprob gcpo_flow_pert log_prob (4 steps)", "peer_logprob gcpo_flow_bf16v log_prob (3 steps)",
    ]

  static let schedules =
    [
      "flux.n17.seq2025", "flux.n28.seq1024", "flux.n28.seq4096", "flux.n4.seq24", "sd3.n10", "sd3.n28",
      "sd3.n40",
    ].flatMap { ["scheduler \($0).sigmas", "scheduler \($0).timesteps"] } + [
      "scheduler qwen.n20.seq1024.sigmas", "scheduler schnell.n4.sigmas",
      "scheduler zimage_turbo.n8.sigmas", "scheduler traj_f32.x",
    ]

  static let models = [
    "flux_transformer float32", "flux_transformer bfloat16", "flux_text clip last_hidden",
    "flux_text clip pooled", "flux_text clip hidden[-2]", "flux_text t5", "flux_text t5 bias 77",
    "flux_pack packed", "flux_pack unpacked", "flux_pipeline sigmas", "flux_pipeline prompt_embeds",
    "flux_pipeline pooled", "flux_pipeline latents by step", "flux_pipeline image", "flux_lora forward",
    "flux_lora gradients (60 tensors)", "vae decode", "vae encode mean", "vae encode logvar",
    "tokens clip (4 prompts)", "tokens t5 (4 prompts)", "sd3_transformer float32",
    "sd3_transformer bfloat16", "sd3_pipeline negative prompt_embeds", "sd3_pipeline negative pooled",
    "sd3_pipeline sigmas", "sd3_pipeline prompt_embeds", "sd3_pipeline pooled",
    "sd3_pipeline latents by step", "sd3_pipeline image",
  ]

  static let clip =
    ["clip-tiny-gelu", "clip-tiny-quickgelu"].flatMap { name in
      [
        "pixel_values", "image_embeds", "text_embeds", "text_embeds_nomask", "logits_per_image", "clipscore",
        "pickscore",
      ].map { "\(name) \($0)" }
    } + ["image_features", "text_features", "hpsv2_score"].map { "openclip \($0)" }

  static let lists = [
    "clip-g.text_proj(sd3)", "clip-l.text(flux)", "clip-l.text_proj(sd3)", "clip-vit-large-patch14",
    "dfn5b(open_clip ViT-H-14-378)", "flux-sd3.vae", "flux1-dev.transformer", "flux1-schnell.transformer",
    "hpsv2(open_clip ViT-H-14)", "pickscore_v1(clip-h)", "sd35-large.transformer",
    "sd35-medium.transformer", "t5-v1_1-xxl.encoder",
  ].map { "shapes/\($0).json.gz" }

  static let mini = ["clip_ids", "t5_ids", "sigmas", "prompt_embeds", "pooled", "latents by step", "image"]
    .map { "flux_mini_pipeline \($0)" }

  static let scenes = ["scenes strict (24 images)", "scenes graded (24 images)"]
}

/// Tolerances are those of Tests/Fixtures/parity/README.md and live in the verifier; the rows carry them.
@Suite("verify: recorded reference data")
struct VerifierTests {
  private static let reference = Result { try Verifier.run(parity) }
  private static let miniature = Result { try Verifier.run(mini) }
  private static let data = Result { try Verifier.run(root.appending(path: "Data")) }

  private func expectPass(_ id: String, _ result: Result<Verifier.Report?, any Error>) throws {
    let report = try #require(try result.get())
    let row = try #require(report.rows.first { $0.id == id }, "no row \(id)")
    #expect(row.status == .pass, "error \(row.error ?? .nan) of \(row.tolerance ?? .nan): \(row.note ?? "")")
    #expect(try #require(row.error) <= #require(row.tolerance))
  }

  @Test("models (oracle: diffusers, transformers, peft)", arguments: Expected.models)
  func models(_ id: String) throws { try expectPass(id, Self.reference) }

  @Test("CLIP in both namings (oracle: transformers, Pillow, open_clip)", arguments: Expected.clip)
  func clip(_ id: String) throws { try expectPass(id, Self.reference) }

  @Test("keys and shapes of published models (oracle: the reference classes)", arguments: Expected.lists)
  func lists(_ id: String) throws { try expectPass(id, Self.reference) }

  // Oracle: models.md's totals are the published files' bytes by element size.
  @Test("published parameter counts")
  func counts() throws {
    let rows = try #require(try Self.reference.get()).rows
    for (name, note) in [
      ("flux1-dev.transformer", "1160 tensors, 11901408320 elements"),
      ("flux1-schnell.transformer", "1156 tensors, 11891178560 elements"),
      ("t5-v1_1-xxl.encoder", "219 tensors, 4762310656 elements"),
      ("clip-vit-large-patch14", "590 tensors, 427616513 elements"),
    ] { #expect(rows.first { $0.id == "shapes/\(name).json.gz" }?.note == note) }
  }

  @Test("schedules (oracle: diffusers)", arguments: Expected.schedules)
  func schedules(_ id: String) throws { try expectPass(id, Self.reference) }

  @Test("steps and log-probabilities (oracle: peers' published functions)", arguments: Expected.peers)
  func peers(_ id: String) throws { try expectPass(id, Self.reference) }

  @Test("two optimizer steps (oracle: the authors' train_one_step)", arguments: Expected.steps)
  func updates(_ id: String) throws { try expectPass(id, Self.reference) }

  @Test("flux-mini, prompt to image (oracle: diffusers)", arguments: Expected.mini)
  func miniPipeline(_ id: String) throws { try expectPass(id, Self.miniature) }

  @Test("scenes verifier (oracle: its Python prototype's scores)", arguments: Expected.scenes)
  func scenes(_ id: String) throws { try expectPass(id, Self.data) }

  @Test("nothing else fails, ids are unique, and the totals add up")
  func totals() throws {
    for result in [Self.reference, Self.miniature, Self.data] {
      let report = try #require(try result.get())
      #expect(report.rows.filter { $0.status == .fail }.map(\.id) == [])
      #expect(report.failed == 0)
      #expect(report.passed + report.unsupported == report.rows.count)
      #expect(report.passed == report.rows.filter { $0.status == .pass }.count)
      #expect(Set(report.rows.map(\.id)).count == report.rows.count)
    }
  }

  @Test("data this build does not know is unsupported, not a failure")
  func unsupported() throws {
    let scratch = try Scratch()
    let io = scratch.path("io")
    try FileManager.default.createDirectory(at: io, withIntermediateDirectories: true)
    try Safetensors.write(["in.x": try Tensor([1.0])], to: io.appending(path: "new_model.safetensors"))
    let report = try #require(try Verifier.run(scratch.url))
    #expect(report.rows.map(\.status) == [.unsupported] && report.failed == 0)
    #expect(report.rows[0].id == "new_model" && report.rows[0].error == nil && report.rows[0].note != nil)
  }

  // Oracle: ids of transformers 5.23 and sentencepiece in flux_text_prompts.json, with flux-tiny's vocabularies
  // in the place of the published ones.
  @Test("vocabularies: the folder's own, or those that the environment names; neither is unsupported")
  func vocabularies() throws {
    struct Source: Decodable {
      let prompts: [String]
      let clipIds, t5Ids: [[Int64]]
    }
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    let source = try decoder.decode(
      Source.self, from: Data(contentsOf: parity.appending(path: "io/flux_text_prompts.json")))
    let scratch = try Scratch()
    let files = FileManager.default
    for folder in ["data/io", "named"] {
      try files.createDirectory(at: scratch.path(folder), withIntermediateDirectories: true)
    }
    func row(_ named: String?, spoil: Bool = false) throws -> Verifier.Row {
      let cases = zip(source.prompts, zip(source.clipIds, source.t5Ids)).map {
        ["prompt": $0, "clip77": $1.0, "t5": Array($1.1.prefix { $0 != 0 }) + (spoil ? [7] : [])]
          as [String: Any]
      }
      try JSONSerialization.data(withJSONObject: cases)
        .write(to: scratch.path("data/io/tokens_real_vocab.json"))
      let environment = named.map { [Verifier.vocabulariesVariable: scratch.path($0).path] } ?? [:]
      let report = try #require(
        try Verifier.run(scratch.path("data"), environment: environment))
      return try #require(report.rows.first)
    }
    for named in [nil, "named"] {
      let empty = try row(named)
      #expect(empty.status == .unsupported && empty.note?.contains("CHUNKGRPO_VOCABULARIES") == true)
      #expect(empty.note?.contains("/named") == (named != nil))
    }
    for (name, part) in [("clip", "tokenizer"), ("t5", "tokenizer_2")] {
      try files.createSymbolicLink(
        at: scratch.path("named/\(name)"), withDestinationURL: tiny.appending(path: part))
    }
    #expect(try row(nil).status == .unsupported)
    #expect(try row("named").status == .pass)
    #expect(try row("named", spoil: true).error == Double(source.prompts.count))
    try files.moveItem(at: scratch.path("named"), to: scratch.path("data/vocabularies"))
    #expect(try row(nil).status == .pass)
  }

  // MARK: - what must not pass

  /// A folder with the file `name` of `from`, changed, and links to everything it refers to.
  private func damaged(
    _ name: String, from: URL = parity, _ change: (inout [String: Tensor]) throws -> Void
  ) throws -> Scratch {
    let scratch = try Scratch()
    let files = FileManager.default
    for entry in try files.contentsOfDirectory(atPath: from.path) where entry != "io" && entry != "shapes" {
      try files.createSymbolicLink(
        at: scratch.path(entry), withDestinationURL: from.appending(path: entry))
    }
    try? files.removeItem(at: scratch.path("\(name).safetensors"))
    var source = from
    if files.fileExists(atPath: from.appending(path: "io").path) {
      source = from.appending(path: "io")
      try files.createDirectory(at: scratch.path("io"), withIntermediateDirectories: true)
      for entry in try files.contentsOfDirectory(atPath: source.path) where entry.hasSuffix(".json") {
        try files.copyItem(at: source.appending(path: entry), to: scratch.path("io/\(entry)"))
      }
      if name == "flux_lora" {  // takes its inputs from there
        try files.copyItem(
          at: source.appending(path: "flux_transformer.safetensors"),
          to: scratch.path("io/flux_transformer.safetensors"))
      }
    }
    let target = source == from ? scratch.url : scratch.path("io")
    try rewrite(
      source.appending(path: "\(name).safetensors"), to: target.appending(path: "\(name).safetensors"), change
    )
    return scratch
  }

  @Test(
    "an expected value off by 1 % fails its row and no other",
    arguments: [
      ("flux_transformer", "out.sample", "flux_transformer float32"),
      ("flux_text", "out.t5_last_hidden", "flux_text t5"),
      ("flux_pack", "out.packed", "flux_pack packed"),
      ("flux_pipeline", "out.image", "flux_pipeline image"),
      ("sd3_transformer", "out.sample", "sd3_transformer float32"),
      ("sd3_pipeline", "out.negative_pooled", "sd3_pipeline negative pooled"),
      ("flux_lora", "out.sample", "flux_lora forward"),
      ("clip-tiny-gelu", "out.pickscore", "clip-tiny-gelu pickscore"),
      ("clip-tiny-quickgelu", "out.pixel_values", "clip-tiny-quickgelu pixel_values"),
      ("openclip", "out.text_features", "openclip text_features"),
      ("vae", "out.decoded", "vae decode"),
      ("scheduler", "sd3.n10.sigmas", "scheduler sd3.n10.sigmas"),
      ("peer_logprob", "gcpo_flow.3.log_prob", "peer_logprob gcpo_flow log_prob (17 steps)"),
      ("peer_logprob", "ff.CPS.1.prev_sample", "peer_logprob ff.CPS next (4 steps)"),
      ("gcpo_chunk_step", "out.ratios", "gcpo_chunk_step ratios (8)"),
      ("gcpo_grpo_step", "out.grad_norms", "gcpo_grpo_step gradient norms"),
      ("gcpo_grpo_step", "out.param.x_embedder.weight", "gcpo_grpo_step param.x_embedder.weight"),
    ])
  func onePercent(_ name: String, _ key: String, _ id: String) throws {
    let scratch = try damaged(name) { $0[key] = try #require($0[key]) * 1.01 }
    let report = try #require(try Verifier.run(scratch.url))
    #expect(report.rows.filter { $0.status == .fail }.map(\.id) == [id])
    #expect(report.failed == 1)
  }

  @Test("a CLIP fixture under another name, in a folder that is the model itself")
  func renamed() throws {
    let scratch = try Scratch()
    let files = FileManager.default
    let source = parity.appending(path: "clip-tiny-gelu")
    for entry in try files.contentsOfDirectory(atPath: source.path) {
      try files.createSymbolicLink(
        at: scratch.path(entry), withDestinationURL: source.appending(path: entry))
    }
    try files.createDirectory(at: scratch.path("io"), withIntermediateDirectories: true)
    try rewrite(
      parity.appending(path: "io/clip-tiny-gelu.safetensors"), to: scratch.path("io/mine.safetensors")
    ) { $0["out.other"] = try Tensor([Float(1)]) }
    let report = try #require(try Verifier.run(scratch.url))
    #expect(report.passed == 7 && report.failed == 0)
    #expect(report.rows.filter { $0.status == .unsupported }.map(\.id) == ["mine other"])
  }

  @Test("a pixel that is off by one grey level fails")
  func greyLevel() throws {
    let scratch = try damaged("clip-tiny-gelu") { tensors in
      let tensor = try #require(tensors["out.pixel_values"])
      var values = try tensor.floats()
      values[1234] += 1 / 255 / 0.27577711
      tensors["out.pixel_values"] = try Tensor(values, shape: tensor.shape)
    }
    let report = try #require(try Verifier.run(scratch.url))
    #expect(report.rows.filter { $0.status == .fail }.map(\.id) == ["clip-tiny-gelu pixel_values"])
  }

  /// A folder with one list of keys, changed or as it is, under `name`.
  private func list(
    _ source: String, as name: String, _ change: (inout [String: [Int]]) -> Void = { _ in }
  ) throws -> Verifier.Row {
    let scratch = try Scratch()
    try FileManager.default.createDirectory(at: scratch.path("shapes"), withIntermediateDirectories: true)
    let data = try Gzip.read(parity.appending(path: "shapes/\(source).json.gz"))
    var list = try JSONDecoder().decode([String: [Int]].self, from: data)
    change(&list)
    try JSONEncoder().encode(list).write(to: scratch.path("shapes/\(name)"))
    return try #require(try Verifier.run(scratch.url)?.rows.first { $0.id == "shapes/\(name)" })
  }

  @Test("a list with a key more, a key less or another shape fails and says which")
  func changedList() throws {
    let key = "encoder.block.23.layer.1.DenseReluDense.wo.weight"
    let name = "t5-v1_1-xxl.encoder"
    #expect(try list(name, as: "\(name).json").status == .pass)
    for (change, expected) in [
      ({ $0["extra"] = [1] }, "1 keys not used (extra)"),
      ({ $0[key] = nil }, "1 parameters not set (\(key))"),
      ({ $0[key] = [10240, 4096] }, "another shape (\(key): expected [4096, 10240], got [10240, 4096])"),
    ] as [((inout [String: [Int]]) -> Void, String)] {
      let row = try list(name, as: "\(name).json", change)
      #expect(row.status == .fail && row.note?.contains(expected) == true, "\(row.note ?? "")")
    }
  }

  @Test("a list of another name is recognised by its keys, or unsupported")
  func unnamedList() throws {
    #expect(try list("clip-l.text(flux)", as: "mine.json").status == .pass)
    #expect(try list("clip-l.text(flux)", as: "mine.json") { $0["x"] = [] }.status == .unsupported)
  }

  @Test("a damaged list fails by name")
  func damagedList() throws {
    let scratch = try Scratch()
    try FileManager.default.createDirectory(at: scratch.path("shapes"), withIntermediateDirectories: true)
    let data = try Data(contentsOf: parity.appending(path: "shapes/flux-sd3.vae.json.gz"))
    try data.dropLast(300).write(to: scratch.path("shapes/cut.json.gz"))
    var flipped = data
    flipped[flipped.count - 6] ^= 1  // of the checksum
    try flipped.write(to: scratch.path("shapes/flipped.json.gz"))
    try Data("[1]".utf8).write(to: scratch.path("shapes/other.json"))
    let report = try #require(try Verifier.run(scratch.url))
    #expect(report.failed == 3)
    let notes = Dictionary(uniqueKeysWithValues: report.rows.map { ($0.id, $0.note ?? "") })
    #expect(notes["shapes/cut.json.gz"]?.contains("not a sound gzip file") == true)
    #expect(notes["shapes/flipped.json.gz"]?.contains("not a sound gzip file") == true)
    #expect(notes["shapes/other.json"]?.contains("not a JSON object from key to shape") == true)
  }

  @Test("a scene score off by 1 % fails")
  func sceneScore() throws {
    let scratch = try damaged("verifier", from: root.appending(path: "Data")) {
      $0["out.graded"] = try #require($0["out.graded"]) * 1.01
    }
    let report = try #require(try Verifier.run(scratch.url))
    #expect(report.rows.filter { $0.status == .fail }.map(\.id) == ["scenes graded (24 images)"])
  }

  @Test(
    "a value that is not a number fails, wherever it stands",
    arguments: [
      ("peer_logprob", "gcpo_flow.3.log_prob", "peer_logprob gcpo_flow log_prob (17 steps)"),
      ("peer_logprob", "gcpo_flow.3.mean", "peer_logprob gcpo_flow mean (17 steps)"),
      ("gcpo_chunk_step", "out.ratios", "gcpo_chunk_step ratios (8)"),
      ("vae", "out.decoded", "vae decode"),
    ])
  func notANumber(_ name: String, _ key: String, _ id: String) throws {
    let scratch = try damaged(name) { tensors in
      let tensor = try #require(tensors[key])
      var values = try tensor.floats()
      values[values.count - 1] = .nan
      tensors[key] = try Tensor(values, shape: tensor.shape)
    }
    let report = try #require(try Verifier.run(scratch.url))
    #expect(report.rows.filter { $0.status == .fail }.map(\.id) == [id])
  }

  @Test("another shape fails with both shapes named")
  func otherShape() throws {
    let scratch = try damaged("vae") { tensors in
      let tensor = try #require(tensors["out.enc_mean"])
      tensors["out.enc_mean"] = try tensor.reshape([tensor.count])
    }
    let row = try #require(try Verifier.run(scratch.url)?.rows.first { $0.id == "vae encode mean" })
    #expect(row.status == .fail && row.note?.contains("expected [") == true)
  }

  @Test("a missing setting or a cut-off file fails the row and leaves the others standing")
  func broken() throws {
    let scratch = try damaged("flux_pack") { _ in }
    let io = scratch.path("io")
    try FileManager.default.copyItem(
      at: parity.appending(path: "io/vae.safetensors"), to: io.appending(path: "vae.safetensors"))
    try FileManager.default.removeItem(at: io.appending(path: "vae.json"))
    try Data(repeating: 1, count: 40).write(to: io.appending(path: "scheduler.safetensors"))
    let report = try #require(try Verifier.run(scratch.url))
    #expect(report.rows.filter { $0.status == .fail }.map(\.id) == ["scheduler", "vae"])
    #expect(report.rows.filter { $0.id.hasPrefix("flux_pack") }.allSatisfy { $0.status == .pass })
    #expect(report.rows.first { $0.id == "vae" }?.note?.contains("vae.json") == true)
  }

  @Test("an empty folder holds nothing it knows; a missing one is an error")
  func nothing() throws {
    let scratch = try Scratch()
    #expect(try Verifier.run(scratch.url)?.rows.count == nil)
    try FileManager.default.createDirectory(at: scratch.path("io"), withIntermediateDirectories: true)
    #expect(try Verifier.run(scratch.url)?.rows.count == nil)
    #expect(message { _ = try Verifier.run(scratch.path("absent")) }.contains("no such folder"))
  }

  @Test("rows have all keys in JSON, with null for what was not computed (contract: config.md, --json)")
  func json() throws {
    let rows = [
      Verifier.Row(id: "a", error: nil, tolerance: nil, status: .unsupported, note: "why"),
      Verifier.Row(id: "b", error: .infinity, tolerance: 1, status: .fail, note: nil),
    ]
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys]
    let report = Verifier.Report(rows: rows, passed: 0, failed: 1, unsupported: 1)
    let text = String(decoding: try encoder.encode(report), as: UTF8.self)
    #expect(
      text == #"{"failed":1,"passed":0,"rows":["#
        + #"{"error":null,"id":"a","note":"why","status":"unsupported","tolerance":null},"#
        + #"{"error":null,"id":"b","status":"fail","tolerance":1}],"unsupported":1}"#)
  }
}
