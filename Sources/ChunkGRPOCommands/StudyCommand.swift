import ArgumentParser
import FlowTraining
import Foundation

struct StudyCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "study",
    abstract: "Compare settings over seeds: train every arm at every seed, and say which differ.",
    discussion: """
      An arm is a named list of changes to one configuration. Arms see equal
      prompts and noise and generate equally many images. A study that was stopped
      goes on where it was; what is finished is kept.

      Examples:
        chunkgrpo study Examples/study.yaml --dry-run
        chunkgrpo study Examples/study.yaml
        chunkgrpo study Examples/study.yaml --report-only --json
      """)

  @Argument(help: "The study (YAML).")
  var study: String
  @Flag(help: "Check every arm with its model; print what would run, and how long it would take.")
  var dryRun = false
  @Flag(help: "Report on the runs that are done; run nothing.")
  var reportOnly = false
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  func validate() throws {
    guard !(dryRun && reportOnly) else {
      throw ValidationError("--dry-run and --report-only exclude each other")
    }
  }

  func run() throws {
    let plan = try StudyPlan(Study.load(file: URL(filePath: study)))
    for warning in plan.warnings { Terminal.line("warning: \(warning)") }
    let runner = StudyRunner(plan, program: URL(filePath: "/proc/self/exe").resolvingSymlinksInPath())
    runner.line = Terminal.line
    runner.status = Terminal.status
    Interruption.watch()
    defer { Terminal.clearLine() }
    if dryRun { return try describe(runner) }
    if !reportOnly { try runner.run() }
    let report = try runner.report()
    Terminal.clearLine()
    if json { return print(String(decoding: try report.json(), as: UTF8.self)) }
    for table in report.tables { print("\(table.title)\n\(Terminal.table(table.rows))\n") }
    for note in report.notes.dropFirst(plan.warnings.count) { print(note) }
    print("report: \(plan.folder.path)/study.md, with study.json, study.csv, curves.csv and pictures")
  }

  private func describe(_ runner: StudyRunner) throws {
    let states = try runner.states()
    let outlooks = try runner.outlook()
    let (count, threads) = runner.processes(peak: outlooks.map(\.peakBytes).max() ?? 0)
    struct Row: Encodable {
      let arm: String, seed: UInt64, folder: String, state: String, secondsLeft: Double
    }
    let rows = states.map { run, state in
      let seconds = outlooks.first { $0.arm == run.arm }!.seconds, total = run.configuration.run.iterations
      let (text, left) =
        switch state {
        case .new: ("new", seconds)
        case .started(let done):
          ("\(done) of \(total) iterations", seconds * Double(total - done) / Double(total))
        case .done: ("done", 0)
        }
      return Row(arm: run.arm, seed: run.seed, folder: run.folder.path, state: text, secondsLeft: left)
    }
    let seconds = rows.reduce(0) { $0 + $1.secondsLeft } / Double(count)
    Terminal.clearLine()
    if json {
      struct Arm: Encodable {
        let name: String, overrides: [String], images: Int, passesPerIteration: String, secondsOfRun: Double,
          peakBytes: Int
      }
      struct Result: Encodable {
        let arms: [Arm], runs: [Row], reference: String, processes: Int, threads: Int?, seconds: Double,
          warnings: [String]
      }
      let arms = zip(runner.plan.arms, outlooks).map { arm, outlook in
        Arm(
          name: outlook.arm, overrides: arm.arm.overrides, images: arm.images,
          passesPerIteration: outlook.passes,
          secondsOfRun: outlook.seconds, peakBytes: outlook.peakBytes)
      }
      return print(
        try Terminal.json(
          Result(
            arms: arms, runs: rows, reference: runner.plan.reference, processes: count, threads: threads,
            seconds: seconds, warnings: runner.plan.warnings)))
    }
    var table = [["arm", "images", "forward passes per iteration", "a run takes about", "peak memory"]]
    for (arm, outlook) in zip(runner.plan.arms, outlooks) {
      table.append([
        outlook.arm, "\(arm.images)", outlook.passes, Terminal.duration(outlook.seconds),
        Terminal.fixed(Double(outlook.peakBytes) / 1_048_576, 0) + " MiB",
      ])
    }
    print(Terminal.table(table) + "\n")
    print(
      Terminal.table(
        [["run", "seed", "state", "left, about"]]
          + rows.map { [$0.arm, "\($0.seed)", $0.state, Terminal.duration($0.secondsLeft)] }))
    print(
      "\nabout \(Terminal.duration(seconds)) with \(count) run\(count == 1 ? "" : "s") at a time; "
        + "the folder is \(runner.plan.folder.path)")
  }
}
