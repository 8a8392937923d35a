import ChunkGRPO
import Foundation
import Testing
import Yams

@testable import FlowTraining

/// The text of the error that `body` throws, or a text that no expectation contains.
private func message(_ body: () throws -> Void) -> String {
  do { try body() } catch { return "\(error)" }
  return "no error"
}

private func loadMessage(_ yaml: String, _ overrides: [String] = []) -> String {
  message { _ = try Configuration.load(yaml: yaml, source: "demo.yaml", overrides: overrides) }
}

/// A folder that is removed at the end of the test.
private func withFolder(_ body: (URL) throws -> Void) throws {
  let folder = FileManager.default.temporaryDirectory.appendingPathComponent("configuration-\(UUID())")
  try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
  defer { try? FileManager.default.removeItem(at: folder) }
  try body(folder)
}

@Suite("configuration: reading and writing")
struct ConfigurationTests {
  /// Oracle: the published block of defaults, word for word.
  static let documented = """
    model: Models/flux-mini
    output: runs/demo
    seed: 1
    prompts: {file: Data/prompts.jsonl, split: train}
    rewards: [{name: scenes, score: graded, weight: 1}]      # several: aggregate: sum | normalised
    sampling: {steps: 17, shift: 3, guidance: 3.5, height: 64, width: 64, step: flow-sde, eta: 0.7, window: all, coarse: null, prefix: each, \
    sharedNoise: group, decode: x0, schedule: training, time: exact}
    group: {size: 12, promptsPerIteration: 4, statistics: group}
    chunk: {plan: "list:2,3,4,7", ratio: chunk, timeWeight: perChunk, draw: uniform, fraction: 0.5, stepFraction: 1, lateBelow: 0.8, \
    stopSize: 7, minChunk: 2, distance: l1}
    loss: {clip: [5.0e-5, 5.0e-5], advantageClip: 5, advantageStd: group, kl: 0, klForm: flowGRPO, anchor: rollout, \
    ratioNorm: none}
    optim: {lr: 1.0e-5, weightDecay: 1.0e-4, betas: [0.9, 0.999], eps: 1.0e-8, maxGradNorm: 0.01, \
    updatesPerIteration: 2, microBatch: 48, state: float32, offload: false}
    trainable: {kind: lora, rank: 16, alpha: 32, targets: [to_q, to_k, to_v, to_out.0]}   # or {kind: full}
    ema: {decay: 0}
    guards: {action: warn, blank: 0.02, diversity: 0.8, ink: [0.6, 1.6], sharpness: [0.5, 2], grid: [0, 2]}
    network: {dtype: auto, timeRounding: float32, attention: auto, checkpointing: none, \
    weights: model, vae: auto, decodeDtype: float32}
    run: {iterations: 50, checkpointEvery: 5, keep: 2, samplesEvery: 5, evaluateEvery: 10}
    """

  /// Oracle: a value for every key, each unlike its default.
  static let unusual = """
    model: /models/null
    output: "1e5"
    seed: 18446744073709551615
    prompts: {file: "a b: c # d.jsonl", split: "no", embeddings: "null"}
    rewards: [{name: hpsv3, weight: -0.25}, {name: 'true', score: '2024-01-01', weight: 1e+20}, \
    {name: judge, label: "no: 1", lateWeight: 0, threshold: -1, gate: {reward: hpsv3, above: 0.5}, watch: true, \
    failure: {timeout: 5, retries: 0, abortAbove: 1, allowTie: true}, model: "7b", head: h, quality: 9, language: deu, command: [a, "-b c"], \
    url: "http://x", batch: 2, concurrency: 3, tokenVariable: T, template: "{prompt}?", pattern: '([0-9]+)', scale: 10}]
    aggregate: normalised
    sampling: {steps: 9, shift: 1.15, guidance: null, negative: "no: blur", textLength: 77, height: 48, width: 80, step: cps, eta: 1, window: 1-6, coarse: 2, prefix: shared, \
    sharedNoise: none, decode: xT, schedule: model, time: truncated}
    group: {size: 6, promptsPerIteration: 3, statistics: running}
    chunk: {plan: "fixed:2", ratio: sequence, timeWeight: equalised, draw: "only:0,2", fraction: 1, stepFraction: 0.3, lateBelow: 0.25, stopSize: 5, \
    minChunk: 3, distance: cosine}
    loss: {clip: [1e-3, 2.5e-3], advantageClip: 3, advantageStd: global, kl: 0.04, klForm: k3, anchor: replay, \
    ratioNorm: guard}
    optim: {lr: 0.1, weightDecay: 0, betas: [0, 0.95], eps: 1e-300, maxGradNorm: 1, updatesPerIteration: 1, \
    microBatch: 7, state: int8, offload: true}
    trainable: {kind: full, rank: 4, alpha: 0.5, targets: "größe 🙂"}
    ema: {decay: 0.999}
    guards: {action: stop, blank: 0, diversity: 0.5, ink: [0.1, 9], sharpness: [0.2, 3], grid: [0.9, 1.1]}
    network: {dtype: bfloat16, timeRounding: model, attention: math, checkpointing: "every:4", memory: 24GB, weights: fp8, \
    vae: tiled, decodeDtype: bfloat16}
    run: {iterations: 3, checkpointEvery: 1, keep: 9, samplesEvery: 0, evaluateEvery: 0, stopReward: hpsv3, stopAbove: 0.5}
    """

  @Test("the documented block is the defaults, and they are valid")
  func defaults() throws {
    #expect(try Configuration.load(yaml: Self.documented, source: "block") == Configuration())
    #expect(try Configuration.load(yaml: "{}", source: "block") == Configuration())
    try Configuration().validate()
    #expect(Configuration().samplesPerIteration == 48)
  }

