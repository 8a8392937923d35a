import Foundation
import Torch
import TorchNN

/// A LoRA adapter attached to a model.
public final class LoRAAdapter {
  /// Layer path → factors.
  public let layers: [String: LoRA]
  private let modules: ModuleRegistry

  /// Attaches fresh adapters to every linear layer whose path ends in one of `targets`.
  ///
  /// - Parameters:
  ///   - targets: whole path components, e.g. `attn.to_q`, or `all-linear`.
  ///   - initial: values in −1 … 1 for A of the layer named, uniform; B is zero.
  public init(
    _ modules: ModuleRegistry, rank: Int, alpha: Double, targets: [String], device: Device = .cpu,
    initial: (String, Int) -> [Float]
  ) throws {
    var layers: [String: LoRA] = [:]
    var hit: Set<String> = []
    for (path, linear) in modules.linears {
      let matching = targets.filter { $0 == "all-linear" || path == $0 || path.hasSuffix("." + $0) }
      guard !matching.isEmpty else { continue }
      hit.formUnion(matching)
      // PEFT's default: Kaiming uniform with a = √5, that is ±1/√in.
      let values = initial(path, rank * linear.inSize).map { $0 / Float(linear.inSize).squareRoot() }
      layers[path] = LoRA(
        down: try Self.leaf(try Tensor(values, shape: [rank, linear.inSize]), device),
        up: try Self.leaf(try Tensor.zeros([linear.outSize, rank]), device), scale: alpha / Double(rank))
    }
    let unknown = targets.filter { !hit.contains($0) }
    guard unknown.isEmpty else {
      let known = Set(modules.linears.keys.map(Self.suffix)).sorted().joined(separator: ", ")
      throw ModelError(
        "trainable.targets: no linear layer matches \(unknown.joined(separator: ", ")); the model has \(known)"
      )
    }
    self.layers = layers
    self.modules = modules
    enable()
  }

  /// Reads a diffusers LoRA file and attaches it.
  ///
  /// Scale: alpha/rank from `<layer>.alpha` or from the metadata; 1 where there is neither, as diffusers does.
  public init(_ file: URL, for modules: ModuleRegistry, device: Device = .cpu) throws {
    let source = try SafetensorsFile(file)
    func bad(_ reason: String) -> ModelError { ModelError("\(file.path): \(reason)") }
    var metadata: [String: Any] = [:]
    if let text = source.metadata["lora_adapter_metadata"] {
      guard let object = try? JSONSerialization.jsonObject(with: Data(text.utf8)) as? [String: Any] else {
        throw bad("lora_adapter_metadata is not a JSON object")
      }
      metadata = object
    }
    var used: Set<String> = []
    var layers: [String: LoRA] = [:]
    var unknown: [String] = []
    for name in source.names where name.hasSuffix(".lora_A.weight") {
      let stem = String(name.dropLast(".lora_A.weight".count))
      guard stem.hasPrefix("transformer."),
        case let path = String(stem.dropFirst("transformer.".count)), let linear = modules.linears[path]
      else {
        unknown.append(name)
        continue
      }
      let down = try source.require(name)
      let up = try source.require(stem + ".lora_B.weight")
      used.formUnion([name, stem + ".lora_B.weight"])
      guard down.rank == 2, down.size(1) == linear.inSize, up.shape == [linear.outSize, down.size(0)] else {
        throw bad(
          "\(path): A \(down.shape) and B \(up.shape) do not fit a layer \(linear.inSize) → \(linear.outSize)"
        )
      }
      var alpha = Double(down.size(0))
      if let stored = try source.tensor(stem + ".alpha") {
        used.insert(stem + ".alpha")
        alpha = try stored.item()
      } else if let stated = (metadata["transformer.lora_alpha"] as? NSNumber)?.doubleValue {
        let pattern = metadata["transformer.alpha_pattern"] as? [String: NSNumber] ?? [:]
        alpha = pattern.first { path == $0.key || path.hasSuffix("." + $0.key) }?.value.doubleValue ?? stated
      }
      guard try down.allFinite() && up.allFinite() else { throw bad("\(path): NaN or infinite values") }
      layers[path] = LoRA(
        down: try Self.leaf(down, device), up: try Self.leaf(up, device), scale: alpha / Double(down.size(0)))
    }
    unknown += source.names.filter { !used.contains($0) && !unknown.contains($0) }
    guard unknown.isEmpty else {
      throw bad(
        "\(unknown.count) keys fit no layer of the model (\(unknown.prefix(6).joined(separator: ", ")))")
    }
    guard !layers.isEmpty else {
      throw bad("holds no LoRA layer; expected keys transformer.<layer>.lora_A.weight and lora_B.weight")
    }
    self.layers = layers
    self.modules = modules
    enable()
  }

  private static func leaf(_ tensor: Tensor, _ device: Device) throws(TorchError) -> Tensor {
    let leaf = try tensor.to(.float32).to(device).clone()
    try leaf.setRequiresGrad(true)
    return leaf
  }
  private static func suffix(_ path: String) -> String {
    let parts = path.split(separator: ".")
    guard let number = parts.firstIndex(where: { Int($0) != nil }) else { return path }
    return parts[(number + 1)...].joined(separator: ".")
  }

  /// Adds the adapter to its layers' outputs.
  public func enable() { for (path, layer) in layers { modules.linears[path]!.adapter = layer } }
  /// Leaves the layers as their base.
  public func disable() { for path in layers.keys { modules.linears[path]!.adapter = nil } }

  /// The trainable tensors by name: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`.
  public var parameters: [String: Tensor] {
    var result: [String: Tensor] = [:]
    for (path, layer) in layers {
      result[path + ".lora_A.weight"] = layer.down
      result[path + ".lora_B.weight"] = layer.up
    }
    return result
  }

  /// Writes `pytorch_lora_weights.safetensors` with alpha/rank folded into B, so that alpha = rank and every
  /// reader gives the same scale, with or without metadata.
  public func write(to file: URL) throws {
    var tensors: [String: Tensor] = [:]
    for (path, layer) in layers {
      tensors["transformer.\(path).lora_A.weight"] = try layer.down.detach()
      tensors["transformer.\(path).lora_B.weight"] = try layer.up.detach() * layer.scale
    }
    try Safetensors.write(tensors, metadata: ["format": "pt"], to: file)
  }
}
