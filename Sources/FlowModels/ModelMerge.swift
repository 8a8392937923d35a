import Foundation
import Torch
import TorchNN

/// Model folders with an adapter added to their weights for good, or with their weights replaced by trained ones.
public enum ModelMerge {
  /// What was done.
  public struct Report: Sendable, Equatable {
    /// Layers that got the adapter.
    public var layers = 0
    /// Tensors that were replaced by trained ones.
    public var replaced = 0
    /// Weight files written.
    public var shards: [String] = []
    /// Files left out, because they hold the transformer's weights untrained.
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
    let checkpoint = try transformer(model)
    try adapter.requireUsable()
    try adapter.requireFits(linearSizes(checkpoint.shards))
    let layers = Dictionary(uniqueKeysWithValues: adapter.layers.map { ($0.path + ".weight", $0) })
    var report = try write(model, checkpoint, to: output, progress) { shard, key in
      let base = try shard.require(key)
      guard let layer = layers[key] else { return base }
      return try add(try adapter.factors(layer), to: base, scale: scale, "\(shard.path): \(key)")
    }
    report.layers = layers.count
    return report
  }

  /// The transformer folder of a full fine-tuning that `url` names: a folder with
  /// `diffusion_pytorch_model.safetensors` (or shards and their index), that file itself, or a run, which keeps
  /// it in `adapter/`. Nil where there is none.
  public static func trainedTransformer(_ url: URL) -> URL? {
    let name = "diffusion_pytorch_model.safetensors"
    let files = FileManager.default
    if url.lastPathComponent == name, files.fileExists(atPath: url.path) {
      return url.deletingLastPathComponent()
    }
    return [url, url.appending(path: "adapter")].first { folder in
      [name, name + ".index.json"].contains {
        files.fileExists(atPath: folder.appending(path: $0).path)
      }
    }
  }

  /// Writes `model` with every tensor of its transformer replaced by the one of the same name in `trained`.
  ///
  /// The transformer keeps its dtypes, files and index; values are rounded once. One tensor at a time is in
  /// memory. Other files as in ``merge(_:_:scale:to:progress:)``.
  ///
  /// - Parameters:
  ///   - trained: a transformer folder: config.json and weights of the same architecture.
  ///   - output: must not exist, or be an empty folder; it appears at the end or not at all.
  ///   - progress: called with each weight file and the tensors done in it; may throw to stop.
  /// - Throws: ``ModelError`` where configuration, keys or shapes differ from the model's, or a value is not
  ///   finite or beyond the range of the model's dtype.
  public static func replace(
    _ model: URL, by trained: URL, to output: URL,
    progress: (_ file: String, _ done: Int, _ of: Int) throws -> Void = { _, _, _ in }
  ) throws -> Report {
    let checkpoint = try transformer(model)
    let ours = model.appending(path: "transformer/config.json")
    try requireEqual(trained.appending(path: "config.json"), ours)
    var source: [String: SafetensorsFile] = [:]
    for file in try Checkpoint(folder: trained, names: ["diffusion_pytorch_model"]).shards {
      for key in file.names { source[key] = file }
    }
    try requireEqual(source, checkpoint.shards, trained: trained, model: model)
    var report = try write(model, checkpoint, to: output, progress) { shard, key in
      let (dtype, file) = (shard.dtype(key)!, source[key]!)
      let name = "\(file.path): \(key)"
      guard dtype.isFloatingPoint else {
        throw ModelError(
          "\(shard.path): \(key): \(dtype) weights cannot be replaced; name the unquantised model")
      }
      let value = try file.require(key)
      guard try value.allFinite() else {
        throw ModelError("\(name): NaN or infinite values; the run has diverged: take an earlier checkpoint")
      }
      let stored = try value.to(dtype)
      guard try stored.allFinite() else {
        throw ModelError(
          "\(name): has values beyond the range of \(dtype), the model's dtype; name the model in bfloat16 or float32"
        )
      }
      return stored
    }
    report.replaced = source.count
    return report
  }

  /// The weights of `model`'s transformer.
  private static func transformer(_ model: URL) throws -> Checkpoint {
    try Checkpoint(folder: try ModelFolder(model).part("transformer"), names: ["diffusion_pytorch_model"])
  }

  /// Throws unless both configurations say the same; what begins with `_` (versions, paths) says nothing.
  private static func requireEqual(_ trained: URL, _ model: URL) throws {
    func read(_ file: URL) throws -> [String: NSObject] {
      guard let data = try? Data(contentsOf: file),
        let object = try? JSONSerialization.jsonObject(with: data) as? [String: Any]
      else {
        throw ModelError("\(file.path): missing or not a JSON object; it must lie beside the weights")
      }
      return object.filter { !$0.key.hasPrefix("_") }.mapValues { $0 as? NSObject ?? NSNull() }
    }
    let (got, expected) = (try read(trained), try read(model))
    let differing = Set(got.keys).union(expected.keys).filter { got[$0] != expected[$0] }.sorted()
    guard let first = differing.first else { return }
    func text(_ value: NSObject?) -> String { value.map { "\($0)" } ?? "nothing" }
    throw ModelError(
      "\(trained.path): \(first): expected \(text(expected[first])) as in \(model.path), got \(text(got[first]))"
        + (differing.count > 1 ? ", and \(differing.count - 1) more fields differ" : "")
        + "; name the model that was trained")
  }

  /// Throws unless both hold the same keys in the same shapes.
  private static func requireEqual(
    _ source: [String: SafetensorsFile], _ shards: [SafetensorsFile], trained: URL, model: URL
  ) throws {
    var problems: [String] = []
    func add(_ keys: [String], _ text: String) {
      guard !keys.isEmpty else { return }
      let shown = keys.sorted().prefix(4).joined(separator: ", ") + (keys.count > 4 ? ", …" : "")
      problems.append("\(keys.count) \(text) (\(shown))")
    }
    let keys = Set(shards.flatMap(\.names))
    add(keys.filter { source[$0] == nil }, "tensors of the model are missing")
    add(source.keys.filter { !keys.contains($0) }, "tensors are not in the model")
    let misshapen = shards.flatMap { shard in
      shard.names.compactMap { key -> String? in
        guard let got = source[key]?.shape(key), let expected = shard.shape(key), got != expected else {
          return nil
        }
        return "\(key): expected \(expected), got \(got)"
      }
    }
    add(misshapen, "tensors of another shape")
    guard problems.isEmpty else {
      throw ModelError(
        "\(trained.path): does not fit \(model.path): \(problems.joined(separator: "; ")); "
          + "name the model that was trained")
    }
  }

  /// Writes `model` to `output` with the values that `tensor` gives for each entry of the transformer's shards.
  private static func write(
    _ model: URL, _ checkpoint: Checkpoint, to output: URL,
    _ progress: (_ file: String, _ done: Int, _ of: Int) throws -> Void,
    tensor: (_ shard: SafetensorsFile, _ key: String) throws -> Tensor
  ) throws -> Report {
    var report = Report()
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
          return try tensor(shard, key)
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
  /// Whether a file of this name holds weights, or says in which files they are.
  static func holdsWeights(_ name: String) -> Bool {
    weights.contains(URL(filePath: name).pathExtension) || name.hasSuffix(".index.json")
  }

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
