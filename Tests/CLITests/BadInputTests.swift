import Foundation
import Testing

/// One mistake of a user.
struct Mistake: Sendable, CustomTestStringConvertible {
  let what: String
  let arguments: [String]
  /// What the message must say: what is wrong, where, and the way out.
  let words: [String]
  var status: Int32 = 1
  var prepare: @Sendable (Scratch) throws -> Void = { _ in }
  var testDescription: String { what }

  /// A configuration that differs from a good one in `settings`.
  static func train(
    _ what: String, _ settings: String..., words: [String],
    prepare: @escaping @Sendable (Scratch) throws -> Void = { _ in }
  ) -> Mistake {
    let arguments = ["train", "config.yaml"] + settings.flatMap { ["--set", $0] }
    return Mistake(what: what, arguments: arguments, words: words, prepare: prepare)
  }

  /// A good configuration of a copy of flux-tiny that `spoil` damages.
  static func model(
    _ what: String, words: [String], spoil: @escaping @Sendable (_ shard: URL) throws -> Void
  ) -> Mistake {
    .train(what, "model=model", words: words) { scratch in
      try scratch.copy(Tool.fluxTiny, to: "model")
      try spoil(scratch["model/transformer/diffusion_pytorch_model-00001-of-00002.safetensors"])
    }
  }
}

/// Oracle: the rule that every message says what, where and the way out, spelled out for each mistake; and that
/// a command that fails on its input leaves the disk as it was.
@Suite("bad input")
struct BadInputTests {
  static let shard = "model/transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
  static let index = "model/transformer/diffusion_pytorch_model.safetensors.index.json"

  /// Changes `text` in the file `name` beside `shard`.
  private static func replace(_ text: String, by other: String, in shard: URL, _ name: String) throws {
    let file = shard.deletingLastPathComponent().appending(path: name).standardizedFileURL
    let stored = try String(contentsOf: file, encoding: .utf8)
    let changed = stored.replacingOccurrences(of: text, with: other)
    try #require(changed != stored)
    try changed.write(to: file, atomically: true, encoding: .utf8)
  }

  static let models: [Mistake] = [
    .model(
      "a pipeline of another class",
      words: ["model/model_index.json", "PixArtSigmaPipeline", "FluxPipeline or StableDiffusion3Pipeline"]
    ) {
      try replace("FluxPipeline", by: "PixArtSigmaPipeline", in: $0, "../model_index.json")
    },
    .model(
      "a weight file is missing",
      words: [index, "1 of 2 shards are missing", "model-00001-of-00002.safetensors", "fetch"]
    ) {
      try FileManager.default.removeItem(at: $0)
    },
    .model(
      "an index names a key that its shard does not hold",
      words: [index, "context_embedder.bios", "model-00001-of-00002.safetensors", "fetch both again"]
    ) {
      try replace(
        "context_embedder.bias", by: "context_embedder.bios", in: $0,
        "diffusion_pytorch_model.safetensors.index.json")
    },
    .model(
      "a transformer as a pickle",
      words: [
        "model/transformer: no weights", "diffusion_pytorch_model.bin is a pickle", "chunkgrpo convert ",
        "model/transformer/diffusion_pytorch_model.safetensors",
      ]
    ) { shard in
      let folder = shard.deletingLastPathComponent()
      for name in try FileManager.default.contentsOfDirectory(atPath: folder.path) where name != "config.json"
      {
        try FileManager.default.removeItem(at: folder.appending(path: name))
      }
      try Data("x".utf8).write(to: folder.appending(path: "diffusion_pytorch_model.bin"))
    },
    .model(
      "a text encoder as a pickle",
      words: [
        "model/text_encoder: no weights", "pytorch_model.bin is a pickle", "text_encoder/model.safetensors",
      ]
    ) { shard in
      let folder = shard.deletingLastPathComponent().appending(path: "../text_encoder").standardizedFileURL
      try FileManager.default.moveItem(
        at: folder.appending(path: "model.safetensors"), to: folder.appending(path: "pytorch_model.bin"))
    },
    .model("a weight file is cut off", words: [shard, "truncated", "fetch it again"]) {
      try Data(contentsOf: $0).prefix(100_000).write(to: $0)
    },
    .model(
      "a parameter has another shape",
      words: ["model/transformer", "context_embedder.weight", "expected [32, 32]", "got [16, 64]"]
    ) {
      try editSafetensors($0) { header, _ in
        var entry = try #require(header["context_embedder.weight"] as? [String: Any])
        try #require(entry["shape"] as? [Int] == [32, 32])
        entry["shape"] = [16, 64]
        header["context_embedder.weight"] = entry
      }
    },
    .model("a parameter is NaN", words: ["model/transformer", "context_embedder.bias", "NaN"]) {
      try editSafetensors($0) { header, data in
        let entry = try #require(header["context_embedder.bias"] as? [String: Any])
        let at = try #require(entry["data_offsets"] as? [Int])[0]
        data.replaceSubrange(at..<(at + 4), with: [0xFF, 0xFF, 0xFF, 0x7F])
      }
    },
    .train("no model there", "model=nowhere", words: ["nowhere", "model folder"]),
    .train(
      "a size that the model cannot take", "sampling.height=40",
      words: ["40 × 48", "multiples of 16", "such as 48 × 48"]),
  ]