  @Test("every key is read")
  func everyKey() throws {
    let c = try Configuration.load(yaml: Self.unusual, source: "unusual")
    #expect(c.model == "/models/null" && c.output == "1e5" && c.seed == .max)
    #expect(c.prompts.file == "a b: c # d.jsonl" && c.prompts.split == "no")
    var judge = Configuration.Reward(name: "judge")
    (judge.label, judge.lateWeight, judge.threshold, judge.watch) = ("no: 1", 0, -1, true)
    (judge.gate.reward, judge.gate.above) = ("hpsv3", 0.5)
    (judge.failure.timeout, judge.failure.retries, judge.failure.abortAbove) = (5, 0, 1)
    judge.failure.allowTie = true
    (judge.model, judge.head, judge.quality, judge.language) = ("7b", "h", 9, "deu")
    (judge.command, judge.url, judge.batch, judge.concurrency) = (["a", "-b c"], "http://x", 2, 3)
    (judge.tokenVariable, judge.template, judge.pattern, judge.scale) = ("T", "{prompt}?", "([0-9]+)", 10)
    #expect(
      c.rewards == [
        .init(name: "hpsv3", weight: -0.25), .init(name: "true", score: "2024-01-01", weight: 1e20), judge,
      ])
    // and all of them are written again
    #expect(try Configuration.load(yaml: c.yaml(), source: "written") == c)
    #expect(judge.node.mapping?.count == Configuration.Reward.keys.count)
    #expect(c.aggregate == .normalised)
    #expect(c.sampling.guidance == nil && c.sampling.window == .steps(first: 1, last: 6))
    #expect(c.sampling.step == .cps && c.sampling.decode == .xT && c.sampling.schedule == .model)
    #expect(c.loss.clip == [1e-3, 2.5e-3] && c.loss.klForm == .k3 && c.loss.anchor == .replay)
    #expect(c.trainable.kind == .full && c.trainable.targets == ["größe 🙂"])
    #expect(c.network.checkpointing == .every(4) && c.optim.eps == 1e-300)
    // A key left at its default would hide that it is not read.
    let (mine, defaults) = (try object(c), try object(Configuration()))
    for field in Configuration.fields {
      let keys = field.children.map { "\(field.name).\($0)" }
      for path in keys.isEmpty ? [field.name] : keys {
        #expect(value(mine, path) != value(defaults, path), "\(path) is at its default")
      }
    }
  }

  private func object(_ configuration: Configuration) throws -> NSDictionary {
    try #require(JSONSerialization.jsonObject(with: JSONEncoder().encode(configuration)) as? NSDictionary)
  }

  private func value(_ object: NSDictionary, _ path: String) -> NSObject? {
    path.split(separator: ".").reduce(object as NSObject?) { ($0 as? NSDictionary)?[String($1)] as? NSObject }
  }

  @Test("writing and reading gives the same value, and the same text", arguments: [documented, unusual])
  func roundTrip(_ text: String) throws {
    let first = try Configuration.load(yaml: text, source: "first")
    let second = try Configuration.load(yaml: first.yaml(), source: "second")
    #expect(second == first)
    #expect(second.yaml() == first.yaml())
    let json = try JSONDecoder().decode(Configuration.self, from: JSONEncoder().encode(first))
    #expect(json == first)
  }

  @Test(
    "strings that look like something else survive",
    arguments: [
      "null", "~", "", "yes", "1.5", "0x10", "1e-5", "- a", "#a", " a ", "a: b", "two\nlines", "tab\t", "'\"",
      "{}", "*a",
      "&a", "!a", "%a", "\u{1}", "2001-01-01", "🙂", "<<", "=",
    ])
  func awkwardStrings(_ text: String) throws {
    var configuration = Configuration()
    configuration.model = text
    configuration.trainable.targets = [text, text]
    configuration.rewards[0].score = text
    #expect(try Configuration.load(yaml: configuration.yaml(), source: "again") == configuration)
  }

  @Test(
    "numbers read back as the same number",
    arguments: [
      0, -0.0, 0.1, 1.0 / 3, 5e-5, 1e-5, 2.5e-5, 1e16, 1e22, 1e-300, .greatestFiniteMagnitude,
      123456789,
    ])
  func numbers(_ number: Double) throws {
    var configuration = Configuration()
    configuration.optim.lr = number
    let again = try Configuration.load(yaml: configuration.yaml(), source: "again").optim.lr
    #expect(again.bitPattern == number.bitPattern)
  }

  @Test("the written form is stable")
  func writtenForm() {
    // Oracle: written out by hand from the contract's order.
    let expected = """
      model: Models/flux-mini
      output: runs/demo
      seed: 1
      prompts:
        file: Data/prompts.jsonl
        split: train
        embeddings: auto
      rewards:
      - name: scenes
        score: graded
        weight: 1
      aggregate: sum
      sampling:
        steps: 17
        shift: 3
        guidance: 3.5
      """
    let text = Configuration().yaml()
    #expect(text.hasPrefix(expected))
    #expect(text.contains("  clip: [5.0e-05, 5.0e-05]\n"))  // YAML 1.1 readers take 5e-05 for a string
    #expect(text.contains("  targets: [to_q, to_k, to_v, to_out.0]\n"))
  }

  @Test("every preset and example is valid and headed by command, hardware, memory and time")
  func presets() throws {
    let files = FileManager.default
    let presets = try files.contentsOfDirectory(atPath: root.appending(path: "Presets").path).sorted()
    #expect(
      presets == [
        "flux1-dev-24gb.yaml", "flux1-dev.yaml", "flux1-schnell.yaml", "sd3.5-large.yaml",
        "sd3.5-medium.yaml",
      ])
    for name in presets {
      let file = root.appending(path: "Presets/\(name)")
      try Configuration.load(file: file).validate()
      let text = try String(contentsOf: file, encoding: .utf8)
      for part in ["# chunkgrpo train Presets/\(name)", "# Hardware:", "Memory:", "# Time:"] {
        #expect(text.contains(part), "\(name): \(part)")
      }
    }
    try Configuration.load(file: root.appending(path: "Examples/demo.yaml")).validate()
  }

  @Test("the YAML keys are those of Codable")
  func keysMatchCodable() throws {
    // An absent option would be left out.
    var configuration = Configuration()
    (configuration.sampling.textLength, configuration.network.memory) = (1, "1GB")
    (configuration.run.stopReward, configuration.sampling.coarse) = ("scenes", 1)
    let object = try #require(try object(configuration) as? [String: Any])
    #expect(Set(object.keys) == Set(Configuration.keys))
    for field in Configuration.fields where !field.children.isEmpty && field.name != "rewards" {
      let section = try #require(object[field.name] as? [String: Any])
      #expect(Set(section.keys) == Set(field.children))
    }
    // Those of rewards are read, written and compared one by one in everyKey; absent options are left out here.
    let reward = try #require((object["rewards"] as? [[String: Any]])?.first)
    #expect(Set(reward.keys).isSubset(of: Configuration.Reward.keys))
  }

  @Test(
    "bad files name the place and the way out",
    arguments: [
      ("", "demo.yaml: empty; write {} for a run with every default"),
      ("# nothing\n", "demo.yaml: empty; write {} for a run with every default"),
      ("---\n", "demo.yaml: empty; write {} for a run with every default"),
      (
        "a: [1,\n 2\n",
        "demo.yaml:3: not valid YAML: while parsing a flow sequence on line 1, did not find expected ',' or ']'"
      ),
      (
        "model: x\n@seed: 1",
        "demo.yaml:2: not valid YAML: while scanning for the next token on line 2, "
          + "found character that cannot start any token"
      ),
      ("model: *nobody", "demo.yaml:1: not valid YAML: found undefined alias"),
      ("model: a\u{0}b", "demo.yaml: not valid YAML: control characters are not allowed"),
      (
        "{}\n---\n{}",
        "demo.yaml:2: not valid YAML: expected a single document in the stream on line 1, "
          + "but found another document"
      ),
      ("sampling:\n  steps: 9\n  eta: 1\n  steps: 9", "demo.yaml:2: steps is given more than once; keep one"),
      ("- a", "demo.yaml:1: expected a mapping, got a list"),
      ("hello", "demo.yaml:1: expected a mapping, got \"hello\""),
    ])
  func badFiles(_ yaml: String, _ expected: String) {
    #expect(loadMessage(yaml) == expected)
  }

  @Test(
    "unknown keys name the nearest",
    arguments: [
      (
        "sampling:\n\n  step_count: 9",
        "demo.yaml:3: sampling.step_count is not a key; did you mean sampling.steps?"
      ),
      (
        "optim: {micro_batch: 9}",
        "demo.yaml:1: optim.micro_batch is not a key; did you mean optim.microBatch?"
      ),
      ("optm: {}", "demo.yaml:1: optm is not a key; did you mean optim?"),
      ("a: 1", "demo.yaml:1: a is not a key; did you mean ema?"),
      ("lr: 1", "demo.yaml:1: lr is not a key; did you mean optim.lr?"),
      ("sampling: {seed: 1}", "demo.yaml:1: sampling.seed is not a key; did you mean seed?"),
      (
        "rewards:\n- name: a\n- nam: b",
        "demo.yaml:3: rewards[1].nam is not a key; did you mean rewards[1].name?"
      ),
      ("<<: {seed: 1}", "demo.yaml:1: << is not a key; did you mean ema?"),
      ("[1]: 2", "demo.yaml:1: a list is not a key; did you mean loss?"),
    ])
  func unknownKeys(_ yaml: String, _ expected: String) {
    #expect(loadMessage(yaml) == expected)
  }

  @Test(
    "wrong types say what was expected and what came",
    arguments: [
      ("group:\n  size: many", "demo.yaml:2: group.size: expected an integer, got \"many\""),
      ("group: {size: 1.5}", "demo.yaml:1: group.size: expected an integer, got 1.5"),
      ("group: {size: 17.0}", "demo.yaml:1: group.size: expected an integer, got 17.0"),
      ("group: {size: \"17\"}", "demo.yaml:1: group.size: expected an integer, got \"17\""),
      ("group: {size: }", "demo.yaml:1: group.size: expected an integer, got null"),
      ("group: {size: [1]}", "demo.yaml:1: group.size: expected an integer, got a list"),
      (
        "group: {size: 99999999999999999999}",
        "demo.yaml:1: group.size: expected an integer, got 99999999999999999999"
      ),
      ("group: 5", "demo.yaml:1: group: expected a mapping, got 5"),
      ("group:\nseed: 2", "demo.yaml:1: group: expected a mapping, got null"),
      ("seed: -1", "demo.yaml:1: seed: expected an integer from 0 to 2^64 - 1, got -1"),
      ("optim: {lr: fast}", "demo.yaml:1: optim.lr: expected a finite number, got \"fast\""),
      ("optim: {lr: .nan}", "demo.yaml:1: optim.lr: expected a finite number, got \".nan\""),
      ("optim: {lr: nan}", "demo.yaml:1: optim.lr: expected a finite number, got nan"),
      ("optim: {lr: 1e999}", "demo.yaml:1: optim.lr: expected a finite number, got 1e999"),
      ("optim: {lr: 0x1p3}", "demo.yaml:1: optim.lr: expected a finite number, got 0x1p3"),
      ("optim: {betas: [a]}", "demo.yaml:1: optim.betas[0]: expected a finite number, got \"a\""),
      ("optim: {betas: {a: 1}}", "demo.yaml:1: optim.betas: expected a list, got a mapping"),
      ("trainable: {targets: null}", "demo.yaml:1: trainable.targets: expected a list, got null"),
      ("model: ~", "demo.yaml:1: model: expected a string, got null"),
      ("model: {}", "demo.yaml:1: model: expected a string, got a mapping"),
      ("rewards: scenes", "demo.yaml:1: rewards: expected a list, got \"scenes\""),
      ("rewards: [scenes]", "demo.yaml:1: rewards[0]: expected a mapping, got \"scenes\""),
      (
        "sampling:\n  shift: 2\n  step: sde",
        "demo.yaml:3: sampling.step: expected one of flow-sde, dance-sde, cps, ode, got \"sde\""
      ),
      ("sampling: {decode: XT}", "demo.yaml:1: sampling.decode: expected one of x0, xT, got \"XT\""),
      (
        "sampling: {window: 3}",
        "demo.yaml:1: sampling.window: expected all, first-last such as 0-4, sliding:width,stride,iterations, random:width or drawn, got 3"
      ),
      (
        "sampling: {window: 1--3}",
        "demo.yaml:1: sampling.window: expected all, first-last such as 0-4, sliding:width,stride,iterations, random:width or drawn, got \"1--3\""
      ),
      (
        "network: {checkpointing: \"every:x\"}",
        "demo.yaml:1: network.checkpointing: expected none, block or every:n, got \"every:x\""
      ),
    ])
  func wrongTypes(_ yaml: String, _ expected: String) {
    #expect(loadMessage(yaml) == expected)
  }

  @Test("anchors, aliases, a byte order mark and Windows lines are fine")
  func yamlForms() throws {
    let text = "\u{FEFF}loss: {clip: &c [1.0e-3, 1.0e-3]}\r\noptim: {betas: *c}\r\nchunk: {plan: step}\r\n"
    let c = try Configuration.load(yaml: text, source: "forms")
    #expect(c.loss.clip == [1e-3, 1e-3] && c.optim.betas == c.loss.clip && c.chunk.plan == "step")
    #expect(
      try Configuration.load(yaml: "trainable: {targets: to_q}", source: "one").trainable.targets == ["to_q"])
  }

  @Test("overrides are YAML, apply in order and leave the rest")
  func overrides() throws {
    let c = try Configuration.load(
      yaml: "sampling: {steps: 9, shift: 2}", source: "demo.yaml",
      overrides: [
        "sampling.steps=5", "sampling.steps=6", "sampling={height: 32, guidance: ~}", "chunk.plan=list:2,3",
        "rewards=[{name: a}, {name: b, weight: 2}]", "trainable.targets=[to_q, to_k]", " model = a=b ",
        "seed=7",
      ])
    #expect(c.sampling.steps == 6 && c.sampling.shift == 2 && c.sampling.height == 32)
    #expect(c.sampling.guidance == nil && c.chunk.plan == "list:2,3" && c.model == "a=b" && c.seed == 7)
    #expect(c.rewards == [.init(name: "a"), .init(name: "b", weight: 2)])
    #expect(c.trainable.targets == ["to_q", "to_k"])
  }

  @Test(
    "bad overrides quote the option",
    arguments: [
      ("sampling.steps", "--set sampling.steps: expected key=value, such as sampling.steps=9"),
      ("=5", "--set =5: expected key=value, such as sampling.steps=9"),
      ("a..b=5", "--set a..b=5: expected key=value, such as sampling.steps=9"),
      (
        "sampling.step_count=5",
        "--set sampling.step_count=5: sampling.step_count is not a key; did you mean sampling.steps?"
      ),
      ("sampling.steps=five", "--set sampling.steps=five: sampling.steps: expected an integer, got \"five\""),
      ("sampling.steps=", "--set sampling.steps=: sampling.steps: expected an integer, got null"),
      ("sampling.steps.x=1", "--set sampling.steps.x=1: sampling.steps: expected an integer, got a mapping"),
      (
        "loss.clip=[1",
        "--set loss.clip=[1: not valid YAML: while parsing a flow sequence, did not find expected ',' or ']'"
      ),
      ("loss={kl: 1, kl: 2}", "--set loss={kl: 1, kl: 2}: kl is given more than once; keep one"),
    ])
  func badOverrides(_ override: String, _ expected: String) {
    #expect(loadMessage("{}", [override]) == expected)
  }

  @Test("a resumed run takes what leaves its meaning alone")
  func resume() throws {
    let c = try Configuration.applyResume(
      base: Configuration(),
      overrides: [
        "run.iterations=80", "run={keep: 3}", "network.attention=math", "network.checkpointing=block",
        "optim.microBatch=4", "optim.offload=true",
      ])
    var expected = Configuration()
    (expected.run.iterations, expected.run.keep, expected.optim.microBatch) = (80, 3, 4)
    (expected.network.attention, expected.network.checkpointing) = (.math, .block)
    expected.optim.offload = true
    #expect(c == expected)
  }

  @Test(
    "a resumed run refuses the rest",
    arguments: ["optim.lr=1", "network={dtype: float32}", "seed=1", "loss.clip=[1]"])
  func resumeRefuses(_ override: String) {
    let path =
      ["optim.lr=1": "optim.lr", "seed=1": "seed", "loss.clip=[1]": "loss.clip"][override] ?? "network.dtype"
    let got = message {
      _ = try Configuration.applyResume(base: Configuration(), overrides: ["run.keep=3", override])
    }
    #expect(
      got
        == "--set \(override): \(path) is fixed by the run being resumed; only run.*, network.checkpointing, "
        + "network.attention, optim.microBatch, optim.offload may be set; start a new run to change it")
  }

  @Test("paths: the current directory first, then the file's folder, otherwise as written")
  func paths() throws {
    try withFolder { folder in
      let files = FileManager.default
      let here = try #require(
        try files.contentsOfDirectory(atPath: files.currentDirectoryPath).sorted().first)
      let beside = "only-beside-\(UUID())"
      for name in [here, beside] {
        try files.createDirectory(at: folder.appendingPathComponent(name), withIntermediateDirectories: true)
      }
      let file = folder.appendingPathComponent("demo.yaml")
      try Data("model: \(beside)\nprompts: {file: \(here)}\noutput: nowhere-at-all\n".utf8).write(to: file)
      let c = try Configuration.load(file: file)
      #expect(c.model == folder.appendingPathComponent(beside).standardizedFileURL.path)
      #expect(c.prompts.file == here)
      #expect(c.output == "nowhere-at-all")
      #expect(try Configuration.load(file: file, overrides: ["model=\(beside)"]).model == beside)
      #expect(try Configuration.load(file: file, overrides: ["seed=4"]).seed == 4)
    }
  }

  @Test("files that cannot be read")
  func unreadable() throws {
    try withFolder { folder in
      #expect(
        message { _ = try Configuration.load(file: folder) } == "\(folder.path): is a folder, expected a file"
      )
      let file = folder.appendingPathComponent("demo.yaml")
      #expect(message { _ = try Configuration.load(file: file) } == "\(file.path): no such file")
      try Data([0x61, 0x3A, 0x20, 0x0A, 0xC3, 0xA4, 0xFF]).write(to: file)
      #expect(
        message { _ = try Configuration.load(file: file) } == "\(file.path): not UTF-8 at byte 6, line 2")
      try Data("seed: x".utf8).write(to: file)
      #expect(
        message { _ = try Configuration.load(file: file) }.hasPrefix(
          "\(file.path):1: seed: expected an integer"))
    }
    let missing = URL(fileURLWithPath: "no-such.yaml")
    #expect(
      message { _ = try Configuration.load(file: missing) }
        == "no-such.yaml: no such file, looked for \(FileManager.default.currentDirectoryPath)/no-such.yaml")
  }
}

