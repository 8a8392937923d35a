import Foundation
import Torch
import TorchNN

/// Model folders with an adapter added to their weights for good.
public enum ModelMerge {
  /// What was done.
  public struct Report: Sendable, Equatable {
    /// Layers that got the adapter.
    public var layers = 0
    /// Weight files written.
    public var shards: [String] = []
    /// Files left out, because they hold the transformer's weights without the adapter.
    public var leftOut: [String] = []
  }

  /// Writes `model` with W + scale·(adapter's scale)·B·A in place of every adapted W.
  ///
  /// The transformer keeps its dtypes, files and index; the product is in float32 and rounded once. One
  /// tensor at a time is in memory. Other weights are hard-linked where the file system allows, other files
  /// copied, links resolved.
  ///
  /// - Parameters:
  ///   - output: must not exist, or be an empty folder; it appears at the end or not at all.
  ///   - progress: called with each weight file and the tensors done in it; may throw to stop.
  /// - Throws: ``ModelError`` for an adapter that does not fit whole, or a sum that has no finite value.
  public static func merge(
    _ model: URL, _ adapter: LoRAFile, scale: Double = 1, to output: URL,
    progress: (_ file: String, _ done: Int, _ of: Int) throws -> Void = { _, _, _ in }
  ) throws -> Report {
    let folder = try ModelFolder(model)
    let part = folder.part("transformer")
    let checkpoint = try Checkpoint(folder: part, names: ["diffusion_pytorch_model"])
    try adapter.requireUsable()
    try adapter.requireFits(linearSizes(checkpoint.shards))
    let layers = Dictionary(uniqueKeysWithValues: adapter.layers.map { ($0.path + ".weight", $0) })
    var report = Report(layers: layers.count)
    try StagedFolder.write(to: output) { staging in
      let files = checkpoint.shards.map { URL(filePath: $0.path) }
      report.leftOut = try copy(model, to: staging, shards: Set(files.map(\.lastPathComponent)))
      for file in files {
        let name = file.lastPathComponent
        // Opened again: its pages are given back with it, not kept until the last shard is done.
        let shard = try SafetensorsFile(file)
        let layout = Dictionary(
          uniqueKeysWithValues: shard.names.map { ($0, (dtype: shard.dtype($0)!, shape: shard.shape($0)!)) })
        var done = 0
        try Safetensors.write(
          layout: layout, metadata: shard.metadata, to: staging.appending(path: "transformer/\(name)")
        ) { key in
          done += 1
          try progress(name, done, layout.count)
          let base = try shard.require(key)
          guard let layer = layers[key] else { return base }
          return try add(try adapter.factors(layer), to: base, scale: scale, "\(shard.path): \(key)")
        }
        report.shards.append(name)
      }
    }
    return report
  }

  /// W + scale·B·A in W's dtype.
  private static func add(_ lora: LoRA, to base: Tensor, scale: Double, _ name: String) throws -> Tensor {
    guard base.dtype.isFloatingPoint else {
      throw ModelError(
        "\(name): \(base.dtype) weights cannot take an adapter; merge into the unquantised model")
    }
    // float64 weights keep their digits; all others are exact in float32.
    let wide: DType = base.dtype == .float64 ? .float64 : .float32
    let sum = try base.to(wide).addmm(try lora.up.to(wide), try lora.down.to(wide), alpha: scale * lora.scale)
    let merged = try sum.to(base.dtype)
    guard try merged.allFinite() else {
      throw ModelError("\(name): the sum has values beyond the range of \(base.dtype); lower --scale")
    }
    return merged
  }

  /// Path → [out, in] of everything that can be a linear layer in these files: two-dimensional `….weight`.
  public static func linearSizes(_ files: [SafetensorsFile]) -> [String: [Int]] {
    var sizes: [String: [Int]] = [:]
    for file in files {
      for name in file.names where name.hasSuffix(".weight") {
        if let shape = file.shape(name), shape.count == 2 {
          sizes[String(name.dropLast(".weight".count))] = shape
        }
      }
    }
    return sizes
  }

  // MARK: other files

  private static let weights: Set = [
    "safetensors", "bin", "ckpt", "pt", "pth", "gguf", "sft", "msgpack", "onnx",
  ]

  /// Copies everything but the transformer's weights; returns what else was left out for holding those.
  private static func copy(_ model: URL, to target: URL, shards: Set<String>) throws -> [String] {
    var leftOut: [String] = []
    func tree(_ source: URL, _ path: String) throws {
      let names = try FileManager.default.contentsOfDirectory(atPath: source.path).sorted()
      for name in names where !name.hasPrefix(".") {
        let relative = path.isEmpty ? name : "\(path)/\(name)"
        // A hub cache holds links to blobs.
        let file = source.appending(path: name).resolvingSymlinksInPath()
        let to = target.appending(path: relative)
        var isFolder: ObjCBool = false
        guard FileManager.default.fileExists(atPath: file.path, isDirectory: &isFolder) else {
          throw ModelError("\(source.appending(path: name).path): a link to nothing; fetch the model again")
        }
        if isFolder.boolValue {
          try FileManager.default.createDirectory(at: to, withIntermediateDirectories: false)
          try tree(file, relative)
        } else if path == "transformer", shards.contains(name) {
          continue
        } else if weights.contains(URL(filePath: name).pathExtension), ["", "transformer"].contains(path) {
          // The whole model in one file, or a variant such as .fp16: without the adapter.
          leftOut.append(relative)
        } else if weights.contains(file.pathExtension) || weights.contains(to.pathExtension),
          link(file.path, to.path) == 0
        {
          continue
        } else {
          try FileManager.default.copyItem(at: file, to: to)
        }
      }
    }
    try tree(model.resolvingSymlinksInPath(), "")
    return leftOut
  }
}
