import Foundation
import Testing
import Torch

@testable import TorchNN

/// Oracle: plain loops in Double over the definitions.
///
/// Tolerance 1e-13 where the kernel computes in float64 (tens of addends of order 1); where one computes its
/// statistics in float32, that is said at the test.
@Suite("Layers against loops in Double")
struct LayerTests {
  let x = Grid(noise: 2, 3, 6, seed: 10)

  /// (x − mean)/√(variance + eps) over every run of `size` values.
  func normalised(_ x: Grid, _ size: Int, eps: Double) -> Grid {
    var y = x
    for start in stride(from: 0, to: x.values.count, by: size) {
      let part = x.values[start..<start + size]
      let mean = part.reduce(0, +) / Double(size)
      let variance = part.reduce(0) { $0 + ($1 - mean) * ($1 - mean) } / Double(size)
      for i in start..<start + size { y.values[i] = (x.values[i] - mean) / (variance + eps).squareRoot() }
    }
    return y
  }

  @Test("linear, with and without bias")
  func linear() throws {
    let (w, b) = (Grid(noise: 4, 6, seed: 11), Grid(noise: 4, seed: 12))
    var product = Grid(2, 3, 4)
    for n in 0..<2 {
      for i in 0..<3 { for o in 0..<4 { for k in 0..<6 { product[n, i, o] += x[n, i, k] * w[o, k] } } }
    }
    try expectClose(x.tensor().linear(try w.tensor()), product, absolute: 1e-13)
    for i in product.values.indices { product.values[i] += b.values[i % 4] }
    try expectClose(x.tensor().linear(try w.tensor(), try b.tensor()), product, absolute: 1e-13)
  }

  @Test("layerNorm divides by n and adds eps under the root", arguments: [1e-5, 0.5])
  func layerNorm(_ eps: Double) throws {
    let (w, b) = (Grid(noise: 6, seed: 13), Grid(noise: 6, seed: 14))
    var expected = normalised(x, 6, eps: eps)
    try expectClose(x.tensor().layerNorm(eps: eps), expected, absolute: 1e-13)
    for i in expected.values.indices {
      expected.values[i] = expected.values[i] * w.values[i % 6] + b.values[i % 6]
    }
    try expectClose(x.tensor().layerNorm(try w.tensor(), try b.tensor(), eps: eps), expected, absolute: 1e-13)
  }

  @Test("groupNorm takes its statistics over a group of channels and all pixels")
  func groupNorm() throws {
    let x = Grid(noise: 2, 4, 3, 2, seed: 15)
    let (w, b) = (Grid(noise: 4, seed: 16), Grid(noise: 4, seed: 17))
    var expected = normalised(x, 2 * 6, eps: 0.1)  // two channels of six pixels
    for i in expected.values.indices {
      let channel = i / 6 % 4
      expected.values[i] = expected.values[i] * w.values[channel] + b.values[channel]
    }
    try expectClose(
      x.tensor().groupNorm(2, try w.tensor(), try b.tensor(), eps: 0.1), expected, absolute: 1e-13)
  }

  func rootMeanSquare(_ x: Grid, eps: Double) -> Grid {
    var y = x
    for start in stride(from: 0, to: x.values.count, by: 6) {
      let mean = x.values[start..<start + 6].reduce(0) { $0 + $1 * $1 } / 6
      for i in start..<start + 6 { y.values[i] = 1 / (mean + eps).squareRoot() }
    }
    return y
  }

  // Relative 6e-7: mean, root and two products in float32, each half a unit of 1.2e-7.
  @Test("rmsNorm in float32, with and without gain", arguments: [1e-6, 0.5])
  func rmsNorm(_ eps: Double) throws {
    let w = Grid(noise: 6, seed: 18)
    var expected = rootMeanSquare(x, eps: eps)
    for i in expected.values.indices { expected.values[i] *= x.values[i] }
    try expectClose(x.tensor(.float32).rmsNorm(nil, eps: eps), expected, relative: 6e-7)
    for i in expected.values.indices { expected.values[i] *= w.values[i % 6] }
    try expectClose(x.tensor(.float32).rmsNorm(try w.tensor(.float32), eps: eps), expected, relative: 6e-7)
  }

