import Foundation
import Testing

/// inspect, export and merge as a user runs them. Oracle: the fixture's own numbers (make_fixtures.py: rank
/// 4, alpha 8, 30 layers of flux-tiny), and that what one command writes another reads.
@Suite("inspect, export, merge")
struct AdapterCommandTests {
  static let adapter = Tool.root.appending(path: "Tests/Fixtures/parity/flux-lora-tiny").path
  static let sd3 = Tool.root.appending(path: "Tests/Fixtures/parity/sd3-tiny").path
  let scratch: Scratch

  init() throws { scratch = try Scratch() }

  private func run(_ arguments: String..., status: Int32 = 0) throws -> Tool.Result {
    let result = try Tool.run(arguments, in: scratch)
    try #require(result.status == status, "\(arguments): \(result.out) \(result.err)")
    return result
  }
  private func object(_ value: Any?) throws -> [String: Any] { try #require(value as? [String: Any]) }

  @Test("inspect an adapter: form, rank, alpha, scale, targets, architecture")
  func inspectAdapter() throws {
    let found = try run("inspect", Self.adapter, "--json").json()
    #expect(found["kind"] as? String == "LoRA adapter")
    let tensors = try object(found["tensors"])
    #expect(tensors["count"] as? Int == 60 && tensors["parameters"] as? Int == 10752)
    #expect(tensors["dtypes"] as? [String: Int] == ["float32": 60])
    let adapter = try object(found["adapter"])
    #expect(adapter["prefix"] as? String == "transformer." && adapter["naming"] as? String == "lora_A/lora_B")
    #expect(adapter["layers"] as? Int == 30 && adapter["architecture"] as? String == "FLUX.1")
    for (key, value) in [("ranks", "4"), ("alphas", "8"), ("scales", "2")] {
      #expect(adapter[key] as? [String: Int] == [value: 30])
    }
    let targets = try #require(adapter["targets"] as? [String: Int])
    #expect(targets.count == 12 && targets["attn.to_q"] == 4 && targets["ff_context.net.2"] == 2)
    let text = try run("inspect", Self.adapter).out
    for words in ["rank 4, alpha 8, scale 2 (lora_adapter_metadata)", "for: FLUX.1", "30 layers"] {
      #expect(text.contains(words), "\(text)")
    }
  }

  @Test("inspect --model: exit 0 where every key applies, 1 with the keys that do not")
  func inspectAgainstModel() throws {
    let fits = try run("inspect", Self.adapter, "--model", Tool.fluxTiny.path)
    #expect(fits.out.contains("applies whole"))
    let other = try run("inspect", Self.adapter, "--model", Self.sd3, "--json", status: 1).json()
    let misfits = try #require(try object(other["adapter"])["misfits"] as? [String])
    // flux-tiny and sd3-tiny share the width 32 and two blocks' names; single blocks are FLUX's alone.
    #expect(misfits.contains("transformer.single_transformer_blocks.0.attn.to_q: no such layer"))
    let mini = try run("inspect", Self.adapter, "--model", Tool.fluxMini.path, status: 1).out
    #expect(mini.contains("30 layers do not apply") && mini.contains("do not fit a layer"))
  }

  @Test("inspect a model, a part, a file, a run and its checkpoint")
  func inspectOthers() throws {
    let model = try run("inspect", Tool.fluxTiny.path, "--json").json()
    #expect(model["kind"] as? String == "model folder" && model["pipeline"] as? String == "FluxPipeline")
    let parts = try #require(model["parts"] as? [[String: Any]])
    #expect(parts.map { $0["name"] as? String } == ["text_encoder", "text_encoder_2", "transformer", "vae"])
    #expect(parts[2]["type"] as? String == "FluxTransformer2DModel" && parts[2]["files"] as? Int == 2)
    #expect(try object(parts[2]["tensors"])["parameters"] as? Int == 135_040)
    #expect(try run("inspect", Tool.fluxTiny.path + "/vae").out.contains("vae: model part"))
    let io = Tool.root.appending(path: "Tests/Fixtures/parity/io/vae.safetensors").path
    #expect(try run("inspect", io).out.contains("5 tensors"))

    try scratch.configure()
    try scratch.train()
    let found = try run("inspect", "run", "--json").json()
    #expect(found["kind"] as? String == "run" && found["adapter"] != nil)
    let state = try object(found["run"])
    #expect(
      state["done"] as? Int == 2 && state["iterations"] as? Int == 2
        && state["trainable"] as? String == "lora")
    #expect(state["checkpoints"] as? [String] == ["iteration-000001", "iteration-000002"])
    let checkpoint = try run("inspect", "run/checkpoints/iteration-000001").out
    #expect(checkpoint.contains("checkpoint\n") && checkpoint.contains("1 of 2 iterations"))
    #expect(checkpoint.contains("rank 16, alpha 16, scale 1"))

    // The run's adapter goes everywhere that a file goes.
    #expect(try run("export", "run", "--format", "peft", "-o", "peft").out.contains("for peft"))
    #expect(try run("inspect", "peft", "--model", Tool.fluxTiny.path).out.contains("PEFT folder"))
    _ = try run("merge", Tool.fluxTiny.path, "run", "-o", "merged")
    for (name, arguments) in [
      ("a.png", [Tool.fluxTiny.path, "--adapter", "peft"]),
      ("b.png", [Tool.fluxTiny.path, "--adapter", "run/adapter"]),
    ] {
      let drawn = try Tool.run(
        ["sample"] + arguments + [
          "--prompt", "a cat", "--steps", "1", "--height", "32", "--width", "32", "-o", name,
        ],
        in: scratch)
      try #require(drawn.status == 0, "\(drawn.err)")
    }
    // The factors are the same bytes, so is the picture.
    #expect(try scratch.data("a.png") == scratch.data("b.png"))
  }

