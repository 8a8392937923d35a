import ArgumentParser
import FlowRewards
import FlowTraining
import Foundation
import Pictures

struct Score: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Score image files by rewards, as training would.",
    discussion: """
      Images are PNG or JPEG files of any sizes. Rewards that read prompts need
      one for all images, or a file with one for each.

      Examples:
        chunkgrpo score a.png b.jpg --reward vivid --reward sharpness
        chunkgrpo score sign.png --reward ocr --prompt 'a sign that says "OPEN"'
        chunkgrpo score *.png --reward '{name: command, command: [./judge.py]}' \\
          --prompts prompts.csv --json
      """)

  @Argument(help: ArgumentHelp("PNG or JPEG files.", valueName: "images"))
  var images: [String]
  @Option(
    parsing: .singleValue,
    help: ArgumentHelp(
      "A reward, as name[:score] or as a mapping with the keys of a configuration's rewards, e.g. {name: jpeg-size, quality: 80}; may be repeated.",
      valueName: "reward"))
  var reward: [String]
  @Option(help: "What all images should show.")
  var prompt: String?
  @Option(
    help: ArgumentHelp(
      "File with a prompt for each image, in order: lines (.txt), JSON lines or a table (.csv).",
      valueName: "file"))
  var prompts: String?
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  func validate() throws {
    guard prompt == nil || prompts == nil else {
      throw ValidationError("give --prompt or --prompts, not both")
    }
  }

  func run() throws {
    let scoring = try ImageScoring(try reward.map { try Configuration.Reward(option: $0) })
    guard prompt != nil || prompts != nil || !scoring.readsPrompts else {
      throw RunError(
        "--reward: some of \(scoring.names.joined(separator: ", ")) read prompts; give --prompt or --prompts")
    }
    let list = try promptList()
    try scoring.check(list)
    let pictures = try images.map { try Image(file: URL(filePath: $0)) }
    let scores = try scoring.scores(pictures, prompts: list)
    let report = Report(files: images, prompts: list.map(\.text), names: scoring.names, scores: scores)
    print(json ? try Terminal.json(report) : report.text)
    if report.failed > 0 {
      Terminal.error("error: \(report.failed) score\(report.failed == 1 ? "" : "s") failed")
      throw ExitCode.failure
    }
  }

  /// A prompt for each image.
  private func promptList() throws -> [Prompt] {
    guard let prompts else { return images.map { _ in Prompt(text: prompt ?? "") } }
    let list = try PromptFile.load(file: URL(filePath: prompts), split: "all")
    guard list.count == images.count else {
      throw RunError(
        "--prompts: \(prompts) has \(list.count) prompt\(list.count == 1 ? "" : "s") for \(images.count) "
          + "image\(images.count == 1 ? "" : "s"): give one for each, or one for all with --prompt")
    }
    return list
  }

  /// What is printed: the contract of `--json`.
  struct Report: Encodable {
    struct Row: Encodable {
      let image, prompt: String
      /// By reward; null where it failed.
      let scores: [String: Double?]
      let parts: [String: [String: Double]]
      /// Why, by reward, where it failed.
      let failures: [String: String]
    }
    let rows: [Row]
    /// Means over the images that have a score; null where none has.
    let means: [String: Double?]
    let failed: Int
    private let names: [String]

    private enum CodingKeys: String, CodingKey { case rows, means, failed }

    init(files: [String], prompts: [String], names: [String], scores: [[RewardScore]]) {
      self.names = names
      rows = files.indices.map { i in
        let own = zip(names, scores).map { ($0, $1[i]) }
        return Row(
          image: files[i], prompt: prompts[i],
          scores: Dictionary(uniqueKeysWithValues: own.map { ($0, $1.value) }),
          parts: Dictionary(uniqueKeysWithValues: own.filter { !$1.parts.isEmpty }.map { ($0, $1.parts) }),
          failures: Dictionary(
            uniqueKeysWithValues: own.filter { $1.value == nil }.map { ($0, $1.failure ?? "no reason given") }
          ))
      }
      means = Dictionary(
        uniqueKeysWithValues: zip(names, scores).map { name, list in
          let values = list.compactMap(\.value)
          return (name, values.isEmpty ? nil : values.reduce(0, +) / Double(values.count))
        })
      failed = scores.joined().filter { $0.value == nil }.count
    }

    /// A row for each image, the means, and the reasons of failures.
    var text: String {
      func cell(_ value: Double??) -> String { (value ?? nil).map { Terminal.fixed($0, 4) } ?? "failed" }
      var table = [["image"] + names]
      for row in rows { table.append([row.image] + names.map { cell(row.scores[$0]) }) }
      if rows.count > 1 { table.append(["mean"] + names.map { cell(means[$0]) }) }
      let reasons = rows.flatMap { row in
        names.compactMap { name in row.failures[name].map { "\(row.image): \(name): \($0)" } }
      }
      return ([Terminal.table(table)] + reasons).joined(separator: "\n")
    }
  }
}
