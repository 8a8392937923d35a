import Foundation
import Torch
import TorchNN

/// Layouts in which adapters are written for other programs.
public enum LoRAFormat: String, Sendable, CaseIterable {
  /// `pytorch_lora_weights.safetensors` for diffusers' `load_lora_weights` and ComfyUI, scale folded into B.
  case diffusers
  /// `adapter_config.json` and `adapter_model.safetensors` for PEFT's `from_pretrained`, factors as they are.
  case peft

  /// Writes `layers` into the existing folder `folder`.
  ///
  /// - Parameters:
  ///   - layers: path in the transformer → factors.
  ///   - dtype: of the stored factors; rounded once, after any folding.
  /// - Throws: ``ModelError`` if there is no layer, or a factor has no finite value in `dtype`.
  public func write(_ layers: [String: LoRA], dtype: DType = .float32, to folder: URL) throws {
    guard !layers.isEmpty else {
      throw ModelError("\(folder.path): an adapter without layers is not written")
    }
    switch self {
    case .diffusers:
      try Self.writeDiffusers(
        layers, dtype: dtype, to: folder.appending(path: "pytorch_lora_weights.safetensors"))
    case .peft: try Self.writePEFT(layers, dtype: dtype, to: folder)
    }
  }

  static func writeDiffusers(_ layers: [String: LoRA], dtype: DType = .float32, to file: URL) throws {
    var tensors: [String: Tensor] = [:]
    for (path, layer) in layers {
      tensors["transformer.\(path).lora_A.weight"] = try round(layer.down.detach(), dtype, path)
      tensors["transformer.\(path).lora_B.weight"] = try round(layer.up.detach() * layer.scale, dtype, path)
    }
    try Safetensors.write(tensors, metadata: ["format": "pt"], to: file)
  }

  private static func writePEFT(_ layers: [String: LoRA], dtype: DType, to folder: URL) throws {
    var tensors: [String: Tensor] = [:]
    for (path, layer) in layers {
      tensors["base_model.model.\(path).lora_A.weight"] = try round(layer.down.detach(), dtype, path)
      tensors["base_model.model.\(path).lora_B.weight"] = try round(layer.up.detach(), dtype, path)
    }
    let ranks = layers.mapValues { $0.rank }
    let alphas = layers.mapValues { $0.scale * Double($0.rank) }
    let (rank, alpha) = (Self.commonest(ranks.values), Self.commonest(alphas.values))
    let config: [String: Any] = [
      "peft_type": "LORA", "task_type": NSNull(), "base_model_name_or_path": NSNull(), "inference_mode": true,
      "r": rank, "lora_alpha": Self.number(alpha), "target_modules": layers.keys.sorted(),
      "rank_pattern": ranks.filter { $0.value != rank },
      "alpha_pattern": alphas.filter { $0.value != alpha }.mapValues(Self.number),
      "lora_dropout": 0, "bias": "none", "fan_in_fan_out": false, "init_lora_weights": true,
      "modules_to_save": NSNull(),
      "use_rslora": false, "use_dora": false,
    ]
    let json = try JSONSerialization.data(
      withJSONObject: config, options: [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes])
    try AtomicFile.write(json, to: folder.appending(path: "adapter_config.json"))
    try Safetensors.write(
      tensors, metadata: ["format": "pt"], to: folder.appending(path: "adapter_model.safetensors"))
  }

  private static func round(_ values: Tensor, _ dtype: DType, _ path: String) throws -> Tensor {
    let rounded = try values.to(dtype)
    guard try rounded.allFinite() else {
      throw ModelError(
        "\(path): values beyond the range of \(dtype); write the adapter in float32 or bfloat16")
    }
    return rounded
  }
  /// The most frequent value; of several the smallest.
  private static func commonest<T: Hashable & Comparable>(_ values: some Sequence<T>) -> T {
    Dictionary(values.map { ($0, 1) }, uniquingKeysWith: +)
      .max { ($0.value, $1.key) < ($1.value, $0.key) }!.key
  }
  /// Whole numbers as integers, which is what PEFT writes.
  private static func number(_ value: Double) -> NSNumber {
    Int(exactly: value).map { NSNumber(value: $0) } ?? NSNumber(value: value)
  }
}
