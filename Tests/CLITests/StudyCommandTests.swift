import Foundation
import Testing

/// `study` end to end on flux-tiny. Oracle of what is interrupted: the same study left alone; equal means all of study.json
/// but what a clock measured, the learning curves, and every byte of every adapter.
@Suite("study", .serialized)
struct StudyCommandTests {
  static let settings = "run: {iterations: 6, checkpointEvery: 2, samplesEvery: 0, evaluateEvery: 3}"
  static let study = """
    base: config.yaml
    output: out
    set: ["chunk.plan=list:9"]  # not valid by itself: every arm names its own
    arms:
      step: [chunk.plan=step]
      sequence: [chunk.plan=sequence, optim.lr=2.0e-3]
    seeds: [1, 2, 3]
    evaluate: {count: 2, steps: 2}
    parallel: 2

    """
  let scratch: Scratch

  init() throws { scratch = try Self.folder() }

  private static func folder() throws -> Scratch {
    let scratch = try Scratch()
    try scratch.configure(settings: settings)
    try scratch.write(study, to: "study.yaml")
    return scratch
  }

  /// What counts of a finished study.
  struct Outcome: Equatable {
    let report: String, curves: String, adapters: [Data]

    init(_ scratch: Scratch) throws {
      report = try Self.timeless(scratch.data("out/study.json"))
      curves = try scratch.text("out/curves.csv")
      adapters = try ["step", "sequence"].flatMap { arm in
        try (1...3).map { try scratch.data("out/\(arm)/seed-\($0)/adapter/pytorch_lora_weights.safetensors") }
      }
    }

    static func timeless(_ data: Data) throws -> String {
      var object = try #require(try JSONSerialization.jsonObject(with: data) as? [String: Any])
      let arms = try #require(object["arms"] as? [[String: Any]])
      object["arms"] = arms.map { $0.filter { $0.key != "clock" } }
      return String(
        decoding: try JSONSerialization.data(withJSONObject: object, options: .sortedKeys), as: UTF8.self)
    }
  }

  /// The study left alone; made once. The tests that share its folder run one after the other.
  nonisolated(unsafe) static let unbroken = Result {
    let scratch = try folder()
    let result = try Tool.run(["study", "study.yaml", "--json"], in: scratch, limit: 600)
    try #require(result.status == 0, "\(result.err)")
    return (scratch: scratch, result: result, outcome: try Outcome(scratch))
  }

