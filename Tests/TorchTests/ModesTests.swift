import Foundation
import Testing
import Torch

/// Oracle: what the scopes promise; a product is recorded exactly when grad mode is on, and a float32 matrix
/// product has the autocast dtype exactly when autocast is on.
@Suite("Modes: grad scopes, autocast, flush-denormal")
struct ModesTests {
  struct Stop: Error {}
  static func records() throws -> Bool { try (Grid([1], [1]).leaf() * 2).requiresGrad }
  static func matmulDType() throws -> DType {
    try Tensor.zeros([2, 2]).matmul(try Tensor.zeros([2, 2])).dtype
  }

  @Test("grad scopes nest and restore")
  func nesting() throws {
    #expect(try Self.records())
    try withoutGrad { () throws in
      #expect(try !Self.records())
      try withGrad { () throws in
        #expect(try Self.records())
        try withoutGrad { () throws in #expect(try !Self.records()) }
        #expect(try Self.records())
      }
      #expect(try !Self.records())
    }
    #expect(try Self.records())
    #expect(withoutGrad { 7 } == 7)
  }

  @Test("grad scopes restore when the body throws, and pass its error on")
  func gradThrows() throws {
    #expect(throws: Stop.self) { try withoutGrad { throw Stop() } }
    #expect(try Self.records())
    try withoutGrad { () throws in
      #expect(throws: Stop.self) { try withGrad { throw Stop() } }
      #expect(try !Self.records())
    }
  }

  @Test("grad mode belongs to its thread")
  func gradPerThread() throws {
    try withoutGrad { () throws in #expect(try onFreshThread { try Self.records() }) }
    let other = try onFreshThread { try withoutGrad { try Self.records() } }
    #expect(try !other && Self.records())
  }

  @Test("autocast changes matrix products inside only, nests, and keeps weights as they are")
  func autocast() throws {
    let product = try withAutocast(.bfloat16) { () -> DType in
      let inner = try withAutocast(.float16) { try Self.matmulDType() }
      #expect(inner == .float16)
      #expect(try Tensor([Float(1)]).exp().dtype == .float32)
      return try Self.matmulDType()
    }
    #expect(product == .bfloat16)
    #expect(try Self.matmulDType() == .float32)
  }

  @Test("autocast gives the product of the rounded factors: exact where the sums are exact")
  func autocastValue() throws {
    // 257 needs nine bits: bfloat16 holds 256. The product 256·1 + 2·3 = 262 is held as 262.
    let a = try Tensor([257, 2] as [Float], shape: [1, 2])
    let b = try Tensor([1, 3] as [Float], shape: [2, 1])
    #expect(try a.matmul(b).item() == 263)
    #expect(try withAutocast(.bfloat16) { try a.matmul(b).item() } == 262)
  }

  @Test("autocast restores when the body throws")
  func autocastThrows() throws {
    #expect(throws: Stop.self) { try withAutocast(.bfloat16) { throw Stop() } }
    #expect(try Self.matmulDType() == .float32)
    try withAutocast(.bfloat16) { () throws in
      #expect(throws: Stop.self) { try withAutocast(.float16) { throw Stop() } }
      #expect(try Self.matmulDType() == .bfloat16)
    }
  }

  @Test("autocast belongs to its thread")
  func autocastPerThread() throws {
    try withAutocast(.bfloat16) { () throws in
      #expect(try onFreshThread { try Self.matmulDType() } == .float32)
    }
  }

  // A product below the smallest normal float is 0 when flushed, a denormal by IEEE 754. Bit patterns are
  // compared: a comparison of floats on this thread would take a denormal for 0.
  @Test("every thread that enters the library flushes denormals", arguments: [1, 1.5])
  func flushDenormal(_ factor: Float) throws {
    let (before, after) = try onFreshThread { () throws -> (UInt32, UInt32) in
      // A thread inherits the mode of the one that made it: set the C default, FE_DFL_ENV, to see it change.
      fesetenv(UnsafePointer(bitPattern: -1))
      let small = Float.leastNormalMagnitude * factor
      let before = (small * 0.25).bitPattern
      return (before, try (Tensor([small]) * 0.25).floats()[0].bitPattern)
    }
    #expect(before != 0, "control: without the library denormals are kept")
    #expect(after == 0)
  }
}
