import Foundation
import Torch
import TorchNN

/// A LoRA adapter on disk, read without a model: names, sizes and scales; values only for ``factors(_:)``.
///
/// Read are `lora_A`/`lora_B` and `lora_down`/`lora_up` with diffusers' module names, under any of
/// ``prefixes``, and PEFT folders. The scale of a layer is, in this order:
/// 1. `adapter_config.json` beside the file: alpha/r, or alpha/√r with rsLoRA, with patterns (PEFT 0.21);
/// 2. `<layer>.alpha` tensors: alpha/r (diffusers 0.42 ignores those of lora_down/lora_up, ComfyUI does not);
/// 3. the metadata `lora_adapter_metadata`, which says what adapter_config.json would (diffusers 0.42);
/// 4. none of them: 1, as diffusers and ComfyUI do.
///
/// Alpha tensors and metadata together are refused unless they agree, as diffusers refuses them.
public struct LoRAFile: Sendable {
  /// The safetensors file.
  public let url: URL
  /// What stands before the module path in every key, one of ``prefixes``.
  public let prefix: String
  /// What the factors are called.
  public let naming: Naming
  /// Where the scales come from.
  public let scaling: Scaling
  /// The layers whose factors are whole, by path.
  public let layers: [Layer]
  /// Why the file cannot be used as it is: what, where and the way out.
  public let problems: [String]
  /// What the module names and sizes are of, where that can be told.
  public let architecture: ModelArchitecture?
  private let source: SafetensorsFile

  /// What can stand before a module path, longest first.
  public static let prefixes = [
    "base_model.model.transformer.", "base_model.model.", "diffusion_model.", "transformer.", "",
  ]

  /// Names of the two factors.
  public enum Naming: String, Sendable, CaseIterable {
    /// PEFT's and diffusers'.
    case loraAB = "lora_A/lora_B"
    /// Kohya's and ComfyUI's.
    case downUp = "lora_down/lora_up"

    var down: String { self == .loraAB ? ".lora_A.weight" : ".lora_down.weight" }
    var up: String { self == .loraAB ? ".lora_B.weight" : ".lora_up.weight" }
  }

  /// Where scales come from.
  public enum Scaling: String, Sendable {
    case config = "adapter_config.json"
    case metadata = "lora_adapter_metadata"
    case alphaTensors = "alpha tensors"
    case both = "alpha tensors and lora_adapter_metadata, which agree"
    case none = "not stated: 1"
  }

  /// One adapted layer.
  public struct Layer: Sendable, Equatable {
    /// Path of the linear layer in the transformer.
    public let path: String
    /// Columns of A's product.
    public let rank: Int
    /// Sizes of the linear layer.
    public let inSize, outSize: Int
    /// Element type of A.
    public let dtype: DType
    /// alpha as stated; the rank where nothing is.
    public let alpha: Double
    /// What B·A is multiplied by.
    public let scale: Double
    let down, up: String
  }

  /// Reads the headers of a file, of a PEFT folder, or of a folder that holds
  /// `pytorch_lora_weights.safetensors` itself or in `adapter/`.
  ///
  /// - Throws: ``ModelError`` where there is no adapter or only a pickle, `SafetensorsError` for a damaged
  ///   file. What is in a whole file and cannot be used is in ``problems``.
  public init(_ url: URL) throws {
    guard let file = try Self.locate(url) else {
      throw ModelError(
        "\(url.path): no LoRA adapter: expected a .safetensors file, a folder with "
          + "pytorch_lora_weights.safetensors, or a PEFT folder with adapter_config.json and adapter_model.safetensors"
      )
    }
    source = try SafetensorsFile(file)
    self.url = file
    var reader = try LoRAReader(source, config: Self.config(beside: file))
    reader.read()
    (prefix, naming, scaling) = (reader.prefix, reader.naming, reader.scaling)
    (layers, problems, architecture) = (reader.layers, reader.problems, reader.architecture)
  }

  /// The safetensors file of the adapter that `url` names, or nil if it names none.
  ///
  /// - Throws: ``ModelError`` for a pickle, with the command that converts it.
  public static func locate(_ url: URL) throws -> URL? {
    let files = FileManager.default
    var isFolder: ObjCBool = false
    guard files.fileExists(atPath: url.path, isDirectory: &isFolder) else { return nil }
    guard isFolder.boolValue else {
      if pickles.contains(url.pathExtension) { throw pickle(url) }
      return url.pathExtension == "safetensors" ? url : nil
    }
    for folder in [url, url.appending(path: "adapter")] {
      for name in ["pytorch_lora_weights", "adapter_model"] {
        let file = folder.appending(path: name + ".safetensors")
        if files.fileExists(atPath: file.path) { return file }
        for type in pickles.sorted() {
          let file = folder.appending(path: "\(name).\(type)")
          if files.fileExists(atPath: file.path) { throw pickle(file) }
        }
      }
    }
    return nil
  }