  static let configurations: [Mistake] = [
    .train(
      "an unknown key", "group.sise=4", words: ["--set group.sise=4", "not a key", "did you mean group.size"]),
    .train("an unknown key in the file", words: ["config.yaml:2", "modle", "did you mean model"]) {
      try $0.write("seed: 1\nmodle: x\n", to: "config.yaml")
    },
    .train("a wrong type", "group.size=two", words: ["group.size", "expected an integer", "\"two\""]),
    .train(
      "chunks of another sum", "chunk.plan=list:1,2",
      words: ["chunk.plan", "[1, 2]", "cover 3", "has 2", "change chunk.plan or sampling.steps"]),
    .train(
      "a target that is no regular expression", "trainable.targets=/to_(q/",
      words: ["trainable.targets", "/to_(q/", "not a regular expression"]),
    .train(
      "a target that the model does not have", "trainable.targets=[attention, query]",
      words: ["trainable.targets", "query", "the model has", "attn.to_q"]),
    .train(
      "an unknown plan", "chunk.plan=clever",
      words: ["chunk.plan", "step, sequence, fixed:n, list:a,b,…", "adaptive-shared or auto", "\"clever\""]),
    .train(
      "an unknown kind of step", "sampling.step=euler",
      words: ["sampling.step", "one of flow-sde, dance-sde, cps, ode", "\"euler\""]),
    .train(
      "an unknown weight", "chunk.timeWeight=heavy",
      words: ["chunk.timeWeight", "one of perChunk, none, equalised, tempflow, guard", "\"heavy\""]),
    .train(
      "η that the kind of step does not take", "sampling.step=cps", "sampling.eta=1.2",
      words: ["sampling.eta", "at most 1", "cps", "1.2"]),
    .train("a share above one", "chunk.fraction=1.5", words: ["chunk.fraction", "(0, 1]", "1.5"]),
    .train(
      "chunks larger than the trajectory", "chunk.plan=auto", "chunk.minChunk=3",
      words: ["chunk.minChunk", "3 steps do not fit in the 2", "lower it, or raise sampling.steps"]),
    .train("a group of one", "group.size=1", words: ["group.size", "at least 2", "got 1"]),
    .train(
      "an unknown reward", "rewards=[{name: vivd}]", words: ["rewards", "\"vivd\"", "scenes", "vivid"]),
    .train(
      "a reward that cannot judge these prompts", "rewards=[{name: scenes}]",
      words: ["scenes", "a photo of", "include", "add one or drop this reward"]),
    .train(
      "an unknown split", "prompts.split=trian", words: ["prompts.jsonl", "trian", "dev, test, train", "all"]),
    .train("no prompt file", "prompts.file=no.jsonl", words: ["no.jsonl", "no such file", "prompts.file"]),
    .train("no prompt in it", "prompts.file=e.txt", words: ["e.txt", "no prompt"]) {
      try $0.write("\n \n", to: "e.txt")
    },
    .train("prompts not in UTF-8", "prompts.file=l.txt", words: ["l.txt:2", "UTF-8", "byte 13"]) {
      try $0.write(Array("caf\u{E9} noir\nth".utf8) + [0xE9, 0x0A], to: "l.txt")
    },
    .train("a bad line of JSON", "prompts.file=b.jsonl", words: ["b.jsonl:2", "not a JSON object"]) {
      try $0.write("{\"prompt\": \"a cat\"}\n{\"prompt\": \n", to: "b.jsonl")
    },
    .train(
      "an output below a file", "output=config.yaml/run",
      words: ["output", "config.yaml/run", "cannot be written", "choose another"]),
    .train("an output that holds something", words: ["run is not empty", "--resume", "--set output="]) {
      try $0.write("mine", to: "run/notes.txt")
    },
    Mistake(what: "no configuration", arguments: ["train", "no.yaml"], words: ["no.yaml", "no such file"]),
    Mistake(
      what: "neither a configuration nor a run", arguments: ["train"], words: ["configuration", "--resume"],
      status: 64),
  ]

