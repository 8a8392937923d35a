import Foundation
import Testing
import Torch

@testable import TorchNN

/// Three linear layers with one input of 6, of sizes 4, 5 and 3, as a model builds them.
private struct Layers {
  let folder: TemporaryFolder
  let weights: [Grid]
  let biases: [Grid]
  let linears: [Linear]
  let group: LinearGroup
  let registry = ModuleRegistry()
  static let sizes = [4, 5, 3]

  init(_ dtype: DType, bias: Bool = true) throws {
    folder = try TemporaryFolder()
    weights = Self.sizes.map { Grid(noise: $0, 6, seed: UInt64(100 + $0)) }
    biases = Self.sizes.map { Grid(noise: $0, seed: UInt64(200 + $0)) }
    var tensors: [String: Tensor] = [:]
    for i in 0..<3 {
      tensors["m.\(i).weight"] = try weights[i].tensor(dtype)
      if bias { tensors["m.\(i).bias"] = try biases[i].tensor(dtype) }
    }
    let checkpoint = try folder.checkpoint(tensors)
    var linears: [Linear] = []
    for i in 0..<3 {
      linears.append(try Linear(6, Self.sizes[i], bias: bias, checkpoint.root / "m" / i, registry))
    }
    try checkpoint.finish()
    self.linears = linears
    group = registry.group(linears)
  }

  /// x·(W + scale·B·A)ᵀ + b of member `i`, by loops in Double.
  func expected(
    _ i: Int, _ x: Grid, bias: Bool = true, _ adapter: (down: Grid, up: Grid, scale: Double)? = nil
  ) -> Grid {
    let rows = x.shape[0]
    var y = Grid(rows, Self.sizes[i])
    for n in 0..<rows {
      for o in 0..<Self.sizes[i] {
        y[n, o] = bias ? biases[i][o] : 0
        for k in 0..<6 {
          var w = weights[i][o, k]
          if let (down, up, scale) = adapter {
            for r in 0..<down.shape[0] { w += scale * up[o, r] * down[r, k] }
          }
          y[n, o] += x[n, k] * w
        }
      }
    }
    return y
  }
}

private func adapter(_ rank: Int, _ outSize: Int, seed: UInt64) -> (down: Grid, up: Grid) {
  (Grid(noise: rank, 6, seed: seed), Grid(noise: outSize, rank, seed: seed + 1))
}

/// Oracle: loops in Double, and layers evaluated one by one.
///
/// Float32 tolerance 5e-6: up to 6·(1 + rank) products of order 2, half a unit of 1.2e-7 each, with margin.
@Suite("Linear layers, groups and adapters")
struct LinearTests {
  let x = Grid(noise: 7, 6, seed: 90)

  @Test("a layer is x·Wᵀ + b over any leading dimensions", arguments: [true, false])
  func single(_ bias: Bool) throws {
    let layers = try Layers(.float64, bias: bias)
    for (i, linear) in layers.linears.enumerated() {
      let expected = layers.expected(i, x, bias: bias)
      try expectClose(linear(try x.tensor()), expected, absolute: 1e-13)
      let y = try linear(try x.tensor().reshape(7, 1, 6))
      try expectClose(y, Grid(expected.values, [7, 1, Layers.sizes[i]]), absolute: 1e-13)
      #expect(linear.path == "m.\(i)" && (linear.bias != nil) == bias)
      #expect(linear.inSize == 6 && linear.outSize == Layers.sizes[i])
    }
    #expect(layers.registry.linears.keys.sorted() == ["m.0", "m.1", "m.2"])
    #expect(layers.registry.parameters.count == (bias ? 6 : 3))
  }

  // Summation order may change with the width of the product: 6 addends, 2e-6 in float32.
  @Test(
    "a group equals its members side by side, before and after it has joined them", arguments: [true, false])
  func group(_ bias: Bool) throws {
    let layers = try Layers(.float32, bias: bias)
    let x = try x.tensor(.float32)
    let separate = try layers.linears.map { try $0(x) }
    let joined = try layers.group(x)
    try expectClose(joined, Grid(Tensor.cat(separate, 1)), absolute: 2e-6)
    try expectIdentical(layers.group(x), joined)
    for (linear, before) in zip(layers.linears, separate) { try expectIdentical(linear(x), before) }
  }

