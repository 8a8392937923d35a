import ArgumentParser
import FlowTraining
import Foundation

struct Pretrain: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Train a model folder from scratch on rendered scenes, as the built-in model was made.",
    discussion: """
      Examples:
        chunkgrpo pretrain Examples/pretrain.yaml --set output=runs/base
        chunkgrpo pretrain Examples/pretrain.yaml --vae --set output=runs/vae --set run.iterations=1200
        chunkgrpo pretrain Examples/pretrain.yaml --set init=runs/vae/model --set output=runs/base
        chunkgrpo pretrain --resume runs/base
        chunkgrpo sample runs/base/model --prompt "a photo of a cat" -o cat.png
      """)

  @Argument(help: "The configuration (YAML).")
  var config: String?
  @Flag(help: "Train the autoencoder instead of transformer and text encoders; the same as --set part=vae.")
  var vae = false
  @Option(help: ArgumentHelp("Continue this run from its newest whole checkpoint.", valueName: "run"))
  var resume: String?
  @Flag(
    help:
      "Check configuration, prompts and model; print the resolved configuration and counts; train nothing.")
  var dryRun = false
  @Flag(help: "Print one JSON object on stdout.")
  var json = false
  @OptionGroup var options: ConfigurationOptions

  func validate() throws {
    guard (config == nil) != (resume == nil) else {
      throw ValidationError("give a configuration to start a run, or --resume RUN to continue one")
    }
    guard resume == nil || (options.overrides.isEmpty && !vae) else {
      throw ValidationError(
        "--resume: the learning rate follows the whole run, so that nothing may be set; start a new run")
    }
  }

  func run() throws {
    var configuration: Pretraining
    if let resume {
      let folder = RunFolder(URL(filePath: resume), command: "pretrain")
      try folder.requireRun()
      configuration = try Pretraining.load(file: folder.configFile)
      configuration.output = resume
    } else {
      configuration = try Pretraining.load(
        file: URL(filePath: config!), overrides: options.overrides + (vae ? ["part=vae"] : []))
      configuration.makePathsAbsolute()
    }
    try configuration.validate()
    let folder = RunFolder(URL(filePath: configuration.output), command: "pretrain")
    if resume == nil, !dryRun { try folder.requireNew() }
    let trainer = try Pretrainer(configuration, folder: folder)
    if dryRun { return try describe(trainer) }
    Interruption.watch()
    try Interruption.check()
    if resume == nil { try folder.create(yaml: configuration.yaml()) }
    let lock = try folder.lock()
    defer { withExtendedLifetime(lock) {} }
    let start = Date()
    var last: MetricsRow?
    trainer.report = { event in
      if case .iteration(let row, let total) = event {
        last = row
        Self.show(row, total)
      } else {
        TrainingProgress().show(event)
      }
    }
    try trainer.run(resume: resume != nil)
    let seconds = Date().timeIntervalSince(start)
    if json {
      struct Result: Encodable {
        let run: String, model: String, iterations: Int, loss: Double?, seconds: Double
      }
      print(
        try Terminal.json(
          Result(
            run: folder.url.path, model: trainer.model.path, iterations: trainer.iteration,
            loss: last?.values["loss"], seconds: seconds)))
    } else {
      print(
        "\(folder.url.path): \(trainer.iteration) iterations done in \(Terminal.duration(seconds)); model in \(trainer.model.path)"
      )
    }
  }

  /// Every iteration on a terminal; elsewhere a hundred lines, and those with evaluations.
  private static func show(_ row: MetricsRow, _ total: Int) {
    let evaluations = row.values.filter { $0.key.hasPrefix("eval/") }.sorted { $0.key < $1.key }
    let text =
      ([
        "iteration \(row.iteration)/\(total)", "loss \(Terminal.fixed(row.values["loss"] ?? .nan, 4))",
        "grad \(String(format: "%.2e", row.values["grad_norm"] ?? .nan))",
        "\(Terminal.fixed(row.values["images_per_s"] ?? .nan, 1)) images/s",
      ] + evaluations.map { "\($0.key) \(Terminal.fixed($0.value, 4))" }).joined(separator: " · ")
    if !evaluations.isEmpty || row.iteration == total
      || (!Terminal.isInteractive && row.iteration % max(total / 100, 1) == 0)
    {
      Terminal.line(text)
    } else {
      Terminal.status(text)
    }
  }

  private func describe(_ trainer: Pretrainer) throws {
    let counts = trainer.summary
    if json {
      struct Result: Encodable { let configuration: String, counts: [String: String] }
      print(
        try Terminal.json(
          Result(
            configuration: trainer.configuration.yaml(), counts: Dictionary(uniqueKeysWithValues: counts))))
    } else {
      print(trainer.configuration.yaml())
      print(Terminal.table(counts.map { ["# \($0.0)", $0.1] }))
    }
  }
}
