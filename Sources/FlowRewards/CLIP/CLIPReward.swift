import FlowModels
import Foundation
import Torch

/// How well an image fits its prompt, or how it looks, by a CLIP model.
///
/// Images are rounded to bytes first, as every reference pipeline does before it scores; what resizes and crops them then
/// is Pillow's to the bit. Prompts longer than the model's 77 tokens lose their end: the part `truncated` counts the
/// tokens, 0 for prompts that fit.
public final class CLIPReward: LocalReward {
  /// What is made of the embeddings.
  enum Formula: Sendable {
    /// Cosine of image and text.
    case cosine
    /// exp(logit_scale) times the cosine, divided by a number; the cosine is a part.
    case scaled(by: Double)
    /// A head on the image's embedding; the text plays no part.
    case head(AestheticHead)
  }

  /// The name it was made under.
  public let name: String
  /// A head sees the image alone.
  public var readsPrompts: Bool { if case .head = formula { false } else { true } }
  /// How images are prepared.
  let processor: CLIPImageProcessor
  let embedder: CLIPEmbedder
  private let formula: Formula
  private let batch: Int

  init(
    name: String, embedder: CLIPEmbedder, processor: CLIPImageProcessor, formula: Formula, batch: Int
  ) {
    (self.name, self.embedder, self.processor) = (name, embedder, processor)
    (self.formula, self.batch) = (formula, batch)
  }

  /// The model, and a batch on its way through it.
  public func memory(height: Int, width: Int) -> RewardMemory? {
    // Preparation: a batch in float32, two steps of its rounding, and its bytes as they are and as they will lie.
    let preparing = batch * 3 * height * width * (3 * 4 + 2)
    let pixels = batch * 3 * processor.size * processor.size * 4
    return RewardMemory(
      model: embedder.model, weights: embedder.weights,
      call: max(preparing, pixels + embedder.passBytes(batch)))
  }

  /// One score an image; an image with pixels that are not finite has none.
  public func scores(_ images: Tensor, prompts: [RewardPrompt]) throws -> [RewardScore] {
    try checkImages(images, for: name, prompts: prompts.count)
    var result = prompts.map { _ in RewardScore(value: nil, failure: "pixels are not finite") }
    for start in stride(from: 0, to: prompts.count, by: batch) {
      let range = start..<min(start + batch, prompts.count)
      let finite = try finiteImages(try images[range])
      let part = range.filter { finite[$0 - start] }
      if part.isEmpty { continue }
      let rows = try Tensor(part.map(Int64.init))
      let pixels = try withoutGrad {
        try processor(try Self.bytes(try images.indexSelect(0, try rows.to(images.device))))
      }
      for (i, score) in zip(part, try scores(pixels: pixels, texts: part.map { prompts[$0].text })) {
        result[i] = score
      }
    }
    return result
  }

  /// Scores of images that are prepared already, [B, 3, S, S].
  func scores(pixels: Tensor, texts: [String]) throws -> [RewardScore] {
    let images = try embedder.images(pixels)
    if case .head(let head) = formula { return try head(images).doubles().map { Self.score($0, [:]) } }
    let texts = try texts.map(embedder.text)
    let cosines = try cosines(images, texts.map(\.embedding))
    return try zip(cosines, texts).map { try score(cosine: $0, dropped: $1.dropped) }
  }

  /// The same for texts that are tokens already.
  func scores(pixels: Tensor, ids: [[Int64]]) throws -> [RewardScore] {
    let cosines = try cosines(try embedder.images(pixels), try ids.map(embedder.embed))
    return try cosines.map { try score(cosine: $0, dropped: 0) }
  }

  private func cosines(_ images: Tensor, _ texts: [Tensor]) throws -> [Double] {
    try withoutGrad { try CLIPModel.cosine(images, try Tensor.cat(texts)).doubles() }
  }

  private func score(cosine: Double, dropped: Int) throws -> RewardScore {
    var parts = ["truncated": Double(dropped)]
    guard case .scaled(let divisor) = formula else { return Self.score(cosine, parts) }
    parts["cosine"] = cosine
    return Self.score(try embedder.scale() * cosine / divisor, parts)
  }

  private static func score(_ value: Double, _ parts: [String: Double]) -> RewardScore {
    guard value.isFinite else { return RewardScore(value: nil, failure: "the model's answer is not finite") }
    return RewardScore(value: value, parts: parts)
  }

  /// [B, 3, H, W] in 0…1 → bytes [B, H, W, 3], rounded to the nearest (halves to even, as NumPy and torch round).
  static func bytes(_ images: Tensor) throws -> Tensor {
    let levels = try (images.to(.float32).clamp(0, 1) * 255).round()
    return try levels.to(.uint8).to(.cpu).permute(0, 2, 3, 1).contiguous()
  }
}
