import ArgumentParser
import FlowModels
import FlowTraining
import Foundation

struct Merge: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Write a model folder with what was trained in its weights for good.",
    discussion: """
      An adapter is added to the weights; those of a run with trainable.kind: full
      replace the transformer's. Keeps the model's dtypes and files. One tensor at
      a time is in memory; weights of other parts are hard-linked where possible.

      Example:
        chunkgrpo merge Models/flux-mini runs/a -o Models/mine
      """)

  @Argument(help: "The model folder.")
  var model: String
  @Argument(
    help: "A run, a checkpoint, a LoRA file, a PEFT folder, or a transformer folder that was trained in full."
  )
  var trained: String
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
    let target = URL(filePath: output)
    let base = URL(filePath: model)
    let whole = ModelMerge.trainedTransformer(URL(filePath: trained))
    guard whole == nil || scale == 1 else {
      throw RunError("--scale: \(trained) was trained in full, there is no adapter to scale; drop --scale")
    }
    func progress(_ name: String, _ done: Int, _ count: Int) throws {
      try Interruption.check()
      Terminal.status("\(name): \(done)/\(count) tensors")
    }
    let file = try whole == nil ? AdapterArgument.open(trained) : nil
    Interruption.watch()
    let report =
      if let whole {
        try ModelMerge.replace(base, by: whole, to: target, progress: progress)
      } else {
        try ModelMerge.merge(base, file!, scale: scale, to: target, progress: progress)
      }
    Terminal.clearLine()
    for name in report.leftOut { Terminal.line("left out, as it holds untrained weights: \(name)") }
    if json {
      struct Result: Encodable { let output: String, layers, replaced: Int, files, leftOut: [String] }
      let result = Result(
        output: target.path, layers: report.layers, replaced: report.replaced, files: report.shards,
        leftOut: report.leftOut)
      print(try Terminal.json(result))
    } else {
      let done =
        whole == nil ? "adapter added to \(report.layers) layers" : "\(report.replaced) tensors replaced"
      print("\(target.path): \(done) in \(report.shards.count) files")
    }
  }
}