  @Test("export: both layouts, in any dtype, and JSON")
  func export() throws {
    let object = try run("export", Self.adapter, "--format", "diffusers", "-o", "d", "--json").json()
    #expect(object["layers"] as? Int == 30 && object["output"] as? String == scratch.path("d"))
    #expect(scratch.listing("d").keys.sorted() == ["pytorch_lora_weights.safetensors"])
    #expect(try run("inspect", "d").out.contains("rank 4, alpha 4, scale 1 (not stated: 1)"))
    _ = try run("export", Self.adapter, "--format", "peft", "--dtype", "bfloat16", "-o", "p")
    #expect(scratch.listing("p").keys.sorted() == ["adapter_config.json", "adapter_model.safetensors"])
    let peft = try run("inspect", "p").out
    #expect(peft.contains("bfloat16") && peft.contains("rank 4, alpha 8, scale 2 (adapter_config.json)"))
    // And back: the same adapter, folded.
    _ = try run("export", "p", "--format", "diffusers", "-o", "q")
    #expect(try run("inspect", "q", "--model", Tool.fluxTiny.path).out.contains("applies whole"))
  }

  @Test("merge: a folder that inspects as the model does, and draws")
  func merge() throws {
    let object = try run("merge", Tool.fluxTiny.path, Self.adapter, "-o", "m", "--scale", "0.5", "--json")
      .json()
    #expect(object["layers"] as? Int == 30)
    #expect((object["files"] as? [String])?.count == 2 && (object["left_out"] as? [String])?.isEmpty == true)
    let (before, after) = (try run("inspect", Tool.fluxTiny.path).out, try run("inspect", "m").out)
    #expect(before.split(separator: "\n").dropFirst() == after.split(separator: "\n").dropFirst())
    let drawn = try run(
      "sample", "m", "--prompt", "a cat", "--steps", "1", "--height", "32", "--width", "32", "-o", "a.png")
    #expect(drawn.out.contains("1 image"))
  }

