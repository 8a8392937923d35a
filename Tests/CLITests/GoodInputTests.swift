import Foundation
import Testing

/// What works, on the smallest runs there are. Oracle where no other is named: the contracts of the run folder
/// and of `--json` in Documentation, and equality of two ways to the same thing.
@Suite("good input")
struct GoodInputTests {
  let scratch: Scratch

  init() throws {
    scratch = try Scratch()
    try scratch.configure()
  }

  private func succeed(_ arguments: String..., environment: [String: String]? = nil) throws -> Tool.Result {
    try succeed(arguments, environment: environment)
  }
  private func succeed(_ arguments: [String], environment: [String: String]? = nil) throws -> Tool.Result {
    let result = try Tool.run(arguments, in: scratch, environment: environment)
    try #require(result.status == 0, "\(arguments): \(result.err)")
    return result
  }

  private func keys(_ object: Any?) -> Set<String> { Set((object as? [String: Any] ?? [:]).keys) }

  @Test("a run folder holds every file and every metric of the contract; the log shows numbers")
  func trainWritesTheContract() throws {
    try scratch.configure(
      settings: "run: {iterations: 2, checkpointEvery: 1, samplesEvery: 2, evaluateEvery: 2}")
    let result = try succeed("train", "config.yaml")
    #expect(result.out.contains("2 iterations done"))
    let checkpoint = [
      "config.yaml", "pytorch_lora_weights.safetensors", "state.json", "training.safetensors",
    ]
    let expected =
      [
        "LATEST", "adapter", "adapter/pytorch_lora_weights.safetensors", "baseline.json", "checkpoints",
        "config.yaml",
      ]
      + ["metrics.jsonl", "samples", "samples/iteration-000002.png"]
      + ["iteration-000001", "iteration-000002"].flatMap { name in
        ["checkpoints/\(name)"] + checkpoint.map { "checkpoints/\(name)/\($0)" }
      }
    #expect(scratch.listing("run").keys.sorted() == expected.sorted())
    #expect(try scratch.text("run/LATEST") == "iteration-000002\n")

    let rows = try scratch.text("run/metrics.jsonl").split(separator: "\n").map {
      try #require(try JSONSerialization.jsonObject(with: Data($0.utf8)) as? [String: Any])
    }
    #expect(rows.map { $0["iteration"] as? Int } == [1, 2])
    let always: Set = [
      "iteration", "update", "reward_mean", "reward_std", "reward/vivid", "ratio_dev", "clip_share",
      "grad_norm", "replay_gap", "zero_groups", "masked", "chunk_sizes", "draw_p", "images_per_s", "seconds",
      "guards/blank", "guards/diversity", "guards/ink", "guards/vivid",
    ]
    for row in rows {
      #expect(always.subtracting(row.keys).isEmpty)
      #expect(keys(row["seconds"]).isSuperset(of: ["rollout", "decode", "reward", "planning", "update"]))
      #expect(row["replay_gap"] as? Double == 0)  // float32 and equal geometry: exact
    }
    #expect(rows[0]["eval/vivid"] == nil)
    #expect(rows[1]["eval/vivid"] is Double)
    // The log is for people: the numbers of the metrics, none missing.
    let log = result.err.split(separator: "\n").filter { $0.hasPrefix("iteration ") }
    #expect(log.count == 2)
    for (line, row) in zip(log, rows) {
      let reward = String(format: "reward %.4f", try #require(row["reward_mean"] as? Double))
      let speed = String(format: "%.1f images/s", try #require(row["images_per_s"] as? Double))
      #expect(line.contains(reward) && line.contains(speed) && !line.contains("nan"), "\(line)")
    }
  }

  @Test("train --resume goes on to where an unbroken run ends, bit for bit")
  func resume() throws {
    _ = try succeed("train", "config.yaml", "--set", "run.iterations=1")
    let half = try scratch.data("run/adapter/pytorch_lora_weights.safetensors")
    let resumed = try succeed("train", "--resume", "run", "--set", "run.iterations=3")
    #expect(resumed.err.contains("iteration 2/3") && !resumed.err.contains("iteration 1/3"))
    _ = try succeed("train", "config.yaml", "--set", "run.iterations=3", "--set", "output=whole")
    let adapters = try ["run", "whole"].map {
      try scratch.data("\($0)/adapter/pytorch_lora_weights.safetensors")
    }
    #expect(adapters[0] == adapters[1])
    #expect(adapters[0] != half)
    #expect(try scratch.metrics("run") == scratch.metrics("whole"))
  }

  @Test("--dry-run writes nothing and prints counts and a configuration that reads back as itself")
  func dryRun() throws {
    let before = scratch.listing()
    let first = try succeed("train", "config.yaml", "--dry-run", "--set", "seed=7", "--set", "group.size=3")
    #expect(scratch.listing() == before)
    for line in [#"seed: 7"#, #"# images per iteration +3"#, #"# prompts +2 \(train\)"#] {
      #expect(first.out.contains(try Regex(line)), "\(line)")
    }
    // flux-tiny's own size, by its shards; LoRA of rank 16 has 16 · (in + out) a target.
    #expect(first.out.contains(try Regex(#"# transformer parameters +135040"#)))
    try scratch.write(first.out, to: "resolved.yaml")
    #expect(try succeed("train", "resolved.yaml", "--dry-run").out == first.out)
    let object = try succeed("train", "resolved.yaml", "--dry-run", "--json").json()
    #expect(keys(object) == ["configuration", "counts", "memory", "peak_bytes"])
    #expect((object["configuration"] as? [String: Any])?["seed"] as? Int == 7)
  }

  @Test("train --json: one object on stdout, the log on stderr")
  func trainJSON() throws {
    let result = try succeed("train", "config.yaml", "--json")
    let object = try result.json()
    #expect(keys(object) == ["run", "adapter", "iterations", "reward_mean", "seconds"])
    #expect(object["run"] as? String == scratch.path("run"))
    #expect(object["iterations"] as? Int == 2)
    let last = try #require(try scratch.metrics().last)
    let row = try JSONSerialization.jsonObject(with: Data(last.utf8)) as? [String: Any]
    #expect(object["reward_mean"] as? Double == row?["reward_mean"] as? Double)
    #expect(result.err.contains("iteration 2/2"))
  }

  @Test("sample writes one image as it is and several as a grid, the same for the same seed")
  func sample() throws {
    /// Width and height from a PNG's first chunk.
    func size(_ name: String) throws -> [Int] {
      let bytes = [UInt8](try scratch.data(name))
      try #require(bytes.starts(with: [0x89] + Array("PNG\r\n\u{1A}\n".utf8)))
      return [16, 20].map { at in bytes[at..<(at + 4)].reduce(0) { $0 << 8 | Int($1) } }
    }
    let draw = ["sample", Tool.fluxTiny.path, "--prompt", "a cat", "--steps", "2"]
    let options = ["--height", "32", "--width", "48"]
    for (name, seed) in [("a.png", "1"), ("b.png", "1"), ("c.png", "2")] {
      let result = try Tool.run(draw + options + ["-o", name, "--seed", seed], in: scratch)
      try #require(result.status == 0, "\(result.err)")
      #expect(result.out.contains("1 image"))
      #expect(try size(name) == [48, 32])
    }
    #expect(try scratch.data("a.png") == scratch.data("b.png"))
    #expect(try scratch.data("a.png") != scratch.data("c.png"))
    let grid = try Tool.run(
      draw + options + ["--prompt", "a dog", "--count", "3", "-o", "grid.png", "--json"], in: scratch)
    let object = try grid.json()
    #expect(keys(object) == ["picture", "images", "seconds"])
    #expect(object["images"] as? Int == 6)
    #expect(object["picture"] as? String == scratch.path("grid.png"))
    let whole = try size("grid.png")
    #expect(whole[0] > 3 * 48 && whole[1] > 2 * 32)
  }

  @Test("evaluate: the contract's keys; both sides see the noise that each sees alone")
  func evaluate() throws {
    // The size and precision of a model folder alone, so that the base is drawn as in the comparison.
    try scratch.train(
      "config.yaml", "--set", "sampling={height: 64, width: 64}", "--set", "network.dtype=auto")
    let base = Tool.fluxTiny.path
    let common = [
      "--prompts", "prompts.jsonl", "--reward", "vivid", "--count", "2", "--steps", "2", "--json",
    ]
    let result = try Tool.run(
      ["evaluate", "run", "--against", base, "--picture", "pairs.png"] + common, in: scratch)
    let both = try result.json()
    let alone = try Tool.run(["evaluate", base] + common, in: scratch).json()
    let expected: Set = ["n_prompts", "samples_per_prompt", "mean", "ci95", "per_category", "guards"]
    #expect(keys(both).isSuperset(of: expected.union(["paired"])))
    #expect(keys(alone).isSuperset(of: expected) && alone["paired"] == nil)
    #expect(both["n_prompts"] as? Int == 2 && both["samples_per_prompt"] as? Int == 2)
    #expect(keys(both["per_category"]) == ["colour", "count"])
    #expect(keys(both["guards"]) == ["blank", "diversity", "grid", "ink", "sharpness", "vivid"])
    #expect(keys(both["paired"]) == ["difference", "ci95", "p"])
    let paired = try #require(both["paired"] as? [String: Any])
    let rewards = try #require(both["rewards"] as? [String: [String: Any]])
    let against = try #require(rewards["vivid"]?["against"] as? [String: [String: Any]])
    let mean = try #require(both["mean"] as? Double)
    let baseMean = try #require(alone["mean"] as? Double)
    // Same images, same sums: no rounding in between.
    #expect(against["all"]?["mean"] as? Double == baseMean)
    let difference = try #require(paired["difference"] as? Double)
    #expect(difference != 0)
    // Mean of differences and difference of means: a few roundings of numbers near 1.
    #expect(abs(difference - (mean - baseMean)) < 1e-14)
    let interval = try #require(paired["ci95"] as? [Double])
    #expect(interval[0] < difference && difference < interval[1])
    #expect((0...1).contains(try #require(paired["p"] as? Double)))
    #expect(scratch.exists("pairs.png"))
  }

  @Test("evaluate --switch: a row for each step in text and JSON; sample --switch draws between both models")
  func hybrid() throws {
    try scratch.train("config.yaml", "--set", "optim.lr=0.05")  // enough to see in 8 bits
    let common = ["--prompts", "prompts.jsonl", "--reward", "vivid", "--count", "2", "--steps", "3"]
    let sweep = ["evaluate", "run", "--switch", "0,1,3"] + common
    let rows = try #require(
      try Tool.run(sweep + ["--json"], in: scratch).json()["rows"] as? [[String: Any]])
    #expect(rows.map { $0["switch_step"] as? Int } == [0, 1, 3])
    let alone = try Tool.run(["evaluate", "run", "--json"] + common, in: scratch).json()
    #expect(rows[2]["mean"] as? Double == alone["mean"] as? Double && alone["switch_step"] == nil)
    let text = try Tool.run(sweep, in: scratch)
    for word in ["vivid, 0 ", "vivid, 1 ", "vivid, 3 ", "95 % interval", "diversity"] {
      #expect(text.out.contains(word), "\(text.out)")
    }
    let draw = ["sample", "run", "--prompt", "a cat", "--steps", "3"]
    for (name, step) in [("tuned", []), ("end", ["--switch", "3"]), ("middle", ["--switch", "1"])] {
      let result = try Tool.run(draw + step + ["-o", "\(name).png"], in: scratch)
      try #require(result.status == 0, "\(result.err)")
    }
    #expect(try scratch.data("tuned.png") == scratch.data("end.png"))
    #expect(try scratch.data("tuned.png") != scratch.data("middle.png"))
  }

  @Test("a model against itself: the difference is exactly 0")
  func evaluateAgainstItself() throws {
    let base = Tool.fluxTiny.path
    let object = try succeed(
      "evaluate", base, "--against", base, "--prompts", "prompts.jsonl", "--reward", "vivid", "--count", "2",
      "--steps", "2", "--json"
    ).json()
    let paired = try #require(object["paired"] as? [String: Any])
    #expect(paired["difference"] as? Double == 0)
    #expect(paired["ci95"] as? [Double] == [0, 0])
    #expect(paired["p"] as? Double == 1)
    #expect((object["collapsed"] as? [String])?.isEmpty == true)
  }

  @Test("one image a prompt: scores as usual, no guards, which compare images of one prompt")
  func evaluateOneImage() throws {
    let object = try succeed(
      "evaluate", Tool.fluxTiny.path, "--prompts", "prompts.jsonl", "--reward", "vivid", "--count", "1",
      "--steps", "2", "--json"
    ).json()
    #expect(object["samples_per_prompt"] as? Int == 1)
    #expect(object["mean"] is Double && !(object["guards"] is [String: Any]))
  }

  @Test("verify passes the model that comes with the project")
  func verify() throws {
    let object = try succeed("verify", Tool.fluxMini.path, "--json").json()
    #expect(keys(object) == ["rows", "passed", "failed", "unsupported"])
    let rows = try #require(object["rows"] as? [[String: Any]])
    #expect(!rows.isEmpty && object["passed"] as? Int == rows.count && object["failed"] as? Int == 0)
    for row in rows {
      #expect(keys(row).isSuperset(of: ["id", "error", "tolerance", "status"]))
      #expect(row["status"] as? String == "pass")
    }
  }

  @Test("demo writes the summary it prints, with real numbers of base and tuned")
  func demo() throws {
    let result = try succeed("demo", "config.yaml", "--count", "2", "--json", "--setup-seconds", "3")
    let summary = try result.json()
    let keys = self.keys(summary)
    #expect(
      keys.isSuperset(
        of: [
          "base", "tuned", "paired", "guards_base", "guards_tuned", "seconds", "commands", "picture", "seeds",
          "rewards",
        ]))
    #expect(self.keys(summary["seconds"]) == ["setup", "train", "evaluate"])
    #expect((summary["base"] as? [String: Any])?["mean"] is Double)
    #expect((summary["tuned"] as? [String: Any])?["mean"] is Double)
    #expect(self.keys(summary["paired"]) == ["difference", "ci95", "p"])
    #expect((summary["commands"] as? [String])?.count == 2)
    #expect(scratch.exists("run/before-after.png"))
    let written = try JSONSerialization.jsonObject(with: scratch.data("run/summary.json"))
    #expect(summary as NSDictionary == written as? NSDictionary)
    // A second demo leaves the first alone; its table names the number of prompts.
    let before = scratch.listing("run")
    let again = try succeed("demo", "config.yaml", "--count", "2")
    #expect(scratch.listing("run") == before && scratch.exists("run-2/summary.json"))
    #expect(again.out.contains(try Regex(#"vivid +2 +0\."#)), "\(again.out)")
  }

