import Foundation
import Torch
import TorchNN

/// A LoRA adapter attached to a model.
public final class LoRAAdapter {
  /// Layer path → factors.
  public let layers: [String: LoRA]
  private let modules: ModuleRegistry

  /// Attaches fresh adapters to the linear layers that `targets` name, see ``LoRATargets``.
  ///
  /// - Parameter initial: values in −1 … 1 for A of the layer named, uniform; B is zero.
  /// - Throws: ``ModelError`` for a target that names no layer.
  public init(
    _ modules: ModuleRegistry, rank: Int, alpha: Double, targets: [String], device: Device = .cpu,
    initial: (String, Int) -> [Float]
  ) throws {
    var layers: [String: LoRA] = [:]
    for path in try LoRATargets(targets).select(modules.linears.keys) {
      let linear = modules.linears[path]!
      // PEFT's default: Kaiming uniform with a = √5, that is ±1/√in.
      let values = initial(path, rank * linear.inSize).map { $0 / Float(linear.inSize).squareRoot() }
      layers[path] = LoRA(
        down: try Self.leaf(try Tensor(values, shape: [rank, linear.inSize]), device),
        up: try Self.leaf(try Tensor.zeros([linear.outSize, rank]), device), scale: alpha / Double(rank))
    }
    self.layers = layers
    self.modules = modules
    enable()
  }

  /// Reads a LoRA file or PEFT folder in any form of ``LoRAFile`` and attaches it.
  ///
  /// - Throws: ``ModelError`` for anything that would not apply: a file is used whole or not at all.
  public convenience init(_ url: URL, for modules: ModuleRegistry, device: Device = .cpu) throws {
    try self.init(try LoRAFile(url), for: modules, device: device)
  }

  /// Attaches the adapter that `file` holds.
  public init(_ file: LoRAFile, for modules: ModuleRegistry, device: Device = .cpu) throws {
    try file.requireUsable()
    try file.requireFits(modules.linears.mapValues { [$0.outSize, $0.inSize] })
    layers = try file.allFactors().mapValues {
      LoRA(down: try Self.leaf($0.down, device), up: try Self.leaf($0.up, device), scale: $0.scale)
    }
    self.modules = modules
    enable()
  }

  private static func leaf(_ tensor: Tensor, _ device: Device) throws(TorchError) -> Tensor {
    let leaf = try tensor.to(.float32).to(device).clone()
    try leaf.setRequiresGrad(true)
    return leaf
  }

  /// Adds the adapter to its layers' outputs.
  public func enable() { for (path, layer) in layers { modules.linears[path]!.adapter = layer } }
  /// Leaves the layers as their base.
  public func disable() { for path in layers.keys { modules.linears[path]!.adapter = nil } }

  /// Runs `body` with the layers as their base.
  public func without<R>(_ body: () throws -> R) rethrows -> R {
    disable()
    defer { enable() }
    return try body()
  }

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
    try LoRAFormat.writeDiffusers(layers, to: file)
  }
}
