import Foundation
import Testing
import Torch

@testable import TorchNN

/// A body that cannot go on.
private struct Broken: Error, CustomStringConvertible { var description: String { "no more of this" } }

/// Counts from closures.
private final class Counter: @unchecked Sendable {
  var count = 0
  var notes: [String] = []
}

/// Oracle: the same computation with everything kept, bit for bit: the kernels and their order are the same.
@Suite("Activation checkpointing")
struct CheckpointingTests {
  /// Leaves of a small network, and the network: two blocks with weights of their own. A leaf of several
  /// bodies would have its gradient summed body by body instead of all at once, which rounds differently.
  private struct Net {
    let x, w, b, w2: Tensor
    init(input: Bool = true) throws {
      x = try Grid(noise: 5, 8, seed: 1).tensor(.float32)
      try x.setRequiresGrad(input)
      w = try Grid(noise: 8, 8, seed: 2).leaf(.float32)
      b = try Grid(noise: 8, seed: 3).leaf(.float32)
      w2 = try Grid(noise: 8, 8, seed: 4).leaf(.float32)
    }
    func block(_ x: Tensor) throws -> Tensor {
      try x + x.layerNorm(eps: 1e-5).linear(w, b).silu().linear(w).gelu(tanhApproximation: true)
    }
    func second(_ x: Tensor) throws -> Tensor { try x * x.linear(w2).sigmoid() + x.linear(w2) }
    func gradients() throws -> [[UInt8]?] { try [x, w, b, w2].map { try $0.grad()?.bytes() } }
  }

  @Test("outputs and gradients of input and captured leaves", arguments: [true, false])
  func equal(_ input: Bool) throws {
    let plain = try Net(input: input)
    let expected = try plain.second(plain.block(plain.x))
    try expected.sin().sum().backward()
    let net = try Net(input: input)
    let hidden = try checkpointed([net.x]) { [try net.block($0[0])] }
    let y = try checkpointed(hidden) { [try net.second($0[0])] }[0]
    #expect(y.requiresGrad, "also where the input needs none: a leaf inside does")
    try expectIdentical(y.detach(), expected.detach())
    try y.sin().sum().backward()
    #expect(try net.gradients() == plain.gradients())
    #expect((try net.x.grad() != nil) == input)
  }

  @Test("a body inside a body")
  func nested() throws {
    let (plain, net) = (try Net(), try Net())
    try plain.second(plain.block(plain.x)).square().sum().backward()
    let y = try checkpointed([net.x]) { t in
      let inner = try checkpointed(t) { [try net.block($0[0])] }
      return [try net.second(inner[0])]
    }
    try y[0].square().sum().backward()
    #expect(try net.gradients() == plain.gradients())
  }

  @Test("several inputs and outputs; one output unused, one of integers, one an input itself")
  func several() throws {
    let (a, b) = (try Grid(noise: 3, seed: 4).leaf(.float32), try Grid(noise: 3, seed: 5).leaf(.float32))
    let ids = try Tensor([2, 0] as [Int64])
    let outputs = try checkpointed([a, b, ids]) { t in
      [try t[0] * t[1], try t[0].exp(), try t[2].clone(), t[1]]
    }
    #expect(outputs.map(\.requiresGrad) == [true, true, false, true])
    try (outputs[0].indexSelect(0, outputs[2]).sum() + outputs[3].sum()).backward()
    // d/da = b where selected, d/db = a where selected, plus 1.
    let (va, vb) = (try a.detach().floats(), try b.detach().floats())
    #expect(try a.grad()?.floats() == [vb[0], 0, vb[2]])
    #expect(try b.grad()?.floats() == [va[0] + 1, 1, va[2] + 1])
  }

  @Test("a leaf that the body hands through stays a leaf and gets its gradient; exact")
  func handedThrough() throws {
    let net = try Net()
    let outputs = try checkpointed([net.x]) { [try $0[0].linear(net.w), net.w] }
    #expect(outputs[1].requiresGrad && outputs[1] !== net.w)
    try (outputs[1].sum() * 3).backward()
    #expect(try net.w.grad()?.floats() == [Float](repeating: 3, count: 64))
    try (net.w.sum() * 2).backward()
    #expect(try net.w.grad()?.floats() == [Float](repeating: 5, count: 64))
    #expect(try net.x.grad() == nil)
  }

  @Test("without gradient mode the body runs once and nothing is kept")
  func noGrad() throws {
    let net = try Net()
    let runs = Counter()
    let y = try withoutGrad {
      try checkpointed([net.x]) {
        runs.count += 1
        return [try net.block($0[0])]
      }
    }
    #expect(runs.count == 1 && !y[0].requiresGrad)
  }

  @Test("the second run has the first one's autocast and records; modes are as before afterwards")
  func modes() throws {
    let net = try Net()
    let seen = Counter()
    let y = try withAutocast(.bfloat16) {
      try checkpointed([net.x]) { t in
        let product = try t[0].linear(net.w)
        seen.notes.append("\(product.dtype) \(isGradEnabled)")
        return [try product.to(.float32)]
      }
    }[0]
    try y.sum().backward()
    #expect(seen.notes == ["bfloat16 false", "bfloat16 true"])
    #expect(try net.x.linear(net.w).dtype == .float32 && isGradEnabled)
    let plain = try Net()
    try withAutocast(.bfloat16) { try plain.x.linear(plain.w).to(.float32).sum().backward() }
    #expect(try net.w.grad()?.bytes() == plain.w.grad()?.bytes())
  }

  @Test("on the CPU the body runs again on the thread of backward()")
  func threads() throws {
    let net = try Net()
    let seen = Counter()
    let y = try checkpointed([net.x]) { t in
      seen.notes.append("\(Thread.current.hash)")
      return [try net.block(t[0])]
    }[0].sum()
    let other = try onFreshThread {
      try y.backward()
      return "\(Thread.current.hash)"
    }
    #expect(seen.notes.count == 2 && seen.notes[1] == other && seen.notes[0] != other)
    let plain = try Net()
    try plain.block(plain.x).sum().backward()
    #expect(try net.gradients() == plain.gradients())
  }

  @Test("errors: the first run's is thrown as it is, the second run's comes out of backward()")
  func errors() throws {
    let net = try Net()
    #expect(throws: Broken.self) { _ = try checkpointed([net.x]) { _ in throw Broken() } }
    let many = try #require(throws: TorchError.self) {
      _ = try checkpointed([net.x]) { t in [Tensor](repeating: t[0], count: 17) }
    }
    #expect(many.message.contains("17 tensors"))
    let runs = Counter()
    let y = try checkpointed([net.x]) { t in
      runs.count += 1
      if runs.count > 1 { throw Broken() }
      return [try net.block(t[0])]
    }[0].sum()
    let late = try #require(throws: TorchError.self) { try y.backward() }
    #expect(late.operation == "backward" && late.message == "no more of this")
    #expect(isGradEnabled)
    // An input changed in place since then would give other gradients: libtorch notices.
    let z = try checkpointed([net.x]) { [try net.block($0[0])] }[0].sum()
    try net.x.multiplyInPlace(2)
    let changed = try #require(throws: TorchError.self) { try z.backward() }
    #expect(changed.message.contains("modified by an inplace operation"))
  }
}