  static let runs: [Mistake] = [
    Mistake(
      what: "resume of nothing", arguments: ["train", "--resume", "nothing"],
      words: ["--resume", "nothing", "no run folder", "config.yaml"]),
    Mistake(
      what: "resume with another seed", arguments: ["train", "--resume", "run", "--set", "seed=2"],
      words: ["seed", "fixed by the run", "only run.*", "start a new run"],
      prepare: { try $0.train() }),
    Mistake(
      what: "resume with another number of steps, edited", arguments: ["train", "--resume", "run"],
      words: [
        "run/config.yaml", "iteration-000002", "sampling.steps is 4, was 3", "chunk.fraction is 1, was 0.5",
        "put it back, or start a new run",
      ],
      prepare: { scratch in
        try scratch.train()
        let edited = try scratch.text("run/config.yaml").replacingOccurrences(
          of: "  steps: 3", with: "  steps: 4"
        )
        .replacingOccurrences(of: "  fraction: 0.5", with: "  fraction: 1")
        try scratch.write(edited, to: "run/config.yaml")
      }),
  ]

  static let others: [Mistake] = [
    Mistake(
      what: "verify a folder with nothing in it", arguments: ["verify", "empty"],
      words: ["empty", "nothing to verify", "io/*.safetensors"], status: 2,
      prepare: { try FileManager.default.createDirectory(at: $0["empty"], withIntermediateDirectories: true) }
    ),
    Mistake(
      what: "verify no folder", arguments: ["verify", "nothing"], words: ["nothing", "no such folder"]),
    Mistake(
      what: "evaluate no model", arguments: ["evaluate", "nothing"], words: ["nothing", "no such model"]),
    Mistake(
      what: "evaluate no images", arguments: ["evaluate", Tool.fluxTiny.path, "--count", "0"],
      words: ["--count", "at least 1", "got 0"], status: 64),
    Mistake(
      what: "evaluate an unknown split",
      arguments: ["evaluate", Tool.fluxTiny.path, "--prompts", "prompts.jsonl", "--split", "trian"],
      words: ["prompts.jsonl", "trian", "dev, test, train"]),
    Mistake(
      what: "evaluate by an unknown reward",
      arguments: ["evaluate", Tool.fluxTiny.path, "--reward", "beauty"], words: ["\"beauty\"", "vivid"]),
    Mistake(
      what: "evaluate with no switch step",
      arguments: ["evaluate", Tool.fluxTiny.path, "--switch", "1,x"],
      words: ["--switch", "0,10,20", "\"1,x\""],
      status: 64),
    Mistake(
      what: "evaluate with a switch after the last step",
      arguments: [
        "evaluate", Tool.fluxTiny.path, "--prompts", "prompts.jsonl", "--steps", "4", "--switch", "2,5",
      ],
      words: ["--switch", "0 to 4", "got 5"]),
    Mistake(
      what: "evaluate a whole model that switches to nothing",
      arguments: ["evaluate", Tool.fluxTiny.path, "--prompts", "prompts.jsonl", "--switch", "2"],
      words: ["a whole model", "--base"]),
    Mistake(
      what: "sample with a switch after the last step",
      arguments: [
        "sample", Tool.fluxTiny.path, "--prompt", "a cat", "-o", "a.png", "--steps", "4", "--switch", "5",
      ], words: ["--switch", "0 to 4", "got 5"]),
    Mistake(
      what: "sample nothing", arguments: ["sample", Tool.fluxTiny.path, "-o", "a.png"],
      words: ["--prompt", "--prompts"], status: 64),
    Mistake(
      what: "sample into no folder",
      arguments: ["sample", Tool.fluxTiny.path, "--prompt", "a cat", "-o", "no/a.png"],
      words: ["-o", "/no", "written"]),
    Mistake(
      what: "sample with an adapter of another model",
      arguments: [
        "sample", Tool.fluxMini.path, "--prompt", "a cat", "-o", "a.png", "--adapter",
        Tool.root.appending(path: "Tests/Fixtures/parity/flux-lora-tiny").path,
      ], words: ["pytorch_lora_weights.safetensors", "do not fit"]),
    Mistake(
      what: "sample with an adapter of another architecture",
      arguments: [
        "sample", Tool.root.appending(path: "Tests/Fixtures/parity/sd3-tiny").path, "--prompt", "a cat", "-o",
        "a.png", "--adapter", Tool.root.appending(path: "Tests/Fixtures/parity/flux-lora-tiny").path,
      ],
      words: ["of 30 layers are not in this model", "the adapter is for FLUX.1, the model is SD3"]),
    Mistake(
      what: "sample with a pickle",
      arguments: ["sample", Tool.fluxTiny.path, "--prompt", "a cat", "-o", "a.png", "--adapter", "a.pt"],
      words: ["a.pt: a pickle", "convert it", "torch.load('a.pt', weights_only=True)"],
      prepare: { try $0.write("x", to: "a.pt") }),
    Mistake(
      what: "sample an adapter that names no model",
      arguments: [
        "sample", Tool.root.appending(path: "Tests/Fixtures/parity/flux-lora-tiny").path, "--prompt", "a cat",
        "-o", "a.png",
      ], words: ["flux-lora-tiny", "--base"]),
  ]

