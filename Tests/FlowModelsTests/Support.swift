import ChunkGRPO
import FlowModels
import Foundation
import Testing
import Torch

enum Fixtures {
  static let parity = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .appending(path: "Fixtures/parity")
  static let clip = parity.deletingLastPathComponent().appending(path: "clip")
  static let tiny = parity.appending(path: "flux-tiny")
  static let lora = parity.appending(path: "flux-lora-tiny/pytorch_lora_weights.safetensors")

  static func transformer() throws -> FluxTransformer {
    try FluxTransformer(folder: tiny.appending(path: "transformer"))
  }

  /// Standard normals, the same in every run.
  static func normals(_ shape: [Int], _ name: String) throws -> Tensor {
    var stream = RandomPlan(seed: 7).stream(.parameterInit, prompt: name)
    return try Tensor(stream.normals(count: shape.reduce(1, *)), shape: shape)
  }
}

/// A folder that is gone when the last reference to it is.
final class Scratch: Sendable {
  let url: URL
  init() throws {
    url = FileManager.default.temporaryDirectory.appending(path: "chunkgrpo-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
  }
  deinit { try? FileManager.default.removeItem(at: url) }

  func path(_ name: String) -> URL { url.appending(path: name) }

  /// A copy of flux-tiny.
  func model() throws -> URL {
    try FileManager.default.copyItem(at: Fixtures.tiny, to: path("model"))
    return path("model")
  }
}

/// The description of what `body` throws; fails if it throws nothing.
func message(sourceLocation: SourceLocation = #_sourceLocation, _ body: () throws -> Void) -> String {
  do {
    try body()
    Issue.record("nothing was thrown", sourceLocation: sourceLocation)
    return ""
  } catch {
    return "\(error)"
  }
}

/// Replaces a file's tensors by changed ones.
func rewrite(_ file: URL, _ change: (inout [String: Tensor]) throws -> Void) throws {
  let source = try SafetensorsFile(file)
  var tensors: [String: Tensor] = [:]
  for name in source.names { tensors[name] = try source.require(name) }
  try change(&tensors)
  try Safetensors.write(tensors, metadata: source.metadata, to: file)
}

/// Inputs of flux-tiny on a 2 × 3 grid with 5 text tokens, one row a sample, all rows different.
struct TinyInputs {
  let latents, text, pooled, times: Tensor
  let grid = (rows: 2, columns: 3)

  init(batch: Int) throws {
    latents = try Fixtures.normals([batch, 6, 64], "latents")
    text = try Fixtures.normals([batch, 5, 32], "text")
    pooled = try Fixtures.normals([batch, 24], "pooled")
    times = try Tensor((0..<batch).map { 1000 - Float($0 * 17) })
  }

  /// The velocity of the first `count` rows in one pass.
  func velocity(_ network: FluxTransformer, first count: Int? = nil, guidance: Double? = 3.5) throws
    -> [Float]
  {
    let rows = 0..<(count ?? latents.size(0))
    let condition = Condition([try text[rows], try pooled[rows]])
    return try withoutGrad {
      try FluxFlowModel(network, grid: grid)
        .velocity(try latents[rows], times: try times[rows], condition: condition, guidance: guidance)
        .floats()
    }
  }
}

/// Largest absolute difference over the largest magnitude of `expected`.
func largestDifference(_ got: [Float], _ expected: [Float]) -> Double {
  guard got.count == expected.count else { return .infinity }
  let scale = expected.reduce(0) { max($0, abs($1)) }
  let worst = zip(got, expected).reduce(Float(0)) { $1.0.isNaN ? .nan : max($0, abs($1.0 - $1.1)) }
  return Double(worst / scale)
}
