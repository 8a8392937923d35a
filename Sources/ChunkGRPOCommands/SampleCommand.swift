import ArgumentParser
import FlowTraining
import Foundation
import Pictures

struct Sample: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Draw images with a model, an adapter or a run.",
    discussion: """
      One image is written as it is; several become a labelled grid.

      Examples:
        chunkgrpo sample Models/flux-mini --prompt "a photo of a cat" -o cat.png
        chunkgrpo sample runs/a --prompts list.txt --count 4 -o grid.png
        chunkgrpo sample MODEL --adapter FILE --prompt "a dog" -o dog.png
        chunkgrpo sample runs/a --prompt "a dog" --steps 50 --switch 30 -o dog.png
      """)

  @Argument(help: "A model folder, an adapter, a checkpoint or a run.")
  var model: String
  @Option(help: ArgumentHelp("A LoRA file or folder to add to a model folder.", valueName: "adapter"))
  var adapter: String?
  @Option(parsing: .singleValue, help: "What to draw; may be repeated.")
  var prompt: [String] = []
  @Option(help: ArgumentHelp("A file of prompts: one a line, or JSON lines.", valueName: "file"))
  var prompts: String?
  @Option(help: "Sampling steps (default: the run's, else 28).")
  var steps: Int?
  @Option(
    name: .customLong("switch"),
    help: ArgumentHelp(
      "Take this many steps with the tuned model and the others with its base.", valueName: "step"))
  var switchStep: Int?
  @Option(help: "Seed of the noise.")
  var seed: UInt64 = 1
  @Option(help: "Images of each prompt.")
  var count = 1
  @Option(help: "Height in pixels (default: the run's, else the model's own size).")
  var height: Int?
  @Option(help: "Width in pixels (default: the run's, else the model's own size).")
  var width: Int?
  @Option(help: "Guidance scale, for models that take one (default: the run's, else 3.5).")
  var guidance: Double?
  @Option(help: "What guidance leads away from, for models guided by a second pass (SD3).")
  var negative: String?
  @Option(
    help: ArgumentHelp(
      "Model folder, where MODEL is an adapter that does not say, or of the steps after --switch.",
      valueName: "folder"))
  var base: String?
  @Option(name: .shortAndLong, help: ArgumentHelp("PNG to write.", valueName: "file"))
  var output: String
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  func validate() throws {
    guard prompt.isEmpty != (prompts == nil) else {
      throw ValidationError("give --prompt TEXT or --prompts FILE")
    }
    guard count > 0 else { throw ValidationError("--count: must be at least 1, got \(count)") }
    guard steps ?? 1 > 0 else { throw ValidationError("--steps: must be at least 1, got \(steps!)") }
    guard switchStep ?? 0 >= 0 else {
      throw ValidationError("--switch: must be at least 0, got \(switchStep!)")
    }
  }

  func run() throws {
    var reference = try ModelReference(model, base: base)
    if let adapter { try reference.add(adapter: adapter) }
    try reference.resize(height: height, width: width, guidance: guidance, negative: negative)
    let texts =
      try prompts.map { try PromptFile.load(file: URL(filePath: $0), split: "all").map(\.text) } ?? prompt
    let target = URL(filePath: output)
    try Terminal.requireWritable(output, "-o")
    let drawn = steps ?? reference.steps ?? 28
    guard switchStep ?? 0 <= drawn else {
      throw RunError("--switch: expected 0 to \(drawn), the sampling steps (--steps), got \(switchStep!)")
    }
    let engine = try reference.load(hybrid: switchStep != nil)
    let start = Date()
    let images = try engine.draw(texts, count: count, steps: drawn, seed: seed, switchStep: switchStep)
    for text in texts { _ = try engine.encoder(text) }
    if let warning = engine.encoder.warning { Terminal.line("warning: \(warning)") }
    let pictures = try (0..<(texts.count * count)).map { try Image(try images[$0]) }
    if pictures.count == 1 {
      try pictures[0].write(png: target)
    } else {
      let rows = texts.enumerated().map { i, text in
        Grid.Row(text, cells: (0..<count).map { Grid.Cell(pictures[i * count + $0]) })
      }
      try Grid(rows: rows, scale: max(1, 128 / pictures[0].width)).render().write(png: target)
    }
    let seconds = Date().timeIntervalSince(start)
    if json {
      struct Result: Encodable { let picture: String, images: Int, seconds: Double }
      print(try Terminal.json(Result(picture: target.path, images: pictures.count, seconds: seconds)))
    } else {
      print(
        "\(target.path): \(pictures.count) image\(pictures.count == 1 ? "" : "s") in \(Terminal.duration(seconds))"
      )
    }
  }
}
