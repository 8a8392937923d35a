import ChunkGRPO
import Foundation
import Torch
import TorchNN

/// A transformer that predicts velocities, as pipelines place and configure it.
public protocol FlowTransformer: AnyObject {
  /// Layers and parameters by checkpoint key.
  var modules: ModuleRegistry { get }
  /// What the network computes in.
  var dtype: DType { get }
  /// Where the parameters are.
  var device: Device { get }
  /// Kernel of every attention.
  var attentionKernel: AttentionKernel { get set }
  /// Blocks of a segment of which only the inputs are kept for the backward pass; nil keeps everything.
  var checkpointing: Int? { get set }
  /// Moves the network to `dtype` and `device`.
  func place(_ dtype: DType, _ device: Device) throws(TorchError)
}

extension FlowTransformer {
  /// Blocks 0 ..< `count` as consecutive segments, the last of which may be shorter.
  func segments(_ count: Int) -> [Range<Int>] {
    let size = max(checkpointing ?? 1, 1)
    return stride(from: 0, to: count, by: size).map { $0..<min($0 + size, count) }
  }
  /// Runs `body`, keeping only its inputs for the backward pass if that is asked for.
  func kept(_ inputs: [Tensor], _ body: @escaping ([Tensor]) throws -> [Tensor]) throws -> [Tensor] {
    checkpointing == nil ? try body(inputs) : try checkpointed(inputs, body)
  }
}

/// Whether the linear layer at `path` may be kept in one byte a weight: attention and MLP of the blocks, 8.6
/// of the 11.9 billion weights of FLUX.1, whose modulations are most of the rest.
///
/// Modulations (3.2 billion), embedders, `norm_out` and `proj_out` keep the model's dtype: an error in them
/// moves every token of a block, or the velocity itself, alike.
public func isQuantisable(_ path: String) -> Bool {
  let parts = path.split(separator: ".")
  guard let kind = parts.first, ["transformer_blocks", "single_transformer_blocks"].contains(kind) else {
    return false
  }
  return !parts.contains { $0 == "norm" || $0.hasPrefix("norm1") }
}

/// The text encoders of a model folder: loaded when a prompt is to be encoded, released when none is left.
public protocol TextEncoding: AnyObject {
  /// Token ids of one prompt, one entry an encoder.
  func tokens(_ prompt: String) throws -> [TokenizedText]
  /// The condition of one prompt: one row, encoded alone, so that it does not depend on neighbours in a batch.
  func encode(_ tokens: [TokenizedText]) throws -> Condition
  /// Forgets the weights; the next ``encode(_:)`` loads them again.
  func release()
  /// Folders that hold the encoders' weights.
  var folders: [URL] { get }
  /// Folders of the tokenizers.
  var tokenizerFolders: [URL] { get }
  /// Tokens of each encoder's input, which the embedding depends on.
  var lengths: [Int] { get }
}

extension TextEncoding {
  /// The condition of one prompt: one row.
  public func encode(_ prompt: String) throws -> Condition { try encode(try tokens(prompt)) }
  /// Throws, as loading would, where an encoder has no weights, a pickle, or files that are missing or cut off.
  public func requireWeights() throws {
    for folder in folders { _ = try Checkpoint(folder: folder, names: ["model"]) }
  }
  /// Bytes of the encoders' weight files; nil unless every encoder has some.
  public var bytes: Int? {
    let sizes = folders.map(weightBytes)
    return sizes.contains(0) ? nil : sizes.reduce(0, +)
  }
}

extension TextEncoding {
  /// Bytes the encoders take once loaded; nil unless every encoder has weight files.
  public var memory: Int? {
    guard bytes != nil else { return nil }
    var total = 0
    for folder in folders {
      let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
      for name in names where name.hasSuffix(".safetensors") {
        guard let file = try? SafetensorsFile(folder.appending(path: name)) else { continue }
        let elements = file.names.reduce(0) { $0 + file.shape($1)!.reduce(1, *) }
        total += elements * encoderDType(folder).size
      }
    }
    return total
  }
}

/// How a model takes a guidance scale.
public enum GuidanceKind: Sendable, Equatable {
  /// As an input of the network: FLUX.1-dev.
  case embedded
  /// By a second pass with the negative prompt, v⁻ + g·(v⁺ − v⁻): SD3.
  case classifierFree
  /// Not at all: FLUX.1-schnell.
  case none
}

/// How a pipeline is loaded.
public struct PipelineOptions: Sendable {
  /// What the transformer computes in.
  public var dtype = DType.float32
  /// Where everything is.
  public var device = Device.cpu
  /// T5 tokens; nil for the model's own number.
  public var textLength: Int?
  /// Kernel of every attention of the transformer.
  public var attention = AttentionKernel.auto
  /// How the frozen weights of the transformer's blocks are kept; nil for `dtype`.
  public var weights: QuantisedWeight?
  /// Blocks of a segment of which only the inputs are kept for the backward pass; nil keeps everything.
  public var checkpointing: Int?
  /// How the autoencoder goes through a batch.
  public var passes = AutoencoderKL.Passes.auto
  /// What the autoencoder computes in.
  public var decodeDType = DType.float32
  /// Whether a FLUX transformer multiplies t and guidance by 1000 in its own dtype, as diffusers does.
  public var roundsTimeToDType = false
  /// The defaults: float32 on the CPU.
  public init() {}
}