  @Test("rmsNorm in bfloat16 rounds the float32 factor, the product and the gain, as FLUX does; exact")
  func rmsNormRounding() throws {
    let rounded = x.map(roundedToBFloat16)
    let w = Grid(noise: 6, seed: 18).map(roundedToBFloat16)
    var expected = rootMeanSquare(rounded, eps: 1e-6).map(roundedToBFloat16)
    for i in expected.values.indices {
      expected.values[i] = roundedToBFloat16(
        roundedToBFloat16(rounded.values[i] * expected.values[i]) * w.values[i % 6])
    }
    let result = try x.tensor(.bfloat16).rmsNorm(try w.tensor(.bfloat16), eps: 1e-6)
    #expect(result.dtype == .bfloat16)
    try expectClose(result, expected)
  }

  @Test("conv2d with stride and padding", arguments: [(1, 0), (1, 1), (2, 1), (2, 0)])
  func conv2d(_ stride: Int, _ padding: Int) throws {
    let x = Grid(noise: 2, 3, 5, 4, seed: 19)
    let (w, b) = (Grid(noise: 4, 3, 3, 3, seed: 20), Grid(noise: 4, seed: 21))
    let (height, width) = ((5 + 2 * padding - 3) / stride + 1, (4 + 2 * padding - 3) / stride + 1)
    var expected = Grid(2, 4, height, width)
    for n in 0..<2 {
      for o in 0..<4 {
        for i in 0..<height {
          for j in 0..<width {
            var sum = b[o]
            for c in 0..<3 {
              for u in 0..<3 {
                for v in 0..<3 {
                  let (row, column) = (i * stride + u - padding, j * stride + v - padding)
                  if (0..<5).contains(row), (0..<4).contains(column) {
                    sum += x[n, c, row, column] * w[o, c, u, v]
                  }
                }
              }
            }
            expected[n, o, i, j] = sum
          }
        }
      }
    }
    try expectClose(
      x.tensor().conv2d(try w.tensor(), try b.tensor(), stride: stride, padding: padding), expected,
      absolute: 1e-13)
    if padding == 0, stride == 1 {
      for n in 0..<2 { for o in 0..<4 { for i in 0..<3 { for j in 0..<2 { expected[n, o, i, j] -= b[o] } } } }
      try expectClose(x.tensor().conv2d(try w.tensor(), nil), expected, absolute: 1e-13)
    }
  }

  @Test("upsampleNearest repeats every pixel; exact", arguments: [2, 3])
  func upsample(_ factor: Int) throws {
    let x = Grid(noise: 2, 2, 3, 2, seed: 22)
    let repeated = try x.tensor().repeatInterleave(factor, 2).repeatInterleave(factor, 3)
    try expectIdentical(x.tensor().upsampleNearest(factor), repeated)
    #expect(repeated.shape == [2, 2, 3 * factor, 2 * factor])
  }

  @Test("addmm and baddbmm weigh their addends")
  func fusedProducts() throws {
    let (a, b, c) = (
      Grid(noise: 2, 3, 5, seed: 23), Grid(noise: 2, 3, 4, seed: 24), Grid(noise: 2, 4, 5, seed: 25)
    )
    var expected = Grid(2, 3, 5)
    for n in 0..<2 {
      for i in 0..<3 {
        for j in 0..<5 {
          expected[n, i, j] = 0.5 * a[n, i, j]
          for k in 0..<4 { expected[n, i, j] += 3 * b[n, i, k] * c[n, k, j] }
        }
      }
    }
    let (ta, tb, tc) = (try a.tensor(), try b.tensor(), try c.tensor())
    try expectClose(ta.baddbmm(tb, tc, beta: 0.5, alpha: 3), expected, absolute: 1e-13)
    let first = Grid(Array(expected.values.prefix(15)), [3, 5])
    try expectClose((ta[0] * 0.5).addmm(try tb[0], try tc[0], alpha: 3), first, absolute: 1e-13)
    try expectIdentical(ta.baddbmm(tb, tc), ta.baddbmm(tb, tc, beta: 1, alpha: 1))
    try expectIdentical(ta[0].addmm(try tb[0], try tc[0]), ta[0].addmm(try tb[0], try tc[0], alpha: 1))
  }

