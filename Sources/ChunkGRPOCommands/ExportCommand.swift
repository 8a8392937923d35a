import ArgumentParser
import FlowModels
import FlowTraining
import Foundation
import Torch

extension LoRAFormat: ExpressibleByArgument {}

/// Element types that adapters are written in.
enum AdapterDType: String, CaseIterable, ExpressibleByArgument {
  case float32, bfloat16, float16

  var dtype: DType {
    switch self {
    case .float32: .float32
    case .bfloat16: .bfloat16
    case .float16: .float16
    }
  }
}

struct Export: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Write an adapter for another program: diffusers, ComfyUI or PEFT.",
    discussion: """
      diffusers: pytorch_lora_weights.safetensors, scale folded into B, for
      load_lora_weights. peft: adapter_config.json and
      adapter_model.safetensors, for PeftModel.from_pretrained.

      Example:
        chunkgrpo export runs/a --format peft -o my-adapter
      """)

  @Argument(
    help: ArgumentHelp("A run, a checkpoint, a LoRA file or a PEFT folder.", valueName: "run-or-adapter"))
  var source: String
  @Option(help: "The layout.")
  var format: LoRAFormat
  @Option(help: "Element type of the factors.")
  var dtype = AdapterDType.float32
  @Option(name: .shortAndLong, help: ArgumentHelp("Folder to write, new or empty.", valueName: "folder"))
  var output: String
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  func run() throws {
    let file = try AdapterArgument.open(source)
    let target = URL(filePath: output)
    let layers = try file.allFactors()
    try StagedFolder.write(to: target) { try format.write(layers, dtype: dtype.dtype, to: $0) }
    if json {
      struct Result: Encodable { let output, format: String, layers: Int }
      print(try Terminal.json(Result(output: target.path, format: format.rawValue, layers: layers.count)))
    } else {
      print("\(target.path): \(layers.count) layers for \(format.rawValue)")
    }
  }
}

/// An adapter named on the command line.
enum AdapterArgument {
  /// Reads the headers of a run's, checkpoint's or folder's adapter, or of a file.
  static func open(_ path: String) throws -> LoRAFile {
    let url = URL(filePath: path)
    guard FileManager.default.fileExists(atPath: url.path) else {
      throw RunError("\(path): no such adapter, checkpoint or run")
    }
    if let whole = ModelMerge.trainedTransformer(url) {
      throw RunError(
        "\(path): trained in full (trainable.kind: full), there is no adapter; \(whole.path) is a transformer "
          + "folder in diffusers' layout already, and merge writes a whole model folder with it")
    }
    let file = try LoRAFile(url)
    try file.requireUsable()
    return file
  }
}
