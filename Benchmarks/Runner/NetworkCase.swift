import ChunkGRPO
import FlowModels
import FlowRewards
import Foundation
import Torch
import TorchNN

/// Tensors the reference made: the same inputs, and where there is one the same adapter, on both sides.
struct Inputs {
  private let file: SafetensorsFile
  init(_ path: String?) throws { file = try SafetensorsFile(URL(filePath: try need(path, "inputs"))) }
  /// A copy in memory: tensors of a file are mapped.
  func callAsFunction(_ name: String) throws -> Tensor { try file.require(name).clone() }
}

func dtype(_ name: String?) throws -> DType {
  switch name {
  case "float32": .float32
  case "bfloat16": .bfloat16
  default: throw BenchError("bench-runner: dtype \(name ?? "none"), expected float32 or bfloat16")
  }
}

/// One pass of a transformer: forward, or forward and backward with gradients of an adapter or of all weights.
final class NetworkCase: Case {
  private let model: any FlowModel
  private let inputs: Inputs
  private let latents, times, upstream: Tensor
  private let guidance: Double?
  private let trained: [String: Tensor]
  private var condition: Condition

  init(_ p: Parameters) throws {
    let folder = URL(filePath: try need(p.folder, "folder"))
    inputs = try Inputs(p.inputs)
    if p.family == "sd3" {
      model = SD3FlowModel(try SD3Transformer(folder: folder, dtype: try dtype(p.dtype)))
      guidance = nil
    } else {
      let grid = try need(p.grid, "grid")
      let transformer = try FluxTransformer(folder: folder, dtype: try dtype(p.dtype))
      guidance = transformer.config.guidanceEmbeds ? 3.5 : nil
      model = FluxFlowModel(transformer, grid: (grid[0], grid[1]))
    }
    (latents, times) = (try inputs("latents"), try inputs("times"))
    upstream = try inputs("gradient")
    condition = Condition([try inputs("text"), try inputs("pooled")])
    let modules = model.modules
    switch p.train {
    case "lora":
      let adapter = try LoRAAdapter(
        modules, rank: p.rank ?? 16, alpha: 2 * Double(p.rank ?? 16), targets: ["all-linear"]
      ) { [Float](repeating: 0, count: $1) }
      trained = adapter.parameters
      try withoutGrad { for (name, tensor) in trained { try tensor.copy(from: try inputs(name)) } }
    case "full":
      try modules.makeTrainable()
      trained = Dictionary(
        uniqueKeysWithValues: modules.parameters.filter(\.tensor.requiresGrad).map { ($0.key, $0.tensor) })
    case nil: trained = [:]
    default: throw BenchError("bench-runner: train \(p.train!), expected lora or full")
    }
  }

  /// New conditions and touched weights: nothing that was computed for the last run may serve this one, since
  /// an optimizer step lies between two passes.
  func prepare() throws {
    condition = Condition(try condition.tensors.map { try $0.clone() })
    try withoutGrad { for tensor in trained.values { try tensor.multiplyInPlace(1) } }
    for tensor in trained.values { try tensor.clearGrad() }
  }

  private func velocity() throws -> Tensor {
    try model.velocity(latents, times: times, condition: condition, guidance: guidance)
  }

  func run() throws -> [String: Double] {
    if trained.isEmpty { _ = try withoutGrad { try velocity() } } else { try velocity().backward(upstream) }
    return [:]
  }

  func check() throws -> [String: Tensor] {
    try prepare()
    guard !trained.isEmpty else { return ["output": try withoutGrad { try velocity() }] }
    let output = try velocity()
    try output.backward(upstream)
    let gradients = try trained.map { ("gradient." + $0, try need(try $1.grad(), "gradient of \($0)")) }
    return Dictionary(uniqueKeysWithValues: gradients + [("output", output)])
  }
}

/// Latents to images.
final class DecodeCase: Case {
  private let autoencoder: AutoencoderKL
  private let latents: Tensor

  init(_ p: Parameters) throws {
    autoencoder = try AutoencoderKL(
      folder: URL(filePath: try need(p.folder, "folder")), dtype: try p.dtype.map(dtype) ?? .float32)
    latents = try Inputs(p.inputs)("latents")
  }
  func run() throws -> [String: Double] {
    _ = try withoutGrad { try autoencoder.images(latents) }
    return [:]
  }
  func check() throws -> [String: Tensor] { ["output": try withoutGrad { try autoencoder.images(latents) }] }
}

/// Images to scores.
final class RewardCase: Case {
  private let reward: any Reward
  private let images: Tensor
  private let prompts: [RewardPrompt]
  private var asked: [RewardPrompt]
  private var runs = 0

  init(_ p: Parameters) throws {
    var settings = RewardSettings(name: try need(p.name, "name"))
    (settings.model, settings.batch) = (p.folder, p.folder == nil ? nil : p.batch)
    reward = try RewardFactory.make(settings)
    images = try Inputs(p.inputs)("images")
    let lines = try String(contentsOfFile: try need(p.prompts, "prompts"), encoding: .utf8).split(
      separator: "\n")
    prompts = try lines.prefix(images.size(0)).map { try RewardPrompt(jsonLine: Data($0.utf8)) }
    asked = prompts
  }

  /// New texts: rewards that remember their embeddings embed these.
  func prepare() {
    runs += 1
    asked = prompts.map { prompt in
      var prompt = prompt
      prompt.text += " \(runs)"
      return prompt
    }
  }

  private func scores(_ prompts: [RewardPrompt]) throws -> [Double] {
    try reward.scoresNow(images, prompts: prompts).map { $0.value ?? .nan }
  }
  func run() throws -> [String: Double] {
    _ = try scores(asked)
    return [:]
  }
  func check() throws -> [String: Tensor] { ["output": try Tensor(try scores(prompts))] }
}
