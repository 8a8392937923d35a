import Foundation
import Testing
import Torch
import TorchNN

@testable import FlowModels

/// Python with the packages of `Tools/reference/requirements.txt`.
enum Peers {
  static let root = Fixtures.parity.deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()
  static let isCI = ProcessInfo.processInfo.environment["CI"] == "true"
  static let python =
    ProcessInfo.processInfo.environment["CHUNKGRPO_TEST_PYTHON"]
    ?? root.appending(path: ".python-tests/bin/python").path
  static let missing: Comment = """
    no Python with diffusers and peft at \(python): \
    run Tools/setup-python-tests.sh, or set CHUNKGRPO_TEST_PYTHON
    """
  /// Whether the packages are there; importing them is left to the tests.
  static let areThere: Bool = {
    let code =
      "import importlib.metadata as m; [m.version(p) for p in ['torch', 'diffusers', 'transformers', 'peft']]"
    return (try? run(["-c", code]))?.status == 0
  }()

  /// Runs Python to its end; its output goes to a file, so that nothing blocks.
  static func run(_ arguments: [String]) throws -> (status: Int32, log: String) {
    let log = FileManager.default.temporaryDirectory.appending(path: "chunkgrpo-peer-\(UUID()).log")
    try Data().write(to: log)
    defer { try? FileManager.default.removeItem(at: log) }
    let process = Process()
    process.executableURL = URL(filePath: python)
    process.arguments = arguments
    // Nothing is fetched; one thread, as tests run side by side.
    process.environment = ProcessInfo.processInfo.environment.merging(
      ["HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"]
    ) { $1 }
    let handle = try FileHandle(forWritingTo: log)
    (process.standardOutput, process.standardError) = (handle, handle)
    try process.run()
    process.waitUntilExit()
    return (process.terminationStatus, try String(contentsOf: log, encoding: .utf8))
  }
}

/// A small model folder, stored inputs of its transformer, and how our code runs it on them.
struct PeerModel: Sendable, CustomTestStringConvertible {
  let name, inputs: String
  /// Loads a transformer folder: its layers, and its output on a file of inputs.
  let load: @Sendable (URL) throws -> (modules: ModuleRegistry, run: (SafetensorsFile) throws -> Tensor)
  var folder: URL { Fixtures.parity.appending(path: name) }
  var testDescription: String { name }

  /// Models both sides can run. SD3 is one more entry, of `sd3-tiny` and `sd3_transformer`.
  static let all = [
    PeerModel(name: "flux-tiny", inputs: "flux_transformer") { folder in
      let network = try FluxTransformer(folder: folder)
      return (
        network.modules,
        { data in
          let ids = try data.require("in.img_ids").doubles()
          return try network(
            try data.require("in.hidden_states"), text: try data.require("in.encoder_hidden_states"),
            pooled: try data.require("in.pooled_projections"), timestep: try data.require("in.timestep"),
            guidance: try data.tensor("in.guidance"),
            grid: (Int(ids[ids.count - 2]) + 1, Int(ids[ids.count - 1]) + 1))
        }
      )
    }
  ]
}

/// Oracle: diffusers 0.42.1 and peft 0.21.2, which load what we write, and write what we load.
@Suite("LoRA files and merged folders, with diffusers and PEFT")
struct LoRAPeerTests {
  // Float32 on both sides, sums in another order: the fixtures agree to 1e-6, a wrong scale shows at 1e-2.
  private static let tolerance = 1e-5

  private func relative(_ got: Tensor, _ expected: Tensor) throws -> Double {
    let (got, expected) = (try got.doubles(), try expected.doubles())
    guard got.count == expected.count else { return .infinity }
    let difference = zip(got, expected).reduce(0) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
    return (difference / expected.reduce(0) { $0 + $1 * $1 }).squareRoot()
  }

  @Test(
    "both directions, every form", .enabled(if: Peers.areThere || Peers.isCI, Peers.missing),
    arguments: PeerModel.all)
  func roundTrip(_ model: PeerModel) throws {
    try #require(Peers.areThere, Peers.missing)
    let scratch = try Scratch()
    let inputs = Fixtures.parity.appending(path: "io/\(model.inputs).safetensors")
    let data = try SafetensorsFile(inputs)
    let transformer = model.folder.appending(path: "transformer")
    let (modules, run) = try model.load(transformer)

    // What we write: an adapter on the attention and MLP layers, alpha/rank = 3, B far from zero.
    let adapter = try LoRAAdapter(modules, rank: 3, alpha: 9, targets: ["attention+mlp"]) { path, count in
      (0..<count).map { Float(($0 * 7 + path.count) % 19) / 9.5 - 1 }
    }
    for (path, layer) in adapter.layers {
      try layer.up.copy(from: Fixtures.normals(layer.up.shape, path) * 0.05)
    }
    let ours = try withoutGrad { try run(data) }
    adapter.disable()
    let base = try withoutGrad { try run(data) }
    #expect(try relative(ours, base) > 1e-2, "the adapter must show")
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
      "model": model.folder.path, "inputs": inputs.path, "read": cases, "write": scratch.path("theirs").path,
      "out": scratch.path("out.safetensors").path,
    ]
    try JSONSerialization.data(withJSONObject: job).write(to: scratch.path("job.json"))
    let script = Peers.root.appending(path: "Tools/reference/lora_peers.py").path
    let (status, log) = try Peers.run([script, scratch.path("job.json").path])
    try #require(status == 0, "\(log)")
    let out = try SafetensorsFile(scratch.path("out.safetensors"))

    #expect(try relative(base, try out.require("base")) < Self.tolerance)
    for name in cases.map({ $0["name"]! }) {
      #expect(try relative(ours, try out.require("read." + name)) < Self.tolerance, "\(name)")
    }
    let merged = try model.load(scratch.path("merged/transformer"))
    #expect(try relative(try withoutGrad { try merged.run(data) }, ours) < Self.tolerance)

    // What they write.
    let forms = out.names.filter { $0.hasPrefix("write.") }.map { String($0.dropFirst("write.".count)) }
    #expect(forms.count == 11)
    for form in forms {
      let folder = scratch.path("theirs/\(form)")
      let isFolder = FileManager.default.fileExists(atPath: folder.path)
      let theirs = try LoRAAdapter(
        isFolder ? folder : folder.appendingPathExtension("safetensors"), for: modules)
      defer { theirs.disable() }
      let got = try withoutGrad { try run(data) }
      #expect(try relative(got, base) > 1e-2, "\(form): the adapter must show")
      #expect(try relative(got, try out.require("write." + form)) < Self.tolerance, "\(form)")
    }
  }
}
