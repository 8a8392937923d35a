import FlowModels
import Foundation
import Torch
import TorchNN

/// What a file or folder holds, from headers alone.
public struct Inspection: Encodable, Sendable {
  /// What it is.
  public enum Kind: String, Encodable, Sendable {
    case adapter = "LoRA adapter"
    case peft = "PEFT folder"
    case model = "model folder"
    case run
    case checkpoint
    case part = "model part"
    case tensors = "safetensors file"
  }

  /// Counts over the tensors of one or more files.
  public struct Tensors: Encodable, Sendable, Equatable {
    /// Entries.
    public var count = 0
    /// Values.
    public var parameters = 0
    /// Bytes of the values.
    public var bytes = 0
    /// Entries of each element type.
    public var dtypes: [String: Int] = [:]

    init(_ files: [SafetensorsFile]) {
      for file in files {
        for name in file.names {
          let (dtype, values) = (file.dtype(name)!, file.shape(name)!.reduce(1, *))
          count += 1
          parameters += values
          bytes += values * dtype.size
          dtypes["\(dtype)", default: 0] += 1
        }
      }
    }
  }

  /// A LoRA adapter.
  public struct Adapter: Encodable, Sendable {
    /// The safetensors file.
    public let file: String
    /// What stands before module paths, and what the factors are called.
    public let prefix, naming: String
    /// Where the scales come from.
    public let scaling: String
    /// Adapted layers.
    public let layers: Int
    /// Rank, alpha and scale → number of layers.
    public let ranks, alphas, scales: [String: Int]
    /// Name of a layer within its block → number of layers.
    public let targets: [String: Int]
    /// What the names and sizes are of, where that can be told.
    public let architecture: String?
    /// Why it cannot be used.
    public let problems: [String]
    /// With a model to compare with: keys of layers that would not apply to it, with the reason.
    public let misfits: [String]?

    init(_ lora: LoRAFile, model: [String: [Int]]?) {
      func counts(_ values: [String]) -> [String: Int] {
        Dictionary(values.map { ($0, 1) }, uniquingKeysWith: +)
      }
      file = lora.url.path
      (prefix, naming, scaling) = (lora.prefix, lora.naming.rawValue, lora.scaling.rawValue)
      layers = lora.layers.count
      ranks = counts(lora.layers.map { "\($0.rank)" })
      alphas = counts(lora.layers.map { String(format: "%g", $0.alpha) })
      scales = counts(lora.layers.map { String(format: "%g", $0.scale) })
      targets = counts(lora.layers.map { LoRATargets.suffix($0.path) })
      architecture = lora.architecture?.rawValue
      problems = lora.problems
      misfits = model.map { sizes in
        lora.misfits(sizes).map { "\(lora.prefix)\($0.layer.path): \($0.reason)" }
      }
    }
  }

  /// A part of a model folder.
  public struct Part: Encodable, Sendable {
    /// Name of its folder.
    public let name: String
    /// Class named in its configuration.
    public let type: String?
    /// Weight files.
    public let files: Int
    /// What they hold.
    public let tensors: Tensors
  }

  /// A training run or one of its checkpoints.
  public struct Run: Encodable, Sendable {
    /// The base model.
    public let model: String
    /// Iterations asked for.
    public let iterations: Int
    /// Iterations that the newest checkpoint, or this one, holds.
    public let done: Int?
    /// lora or full.
    public let trainable: String
    /// Names of the checkpoints, oldest first.
    public let checkpoints: [String]
  }

  /// What was given.
  public let path: String
  /// What it is.
  public let kind: Kind
  /// Counts over everything.
  public let tensors: Tensors
  /// The adapter, if it is one or holds one.
  public private(set) var adapter: Adapter?
  /// `_class_name` of a model folder.
  public private(set) var pipeline: String?
  /// Parts of a model folder.
  public private(set) var parts: [Part]?
  /// The run, or the run that the checkpoint is of.
  public private(set) var run: Run?

  /// Whether an adapter here cannot be used, or not with the model given.
  public var isUnusable: Bool {
    adapter.map { !$0.problems.isEmpty || $0.misfits?.isEmpty == false } ?? false
  }

