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
  /// Folder of the weights.
  public let folder: URL
  private let files: [SafetensorsFile]
  private let location: [String: Int]
  private var used: Set<String> = []
  private var missing: [String] = []
  private var misshapen: [String] = []
  private var notFinite: [String] = []

  /// Opens `<name>.safetensors`, or the shards listed in `<name>.safetensors.index.json`, for the first of
  /// `names` that exists in `folder`.
  public init(folder: URL, names: [String] = ["diffusion_pytorch_model", "model"]) throws {
    self.folder = folder
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
        for shard in shards { files.append(try SafetensorsFile(folder.appending(path: shard))) }
        let number = Dictionary(uniqueKeysWithValues: shards.enumerated().map { ($1, $0) })
        for (key, shard) in map {
          guard files[number[shard]!].shape(key) != nil else {
            throw CheckpointError(
              path: index.path, problems: ["the index places \(key) in \(shard), which does not hold it"])
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
      let tried = names.map { "\($0).safetensors" }.joined(separator: " or ")
      throw CheckpointError(
        path: folder.path,
        problems: ["no weights: expected \(tried), or the same with .index.json and shards"])
    }
    self.files = files
    self.location = location
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
    guard let at = location[key], let tensor = try files[at].tensor(key) else {
      missing.append(key)
      return try Tensor.zeros(shape)
    }
    used.insert(key)
    guard tensor.shape == shape else {
      misshapen.append("\(key): expected \(shape), got \(tensor.shape)")
      return try Tensor.zeros(shape)
    }
    if tensor.dtype.isFloatingPoint, try !tensor.allFinite() { notFinite.append(key) }
    return tensor
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
  private var compute: DType?

  init(key: String, tensor: Tensor) {
    self.key = key
    self.tensor = tensor
  }

  /// The values in the dtype the network computes in.
  public func value() throws(TorchError) -> Tensor {
    if let compute { try tensor.to(compute) } else { tensor }
  }

  /// Moves the values to `device` and `dtype` for good: what a frozen network computes with.
  public func place(_ dtype: DType, _ device: Device) throws(TorchError) {
    tensor = try tensor.to(dtype).to(device)
    compute = nil
  }

  /// Replaces the storage by an equal tensor, e.g. a view into a stacked weight.
  func replace(by other: Tensor) { tensor = other }

  /// Makes this a float32 gradient leaf; the network goes on computing in its dtype.
  public func makeTrainable() throws(TorchError) {
    guard !tensor.requiresGrad else { return }
    let dtype = tensor.dtype
    // A copy of its own: the tensor may be a view of a mapped file or of a stack.
    tensor = try tensor.to(.float32).clone()
    try tensor.setRequiresGrad(true)
    compute = dtype == .float32 ? nil : dtype
  }
}