@Suite("configuration: values")
struct ConfigurationValidationTests {
  @Test(
    "steps that are trained on",
    arguments: [
      (17, "all", 0..<16), (17, "0-4", 0..<5), (17, "3-16", 3..<16), (17, "16-16", 16..<16),
      (2, "all", 0..<1),
      (1, "all", 0..<0), (-5, "all", 0..<0), (9, "5-3", 0..<0),
    ])
  func trainableSteps(_ steps: Int, _ window: String, _ expected: Range<Int>) throws {
    // Oracle: counted by hand; the last step is never trained on.
    var sampling = Configuration.Sampling()
    sampling.steps = steps
    sampling.window = try #require(.init(rawValue: window))
    #expect(sampling.trainableSteps == expected || (expected.isEmpty && sampling.trainableSteps.isEmpty))
    sampling.window = .steps(first: 0, last: .max)
    #expect(sampling.trainableSteps.isEmpty)
  }

  // Oracle: written out. Eight trainable steps; the last place is taken where the stride would pass it.
  @Test("windows that move: where, and that every text comes back")
  func movingWindows() throws {
    var sampling = Configuration.Sampling()
    sampling.steps = 9
    var random = RandomPlan(seed: 4).stream(.window)
    func starts(_ text: String, _ iterations: Int) throws -> [Int] {
      sampling.window = try #require(.init(rawValue: text))
      #expect(sampling.window.rawValue == text)
      return (0..<iterations).map { i in
        let window = sampling.window(iteration: i, using: &random)
        #expect(window.count == sampling.trainableSteps.count)
        return window.lowerBound
      }
    }
    #expect(try starts("sliding:3,2,2", 10) == [0, 0, 2, 2, 4, 4, 5, 5, 0, 0])
    #expect(try starts("sliding:8,1,1", 3) == [0, 0, 0])
    #expect(
      Configuration.Sampling.Window(rawValue: "sliding:4") == .sliding(width: 4, stride: 1, iterations: 25))
    // 4.5 standard errors of a frequency
    let drawn = try starts("random:3", 4000)
    for place in 0...5 {
      let share = Double(drawn.filter { $0 == place }.count) / 4000
      #expect(abs(share - 1.0 / 6) < 4.5 * (5.0 / 36 / 4000).squareRoot())
    }
    #expect(drawn.allSatisfy { 0...5 ~= $0 })
    #expect(try starts("drawn", 1) == [0] && starts("all", 1) == [0] && starts("2-4", 1) == [2])
    for text in [
      "drawn:1", "all:", "sliding", "sliding:", "sliding:1,2", "random:1,2", "random:-1", "random:x",
    ] {
      #expect(Configuration.Sampling.Window(rawValue: text) == nil, "\(text)")
    }
  }

  @Test(
    "sensible configurations pass",
    arguments: [
      ["sampling.step=dance-sde", "sampling.eta=0.3"],
      ["sampling.step=cps", "sampling.eta=1", "chunk.timeWeight=equalised"],
      ["chunk.plan=step"], ["chunk.plan=sequence", "chunk.draw=only:0"],
      ["chunk.plan=fixed:5", "chunk.draw=only:3,0"],
      ["chunk.plan=fixed:99"], ["sampling.steps=9", "chunk.plan=list:2,3,3"],
      ["sampling.window=0-4", "chunk.plan=list:2,3"], ["sampling.window=2-16", "chunk.plan=fixed:2"],
      ["trainable={kind: full, rank: 0, targets: []}"], ["sampling.guidance=null"], ["sampling.guidance=0"],
      ["optim.updatesPerIteration=48"], ["run.samplesEvery=0", "run.evaluateEvery=0"], ["chunk.fraction=1"],
      ["chunk.stopSize=5", "chunk.minChunk=3"], ["sampling.decode=xT", "sampling.schedule=model"],
      ["chunk.plan=adaptive", "chunk.stepFraction=0.01"], ["chunk.plan=auto", "chunk.draw=weighted"],
      ["chunk.plan=auto", "sampling.window=drawn"], ["sampling.steps=3", "chunk.plan=auto"],
      ["loss.kl=0.04", "loss.klForm=k3"], ["loss.kl=0.04", "trainable.kind=full"],
      ["loss.anchor=replay"], ["loss.ratioNorm=guard", "loss.clip=[2.0e-6, 2.0e-6]", "loss.anchor=replay"],
      ["loss.ratioNorm=guard", "sampling.step=cps"],
      ["group.statistics=running", "loss.advantageStd=global"],
      ["sampling.window=sliding:4", "chunk.plan=step"],
      ["sampling.window=sliding:16,3,1", "chunk.plan=fixed:4"],
      ["sampling.window=random:5", "chunk.plan=list:2,3", "sampling.coarse=3", "sampling.prefix=shared"],
      ["sampling.window=drawn", "sampling.coarse=1", "sampling.prefix=shared", "sampling.sharedNoise=batch"],
      ["chunk.plan=adaptive-shared", "chunk.draw=weighted"],
      ["chunk.draw=weighted:softmax", "chunk.distance=cosine"], ["chunk.draw=weighted:normalised"],
      ["chunk.timeWeight=none"], ["chunk.timeWeight=tempflow"], ["chunk.timeWeight=guard"],
      ["rewards=[{name: a}, {name: b, weight: 0}, {name: a, score: x}]", "aggregate=normalised"],
    ])
  func accepted(_ overrides: [String]) throws {
    try Configuration.load(yaml: "{}", source: "demo.yaml", overrides: overrides).validate()
  }

  @Test(
    "nonsense is refused in one line",
    arguments: [
      (
        ["group.size=1"],
        "group.size: expected at least 2, got 1: an advantage compares the samples of one prompt"
      ),
      (["group.promptsPerIteration=0"], "group.promptsPerIteration: expected at least 1, got 0"),
      (["group.size=9223372036854775807"], "group.size: times group.promptsPerIteration is too large"),
      (["sampling.steps=1"], "sampling.steps: expected at least 2, got 1: the last step is never trained on"),
      (["sampling.shift=0"], "sampling.shift: expected a number above 0, got 0"),
      (["sampling.guidance=-1"], "sampling.guidance: expected a number of 0 or more, got -1"),
      (["sampling.height=0"], "sampling.height: expected at least 1, got 0"),
      (["sampling.width=-64"], "sampling.width: expected at least 1, got -64"),
      (
        ["sampling.step=ode"],
        "sampling.step: an ode step has no log-probability, so it cannot be trained on; "
          + "use flow-sde, dance-sde or cps"
      ),
      (
        ["sampling.eta=0"],
        "sampling.eta: 0 makes every step deterministic: it has no log-probability, so it cannot "
          + "be trained on; use a value above 0"
      ),
      (["sampling.eta=-0.1"], "sampling.eta: expected a number of 0 or more, got -0.1"),
      (
        ["sampling.step=cps", "sampling.eta=1.5"],
        "sampling.eta: expected at most 1 for sampling.step cps, got 1.5"
      ),
      (
        ["sampling.window=sliding:17,1,1"],
        "sampling.window: expected a width of 1 to 16, the trainable steps, got sliding:17,1,1"
      ),
      (
        ["sampling.window=sliding:4,0,1"],
        "sampling.window: expected a stride and iterations of 1 or more, got sliding:4,0,1"
      ),
      (
        ["sampling.window=random:0"],
        "sampling.window: expected a width of 1 to 16, the trainable steps, got random:0"
      ),
      (
        ["sampling.window=random:4", "chunk.plan=adaptive-shared"],
        "sampling.window: random:4 has other steps for every group, adaptive-shared has one plan: "
          + "use chunk.plan adaptive"
      ),
      (
        ["sampling.window=drawn", "chunk.plan=adaptive"],
        "sampling.window: drawn places the noise before the rollout, chunk.plan adaptive follows its latents: "
          + "use step, sequence, fixed:n or list:a,b,…"
      ),
      (
        ["sampling.window=drawn", "chunk.draw=weighted"],
        "sampling.window: drawn draws before the rollout, chunk.draw weighted weighs by its latents: "
          + "use uniform or only:a,b,…"
      ),
      (
        ["sampling.coarse=2"],
        "sampling.coarse: sampling.window all leaves no deterministic steps to take in fewer; drop it"
      ),
      (
        ["sampling.window=0-4", "chunk.plan=list:2,3", "sampling.coarse=0"],
        "sampling.coarse: expected at least 1, got 0"
      ),
      (
        ["sampling.window=0-4", "chunk.plan=list:2,3", "sampling.prefix=shared"],
        "sampling.prefix: shared needs deterministic steps at the beginning, sampling.window 0-4 has none; use each"
      ),
      (
        ["sampling.window=drawn", "sampling.prefix=shared", "sampling.sharedNoise=none"],
        "sampling.prefix: shared needs samples that start from the same noise, sampling.sharedNoise is none; use group"
      ),
      (
        ["sampling.window=3-17"],
        "sampling.window: expected first-last within 0-16 for sampling.steps 17, got 3-17"
      ),
      (
        ["sampling.window=4-3"],
        "sampling.window: expected first-last within 0-16 for sampling.steps 17, got 4-3"
      ),
      (
        ["sampling.window=16-16"],
        "sampling.window: 16-16 holds only the last step, which is never trained on"
      ),
      (
        ["loss.clip=[0, 1.0e-5]"], "loss.clip: expected two numbers above 0, [lower, upper], got [0, 1.0e-05]"
      ),
      (["loss.clip=0.1"], "loss.clip: expected two numbers above 0, [lower, upper], got [0.1]"),
      (["loss.advantageClip=0"], "loss.advantageClip: expected a number above 0, got 0"),
      (["loss.kl=-1"], "loss.kl: expected a number of 0 or more, got -1"),
      (
        ["loss.kl=1", "sampling.step=cps"],
        "loss.klForm: flowGRPO divides by g, which sampling.step cps does not have; use exact or k3"
      ),
      (["chunk.fraction=0"], "chunk.fraction: expected a number in (0, 1], got 0"),
      (["chunk.fraction=1.1"], "chunk.fraction: expected a number in (0, 1], got 1.1"),
      (["chunk.stopSize=0"], "chunk.stopSize: expected at least 1, got 0"),
      (["chunk.minChunk=0"], "chunk.minChunk: expected at least 1, got 0"),
      (
        ["chunk.minChunk=5"],
        "chunk.minChunk: expected at most 4, half of chunk.stopSize 7 rounded up, got 5"
      ),
      (
        ["chunk.timeWeight=tempflow", "sampling.step=cps"],
        "chunk.timeWeight: tempflow needs g, which sampling.step cps "
          + "does not have; use equalised or another kind of step"
      ),
      (
        ["chunk.plan=list:4,4,4"],
        "chunk.plan: chunks [4, 4, 4] cover 12 steps, sampling.steps 17 has 16 trainable: "
          + "change chunk.plan or sampling.steps"
      ),
      (
        ["sampling.window=0-4"],
        "chunk.plan: chunks [2, 3, 4, 7] cover 16 steps, sampling.steps 17 with "
          + "sampling.window 0-4 has 5 trainable: change chunk.plan or sampling.window"
      ),
      (
        ["chunk.plan=list:2,x"],
        "chunk.plan: expected step, sequence, fixed:n, list:a,b,… (sizes of 1 or more), "
          + "adaptive, adaptive-shared or auto, got \"list:2,x\""
      ),
      (["chunk.draw=only:0,4"], "chunk.draw: chunk 4 is not in 0...3, those of chunk.plan list:2,3,4,7"),
      (["chunk.draw=only:0,0"], "chunk.draw: only:0,0 names a chunk twice"),
      (
        ["chunk.draw=some"],
        "chunk.draw: expected uniform, weighted, weighted:softmax or only:a,b,… (chunks from 0), got \"some\""
      ),
      (
        ["chunk.draw=weighted:best"],
        "chunk.draw: expected uniform, weighted, weighted:softmax or only:a,b,… (chunks from 0), got \"weighted:best\""
      ),
      (
        ["chunk.plan=adaptive", "chunk.draw=only:1"],
        "chunk.draw: only:1 names chunks, chunk.plan adaptive has others for every rollout: "
          + "use uniform or weighted, or another plan"
      ),
      (
        ["chunk.plan=auto", "chunk.draw=only:1"],
        "chunk.draw: only:1 names chunks, chunk.plan auto is made after a pilot: "
          + "use uniform or weighted, or another plan"
      ),
      (
        ["chunk.plan=auto", "sampling.window=random:4"],
        "sampling.window: random:4 moves, chunk.plan auto has one plan for the whole run: use chunk.plan adaptive"
      ),
      (
        ["chunk.plan=auto", "sampling.steps=2"],
        "chunk.minChunk: 2 steps do not fit in the 1 trainable ones: lower it, or raise sampling.steps"
      ),
      (
        ["chunk.plan=adaptive", "sampling.window=3-4", "chunk.minChunk=3"],
        "chunk.minChunk: 3 steps do not fit in the 2 trainable ones: lower it, or raise sampling.steps"
      ),
      (
        ["group.statistics=running", "aggregate=normalised"],
        "group.statistics: running compares with rewards of earlier iterations, aggregate normalised leaves none that "
          + "compare: its z-scores have mean 0 in every group; use aggregate sum, or group.statistics group"
      ),
      (["chunk.stepFraction=0"], "chunk.stepFraction: expected a number in (0, 1], got 0"),
      (
        ["chunk.draw='only:'"],
        "chunk.draw: expected uniform, weighted, weighted:softmax or only:a,b,… (chunks from 0), got \"only:\""
      ),
      (["optim.lr=0"], "optim.lr: expected a number above 0, got 0"),
      (["optim.weightDecay=-1"], "optim.weightDecay: expected a number of 0 or more, got -1"),
      (["optim.betas=[0.9, 1]"], "optim.betas: expected two numbers in [0, 1), got [0.9, 1]"),
      (["optim.betas=[0.9]"], "optim.betas: expected two numbers in [0, 1), got [0.9]"),
      (["optim.eps=0"], "optim.eps: expected a number above 0, got 0"),
      (["optim.maxGradNorm=0"], "optim.maxGradNorm: expected a number above 0, got 0"),
      (["optim.updatesPerIteration=0"], "optim.updatesPerIteration: expected at least 1, got 0"),
      (
        ["optim.updatesPerIteration=49"],
        "optim.updatesPerIteration: 49 updates need as many samples, group.size 12 "
          + "times group.promptsPerIteration 4 makes 48"
      ),
      (["optim.microBatch=0"], "optim.microBatch: expected at least 1, got 0"),
      (["trainable.rank=0"], "trainable.rank: expected at least 1, got 0"),
      (["trainable.alpha=0"], "trainable.alpha: expected a number above 0, got 0"),
      (
        ["trainable.targets=[]"],
        "trainable.targets: expected names of linear layers such as [to_q, to_v], got []"
      ),
      (["ema.decay=1"], "ema.decay: expected a number in [0, 1), got 1"),
      (
        ["network.checkpointing=every:0"],
        "network.checkpointing: expected at least 1, got 0: every:n counts blocks"
      ),
      (
        ["network.weights=int8", "trainable.kind=full"],
        "network.weights: int8 keeps weights that are not trained, trainable.kind full trains all; "
          + "use model, or trainable.kind lora"
      ),
      (["run.iterations=0"], "run.iterations: expected at least 1, got 0"),
      (["run.checkpointEvery=0"], "run.checkpointEvery: expected at least 1, got 0"),
      (["run.keep=0"], "run.keep: expected at least 1, got 0: a run resumes from its newest checkpoint"),
      (["run.samplesEvery=-1"], "run.samplesEvery: expected at least 0, got -1: 0 writes none"),
      (["run.evaluateEvery=-1"], "run.evaluateEvery: expected at least 0, got -1: 0 makes none"),
      (["rewards=[]"], "rewards: empty; name at least one, such as [{name: scenes}]"),
      (["rewards=[{weight: 1}]"], "rewards[0].name: missing or empty"),
      (["rewards=[{name: a, weight: 0}]"], "rewards: every weight is 0, nothing would be learned"),
      (
        ["rewards=[{name: a}, {name: a}]"],
        "rewards[1]: called a:default as rewards[0] is; add up their weights in one, or give it a label"
      ),
      (
        ["rewards=[{name: a, label: b/c}]"], "rewards[0].label: expected a name without /, got \"b/c\""
      ),
      (
        ["rewards=[{name: a, gate: {reward: b}}, {name: c}]"],
        "rewards[0].gate.reward: expected another of the rewards (c), got \"b\""
      ),
      (
        ["rewards=[{name: a, gate: {reward: c}}, {name: c, watch: true}]"],
        "rewards[0].gate.reward: c is only watched, samples have no score of it; drop its watch, its weight may be 0"
      ),
      (
        ["rewards=[{name: a}, {name: c, watch: true}]", "run.evaluateEvery=0"],
        "rewards[1].watch: is scored at evaluations, run.evaluateEvery 0 makes none; set it"
      ),
      (
        ["rewards=[{name: a, watch: true}]"], "rewards: every weight is 0, nothing would be learned"
      ),
      (
        ["rewards=[{name: a, failure: {abortAbove: 2}}]"],
        "rewards[0].failure.abortAbove: expected a share in [0, 1], got 2"
      ),
      (
        ["rewards=[{name: a, lateWeight: 0}]", "group.statistics=running"],
        "rewards[0].lateWeight: makes two sums of rewards, group.statistics running keeps one; use group"
      ),
      (["chunk.lateBelow=2"], "chunk.lateBelow: expected a noise level in [0, 1], got 2"),
      (
        ["guards.ink=[2, 3]"], "guards.ink: expected two factors around 1, [lower, upper], got [2, 3]"
      ),
      (
        ["guards.action=stop", "run.evaluateEvery=0"],
        "guards.action: stop looks at evaluations, run.evaluateEvery 0 makes none; set it"
      ),
      (["output=''"], "output: expected a name, got an empty one"),
    ])
  func refused(_ overrides: [String], _ expected: String) throws {
    let configuration = try Configuration.load(yaml: "{}", source: "demo.yaml", overrides: overrides)
    #expect(message { try configuration.validate() } == expected)
  }

  // Oracle: the messages of each mistake alone, above.
  @Test("all mistakes are said at once, each once, what follows from another not at all")
  func several() throws {
    let values = try Configuration.load(
      yaml: "{}", source: "demo.yaml",
      overrides: [
        "sampling.steps=1", "sampling.eta=-1", "chunk.fraction=1.5", "chunk.draw=some", "group.size=1",
        "optim.updatesPerIteration=49",
      ])
    #expect(
      message { try values.validate() } == """
        5 problems
          sampling.steps: expected at least 2, got 1: the last step is never trained on
          sampling.eta: expected a number of 0 or more, got -1
          group.size: expected at least 2, got 1: an advantage compares the samples of one prompt
          chunk.fraction: expected a number in (0, 1], got 1.5
          chunk.draw: expected uniform, weighted, weighted:softmax or only:a,b,… (chunks from 0), got "some"
        """)
    // Keys that cannot be read, then values; the plan fits a number of steps that is not known.
    let got = loadMessage(
      "sampling: {step: euler, steps: many, window: 3}\nchunk: {timeWeight: heavy, plan: 'list:1,2', fraction: 0}",
      ["chunk.distance=far", "chunk.plam=step"])
    #expect(
      got == """
        7 problems
          demo.yaml:1: sampling.step: expected one of flow-sde, dance-sde, cps, ode, got "euler"
          demo.yaml:1: sampling.steps: expected an integer, got "many"
          demo.yaml:1: sampling.window: expected all, first-last such as 0-4, sliding:width,stride,iterations, \
        random:width or drawn, got 3
          demo.yaml:2: chunk.timeWeight: expected one of perChunk, none, equalised, tempflow, guard, got "heavy"
          --set chunk.distance=far: chunk.distance: expected one of l1, l2, cosine, got "far"
          --set chunk.plam=step: chunk.plam is not a key; did you mean chunk.plan?
          chunk.fraction: expected a number in (0, 1], got 0
        """)
    let resumed = message {
      _ = try Configuration.applyResume(
        base: Configuration(), overrides: ["seed=2", "run.keep=x", "ema.decay=0"])
    }
    #expect(resumed.hasPrefix("3 problems\n") && resumed.contains("seed=2") && resumed.contains("ema.decay"))
    #expect(resumed.contains("run.keep: expected an integer"))
  }

  @Test(
    "malformed plans are refused, none of them traps",
    arguments: [
      "", "list", "list:", "list:0,16", "list:-1,17", "list:16,", "list: 16", "fixed", "fixed:0", "fixed:-1",
      "fixed:x",
      "step:1", "sequence:2", "adaptive:3", "steps", "list:१६",
      "list:9223372036854775807,9223372036854775807,2,16",  // 2·(2⁶³ − 1) + 2 + 16 would wrap to 16
    ])
  func malformedPlans(_ plan: String) {
    var configuration = Configuration()
    configuration.chunk.plan = plan
    #expect(message { try configuration.validate() }.hasSuffix("adaptive-shared or auto, got \"\(plan)\""))
  }

  @Test("numbers that only a program can set", arguments: [Double.nan, .infinity, -.infinity])
  func notFinite(_ number: Double) {
    for path: WritableKeyPath<Configuration, Double> in [
      \.sampling.shift, \.sampling.eta, \.optim.lr, \.loss.advantageClip, \.chunk.fraction, \.ema.decay,
      \.rewards[0].weight, \.loss.clip[1], \.optim.betas[0], \.loss.kl, \.trainable.alpha,
    ] {
      var configuration = Configuration()
      configuration[keyPath: path] = number
      #expect(throws: ConfigurationError.self) { try configuration.validate() }
    }
  }
}
