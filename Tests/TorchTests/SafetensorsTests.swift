import Foundation
import Testing

@testable import Torch

/// Oracle: the published format (8-byte little-endian header length, JSON header, data) read and written by
/// hand, and the bytes put in; everything is exact.
@Suite("Safetensors files")
struct SafetensorsTests {
  let folder: TemporaryFolder
  init() throws { folder = try TemporaryFolder() }

  /// A file with this header and data, written without the code under test.
  func craft(_ header: String, data: [UInt8] = [], length: UInt64? = nil, name: String = "x.safetensors")
    throws -> URL
  {
    let prefix = withUnsafeBytes(of: (length ?? UInt64(header.utf8.count)).littleEndian) { [UInt8]($0) }
    let url = folder.file(name)
    try Data(prefix + [UInt8](header.utf8) + data).write(to: url)
    return url
  }

  static let shapes: [[Int]] = [[2, 3], [], [0], [3, 0, 2], [1]]

  @Test(
    "every dtype and shape, scalars and empty tensors included, comes back bit for bit",
    arguments: DType.allCases)
  func roundTrip(_ dtype: DType) throws {
    var tensors: [String: Tensor] = [:]
    for (i, shape) in Self.shapes.enumerated() {
      let count = shape.reduce(1, *)
      if dtype == .complex64 {
        let pairs = try Tensor((0..<2 * count).map { Float($0) - 1.5 }, shape: shape + [2])
        tensors["t\(i)"] = try pairs.viewAsComplex()
      } else {
        tensors["t\(i)"] = try Tensor((0..<count).map { Double($0) + 0.3 }, shape: shape).to(dtype)
      }
    }
    let url = folder.file("all.safetensors")
    try Safetensors.write(tensors, to: url)
    let file = try SafetensorsFile(url)
    #expect(file.names == tensors.keys.sorted() && file.path == url.path && file.metadata.isEmpty)
    for (name, tensor) in tensors {
      #expect(file.shape(name) == tensor.shape && file.dtype(name) == dtype)
      try expectIdentical(file.require(name), tensor)
    }
  }

  @Test("tensors that are not contiguous or need gradients are written as they read")
  func layouts() throws {
    let leaf = try Grid(noise: 2, 3, seed: 80).leaf(.float32)
    let url = folder.file("a.safetensors")
    try Safetensors.write(["t": leaf.transpose(0, 1), "n": leaf.narrow(1, 1, 2)], to: url)
    let file = try SafetensorsFile(url)
    try expectIdentical(file.require("t"), leaf.transpose(0, 1))
    try expectIdentical(file.require("n"), leaf.narrow(1, 1, 2))
  }