  private static let pickles: Set = ["bin", "ckpt", "pt", "pth"]
  private static func pickle(_ file: URL) -> ModelError {
    let (name, stem) = (file.lastPathComponent, file.deletingPathExtension().lastPathComponent)
    return ModelError(
      "\(file.path): a pickle, which can run any code and is not read; convert it in its folder with: "
        + "python3 -c \"import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in "
        + "torch.load('\(name)', weights_only=True).items()}, '\(stem).safetensors')\"")
  }

  /// PEFT's configuration, where the file lies in a PEFT folder.
  private static func config(beside file: URL) throws -> PEFTSettings? {
    // diffusers' own file says all itself, whatever lies beside it.
    if file.lastPathComponent == "pytorch_lora_weights.safetensors" { return nil }
    let config = file.deletingLastPathComponent().appending(path: "adapter_config.json")
    if FileManager.default.fileExists(atPath: config.path) {
      guard let data = try? Data(contentsOf: config),
        let object = try? JSONSerialization.jsonObject(with: data) as? [String: Any]
      else { throw ModelError("\(config.path): not a JSON object") }
      return PEFTSettings(object, name: "adapter_config.json")
    }
    guard file.lastPathComponent != "adapter_model.safetensors" else {
      throw ModelError(
        "\(file.path): PEFT's adapter_config.json must lie beside it: the scale, alpha/r, stands only there")
    }
    return nil
  }

  /// All entry names, for listings.
  public var names: [String] { source.names }
  /// The header's metadata.
  public var metadata: [String: String] { source.metadata }

  /// Throws if there is any of ``problems``.
  public func requireUsable() throws(ModelError) {
    if !problems.isEmpty { throw ModelError("\(url.path): " + problems.joined(separator: "; ")) }
  }

  /// Layers that do not apply to a model, each with the reason.
  ///
  /// - Parameter sizes: the model's linear layers, path → [out, in].
  public func misfits(_ sizes: [String: [Int]]) -> [(layer: Layer, reason: String)] {
    layers.compactMap { layer in
      guard let size = sizes[layer.path] else { return (layer, "no such layer") }
      guard size == [layer.outSize, layer.inSize] else {
        return (
          layer,
          "A [\(layer.rank), \(layer.inSize)] and B [\(layer.outSize), \(layer.rank)] do not fit a layer "
            + "\(size[1]) → \(size[0])"
        )
      }
      return nil
    }
  }

  /// Throws unless every layer applies to a model with these linear layers, path → [out, in].
  public func requireFits(_ sizes: [String: [Int]]) throws(ModelError) {
    let misfits = misfits(sizes)
    guard let first = misfits.first else { return }
    var text = "\(url.path): "
    if misfits.allSatisfy({ sizes[$0.layer.path] == nil }) {
      let keys = misfits.prefix(4).map(\.layer.down).joined(separator: ", ")
      text += "\(misfits.count) of \(layers.count) layers are not in this model (\(keys)"
      text += misfits.count > 4 ? ", …)" : ")"
    } else {
      let shown = misfits.first { sizes[$0.layer.path] != nil } ?? first
      text += "\(misfits.count) of \(layers.count) layers do not fit: \(shown.layer.path): \(shown.reason)"
    }
    let model = ModelArchitecture.recognise(sizes)
    if let architecture, let model, architecture != model {
      text += "; the adapter is for \(architecture.rawValue), the model is \(model.rawValue)"
    } else {
      text += "; was it trained for another model?"
    }
    throw ModelError(text)
  }

  /// The factors of every layer, by path; see ``factors(_:)``.
  public func allFactors() throws -> [String: LoRA] {
    Dictionary(uniqueKeysWithValues: try layers.map { ($0.path, try factors($0)) })
  }

  /// The factors of a layer of this file in float32, on the CPU.
  ///
  /// - Throws: ``ModelError`` if a value is NaN or infinite.
  public func factors(_ layer: Layer) throws -> LoRA {
    let (down, up) = (try source.require(layer.down), try source.require(layer.up))
    guard try down.allFinite() && up.allFinite() else {
      throw ModelError("\(url.path): \(layer.path): NaN or infinite values; the adapter is broken")
    }
    return LoRA(down: try down.to(.float32), up: try up.to(.float32), scale: layer.scale)
  }
}
