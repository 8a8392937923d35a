import FlowModels
import Foundation
import Testing
import Torch

@testable import FlowRewards
@testable import FlowTraining

/// Oracle: what libtorch's allocator hands out during a real run of one iteration. 15 %: what the estimate promises.
@Suite("memory estimate")
struct MemoryEstimateTests {
  let shop: Workshop
  init() throws { shop = try Workshop() }

  struct Case: Sendable, CustomTestStringConvertible {
    let testDescription: String
    let change: @Sendable (inout Configuration) -> Void
    init(_ name: String, _ change: @escaping @Sendable (inout Configuration) -> Void) {
      (testDescription, self.change) = (name, change)
    }
  }

  static let cases: [Case] = [
    Case("flux-tiny, adapter") { _ in },
    Case("flux-tiny, more rows") { c in (c.group.size, c.optim.microBatch) = (12, 24) },
    Case("flux-tiny, all weights") { $0.trainable.kind = .full },
    Case("flux-tiny, all weights against their copy, normalised ratios") { c in
      (c.trainable.kind, c.loss.kl, c.loss.ratioNorm) = (.full, 0.1, .guard)
    },
    Case("flux-tiny, checkpointed") { c in
      (c.group.size, c.optim.microBatch, c.network.checkpointing) = (12, 24, .block)
    },
    Case("flux-tiny, long sequences, fused attention") { c in
      (c.sampling.height, c.sampling.width, c.optim.microBatch) = (256, 384, 4)
    },
    Case("sd3-tiny, guided") { c in
      c.model = parity.appending(path: "sd3-tiny").path
      (c.sampling.textLength, c.sampling.guidance, c.optim.microBatch) = (32, 4.5, 8)
    },
    Case("flux-mini as in the demo, bfloat16") { c in
      c.model = mini.path
      (c.sampling.height, c.sampling.width, c.sampling.guidance) = (64, 64, nil)
      c.trainable.targets = ["all-linear"]
      (c.group.size, c.optim.microBatch, c.network.dtype) = (12, 24, .bfloat16)
    },
    Case("flux-mini in int8, checkpointed by twos, 8-bit moments, average") { c in
      c.model = mini.path
      (c.sampling.height, c.sampling.width, c.sampling.guidance) = (128, 128, nil)
      (c.network.weights, c.network.checkpointing, c.optim.state, c.ema.decay) = (
        .int8, .every(2), .int8, 0.5
      )
      (c.group.size, c.optim.microBatch, c.network.dtype) = (6, 6, .bfloat16)
    },
  ]

  @Test("is within 15 % of the peak of a run", arguments: cases)
  func estimate(_ item: Case) throws {
    let available = 1 << 40
    var c = shop.configuration
    item.change(&c)
    (c.run.iterations, c.run.checkpointEvery) = (1, 1)
    c.output = shop.folder("run").path
    let estimate = try MemoryModel.fit(c, available: available).estimate
    let folder = RunFolder(shop.folder("run"))
    try folder.create(c)
    let measured = try TorchRuntime.peakAllocation { try Trainer(c, folder: folder).run(resume: false) }.bytes
    let error = Double(estimate.peak) / Double(measured) - 1
    if ProcessInfo.processInfo.environment["CHUNKGRPO_BENCHMARK"] != nil {
      print("memory: \(item.testDescription) | \(estimate.peak) | \(measured) | \(error)")
    }
    #expect(abs(error) < 0.15, "estimated \(estimate.peak), measured \(measured): \(estimate)")
  }

  @Test("rewards' models count once, and are read once, when the run begins")
  func models() throws {
    let folder = shop.folder("clip")
    try FileManager.default.copyItem(at: parity.appending(path: "clip-tiny-quickgelu"), to: folder)
    let head = parity.deletingLastPathComponent().appending(path: "clip-rewards/head.safetensors")
    var c = shop.configuration
    c.rewards = [.init(name: "clip"), .init(name: "aesthetic"), .init(name: "vivid")]
    for i in 0..<2 { c.rewards[i].model = folder.path }
    c.rewards[1].head = head.path
    (c.run.iterations, c.run.checkpointEvery) = (1, 1)
    let file = try SafetensorsFile(folder.appending(path: "model.safetensors"))
    let bytes = 4 * file.names.reduce(0) { $0 + file.shape($1)!.reduce(1, *) }
    try c.validateSources()
    let estimate = try MemoryModel.fit(c, available: 1 << 40).estimate
    #expect(estimate.standing.filter { $0.name == "rewards" }.map(\.bytes) == [bytes])
    let embedder = try CLIPEmbedder(folder: folder, activation: nil, style: nil)
    #expect(embedder.loads == 0)
    try shop.train("run") { (given: inout Configuration) in (given.rewards, given.run) = (c.rewards, c.run) }
    #expect(embedder.loads == 1)
  }

  @Test("the largest micro-batch within a stated memory: one row more would not fit")
  func fitting() throws {
    var c = shop.configuration
    (c.group.size, c.optim.microBatch) = (12, 4)
    let model = try MemoryModel(c)
    let wanted = model.estimate(microBatch: 9).peak
    c.network.memory = String(format: "%.6fMiB", Double(wanted + 1000) / 1_048_576)
    let fitted = try MemoryModel.fit(c, available: 1 << 40)
    #expect(fitted.configuration.optim.microBatch >= 9 && fitted.estimate.peak <= wanted + 1000)
    #expect(model.estimate(microBatch: fitted.configuration.optim.microBatch + 1).peak > wanted + 1000)
    c.network.memory = "100KiB"
    let text = message { _ = try MemoryModel.fit(c, available: 1 << 40) }
    #expect(
      text.contains("network.memory: 100KiB is too little") && text.contains("network.checkpointing=block"))
  }

  @Test("what the device does not have is refused before anything is loaded, with the ways out")
  func refused() throws {
    let text = message { _ = try MemoryModel.fit(shop.configuration, available: 1 << 20) }
    #expect(text.contains("0.00 GiB are free on cpu") && text.contains("lower optim.microBatch"))
  }

  @Test(
    "sizes are read with their units",
    arguments: [("1GiB", 1 << 30), ("24GB", 24_000_000_000), ("512 MiB", 1 << 29)])
  func sizes(_ text: String, _ bytes: Int) {
    var network = Configuration.Network()
    network.memory = text
    #expect(network.memoryBytes == bytes)
    for wrong in ["80", "GiB", "-1GiB", "many GB"] {
      network.memory = wrong
      #expect(network.memoryBytes == nil)
    }
  }
}