  @Test(
    "one clear message, the right exit code, nothing written",
    arguments: models + configurations + runs + others + chunkPlans)
  func fails(_ mistake: Mistake) throws {
    let scratch = try Scratch()
    try scratch.configure()
    try mistake.prepare(scratch)
    let before = scratch.listing()
    let result = try Tool.run(mistake.arguments, in: scratch)
    #expect(result.status == mistake.status, "\(result.err)")
    #expect(!result.killed)
    #expect(result.out.isEmpty)
    let lines = result.err.split(separator: "\n")
    // 64: the parser's message goes on with the usage.
    #expect(
      mistake.status == 64 ? lines.first?.hasPrefix("Error: ") == true : lines.count == 1, "\(result.err)")
    let message = mistake.status == 64 ? String(lines.first ?? "") : result.err
    for word in mistake.words { #expect(message.contains(word), "\(word): \(message)") }
    let after = scratch.listing()
    #expect(after == before, "\(Set(after.keys).symmetricDifference(before.keys))")
  }

  static let chunkPlans: [Mistake] = [
    Mistake(
      what: "chunks of another sum",
      arguments: ["chunks", Tool.fluxTiny.path, "--steps", "5", "--plan", "list:1,2"],
      words: ["[1, 2]", "cover 3 steps", "has 4"]),
    Mistake(
      what: "an unknown plan to show", arguments: ["chunks", Tool.fluxTiny.path, "--plan", "clever"],
      words: ["step, sequence, fixed:n", "or auto", "\"clever\""]),
    Mistake(
      what: "a trajectory too short to cut", arguments: ["chunks", Tool.fluxTiny.path, "--steps", "2"],
      words: ["chunk.minChunk", "2 steps do not fit in the 1"]),
    Mistake(
      what: "an unknown kind of step", arguments: ["chunks", Tool.fluxTiny.path, "--step", "euler"],
      words: ["--step euler", "one of flow-sde, dance-sde, cps", "\"euler\""]),
    Mistake(
      what: "one trajectory", arguments: ["chunks", Tool.fluxTiny.path, "--count", "1", "--samples", "1"],
      words: ["at least 2, got 1", "more prompts or samples"]),
    Mistake(
      what: "chunks into a folder that holds something",
      arguments: ["chunks", Tool.fluxTiny.path, "-o", "out"],
      words: ["-o", "out is not empty", "nothing is overwritten"],
      prepare: { try $0.write("mine", to: "out/a") }),
    Mistake(
      what: "no samples", arguments: ["chunks", Tool.fluxTiny.path, "--samples", "0"],
      words: ["--samples", "got 0"],
      status: 64),
  ]