  @Test("bench --json: one object, and nothing left behind")
  func bench() throws {
    let before = scratch.listing()
    let environment = ["OMP_NUM_THREADS": "1", "TMPDIR": scratch.logs.path]
    let object = try succeed(
      "bench", "config.yaml", "--iterations", "1", "--json", environment: environment
    ).json()
    #expect(keys(object) == ["seconds", "outside_network", "images_per_s", "iterations"])
    #expect(scratch.listing() == before)
    let left = try FileManager.default.contentsOfDirectory(atPath: scratch.logs.path)
    #expect(left.allSatisfy { $0.hasSuffix(".out") || $0.hasSuffix(".err") }, "\(left)")
  }

  @Test("runs from any directory, through a link, with an empty environment, and finds its own data")
  func anywhere() throws {
    try scratch.configure("deep/conf/config.yaml")
    try scratch.write("", to: "elsewhere/empty")
    try FileManager.default.createSymbolicLink(at: scratch["tool"], withDestinationURL: Tool.binary)
    // The configuration's own folder has the prompts; the current directory gets the output.
    let train = try Tool.run(
      ["train", "deep/conf/config.yaml"], in: scratch, binary: scratch["tool"], environment: [:])
    #expect(train.status == 0, "\(train.err)")
    #expect(scratch.exists("run/adapter") && !scratch.exists("deep/conf/run"))
    // The built-in prompts and the sprites of the scenes reward lie beside the executable, not the link.
    let evaluate = try Tool.run(
      [
        "evaluate", Tool.fluxTiny.path, "--split", "dev", "--reward", "scenes", "--count", "2", "--steps",
        "1",
        "--json",
      ], in: scratch, binary: scratch["tool"], environment: [:])
    #expect(evaluate.status == 0, "\(evaluate.err)")
    #expect(try evaluate.json()["mean"] is Double)
    let resume = try Tool.run(
      ["train", "--resume", scratch.path("run"), "--set", "run.iterations=3"], in: Scratch(), environment: [:]
    )
    #expect(resume.status == 0, "\(resume.err)")
    #expect(try scratch.metrics().count == 3)
  }

