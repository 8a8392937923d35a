import FlowModels
import Foundation
import Torch
import TorchNN

extension Verifier {
  /// The CLIP folder that `io/<name>.json` names, or the folder itself; nil where neither holds a CLIP of
  /// both towers.
  func clipFolder(_ name: String) -> URL? {
    let named = ((try? settings(name))?["model"] as? String).map { folder.appending(path: $0) }
    return [named, folder].compactMap { $0 }.first { candidate in
      let open = candidate.appending(path: "open_clip_config.json")
      if FileManager.default.fileExists(atPath: open.path) { return true }
      let config = (try? Data(contentsOf: candidate.appending(path: "config.json"))) ?? Data()
      return ((try? JSONSerialization.jsonObject(with: config)) as? [String: Any])?["vision_config"] != nil
    }
  }

  /// A CLIP model on stored ids and on images, raw or processed: embeddings and every score made of them.
  mutating func clip(_ name: String, _ data: SafetensorsFile, _ model: URL) throws {
    let clip = try CLIPModel(folder: model, activation: (try? settings(name))?["act"] as? String)
    let ids = try data.require("in.input_ids")
    let attention = try data.tensor("in.attention_mask")
    let pixels = try data.tensor("in.images_u8").map { try CLIPImageProcessor(folder: model)($0) }
    let input = try pixels ?? data.require("in.pixel_values")
    let (image, text, plainText) = try withoutGrad {
      (
        try clip.embedImages(input), try clip.embedText(ids, attentionMask: attention),
        try clip.embedText(ids)
      )
    }
    let scale = try clip.scale().detach()
    for key in data.names where key.hasPrefix("out.") {
      let id = "\(name) \(key.dropFirst(4))"
      let ours: Tensor
      switch key.dropFirst(4) {
      case "pixel_values":
        guard let pixels else { continue }
        try greyLevels(id, pixels, data, key, try CLIPImageProcessor(folder: model))
        continue
      case "image_embeds", "image_features": ours = image
      case "text_embeds", "text_features": ours = text
      case "text_embeds_nomask": ours = plainText
      case "logit_scale": ours = scale
      case "logits_per_image": ours = try image.matmul(try text.transpose(0, 1)) * scale
      case "logits_per_text": ours = try text.matmul(try image.transpose(0, 1)) * scale
      case "clipscore", "hpsv2_score": ours = try CLIPModel.cosine(image, text)
      case "pickscore": ours = try CLIPModel.cosine(image, text) * scale
      default:
        unsupported(id, "this version computes no such output of CLIP")
        continue
      }
      try compare(id, ours, data, key)
    }
  }

  /// Pixels compared as grey levels: those of PIL, or another resize. 1e-3 leaves room for how the mean is
  /// subtracted.
  private mutating func greyLevels(
    _ id: String, _ ours: Tensor, _ data: SafetensorsFile, _ key: String, _ processor: CLIPImageProcessor
  ) throws {
    let expected = try data.require(key)
    guard ours.shape == expected.shape else { return try compare(id, ours, data, key) }
    let deviation = try Tensor(processor.deviation, shape: [1, 3, 1, 1])
    let error = try ((ours - expected) * deviation * 255).abs().amax().item()
    record(id, error: error, tolerance: 1e-3, note: "largest difference in grey levels")
  }
}