  /// Processes that write into this study.
  private var processes: Int {
    let all = (try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? []
    return all.filter { Int($0) != nil }.count { number in
      let line = FileManager.default.contents(atPath: "/proc/\(number)/cmdline") ?? Data()
      return line.range(of: Data(scratch.path("out").utf8)) != nil
    }
  }
  private func rows(_ run: String) -> Int {
    (try? scratch.data("out/\(run)/metrics.jsonl"))?.count { $0 == UInt8(ascii: "\n") } ?? 0
  }

  @Test("a study reports on every arm and seed, and --json is study.json")
  func whole() throws {
    let (scratch, result, _) = try Self.unbroken.get()
    let report = try result.json()
    #expect(try scratch.data("out/study.json") == Data(result.out.utf8))
    #expect(report["runs_done"] as? Int == 6 && report["reference"] as? String == "step")
    let arms = try #require(report["arms"] as? [[String: Any]])
    #expect(arms.map { $0["name"] as? String } == ["step", "sequence"])
    for arm in arms {
      #expect(arm["seeds"] as? [Int] == [1, 2, 3])
      // Oracle: 6 iterations of 2 samples; 2 trainable steps, of which step draws half and sequence both.
      let values = try ["images", "trained_steps"].map {
        try #require((arm[$0] as? [String: Any])?["mean"] as? Double)
      }
      #expect(values == (arm["name"] as? String == "step" ? [12, 12] : [12, 24]))
    }
    #expect((report["comparisons"] as? [[String: Any]])?.map { $0["arm"] as? String } == ["sequence"])
    let curves = try #require(report["curves"] as? [[String: Any]])
    #expect(curves.map { $0["iterations"] as? [Int] } == [[0, 3, 6], [0, 3, 6]])
    // What a run scored is what `evaluate` says of it.
    let scored = try Tool.run(
      ["evaluate", "out/sequence/seed-2", "--count", "2", "--steps", "2", "--json"], in: scratch
    ).json()
    let final = ((arms[1]["rewards"] as? [String: [String: Any]])?["vivid"]?["final"] as? [String: Any])?[
      "values"]
    #expect((final as? [Double])?[1] == scored["mean"] as? Double)
    for name in [
      "study.md", "study.csv", "vivid-images.png", "vivid-images.svg", "vivid-steps.png", "vivid-steps.svg",
    ] {
      #expect(scratch.exists("out/\(name)"), "\(name)")
    }
    #expect(try scratch.text("out/study.csv").split(separator: "\n").count == 7)
  }

  @Test("killed, interrupted and terminated, a study goes on and reports the same")
  func interruptions() throws {
    let expected = try Self.unbroken.get().outcome
    // As `kill -9` leaves it: its runs notice that it is gone, and stop.
    var study = try Tool.start(["study", "study.yaml"], in: scratch)
    try #require(waitUntil(limit: 120) { rows("step/seed-1") > 0 || !study.isRunning })
    study.send(SIGKILL)
    try #require(try study.wait().killed)
    #expect(waitUntil(limit: 20) { processes == 0 })
    #expect(rows("step/seed-1") < 6)
    for (signal, word, run) in [
      (SIGINT, "interrupted", "sequence/seed-2"), (SIGTERM, "terminated", "sequence/seed-3"),
    ] {
      study = try Tool.start(["study", "study.yaml"], in: scratch)
      try #require(waitUntil(limit: 240) { rows(run) > 0 || !study.isRunning })
      study.send(signal)
      let result = try study.wait()
      #expect(result.status == 128 + signal && !result.killed, "\(result.err)")
      #expect(result.err.hasSuffix("\(word)\n"))
      #expect(processes == 0)
    }
    let result = try Tool.run(["study", "study.yaml"], in: scratch)
    try #require(result.status == 0, "\(result.err)")
    #expect(try Outcome(scratch) == expected)
  }

  @Test("done runs are kept: another call only reports; an arm that changed is an error; a new one is added")
  func again() throws {
    let (source, _, outcome) = try Self.unbroken.get()
    let only = try Tool.run(["study", "study.yaml", "--report-only", "--json"], in: source)
    #expect(only.status == 0, "\(only.err)")
    #expect(try Outcome.timeless(Data(only.out.utf8)) == outcome.report)

    try source.write(
      Self.study.replacingOccurrences(of: "plan=sequence", with: "plan=step"), to: "changed.yaml")
    let changed = try Tool.run(["study", "changed.yaml"], in: source)
    #expect(changed.status == 1 && changed.out.isEmpty)
    #expect(changed.err.contains("arm sequence, seed 1: "))
    #expect(changed.err.contains("was trained with chunk.plan sequence, now step"))
    #expect(changed.err.contains("arm sequence, seed 3: "))

    try source.write(
      Self.study.replacingOccurrences(
        of: "seeds:", with: "  new: [chunk.plan=step, optim.lr=3.0e-3]\nseeds:"), to: "more.yaml"
    )
    let dry = try Tool.run(["study", "more.yaml", "--dry-run", "--json"], in: source).json()
    let states = try #require(dry["runs"] as? [[String: Any]]).map { $0["state"] as? String }
    #expect(states == ["done", "done", "new", "done", "done", "new", "done", "done", "new"])
    #expect(dry["seconds"] as? Double ?? 0 > 0)
    #expect(!source.exists("out/new"))
  }

  @Test("a run that fails ends the study with its words and its log; what is done stays")
  func failure() throws {
    try scratch.write(
      "base: config.yaml\noutput: out\narms: {a: [], b: [optim.lr=1e30]}\nseeds: [1, 2]\nparallel: 1\n",
      to: "study.yaml")
    let result = try Tool.run(["study", "study.yaml"], in: scratch)
    #expect(result.status == 1 && result.out.isEmpty)
    for words in [
      "arm b, seed 1: train ended with status 1: error: ", "optim.lr", scratch.path("out/logs/b-seed-1.log"),
    ] {
      #expect(result.err.contains(words), "\(words) is not in \(result.err)")
    }
    #expect(scratch.exists("out/a/seed-1/summary.json") && !scratch.exists("out/a/seed-2"))
    let report = try Tool.run(["study", "study.yaml", "--report-only", "--json"], in: scratch).json()
    #expect(report["runs_done"] as? Int == 1)
  }

  @Test("bad studies fail before anything is written, with every problem", arguments: [false, true])
  func badInput(dryRun: Bool) throws {
    try scratch.write(
      """
      base: config.yaml
      output: out
      arms: {a: [], b: [group.size=4], c: [chunk.plan=list:9], d: [sampling.height=33]}
      seeds: [1, 2]
      """, to: "study.yaml")
    let result = try Tool.run(["study", "study.yaml"] + (dryRun ? ["--dry-run"] : []), in: scratch)
    #expect(result.status == 1 && result.out.isEmpty)
    for words in ["arms differ in images generated (a 12, b 24", "arm c: chunk.plan"] {
      #expect(result.err.contains(words), "\(words) is not in \(result.err)")
    }
    #expect(!scratch.exists("out"))
    // What only the model knows is found before any run is started too.
    try scratch.write(
      "base: config.yaml\noutput: out\narms: {a: [], d: [sampling.height=33], e: [trainable.targets=nothing]}\nseeds: [1, 2]\n",
      to: "study.yaml")
    let model = try Tool.run(["study", "study.yaml"] + (dryRun ? ["--dry-run"] : []), in: scratch)
    #expect(model.status == 1 && model.out.isEmpty)
    for words in ["arm d: train ended with status 1", "33", "arm e: train ended with status 1", "nothing"] {
      #expect(model.err.contains(words), "\(words) is not in \(model.err)")
    }
    #expect(!scratch.exists("out"))
    #expect(
      try Tool.run(["study", "study.yaml", "--report-only"], in: scratch).err.contains("no run is done yet"))
    #expect(try Tool.run(["study", "none.yaml"], in: scratch).err.contains("none.yaml: no such file"))
  }
}
