import ArgumentParser
import FlowModels
import FlowTraining
import Foundation

struct Merge: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Write a model folder with an adapter added to its weights for good.",
    discussion: """
      Keeps the model's dtypes and files. One tensor at a time is in memory;
      weights of other parts are hard-linked where possible.

      Example:
        chunkgrpo merge Models/flux-mini runs/a -o Models/mine
      """)

  @Argument(help: "The model folder.")
  var model: String
  @Argument(help: "A run, a checkpoint, a LoRA file or a PEFT folder.")
  var adapter: String
  @Option(help: "Factor on the adapter's own scale.")
  var scale = 1.0
  @Option(
    name: .shortAndLong, help: ArgumentHelp("Model folder to write, new or empty.", valueName: "folder"))
  var output: String
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  func validate() throws {
    guard scale.isFinite, scale != 0 else {
      throw ValidationError("--scale: expected a finite number other than 0, got \(scale)")
    }
  }

  func run() throws {
    let file = try AdapterArgument.open(adapter)
    Interruption.watch()
    let target = URL(filePath: output)
    let report = try ModelMerge.merge(URL(filePath: model), file, scale: scale, to: target) {
      name, done, count in
      try Interruption.check()
      Terminal.status("\(name): \(done)/\(count) tensors")
    }
    Terminal.clearLine()
    for name in report.leftOut { Terminal.line("left out, as it holds weights without the adapter: \(name)") }
    if json {
      struct Result: Encodable { let output: String, layers: Int, files, leftOut: [String] }
      print(
        try Terminal.json(
          Result(output: target.path, layers: report.layers, files: report.shards, leftOut: report.leftOut)))
    } else {
      print("\(target.path): adapter added to \(report.layers) layers in \(report.shards.count) files")
    }
  }
}
