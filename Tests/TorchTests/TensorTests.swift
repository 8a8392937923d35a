import Foundation
import Testing
import Torch

/// Oracle: the values put in, and IEEE 754 conversions by Swift itself.
@Suite("Tensors: creation, content, conversion, errors")
struct TensorTests {
  @Test("arrays of every scalar type come back unchanged; shape queries match")
  func roundTrips() throws {
    func check<S: TorchScalar & Equatable>(_ values: [S], _ dtype: DType) throws {
      let tensor = try Tensor(values, shape: [2, 3])
      #expect(try tensor.array(of: S.self) == values)
      #expect(tensor.dtype == dtype && S.dtype == dtype)
      #expect(try tensor.bytes() == values.withUnsafeBytes { [UInt8]($0) })
    }
    try check([1.5, -2, 0, .infinity, 1e30, -0.25] as [Float], .float32)
    try check([1.5, -2, 0, .infinity, 1e300, -0.1] as [Double], .float64)
    try check([1, -2, 0, .max, .min, 7] as [Int64], .int64)
    try check([1, -2, 0, .max, .min, 7] as [Int32], .int32)
    try check([1, 2, 0, 255, 128, 7] as [UInt8], .uint8)

    let tensor = try Tensor([Float](repeating: 0, count: 24), shape: [2, 3, 4])
    #expect(tensor.shape == [2, 3, 4] && tensor.rank == 3 && tensor.count == 24)
    #expect(tensor.size(0) == 2 && tensor.size(-1) == 4 && tensor.device == .cpu)
    #expect("\(tensor)" == "Tensor([2, 3, 4], float32, cpu)")
    #expect(try Tensor([Int64]()).shape == [0] && Tensor([3.0], shape: []).rank == 0)
    #expect("\(Device.cuda(1))" == "cuda:1")
  }

  @Test("full, zeros and arange by their definitions")
  func creation() throws {
    #expect(try Tensor.full([2, 2], 1.5, dtype: .float64).doubles() == [1.5, 1.5, 1.5, 1.5])
    #expect(try Tensor.zeros([3], dtype: .int64).int64s() == [0, 0, 0])
    let like = try Tensor.zeros(like: try Tensor([1, 2] as [Int32]))
    #expect(like.dtype == .int32 && like.shape == [2])
    #expect(try Tensor.arange(1, to: 2, by: 0.25).floats() == [1, 1.25, 1.5, 1.75])
    #expect(try Tensor.arange(to: 3, dtype: .int64).int64s() == [0, 1, 2])
  }

  @Test("sizes of element types match the bytes of a tensor of three", arguments: DType.allCases)
  func elementSizes(_ dtype: DType) throws {
    let tensor = try Tensor.zeros([3], dtype: dtype)
    #expect(try tensor.bytes().count == 3 * dtype.size)
    #expect(tensor.dtype == dtype)
    #expect(dtype.isFloatingPoint == [.float8, .float16, .bfloat16, .float32, .float64].contains(dtype))
  }

