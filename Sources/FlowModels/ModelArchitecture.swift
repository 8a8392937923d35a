/// A transformer that module names and sizes give away.
public enum ModelArchitecture: String, Sendable {
  case flux = "FLUX.1"
  case flux2 = "FLUX.2"
  case sd3 = "SD3"
  case sd35Medium = "SD3.5-medium"
  case sd35Large = "SD3.5-large"
  case unet = "a UNet (Stable Diffusion 1, 2 or XL)"
  case fluxOriginal = "FLUX.1 in Black Forest Labs' own names"
  case sd3Original = "SD3 in Stability AI's own names"

  /// Why no key of such names can be read, and the way out; nil for diffusers' names.
  var unreadable: String? {
    switch self {
    case .flux, .flux2, .sd3, .sd35Medium, .sd35Large: nil
    case .unet: "keys are of \(rawValue), not of a flow-matching transformer"
    case .fluxOriginal, .sd3Original:
      "keys are of \(rawValue), with query, key and value fused; load it in diffusers (load_lora_weights) "
        + "and save it again (save_lora_weights)"
    }
  }

  /// Finds out what linear layers are of; nil where several models have them.
  ///
  /// - Parameter sizes: path → [out, in].
  static func recognise(_ sizes: [String: [Int]]) -> ModelArchitecture? {
    func any(_ parts: String...) -> Bool {
      sizes.keys.contains { path in parts.contains { path.contains($0) } }
    }
    if any("double_blocks", "single_blocks") { return .fluxOriginal }
    if any("joint_blocks") { return .sd3Original }
    if any("down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "lora_unet_") {
      return .unet
    }
    if any("to_qkv_mlp_proj", "ff.linear_in", "ff_context.linear_in") { return .flux2 }
    if any("single_transformer_blocks.") { return .flux }
    let widths = sizes.filter { $0.key.hasPrefix("transformer_blocks.") && $0.key.hasSuffix(".attn.to_q") }
    // Widths of the published models; SD3-medium has SD3.5-medium's.
    switch widths.values.first?.last {
    case 3072 where any("add_q_proj", "ff_context"): return .flux
    case 2432: return .sd35Large
    case 1536: return any("attn2") ? .sd35Medium : .sd3
    default: return any("attn2.") && any("add_q_proj") ? .sd35Medium : nil
    }
  }
}
