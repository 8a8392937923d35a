import Foundation
import Testing

/// `pretrain` as a user runs it. Oracle: the same run left alone; equal means every byte of the model and every metric that no
/// clock measured.
@Suite("pretrain")
struct PretrainCommandTests {
  let scratch: Scratch

  init() throws {
    scratch = try Scratch()
    try scratch.write(
      """
      init: \(Tool.fluxMini.path)
      prompts: {file: \(Tool.root.appending(path: "Data/prompts.jsonl").path)}
      batch: 2
      evaluate: {every: 0}
      vae: {measured: 4}
      run: {iterations: 5, checkpointEvery: 1}

      """, to: "pretrain.yaml")
  }

  private func pretrain(_ arguments: String...) throws -> Tool.Result {
    try Tool.run(["pretrain"] + arguments, in: scratch)
  }

  @Test("killed and resumed is as never stopped; the folder samples; nothing is overwritten")
  func killed() throws {
    let whole = try pretrain("pretrain.yaml", "--set", "output=whole", "--json")
    try #require(whole.status == 0, "\(whole.err)")
    let said = try whole.json()
    #expect(said["iterations"] as? Int == 5 && (said["loss"] as? Double ?? -1) > 0)
    let run = try Tool.start(["pretrain", "pretrain.yaml", "--set", "output=cut"], in: scratch)
    try #require(waitUntil(limit: 120) { scratch.exists("cut/LATEST") || !run.isRunning })
    run.send(SIGKILL)
    #expect(try run.wait().killed)
    #expect(!scratch.exists("cut/model"))
    let resumed = try pretrain("--resume", "cut")
    try #require(resumed.status == 0, "\(resumed.err)")
    #expect(scratch.listing("cut/model") == scratch.listing("whole/model"))
    #expect(try scratch.metrics("cut") == scratch.metrics("whole"))
    let drawn = try Tool.run(
      ["sample", "cut", "--prompt", "a photo of a cat", "--steps", "2", "-o", "cat.png"], in: scratch)
    #expect(drawn.status == 0 && scratch.exists("cat.png"), "\(drawn.err)")
    let before = scratch.listing("whole")
    let again = try pretrain("pretrain.yaml", "--set", "output=whole")
    #expect(again.status != 0 && again.err.contains("continue that run with pretrain --resume"))
    let changed = try pretrain("--resume", "whole", "--set", "seed=2")
    #expect(changed.status != 0 && changed.err.contains("nothing may be set"))
    #expect(scratch.listing("whole") == before)
  }

  @Test("SIGTERM ends at a boundary; resuming is as never stopped")
  func terminated() throws {
    let run = try Tool.start(
      ["pretrain", "pretrain.yaml", "--set", "output=a", "--set", "run.checkpointEvery=5"], in: scratch)
    try #require(waitUntil(limit: 120) { scratch.exists("a/metrics.jsonl") || !run.isRunning })
    run.send(SIGTERM)
    let result = try run.wait(limit: 20)
    #expect(result.status == 143 && !result.killed && result.err.hasSuffix("terminated\n"), "\(result.err)")
    #expect(scratch.exists("a/LATEST") && !scratch.exists("a/model"))
    #expect(try pretrain("--resume", "a").status == 0)
    #expect(try pretrain("pretrain.yaml", "--set", "output=b").status == 0)
    #expect(scratch.listing("a/model") == scratch.listing("b/model"))
  }

  @Test("--vae writes another autoencoder beside the same transformer; --dry-run writes nothing and counts")
  func autoencoder() throws {
    let before = scratch.listing()
    let dry = try pretrain("pretrain.yaml", "--vae", "--dry-run", "--set", "output=v")
    #expect(dry.status == 0 && dry.out.contains("part: vae"), "\(dry.err)")
    // Counted from the shipped file.
    #expect(dry.out.contains(try Regex("parameters of vae +688739")))
    #expect(scratch.listing() == before)
    let trained = try pretrain("pretrain.yaml", "--vae", "--set", "output=v", "--set", "run.iterations=1")
    try #require(trained.status == 0, "\(trained.err)")
    let transformer = "transformer/diffusion_pytorch_model.safetensors"
    #expect(
      try scratch.data("v/model/\(transformer)")
        == Data(contentsOf: Tool.fluxMini.appending(path: transformer)))
    let vae = "vae/diffusion_pytorch_model.safetensors"
    #expect(try scratch.data("v/model/\(vae)") != Data(contentsOf: Tool.fluxMini.appending(path: vae)))
    // What comes next: a flow model for this autoencoder.
    let next = try pretrain("pretrain.yaml", "--set", "init=v/model", "--set", "output=w", "--dry-run")
    #expect(next.status == 0 && next.out.contains("parameters of transformer"), "\(next.err)")
  }
}
