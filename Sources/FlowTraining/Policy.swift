import ChunkGRPO
import FlowModels
import Foundation
import Torch
import TorchNN

/// The trained weights: an adapter, or the whole network.
public final class Policy {
  /// The adapter, unless all weights are trained.
  public let adapter: LoRAAdapter?
  /// Trainable tensors by name.
  public let parameters: [String: Tensor]
  private let modules: ModuleRegistry
  /// The trained weights as they were, where there is no adapter to leave out.
  private let initial: [String: Tensor]?

  /// Attaches what `trainable` asks for to `network`; initial values come from `seeds`.
  ///
  /// - Parameter keepsReference: whether ``reference(_:)`` will be asked for: without an adapter that takes a copy of all
  ///   weights.
  public init(
    _ trainable: Configuration.Trainable, _ modules: ModuleRegistry, device: Device, seeds: RandomPlan,
    keepsReference: Bool = false
  ) throws {
    self.modules = modules
    switch trainable.kind {
    case .lora:
      let adapter = try LoRAAdapter(
        modules, rank: trainable.rank, alpha: trainable.alpha, targets: trainable.targets, device: device
      ) { path, count in
        var stream = seeds.stream(.parameterInit, prompt: path)
        return (0..<count).map { _ in Float(2 * stream.uniform() - 1) }
      }
      self.adapter = adapter
      parameters = adapter.parameters
      initial = nil
    case .full:
      adapter = nil
      try modules.makeTrainable()
      let trained = modules.parameters.filter(\.tensor.requiresGrad)
      parameters = Dictionary(uniqueKeysWithValues: trained.map { ($0.key, $0.tensor) })
      initial = keepsReference ? try parameters.mapValues { try $0.detach().clone() } : nil
    }
  }

  /// Number of trainable values.
  public var count: Int { parameters.values.reduce(0) { $0 + $1.count } }

  /// Runs `body` with the network as it was before training: without its adapter, or with the copy of its weights.
  public func reference<R>(_ body: () throws -> R) throws -> R {
    if let adapter { return try adapter.without(body) }
    guard let initial else { preconditionFailure("a reference without adapter must have been asked for") }
    return try parameters.exchanged(with: initial, body)
  }

  /// Writes what other programs load: `pytorch_lora_weights.safetensors`, or the transformer's own layout.
  public func export(to folder: URL, config: URL) throws {
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    if let adapter {
      try adapter.write(to: folder.appending(path: "pytorch_lora_weights.safetensors"))
    } else {
      var weights: [String: Tensor] = [:]
      for parameter in modules.parameters { weights[parameter.key] = try parameter.tensor.detach() }
      try AtomicFile.write(try Data(contentsOf: config), to: folder.appending(path: "config.json"))
      try Safetensors.write(
        weights, metadata: ["format": "pt"], to: folder.appending(path: "diffusion_pytorch_model.safetensors")
      )
    }
  }
}