/// A model folder that turns text into images by integrating a velocity.
public protocol ImagePipeline: AnyObject {
  /// The folder it came from.
  var folder: ModelFolder { get }
  /// The network that is sampled and trained.
  var network: any FlowTransformer { get }
  /// The text encoders.
  var text: any TextEncoding { get }
  /// Between latents and images.
  var autoencoder: AutoencoderKL { get }
  /// How a guidance scale enters.
  var guidance: GuidanceKind { get }
  /// Shape of one image's latents as the network takes them.
  func latentShape(_ grid: TokenGrid) -> [Int]
  /// Latents [B, …] → images [B, 3, H, W] in 0 … 1, float32.
  func decode(_ latents: Tensor, grid: TokenGrid) throws -> Tensor
  /// The schedule that the folder's scheduler gives the reference pipeline.
  func schedule(steps: Int, grid: TokenGrid) throws -> NoiseSchedule
  /// The transformer as a ``FlowModel`` on one token grid.
  func flowModel(grid: TokenGrid) -> any FlowModel
}

/// Rows and columns of image tokens.
public typealias TokenGrid = (rows: Int, columns: Int)

/// The token grid of an image whose sides must be multiples of `granularity` pixels.
public func tokenGrid(height: Int, width: Int, granularity: Int) throws -> TokenGrid {
  guard height > 0, width > 0, height % granularity == 0, width % granularity == 0 else {
    let near = [height, width].map { max(1, ($0 + granularity / 2) / granularity) * granularity }
    throw ModelError(
      "\(height) × \(width) pixels: this model takes multiples of \(granularity), such as \(near[0]) × \(near[1])"
    )
  }
  return (height / granularity, width / granularity)
}

extension ImagePipeline {
  /// Pixels a token covers along each side: sizes must be multiples of it.
  public var granularity: Int { 2 * autoencoder.downscale }

  /// Rows and columns of the token grid of an image.
  public func grid(height: Int, width: Int) throws -> TokenGrid {
    try tokenGrid(height: height, width: width, granularity: granularity)
  }

  /// Throws unless two parts of the folder fit together.
  func agree(_ a: Int, _ b: Int, _ text: String) throws {
    guard a == b else { throw ModelError("\(folder.url.path): \(text): \(a) against \(b)") }
  }
}

/// Model folders by the `_class_name` of their model_index.json.
public enum ImagePipelines {
  /// The classes that can be loaded.
  public static let supported = ["FluxPipeline", "StableDiffusion3Pipeline"]

  /// Loads the folder `url`.
  public static func load(_ url: URL, _ options: PipelineOptions = .init()) throws -> any ImagePipeline {
    let folder = try ModelFolder(url)
    switch folder.pipeline {
    case "FluxPipeline": return try FluxPipeline(folder, options)
    case "StableDiffusion3Pipeline": return try SD3Pipeline(folder, options)
    default: throw unsupported(folder)
    }
  }

  /// The text encoders of `folder` alone.
  public static func text(_ folder: ModelFolder, _ options: PipelineOptions) throws -> any TextEncoding {
    switch folder.pipeline {
    case "FluxPipeline":
      return try FluxTextEncoders(folder, device: options.device, textLength: options.textLength)
    case "StableDiffusion3Pipeline":
      let width = try folder.config(SD3TransformerConfig.self, "transformer").textWidth
      return try SD3TextEncoders(
        folder, device: options.device, textLength: options.textLength, width: width)
    default: throw unsupported(folder)
    }
  }

  static func unsupported(_ folder: ModelFolder) -> ModelError {
    ModelError(
      "\(folder.url.path)/model_index.json: \(folder.pipeline) is not supported; expected "
        + supported.joined(separator: " or "))
  }
}

extension ModelFolder {
  /// The autoencoder.
  func autoencoder(_ options: PipelineOptions) throws -> AutoencoderKL {
    let autoencoder = try AutoencoderKL(
      folder: part("vae"), dtype: options.decodeDType, device: options.device)
    autoencoder.passes = options.passes
    return autoencoder
  }

  /// The inference scheduler.
  func scheduler() throws -> FlowMatchScheduler {
    let scheduler = try config(FlowMatchScheduler.self, "scheduler", "scheduler_config.json")
    guard scheduler.unsupportedOptions.isEmpty else {
      throw ModelError(
        "\(url.path)/scheduler/scheduler_config.json: "
          + "\(scheduler.unsupportedOptions.joined(separator: ", ")) not supported")
    }
    return scheduler
  }

  /// Tokens that T5 is given: what `given` says, else `standard`, never more than the tokenizer's own limit.
  func textLength(_ given: Int?, standard: Int, tokenizer: String) throws -> Int {
    if let given {
      guard given > 0 else { throw ModelError("sampling.textLength: expected at least 1, got \(given)") }
      return given
    }
    struct TokenizerConfig: Decodable { let modelMaxLength: Double? }
    let stated = try? config(TokenizerConfig.self, tokenizer, "tokenizer_config.json").modelMaxLength
    return min(stated.flatMap { Int(exactly: $0) } ?? standard, standard)
  }
}

/// Bytes of a folder's safetensors files, links of a hub cache followed.
private func weightBytes(_ folder: URL) -> Int {
  let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
  return names.filter { $0.hasSuffix(".safetensors") }.reduce(0) { total, name in
    let file = folder.appending(path: name).resolvingSymlinksInPath()
    return total + ((try? FileManager.default.attributesOfItem(atPath: file.path)[.size] as? Int) ?? 0)
  }
}

/// An encoder's dtype: float32 where that is small, bfloat16 for weight files of more than 2 GiB.
func encoderDType(_ folder: URL) -> DType { weightBytes(folder) > 2 << 30 ? .bfloat16 : .float32 }
