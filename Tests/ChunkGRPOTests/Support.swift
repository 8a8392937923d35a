import Foundation
import Testing

@testable import ChunkGRPO

/// The tensors of one recorded reference file, `Tests/Fixtures/parity/io/<name>.safetensors`.
struct Fixture {
  struct Entry: Decodable {
    let dtype: String
    let shape: [Int]
    let offsets: [Int]
    enum CodingKeys: String, CodingKey {
      case dtype, shape
      case offsets = "data_offsets"
    }
  }

  static let peers = Fixture("peer_logprob")
  static let scheduler = Fixture("scheduler")
  static let chunkStep = Fixture("gcpo_chunk_step")
  static let grpoStep = Fixture("gcpo_grpo_step")

  private let entries: [String: Entry]
  private let bytes: Data

  init(_ name: String) {
    let url = URL(filePath: #filePath).deletingLastPathComponent()
      .appending(path: "../Fixtures/parity/io/\(name).safetensors")
    let file = try! Data(contentsOf: url)
    let length = file.prefix(8).enumerated().reduce(0) { $0 | Int($1.element) << (8 * $1.offset) }
    entries = try! JSONDecoder().decode([String: Entry].self, from: file.dropFirst(8).prefix(length))
    bytes = Data(file.dropFirst(8 + length))
  }

  var names: [String] { entries.keys.sorted() }
  func has(_ name: String) -> Bool { entries[name] != nil }

  private func scalars<T: FixedWidthInteger>(_ name: String, dtype: String, as: T.Type) throws -> [T] {
    let entry = try #require(entries[name], "no tensor \(name)")
    try #require(entry.dtype == dtype)
    return bytes[entry.offsets[0]..<entry.offsets[1]].withUnsafeBytes { raw in
      (0..<raw.count / MemoryLayout<T>.size).map {
        T(littleEndian: raw.loadUnaligned(fromByteOffset: $0 * MemoryLayout<T>.size, as: T.self))
      }
    }
  }

  func floats(_ name: String) throws -> [Float] {
    try scalars(name, dtype: "F32", as: UInt32.self).map { Float(bitPattern: $0) }
  }

  func doubles(_ name: String) throws -> [Double] { try floats(name).map(Double.init) }
  func integers(_ name: String) throws -> [Int] {
    try scalars(name, dtype: "I64", as: Int64.self).map { Int($0) }
  }
}

/// Fails unless the two agree within `absolute` + `relative`·|expected|.
func expectClose(
  _ got: Double, _ expected: Double, absolute: Double = 0, relative: Double = 0,
  _ what: @autoclosure () -> String = "", sourceLocation: SourceLocation = #_sourceLocation
) {
  let allowed = absolute + relative * abs(expected)
  #expect(
    abs(got - expected) <= allowed, "\(what()): got \(got), expected \(expected) ± \(allowed)",
    sourceLocation: sourceLocation)
}

/// As above for every element.
func expectClose(
  _ got: [Double], _ expected: [Double], absolute: Double = 0, relative: Double = 0,
  _ what: @autoclosure () -> String = "", sourceLocation: SourceLocation = #_sourceLocation
) {
  #expect(got.count == expected.count, "\(what())", sourceLocation: sourceLocation)
  for (i, (g, e)) in zip(got, expected).enumerated() where !(abs(g - e) <= absolute + relative * abs(e)) {
    Issue.record("\(what()) [\(i)]: got \(g), expected \(e)", sourceLocation: sourceLocation)
  }
}

/// Random numbers for tests, each from its own stream.
func testStream(_ name: String) -> RandomStream {
  RandomPlan(seed: 20).stream(.parameterInit, prompt: name)
}
