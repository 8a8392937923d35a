import FlowModels
import Foundation
import Peers
import Testing
import Torch

@testable import FlowTraining

/// Oracle: diffusers 0.42.1, which loads what a run wrote.
@Suite("what a run writes, in diffusers")
struct TrainedPeerTests {
  // Float32 on both sides, sums in another order: the fixtures agree to 1e-6; training moves outputs by more
  // than 1e-3.
  private static let tolerance = 1e-5

  @Test(
    "a trained adapter, and a full fine-tuning as a model folder, give the trainer's own output",
    .enabled(if: Peers.areThere || Peers.isCI, "\(Peers.missing)"), arguments: PeerModel.all)
  func trained(_ model: PeerModel) throws {
    try #require(Peers.areThere, "\(Peers.missing)")
    let shop = try Workshop()
    shop.configuration.model = model.folder.path
    shop.configuration.sampling.textLength = 16
    shop.configuration.run.iterations = 2
    let base = try model.output(try model.transformer(model.folder))

    /// Trains, and gives the output of the network that the trainer holds.
    func train(_ name: String, _ kind: Configuration.Trainable.Kind, _ rate: Double) throws -> Tensor {
      var c = shop.configuration
      c.output = shop.folder(name).path
      (c.trainable.kind, c.optim.lr) = (kind, rate)
      let run = RunFolder(shop.folder(name))
      try run.create(c)
      let trainer = try Trainer(c, folder: run)
      try trainer.run(resume: false)
      return try model.output(trainer.engine.pipeline.network)
    }
    let adapted = try train("lora", .lora, 1e-2)
    let whole = try train("full", .full, 1e-3)
    let full = try #require(ModelMerge.trainedTransformer(shop.folder("full")))
    let report = try ModelMerge.replace(model.folder, by: full, to: shop.folder("model-full"))
    #expect(report.replaced == trainedCount(full))

    let out = try Peers.outputs(
      [
        "model": model.folder.path, "inputs": model.inputs.path,
        "read": [
          ["name": "lora", "form": "diffusers", "path": shop.folder("lora/adapter").path],
          ["name": "full", "form": "model", "path": shop.folder("model-full").path],
        ],
      ], in: shop.scratch.url)
    for (name, ours) in [("base", base), ("read.lora", adapted), ("read.full", whole)] {
      #expect(try PeerModel.relative(ours, try out.require(name)) < Self.tolerance, "\(name)")
      if name != "base" { #expect(try PeerModel.relative(ours, base) > 1e-3, "\(name) must show") }
    }
  }

  private func trainedCount(_ folder: URL) -> Int? {
    try? SafetensorsFile(folder.appending(path: "diffusion_pytorch_model.safetensors")).names.count
  }
}
