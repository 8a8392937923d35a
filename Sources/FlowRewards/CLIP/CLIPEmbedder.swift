import FlowModels
import Foundation
import Synchronization
import Torch

/// A CLIP folder at work: images and texts to unit vectors.
///
/// Texts are embedded once and alone, so that neither neighbours nor order can change a score. Everything is computed in
/// float32, whatever the file holds.
///
/// `@unchecked`: what changes is used behind the lock of the model only.
final class CLIPEmbedder: @unchecked Sendable {
  /// A text's embedding, and how much of the text it does not know of.
  struct Text {
    /// [1, size], float32 on the host.
    let embedding: Tensor
    /// Tokens beyond the model's limit.
    let dropped: Int
  }

  /// Size of the common space.
  var size: Int { shared.size }
  /// Whose weights it computes with.
  var model: String { shared.key }
  /// Bytes of the weights.
  var weights: Int { shared.weights }

  private let shared: SharedCLIP
  private let tokenizer: CLIPTokenizer?
  private var known: [String: Text] = [:]
  private var order: [String] = []
  /// Texts that are remembered: of 1,024 numbers each, 16 MiB.
  private let limit: Int

  /// Takes the model of `folder`; one that is in use already is shared. Weights are read at first use.
  ///
  /// - Parameters:
  ///   - activation: in place of the configuration's.
  ///   - style: whose tokenizer; nil for models that see no texts.
  init(folder: URL, activation: String?, style: CLIPTokenizer.Style?, limit: Int = 4096) throws {
    self.limit = limit
    tokenizer = try style.map { style in try CLIPTokenizer(folder: folder, style: style) }
    shared = try SharedCLIP.model(of: folder, activation)
  }

  /// exp(logit_scale).
  func scale() throws -> Double { try shared.use { try $0.scale().doubles()[0] } }

  /// Most bytes that a pass over `count` images holds beside them.
  func passBytes(_ count: Int) -> Int { shared.passBytes(count) }

  /// Normalised pixels [B, 3, S, S] → unit vectors [B, size], float32 on the host.
  func images(_ pixels: Tensor) throws -> Tensor {
    try shared.use { try $0.embedImages(try pixels.to(shared.device)).to(.cpu) }
  }

  /// The embedding of `text`, computed if it is not remembered.
  func text(_ text: String) throws -> Text {
    guard let tokenizer else { preconditionFailure("CLIPEmbedder.text: made without a tokenizer") }
    return try shared.use { model in
      if let found = known[text] { return found }
      let tokens = tokenizer.encode(text, length: model.text.maxLength)
      let ids = Self.trimmed(tokens.ids, pad: tokenizer.pad, end: tokenizer.end)
      let found = Text(embedding: try embed(ids, model), dropped: tokens.truncated)
      if order.count == limit { known[order.removeFirst()] = nil }
      order.append(text)
      known[text] = found
      return found
    }
  }

  /// Token ids → [1, size].
  func embed(_ ids: [Int64]) throws -> Tensor { try shared.use { try embed(ids, $0) } }

  private func embed(_ ids: [Int64], _ model: CLIPModel) throws -> Tensor {
    try model.embedText(try Tensor(ids, shape: [1, ids.count]).to(shared.device)).to(.cpu)
  }

  /// How often the weights were read in this process.
  var loads: Int { SharedCLIP.loads(model) }

  /// Whether `other` computes with the same model in memory.
  func sharesModel(with other: CLIPEmbedder) -> Bool { shared === other.shared }

  /// `ids` without padding. Attention looks back only: what stands behind the end token changes nothing.
  static func trimmed(_ ids: [Int64], pad: Int64, end: Int64) -> [Int64] {
    var count = ids.count
    while count > 1, ids[count - 1] == pad, pad != end || ids[count - 2] == end { count -= 1 }
    return Array(ids[..<count])
  }
}

/// A model for as long as a reward uses it: `pickscore` under two scores, or `clip` beside `aesthetic`, are one in memory.
///
/// Its weights are read at first use: a run makes its rewards several times, to check its configuration and to estimate
/// its memory, before any image is there to score.
///
/// `@unchecked`: layers prepare their weights on first use, so that one thread at a time computes.
private final class SharedCLIP: @unchecked Sendable {
  let key: String
  let size: Int
  /// Bytes of the weights in float32.
  let weights: Int
  let device: Device
  private let folder: URL
  private let activation: String?
  private let vision: CLIPVisionEncoder
  private var loaded: CLIPModel?
  private let lock = NSLock()

  private init(_ folder: URL, _ activation: String?, key: String) throws {
    (self.folder, self.activation, self.key) = (folder, activation, key)
    device = TorchRuntime.cudaAvailable ? .cuda(0) : .cpu
    // A configuration that is no CLIP is found here.
    let blank = try CLIPModel(folder: folder, activation: activation, blank: true)
    size = blank.config.projectionDim
    weights = 4 * blank.modules.parameters.reduce(0) { $0 + $1.tensor.count }
    vision = blank.vision
  }

  func passBytes(_ count: Int) -> Int { vision.passBytes(count) }

  func use<R>(_ body: (CLIPModel) throws -> R) throws -> R {
    lock.lock()
    defer { lock.unlock() }
    return try withoutGrad { try body(try model()) }
  }

  private func model() throws -> CLIPModel {
    if let loaded { return loaded }
    let model = try CLIPModel(folder: folder, activation: activation)
    // On the host a file of float32 stays mapped; other dtypes are converted.
    try model.modules.place(.float32, device)
    Self.loads.withLock { $0[key, default: 0] += 1 }
    loaded = model
    return model
  }

  private struct Weak { weak var model: SharedCLIP? }
  private static let models = Mutex<[String: Weak]>([:])
  /// How often each model's weights were read.
  private static let loads = Mutex<[String: Int]>([:])
  static func loads(_ key: String) -> Int { loads.withLock { $0[key] ?? 0 } }

  static func model(of folder: URL, _ activation: String?) throws -> SharedCLIP {
    let key = "\(folder.standardizedFileURL.resolvingSymlinksInPath().path) \(activation ?? "")"
    return try models.withLock { models in
      if let model = models[key]?.model { return model }
      let model = try SharedCLIP(folder, activation, key: key)
      models[key] = Weak(model: model)
      return model
    }
  }
}