  /// Looks at `path`.
  ///
  /// - Parameter model: a model folder to compare an adapter with.
  /// - Throws: ``RunError`` for something else, a typed error of the reader for something damaged.
  public init(_ path: String, model: String? = nil) throws {
    self.path = path
    let url = URL(filePath: path)
    var isFolder: ObjCBool = false
    guard FileManager.default.fileExists(atPath: url.path, isDirectory: &isFolder) else {
      throw RunError("\(path): no such file or folder")
    }
    func exists(_ name: String) -> Bool {
      FileManager.default.fileExists(atPath: url.appending(path: name).path)
    }
    let sizes = try model.map(Self.sizes)
    if isFolder.boolValue, exists("model_index.json") {
      let folder = try ModelFolder(url)
      let parts = try Self.parts(of: url)
      (kind, pipeline) = (.model, folder.pipeline)
      self.parts = parts.map(\.part)
      tensors = Tensors(parts.flatMap(\.files))
    } else if isFolder.boolValue, exists("config.yaml") {
      let trained = try Self.trained(url)
      kind = exists("state.json") ? .checkpoint : .run
      run = try Self.run(url, isCheckpoint: kind == .checkpoint)
      tensors = Tensors(trained)
      adapter = try LoRAFile.locate(url) == nil ? nil : Adapter(try LoRAFile(url), model: sizes)
    } else if let file = try LoRAFile.locate(url) {
      let isPEFT = file.lastPathComponent == "adapter_model.safetensors"
      let source = try SafetensorsFile(file)
      tensors = Tensors([source])
      // A name of our own making says adapter; otherwise the entries must.
      let isAdapter =
        isFolder.boolValue || isPEFT
        || source.names.contains { name in name.contains(".lora_") || name.contains(".lora.") }
      kind = isPEFT ? .peft : isAdapter ? .adapter : .tensors
      if isAdapter { adapter = Adapter(try LoRAFile(file), model: sizes) }
    } else if isFolder.boolValue, let checkpoint = try Self.weights(url) {
      kind = .part
      tensors = Tensors(checkpoint)
    } else {
      throw RunError(
        "\(path): nothing this tool knows: expected a .safetensors file, a LoRA or PEFT folder, a model folder, "
          + "a run or a checkpoint")
    }
    if model != nil, adapter == nil {
      throw RunError(
        "--model: \(path) is no adapter (\(kind.rawValue)), there is nothing to compare with the model")
    }
  }

  /// The linear layers of a model folder's transformer, path → [out, in].
  private static func sizes(_ model: String) throws -> [String: [Int]] {
    let folder = try ModelFolder(URL(filePath: model))
    return ModelMerge.linearSizes(try Checkpoint(folder: folder.part("transformer")).shards)
  }

  /// The weight files of one part, or nil if the folder has none.
  private static func weights(_ folder: URL) throws -> [SafetensorsFile]? {
    let names = try FileManager.default.contentsOfDirectory(atPath: folder.path)
    let known = ["diffusion_pytorch_model", "model"].contains { stem in
      names.contains { $0 == stem + ".safetensors" || $0 == stem + ".safetensors.index.json" }
    }
    return known ? try Checkpoint(folder: folder).shards : nil
  }

  private static func parts(of model: URL) throws -> [(part: Part, files: [SafetensorsFile])] {
    struct Config: Decodable {
      let className: String?
      let architectures: [String]?
      enum CodingKeys: String, CodingKey { case className = "_class_name", architectures }
    }
    var parts: [(part: Part, files: [SafetensorsFile])] = []
    for name in try FileManager.default.contentsOfDirectory(atPath: model.path).sorted() {
      let folder = model.appending(path: name)
      var isFolder: ObjCBool = false
      guard FileManager.default.fileExists(atPath: folder.path, isDirectory: &isFolder), isFolder.boolValue,
        let files = try weights(folder)
      else { continue }
      let data = FileManager.default.contents(atPath: folder.appending(path: "config.json").path)
      let config = data.flatMap { try? JSONDecoder().decode(Config.self, from: $0) }
      let type = config?.className ?? config?.architectures?.first
      parts.append((Part(name: name, type: type, files: files.count, tensors: Tensors(files)), files))
    }
    return parts
  }

  /// The files with the trained weights of a run or checkpoint.
  private static func trained(_ folder: URL) throws -> [SafetensorsFile] {
    if let file = try LoRAFile.locate(folder) { return [try SafetensorsFile(file)] }
    for folder in [folder.appending(path: "adapter"), folder] {
      let file = folder.appending(path: "diffusion_pytorch_model.safetensors")
      if FileManager.default.fileExists(atPath: file.path) { return [try SafetensorsFile(file)] }
    }
    return []
  }

  private static func run(_ folder: URL, isCheckpoint: Bool) throws -> Run {
    let configuration = try Configuration.load(file: folder.appending(path: "config.yaml"))
    let home = isCheckpoint ? folder.deletingLastPathComponent() : folder.appending(path: "checkpoints")
    let names = (try? FileManager.default.contentsOfDirectory(atPath: home.path)) ?? []
    let checkpoints = names.filter { $0.hasPrefix("iteration-") }.sorted()
    let newest = isCheckpoint ? folder : checkpoints.last.map { home.appending(path: $0) }
    struct State: Decodable { let iteration: Int }
    let state = newest.flatMap { FileManager.default.contents(atPath: $0.appending(path: "state.json").path) }
    return Run(
      model: configuration.model, iterations: configuration.run.iterations,
      done: state.flatMap { try? JSONDecoder().decode(State.self, from: $0) }?.iteration,
      trainable: configuration.trainable.kind.rawValue, checkpoints: isCheckpoint ? [] : checkpoints)
  }
}