  @Test("joined weights are held once: the members are views of the stack")
  func stacking() throws {
    let layers = try Layers(.float32)
    let x = try x.tensor(.float32)
    _ = try layers.group(x)
    try layers.linears[1].weight.tensor.multiplyInPlace(0)
    try layers.linears[1].bias!.tensor.multiplyInPlace(0)
    let y = try layers.group(x)
    #expect(try y.narrow(1, 4, 5).contiguous().floats() == [Float](repeating: 0, count: 35))
    #expect(try y.narrow(1, 0, 4).abs().amin().item() > 0)
  }

  @Test("an adapter with B = 0 leaves the layer as it is; exact")
  func start() throws {
    let layers = try Layers(.float32)
    let x = try x.tensor(.float32)
    let (single, group) = (try layers.linears[0](x).floats(), try layers.group(x).floats())
    for (i, linear) in layers.linears.enumerated() {
      linear.adapter = LoRA(
        down: try adapter(2, 1, seed: UInt64(i)).down.tensor(.float32),
        up: try Tensor.zeros([linear.outSize, 2]),
        scale: 2)
    }
    #expect(linearRanks(layers) == [2, 2, 2])
    #expect(try layers.linears[0](x).floats() == single)
    #expect(try layers.group(x).floats() == group)
  }

  private func linearRanks(_ layers: Layers) -> [Int] { layers.linears.map { $0.adapter?.rank ?? 0 } }

  struct Case: Sendable, CustomTestStringConvertible {
    let ranks: [Int]
    let scales: [Double]
    var testDescription: String { "ranks \(ranks), scales \(scales)" }
  }
  @Test(
    "adapters on some members: dense W + scale·B·A",
    arguments: [
      Case(ranks: [2, 0, 3], scales: [2, 0, 0.5]), Case(ranks: [0, 1, 0], scales: [0, 1, 0]),
      Case(ranks: [2, 2, 2], scales: [1, 1, 1]), Case(ranks: [0, 2, 1], scales: [0, 3, 1]),
    ])
  func adapters(_ c: Case) throws {
    let layers = try Layers(.float32)
    let x32 = try x.tensor(.float32)
    let y = { try layers.group(x32) }
    var parts: [Grid] = []
    for (i, linear) in layers.linears.enumerated() {
      if c.ranks[i] == 0 {
        parts.append(layers.expected(i, x))
      } else {
        let (down, up) = adapter(c.ranks[i], linear.outSize, seed: UInt64(10 * i))
        linear.adapter = LoRA(
          down: try down.tensor(.float32), up: try up.tensor(.float32), scale: c.scales[i])
        parts.append(layers.expected(i, x, (down, up, c.scales[i])))
      }
      try expectClose(linear(x32), parts[i], absolute: 5e-6)
    }
    for (part, expected) in zip(try y().split(Layers.sizes, 1), parts) {
      try expectClose(part.contiguous(), expected, absolute: 5e-6)
    }
    let batched = try layers.group(try x32.reshape(1, 7, 6))
    try expectIdentical(batched, y().unsqueeze(0))
    for linear in layers.linears { linear.adapter = nil }
    try expectClose(y().narrow(1, 0, 4).contiguous(), layers.expected(0, x), absolute: 5e-6)
  }

  @Test("gradients of a group's adapters and input by finite differences in float64")
  func adapterGradients() throws {
    let layers = try Layers(.float64)
    let (a, c) = (adapter(2, 4, seed: 1), adapter(1, 3, seed: 5))
    try expectGradients(at: [a.down, a.up, c.down, c.up, Grid(noise: 2, 6, seed: 91)]) { p in
      layers.linears[0].adapter = LoRA(down: p[0], up: p[1], scale: 2)
      layers.linears[2].adapter = LoRA(down: p[2], up: p[3], scale: 1)
      return try layers.group(p[4]).sin().sum() + layers.linears[0](p[4]).square().sum()
    }
    #expect(layers.registry.parameters.allSatisfy { !$0.tensor.requiresGrad })
  }

  @Test("the adapter's gradient at B = 0 reaches B, and A's is 0; exact zeros")
  func gradientsAtStart() throws {
    let layers = try Layers(.float32)
    let (down, up) = (try adapter(2, 4, seed: 1).down.leaf(.float32), try Grid(4, 2).leaf(.float32))
    layers.linears[0].adapter = LoRA(down: down, up: up, scale: 2)
    try layers.group(try x.tensor(.float32)).sum().backward()
    #expect(try #require(try down.grad()).abs().amax().item() == 0)
    #expect(try #require(try up.grad()).abs().amin().item() > 0)
  }

