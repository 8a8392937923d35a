import Foundation
import Testing
import Torch

@testable import TorchNN

/// SplitMix64: the same numbers on every run.
struct Seeded: RandomNumberGenerator {
  var state: UInt64
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }
}

/// Row-major numbers with a shape: what the references of these tests compute in, in plain loops.
struct Grid: Sendable, Equatable {
  var values: [Double]
  let shape: [Int]

  init(_ values: [Double], _ shape: [Int]) {
    precondition(values.count == shape.reduce(1, *))
    (self.values, self.shape) = (values, shape)
  }
  /// Zeros.
  init(_ shape: Int...) { self.init(Array(repeating: 0, count: shape.reduce(1, *)), shape) }
  /// Uniform numbers that float32 holds exactly, so that both precisions start from the same values.
  init(noise shape: Int..., seed: UInt64, in range: ClosedRange<Double> = -1.5...1.5) {
    var generator = Seeded(state: seed)
    self.init(
      (0..<shape.reduce(1, *)).map { _ in Double(Float(Double.random(in: range, using: &generator))) }, shape)
  }
  init(_ tensor: Tensor) throws { self.init(try tensor.doubles(), tensor.shape) }

  private func place(_ index: [Int]) -> Int { zip(index, shape).reduce(0) { $0 * $1.1 + $1.0 } }
  subscript(_ index: Int...) -> Double {
    get { values[place(index)] }
    set { values[place(index)] = newValue }
  }
  func tensor(_ dtype: DType = .float64) throws -> Tensor { try Tensor(values, shape: shape).to(dtype) }
  func leaf(_ dtype: DType = .float64) throws -> Tensor {
    let tensor = try tensor(dtype)
    try tensor.setRequiresGrad(true)
    return tensor
  }
  func map(_ f: (Double) -> Double) -> Grid { Grid(values.map(f), shape) }
}

/// Fails unless the two agree within `absolute` + `relative`·|expected|, shape included.
func expectClose(
  _ got: Tensor, _ expected: Grid, absolute: Double = 0, relative: Double = 0,
  _ what: @autoclosure () -> String = "", sourceLocation: SourceLocation = #_sourceLocation
) throws {
  #expect(got.shape == expected.shape, "\(what()) shape", sourceLocation: sourceLocation)
  for (i, (g, e)) in zip(try got.doubles(), expected.values).enumerated()
  where !(abs(g - e) <= absolute + relative * abs(e)) {
    Issue.record("\(what()) [\(i)]: got \(g), expected \(e)", sourceLocation: sourceLocation)
  }
}

/// Fails unless dtype, shape and every bit agree.
func expectIdentical(
  _ got: Tensor, _ expected: Tensor, sourceLocation: SourceLocation = #_sourceLocation
) throws {
  #expect(got.dtype == expected.dtype, sourceLocation: sourceLocation)
  #expect(got.shape == expected.shape, sourceLocation: sourceLocation)
  #expect(try got.bytes() == expected.bytes(), sourceLocation: sourceLocation)
}

/// Compares back-propagated gradients of a scalar `function` with central differences in float64.
///
/// A step of 1e-5 leaves h²·f‴/6 ≈ 1e-10 of truncation and ε·|f|/h ≈ 1e-10 of rounding: 2e-8 holds both.
func expectGradients(
  at points: [Grid], tolerance: Double = 2e-8, sourceLocation: SourceLocation = #_sourceLocation,
  of function: ([Tensor]) throws -> Tensor
) throws {
  let leaves = try points.map { try $0.leaf() }
  try function(leaves).backward()
  let step = 1e-5
  for (k, leaf) in leaves.enumerated() {
    var expected = points[k]
    for i in points[k].values.indices {
      func value(_ shift: Double) throws -> Double {
        var moved = points
        moved[k].values[i] += shift
        return try withoutGrad { try function(try moved.map { try $0.tensor() }).item() }
      }
      expected.values[i] = (try value(step) - value(-step)) / (2 * step)
    }
    let gradient = try #require(try leaf.grad(), "no gradient for input \(k)", sourceLocation: sourceLocation)
    try expectClose(
      gradient, expected, absolute: tolerance, relative: tolerance, "input \(k)",
      sourceLocation: sourceLocation)
  }
}

/// A folder that goes with the test.
final class TemporaryFolder {
  let url: URL
  init() throws {
    url = FileManager.default.temporaryDirectory.appending(path: "torch-tests-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
  }
  deinit { try? FileManager.default.removeItem(at: url) }
  func file(_ name: String) -> URL { url.appending(path: name) }
  var contents: [String] { (try? FileManager.default.contentsOfDirectory(atPath: url.path).sorted()) ?? [] }

  /// A checkpoint of these tensors.
  func checkpoint(_ tensors: [String: Tensor]) throws -> Checkpoint {
    try Safetensors.write(tensors, to: file("model.safetensors"))
    return try Checkpoint(folder: url)
  }
}

private final class Box<R>: @unchecked Sendable { var result: Result<R, any Error>? }
/// Runs `body` on a thread that has never seen libtorch.
func onFreshThread<R: Sendable>(_ body: @escaping @Sendable () throws -> R) throws -> R {
  let box = Box<R>()
  let done = DispatchSemaphore(value: 0)
  Thread {
    box.result = Result { try body() }
    done.signal()
  }.start()
  done.wait()
  return try box.result!.get()
}

/// Upper 16 bits of a finite float, nearest with ties to even: bfloat16 by its definition.
func bfloat16Bits(_ value: Float) -> UInt16 {
  let bits = value.bitPattern
  return UInt16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
}
func roundedToBFloat16(_ value: Double) -> Double {
  Double(Float(bitPattern: UInt32(bfloat16Bits(Float(value))) << 16))
}

#if os(Linux)
  /// A file of /proc: its size is unknown beforehand, which `String(contentsOfFile:)` takes for one page.
  func proc(_ name: String) throws -> String {
    let file = try FileHandle(forReadingFrom: URL(filePath: "/proc/\(name)"))
    return String(decoding: try file.readToEnd() ?? Data(), as: UTF8.self)
  }
#endif
