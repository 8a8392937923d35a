import FlowModels
import Foundation
import Torch

/// Prompts as conditions, each encoded once and alone, so that a row never depends on its neighbours.
///
/// Memory holds what fits; behind it stands a store on disk, or the encoders.
public final class PromptEncoder {
  private let text: any TextEncoding
  private let store: EmbeddingStore?
  private let device: Device
  private var memory: [String: Condition] = [:]
  private var room: Int
  /// Prompts longer than an encoder's limit: text → tokens dropped.
  public private(set) var truncated: [String: Int] = [:]

  /// Encodes with `text`.
  ///
  /// - Parameters:
  ///   - store: embeddings on disk; nil keeps all in memory.
  ///   - room: bytes of embeddings kept in memory if there is a store.
  public init(_ text: any TextEncoding, store: EmbeddingStore? = nil, device: Device, room: Int = 1 << 30) {
    (self.text, self.store, self.device) = (text, store, device)
    self.room = store == nil ? .max : room
  }

  /// The encoder that `prompts.embeddings` asks for; without stored embeddings the encoders' weights must be there.
  convenience init(_ setting: String, _ text: any TextEncoding, device: Device) throws {
    let store: EmbeddingStore? =
      switch setting {
      case "memory": nil
      case "auto": text.bytes ?? 0 > 1 << 28 ? try .cached(for: text) : nil
      default: try EmbeddingStore(URL(filePath: setting), for: text)
      }
    // Read later, but missed now: before a run has made its folder.
    if store == nil { try text.requireWeights() }
    self.init(text, store: store, device: device)
  }

  /// The condition of one prompt: one row.
  public func callAsFunction(_ prompt: String) throws -> Condition {
    if let known = memory[prompt] { return known }
    if let stored = try store?.load(prompt) {
      if stored.truncated > 0 { truncated[prompt] = stored.truncated }
      return keep(Condition(try stored.condition.tensors.map { try $0.to(device) }), prompt)
    }
    let tokens = try text.tokens(prompt)
    let dropped = tokens.map(\.truncated).max() ?? 0
    if dropped > 0 { truncated[prompt] = dropped }
    let condition = try text.encode(tokens)
    try store?.save(condition, truncated: dropped, for: prompt)
    return keep(condition, prompt)
  }

  private func keep(_ condition: Condition, _ prompt: String) -> Condition {
    let bytes = condition.tensors.reduce(0) { $0 + $1.count * $1.dtype.size }
    if bytes <= room {
      room -= room == .max ? 0 : bytes
      memory[prompt] = condition
    }
    return condition
  }

  /// Encodes all of `prompts` that are not known yet, then lets the encoders go.
  public func prepare(_ prompts: [String], progress: (_ done: Int) -> Void = { _ in }) throws {
    for (i, prompt) in prompts.enumerated() {
      if memory[prompt] == nil, room > 0 || store?.contains(prompt) != true { _ = try self(prompt) }
      progress(i + 1)
    }
    text.release()
  }

  /// One line about prompts that were cut, with the text that the worst of them loses, or nil.
  public var warning: String? {
    guard let worst = truncated.max(by: { ($0.value, $0.key) < ($1.value, $1.key) }) else { return nil }
    let words = worst.key.split(separator: " ", omittingEmptySubsequences: false)
    let kept = words.indices.last { i in
      let tokens = try? text.tokens(words[..<i].joined(separator: " "))
      return tokens?.allSatisfy { $0.truncated == 0 } ?? false
    }
    let lost = words[(kept ?? 0)...].joined(separator: " ")
    return
      "\(truncated.count) prompts exceed the text encoders' limit and were truncated, by up to \(worst.value) "
      + "tokens: \"\(worst.key.prefix(60))…\" loses \"\(lost.suffix(80))\""
  }
}

/// Embeds prompts into a folder, without loading a transformer.
public final class PromptEmbedding {
  /// Whether the model is guided by a second pass with a negative prompt.
  public let takesNegative: Bool
  private let store: EmbeddingStore
  private let encoder: PromptEncoder

  /// Opens the text encoders of `model` and the store `output`.
  public init(model: URL, output: URL, textLength: Int?) throws {
    var options = PipelineOptions()
    options.device = TorchRuntime.cudaAvailable ? .cuda(0) : .cpu
    options.textLength = textLength
    let folder = try ModelFolder(model)
    let text = try ImagePipelines.text(folder, options)
    takesNegative = folder.pipeline == "StableDiffusion3Pipeline"
    store = try EmbeddingStore(output, for: text)
    encoder = PromptEncoder(text, store: store, device: options.device, room: 0)
  }

  /// Embeds what the store lacks of `prompts`; returns their number.
  public func run(_ prompts: [String], progress: (_ done: Int) -> Void) throws -> Int {
    let new = prompts.filter { !store.contains($0) }
    for (i, prompt) in new.enumerated() {
      _ = try encoder(prompt)
      progress(prompts.count - new.count + i + 1)
    }
    return new.count
  }

  /// One line about prompts that were cut, or nil.
  public var warning: String? { encoder.warning }
}
