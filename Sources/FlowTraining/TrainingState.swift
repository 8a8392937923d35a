import Foundation
import Torch
import TorchNN

/// What changes while weights are trained, and what a checkpoint therefore holds.
struct TrainingState {
  let parameters: [String: Tensor]
  let optimizer: AdamW
  let average: WeightAverage?

  /// Copies of everything that changes: parameters under `parameter.`, moments under `optimizer.`, the moving average
  /// under `average.`, and the number of updates done.
  func snapshot(update: Int) throws -> [String: Tensor] {
    var state: [String: Tensor] = ["update": try Tensor([Int64(update)])]
    for (name, tensor) in parameters { state["parameter." + name] = try tensor.detach().clone() }
    for (name, tensor) in optimizer.state { state["optimizer." + name] = try tensor.clone() }
    for (name, tensor) in average?.values ?? [:] { state["average." + name] = try tensor.clone() }
    return state
  }

  /// Overwrites everything with a snapshot and forgets gradients.
  ///
  /// - Returns: updates done.
  func load(_ state: [String: Tensor]) throws -> Int {
    func entry(_ name: String) throws -> Tensor { try Self.entry(name, of: state) }
    for (name, tensor) in parameters { try tensor.copy(from: try entry("parameter." + name)) }
    try optimizer.restore { try entry("optimizer." + $0) }
    try average?.restore { try entry("average." + $0) }
    for tensor in parameters.values { try tensor.clearGrad() }
    return Int(try entry("update").item())
  }

  /// What a snapshot holds under `name`.
  static func entry(_ name: String, of state: [String: Tensor]) throws -> Tensor {
    guard let tensor = state[name] else { throw RunError("checkpoint: \(name) is missing") }
    return tensor
  }

  /// Writes a snapshot into a checkpoint's folder.
  static func write(_ snapshot: [String: Tensor], iteration: Int, to folder: URL) throws {
    try Safetensors.write(
      snapshot, metadata: ["iteration": String(iteration)],
      to: folder.appending(path: "training.safetensors"))
  }

  /// The snapshot in a checkpoint's folder.
  static func read(_ folder: URL) throws -> [String: Tensor] {
    let file = try SafetensorsFile(folder.appending(path: "training.safetensors"))
    var state: [String: Tensor] = [:]
    for name in file.names { state[name] = try file.tensor(name) }
    return state
  }
}
