import Foundation
import Testing

@testable import Torch
@testable import TorchNN

/// Oracle: the files put in the folder; every message is compared whole.
@Suite("Checkpoints")
struct CheckpointTests {
  let folder: TemporaryFolder
  init() throws { folder = try TemporaryFolder() }

  @Test("everything that does not fit is listed at once: missing, misshapen, unknown, NaN")
  func problems() throws {
    let checkpoint = try folder.checkpoint([
      "good.weight": Tensor([1.0, 2]), "wide.weight": Tensor([1.0, 2, 3]), "extra.b": Tensor([1.0]),
      "extra.a": Tensor([1.0]), "sick.weight": Tensor([1, .nan] as [Float]),
      "sick.bias": Tensor([-Double.infinity]),
    ])
    let root = checkpoint.root
    #expect(try (root / "good").parameter("weight", 2).value().doubles() == [1, 2])
    let missing = try (root / "gone").parameter("weight", 2, 3)
    #expect(missing.key == "gone.weight" && missing.tensor.shape == [2, 3])
    #expect(try (root / "wide").parameter("weight", 2, 2).tensor.shape == [2, 2])
    _ = try (root / "sick").parameter("weight", 2)
    _ = try (root / "sick").parameter("bias", 1)
    let error = try #require(throws: CheckpointError.self) { try checkpoint.finish() }
    #expect(
      error
        == CheckpointError(
          path: folder.url.path,
          problems: [
            "1 parameters not set (gone.weight)",
            "1 parameters of another shape (wide.weight: expected [2, 2], got [3])",
            "2 keys not used (extra.a, extra.b)",
            "2 parameters with NaN or infinite values (sick.weight, sick.bias)",
          ]))
    #expect("\(error)" == "\(folder.url.path): \(error.problems.joined(separator: "; "))")
    let rest = try #require(throws: CheckpointError.self) { try checkpoint.finish { $0.hasPrefix("extra.") } }
    #expect(rest.problems == error.problems.filter { !$0.hasPrefix("2 keys") })
  }

  @Test("a long list is cut at twelve and still counted")
  func longList() throws {
    let names = (10..<25).map { "k\($0)" }
    let checkpoint = try folder.checkpoint(
      Dictionary(uniqueKeysWithValues: try names.map { ($0, try Tensor([1.0])) }))
    let error = try #require(throws: CheckpointError.self) { try checkpoint.finish() }
    #expect(error.problems == ["15 keys not used (\(names.prefix(12).joined(separator: ", ")), …)"])
  }

  @Test("a checkpoint used up is accepted; integers are not asked to be finite")
  func complete() throws {
    let checkpoint = try folder.checkpoint(["a.0.w": Tensor([1, 2] as [Int64])])
    let path = checkpoint.root / "a" / 0
    #expect(path.prefix == "a.0" && path.key("w") == "a.0.w" && path.contains("w") && !path.contains("v"))
    #expect(checkpoint.contains("a.0.w") && checkpoint.keys == ["a.0.w"])
    #expect(try path.parameter("w", 2).value().int64s() == [1, 2])
    try checkpoint.finish()
  }

  @Test("parameters go to the dtype asked for and leave the file behind; integers keep theirs")
  func placed() throws {
    let url = folder.file("model.safetensors")
    try Safetensors.write(
      ["w": try Tensor([1.0, 1 / 3.0]), "h": try Tensor([Float(2), 3]), "n": try Tensor([7] as [Int64])],
      to: url)
    let root = try Checkpoint(folder: folder.url, dtype: .float32).root
    let (w, h) = (try root.parameter("w", 2).tensor, try root.parameter("h", 2).tensor)
    #expect(w.dtype == .float32 && h.dtype == .float32)
    #expect(try root.parameter("n", 1).tensor.dtype == .int64)
    // Copies, also where the dtype is the file's own: what becomes of the file does not reach them.
    let file = try FileHandle(forWritingTo: url)
    try file.seek(toOffset: 0)
    try file.write(contentsOf: Data(repeating: 255, count: try Data(contentsOf: url).count))
    try file.close()
    #expect(try w.floats() == [1, 1 / 3] && h.floats() == [2, 3])
  }

  @Test("missing shards are listed; a pickle is named with the way to convert it")
  func absent() throws {
    let index = #"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#
    try Data(index.utf8).write(to: folder.file("model.safetensors.index.json"))
    try Safetensors.write(["a": try Tensor([1.0])], to: folder.file("m-1.safetensors"))
    let missing = try #require(throws: CheckpointError.self) { try Checkpoint(folder: folder.url) }
    #expect(missing.problems == ["1 of 2 shards are missing (m-2.safetensors): fetch them"])
    let other = try TemporaryFolder()
    try Data("x".utf8).write(to: other.file("pytorch_model.bin"))
    let pickle = try #require(throws: CheckpointError.self) {
      try Checkpoint(folder: other.url, names: ["model"])
    }
    #expect(pickle.problems[0].contains("pytorch_model.bin is a pickle"))
    #expect(pickle.problems[0].contains("chunkgrpo convert \(other.file("pytorch_model.bin").path) "))
    #expect(pickle.problems[0].hasSuffix(" \(other.file("model.safetensors").path)"))
  }

  @Test("a blueprint reports misfits as files do, and its parameters take no memory")
  func blueprint() throws {
    let source = folder.file("list.json")
    let checkpoint = Checkpoint(
      shapes: ["huge.weight": [1 << 20, 1 << 20], "scale": [], "wide": [3], "extra": [1]], source: source)
    let root = checkpoint.root
    let huge = try (root / "huge").parameter("weight", 1 << 20, 1 << 20)  // 4 TiB, were it allocated
    #expect(huge.tensor.shape == [1 << 20, 1 << 20])
    #expect(try huge.tensor[12345][678].item() == 0)
    #expect(try root.parameter("scale").tensor.shape == [])
    for key in ["wide", "gone"] { #expect(try root.parameter(key, 2).tensor.shape == [2]) }
    #expect(
      throws: CheckpointError(
        path: source.path,
        problems: [
          "1 parameters not set (gone)", "1 parameters of another shape (wide: expected [2], got [3])",
          "1 keys not used (extra)",
        ])
    ) { try checkpoint.finish() }
  }

  @Test("the first name that exists is taken; none is an error naming all")
  func names() throws {
    try Safetensors.write(["b": Tensor([1.0])], to: folder.file("model.safetensors"))
    #expect(try Checkpoint(folder: folder.url).keys == ["b"])
    try Safetensors.write(["a": Tensor([1.0])], to: folder.file("diffusion_pytorch_model.safetensors"))
    #expect(try Checkpoint(folder: folder.url).keys == ["a"])
    #expect(
      throws: CheckpointError(
        path: folder.url.path,
        problems: [
          "no weights: expected x.safetensors or y.safetensors, or the same with .index.json and shards"
        ])
    ) { try Checkpoint(folder: folder.url, names: ["x", "y"]) }
  }

  @Test("a published sharded model: every key of the index, with the tensor its shard holds")
  func sharded() throws {
    let url = URL(filePath: #filePath).deletingLastPathComponent()
      .appending(path: "../Fixtures/parity/flux-tiny/transformer").standardized
    let index = try JSONSerialization.jsonObject(
      with: Data(contentsOf: url.appending(path: "diffusion_pytorch_model.safetensors.index.json")))
    let map = try #require((index as? [String: Any])?["weight_map"] as? [String: String])
    #expect(Set(map.values).count == 2)
    let checkpoint = try Checkpoint(folder: url)
    #expect(checkpoint.keys == map.keys.sorted())
    let shards = try Dictionary(
      uniqueKeysWithValues: Set(map.values).map { ($0, try SafetensorsFile(url.appending(path: $0))) })
    for (key, shard) in map {
      let expected = try shards[shard]!.require(key)
      try expectIdentical(checkpoint.take(key, shape: expected.shape), expected)
    }
    try checkpoint.finish()
  }

  @Test("shards report missing, unknown, misshapen and NaN keys together; keys beside the index are unknown")
  func shardedProblems() throws {
    try Safetensors.write(["a": Tensor([1.0]), "b": Tensor([Double.nan])], to: folder.file("1.safetensors"))
    try Safetensors.write(["c": Tensor([1.0, 2]), "stray": Tensor([1.0])], to: folder.file("2.safetensors"))
    try writeIndex(#"{"weight_map": {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}"#)
    let checkpoint = try Checkpoint(folder: folder.url)
    #expect(checkpoint.keys == ["a", "b", "c", "stray"])
    for key in ["b", "c", "d"] { _ = try checkpoint.root.parameter(key, 1) }
    let error = try #require(throws: CheckpointError.self) { try checkpoint.finish() }
    #expect(
      error.problems == [
        "1 parameters not set (d)", "1 parameters of another shape (c: expected [1], got [2])",
        "2 keys not used (a, stray)", "1 parameters with NaN or infinite values (b)",
      ])
  }

  func writeIndex(_ text: String) throws {
    try Data(text.utf8).write(to: folder.file("model.safetensors.index.json"))
  }

  @Test("an index that is none, names a missing shard or a key its shard does not hold is refused by name")
  func badIndex() throws {
    let path = folder.file("model.safetensors.index.json").path
    for text in ["", "[]", "{}", #"{"weight_map": {"a": 1}}"#, #"{"weight_map": ["a"]}"#] {
      try writeIndex(text)
      #expect(
        throws: CheckpointError(path: path, problems: ["not a safetensors index: needs an object weight_map"])
      ) { try Checkpoint(folder: folder.url) }
    }
    try writeIndex(#"{"weight_map": {"a": "1.safetensors"}}"#)
    let shard = folder.file("1.safetensors")
    #expect(
      throws: CheckpointError(
        path: path, problems: ["1 of 1 shards are missing (1.safetensors): fetch them"])
    ) { try Checkpoint(folder: folder.url) }
    try Safetensors.write(["b": Tensor([1.0])], to: shard)
    #expect(
      throws: CheckpointError(
        path: path,
        problems: [
          "the index places a in 1.safetensors, which does not hold it: fetch both again, of one revision"
        ])
    ) { try Checkpoint(folder: folder.url) }
  }
}
