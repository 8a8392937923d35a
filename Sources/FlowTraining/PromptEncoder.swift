import FlowModels
import Torch

/// Prompts as conditions, each encoded once and alone, so that a row never depends on its neighbours.
public final class PromptEncoder {
  private let pipeline: FluxPipeline
  private var cache: [String: Condition] = [:]
  /// Prompts longer than an encoder's limit: text → tokens dropped.
  public private(set) var truncated: [String: Int] = [:]

  /// Encodes with the pipeline's encoders.
  public init(_ pipeline: FluxPipeline) { self.pipeline = pipeline }

  /// The condition of one prompt: one row.
  public func callAsFunction(_ prompt: String) throws -> Condition {
    if let known = cache[prompt] { return known }
    let tokens = pipeline.tokens(prompt)
    let dropped = max(tokens.clip.truncated, tokens.t5.truncated)
    if dropped > 0 { truncated[prompt] = dropped }
    let condition = try pipeline.encode(tokens)
    cache[prompt] = condition
    return condition
  }

  /// One line about prompts that were cut, or nil.
  public var warning: String? {
    guard let worst = truncated.max(by: { ($0.value, $0.key) < ($1.value, $1.key) }) else { return nil }
    return "\(truncated.count) prompts exceed the text encoders' limit and were truncated, "
      + "by up to \(worst.value) tokens: \"\(worst.key.prefix(60))…\""
  }
}
