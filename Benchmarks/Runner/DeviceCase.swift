import ChunkGRPO
import FlowModels
import FlowTraining
import Foundation
import Torch
import TorchNN

/// A LoRA step of a model of a published configuration with random weights made on the device: rollout, decoding and
/// one update, with activation checkpointing.
///
/// `folder` holds `transformer/config.json` and `vae/config.json` of a FLUX model.
final class DeviceCase: Case {
  private let device: Device
  private let network: TimedNetwork
  private let autoencoder: AutoencoderKL
  private let adapter: LoRAAdapter
  private let optimizer: AdamW
  private let table: TransitionTable
  private let guidance: Double?
  private let grid: TokenGrid
  private let initial: Tensor
  private let conditions: [Condition]
  private let updates: [[[Int]]]
  private let rows: Int
  private let random = RandomPlan(seed: 1)

  init(_ p: Parameters) throws {
    let device: Device = p.device == "cuda" ? .cuda(0) : .cpu
    self.device = device
    let folder = URL(filePath: try need(p.folder, "folder"))
    let sides = try need(p.grid, "grid")
    (grid, rows) = ((sides[0], sides[1]), try need(p.rows, "rows"))
    let dtype = try dtype(p.dtype)
    // One table of normals, read at many offsets: billions of draws on the host would take minutes.
    var stream = random.stream(.parameterInit)
    let normals = try Tensor(stream.normals(count: 1 << 22)).to(dtype).to(device)
    func fill(_ parameters: [Parameter], _ dtype: DType) throws {
      for (i, parameter) in parameters.enumerated() {
        // By way of another dtype: the zeros of a blank checkpoint are one element seen many times.
        try parameter.place(dtype == .float32 ? .bfloat16 : .float32, .cpu)
        try parameter.place(dtype, device)
        let flat = try parameter.tensor.reshape(-1)
        let scale =
          parameter.tensor.rank > 1
          ? 1 / Double(parameter.tensor.shape[1...].reduce(1, *)).squareRoot() : 0.02
        for start in stride(from: 0, to: flat.count, by: 3 << 20) {
          let count = min(flat.count - start, 3 << 20)
          let part = try normals.narrow(0, (i * 7919 + start / 4096) % (1 << 20), count)
          try flat.narrow(0, start, count).copy(from: try part.to(dtype) * scale)
        }
      }
    }
    func part(_ name: String) -> URL { folder.appending(path: name) }
    let config = try JSONDecoder.snake.decode(
      FluxTransformerConfig.self, from: Data(contentsOf: part("transformer/config.json")))
    let transformer = try FluxTransformer(config: config, checkpoint: Checkpoint(blank: part("transformer")))
    try fill(transformer.modules.parameters, dtype)
    try transformer.place(dtype, device)
    transformer.checkpointing = p.checkpointing
    guidance = config.guidanceEmbeds ? 3.5 : nil
    network = TimedNetwork(FluxFlowModel(transformer, grid: grid))
    let decoder = try JSONDecoder.snake.decode(
      AutoencoderKL.Config.self, from: Data(contentsOf: part("vae/config.json")))
    autoencoder = try AutoencoderKL(config: decoder, checkpoint: Checkpoint(blank: part("vae")))
    try fill(autoencoder.modules.parameters, .float32)
    adapter = try LoRAAdapter(
      transformer.modules, rank: p.rank ?? 16, alpha: 2 * Double(p.rank ?? 16), targets: ["attention+mlp"],
      device: device
    ) { [random] path, count in
      var stream = random.stream(.parameterInit, prompt: path)
      return (0..<count).map { _ in Float(2 * stream.uniform() - 1) }
    }
    optimizer = try AdamW(adapter.parameters, AdamW.Options(learningRate: 1e-5, weightDecay: 1e-4))
    let (group, steps) = (try need(p.group, "group"), try need(p.steps, "steps"))
    table = try TransitionTable(
      schedule: try NoiseSchedule.training(steps: steps, shift: 3), kind: .flowSDE, eta: 0.7,
      stochastic: 0..<(steps - 1))
    updates = try need(p.updates, "updates")
    var noise = random.stream(.initialNoise)
    let shape = [grid.rows * grid.columns, config.inChannels]
    initial = try Tensor(noise.normals(count: shape.reduce(group, *)), shape: [group] + shape).to(device)
    let embedding = try normals.narrow(0, 0, try need(p.textTokens, "textTokens") * 128)
    let text = try embedding.reshape(1, -1, 128).repeatInterleave(config.jointAttentionDim / 128, 2)
    let pooled = try normals.narrow(0, 0, config.pooledProjectionDim).reshape(1, -1)
    conditions = [Condition](repeating: Condition([text, pooled]), count: group)
  }

  /// Seconds of `body`, which ends in a value on the host: a device works on when a call has returned.
  private func seconds(_ name: String, _ parts: inout [String: Double], _ body: () throws -> Tensor) throws {
    let spent = try timed {
      guard try body().sum().item().isFinite else {
        throw BenchError("bench-runner: \(name) gave no finite result")
      }
      return [:]
    }
    parts[name] = spent["seconds"]
  }

  func run() throws -> [String: Double] {
    var parts: [String: Double] = [:]
    var trajectories: Trajectories?
    try seconds("rollout", &parts) {
      trajectories = try Rollout(table: table, guidance: guidance, batch: rows, fillsRows: true)
        .sample(network, initial: initial, conditions: conditions) { [random] sample, step, out in
          var stream = random.stream(.stepNoise, sample: sample, step: step)
          stream.fillNormal(out)
        }
      return trajectories!.clean
    }
    try seconds("decode", &parts) {
      try withoutGrad {
        try autoencoder.images(try FluxPipeline.unpack(trajectories!.clean, grid: grid)).mean()
      }
    }
    let rule = PolicyUpdate(
      network: network, table: table, guidance: guidance, microBatch: rows, ratio: .chunk,
      clip: ClipRange(low: 5e-5, high: 5e-5))
    try seconds("update", &parts) {
      for (u, update) in updates.enumerated() {
        let samples = Dictionary(grouping: update, by: { $0[0] }).sorted { $0.key < $1.key }.map {
          sample, chunks in
          UpdateSample(
            row: sample, advantage: sample % 2 == 0 ? 1 : -1, chunks: chunks.map { ($0[1]..<$0[2], 1) })
        }
        _ = try rule.accumulate(samples, trajectories!, conditions: conditions, first: u == 0)
        _ = try optimizer.clipGradients(maxNorm: 0.01)
        try optimizer.step()
      }
      return adapter.layers.first!.value.up
    }
    if device != .cpu { parts["peak"] = Double(try TorchRuntime.peakMemory(device)) }
    return parts
  }

  func check() throws -> [String: Tensor] { [:] }
}

extension JSONDecoder {
  /// For the keys of diffusers' configurations.
  static var snake: JSONDecoder {
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    return decoder
  }
}
