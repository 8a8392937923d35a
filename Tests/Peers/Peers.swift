import FlowModels
import Foundation
import Torch

/// Python with the packages of `Tools/reference/requirements.txt`.
public enum Peers {
  private static let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()
  /// Models and inputs that both sides can run.
  public static let parity = root.appending(path: "Tests/Fixtures/parity")
  /// Whether a Python that is not there fails the tests instead of skipping them.
  public static let isCI = ProcessInfo.processInfo.environment["CI"] == "true"
  private static let python =
    ProcessInfo.processInfo.environment["CHUNKGRPO_TEST_PYTHON"]
    ?? root.appending(path: ".python-tests/bin/python").path
  /// Why a test is skipped.
  public static let missing = """
    no Python with diffusers and peft at \(python): \
    run Tools/setup-python-tests.sh, or set CHUNKGRPO_TEST_PYTHON
    """
  /// Whether the packages are there; importing them is left to the tests.
  public static let areThere: Bool = {
    let code =
      "import importlib.metadata as m; [m.version(p) for p in ['torch', 'diffusers', 'transformers', 'peft']]"
    return (try? run(["-c", code]))?.status == 0
  }()

  /// What Python said instead of ending well.
  public struct Failure: Error, CustomStringConvertible {
    /// Its output.
    public let description: String
  }

  /// The outputs that `Tools/reference/lora_peers.py` computes for `job`, whose form is described there.
  ///
  /// - Parameter scratch: a folder that outlives the outputs.
  public static func outputs(_ job: [String: Any], in scratch: URL) throws -> SafetensorsFile {
    let (file, out) = (scratch.appending(path: "job.json"), scratch.appending(path: "out.safetensors"))
    try JSONSerialization.data(withJSONObject: job.merging(["out": out.path]) { $1 }).write(to: file)
    let (status, log) = try run([root.appending(path: "Tools/reference/lora_peers.py").path, file.path])
    guard status == 0 else { throw Failure(description: log) }
    return try SafetensorsFile(out)
  }

  /// Runs Python to its end; its output goes to a file, so that nothing blocks.
  private static func run(_ arguments: [String]) throws -> (status: Int32, log: String) {
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
public struct PeerModel: Sendable, CustomStringConvertible {
  /// Name of the folder in ``Peers/parity``, and of the inputs in its `io`.
  public let name, inputsName: String
  /// The model folder.
  public var folder: URL { Peers.parity.appending(path: name) }
  /// A safetensors file whose `in.*` are the transformer's arguments.
  public var inputs: URL { Peers.parity.appending(path: "io/\(inputsName).safetensors") }
  /// For test names.
  public var description: String { name }

  /// Models both sides can run.
  public static let all = [
    PeerModel(name: "flux-tiny", inputsName: "flux_transformer"),
    PeerModel(name: "sd3-tiny", inputsName: "sd3_transformer"),
  ]

  /// The transformer of a model folder of this kind.
  public func transformer(_ folder: URL) throws -> any FlowTransformer {
    let part = folder.appending(path: "transformer")
    return name == "sd3-tiny" ? try SD3Transformer(folder: part) : try FluxTransformer(folder: part)
  }

  /// The output of a transformer of this kind on the stored inputs.
  public func output(_ network: any FlowTransformer) throws -> Tensor {
    let data = try SafetensorsFile(inputs)
    let (latents, text) = (try data.require("in.hidden_states"), try data.require("in.encoder_hidden_states"))
    let (pooled, time) = (try data.require("in.pooled_projections"), try data.require("in.timestep"))
    return try withoutGrad {
      if let network = network as? SD3Transformer {
        return try network(latents, text: text, pooled: pooled, timestep: time)
      }
      let ids = try data.require("in.img_ids").doubles()
      return try (network as! FluxTransformer)(
        latents, text: text, pooled: pooled, timestep: time, guidance: try data.tensor("in.guidance"),
        grid: (Int(ids[ids.count - 2]) + 1, Int(ids[ids.count - 1]) + 1))
    }
  }

  /// ‖got − expected‖ / ‖expected‖.
  public static func relative(_ got: Tensor, _ expected: Tensor) throws -> Double {
    let (got, expected) = (try got.doubles(), try expected.doubles())
    guard got.count == expected.count else { return .infinity }
    let difference = zip(got, expected).reduce(0) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
    return (difference / expected.reduce(0) { $0 + $1 * $1 }).squareRoot()
  }
}