  @Test("encode writes each prompt once, and a run trains from it with the encoders gone")
  func encode() throws {
    let prompts = "a cat\ntwo dogs\na cat and a boat\n"
    try scratch.write(prompts, to: "list.txt")
    try FileManager.default.copyItem(at: Tool.fluxTiny, to: scratch["model"])
    try scratch.configure(model: scratch["model"])
    let first = try succeed("encode", "model", "--prompts", "list.txt", "-o", "embeddings", "--json")
    let object = try JSONSerialization.jsonObject(with: Data(first.out.utf8)) as? [String: Any]
    #expect(object?["prompts"] as? Int == 3 && object?["new"] as? Int == 3)
    let again = try succeed("encode", "model", "--prompts", "list.txt", "-o", "embeddings")
    #expect(again.out.contains("3 prompts, 0 new"))
    try FileManager.default.removeItem(at: scratch["model/text_encoder_2/model.safetensors"])
    _ = try succeed(
      "train", "config.yaml", "--set", "prompts={file: list.txt, split: all, embeddings: embeddings}")
  }

  // Oracle: the same commands on the folder that the cache was made of.
  @Test("a snapshot in the hub's cache, links to blobs without extension, is a model folder like any other")
  func hubCache() throws {
    let model = try scratch.hubCache(of: Tool.fluxTiny)
    let adapter = try scratch.hubCache(of: Tool.root.appending(path: "Tests/Fixtures/parity/flux-lora-tiny"))
    #expect(adapter == model)  // one snapshot holds both: a LoRA file beside the model's folders
    let (linked, real) = (scratch.path(model), Tool.fluxTiny.path)
    let lora = "\(linked)/pytorch_lora_weights.safetensors"
    func same(_ arguments: (_ model: String) -> [String]) throws {
      // The first line names the folder.
      let outputs = try [linked, real].map {
        try succeed(arguments($0)).out.split(separator: "\n").dropFirst()
      }
      #expect(outputs[0] == outputs[1] && !outputs[0].isEmpty)
    }
    try same { ["train", "config.yaml", "--dry-run", "--set", "model=\($0)"] }
    try same { ["inspect", $0] }
    #expect(try succeed("inspect", lora, "--model", linked).out.contains("applies whole"))
    let draw = ["--prompt", "a cat", "--steps", "1", "--height", "32", "--width", "48", "--adapter", lora]
    let prompts = ["--prompts", "prompts.jsonl", "--length", "16"]
    for (name, folder) in [("linked", linked), ("real", real)] {
      _ = try succeed(["sample", folder, "-o", "\(name).png"] + draw)
      _ = try succeed(["encode", folder, "-o", "embeddings-\(name)"] + prompts)
      _ = try succeed(["merge", folder, lora, "-o", "merged-\(name)"])
    }
    #expect(try scratch.data("linked.png") == scratch.data("real.png"))
    #expect(scratch.listing("embeddings-linked") == scratch.listing("embeddings-real"))
    // The adapter lies beside model_index.json: merging leaves it out, as it is in the weights now.
    #expect(scratch.listing("merged-linked") == scratch.listing("merged-real"))
    for name in scratch.listing("merged-linked").keys {
      let path = scratch.path("merged-linked/\(name)")
      let type = try FileManager.default.attributesOfItem(atPath: path)[.type]
      #expect(type as? FileAttributeType != .typeSymbolicLink, "\(name)")
    }
  }
}
