import FlowModels
import Foundation
import Peers
import Testing
import Torch
import TorchNN

/// Oracle: diffusers 0.42.1 and peft 0.21.2, which load what we write, and write what we load.
@Suite("LoRA files and merged folders, with diffusers and PEFT")
struct LoRAPeerTests {
  // Float32 on both sides, sums in another order: the fixtures agree to 1e-6, a wrong scale shows at 1e-2.
  private static let tolerance = 1e-5

  @Test(
    "both directions, every form", .enabled(if: Peers.areThere || Peers.isCI, "\(Peers.missing)"),
    arguments: PeerModel.all)
  func roundTrip(_ model: PeerModel) throws {
    try #require(Peers.areThere, "\(Peers.missing)")
    let scratch = try Scratch()
    let network = try model.transformer(model.folder)
    let modules = network.modules

    // What we write: an adapter on the attention and MLP layers, alpha/rank = 3, B far from zero.
    let adapter = try LoRAAdapter(modules, rank: 3, alpha: 9, targets: ["attention+mlp"]) { path, count in
      (0..<count).map { Float(($0 * 7 + path.count) % 19) / 9.5 - 1 }
    }
    for (path, layer) in adapter.layers {
      try layer.up.copy(from: Fixtures.normals(layer.up.shape, path) * 0.05)
    }
    let ours = try model.output(network)
    adapter.disable()
    let base = try model.output(network)
    #expect(try PeerModel.relative(ours, base) > 1e-2, "the adapter must show")
    var cases: [[String: String]] = []
    func add(_ name: String, _ form: String, _ fill: (URL) throws -> Void) throws {
      let folder = scratch.path(name)
      if form != "model" {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
      }
      try fill(folder)
      cases.append(["name": name, "form": form, "path": folder.path])
    }
    try add("trained", "diffusers") {
      try adapter.write(to: $0.appending(path: "pytorch_lora_weights.safetensors"))
    }
    for format in LoRAFormat.allCases {
      try add("\(format)", format.rawValue) { try format.write(adapter.layers, to: $0) }
    }
    let again = try LoRAFile(scratch.path("peft")).allFactors()
    try add("diffusers-of-peft", "diffusers") { try LoRAFormat.diffusers.write(again, to: $0) }
    try add("merged", "model") {
      _ = try ModelMerge.merge(model.folder, try LoRAFile(scratch.path("peft")), to: $0)
    }

    let job: [String: Any] = [
      "model": model.folder.path, "inputs": model.inputs.path, "read": cases,
      "write": scratch.path("theirs").path,
    ]
    let out = try Peers.outputs(job, in: scratch.url)

    #expect(try PeerModel.relative(base, try out.require("base")) < Self.tolerance)
    for name in cases.map({ $0["name"]! }) {
      #expect(try PeerModel.relative(ours, try out.require("read." + name)) < Self.tolerance, "\(name)")
    }
    let merged = try model.output(try model.transformer(scratch.path("merged")))
    #expect(try PeerModel.relative(merged, ours) < Self.tolerance)

    // What they write.
    let forms = out.names.filter { $0.hasPrefix("write.") }.map { String($0.dropFirst("write.".count)) }
    #expect(forms.count == 11)
    for form in forms {
      let folder = scratch.path("theirs/\(form)")
      let isFolder = FileManager.default.fileExists(atPath: folder.path)
      let theirs = try LoRAAdapter(
        isFolder ? folder : folder.appendingPathExtension("safetensors"), for: modules)
      defer { theirs.disable() }
      let got = try model.output(network)
      #expect(try PeerModel.relative(got, base) > 1e-2, "\(form): the adapter must show")
      #expect(try PeerModel.relative(got, try out.require("write." + form)) < Self.tolerance, "\(form)")
    }
  }
}
