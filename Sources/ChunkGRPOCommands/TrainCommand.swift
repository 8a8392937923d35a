import ArgumentParser
import FlowTraining
import Foundation

/// Options that change a configuration.
struct ConfigurationOptions: ParsableArguments {
  @Option(
    name: .customLong("set"), parsing: .singleValue,
    help: ArgumentHelp("Override a key; may be repeated.", valueName: "key=value"))
  var overrides: [String] = []
}

struct Train: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Train a model by reinforcement learning, or continue a run.",
    discussion: """
      Examples:
        chunkgrpo train Examples/demo.yaml --set output=runs/a
        chunkgrpo train Examples/demo.yaml --dry-run
        chunkgrpo train --resume runs/a
      """)

  @Argument(help: "The configuration (YAML).")
  var config: String?
  @Option(help: ArgumentHelp("Continue this run from its newest whole checkpoint.", valueName: "run"))
  var resume: String?
  @Flag(
    help:
      "Check configuration, files, model and rewards; print the resolved configuration and counts; train nothing."
  )
  var dryRun = false
  @Flag(help: "Print one JSON object on stdout.")
  var json = false
  @OptionGroup var options: ConfigurationOptions

  func validate() throws {
    guard (config == nil) != (resume == nil) else {
      throw ValidationError("give a configuration to start a run, or --resume RUN to continue one")
    }
  }

  func run() throws {
    let (given, folder) = try prepare()
    try given.validateSources()
    if resume == nil, !dryRun { try folder.requireNew() }
    // Before anything is loaded: what does not fit is said now, with the way out.
    let (configuration, memory) = try MemoryModel.fit(given)
    let trainer = try Trainer(configuration, folder: folder)
    let progress = TrainingProgress()
    var last: MetricsRow?
    trainer.report = { event in
      if case .iteration(let row, _) = event { last = row }
      progress.show(event)
    }
    if dryRun { return try describe(trainer, memory) }
    Interruption.watch()
    try Interruption.check()
    if resume == nil {
      // A reward that is not there yet leaves no folder, so that the same command works once it is.
      try trainer.probeRewards()
      try folder.create(configuration)
    }
    let lock = try folder.lock()
    defer { withExtendedLifetime(lock) {} }
    let start = Date()
    try trainer.run(resume: resume != nil)
    let seconds = Date().timeIntervalSince(start)
    if json {
      struct Result: Encodable {
        let run: String, adapter: String, iterations: Int, rewardMean: Double?, seconds: Double
      }
      print(
        try Terminal.json(
          Result(
            run: folder.url.path, adapter: folder.adapter.path, iterations: trainer.iteration,
            rewardMean: last?.values["reward_mean"], seconds: seconds)))
    } else {
      print(
        "\(folder.url.path): \(trainer.iteration) iterations done in \(Terminal.duration(seconds)); adapter in \(folder.adapter.path)"
      )
    }
  }

  private func prepare() throws -> (Configuration, RunFolder) {
    if let resume {
      let folder = RunFolder(URL(filePath: resume))
      try folder.requireRun()
      let base = try Configuration.load(file: folder.configFile)
      let configuration = try Configuration.applyResume(base: base, overrides: options.overrides)
      try folder.requireUnchanged(configuration)
      return (configuration, folder)
    }
    var configuration = try Configuration.load(file: URL(filePath: config!), overrides: options.overrides)
    configuration.makePathsAbsolute()
    return (configuration, RunFolder(URL(filePath: configuration.output)))
  }

  private func describe(_ trainer: Trainer, _ memory: MemoryEstimate) throws {
    // The text encoders load with the first prompt, rewards answer their first question: what is wrong with them is to be
    // found here too.
    try trainer.probeRewards()
    _ = try trainer.engine.encoder(trainer.prompts[0].text)
    let counts = trainer.summary
    if json {
      struct Result: Encodable {
        let configuration: Configuration, counts: [String: String], memory: MemoryEstimate, peakBytes: Int
      }
      print(
        try Terminal.json(
          Result(
            configuration: trainer.configuration, counts: Dictionary(uniqueKeysWithValues: counts),
            memory: memory, peakBytes: memory.peak)))
    } else {
      print(trainer.configuration.yaml())
      print(Terminal.table(counts.map { ["# \($0.0)", $0.1] }))
      func mebibytes(_ bytes: Int) -> String { Terminal.fixed(Double(bytes) / 1_048_576, 1) + " MiB" }
      let parts =
        memory.standing.map { ["# memory: \($0.name)", mebibytes($0.bytes)] }
        + memory.phases.map { ["# memory while \($0.name)", "+ " + mebibytes($0.bytes)] }
        + [["# estimated peak with optim.microBatch \(memory.microBatch)", mebibytes(memory.peak)]]
      print(Terminal.table(parts))
    }
  }
}