  @Test("modules take their parameters from the checkpoint and do what the functions do; bit for bit")
  func modules() throws {
    let folder = try TemporaryFolder()
    func random(_ shape: Int..., seed: UInt64) throws -> Tensor {
      let grid = Grid(noise: shape.reduce(1, *), seed: seed)
      return try Grid(grid.values, shape).tensor(.float32)
    }
    let weights = [
      "ln.weight": try random(6, seed: 1), "ln.bias": try random(6, seed: 2),
      "rms.weight": try random(6, seed: 3), "gn.weight": try random(3, seed: 4),
      "gn.bias": try random(3, seed: 5),
      "conv.weight": try random(2, 3, 3, 3, seed: 6), "conv.bias": try random(2, seed: 7),
      "emb.weight": try random(5, 4, seed: 8),
    ]
    let checkpoint = try folder.checkpoint(weights)
    let (root, registry) = (checkpoint.root, ModuleRegistry())
    let x = try self.x.tensor(.float32)
    let image = try random(1, 3, 4, 6, seed: 9)

    let layerNorm = try LayerNorm(6, eps: 1e-5, root / "ln", registry)
    try expectIdentical(
      layerNorm(x), x.layerNorm(weights["ln.weight"], weights["ln.bias"], eps: 1e-5))
    let rmsNorm = try RMSNorm(6, eps: 1e-6, root / "rms", registry)
    try expectIdentical(rmsNorm(x), x.rmsNorm(weights["rms.weight"], eps: 1e-6))
    let groupNorm = try GroupNorm(3, 3, eps: 1e-5, root / "gn", registry)
    try expectIdentical(
      groupNorm(image), image.groupNorm(3, weights["gn.weight"], weights["gn.bias"], eps: 1e-5))
    let conv = try Conv2d(3, 2, kernel: 3, stride: 2, padding: 1, root / "conv", registry)
    try expectIdentical(
      conv(image), image.conv2d(weights["conv.weight"]!, weights["conv.bias"], stride: 2, padding: 1))
    let embedding = try Embedding(5, 4, root / "emb", registry)
    let ids = try Tensor([4, 0, 0, 3, 1, 2] as [Int64], shape: [2, 3])
    let table = Grid(noise: 20, seed: 8).values
    let rows = [4, 0, 0, 3, 1, 2].flatMap { table[$0 * 4..<$0 * 4 + 4] }
    try expectClose(embedding(ids), Grid(rows, [2, 3, 4]))
    try expectClose(embedding.rows(2), Grid(Array(table[..<8]), [2, 4]))

    try checkpoint.finish()
    #expect(
      registry.parameters.map(\.key) == [
        "ln.weight", "ln.bias", "rms.weight", "gn.weight", "gn.bias", "conv.weight", "conv.bias",
        "emb.weight",
      ])
  }
}

/// Oracle: softmax(q·kᵀ·scale + mask)·v and its derivative, in loops in Double; 1e-13 for tens of float64 terms.
@Suite("Attention")
struct AttentionTests {
  static let (batch, heads, tokens, size) = (2, 3, 5, 4)
  let q = Grid(noise: batch, heads, tokens, size, seed: 30)
  let k = Grid(noise: batch, heads, tokens, size, seed: 31)
  let v = Grid(noise: batch, heads, tokens, size, seed: 32)
  let seed = Grid(noise: batch, heads, tokens, size, seed: 33)

  /// The result and, for the gradient `seed` of the result, the gradients of q, k and v.
  func reference(scale: Double, mask: Grid? = nil) -> (out: Grid, dq: Grid, dk: Grid, dv: Grid) {
    let zeros = Grid(Self.batch, Self.heads, Self.tokens, Self.size)
    var (out, dq, dk, dv) = (zeros, zeros, zeros, zeros)
    let (all, dims) = (0..<Self.tokens, 0..<Self.size)
    for b in 0..<Self.batch {
      for h in 0..<Self.heads {
        for i in all {
          let scores = all.map { j in
            dims.reduce(0.0) { $0 + q[b, h, i, $1] * k[b, h, j, $1] } * scale + (mask?[i, j] ?? 0)
          }
          let powers = scores.map { exp($0 - scores.max()!) }
          let p = powers.map { $0 / powers.reduce(0, +) }
          for j in all { for d in dims { out[b, h, i, d] += p[j] * v[b, h, j, d] } }
          let dp = all.map { j in dims.reduce(0.0) { $0 + seed[b, h, i, $1] * v[b, h, j, $1] } }
          let mean = zip(p, dp).reduce(0) { $0 + $1.0 * $1.1 }
          for j in all {
            let ds = p[j] * (dp[j] - mean) * scale
            for d in dims {
              dv[b, h, j, d] += p[j] * seed[b, h, i, d]
              dq[b, h, i, d] += ds * k[b, h, j, d]
              dk[b, h, j, d] += ds * q[b, h, i, d]
            }
          }
        }
      }
    }
    return (out, dq, dk, dv)
  }

