import Foundation
import Testing
import Torch

@testable import TorchNN

/// How far results may be from the plain form in float64, as a relative 2-norm.
///
/// float32: sums of some hundred products, each 6e-8 off at most: 2e-6 with room for cancellation in norms.
/// bfloat16: inputs are exact in both; every result is rounded to 2⁻⁹ = 0.002 once, gradients pass through two or three
/// rounded intermediates (probabilities, their gradients).
private struct Precision: Sendable, CustomTestStringConvertible {
  let dtype: DType
  let output, gradient: Double
  var testDescription: String { "\(dtype)" }
  static let both = [
    Precision(dtype: .float32, output: 2e-6, gradient: 5e-6),
    Precision(dtype: .bfloat16, output: 4e-3, gradient: 8e-3),
  ]
}

private func relative(_ got: Tensor, _ expected: Tensor) throws -> Double {
  let difference = try (got.to(.float64) - expected.to(.float64)).square().sum().item()
  return try (difference / max(expected.to(.float64).square().sum().item(), 1e-30)).squareRoot()
}

/// Runs `fused` in `precision` and `plain` in float64 on the same numbers; compares outputs and all gradients.
private func compare(
  _ precision: Precision, _ inputs: [Grid], fused: ([Tensor]) throws -> [Tensor],
  plain: ([Tensor]) throws -> [Tensor], sourceLocation: SourceLocation = #_sourceLocation
) throws {
  let ours = try inputs.map { try $0.tensor(precision.dtype) }
  let reference = try ours.map { try $0.to(.float64).clone() }
  for tensor in ours + reference { try tensor.setRequiresGrad(true) }
  let (got, expected) = (try fused(ours), try plain(reference))
  #expect(got.count == expected.count)
  var losses: (ours: Tensor?, reference: Tensor?)
  for (i, (g, e)) in zip(got, expected).enumerated() {
    #expect(g.dtype == precision.dtype && g.shape == e.shape, sourceLocation: sourceLocation)
    let error = try relative(g, e)
    #expect(error < precision.output, "output \(i)", sourceLocation: sourceLocation)
    // A weight of its own for every element, the same on both sides.
    let weights = try Grid(noise: e.count, seed: UInt64(900 + i)).tensor(precision.dtype).reshape(e.shape)
    let terms = (try (g.to(.float32) * weights.to(.float32)).sum(), try (e * weights.to(.float64)).sum())
    losses = (
      try losses.ours.map { try $0 + terms.0 } ?? terms.0,
      try losses.reference.map { try $0 + terms.1 } ?? terms.1
    )
  }
  try losses.ours?.backward()
  try losses.reference?.backward()
  for (i, (g, e)) in zip(ours, reference).enumerated() {
    let error = try relative(try #require(try g.grad()), try #require(try e.grad()))
    #expect(error < precision.gradient, "gradient of input \(i)", sourceLocation: sourceLocation)
  }
}

/// Oracle: the plain operations of libtorch in float64, which other suites compare with loops.
@Suite("Fused operations against their plain forms")
struct FusedTests {
  /// Samples, tokens, width: one task a sample, several tasks a sample, rows that end in a vector's middle.
  static let shapes = [[3, 5, 24], [20, 7, 128], [1, 100, 130], [2, 33, 16]]

  @Test("modulated layer norm", arguments: Precision.both, shapes)
  private func modulatedNorm(_ precision: Precision, _ s: [Int]) throws {
    let inputs = [
      Grid(noise: s[0], s[1], s[2], seed: 1), Grid(noise: s[0], 1, s[2], seed: 2),
      Grid(noise: s[0], 1, s[2], seed: 3),
    ]
    try compare(precision, inputs) { t in
      [try t[0].modulatedNorm(shift: t[1], scale: t[2], eps: 1e-6)]
    } plain: { t in
      [try t[0].layerNorm(eps: 1e-6) * (t[2] + 1) + t[1]]
    }
  }

  @Test("gated addition, also of a gate that is a view", arguments: Precision.both, shapes)
  private func gatedAddition(_ precision: Precision, _ s: [Int]) throws {
    let inputs = [
      Grid(noise: s[0], s[1], s[2], seed: 4), Grid(noise: s[0], 1, 3 * s[2], seed: 5),
      Grid(noise: s[0], s[1], s[2], seed: 6),
    ]
    func gate(_ t: Tensor) throws -> Tensor { try t.narrow(-1, s[2], s[2]) }
    try compare(precision, inputs) { t in
      [try t[0].adding(gate: try gate(t[1]), t[2])]
    } plain: { t in
      [try t[0] + gate(t[1]) * t[2]]
    }
  }

  @Test("tanh-GELU", arguments: Precision.both)
  private func gelu(_ precision: Precision) throws {
    let x = Grid(noise: 3, 50, 131, seed: 7, in: -6...6)
    try compare(precision, [x]) { t in
      [try t[0].gelu(tanhApproximation: true)]
    } plain: { t in
      let u = try (t[0] + t[0] * t[0] * t[0] * 0.044715) * (2 / Double.pi).squareRoot()
      // tanh u = 2·sigmoid(2u) − 1, and x·sigmoid(y) by silu.
      return [try t[0] * ((u * -2).exp() + 1).reciprocal()]
    }
  }

  @Test("tanh-GELU's ends: x above, 0 below, NaN stays", arguments: [DType.float32, .bfloat16])
  func geluEnds(_ dtype: DType) throws {
    let x = try Tensor([-1e30, -100, -20, 0, 20, 100, 1e30, .nan] as [Double], shape: [8]).to(dtype)
    let y = try x.gelu(tanhApproximation: true).doubles()
    let expected = try x.doubles()
    for i in 0..<4 { #expect(abs(y[i]) < 1e-6, "\(y[i])") }
    for i in 4..<7 { #expect(y[i] == expected[i]) }
    #expect(y[7].isNaN)
  }

  struct Attention: Sendable, CustomTestStringConvertible {
    let streams: [(tokens: Int, tail: Int)]
    var normed = true
    var rotated = true
    var heads = 2
    var size = 32
    var batch = 2
    var testDescription: String {
      "\(streams.map { "\($0.tokens)+\($0.tail)" }) \(heads)×\(size)\(normed ? " normed" : "")\(rotated ? " rotated" : "")"
    }
    /// q, k, v by stream, gains by stream, in turn.
    var inputs: [Grid] {
      var result = streams.enumerated().map { i, s in
        Grid(noise: batch, s.tokens, 3 * heads * size + s.tail, seed: UInt64(20 + i))
      }
      if normed { for i in streams.indices { result.append(Grid(noise: 2, size, seed: UInt64(40 + i))) } }
      return result
    }
    /// Cosines and sines of angles that grow with token and pair.
    func rotation() throws -> Tensor {
      let tokens = streams.reduce(0) { $0 + $1.tokens }
      var values: [Float] = []
      for t in 0..<tokens {
        for i in 0..<size / 2 {
          let angle = Double(t) / pow(100, Double(2 * i) / Double(size))
          values += [Float(cos(angle)), Float(sin(angle))]
        }
      }
      return try Tensor(values, shape: [tokens, size])
    }
    func fused(_ t: [Tensor]) throws -> [Tensor] {
      try Tensor.jointAttention(
        Array(t[..<streams.count]), gains: Array(t[streams.count...]),
        rotation: rotated ? try rotation() : nil,
        heads: heads, headSize: size, eps: 1e-6)
    }
    func plain(_ t: [Tensor]) throws -> [Tensor] {
      let width = heads * size
      var (q, k, v): ([Tensor], [Tensor], [Tensor]) = ([], [], [])
      for (i, s) in streams.enumerated() {
        func part(_ n: Int) throws -> Tensor {
          let x = try t[i].narrow(-1, n * width, width).reshape(batch, s.tokens, heads, size)
          guard normed, n < 2 else { return x }
          let rms = try (x.square().mean([-1]).unsqueeze(-1) + 1e-6).sqrt()
          return try x / rms * t[streams.count + i][n]
        }
        q.append(try part(0))
        k.append(try part(1))
        v.append(try part(2))
      }
      func turned(_ parts: [Tensor]) throws -> Tensor {
        var x = try Tensor.cat(parts, 1)
        if rotated {
          let s = x.shape
          let angles = try rotation().to(.float64).reshape(s[1], 1, size / 2, 2)
          let pairs = try x.reshape(s[0], s[1], heads, size / 2, 2)
          let (a, b) = (try pairs.narrow(-1, 0, 1), try pairs.narrow(-1, 1, 1))
          let (c, d) = (try angles.narrow(-1, 0, 1), try angles.narrow(-1, 1, 1))
          x = try Tensor.cat([try a * c - b * d, try a * d + b * c], -1).reshape(s)
        }
        return try x.transpose(1, 2)
      }
      let scores = try turned(q).matmul(try turned(k).transpose(2, 3)) * (1 / Double(size).squareRoot())
      let mixed = try scores.softmax(-1).matmul(try Tensor.cat(v, 1).transpose(1, 2)).transpose(1, 2)
      var (start, outputs): (Int, [Tensor]) = (0, [])
      for (i, s) in streams.enumerated() {
        let part = try mixed.narrow(1, start, s.tokens).reshape(batch, s.tokens, width)
        start += s.tokens
        guard s.tail > 0 else {
          outputs.append(part)
          continue
        }
        let tail = try t[i].narrow(-1, 3 * width, s.tail)
        let u = try (tail + tail * tail * tail * 0.044715) * (2 / Double.pi).squareRoot()
        outputs.append(try Tensor.cat([part, try tail * ((u * -2).exp() + 1).reciprocal()], -1))
      }
      return outputs
    }
  }
  static let attentions = [
    Attention(streams: [(88, 48)]),
    Attention(streams: [(24, 0), (64, 0)]),
    Attention(streams: [(9, 0), (24, 7)], normed: false, rotated: false, size: 16),
    Attention(streams: [(1, 0), (2, 0)], heads: 3, size: 6, batch: 1),
    Attention(streams: [(31, 5)], rotated: false, heads: 1, size: 64),
    Attention(streams: [(33, 0), (17, 0)], normed: false, heads: 1, size: 128),
    Attention(streams: [(40, 0), (230, 3)], heads: 1, batch: 1),  // three blocks of queries
  ]

  @Test("joint attention", arguments: Precision.both, attentions)
  private func attention(_ precision: Precision, _ a: Attention) throws {
    guard Tensor.fusesAttention(precision.dtype) else { return }
    try compare(precision, a.inputs, fused: a.fused, plain: a.plain)
  }

  @Test("results do not depend on the number of threads or on the other samples of a batch")
  func determinism() throws {
    guard Tensor.fusesAttention(.bfloat16) else { return }
    let a = Attention(streams: [(24, 0), (40, 8)], heads: 4, batch: 6)
    let x = try a.inputs.map { try $0.tensor(.bfloat16) }
    func run(_ x: [Tensor]) throws -> [Tensor] {
      let leaves = try x.map { try $0.clone() }
      for leaf in leaves { try leaf.setRequiresGrad(true) }
      let outputs = try a.fused(leaves)
      try outputs.map { try $0.to(.float32).square().sum() }.reduce(try Tensor.zeros([])) { try $0 + $1 }
        .backward()
      return try outputs.map { try $0.detach() } + leaves.map { try #require(try $0.grad()) }
    }
    let threads = TorchRuntime.threads
    defer { try? TorchRuntime.setThreads(threads) }
    try TorchRuntime.setThreads(1)
    let one = try run(x)
    try TorchRuntime.setThreads(2)
    let two = try run(x)
    for (a, b) in zip(one, two) { try expectIdentical(a, b) }
    // Samples 2 and 3 alone; gains are shared, their gradients are not compared.
    let few = try run(try x[..<2].map { try $0.narrow(0, 2, 2) } + x[2...])
    for i in [0, 1, 2, 3] { try expectIdentical(few[i], try two[i].narrow(0, 2, 2).contiguous()) }
  }

  @Test("a NaN among the tokens reaches every output of its sample, none of another")
  func notANumber() throws {
    guard Tensor.fusesAttention(.bfloat16) else { return }
    let a = Attention(streams: [(20, 0)])
    var inputs = a.inputs
    inputs[0][1, 3, 70] = .nan  // a key of sample 1, head 0
    let y = try a.fused(try inputs.map { try $0.tensor(.bfloat16) })[0]
    #expect(try y[0].doubles().allSatisfy { !$0.isNaN })
    #expect(try y[1].narrow(-1, 0, 32).doubles().allSatisfy(\.isNaN))
  }

  @Test("shapes that do not fit are errors that name them")
  func errors() throws {
    let x = try Tensor.zeros([2, 3, 8])
    let wrong = try Tensor.zeros([2, 1, 4])
    #expect(throws: TorchError.self) { try x.modulatedNorm(shift: wrong, scale: wrong, eps: 1e-6) }
    #expect(throws: TorchError.self) { try x.adding(gate: wrong, x) }
    #expect(throws: TorchError.self) {
      try Tensor.jointAttention([x], gains: [], rotation: nil, heads: 1, headSize: 4, eps: 1e-6)
    }
    #expect(throws: TorchError.self) { try x.to(.float64).modulatedNorm(shift: x, scale: x, eps: 1e-6) }
  }
}

/// Oracle: group norm, SiLU, upsampling, convolution and sum one after the other, in float64 of the very numbers.
@Suite("Convolutions with what stands around them")
struct ConvolutionTests {
  struct Case: Sendable {
    var shape: [Int]  // B, C, H, W
    var out: Int
    var kernel = 3
    var groups = 0
    var upsampled = false
    var adds = false

    /// Input, weight, bias, gain, offset, addend.
    var inputs: [Grid] {
      let scale = shape[2...].map { upsampled ? 2 * $0 : $0 }
      let range = 1.5 / Double(shape[1] * kernel * kernel).squareRoot()
      return [
        Grid(noise: shape[0], shape[1], shape[2], shape[3], seed: 1),
        Grid(noise: out, shape[1], kernel, kernel, seed: 2, in: -range...range), Grid(noise: out, seed: 3),
        Grid(noise: shape[1], seed: 4), Grid(noise: shape[1], seed: 5),
        Grid(noise: shape[0], out, scale[0], scale[1], seed: 6),
      ]
    }
    func fused(_ t: [Tensor]) throws -> Tensor {
      let norm =
        groups > 0 ? (groups: groups, weight: t[3] as Tensor?, bias: t[4] as Tensor?, eps: 1e-6) : nil
      return try t[0].convolution(
        try t[1].packedConvolution(upsampled: upsampled), t[2], norm: norm, adding: adds ? t[5] : nil)
    }
    func plain(_ t: [Tensor]) throws -> Tensor {
      var x = t[0]
      if groups > 0 { x = try x.groupNorm(groups, t[3], t[4], eps: 1e-6).silu() }
      if upsampled { x = try x.upsampleNearest(2) }
      let y = try x.conv2d(t[1], t[2], padding: kernel / 2)
      return adds ? try y + t[5] : y
    }
  }
  static let cases = [
    Case(shape: [3, 16, 8, 8], out: 16, groups: 4, adds: true),
    Case(shape: [1, 32, 70, 64], out: 3, groups: 8),  // several bands; fewer outputs than a vector has
    Case(shape: [2, 6, 5, 7], out: 20, groups: 3),
    Case(shape: [2, 10, 1, 3], out: 70),  // two blocks of outputs
    Case(shape: [2, 16, 6, 9], out: 16, upsampled: true),
    Case(shape: [1, 130, 4, 5], out: 66, groups: 2, upsampled: true, adds: true),
    Case(shape: [2, 32, 6, 4], out: 16, kernel: 1, adds: true),
    Case(shape: [2, 16, 3, 3], out: 8, kernel: 1, groups: 8),
  ]

  // bfloat16: the normalised input, sums of weights of an upsampled input and the result are rounded to 2⁻⁹, each by
  // about a third of that on average. float32: sums of a thousand products.
  @Test("values", arguments: Precision.both, cases)
  private func values(_ precision: Precision, _ c: Case) throws {
    guard Tensor.fusesAttention(precision.dtype) else { return }
    let ours = try c.inputs.map { try $0.tensor(precision.dtype) }
    let got = try c.fused(ours)
    let expected = try c.plain(try ours.map { try $0.to(.float64) })
    #expect(got.dtype == precision.dtype && got.shape == expected.shape)
    let error = try relative(got, expected)
    #expect(error < precision.output)
  }

  // The mean is 200 times the spread: one float32 sum of squares would keep two digits of the variance. What is left is
  // the rounding of x·factor + addend, both some 200: 200 · 6e-8, with room.
  @Test("statistics of numbers far from zero")
  func offset() throws {
    let c = Case(shape: [1, 16, 40, 64], out: 16, groups: 4)
    var inputs = c.inputs
    inputs[0].values = inputs[0].values.map { Double(Float(170 + $0)) }
    let t = try inputs.map { try $0.tensor(.float32) }
    guard Tensor.fusesAttention(.float32) else { return }
    let error = try relative(try c.fused(t), try c.plain(try t.map { try $0.to(.float64) }))
    #expect(error < 5e-5)
  }

  @Test(
    "neither threads nor the other images of a batch change a bit", arguments: [DType.float32, .bfloat16])
  func determinism(_ dtype: DType) throws {
    guard Tensor.fusesAttention(dtype) else { return }
    let c = Case(shape: [5, 32, 70, 64], out: 16, groups: 8, adds: true)
    let t = try c.inputs.map { try $0.tensor(dtype) }
    let threads = TorchRuntime.threads
    defer { try? TorchRuntime.setThreads(threads) }
    try TorchRuntime.setThreads(1)
    let one = try c.fused(t)
    try TorchRuntime.setThreads(2)
    try expectIdentical(try c.fused(t), one)
    let alone = try c.fused([try t[0].narrow(0, 3, 1)] + t[1...4] + [try t[5].narrow(0, 3, 1)])
    try expectIdentical(alone.contiguous(), try one.narrow(0, 3, 1).contiguous())
  }

  @Test("a layer gives gradients where they are wanted, and sees a change of its weight")
  func layer() throws {
    let folder = try TemporaryFolder()
    let c = Case(shape: [2, 16, 6, 6], out: 16, groups: 4, upsampled: true, adds: true)
    let t = try c.inputs.map { try $0.tensor(.float32) }
    let checkpoint = try folder.checkpoint([
      "c.weight": t[1], "c.bias": t[2], "n.weight": t[3], "n.bias": t[4],
    ])
    let registry = ModuleRegistry()
    let conv = try Conv2d(16, 16, kernel: 3, padding: 1, checkpoint.root / "c", registry)
    let norm = try GroupNorm(4, 16, eps: 1e-6, checkpoint.root / "n", registry)
    let expected = try c.plain(try t.map { try $0.to(.float64) })
    // As for the values above.
    let error = try relative(try conv(t[0], norm: norm, upsampled: true, adding: t[5]), expected)
    #expect(error < 2e-6)
    let leaves = try [t[0], t[5]].map { try $0.clone() }
    let copies = try [t[0], t[5]].map { try $0.to(.float64).clone() }
    for leaf in leaves + copies { try leaf.setRequiresGrad(true) }
    let wide = try t.map { try $0.to(.float64) }
    try conv(leaves[0], norm: norm, upsampled: true, adding: leaves[1]).square().sum().backward()
    try c.plain([copies[0]] + wide[1...4] + [copies[1]]).square().sum().backward()
    for (ours, theirs) in zip(leaves, copies) {
      let error = try relative(try #require(try ours.grad()), try #require(try theirs.grad()))
      #expect(error < 5e-6)
    }
    try registry.parameters[0].tensor.copy(from: try Tensor.zeros(like: t[1]))
    let after = try conv(t[0], upsampled: true)
    let bias = try t[2].reshape(1, 16, 1, 1).expand([2, 16, 12, 12]).contiguous()
    try expectIdentical(try after.contiguous(), bias)
  }

  @Test("what it does not do is an error")
  func errors() throws {
    guard Tensor.fusesAttention(.float32) else { return }
    let (x, weight) = (try Tensor.zeros([2, 4, 3, 3]), try Tensor.zeros([8, 4, 3, 3]))
    let packed = try weight.packedConvolution()
    #expect(throws: TorchError.self) { try Tensor.zeros([8, 3, 3, 3]).packedConvolution() }
    #expect(throws: TorchError.self) { try Tensor.zeros([8, 4, 1, 1]).packedConvolution(upsampled: true) }
    #expect(throws: TorchError.self) { try Tensor.zeros([2, 6, 3, 3]).convolution(packed, nil) }
    #expect(throws: TorchError.self) { try x.to(.bfloat16).convolution(packed, nil) }
    #expect(throws: TorchError.self) { try x.convolution(packed, nil, norm: (3, nil, nil, 1e-6)) }
    #expect(throws: TorchError.self) { try x.convolution(packed, nil, adding: x) }
    let leaf = try x.clone()
    try leaf.setRequiresGrad(true)
    #expect(throws: TorchError.self) { try leaf.convolution(packed, nil) }
  }
}

/// Oracle: x·(W + Σ scale·B·A)ᵀ + b in float64 of the very bfloat16 numbers.
@Suite("Adapted products of frozen bfloat16 layers")
struct PackedLinearTests {
  /// Members of a group: rows, rank (0 for none), scale.
  static let members = [(48, 4, 2.0), (300, 0, 1.0), (16, 6, 0.5)]

  private func group(in size: Int) throws -> (TemporaryFolder, ModuleRegistry, LinearGroup, [Linear]) {
    let folder = try TemporaryFolder()
    var tensors: [String: Tensor] = [:]
    for (i, (rows, _, _)) in Self.members.enumerated() {
      tensors["m.\(i).weight"] = try Grid(noise: rows, size, seed: UInt64(60 + i), in: -0.2...0.2).tensor(
        .bfloat16)
      tensors["m.\(i).bias"] = try Grid(noise: rows, seed: UInt64(70 + i)).tensor(.bfloat16)
    }
    let checkpoint = try folder.checkpoint(tensors)
    let registry = ModuleRegistry()
    let linears = try Self.members.enumerated().map { i, m in
      try Linear(size, m.0, checkpoint.root / "m" / i, registry)
    }
    for (i, (rows, rank, scale)) in Self.members.enumerated() where rank > 0 {
      // Factors that bfloat16 holds, so that the oracle sees what the product sees.
      let factors = [
        Grid(noise: rank, size, seed: UInt64(80 + i)), Grid(noise: rows, rank, seed: UInt64(90 + i)),
      ]
      let leaves = try factors.map { try $0.tensor(.bfloat16).to(.float32) }
      for leaf in leaves { try leaf.setRequiresGrad(true) }
      linears[i].adapter = LoRA(down: leaves[0], up: leaves[1], scale: scale)
    }
    return (folder, registry, registry.group(linears), linears)
  }

  /// 2⁻⁹ forward for each rounding: of the sum, of x·Aᵀ and, in layers wider than 1024, of the base's product before the
  /// adapters' is added. 8e-3 backward: g·B is rounded as well.
  @Test("values and gradients, whatever the rows of a block", arguments: [1, 63, 64, 65, 700], [32, 1056])
  func products(_ rows: Int, _ size: Int) throws {
    let (folder, _, group, linears) = try group(in: size)
    defer { withExtendedLifetime(folder) {} }
    let x = try Grid(noise: rows, size, seed: 50).tensor(.bfloat16)
    try x.setRequiresGrad(true)
    let y = try group(x)
    let reference = try x.detach().to(.float64).clone()
    try reference.setRequiresGrad(true)
    var leaves: [(ours: Tensor, reference: Tensor)] = []
    var parts: [Tensor] = []
    for linear in linears {
      var weight = try linear.weight.tensor.to(.float64)
      if let adapter = linear.adapter {
        let factors = try [adapter.down, adapter.up].map { try $0.detach().to(.float64).clone() }
        for factor in factors { try factor.setRequiresGrad(true) }
        leaves += [(adapter.down, factors[0]), (adapter.up, factors[1])]
        weight = try weight + factors[1].matmul(factors[0]) * adapter.scale
      }
      parts.append(try reference.linear(weight, try linear.bias!.tensor.to(.float64)))
    }
    let expected = try Tensor.cat(parts, -1)
    let error = try relative(y, expected)
    #expect(y.dtype == .bfloat16 && y.shape == expected.shape && error < (size > 1024 ? 6e-3 : 4e-3))
    let weights = try Grid(noise: rows, expected.size(1), seed: 51).tensor(.bfloat16)
    try (y * weights).sum().backward()
    try (expected * weights.to(.float64)).sum().backward()
    for (i, (ours, theirs)) in ([(x, reference)] + leaves).enumerated() {
      let error = try relative(try #require(try ours.grad()), try #require(try theirs.grad()))
      #expect(error < 8e-3, "gradient \(i)")
    }
  }

  /// 3e-3 forward and 8e-3 backward as above; weights and inputs are numbers that bfloat16 holds.
  @Test("layers that are trained themselves: values, gradients, and a step seen by the next pass")
  func trained() throws {
    let (folder, registry, group, linears) = try group(in: 32)
    defer { withExtendedLifetime(folder) {} }
    for linear in linears { linear.adapter = nil }
    try registry.makeTrainable()
    let x = try Grid(noise: 90, 32, seed: 54).tensor(.bfloat16)
    try x.setRequiresGrad(true)
    let leaves = linears.map { ($0.weight.tensor, $0.bias!.tensor) }
    let copies = try ([x] + leaves.flatMap { [$0.0, $0.1] }).map { try $0.detach().to(.float64).clone() }
    for copy in copies { try copy.setRequiresGrad(true) }
    let y = try group(x)
    let expected = try copies[0].linear(
      try Tensor.cat([copies[1], copies[3], copies[5]]), try Tensor.cat([copies[2], copies[4], copies[6]]))
    let error = try relative(y, expected)
    #expect(y.dtype == .bfloat16 && error < 3e-3)
    let weights = try Grid(noise: 90, 364, seed: 55).tensor(.bfloat16)
    try (y * weights).sum().backward()
    try (expected * weights.to(.float64)).sum().backward()
    for (i, (ours, theirs)) in zip([x] + leaves.flatMap { [$0.0, $0.1] }, copies).enumerated() {
      let gradient = try #require(try ours.grad())
      let error = try relative(gradient, try #require(try theirs.grad()))
      #expect(gradient.dtype == ours.dtype && error < 8e-3, "gradient \(i)")
    }
    try leaves[1].0.copy(from: try Tensor.zeros(like: leaves[1].0))
    let after = try withoutGrad { try group(x).narrow(1, 48, 300) }
    let bias = try leaves[1].1.to(.bfloat16).unsqueeze(0).expand([90, 300]).contiguous()
    try expectIdentical(after.contiguous(), bias)
  }

  @Test("every optimizer's step makes a new version of its parameters", arguments: AdamW.Moments.allCases)
  func versions(_ moments: AdamW.Moments) throws {
    let parameter = try Grid(noise: 300, seed: 53).leaf(.float32)
    let optimizer = try AdamW(["p": parameter], AdamW.Options(learningRate: 0.1), moments: moments)
    try parameter.square().sum().backward()
    let before = parameter.version
    try optimizer.step()
    #expect(parameter.version > before)
  }

  @Test("an optimizer's change in place is seen by the next pass, and no base weight gets a gradient")
  func update() throws {
    let (folder, _, group, linears) = try group(in: 32)
    defer { withExtendedLifetime(folder) {} }
    let x = try Grid(noise: 70, 32, seed: 52).tensor(.bfloat16)
    let before = try withoutGrad { try group(x) }
    try expectIdentical(try withoutGrad { try group(x) }, before)
    let adapter = try #require(linears[2].adapter)
    try adapter.up.copy(from: try Tensor.zeros(like: adapter.up))
    let after = try withoutGrad { try group(x) }
    try expectIdentical(try after.narrow(1, 0, 348).contiguous(), try before.narrow(1, 0, 348).contiguous())
    // Without the adapter the base alone is left, to one rounding.
    let base = try x.to(.float64).linear(
      try linears[2].weight.tensor.to(.float64), try linears[2].bias!.tensor.to(.float64))
    let error = try relative(try after.narrow(1, 348, 16), base)
    #expect(error < 3e-3)
    try (try group(x)).sum().backward()
    #expect(try linears.allSatisfy { try $0.weight.tensor.grad() == nil })
  }
}
