import Foundation
import Torch

/// Every way in which a checkpoint did not fit a model, listed together.
public struct CheckpointError: Error, CustomStringConvertible, Sendable, Equatable {
  /// Folder or file of the weights.
  public let path: String
  /// One line a kind of problem.
  public let problems: [String]
  /// For people.
  public var description: String { "\(path): " + problems.joined(separator: "; ") }
}

/// The tensors of one model part, in one safetensors file or in shards with an index, with a record of what
/// was asked for: nothing missing, misshapen, unknown or not finite goes unnoticed.
public final class Checkpoint {
  /// Folder of the weights; of a blueprint, where its list came from.
  public let folder: URL
  private let files: [SafetensorsFile]
  private let location: [String: Int]
  /// A blueprint's shapes by key; nil where there are files.
  private let shapes: [String: [Int]]?
  private let isBlank: Bool
  private let dtype: DType?
  private let device: Device
  private(set) var quantised: (String) -> QuantisedWeight? = { _ in nil }
  private var used: Set<String> = []
  private var missing: [String] = []
  private var misshapen: [String] = []
  private var notFinite: [String] = []

  /// Opens `<name>.safetensors`, or the shards listed in `<name>.safetensors.index.json`, for the first of
  /// `names` that exists in `folder`.
  ///
  /// - Parameters:
  ///   - dtype: what floating-point parameters are converted to as they are read; nil leaves them as stored.
  ///   - device: where they are put. Each parameter goes straight there and its pages of the file are let go, so
  ///     that the host never holds much more than one parameter beside the model.
  public init(
    folder: URL, names: [String] = ["diffusion_pytorch_model", "model"], dtype: DType? = nil,
    device: Device = .cpu
  ) throws {
    self.folder = folder
    (self.dtype, self.device) = (dtype, device)
    var files: [SafetensorsFile] = []
    var location: [String: Int] = [:]
    for name in names {
      let single = folder.appending(path: "\(name).safetensors")
      let index = folder.appending(path: "\(name).safetensors.index.json")
      if FileManager.default.fileExists(atPath: single.path) {
        files = [try SafetensorsFile(single)]
        for key in files[0].names { location[key] = 0 }
        break
      }
      if FileManager.default.fileExists(atPath: index.path) {
        struct Index: Decodable { let weightMap: [String: String] }
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        guard let map = try? decoder.decode(Index.self, from: Data(contentsOf: index)).weightMap else {
          throw CheckpointError(
            path: index.path, problems: ["not a safetensors index: needs an object weight_map"])
        }
        let shards = Set(map.values).sorted()
        let absent = shards.filter {
          !FileManager.default.fileExists(atPath: folder.appending(path: $0).path)
        }
        guard absent.isEmpty else {
          throw CheckpointError(
            path: index.path,
            problems: [
              "\(absent.count) of \(shards.count) shards are missing (\(absent.joined(separator: ", "))): fetch them"
            ])
        }
        for shard in shards { files.append(try SafetensorsFile(folder.appending(path: shard))) }
        let number = Dictionary(uniqueKeysWithValues: shards.enumerated().map { ($1, $0) })
        for (key, shard) in map {
          guard files[number[shard]!].shape(key) != nil else {
            throw CheckpointError(
              path: index.path,
              problems: [
                "the index places \(key) in \(shard), which does not hold it: fetch both again, of one revision"
              ])
          }
          location[key] = number[shard]!
        }
        for (i, file) in files.enumerated() {
          for key in file.names where location[key] == nil { location[key] = i }
        }
        break
      }
    }
    guard !files.isEmpty else {
      throw CheckpointError(path: folder.path, problems: [Self.absence(folder, names)])
    }
    self.files = files
    self.location = location
    shapes = nil
    isBlank = false
  }

  /// A blueprint: keys and shapes without values. Models built from it hold zeros that take no memory, and
  /// ``finish(ignoring:)`` reports what does not fit as it does for files.
  ///
  /// - Parameter source: what the list came from, for errors.
  public init(shapes: [String: [Int]], source: URL) {
    folder = source
    self.shapes = shapes
    isBlank = false
    (dtype, device) = (nil, .cpu)
    files = []
    location = shapes.mapValues { _ in 0 }
  }

  /// No checkpoint at all: whatever is asked for is there and zero, without memory until it is converted.
  ///
  /// What a model of some configuration needs can be learnt from one built on it.
  public init(blank source: URL) {
    folder = source
    shapes = [:]
    isBlank = true
    (dtype, device) = (nil, .cpu)
    files = []
    location = [:]
  }

  /// Has the weights of the linear layers chosen by path kept in one byte a value as they are read, so that the model
  /// is never whole in its own dtype.
  public func quantise(_ kind: QuantisedWeight?, where chosen: @escaping (_ path: String) -> Bool) {
    quantised = { chosen($0) ? kind : nil }
  }

  /// Whether an entry of this name exists.
  public func contains(_ key: String) -> Bool { location[key] != nil }
  /// All entry names.
  public var keys: [String] { location.keys.sorted() }
  /// The files, one a shard.
  public var shards: [SafetensorsFile] { files }
  /// The root of the key paths.
  public var root: ParameterPath { ParameterPath(checkpoint: self, prefix: "") }

