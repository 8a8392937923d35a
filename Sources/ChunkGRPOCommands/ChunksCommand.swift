import ArgumentParser
import ChunkGRPO
import FlowTraining
import Foundation

struct Chunks: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Measure how a model's trajectories change, and show the chunks that every plan makes of them.",
    discussion: """
      Samples trajectories from noise of their own, decodes none, and prints the
      dynamics curve d with its spread, how far it depends on the prompt, and each
      plan with its chances to be drawn. The risk is what chunk.plan auto minimises.

      Examples:
        chunkgrpo chunks Models/flux-mini
        chunkgrpo chunks MODEL --steps 17 --shift 3 --prompts list.txt -o dynamics
        chunkgrpo chunks runs/a --plan auto --plan list:2,3,4,7 --json
      """)

  @Argument(
    help: "A model folder, an adapter, a checkpoint or a run; a configuration (YAML): its untrained model.")
  var model: String
  @Option(
    help: ArgumentHelp("Model folder, where MODEL is an adapter that does not say.", valueName: "folder"))
  var base: String?
  @Option(help: "Sampling steps T (default: the run's, else 17).")
  var steps: Int?
  @Option(help: "Shift of the training schedule (default: the run's, else 3).")
  var shift: Double?
  @Option(
    help: ArgumentHelp("flow-sde, dance-sde or cps (default: the run's, else flow-sde).", valueName: "kind"))
  var step: String?
  @Option(help: "Stochasticity η (default: the run's; that of the step's authors with --step).")
  var eta: Double?
  @Option(help: "How change is measured: l1, l2 or cosine (default: the run's, else l1).")
  var distance: String?
  @Option(
    parsing: .singleValue,
    help: ArgumentHelp(
      "A plan to show, as chunk.plan; may be repeated (default: all kinds).", valueName: "plan"))
  var plan: [String] = []
  @Option(
    help: ArgumentHelp(
      "Largest chunk of adaptive and auto plans (default: the run's, else 7).", valueName: "n"))
  var stopSize: Int?
  @Option(
    help: ArgumentHelp(
      "Smallest chunk of adaptive and auto plans (default: the run's, else 2).", valueName: "n"))
  var minChunk: Int?
  @Option(
    help: ArgumentHelp("A file of prompts (default: the run's, else the built-in one).", valueName: "file"))
  var prompts: String?
  @Option(
    help: "Part of the prompt file: train, dev, test or all (default: the run's, else train if it has one).")
  var split: String?
  @Option(help: "Prompts, drawn by the seed.")
  var count = ChunkDynamics.pilot.prompts
  @Option(help: "Trajectories of each prompt.")
  var samples = ChunkDynamics.pilot.samples
  @Option(help: "Seed of the prompts and the noise.")
  var seed: UInt64 = 1
  @Option(help: "Height in pixels (default: the run's, else the model's own size).")
  var height: Int?
  @Option(help: "Width in pixels (default: the run's, else the model's own size).")
  var width: Int?
  @Option(help: "Guidance scale, for models that take one (default: the run's, else 3.5).")
  var guidance: Double?
  @Option(
    name: .shortAndLong,
    help: ArgumentHelp("Folder for pictures (PNG, SVG), CSV and JSON; new or empty.", valueName: "folder"))
  var output: String?
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  func validate() throws {
    guard count > 0 else { throw ValidationError("--count: must be at least 1, got \(count)") }
    guard (1...RandomPlan.sampleLimit).contains(samples) else {
      throw ValidationError("--samples: must be 1 to \(RandomPlan.sampleLimit), got \(samples)")
    }
  }

  func run() throws {
    var reference = try ModelReference(model, base: base)
    // Read as the configuration is, so that all mistakes are said at once.
    let kind = step.flatMap { StepKind(rawValue: $0) }
    let options: [(option: String, key: String, value: String?)] = [
      ("--steps", "sampling.steps", steps.map(String.init)),
      ("--shift", "sampling.shift", shift.map { "\($0)" }),
      ("--step", "sampling.step", step),
      ("--eta", "sampling.eta", (eta ?? kind.flatMap { $0 == .ode ? nil : $0.defaultEta }).map { "\($0)" }),
      ("--distance", "chunk.distance", distance),
      ("--stop-size", "chunk.stopSize", stopSize.map(String.init)),
      ("--min-chunk", "chunk.minChunk", minChunk.map(String.init)),
    ]
    try reference.set(options.compactMap { o in o.value.map { (o.option, o.key, $0) } })
    try reference.resize(height: height, width: width, guidance: guidance)
    let list = try reference.prompts(file: prompts, split: split)
    let folder = output.map { URL(filePath: $0) }
    try folder.map { try Terminal.requireNewFolder($0, "-o") }
    Interruption.watch()
    let report = try ChunkReport(
      reference, prompts: list.map(\.text), count: count, samples: samples, plans: plan, seed: seed
    ) { done, total in Terminal.status("\(done)/\(total) trajectories") }
    Terminal.clearLine()
    let encoded = try Terminal.json(report)
    try folder.map { try report.write(json: Data((encoded + "\n").utf8), to: $0) }
    print(json ? encoded : Self.text(report))
    if let output, !json {
      print("\n\(output): " + ChunkReport.files.joined(separator: ", "))
    }
  }

  static func text(_ r: ChunkReport) -> String {
    let fixed = Terminal.fixed
    func list(_ p: [Double]) -> String {
      p.count > 8 ? "…" : "[" + p.map { fixed($0, 2) }.joined(separator: ", ") + "]"
    }
    let steps = r.dynamics.map { s in
      [
        "\(s.step)", "\(fixed(s.sigma, 3)) → \(fixed(s.next, 3))", fixed(s.mean, 4),
        fixed(s.betweenPrompts, 4),
        fixed(s.withinPrompts, 4), fixed(s.sensitivity, 3),
      ]
    }
    func percent(_ share: Double) -> String { "\(fixed(100 * share, 1)) %" }
    let p = r.pattern
    var pattern = [
      "log d varies by step \(percent(p.step)), prompt \(percent(p.prompt)), prompt × step \(percent(p.promptStep))"
        + (p.promptStepByChance.map { " (\(percent($0)) by chance)" } ?? "")
        + ", sample \(percent(p.sample))",
      "one trajectory's noise around the common pattern: \(fixed(p.noise, 3)) of log d",
    ]
    if let between = p.rankBetween {
      let within = p.rankWithin.map { ", \(fixed($0, 3)) within one" } ?? ""
      pattern.append("rank correlation of two curves: \(fixed(between, 3)) between prompts\(within)")
    }
    let plans = r.plans.map { plan -> [String] in
      if let problem = plan.problem { return [plan.plan, problem] }
      let even = plan.sizes.count > 4 && Set(plan.sizes).count == 1
      var sizes = even ? "\(plan.sizes.count) × \(plan.sizes[0])" : "\(plan.sizes)"
      if plan.distinct > 1 { sizes = "\(plan.distinct) plans; \(percent(plan.share)) \(sizes)" }
      return [
        plan.plan, sizes, fixed(plan.risk ?? .nan, 2), fixed(plan.uniform[0], 2), list(plan.weighted),
        list(plan.softmax),
      ]
    }
    return [
      "\(r.model): \(r.prompts.count) prompts × \(r.samples) trajectories, T \(r.steps), shift \(r.shift), "
        + "\(r.kind) η \(r.eta), \(r.height) × \(r.width), distance \(r.distance)\n",
      Terminal.table(
        [["step", "levels", "d", "± between prompts", "± within a prompt", "sensitivity"]] + steps) + "\n",
      pattern.joined(separator: "\n") + "\n",
      Terminal.table([["plan", "chunks", "risk", "uniform", "weighted", "weighted:softmax"]] + plans) + "\n",
      "trajectories \(Terminal.duration(r.secondsPilot)), planning \(fixed(1000 * r.secondsPlanning, 1)) ms",
    ].joined(separator: "\n")
  }
}