  @Test("bfloat16 keeps the upper 16 bits, nearest, ties to even; exact")
  func bfloat16Rounding() throws {
    var generator = Seeded(state: 1)
    var values: [Float] = [
      0, -0.0, 1, .infinity, -.infinity, 1.003_906_25, 1.011_718_75, -1.003_906_25,  // two ties
      1.003_906_4, .greatestFiniteMagnitude, 3.389_531_4e38, 65504,
    ]
    values += (0..<500).map { _ in Float.random(in: -1e4...1e4, using: &generator) }
    let stored = try Tensor(values).to(.bfloat16)
    #expect(
      try stored.bytes() == values.flatMap { [UInt8(bfloat16Bits($0) & 255), UInt8(bfloat16Bits($0) >> 8)] })
    let back = values.map { Float(bitPattern: UInt32(bfloat16Bits($0)) << 16) }
    #expect(try stored.floats() == back)
    #expect(try Tensor([Float.nan]).to(.bfloat16).floats()[0].isNaN)
  }

  #if arch(arm64) || os(Linux)
    @Test("float16 rounds as Swift's Float16; exact")
    func float16Rounding() throws {
      let values = Grid(noise: 500, seed: 2, in: -100...100).values.map(Float.init) + [65504, 65520, 1e9]
      #expect(try Tensor(values).to(.float16).floats() == values.map { Float(Float16($0)) })
    }
  #endif

  @Test(
    "conversions: floats truncate to integers, anything nonzero is true, the same dtype is the same tensor")
  func conversions() throws {
    let values = try Tensor([2.7, -2.7, 0, 1])
    #expect(try values.to(.int64).int64s() == [2, -2, 0, 1])
    #expect(try values.to(.bool).bytes() == [1, 1, 0, 1])
    #expect(try values.to(.float64) === values && values.to(.cpu) === values)
  }

  @Test("in-place operations change the tensor itself and are not recorded; exact in binary fractions")
  func inPlace() throws {
    let leaf = try Grid([1, 2, 3], [3]).leaf()
    try leaf.addInPlace(try Tensor([2.0, 2, 2]), alpha: 0.5)
    try leaf.multiplyInPlace(4)
    #expect(try leaf.doubles() == [8, 12, 16])
    try leaf.copy(from: try Tensor([5, 6, 7] as [Float]))
    #expect(try leaf.doubles() == [5, 6, 7])
    try leaf.sum().backward()
    #expect(try leaf.grad()?.doubles() == [1, 1, 1])
  }

  @Test("item takes one element only")
  func item() throws {
    #expect(try Tensor([2.5], shape: [1, 1]).item() == 2.5)
    let error = try #require(throws: TorchError.self) { try Tensor([1.0, 2]).item() }
    #expect(error.operation == "item" && error.operands == ["float64[2]"])
  }

  @Test("values that do not fill the shape are refused with both numbers")
  func wrongCount() throws {
    let error = try #require(throws: TorchError.self) { try Tensor([1.0, 2], shape: [3]) }
    #expect("\(error)" == "Tensor(): 2 values do not fill shape [3]")
  }

  struct Refused: Sendable, CustomTestStringConvertible {
    let operation: String
    let operands: [String]
    let body: @Sendable (_ a: Tensor, _ b: Tensor) throws -> Void
    var testDescription: String { operation }
    init(
      _ operation: String, _ operands: [String] = ["float32[2, 3]", "float64[4, 5]"],
      _ body: @escaping @Sendable (Tensor, Tensor) throws -> Void
    ) {
      (self.operation, self.operands, self.body) = (operation, operands, body)
    }
  }

  static let one = ["float32[2, 3]"]
  static let refused: [Refused] = [
    Refused("matmul") { _ = try $0.matmul($1) },
    Refused("add") { _ = try $0 + $1 },
    Refused("sub") { _ = try $0 - $1 },
    Refused("mul") { _ = try $0 * $1 },
    Refused("div") { _ = try $0 / $1 },
    Refused("maximum") { _ = try $0.maximum($1) },
    Refused("minimum") { _ = try $0.minimum($1) },
    Refused("equal") { _ = try $0.equal($1) },
    Refused("less") { _ = try $0.less($1) },
    Refused("logicalAnd") { _ = try $0.logicalAnd($1) },
    Refused("linear") { _ = try $0.linear($1) },
    Refused("layerNorm") { _ = try $0.layerNorm($1, eps: 1e-5) },
    Refused("rmsNorm") { _ = try $0.rmsNorm($1, eps: 1e-5) },
    Refused("groupNorm") { _ = try $0.groupNorm(2, $1, nil, eps: 1e-5) },
    Refused("conv2d") { _ = try $0.conv2d($1, nil) },
    Refused("attention", ["float32[2, 3]", "float64[4, 5]", "float64[4, 5]"]) {
      _ = try Tensor.attention($0, $1, $1)
    },
    Refused("addmm", ["float32[2, 3]", "float64[4, 5]", "float64[4, 5]"]) { _ = try $0.addmm($1, $1) },
    Refused("baddbmm", ["float32[2, 3]", "float64[4, 5]", "float64[4, 5]"]) { _ = try $0.baddbmm($1, $1) },
    Refused("addcmul", ["float32[2, 3]", "float32[2, 3]", "float64[4, 5]"]) {
      _ = try $0.adding(product: $0, $1)
    },
    Refused("cat") { _ = try Tensor.cat([$0, $1]) },
    Refused("stack") { _ = try Tensor.stack([$0, $1]) },
    Refused("gather") { _ = try $0.gather(0, $1) },
    Refused("indexSelect") { _ = try $0.indexSelect(0, $1) },
    Refused("copy") { try $0.copy(from: $1) },
    Refused("addInPlace") { try $0.addInPlace($1) },
    Refused("reshape", one) { a, _ in _ = try a.reshape(4, 4) },
    Refused("permute", one) { a, _ in _ = try a.permute(0, 0) },
    Refused("transpose", one) { a, _ in _ = try a.transpose(0, 2) },
    Refused("narrow", one) { a, _ in _ = try a.narrow(1, 2, 2) },
    Refused("narrow", one) { a, _ in _ = try a[1..<3] },
    Refused("narrow", one) { a, _ in _ = try a.split([2, 2], 1) },
    Refused("chunk", one) { a, _ in _ = try a.chunk(2, 1) },
    Refused("chunk", one) { a, _ in _ = try a.chunk(0, 1) },
    Refused("select", one) { a, _ in _ = try a[2] },
    Refused("unsqueeze", one) { a, _ in _ = try a.unsqueeze(5) },
    Refused("squeeze", one) { a, _ in _ = try a.squeeze(2) },
    Refused("expand", one) { a, _ in _ = try a.expand(4, 3) },
    Refused("pad", one) { a, _ in _ = try a.pad([1]) },
    Refused("sum", one) { a, _ in _ = try a.sum([2]) },
    Refused("softmax", one) { a, _ in _ = try a.softmax(2) },
    Refused("minimum", one) { a, _ in _ = try a.minimum(along: 2) },
    Refused("upsampleNearest", one) { a, _ in _ = try a.upsampleNearest(2) },
    Refused("rfft2", one) { a, _ in _ = try a.rfft2(0, 0) },
    Refused("viewAsComplex", one) { a, _ in _ = try a.viewAsComplex() },
    Refused("backward", one) { a, _ in try a.backward() },
  ]

  @Test("a refused operation names itself and every operand, in one line", arguments: refused)
  func refusals(_ c: Refused) throws {
    let a = try Tensor.zeros([2, 3])
    let b = try Tensor.zeros([4, 5], dtype: .float64)
    let error = try #require(throws: TorchError.self) { try c.body(a, b) }
    #expect(error.operation == c.operation)
    #expect(error.operands == c.operands)
    #expect(!error.message.isEmpty && !error.message.contains("\n"))
    #expect("\(error)" == "\(c.operation)(\(c.operands.joined(separator: ", "))): \(error.message)")
    #expect(try a.floats() == [0, 0, 0, 0, 0, 0], "a refused operation leaves its operands as they were")
  }

  @Test("runtime facts: a 2.x library, bfloat16 as /proc/cpuinfo says, CUDA only where there is one")
  func runtime() throws {
    #expect(TorchRuntime.version.hasPrefix("2."))
    #expect(TorchRuntime.threads >= 1)
    #if os(Linux) && arch(x86_64)
      #expect(try TorchRuntime.nativeBFloat16 == proc("cpuinfo").contains("avx512_bf16"))
    #endif
    guard !TorchRuntime.cudaAvailable else { return }
    let error = try #require(throws: TorchError.self) { try Tensor([1.0]).to(.cuda(0)) }
    #expect(error.operation == "to")
  }
}