  @Test("forward and backward of both kernels, heads side by side", arguments: AttentionKernel.allCases)
  func kernels(_ kernel: AttentionKernel) throws {
    let expected = reference(scale: 0.5)  // 1/√4
    let leaves = try [q, k, v].map { try $0.leaf() }
    let out = try attention(leaves[0], leaves[1], leaves[2], kernel: kernel)
    #expect(out.shape == [Self.batch, Self.tokens, Self.heads * Self.size])
    let separate = try out.reshape(Self.batch, Self.tokens, Self.heads, Self.size).transpose(1, 2)
    try expectClose(separate, expected.out, absolute: 1e-13)
    try separate.backward(try seed.tensor())
    for (leaf, gradient) in zip(leaves, [expected.dq, expected.dk, expected.dv]) {
      try expectClose(try #require(try leaf.grad()), gradient, absolute: 1e-13)
    }
  }

  @Test("libtorch's attention with mask and scale")
  func maskAndScale() throws {
    let mask = Grid(noise: Self.tokens, Self.tokens, seed: 34)
    let out = try Tensor.attention(
      try q.tensor(), try k.tensor(), try v.tensor(), mask: try mask.tensor(), scale: 0.3)
    try expectClose(out, reference(scale: 0.3, mask: mask).out, absolute: 1e-13)
  }

  @Test("auto is the explicit kernel up to 256 tokens on the CPU, libtorch's above; bit for bit")
  func auto() throws {
    for (tokens, kernel) in [(256, AttentionKernel.math), (257, .sdpa)] {
      let q = try Grid(noise: 1, 1, tokens, 4, seed: 35).tensor(.float32)
      try expectIdentical(attention(q, q, q), attention(q, q, q, kernel: kernel))
    }
  }
}

/// Oracle: the discrete Fourier transform by its definition, in Double.
///
/// Tolerance 2e-5: 30 to 64 float32 addends of order 1, with a wide margin.
@Suite("Fourier transforms")
struct FourierTests {
  let x = Grid(noise: 5, 6, seed: 40)

  @Test(
    "rfft2 is the transform of the image padded with zeros or cut",
    arguments: [(5, 6), (8, 8), (4, 4), (7, 5)])
  func definition(_ height: Int, _ width: Int) throws {
    var expected = Grid(height, width / 2 + 1, 2)
    for u in 0..<height {
      for v in 0...width / 2 {
        for i in 0..<min(5, height) {
          for j in 0..<min(6, width) {
            let angle = -2 * Double.pi * (Double(u * i) / Double(height) + Double(v * j) / Double(width))
            expected[u, v, 0] += x[i, j] * cos(angle)
            expected[u, v, 1] += x[i, j] * sin(angle)
          }
        }
      }
    }
    let spectrum = try x.tensor(.float32).rfft2(height, width)
    #expect(spectrum.dtype == .complex64)
    try expectClose(spectrum.viewAsReal(), expected, absolute: 2e-5)
  }

  @Test("a plane wave has one peak of half its energy: amplitude·N/2")
  func planeWave() throws {
    let wave = (0..<64).map { (i: Int) -> Double in cos(Double.pi / 4 * Double(3 * (i / 8) + 2 * (i % 8))) }
    var expected = Grid(8, 5, 2)
    expected[3, 2, 0] = 32
    try expectClose(Grid(wave, [8, 8]).tensor(.float32).rfft2(8, 8).viewAsReal(), expected, absolute: 2e-5)
  }

  @Test("irfft2 inverts rfft2", arguments: [(5, 6), (8, 8), (5, 7)])
  func roundTrip(_ height: Int, _ width: Int) throws {
    let back = try x.tensor(.float32).rfft2(height, width).irfft2(height, width)
    try expectClose(try back.narrow(0, 0, 5).narrow(1, 0, 6).contiguous(), x, absolute: 2e-6)
  }
}
