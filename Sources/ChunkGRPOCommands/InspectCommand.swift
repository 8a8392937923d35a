import ArgumentParser
import FlowTraining
import Foundation

struct Inspect: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Show what a file or folder holds: an adapter, a model, a run, a checkpoint.",
    discussion: """
      Reads headers, not weights. Exit code 1 if an adapter cannot be used, or
      has keys that would not apply to --model.

      Examples:
        chunkgrpo inspect runs/a
        chunkgrpo inspect lora.safetensors --model /models/FLUX.1-dev
      """)

  @Argument(help: "The file or folder.")
  var path: String
  @Option(help: ArgumentHelp("Model folder to compare an adapter with.", valueName: "folder"))
  var model: String?
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  func run() throws {
    let inspection = try Inspection(path, model: model)
    print(json ? try Terminal.json(inspection) : text(inspection))
    if inspection.isUnusable { throw ExitCode(1) }
  }

  private func text(_ inspection: Inspection) -> String {
    var lines = ["\(path): \(inspection.kind.rawValue)"]
    if let pipeline = inspection.pipeline { lines.append("pipeline: \(pipeline)") }
    if let run = inspection.run {
      lines.append("model: \(run.model)")
      lines.append("trained: \(run.trainable), \(run.done ?? 0) of \(run.iterations) iterations")
      if !run.checkpoints.isEmpty { lines.append("checkpoints: \(run.checkpoints.joined(separator: ", "))") }
    }
    lines.append(summary(inspection.tensors))
    if let parts = inspection.parts {
      let rows = parts.map {
        [$0.name, "\($0.tensors.parameters)", bytes($0.tensors.bytes), dtypes($0.tensors), $0.type ?? ""]
      }
      lines.append(Terminal.table([["part", "parameters", "size", "dtype", "class"]] + rows))
    }
    if let adapter = inspection.adapter { lines += text(adapter) }
    return lines.joined(separator: "\n")
  }

  private func text(_ adapter: Inspection.Adapter) -> [String] {
    func list(_ counts: [String: Int]) -> String {
      guard counts.count > 1 else { return counts.keys.first ?? "" }
      return counts.sorted { (Double($0.key) ?? 0) < (Double($1.key) ?? 0) }.map {
        "\($0.key) (\($0.value)×)"
      }
      .joined(separator: ", ")
    }
    var lines = [
      "file: \(adapter.file)",
      "form: \(adapter.naming), prefix \(adapter.prefix.isEmpty ? "none" : adapter.prefix)",
      "for: \(adapter.architecture ?? "not told by names and sizes")",
      "rank \(list(adapter.ranks)), alpha \(list(adapter.alphas)), "
        + "scale \(list(adapter.scales)) (\(adapter.scaling))",
      "\(adapter.layers) layers:",
      Terminal.table(adapter.targets.sorted { $0.key < $1.key }.map { ["  " + $0.key, "\($0.value)"] }),
    ]
    lines += adapter.problems.map { "cannot be used: \($0)" }
    if let misfits = adapter.misfits {
      lines.append(
        misfits.isEmpty
          ? "applies whole to \(model ?? "")" : "\(misfits.count) layers do not apply to \(model ?? ""):")
      lines += misfits.map { "  " + $0 }
    }
    return lines
  }

  private func summary(_ tensors: Inspection.Tensors) -> String {
    "\(tensors.count) tensors, \(tensors.parameters) parameters, \(bytes(tensors.bytes)), \(dtypes(tensors))"
  }
  private func dtypes(_ tensors: Inspection.Tensors) -> String {
    tensors.dtypes.count == 1
      ? tensors.dtypes.keys.first!
      : tensors.dtypes.sorted { $0.key < $1.key }.map { "\($0.value) \($0.key)" }.joined(separator: ", ")
  }
  private func bytes(_ count: Int) -> String {
    count < 1_000_000
      ? "\(Terminal.fixed(Double(count) / 1e3, 1)) kB" : "\(Terminal.fixed(Double(count) / 1e6, 1)) MB"
  }
}
