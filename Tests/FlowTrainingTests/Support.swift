import Foundation
import Testing
import Torch

@testable import FlowTraining

/// Files of the package, found from this file.
let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
  .deletingLastPathComponent()
let parity = root.appending(path: "Tests/Fixtures/parity")
let mini = root.appending(path: "Models/flux-mini")
let tiny = parity.appending(path: "flux-tiny")

/// A folder that is gone when the last reference to it is.
final class Scratch: Sendable {
  let url: URL
  init() throws {
    url = FileManager.default.temporaryDirectory.appending(path: "chunkgrpo-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
  }
  deinit { try? FileManager.default.removeItem(at: url) }

  func path(_ name: String) -> URL { url.appending(path: name) }

  /// A copy of flux-tiny whose prompts have 16 T5 tokens instead of 512: the tests then take seconds.
  func tinyModel() throws -> URL {
    let model = path("model")
    try FileManager.default.copyItem(at: tiny, to: model)
    let file = model.appending(path: "tokenizer_2/tokenizer_config.json")
    let text = try String(contentsOf: file, encoding: .utf8)
    let short = text.replacingOccurrences(of: "\"model_max_length\": 512", with: "\"model_max_length\": 16")
    try #require(short != text)
    try short.write(to: file, atomically: true, encoding: .utf8)
    return model
  }
}

/// The description of what `body` throws; fails if it throws nothing.
func message(_ body: () throws -> Void, sourceLocation: SourceLocation = #_sourceLocation) -> String {
  do {
    try body()
    Issue.record("nothing was thrown", sourceLocation: sourceLocation)
    return ""
  } catch {
    return "\(error)"
  }
}

/// All tensors of a file, overwritten by `change`.
func rewrite(_ file: URL, to target: URL, _ change: (inout [String: Tensor]) throws -> Void) throws {
  let source = try SafetensorsFile(file)
  var tensors: [String: Tensor] = [:]
  for name in source.names { tensors[name] = try source.require(name) }
  try change(&tensors)
  try Safetensors.write(tensors, metadata: source.metadata, to: target)
}

/// Relative 2-norm of a difference, in float64.
func relativeError(_ got: [Double], _ expected: [Double]) -> Double {
  let norm = expected.reduce(0) { $0 + $1 * $1 }.squareRoot()
  return zip(got, expected).reduce(0) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }.squareRoot() / norm
}