  // d(Σy)/dW[o,k] = Σ_n x[n,k], d(Σy)/db[o] = rows: 7 float32 addends, 2e-6.
  @Test("makeTrainable: gradients reach every member of a group that was joined before")
  func trainable() throws {
    let layers = try Layers(.float32)
    let x32 = try x.tensor(.float32)
    let frozen = try layers.group(x32)
    #expect(!frozen.requiresGrad)
    try layers.registry.makeTrainable()
    let y = try layers.group(x32)
    try expectIdentical(y.detach(), frozen)
    try y.sum().backward()
    for (i, linear) in layers.linears.enumerated() {
      let expected = (0..<Layers.sizes[i]).flatMap { _ in
        (0..<6).map { k in (0..<7).reduce(0) { $0 + x[$1, k] } }
      }
      let gradient = try #require(try linear.weight.tensor.grad())
      try expectClose(gradient, Grid(expected, [Layers.sizes[i], 6]), absolute: 2e-6)
      #expect(try linear.bias!.tensor.grad()?.floats() == [Float](repeating: 7, count: Layers.sizes[i]))
    }
    let leaf = layers.linears[0].weight.tensor
    try layers.registry.makeTrainable()
    #expect(layers.linears[0].weight.tensor === leaf, "twice is once: an optimizer may hold the leaf")
    // An update of the leaf is seen by the next evaluation.
    for p in layers.registry.parameters { try p.tensor.multiplyInPlace(2) }
    try expectIdentical(layers.group(x32).detach(), frozen * 2)
  }

  @Test("bfloat16 weights made trainable: float32 leaves, bfloat16 products, float32 gradients")
  func trainableBFloat16() throws {
    let layers = try Layers(.bfloat16)
    let x16 = try x.tensor(.bfloat16)
    let before = try layers.group(x16)
    try layers.registry.makeTrainable()
    let weight = layers.linears[1].weight
    #expect(weight.tensor.dtype == .float32)
    #expect(try weight.value().dtype == .bfloat16)
    try expectClose(weight.tensor.detach(), layers.weights[1].map(roundedToBFloat16))
    let after = try layers.group(x16)
    try expectIdentical(after.detach(), before)
    try after.sum().backward()
    #expect(try weight.tensor.grad()?.dtype == .float32)
  }

  @Test("place: bfloat16 rounds every value once, back in float32 they stay rounded; exact")
  func place() throws {
    let layers = try Layers(.float32)
    let x32 = try x.tensor(.float32)
    _ = try layers.group(x32)
    try layers.registry.place(.bfloat16, .cpu)
    #expect(layers.registry.parameters.allSatisfy { $0.tensor.dtype == .bfloat16 })
    #expect(try layers.group(try x.tensor(.bfloat16)).dtype == .bfloat16)
    try layers.registry.place(.float32, .cpu)
    for (i, linear) in layers.linears.enumerated() {
      try expectClose(linear.weight.value(), layers.weights[i].map(roundedToBFloat16))
      try expectClose(linear.bias!.value(), layers.biases[i].map(roundedToBFloat16))
    }
    let parts = try Tensor.cat(try layers.linears.map { try $0(x32) }, 1)
    try expectClose(layers.group(x32), Grid(parts), absolute: 2e-6)  // summation order, as above
  }

  @Test("an adapter stays float32 and follows the dtype of its input")
  func adapterDType() throws {
    let layers = try Layers(.bfloat16)
    let (down, up) = adapter(2, 4, seed: 1)
    let leaves = (try down.leaf(.float32), try up.leaf(.float32))
    layers.linears[0].adapter = LoRA(down: leaves.0, up: leaves.1, scale: 2)
    let y = try layers.group(try x.tensor(.bfloat16))
    #expect(y.dtype == .bfloat16)
    // Bfloat16 has 8 bits: 2⁻⁸ of sums up to 25, with up to four roundings on the way.
    let expected = layers.expected(0, x, (down, up, 2))
    try expectClose(y.narrow(1, 0, 4).contiguous().detach(), expected, absolute: 0.2, relative: 0.02)
    try y.sum().backward()
    #expect(try leaves.0.grad()?.dtype == .float32 && leaves.1.grad()?.dtype == .float32)
  }
}