  /// The tensor under `key`, as stored. A miss is remembered for ``finish()`` and stands in as zeros.
  func take(_ key: String, shape: [Int]) throws -> Tensor {
    if isBlank { return try Self.placeholder(shape) }
    guard let at = location[key], let stored = shapes?[key] ?? files[at].shape(key) else {
      missing.append(key)
      return try Self.placeholder(shape)
    }
    used.insert(key)
    guard stored == shape else {
      misshapen.append("\(key): expected \(shape), got \(stored)")
      return try Self.placeholder(shape)
    }
    guard shapes == nil, let tensor = try files[at].tensor(key) else { return try Self.placeholder(shape) }
    let floating = tensor.dtype.isFloatingPoint
    if floating, try !tensor.allFinite() { notFinite.append(key) }
    guard let dtype else { return tensor }
    let target = floating ? dtype : tensor.dtype
    // A copy of its own even where nothing changes: views would keep the whole file in memory.
    let copies = tensor.dtype == target && device == .cpu
    let placed = copies ? try tensor.clone() : try tensor.to(target).to(device)
    files[at].letGo(key)
    return placed
  }

  /// What to say of a folder without weights; pickles are named, since they are what old folders hold.
  private static func absence(_ folder: URL, _ names: [String]) -> String {
    let tried = names.map { "\($0).safetensors" }.joined(separator: " or ")
    let files = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
    let pickles = files.filter { name in [".bin", ".pt", ".pth", ".ckpt"].contains { name.hasSuffix($0) } }
    guard let pickle = pickles.sorted().first else {
      return "no weights: expected \(tried), or the same with .index.json and shards"
    }
    return """
      no weights: \(pickle) is a pickle, which can run code when read and is refused. Convert it once: chunkgrpo convert \
      \(folder.appending(path: pickle).path) \(folder.appending(path: "\(names[0]).safetensors").path)
      """
  }

  /// One zero seen as `shape`: no memory whatever the shape.
  private static func placeholder(_ shape: [Int]) throws(TorchError) -> Tensor {
    try Tensor.zeros([]).expand(shape)
  }

  /// Throws if any parameter was missing or misshapen, held NaN or infinity, or was not used.
  public func finish(ignoring ignored: (String) -> Bool = { _ in false }) throws {
    let unused = location.keys.filter { !used.contains($0) && !ignored($0) }.sorted()
    var problems: [String] = []
    func add(_ list: [String], _ text: String) {
      guard !list.isEmpty else { return }
      let shown = list.prefix(12).joined(separator: ", ") + (list.count > 12 ? ", …" : "")
      problems.append("\(list.count) \(text) (\(shown))")
    }
    add(missing, "parameters not set")
    add(misshapen, "parameters of another shape")
    add(unused, "keys not used")
    add(notFinite, "parameters with NaN or infinite values")
    if !problems.isEmpty { throw CheckpointError(path: folder.path, problems: problems) }
  }
}

/// A place in a checkpoint's key tree: `path / "attn" / "to_q"`.
public struct ParameterPath {
  let checkpoint: Checkpoint
  /// The key so far, without trailing dot.
  public let prefix: String

  /// The path one level down.
  public static func / (path: ParameterPath, component: String) -> ParameterPath {
    ParameterPath(checkpoint: path.checkpoint, prefix: path.key(component))
  }
  /// The path one level down, numbered.
  public static func / (path: ParameterPath, index: Int) -> ParameterPath { path / String(index) }

  /// The full key of `name` here.
  public func key(_ name: String) -> String { prefix.isEmpty ? name : "\(prefix).\(name)" }
  /// Whether the checkpoint holds `name` here.
  public func contains(_ name: String) -> Bool { checkpoint.contains(key(name)) }
  /// The parameter `name` here, of `shape`.
  public func parameter(_ name: String, _ shape: Int...) throws -> Parameter {
    Parameter(key: key(name), tensor: try checkpoint.take(key(name), shape: shape))
  }
}

/// A weight under its checkpoint key.
public final class Parameter {
  /// The checkpoint key.
  public let key: String
  /// The stored values: a gradient leaf when trainable.
  public private(set) var tensor: Tensor
  /// One float32 scale a row where ``tensor`` holds one-byte codes.
  public private(set) var scales: Tensor?
  private var compute: DType?

  init(key: String, tensor: Tensor) {
    self.key = key
    self.tensor = tensor
  }

  /// The values in the dtype the network computes in.
  public func value() throws(TorchError) -> Tensor {
    if let scales { return try tensor.dequantisedRows(scales, compute!) }
    return if let compute { try tensor.to(compute) } else { tensor }
  }

  /// Moves the values to `device` and `dtype` for good: what a frozen network computes with.
  ///
  /// Quantised weights keep their codes and give values in `dtype`.
  public func place(_ dtype: DType, _ device: Device) throws(TorchError) {
    if let scales {
      (tensor, self.scales, compute) = (try tensor.to(device), try scales.to(device), dtype)
    } else {
      tensor = try tensor.to(dtype).to(device)
      compute = nil
    }
  }

  /// Replaces the storage by an equal tensor, e.g. a view into a stacked weight.
  func replace(by other: Tensor, scales: Tensor? = nil) {
    tensor = other
    if self.scales != nil { self.scales = scales }
  }

  /// Keeps one byte a value from now on; the network goes on computing in its dtype. Twice is once.
  func quantise(_ kind: QuantisedWeight) throws(TorchError) {
    guard scales == nil else { return }
    guard !tensor.requiresGrad else {
      throw TorchError("quantise", "\(key) is trained: only frozen weights can be quantised")
    }
    compute = tensor.dtype
    (tensor, scales) = try tensor.quantisedRows(kind.dtype)
  }

  /// Makes this a float32 gradient leaf; the network goes on computing in its dtype.
  public func makeTrainable() throws(TorchError) {
    guard !tensor.requiresGrad else { return }
    guard scales == nil else {
      throw TorchError(
        "makeTrainable", "\(key) is quantised: only weights of the model's own dtype can be trained")
    }
    let dtype = tensor.dtype
    // A copy of its own: the tensor may be a view of a mapped file or of a stack.
    tensor = try tensor.to(.float32).clone()
    try tensor.setRequiresGrad(true)
    compute = dtype == .float32 ? nil : dtype
  }
}