  // Oracle: the messages of each mistake alone; what one option makes of another is left out.
  @Test(
    "a dry run says everything that is wrong at once, and so does the run", arguments: [["--dry-run"], []])
  func allAtOnce(_ flags: [String]) throws {
    let scratch = try Scratch()
    try scratch.configure(settings: "ema: {decay: 2}\nrun: {iterations: 0}")
    let before = scratch.listing()
    let result = try Tool.run(
      ["train", "config.yaml"] + flags
        + [
          "chunk.plan=clever", "sampling.step=euler", "chunk.timeWeight=heavy", "chunk.fraction=0",
          "sampling.eta=-1", "run.keep=few",
        ]
        .flatMap { ["--set", $0] }, in: scratch)
    #expect(result.status == 1 && result.out.isEmpty)
    let lines = result.err.split(separator: "\n").map(String.init)
    #expect(lines.first == "error: 8 problems" && lines.count == 9, "\(result.err)")
    for word in [
      "run.keep", "ema.decay", "run.iterations", "chunk.plan", "sampling.step",
      "chunk.timeWeight",
      "chunk.fraction", "sampling.eta",
    ] { #expect(lines.filter { $0.contains(word + ":") }.count == 1, "\(word): \(result.err)") }
    // Without keys that cannot be read, also files that are not there.
    let missing = try Tool.run(
      ["train", "config.yaml"] + flags
        + [
          "ema.decay=0.5", "run={keep: 1, iterations: 0}", "model=nowhere", "prompts.file=no.jsonl",
          "rewards=[{name: vivd}]",
        ].flatMap { ["--set", $0] }, in: scratch)
    let list = missing.err.split(separator: "\n").map(String.init)
    #expect(missing.status == 1 && list.count == 5, "\(missing.err)")
    for word in ["run.iterations", "nowhere: no such folder", "no.jsonl: no such file", "\"vivd\""] {
      #expect(list.filter { $0.contains(word) }.count == 1, "\(word): \(missing.err)")
    }
    #expect(scratch.listing() == before)
  }

  @Test("prompts longer than the text encoders' limit: counted, with the text that is lost")
  func longPrompts() throws {
    let scratch = try Scratch()
    try scratch.write("a cat\na photo of two dogs and a bird\na photo of three red boats\n", to: "p.txt")
    // Oracle: a limit of 8 tokens leaves room for a few of these words and not for their last.
    let result = try Tool.run(
      ["encode", Tool.fluxTiny.path, "--prompts", "p.txt", "-o", "e", "--length", "8"], in: scratch)
    #expect(result.status == 0)
    let lines = result.err.split(separator: "\n")
    #expect(lines.count == 1 && lines[0].hasPrefix("warning: 2 prompts exceed"), "\(result.err)")
    let loses = try #require(lines.first?.components(separatedBy: " loses ").last)
    #expect(loses.hasSuffix("bird\"") || loses.hasSuffix("boats\""), "\(result.err)")
    #expect(result.out.contains("3 prompts, 3 new"))
  }

  @Test("a checkpoint cut off in the middle: the one before is used, and that is said")
  func truncatedCheckpoint() throws {
    let scratch = try Scratch()
    try scratch.configure()
    try scratch.train()
    let whole = scratch.listing("run")
    let file = "run/checkpoints/iteration-000002/training.safetensors"
    let data = try scratch.data(file)
    try scratch.write(data.prefix(data.count / 2), to: file)
    let result = try Tool.run(["train", "--resume", "run"], in: scratch)
    #expect(result.status == 0)
    let warning = result.err.split(separator: "\n").first.map(String.init) ?? ""
    for word in ["warning", "iteration-000002", "training.safetensors", "cut off", "before it is used"] {
      #expect(warning.contains(word), "\(result.err)")
    }
    #expect(result.err.contains("iteration 2/2") && !result.err.contains("iteration 1/2"))
    // Oracle: the run before the damage.
    #expect(try scratch.data(file) == data)
    let adapter = "adapter/pytorch_lora_weights.safetensors"
    #expect(try scratch.data("run/\(adapter)") == #require(whole[adapter] ?? nil))
  }

  @Test("no checkpoint is whole: the run starts over, says so, and keeps the checkpoints it then writes")
  func everyCheckpointDamaged() throws {
    let scratch = try Scratch()
    try scratch.configure(settings: "run: {iterations: 4, checkpointEvery: 1, keep: 2}")
    try scratch.train()
    for name in ["iteration-000003", "iteration-000004"] {
      try scratch.write("", to: "run/checkpoints/\(name)/training.safetensors")
    }
    let result = try Tool.run(["train", "--resume", "run", "--set", "run.iterations=2"], in: scratch)
    #expect(result.status == 0)
    #expect(result.err.contains("iteration-000003") && result.err.contains("iteration-000004"))
    #expect(result.err.contains("starting at iteration 0") && result.err.contains("iteration 1/2"))
    // What LATEST names must be there, or a second stop would lose everything again.
    let latest = try scratch.text("run/LATEST").trimmingCharacters(in: .newlines)
    #expect(latest == "iteration-000002")
    #expect(scratch.exists("run/checkpoints/\(latest)/state.json"))
  }

  @Test("verify: a row that fails is shown and exits 1")
  func verifyFails() throws {
    let scratch = try Scratch()
    let io = Tool.root.appending(path: "Tests/Fixtures/parity/io")
    for name in ["flux_pack.json", "flux_pack.safetensors"] {
      try FileManager.default.createDirectory(at: scratch["data/io"], withIntermediateDirectories: true)
      try scratch.copy(io.appending(path: name), to: "data/io/\(name)")
    }
    #expect(try Tool.run(["verify", "data"], in: scratch).status == 0)
    try editSafetensors(scratch["data/io/flux_pack.safetensors"]) { header, data in
      let entry = try #require(header["out.packed"] as? [String: Any])
      let at = try #require(entry["data_offsets"] as? [Int])[0]
      data[at + 3] ^= 0x80  // the sign of the first float32
    }
    let table = try Tool.run(["verify", "data"], in: scratch)
    #expect(table.status == 1)
    #expect(table.out.contains(try Regex(#"flux_pack packed .* fail"#)), "\(table.out)")
    let result = try Tool.run(["verify", "data", "--json"], in: scratch)
    #expect(result.status == 1)
    let object = try result.json()
    #expect(object["failed"] as? Int == 1)
    let rows = try #require(object["rows"] as? [[String: Any]])
    #expect(
      rows.filter { $0["status"] as? String == "fail" }.map { $0["id"] as? String } == ["flux_pack packed"])
  }
}
