import ArgumentParser
import FlowRewards
import FlowTraining
import Foundation

struct Evaluate: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Score a model on held-out prompts, alone or against another on equal noise.",
    discussion: """
      Samples deterministically, by the model's own schedule; the unit of all
      intervals and tests is the prompt.

      Examples:
        chunkgrpo evaluate runs/a --against Models/flux-mini --picture ab.png
        chunkgrpo evaluate Models/flux-mini --reward scenes:strict --json
        chunkgrpo evaluate runs/a --steps 50 --switch 0,10,20,30,40,50
      """)

  @Argument(
    help: "A model folder, an adapter, a checkpoint or a run; a configuration (YAML): its untrained model.")
  var model: String
  @Option(help: ArgumentHelp("Compare with this model, prompt by prompt.", valueName: "model"))
  var against: String?
  @Option(
    help: ArgumentHelp(
      "Model folder, where an adapter does not say, or of the steps after --switch.", valueName: "folder"))
  var base: String?
  @Option(help: ArgumentHelp("Prompt file (default: the run's, else the built-in one).", valueName: "file"))
  var prompts: String?
  @Option(help: "Part of the prompt file: test, dev, train or all.")
  var split = "test"
  @Option(
    parsing: .singleValue,
    help: ArgumentHelp(
      "A reward, as scenes:graded or {name: jpeg-size, quality: 80}; may be repeated (default: the run's).",
      valueName: "reward"))
  var reward: [String] = []
  @Option(help: "Images of each prompt.")
  var count = 4
  @Option(help: "Sampling steps (default: the run's, else 17).")
  var steps: Int?
  @Option(
    name: .customLong("switch"),
    help: ArgumentHelp(
      "Take this many steps with the tuned model and the others with its base; one row for each number.",
      valueName: "a,b,…"))
  var switchSteps: String?
  @Option(help: "Seed of the noise, the same on both sides.")
  var seed: UInt64 = 1
  @Option(help: ArgumentHelp("Write a grid of before and after here (PNG).", valueName: "file"))
  var picture: String?
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  /// The numbers of `--switch`; nil where one is none.
  private var switches: [Int]? {
    let numbers = switchSteps?.split(separator: ",", omittingEmptySubsequences: false).map { Int($0) } ?? []
    return numbers.contains { $0 == nil || $0! < 0 } ? nil : numbers.compactMap { $0 }
  }

  func validate() throws {
    guard count > 0 else { throw ValidationError("--count: must be at least 1, got \(count)") }
    guard steps ?? 1 > 0 else { throw ValidationError("--steps: must be at least 1, got \(steps!)") }
    guard let switches else {
      throw ValidationError("--switch: expected steps of 0 or more such as 0,10,20, got \"\(switchSteps!)\"")
    }
    guard picture == nil || switches.count < 2 else {
      throw ValidationError("--picture shows one comparison: give --switch one number")
    }
    guard picture == nil || against != nil else { throw ValidationError("--picture needs --against MODEL") }
  }

  func run() throws {
    try picture.map { try Terminal.requireWritable($0, "--picture") }
    let tuned = try ModelReference(model, base: base)
    let other = try against.map { try ModelReference($0, base: base) }
    var configuration = tuned.configuration
    if !reward.isEmpty {
      configuration.rewards = try reward.map { try Configuration.Reward(option: $0) }
    }
    let file = try prompts ?? tuned.promptFile()
    let list = try PromptFile.load(file: URL(filePath: file), split: split)
    let drawn = steps ?? configuration.sampling.steps
    let switches = switches ?? []
    if let outside = switches.first(where: { $0 > drawn }) {
      throw RunError("--switch: expected 0 to \(drawn), the sampling steps (--steps), got \(outside)")
    }
    let comparison = Comparison(
      tuned: tuned, base: other, rewards: configuration.rewards, prompts: list, split: split, count: count,
      steps: drawn, seed: seed)
    let reports = try comparison.run(
      switches: switches.isEmpty ? [nil] : switches, picture: picture.map { URL(filePath: $0) },
      progress: { name, done in Terminal.status("\(name): \(done)/\(list.count) prompts") },
      warn: { Terminal.line("warning: \($0)") })
    Terminal.clearLine()
    if switches.isEmpty {
      print(json ? try Terminal.json(reports[0]) : Self.text(reports[0]))
    } else {
      print(json ? try Terminal.json(["rows": reports]) : Self.text(switches: reports))
    }
  }

  private static func interval(_ ci: [Double]?) -> String {
    ci.map { "[\(Terminal.fixed($0[0], 4)), \(Terminal.fixed($0[1], 4))]" } ?? ""
  }
  private static func cells(_ g: GuardValues) -> [String] { g.named.map { Terminal.fixed($0.value, 4) } }

  /// A row for each switch step and reward, then the guards.
  static func text(switches reports: [EvaluationReport]) -> String {
    let compared = reports[0].against != nil
    var rows = [
      ["reward, tuned steps of \(reports[0].steps)", "prompts"] + (compared ? ["base"] : []) + [
        "mean", "95 % interval",
      ]
        + (compared ? ["difference", "95 % interval", "p"] : [])
    ]
    for name in reports[0].rewards.keys.sorted() {
      for report in reports {
        let part = report.rewards[name]!
        var row = ["\(name), \(report.switchStep!)", "\(report.nPrompts)"]
        if let base = part.against?["all"] { row.append(Terminal.fixed(base.mean, 4)) }
        row += [Terminal.fixed(part.mean, 4), interval(part.ci95)]
        if let paired = part.paired {
          row += [
            Terminal.signed(paired.difference, 4), interval(paired.ci95), String(format: "%.1e", paired.p),
          ]
        }
        rows.append(row)
      }
    }
    var guards = [["guards"] + (reports[0].guards?.named.map(\.name) ?? [])]
    if let base = reports[0].guardsAgainst { guards.append(["base"] + cells(base)) }
    for report in reports {
      if let g = report.guards { guards.append(["\(report.switchStep!)"] + cells(g)) }
    }
    return Terminal.table(rows) + (guards.count > 1 ? "\n\n" + Terminal.table(guards) : "")
  }

  private static func percent(_ change: Double, of base: Double) -> String {
    base == 0 ? "" : "\(Terminal.signed(change / base * 100, 1)) %"
  }

  static func text(_ report: EvaluationReport) -> String {
    var rows: [[String]] = []
    let compared = report.against != nil
    rows.append(
      ["reward, category", "prompts"] + (compared ? ["base", "tuned"] : ["mean"]) + ["95 % interval"]
        + (compared ? ["difference", "95 % interval", "p", ""] : []))
    for (name, part) in report.rewards.sorted(by: { $0.key < $1.key }) {
      var cells = [name, "\(report.nPrompts)"]
      if let base = part.against?["all"] { cells.append(Terminal.fixed(base.mean, 4)) }
      cells += [Terminal.fixed(part.mean, 4), interval(part.ci95)]
      if let paired = part.paired {
        cells += [
          Terminal.signed(paired.difference, 4), interval(paired.ci95), String(format: "%.1e", paired.p),
          Self.percent(paired.difference, of: part.mean - paired.difference),
        ]
      }
      rows.append(cells)
      for (tag, category) in part.perCategory.sorted(by: { $0.key < $1.key }) {
        var cells = ["  \(tag)", "\(category.n)"]
        if let base = part.against?[tag] { cells.append(Terminal.fixed(base.mean, 4)) }
        cells += [Terminal.fixed(category.mean, 4), interval(category.ci95)]
        if let base = part.against?[tag] { cells.append(Terminal.signed(category.mean - base.mean, 4)) }
        rows.append(cells)
      }
    }
    var text = Terminal.table(rows) + "\n"
    var guardRows = [["guards"] + (report.guards?.named.map(\.name) ?? [])]
    if let g = report.guardsAgainst { guardRows.append(["base"] + cells(g)) }
    guard let g = report.guards else { return text }
    guardRows.append([compared ? "tuned" : "model"] + cells(g))
    text += "\n" + Terminal.table(guardRows)
    if let collapsed = report.collapsed {
      text +=
        "\n" + (collapsed.isEmpty ? "no guard collapsed" : "COLLAPSED: " + collapsed.joined(separator: "; "))
    }
    return text
  }
}