  // Oracle: the picture of the model with the trained weights loaded into it: the same bits, as both are float32.
  @Test("merge a run that was trained in full: a model folder of the same layout that draws with its weights")
  func mergeFull() throws {
    try scratch.configure()
    try scratch.train("config.yaml", "--set", "trainable.kind=full")
    let object = try run("merge", Tool.fluxTiny.path, "run", "-o", "m", "--json").json()
    let parts = try #require(try run("inspect", "m", "--json").json()["parts"] as? [[String: Any]])
    #expect(object["replaced"] as? Int == (try self.object(parts[2]["tensors"]))["count"] as? Int)
    #expect((object["files"] as? [String])?.count == 2 && object["layers"] as? Int == 0)
    let (before, after) = (try run("inspect", Tool.fluxTiny.path).out, try run("inspect", "m").out)
    #expect(before.split(separator: "\n").dropFirst() == after.split(separator: "\n").dropFirst())
    _ = try run("merge", Tool.fluxTiny.path, "run/checkpoints/iteration-000002", "-o", "c")
    for (name, model) in [
      ("a.png", [Tool.fluxTiny.path, "--adapter", "run/adapter"]), ("b.png", ["m"]), ("c.png", ["c"]),
      ("d.png", [Tool.fluxTiny.path]),
    ] {
      let drawn = try Tool.run(
        ["sample"] + model + [
          "--prompt", "a cat", "--steps", "2", "--height", "32", "--width", "48", "-o", name,
        ],
        in: scratch)
      try #require(drawn.status == 0, "\(drawn.err)")
    }
    #expect(try scratch.data("a.png") == scratch.data("b.png"))
    #expect(try scratch.data("a.png") == scratch.data("c.png"))
    #expect(try scratch.data("a.png") != scratch.data("d.png"))
  }

