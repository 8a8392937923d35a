import Foundation
import Testing

@testable import Torch
@testable import TorchNN

/// Oracle: bad input throws, and what a layer or tensor holds goes with it. Each of these once trapped, leaked or
/// gave another result.
@Suite("Regressions")
struct RegressionTests {
  let folder: TemporaryFolder
  init() throws { folder = try TemporaryFolder() }

  func refusal(_ header: String) throws -> SafetensorsError {
    let url = folder.file("bad.safetensors")
    let length = withUnsafeBytes(of: UInt64(header.utf8.count).littleEndian) { [UInt8]($0) }
    try Data(length + [UInt8](header.utf8)).write(to: url)
    return try #require(throws: SafetensorsError.self) { try SafetensorsFile(url) }
  }

  @Test("offsets at the end of Int are refused: their distance from the file's start overflows")
  func overflowingOffsets() throws {
    let error = try refusal(
      #"{"w":{"dtype":"F32","shape":[2],"data_offsets":[9223372036854775799,9223372036854775807]}}"#)
    #expect(error.reason.hasPrefix("truncated: w ends at byte 9223372036854775807"))
  }

  @Test("an empty tensor whose other sides overflow is refused")
  func emptyButHuge() throws {
    let error = try refusal(#"{"w":{"dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}}"#)
    #expect(error.reason.hasSuffix("is too large"))
    // libtorch refuses the view: its owner is released once.
    final class Owner {}
    weak var owner: Owner?
    do {
      let strong = Owner()
      owner = strong
      let memory = UnsafeMutableRawPointer.allocate(byteCount: 8, alignment: 8)
      defer { memory.deallocate() }
      #expect(throws: TorchError.self) {
        try Tensor.view(of: memory, dtype: .float32, shape: [0, 1 << 62, 4], owner: strong)
      }
      #expect(owner != nil)
    }
    #expect(owner == nil)
  }

  @Test("metadata that is not text is refused, as is a tensor of its name")
  func metadata() throws {
    #expect(try refusal(#"{"__metadata__":{"a":1}}"#).reason == "__metadata__ must map names to strings")
    #expect(throws: SafetensorsError.self) {
      try Safetensors.write(["__metadata__": Tensor([1.0])], to: folder.file("x"))
    }
    #expect(!folder.contents.contains("x"))
  }

  @Test("an empty parameter is finite")
  func emptyParameter() throws {
    #expect(try Tensor.zeros([0, 3]).allFinite())
    let checkpoint = try folder.checkpoint(["a": Tensor.zeros([0, 3])])
    #expect(try checkpoint.root.parameter("a", 0, 3).tensor.shape == [0, 3])
    try checkpoint.finish()
  }

  @Test("a reduction over everything keeps its dimensions when asked")
  func keep() throws {
    let t = try Tensor([1.0, 2, 3, 6], shape: [2, 2])
    let kept = [
      try t.sum(keep: true), try t.mean(keep: true), try t.amax(keep: true), try t.amin(keep: true),
    ]
    for (tensor, value) in zip(kept, [12.0, 3, 6, 1]) { try expectClose(tensor, Grid([value], [1, 1])) }
  }

  @Test("bytes of a conjugate are conjugated")
  func conjugate() throws {
    let z = try Tensor([1, 2] as [Float]).viewAsComplex().conj()
    #expect(try z.bytes() == Tensor([1, -2] as [Float]).bytes())
  }

  @Test("sizes that overflow, dimensions that are not there, lists of other lengths and ranks throw")
  func badInput() throws {
    #expect(throws: TorchError.self) { try Tensor([1.0], shape: [.max, 2]) }
    let t = try Tensor.zeros([2])
    for dim in [1, -2] {
      let error = try #require(throws: TorchError.self) { try t.chunk(2, dim) }
      #expect(error.operation == "chunk" && error.operands == ["float32[2]"])
    }
    let lists = try #require(throws: TorchError.self) {
      try Foreach.adamW(
        parameters: [t, t], gradients: [t], means: [t, t], squares: [t, t], steps: [t, t], learningRate: 1,
        betas: (0.9, 0.99), weightDecay: 0, epsilon: 1)
    }
    #expect(lists.operation == "adamW")
    let rank = try #require(throws: TorchError.self) { try attention(t, t, t) }
    #expect("\(rank)" == "attention(float32[2], float32[2], float32[2]): expected [B, H, S, D]")
  }

  @Test("a layer that was evaluated goes with its last reference")
  func layerFreed() throws {
    let checkpoint = try folder.checkpoint(["a.weight": Grid(noise: 2, 3, seed: 1).tensor()])
    weak var freed: Linear?
    do {
      let layer = try Linear(3, 2, bias: false, checkpoint.root / "a", ModuleRegistry())
      freed = layer
      _ = try layer(try Grid(noise: 5, 3, seed: 5).tensor())
      #expect(freed != nil)
    }
    #expect(freed == nil)
  }
}
