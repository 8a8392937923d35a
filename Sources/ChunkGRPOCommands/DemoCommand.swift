import ArgumentParser
import FlowTraining
import Foundation

struct Demo: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Train, evaluate base and tuned on the test prompts, and show before and after.",
    discussion: """
      Runs `train` and `evaluate` as anyone would, prints what they measured, and
      writes summary.json into the run.

      Example:
        chunkgrpo demo Examples/demo.yaml --set seed=2
      """)

  @Argument(help: "The configuration (YAML).")
  var config: String
  @OptionGroup var options: ConfigurationOptions
  @Option(help: "Part of the prompt file to evaluate on.")
  var split = "test"
  @Option(help: "Images of each prompt.")
  var count = 4
  @Option(help: ArgumentHelp("Seconds that set-up and build took, for the summary.", valueName: "seconds"))
  var setupSeconds = 0.0
  @Flag(help: "Print the summary as one JSON object on stdout.")
  var json = false

  func run() throws {
    let configuration = try Configuration.load(file: URL(filePath: config), overrides: options.overrides)
    let run = Self.freeFolder(configuration.output)
    var commands: [String] = []
    var settings = options.overrides.filter { !$0.hasPrefix("output=") }
    settings.append("output=\(run)")

    let training = ["train", config] + settings.flatMap { ["--set", $0] }
    let trainSeconds = try Self.call(training, &commands).seconds
    let picture = "\(run)/before-after.png"
    let evaluation = [
      "evaluate", run, "--against", configuration.model, "--split", split, "--count", String(count),
      "--picture", picture,
      "--json",
    ]
    let (output, evaluateSeconds) = try Self.call(evaluation, &commands, capture: true)
    guard let report = try JSONSerialization.jsonObject(with: output) as? [String: Any] else {
      throw RunError("evaluate printed no JSON object")
    }
    let summary = Self.summary(
      report, seconds: ["setup": setupSeconds, "train": trainSeconds, "evaluate": evaluateSeconds],
      commands: commands,
      picture: picture, seed: configuration.seed)
    let data = try JSONSerialization.data(
      withJSONObject: summary, options: [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes])
    try data.write(to: URL(filePath: "\(run)/summary.json"), options: .atomic)
    if json { return print(String(decoding: data, as: UTF8.self)) }
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    print("\n" + Evaluate.text(try decoder.decode(EvaluationReport.self, from: output)))
    print(
      "\nseconds: set-up and build \(Int(setupSeconds)), train \(Int(trainSeconds)), evaluate \(Int(evaluateSeconds))"
    )
    print("picture: \(picture) (base and tuned, equal noise); progress in \(run)/samples")
    print("summary: \(run)/summary.json")
    print("commands:")
    for command in commands { print("  \(command)") }
  }

  /// The folder itself if it is free, else with -2, -3, … appended: earlier runs stay.
  private static func freeFolder(_ path: String) -> String {
    func taken(_ path: String) -> Bool {
      !((try? FileManager.default.contentsOfDirectory(atPath: path)) ?? []).isEmpty
    }
    guard taken(path) else { return path }
    return (2...).lazy.map { "\(path)-\($0)" }.first { !taken($0) }!
  }

  /// Runs this program; its progress goes to our stderr.
  private static func call(
    _ arguments: [String], _ commands: inout [String], capture: Bool = false
  ) throws -> (output: Data, seconds: Double) {
    let words = arguments.map { $0.contains(where: { " *?\"'$,[]{}".contains($0) }) ? "'\($0)'" : $0 }
    let command = (["bin/chunkgrpo"] + words).joined(separator: " ")
    commands.append(command)
    Terminal.line("$ \(command)")
    let process = Process()
    process.executableURL = URL(filePath: "/proc/self/exe").resolvingSymlinksInPath()
    process.arguments = arguments
    let pipe = Pipe()
    process.standardOutput = capture ? pipe : FileHandle.standardError
    let start = Date()
    try process.run()
    let output = capture ? pipe.fileHandleForReading.readDataToEndOfFile() : Data()
    process.waitUntilExit()
    guard process.terminationStatus == 0 else { throw ExitCode(process.terminationStatus) }
    return (output, Date().timeIntervalSince(start))
  }

  private static func summary(
    _ report: [String: Any], seconds: [String: Double], commands: [String], picture: String, seed: UInt64
  ) -> [String: Any] {
    func base(_ part: [String: Any]) -> [String: Any] {
      var categories = part["against"] as? [String: Any] ?? [:]
      var whole = categories.removeValue(forKey: "all") as? [String: Any] ?? [:]
      whole["per_category"] = categories
      return whole
    }
    let parts = report["rewards"] as? [String: [String: Any]] ?? [:]
    let rewards = parts.mapValues { part -> [String: Any] in
      var tuned = part
      let paired = tuned.removeValue(forKey: "paired") ?? NSNull()
      tuned.removeValue(forKey: "against")
      return ["base": base(part), "tuned": tuned, "paired": paired]
    }
    // The first reward of the configuration, as evaluate's own top level.
    let first =
      rewards.first {
        ($0.value["tuned"] as? [String: Any])?["mean"] as? Double == report["mean"] as? Double
      }?.value ?? [:]
    return [
      "base": first["base"] ?? NSNull(), "tuned": first["tuned"] ?? NSNull(),
      "paired": first["paired"] ?? NSNull(),
      "guards_base": report["guards_against"] ?? NSNull(), "guards_tuned": report["guards"] ?? NSNull(),
      "collapsed": report["collapsed"] ?? NSNull(), "n_prompts": report["n_prompts"] ?? NSNull(),
      "samples_per_prompt": report["samples_per_prompt"] ?? NSNull(),
      "seconds": seconds, "commands": commands, "picture": picture, "seeds": [seed], "rewards": rewards,
    ]
  }
}