  @Test("the bytes of a written file follow the rules of the reference library")
  func header() throws {
    let url = folder.file("h.safetensors")
    try Safetensors.write(
      [
        "b": Tensor([1, 2, 3] as [UInt8]), "z": Tensor([0.5, -1], shape: [2, 1]),
        "a/é\"": Tensor([7] as [Float]),
        "e": Tensor([Float](), shape: [0, 4]), "s": Tensor([9] as [Int64], shape: []),
      ], metadata: ["format": "pt", "note": "a \"quoted\" ümlaut"], to: url)
    let bytes = [UInt8](try Data(contentsOf: url))
    let length = bytes[..<8].enumerated().reduce(0) { $0 | Int($1.element) << (8 * $1.offset) }
    #expect((8 + length) % 8 == 0, "data starts aligned")
    #expect(bytes[8] == UInt8(ascii: "{"), "the reference library insists")
    let text = bytes[8..<8 + length]
    let trimmed = text.reversed().drop { $0 == 0x20 }
    #expect(trimmed.first == UInt8(ascii: "}"), "padding is spaces")

    struct Entry: Decodable, Equatable {
      let dtype: String
      let shape, dataOffsets: [Int]
      enum CodingKeys: String, CodingKey {
        case dtype, shape
        case dataOffsets = "data_offsets"
      }
    }
    var json = try #require(try JSONSerialization.jsonObject(with: Data(text)) as? [String: Any])
    #expect(
      json.removeValue(forKey: "__metadata__") as? [String: String] == [
        "format": "pt", "note": "a \"quoted\" ümlaut",
      ])
    let entries = try JSONDecoder().decode(
      [String: Entry].self, from: JSONSerialization.data(withJSONObject: json))
    // Widest first, then by name; contiguous from 0 to the end of the file.
    #expect(
      entries == [
        "s": Entry(dtype: "I64", shape: [], dataOffsets: [0, 8]),
        "z": Entry(dtype: "F64", shape: [2, 1], dataOffsets: [8, 24]),
        "a/é\"": Entry(dtype: "F32", shape: [1], dataOffsets: [24, 28]),
        "e": Entry(dtype: "F32", shape: [0, 4], dataOffsets: [28, 28]),
        "b": Entry(dtype: "U8", shape: [3], dataOffsets: [28, 31]),
      ])
    func little<T>(_ value: T) -> [UInt8] { withUnsafeBytes(of: value) { [UInt8]($0) } }
    let data = little(Int64(9)) + little(0.5) + little(-1.0) + little(Float(7)) + [1, 2, 3]
    #expect(Array(bytes[(8 + length)...]) == data)
    #expect(try SafetensorsFile(url).metadata == ["format": "pt", "note": "a \"quoted\" ümlaut"])
  }

  @Test("a file written by hand reads; names say what is there")
  func handWritten() throws {
    let url = try craft(
      #"{"w":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"k":"v"}}  "#,
      data: [1, 0, 0, 0, 0xFE, 0xFF, 0xFF, 0xFF])
    let file = try SafetensorsFile(url)
    #expect(file.metadata == ["k": "v"] && file.names == ["w"])
    #expect(try file.require("w").array(of: Int32.self) == [1, -2])
    #expect(try file.tensor("v") == nil && file.shape("v") == nil && file.dtype("v") == nil)
    let error = try #require(throws: SafetensorsError.self) { try file.require("v") }
    #expect(error.path == url.path && error.reason == "no tensor v; it holds w…")
  }

  @Test("views of one entry share memory and outlive the file value; the file itself never changes")
  func copyOnWrite() throws {
    let url = folder.file("c.safetensors")
    try Safetensors.write(["w": Tensor([1, 2, 3] as [Float])], to: url)
    let before = try Data(contentsOf: url)
    let (first, second) = try { () throws -> (Tensor, Tensor) in
      let file = try SafetensorsFile(url)
      return (try file.require("w"), try file.require("w"))
    }()
    try first.multiplyInPlace(2)
    #expect(try second.floats() == [2, 4, 6])
    #expect(try Data(contentsOf: url) == before)
    #expect(try SafetensorsFile(url).require("w").floats() == [1, 2, 3])
  }

  #if os(Linux)
    @Test("the mapping goes with the last tensor on it: /proc/self/maps")
    func unmapping() throws {
      let url = folder.file("mapped-\(UUID().uuidString).safetensors")
      try Safetensors.write(["w": Tensor([1, 2, 3] as [Float])], to: url)
      func mapped() throws -> Bool { try proc("self/maps").contains(url.lastPathComponent) }
      func scope() throws {
        let tensor = try SafetensorsFile(url).require("w")[1..<3]
        #expect(try mapped())
        #expect(try tensor.floats() == [2, 3])
      }
      try scope()
      #expect(try !mapped())
    }
  #endif

  @Test("data that the header leaves misaligned reads, also when written to", arguments: 0..<8)
  func misaligned(_ shift: Int) throws {
    let header =
      #"{"w":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}}"# + String(repeating: " ", count: shift)
    let values = [1.25, -3]
    let url = try craft(header, data: values.withUnsafeBytes { [UInt8]($0) })
    let tensor = try SafetensorsFile(url).require("w")
    #expect(try tensor.doubles() == values)
    try tensor.multiplyInPlace(2)
    #expect(try tensor.doubles() == [2.5, -6])
  }

  struct Corrupt: Sendable, CustomTestStringConvertible {
    let header: String
    let expected: String
    var data = 8
    var length: UInt64?
    var testDescription: String { expected }
  }
  static func entry(_ dtype: String = #""F32""#, _ shape: String = "[2]", _ offsets: String = "[0,8]")
    -> String
  {
    #"{"w":{"dtype":\#(dtype),"shape":\#(shape),"data_offsets":\#(offsets)}}"#
  }
  static let corrupt: [Corrupt] = [
    Corrupt(header: "", expected: "header of 0 bytes", data: 0),
    Corrupt(header: "{}", expected: "header of 3 bytes in a file of 10", data: 0, length: 3),
    Corrupt(header: "{}", expected: "header of 18446744073709551615 bytes", length: .max),
    Corrupt(header: "{}", expected: "header of 9223372036854775807 bytes", length: UInt64(Int.max)),
    Corrupt(header: "not json", expected: "not a JSON object"),
    Corrupt(header: "[1, 2]", expected: "not a JSON object"),
    Corrupt(header: #"{"w":{"#, expected: "not a JSON object"),
    Corrupt(header: "{\"\u{0}\":1}", expected: "not a JSON object"),
    Corrupt(header: #"{"w":3}"#, expected: "entry w: needs dtype, shape and data_offsets"),
    Corrupt(header: #"{"w":{}}"#, expected: "entry w: needs"),
    Corrupt(header: #"{"w":null}"#, expected: "entry w: needs"),
    Corrupt(header: entry("4"), expected: "entry w: needs"),
    Corrupt(header: entry(#""F8_E5M2""#), expected: "entry w: dtype F8_E5M2 is not supported"),
    Corrupt(header: entry(#""f32""#), expected: "entry w: dtype f32 is not supported"),
    Corrupt(header: entry(#""F32""#, "2"), expected: "entry w: needs"),
    Corrupt(header: entry(#""F32""#, "[-2]"), expected: "entry w: needs"),
    Corrupt(header: entry(#""F32""#, "[-1,-2]"), expected: "entry w: needs"),
    Corrupt(header: entry(#""F32""#, "[1.5]"), expected: "entry w: needs"),
    Corrupt(header: entry(#""F32""#, "[1e30]"), expected: "entry w: needs"),
    Corrupt(header: entry(#""F32""#, #"["2"]"#), expected: "entry w: needs"),
    Corrupt(header: entry(#""F32""#, "[9223372036854775807]"), expected: "is too large"),
    Corrupt(header: entry(#""F32""#, "[4294967296,4294967296]"), expected: "is too large"),
    Corrupt(header: entry(#""F32""#, "[9223372036854775808]"), expected: "entry w: needs"),
    Corrupt(header: entry(#""F32""#, "[3]"), expected: "F32[3] needs 12 bytes, offsets are [0, 8]"),
    Corrupt(header: entry(#""F32""#, "[2]", "[0]"), expected: "entry w: needs"),
    Corrupt(header: entry(#""F32""#, "[2]", "[0,8,8]"), expected: "entry w: needs"),
    Corrupt(header: entry(#""F32""#, "[2]", "[8,0]"), expected: "needs 8 bytes, offsets are [8, 0]"),
    Corrupt(header: entry(#""F32""#, "[2]", "[-8,0]"), expected: "needs 8 bytes, offsets are [-8, 0]"),
    Corrupt(header: entry(#""F32""#, "[2]", "[0,7]"), expected: "needs 8 bytes, offsets are [0, 7]"),
    Corrupt(header: entry(#""F32""#, "[2]", "[4,12]"), expected: "truncated: w ends at byte"),
    Corrupt(
      header: entry(#""F32""#, "[2]", "[-9223372036854775808,9223372036854775807]"), expected: "offsets are"),
  ]

  @Test("a corrupt file is refused by name, with what is wrong", arguments: corrupt)
  func corruption(_ c: Corrupt) throws {
    let url = try craft(c.header, data: [UInt8](repeating: 0, count: c.data), length: c.length)
    let error = try #require(throws: SafetensorsError.self) { try SafetensorsFile(url) }
    #expect(error.path == url.path)
    #expect(error.reason.contains(c.expected), "\(error)")
    #expect("\(error)" == "\(url.path): \(error.reason)")
  }

  @Test("a file cut at any byte is refused by name")
  func cuts() throws {
    let url = folder.file("whole.safetensors")
    try Safetensors.write(["a": Tensor([1.0, 2]), "b": Tensor([3, 4, 5] as [UInt8])], to: url)
    let whole = try Data(contentsOf: url)
    let cut = folder.file("cut.safetensors")
    for count in 0..<whole.count {
      try whole.prefix(count).write(to: cut)
      let error = #expect(throws: SafetensorsError.self, "cut at \(count)") { try SafetensorsFile(cut) }
      #expect(error?.path == cut.path)
    }
  }

  @Test("a missing file and a folder are refused by name")
  func notFiles() throws {
    let missing = folder.file("none.safetensors")
    #expect(throws: SafetensorsError(path: missing.path, reason: "No such file or directory")) {
      try SafetensorsFile(missing)
    }
    #expect(throws: SafetensorsError(path: folder.url.path, reason: "not a regular file")) {
      try SafetensorsFile(folder.url)
    }
  }
}

/// Oracle: the contents of the folder before and after.
@Suite("Atomic files")
struct AtomicFileTests {
  struct Stop: Error {}
  let folder: TemporaryFolder
  init() throws { folder = try TemporaryFolder() }

  @Test("a written file replaces the one before, and nothing else is left")
  func replaces() throws {
    let url = folder.file("a")
    try AtomicFile.write(Data([1, 2, 3]), to: url)
    try AtomicFile.write(to: url) { file in
      try file.append([4])
      try file.append([])
      try file.append([5, 6])
    }
    #expect(try [UInt8](Data(contentsOf: url)) == [4, 5, 6])
    #expect(folder.contents == ["a"])
  }

  @Test("a body that fails leaves the file before and no temporary file")
  func failingBody() throws {
    let url = folder.file("a")
    try AtomicFile.write(Data([1, 2, 3]), to: url)
    #expect(throws: Stop.self) {
      try AtomicFile.write(to: url) { file in
        try file.append([9])
        #expect(folder.contents.count == 2, "the new file is written beside the old one")
        throw Stop()
      }
    }
    #expect(try [UInt8](Data(contentsOf: url)) == [1, 2, 3])
    #expect(folder.contents == ["a"])
  }

  @Test("a place that cannot be written to is refused by name and left as it was")
  func unwritable() throws {
    let tensors = ["w": try Tensor([1.0])]
    let missing = folder.file("missing")
    let error = try #require(throws: SafetensorsError.self) {
      try Safetensors.write(tensors, to: missing.appending(path: "a.safetensors"))
    }
    #expect(error.path.hasPrefix(missing.path) && error.reason == "No such file or directory")
    #expect(folder.contents == [])

    // The rename fails: a folder stands where the file should go.
    let taken = folder.file("taken")
    try FileManager.default.createDirectory(at: taken, withIntermediateDirectories: true)
    let second = try #require(throws: SafetensorsError.self) { try Safetensors.write(tensors, to: taken) }
    #expect(second.path == taken.path)
    #expect(folder.contents == ["taken"])
    AtomicFile.syncFolder(missing)  // nothing to sync is not an error
  }
}
