import ArgumentParser
import FlowTraining
import Foundation

struct Bench: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Measure where the time of a training iteration goes.",
    discussion: """
      Trains a few iterations in a temporary folder, without pictures or
      evaluation, and prints medians of seconds a part.

      Example:
        chunkgrpo bench Examples/demo.yaml --iterations 8
      """)

  @Argument(help: "The configuration (YAML).")
  var config = "Examples/demo.yaml"
  @Option(help: "Iterations measured, after one that is not.")
  var iterations = 5
  @Flag(help: "Print one JSON object on stdout.")
  var json = false
  @OptionGroup var options: ConfigurationOptions

  func validate() throws {
    guard iterations > 0 else { throw ValidationError("--iterations: must be at least 1, got \(iterations)") }
  }

  func run() throws {
    var configuration = try Configuration.load(file: URL(filePath: config), overrides: options.overrides)
    (configuration.run.iterations, configuration.run.checkpointEvery) = (iterations + 1, iterations + 1)
    (configuration.run.samplesEvery, configuration.run.evaluateEvery) = (0, 0)
    configuration.run.stopReward = nil
    try configuration.validate()
    let folder = RunFolder(
      FileManager.default.temporaryDirectory.appending(path: "chunkgrpo-bench-\(getpid())"))
    defer { try? FileManager.default.removeItem(at: folder.url) }
    let trainer = try Trainer(configuration, folder: folder)
    try folder.create(configuration)
    var rows: [MetricsRow] = []
    trainer.report = { event in
      if case .iteration(let row, let total) = event {
        Terminal.status("iteration \(row.iteration)/\(total)")
        rows.append(row)
      }
    }
    Interruption.watch()
    try trainer.run(resume: false)
    Terminal.clearLine()
    rows.removeFirst()
    func median(_ values: [Double]) -> Double { values.sorted()[values.count / 2] }
    let parts = MetricsRow.parts
    var seconds = Dictionary(
      uniqueKeysWithValues: (parts + ["network"]).map { part in
        (part, median(rows.map { $0.seconds[part] ?? 0 }))
      })
    let totals = rows.map { row in parts.reduce(0) { $0 + (row.seconds[$1] ?? 0) } }
    seconds["total"] = median(totals)
    let outside = median(zip(rows, totals).map { 1 - ($0.seconds["network"] ?? 0) / $1 })
    if json {
      struct Result: Encodable {
        let seconds: [String: Double], outsideNetwork: Double, imagesPerS: Double, iterations: Int
      }
      print(
        try Terminal.json(
          Result(
            seconds: seconds, outsideNetwork: outside,
            imagesPerS: median(rows.map { $0.values["images_per_s"] ?? 0 }),
            iterations: iterations)))
    } else {
      let table = (parts + ["total"]).map {
        [$0, Terminal.fixed(seconds[$0]!, 3), "\(Int((100 * seconds[$0]! / seconds["total"]!).rounded())) %"]
      }
      print(Terminal.table([["part", "median s", "share"]] + table))
      print(
        "outside network forward and backward: \(Terminal.fixed(100 * outside, 1)) % (\(iterations) iterations of \(configuration.samplesPerIteration) images)"
      )
    }
  }
}