  // Oracle: 16 · Σ (in + out). Attention 32 → 32: 8 in each of 2 double blocks, 3 in each of 2 single ones.
  // MLP: four of 32 ↔ 128 in a double block; 32 → 128 and 160 → 32 in a single one.
  @Test(
    "presets of trainable.targets",
    arguments: [
      ("attention", 16 * 64 * (2 * 8 + 2 * 3)),
      ("attention+mlp", 16 * (64 * (2 * 8 + 2 * 3) + 2 * 4 * 160 + 2 * (160 + 192))),
      (#"'/transformer_blocks\.0\.attn\.to_[qk]/'"#, 16 * 64 * 2),
    ])
  func targets(_ targets: String, _ count: Int) throws {
    try scratch.configure()
    let out = try run("train", "config.yaml", "--dry-run", "--set", "trainable.targets=\(targets)").out
    #expect(out.contains(try Regex("# trainable parameters +\(count)")), "\(out)")
  }

  static let mistakes: [Mistake] = [
    Mistake(what: "inspect nothing", arguments: ["inspect", "no"], words: ["no: no such file or folder"]),
    Mistake(
      what: "inspect a folder of nothing known", arguments: ["inspect", "."],
      words: ["nothing this tool knows", "LoRA"]),
    Mistake(
      what: "inspect a model against a model",
      arguments: ["inspect", Tool.fluxTiny.path, "--model", Tool.fluxTiny.path],
      words: ["--model", "no adapter"]),
    Mistake(
      what: "inspect a damaged file", arguments: ["inspect", "a.safetensors"],
      words: ["a.safetensors", "not a safetensors file"],
      prepare: { try $0.write("12345678{}", to: "a.safetensors") }),
    Mistake(
      what: "inspect a pickle", arguments: ["inspect", "a.bin"],
      words: ["a.bin", "a pickle", "weights_only=True"],
      prepare: { try $0.write("x", to: "a.bin") }),
    Mistake(
      what: "export without a format", arguments: ["export", adapter, "-o", "out"], words: ["--format"],
      status: 64),
    Mistake(
      what: "export in an unknown format", arguments: ["export", adapter, "--format", "kohya", "-o", "out"],
      words: ["kohya", "diffusers", "peft"], status: 64),
    Mistake(
      what: "export a model", arguments: ["export", Tool.fluxTiny.path, "--format", "peft", "-o", "out"],
      words: ["flux-tiny: no LoRA adapter", "expected"]),
    Mistake(
      what: "export into something", arguments: ["export", adapter, "--format", "peft", "-o", "out"],
      words: ["out is there already", "choose another"], prepare: { try $0.write("x", to: "out/notes.txt") }),
    Mistake(
      what: "export DoRA", arguments: ["export", "p", "--format", "diffusers", "-o", "out"],
      words: ["adapter_config.json: use_dora is not supported"],
      prepare: {
        try $0.copy(URL(filePath: adapter), to: "p")
        try FileManager.default.moveItem(
          at: $0["p/pytorch_lora_weights.safetensors"], to: $0["p/adapter_model.safetensors"])
        try $0.write(
          #"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": true}"#, to: "p/adapter_config.json")
      }),
    Mistake(
      what: "export a run that was trained in full",
      arguments: ["export", "r", "--format", "peft", "-o", "out"],
      words: ["trained in full", "there is no adapter"],
      prepare: { try $0.write("x", to: "r/adapter/diffusion_pytorch_model.safetensors") }),
    Mistake(
      what: "merge into another model", arguments: ["merge", Tool.fluxMini.path, adapter, "-o", "out"],
      words: [
        "pytorch_lora_weights.safetensors", "30 of 30 layers do not fit", "do not fit a layer 128 → 128",
      ]),
    Mistake(
      what: "merge an adapter of another architecture", arguments: ["merge", sd3, adapter, "-o", "out"],
      words: ["of 30 layers are not in this model", "single_transformer_blocks", "the adapter is for FLUX.1"]),
    Mistake(
      what: "merge with no effect",
      arguments: ["merge", Tool.fluxTiny.path, adapter, "-o", "out", "--scale", "0"],
      words: ["--scale", "other than 0"], status: 64),
    Mistake(
      what: "merge a full fine-tuning of another model",
      arguments: ["merge", Tool.fluxMini.path, Tool.fluxTiny.path + "/transformer", "-o", "out"],
      words: [
        "flux-tiny/transformer/config.json", "attention_head_dim: expected 32", "got 16",
        "name the model that was trained",
      ]),
    Mistake(
      what: "merge part of a full fine-tuning",
      arguments: [
        "merge", Tool.fluxTiny.path, Tool.fluxTiny.path + "/transformer", "-o", "out", "--scale", "0.5",
      ], words: ["--scale", "trained in full", "drop --scale"]),
    Mistake(
      what: "merge a pickle", arguments: ["merge", Tool.fluxTiny.path, "p", "-o", "out"],
      words: ["p/pytorch_lora_weights.bin: a pickle", "convert it", "weights_only=True"],
      prepare: { try $0.write("x", to: "p/pytorch_lora_weights.bin") }),
    Mistake(
      what: "merge factors of two ranks", arguments: ["merge", Tool.fluxTiny.path, "p", "-o", "out"],
      words: [
        "p/pytorch_lora_weights.safetensors: single_transformer_blocks.0.attn.to_q: A [8, 16] and B [32, 4]",
        "expected [rank, in] and [out, rank] of one rank", "export it again",
      ],
      prepare: { scratch in
        try scratch.copy(URL(filePath: adapter), to: "p")
        try editSafetensors(scratch["p/pytorch_lora_weights.safetensors"]) { header, _ in
          let key = "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"
          var entry = try #require(header[key] as? [String: Any])
          entry["shape"] = [8, 16]
          header[key] = entry
        }
      }),
    Mistake(
      what: "merge into no folder", arguments: ["merge", Tool.fluxTiny.path, adapter, "-o", "no/out"],
      words: ["/no: cannot be written", "choose another"]),
  ]

  @Test("one clear message, the right exit code, nothing written", arguments: mistakes)
  func fails(_ mistake: Mistake) throws {
    try mistake.prepare(scratch)
    let before = scratch.listing()
    let result = try Tool.run(mistake.arguments, in: scratch)
    #expect(
      result.status == mistake.status && !result.killed && result.out.isEmpty, "\(result.out) \(result.err)")
    let lines = result.err.split(separator: "\n")
    #expect(
      mistake.status == 64 ? lines.first?.hasPrefix("Error: ") == true : lines.count == 1, "\(result.err)")
    for word in mistake.words { #expect(result.err.contains(word), "\(word): \(result.err)") }
    #expect(scratch.listing() == before)
  }
}
