// The library's side of the benchmarks: reads one JSON request a line from stdin, answers each with one line on stdout.
//
//   {"op": "setup", "kind": "network", "parameters": {…}, "warm": 2}   makes a case and runs it `warm` times
//   {"op": "check", "file": "out.safetensors"}                         writes what the case computes
//   {"op": "run"}                                                      runs it once: {"seconds": …}
//   {"op": "memory"}                                                   runs it once: {"bytes": …}, the allocator's peak
//   {"op": "plot", "parameters": {…}}                                  draws line charts
//
// bench.py starts it, see there.
import Foundation
import Torch

/// Work that is set up once and measured many times.
protocol Case: AnyObject {
  /// What the driver needs to know of it to give the reference the same work.
  var facts: [String: Any] { get }
  /// Makes ready for one run; not measured.
  func prepare() throws
  /// The work; may report parts of it.
  func run() throws -> [String: Double]
  /// Results to compare with the reference's.
  func check() throws -> [String: Tensor]
}

extension Case {
  var facts: [String: Any] { [:] }
  func prepare() throws {}
}

struct Request: Decodable {
  var op: String
  var kind: String?
  var parameters: Parameters?
  var file: String?
  var warm: Int?
}

/// What a case is made from; each kind takes its own.
struct Parameters: Decodable {
  var folder, inputs, family, dtype, train, name, config, prompts, device: String?
  var grid: [Int]?
  var chunk, trained, rank, rows, group, steps, textTokens, checkpointing, batch: Int?
  var updates: [[[Int]]]?
  var charts: [Chart]?
}

struct BenchError: Error, CustomStringConvertible {
  let description: String
  init(_ description: String) { self.description = description }
}

/// `value`, or an error that names what is missing.
func need<T>(_ value: T?, _ name: String) throws -> T {
  guard let value else { throw BenchError("bench-runner: the request has no \(name)") }
  return value
}

func make(_ kind: String, _ p: Parameters) throws -> any Case {
  switch kind {
  case "network": try NetworkCase(p)
  case "decode": try DecodeCase(p)
  case "reward", "clip": try RewardCase(p)
  case "step": try StepCase(p)
  case "loop": try LoopCase(p)
  case "device": try DeviceCase(p)
  default: throw BenchError("bench-runner: no case of kind \(kind)")
  }
}

func timed(_ body: () throws -> [String: Double]) rethrows -> [String: Double] {
  let start = ContinuousClock.now
  let parts = try body()
  let spent = (ContinuousClock.now - start).components
  return parts.merging(
    ["seconds": Double(spent.seconds) + Double(spent.attoseconds) * 1e-18], uniquingKeysWith: { $1 })
}

struct Service {
  private var current: (any Case)?

  mutating func answer(_ request: Request) throws -> [String: Any] {
    switch request.op {
    case "setup":
      current = nil  // before the next one takes memory
      let made = try make(try need(request.kind, "kind"), try need(request.parameters, "parameters"))
      for _ in 0..<(request.warm ?? 2) {
        try made.prepare()
        _ = try made.run()
      }
      current = made
      return made.facts.merging(["threads": TorchRuntime.threads], uniquingKeysWith: { $1 })
    case "check":
      let results = try need(current, "case").check()
      try Safetensors.write(
        results.mapValues { try $0.detach().to(.float32).contiguous() }, metadata: [:],
        to: URL(filePath: try need(request.file, "file")))
      return [:]
    case "run":
      let current = try need(current, "case")
      try current.prepare()
      return try timed(current.run)
    case "memory":
      let current = try need(current, "case")
      try current.prepare()
      let (parts, bytes) = try TorchRuntime.peakAllocation { try timed(current.run) }
      return parts.merging(["bytes": Double(bytes)], uniquingKeysWith: { $1 })
    case "plot":
      try need(request.parameters?.charts, "charts").forEach { try $0.write() }
      return [:]
    default: throw BenchError("bench-runner: no operation \(request.op)")
    }
  }
}

let decoder = JSONDecoder()
var service = Service()
while let line = readLine() {
  var reply: [String: Any]
  do { reply = try service.answer(try decoder.decode(Request.self, from: Data(line.utf8))) } catch {
    reply = ["error": "\(error)"]
  }
  let data = try JSONSerialization.data(withJSONObject: reply)
  FileHandle.standardOutput.write(data + Data("\n".utf8))
}
