import Foundation
import Testing

@testable import FlowTraining

@Suite("study")
struct StudyTests {
  let workshop: Workshop

  init() throws {
    workshop = try Workshop()
    workshop.configuration.run.evaluateEvery = 2
    try workshop.configuration.yaml().write(
      to: workshop.folder("base.yaml"), atomically: true, encoding: .utf8)
  }

  private func study(_ arms: [Study.Arm], seeds: [UInt64] = [1, 2]) -> Study {
    var study = Study()
    (study.base, study.output) = (workshop.folder("base.yaml").path, workshop.folder("out").path)
    (study.arms, study.seeds, study.evaluate.split) = (arms, seeds, "dev")
    return study
  }

  // MARK: reading

  @Test("every key is read, arms in the order of the file")
  func reading() throws {
    let study = try Study.load(
      yaml: """
        base: demo.yaml
        output: runs/s
        set: [run.stopReward=null]
        arms:
          zebra: []
          ant: [chunk.plan=step, "loss.clip=[1.0e-4, 1.0e-4]"]
          bee: optim.lr=1e-3
          cow:
        reference: ant
        seeds: [3, 1]
        evaluate: {split: dev, count: 2, steps: 9, seed: 4, every: 5, rewards: [scenes:strict]}
        parallel: 2
        budget: none
        """, source: "s.yaml")
    #expect(study.base == "demo.yaml" && study.output == "runs/s" && study.set == ["run.stopReward=null"])
    #expect(
      study.arms == [
        .init("zebra"), .init("ant", ["chunk.plan=step", "loss.clip=[1.0e-4, 1.0e-4]"]),
        .init("bee", ["optim.lr=1e-3"]), .init("cow"),
      ])
    #expect(study.reference == "ant" && study.seeds == [3, 1])
    let e = study.evaluate
    #expect(e.split == "dev" && e.count == 2 && e.steps == 9 && e.seed == 4 && e.every == 5)
    #expect(e.rewards == ["scenes:strict"])
    #expect(study.parallel == .processes(2) && study.budget == .none)
  }

  @Test(
    "bad files are refused where they are wrong",
    arguments: [
      ("", "s.yaml: empty; a study needs base, arms and seeds"),
      ("arm: {}", "s.yaml:1: arm is not a key; did you mean arms?"),
      ("evaluate: {cout: 2}", "s.yaml:1: evaluate.cout is not a key; did you mean evaluate.count?"),
      ("count: 2", "s.yaml:1: count is not a key; did you mean evaluate.count?"),
      ("arms: [a]", "s.yaml:1: arms: expected a mapping of names to lists of key=value, got a list"),
      ("arms: {a: [], a: []}", "s.yaml:1: a is given more than once; keep one"),
      ("parallel: 0", "s.yaml:1: parallel: expected auto or a number of processes, at least 1, got 0"),
      ("budget: time", "s.yaml:1: budget: expected one of images, none, got \"time\""),
      ("seeds: [a]", "s.yaml:1: seeds[0]: expected an integer from 0 to 2^64 - 1, got \"a\""),
    ])
  func badFiles(_ yaml: String, _ expected: String) {
    #expect(message { _ = try Study.load(yaml: yaml, source: "s.yaml") } == expected)
  }

  @Test("everything that is wrong is found at once")
  func problems() throws {
    var bad = study(
      [
        .init("a"), .init("b", ["chunk.plam=step"]), .init("c", ["chunk.plan=list:1"]),
        .init("d", ["group.size=2"]), .init("../e", ["optim.lr=2e-3"]), .init("f", ["seed=3"]),
        .init("g", []),
        .init("h", ["run.stopReward=vivid"]),
      ], seeds: [1, 1])
    (bad.reference, bad.evaluate.count, bad.evaluate.split) = ("z", 0, "exam")
    bad.evaluate.rewards = ["vivd"]
    let error = try #require(throws: StudyError.self) { try StudyPlan(bad) }
    for part in [
      "seeds: [1, 1] holds one twice", "arms.../e: a name is also a folder",
      "reference: z is no arm; there are a, b",
      "evaluate.count: must be at least 1, got 0",
      "arm b: --set chunk.plam=step: chunk.plam is not a key; did you mean chunk.plan?",
      "arm c: chunk", "arm f: changes seed, which all runs share", "arm g: the same as arm a; drop one",
      "(a 32, c 32, d 16,", "arm h: run.stopReward ends runs early", "no prompt in split exam", "rewards: ",
    ] { #expect(error.problems.contains { $0.contains(part) }, "\(part) is not among \(error)") }
    #expect(error.problems.count == 12, "\(error)")
  }

  @Test("what is allowed and perhaps not meant is warned of")
  func warnings() throws {
    let plan = try StudyPlan(
      study([.init("a"), .init("b", ["optim.lr=1e-3", "chunk.plan=step"])], seeds: [1]))
    #expect(plan.warnings.count == 2)
    #expect(plan.warnings.contains("arm b: optim.lr=1e-3 changes nothing, the base says so already"))
    #expect(plan.warnings.contains { $0.hasPrefix("one seed: no intervals") })
    #expect(plan.reference == "a")
  }

  @Test("runs go seed by seed; the command line of a run makes its configuration")
  func runs() throws {
    let plan = try StudyPlan(study([.init("a"), .init("b", ["loss.clip=[1.0e-4, 2.0e-4]"])], seeds: [7, 5]))
    #expect(plan.runs.map(\.name) == ["arm a, seed 7", "arm b, seed 7", "arm a, seed 5", "arm b, seed 5"])
    for run in plan.runs {
      let words = plan.trainArguments(run)
      #expect(words[0] == "train")
      // Oracle: what `train` does with these words.
      let overrides = words.indices.filter { words[$0] == "--set" }.map { words[$0 + 1] }
      var c = try Configuration.load(file: URL(filePath: words[1]), overrides: overrides)
      c.makePathsAbsolute()
      #expect(c == run.configuration)
    }
  }

  @Test("the example is a study without warnings")
  func example() throws {
    let plan = try StudyPlan(Study.load(file: root.appending(path: "Examples/study.yaml")))
    #expect(plan.warnings.isEmpty && plan.runs.count == 15 && plan.reference == "step")
    #expect(Set(plan.arms.map(\.images)).count == 1)
  }

  // MARK: equal noise

  /// A learning rate that leaves float32 weights as they are takes training out of the comparison: then images, and
  /// with them every reward and guard, are equal exactly if prompts, x_0 and step noise are.
  @Test("arms that differ in chunks, ratios and draws see the same prompts, x_0 and noise in every iteration")
  func equalNoise() throws {
    workshop.configuration.optim.lr = 1e-30
    workshop.configuration.run.evaluateEvery = 0
    func images(_ name: String, _ change: (inout Configuration) -> Void) throws -> [[Double]] {
      try workshop.train(name, change)
      return try ["reward_mean", "reward_std", "guards/ink", "guards/diversity"].map {
        try workshop.numbers(name, $0)
      }
    }
    let chunks = try images("a") { _ in }
    let steps = try images("b") {
      ($0.chunk.plan, $0.chunk.ratio, $0.chunk.timeWeight, $0.chunk.fraction) = ("step", .step, .none, 1)
      $0.optim.updatesPerIteration = 1
    }
    #expect(chunks == steps)
    #expect(chunks[0].count == 4 && Set(chunks[0]).count == 4)  // iterations do differ
    #expect(try images("c") { $0.seed = 2 } != chunks)
  }

  @Test("metrics count trained steps and passes")
  func counts() throws {
    // Oracle: 8 samples of 5 steps; list:1,3 at fraction ½ trains on one chunk, of 1 or 3 steps, step at fraction 1 on 4.
    try workshop.train("a") { ($0.chunk.plan, $0.chunk.fraction, $0.run.evaluateEvery) = ("step", 1, 2) }
    for row in try workshop.rows("a") {
      #expect(row["trained_steps"] as? Int == 32)
      #expect(row["network_passes"] as? Int == 40 + 32)
      #expect((row["seconds"] as? [String: Double])?["cpu"] ?? 0 > 0)
    }
    try workshop.train("b")
    for row in try workshop.rows("b") {
      let steps = try #require(row["trained_steps"] as? Int)
      #expect((8...24).contains(steps) && steps.isMultiple(of: 2))
    }
  }

  // MARK: report

  /// A finished run that no training made: `dev` at iterations 2 and 4, `steps` trained and `cpu` seconds an iteration.
  private func fake(_ run: StudyRun, _ plan: StudyPlan, final: Double, dev: [Double], steps: Int, cpu: Double)
    throws
  {
    try RunFolder(run.folder).create(run.configuration)
    var rows = ""
    for i in 1...4 {
      let look = i.isMultiple(of: 2) ? "\"eval/vivid\": \(dev[i / 2 - 1]), " : ""
      rows += """
        {"iteration": \(i), \(look)"trained_steps": \(steps), "network_passes": 50, "seconds": {"rollout": 1, "update": 2, "cpu": \(cpu)}}

        """
    }
    try Data(rows.utf8).write(to: RunFolder(run.folder).metricsFile)
    try FileManager.default.createDirectory(
      at: RunFolder(run.folder).adapter, withIntermediateDirectories: true)
    try Data("weights".utf8).write(to: RunFolder(run.folder).adapter.appending(path: "a.safetensors"))
    try run.finish(
      Data(#"{"rewards": {"vivid": {"mean": \#(final), "n": 3}}, "n_prompts": 3}"#.utf8),
      arguments: plan.evaluateArguments(run.folder.path))
  }

  /// Oracle: scipy 1.17.1, stats.ttest_rel with its confidence_interval, stats.t.interval; the detectable difference from
  /// the effect of ComparisonTests' method at four pairs; interpolation by hand.
  @Test("the report is scipy's")
  func report() throws {
    let finals: [String: [Double]] = [
      "ref": [0.50, 0.52, 0.47, 0.53], "a": [0.55, 0.54, 0.52, 0.60], "b": [0.51, 0.50, 0.49, 0.54],
    ]
    let plan = try StudyPlan(
      study(
        [.init("ref"), .init("a", ["chunk.plan=step"]), .init("b", ["optim.lr=2e-3"])], seeds: [1, 2, 3, 4]))
    for (i, run) in plan.runs.enumerated() {
      let seed = i / 3
      let start = 0.3 + 0.1 * Double(seed)  // dev noise of the seed, far larger than any gain
      let slope = run.arm == "a" ? 0.04 : 0.02
      try fake(
        run, plan, final: finals[run.arm]![seed], dev: [start + slope, start + 2 * slope],
        steps: run.arm == "b" ? 20 : 10,
        cpu: run.arm == "ref" ? 2 : 4)
    }
    let scores = try plan.runs.map { run in
      let state = try run.state(scoredBy: plan.evaluateArguments(run.folder.path))
      return (run, try #require(state.scores))
    }
    let starts = Dictionary(
      uniqueKeysWithValues: plan.study.seeds.map { ($0, ["vivid": 0.3 + 0.1 * Double($0 - 1)]) })
    let base = try StudyRun.scores(Data(#"{"rewards": {"vivid": {"mean": 0.45}}}"#.utf8))
    let report = try StudyReport(plan, scores: scores, base: base, starts: starts)

    // 1e-10 relative: ten digits, as the distribution itself is tested to.
    func close(_ got: Double?, _ expected: Double) {
      #expect(abs((got ?? .nan) - expected) < 1e-10 * max(1, abs(expected)))
    }
    #expect(report.arms.map(\.name) == ["ref", "a", "b"])
    let a = try #require(report.arms[1].rewards["vivid"])
    close(a.final.mean, 0.5525)
    close(a.final.ci95?[0], 0.4983438395402561)
    close(a.final.ci95?[1], 0.6066561604597439)
    close(a.gain.mean, 0.1025)
    #expect(report.comparisons.map(\.arm) == ["a", "b"])
    let expected = [
      (
        0.0475, 0.014696094338646562, 0.08030390566135347, 0.019220053120422815, 0.03844010624084563,
        0.04386879954107817
      ),
      (
        0.005, -0.022560793465556197, 0.03256079346555621, 0.6041813035905923, 0.6041813035905923,
        0.03685716378455338
      ),
    ]
    for (row, e) in zip(report.comparisons, expected) {
      close(row.difference, e.0)
      close(row.ci95[0], e.1)
      close(row.ci95[1], e.2)
      close(row.p, e.3)
      close(row.pHolm, e.4)
      #expect(abs(row.detectable - e.5) < 1e-8)  // the effect is tested to 1e-8
      #expect(row.n == 4)
    }
    // ref and a reach 40 trained steps, b 80: at 40, b is half way, at its first look.
    #expect(report.equalSteps == 40)
    for (arm, gain) in zip(report.arms, [0.04, 0.08, 0.02]) {
      let values = try #require(arm.rewards["vivid"]?.gainAtEqualSteps)
      for value in values.values { close(value, gain) }
    }
    close(report.arms[1].rewards["vivid"]?.gainAtEqualStepsAgainst?.difference, 0.04)
    // ref reaches 8 CPU seconds, the others 16.
    for (arm, gain) in zip(report.arms, [0.04, 0.04, 0.02]) {
      close(arm.clock.gainAtEqualCPUSeconds["vivid"]?.mean, gain)
    }
    close(report.arms[1].clock.gainPerCPUSecond["vivid"]?.mean, 0.1025 / 16)
    close(report.arms[0].clock.seconds.mean, 12)
    #expect(report.arms[2].trainedSteps.mean == 80 && report.arms[0].networkPasses.mean == 200)
    // Curves start at the untrained model, and the seeds' own dev noise is not in their band.
    let curve = try #require(report.curves.first { $0.arm == "a" })
    #expect(
      curve.iterations == [0, 2, 4] && curve.images == [0, 16, 32] && curve.trainedSteps == [0, 20, 40])
    for (value, mean) in zip(curve.mean, [0.45, 0.49, 0.53]) { close(value, mean) }
    for (low, high) in zip(curve.low, curve.high) { #expect(high - low < 1e-12) }
    #expect(!report.notes.contains { $0.hasPrefix("no difference is significant") })

    let half = try StudyReport(plan, scores: Array(scores.prefix(3)), base: base, starts: starts)
    #expect(half.comparisons.isEmpty && half.arms.allSatisfy { $0.rewards["vivid"]?.final.ci95 == nil })
    #expect(half.notes.contains { $0.hasPrefix("3 of 12 runs are done") })
    #expect(half.curves.allSatisfy { $0.low.isEmpty && $0.mean.count == 3 })
    let equal = try StudyReport(plan, scores: scores.filter { $0.0.arm != "a" }, base: base, starts: starts)
    #expect(equal.notes.contains { $0.hasPrefix("no difference is significant") })
    // One comparison needs no correction.
    #expect(equal.comparisons.map(\.pHolm) == equal.comparisons.map(\.p))
  }

  @Test("a finished run is known by its content; a changed arm or file is an error that says what changed")
  func states() throws {
    var mine = study([.init("a", ["chunk.plan=step"]), .init("b")])
    let plan = try StudyPlan(mine)
    let run = plan.runs[0], arguments = plan.evaluateArguments(run.folder.path)
    guard case .new = try run.state(scoredBy: arguments) else {
      Issue.record("not new")
      return
    }
    try fake(run, plan, final: 0.5, dev: [0.4, 0.4], steps: 1, cpu: 1)
    #expect(try run.state(scoredBy: arguments).scores?.rewards["vivid"]?.mean == 0.5)
    // Scored otherwise: only the score is made again.
    guard case .started(iterations: 4) = try run.state(scoredBy: arguments + ["--seed", "2"]) else {
      Issue.record("not to be scored again")
      return
    }

    mine.arms[0].overrides = ["chunk.plan=fixed:2", "optim.lr=2e-3"]
    let other = try StudyPlan(mine).runs[0]
    let text = message { _ = try other.state(scoredBy: arguments) }
    #expect(text.contains("arm a, seed 1: \(run.folder.path) was trained with"))
    #expect(text.contains("chunk.plan step, now fixed:2"))
    #expect(text.contains("optim.lr 0.001, now 0.002"))

    let weights = RunFolder(run.folder).adapter.appending(path: "a.safetensors")
    try Data("weightz".utf8).write(to: weights)
    #expect(message { _ = try run.state(scoredBy: arguments) }.contains("was changed after it was scored"))
  }
}
