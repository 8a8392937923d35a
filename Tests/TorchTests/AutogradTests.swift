import Testing
import Torch

/// Oracle: central finite differences in float64, and derivatives by hand.
@Suite("Gradients")
struct AutogradTests {
  @Test("a small network: linear, normalisation, activations, residual")
  func network() throws {
    try expectGradients(at: [
      Grid(noise: 3, 4, seed: 50), Grid(noise: 5, 4, seed: 51), Grid(noise: 5, seed: 52),
      Grid(noise: 5, seed: 53),
    ]) { p in
      let hidden = try p[0].linear(p[1], p[2]).layerNorm(p[3], p[2], eps: 1e-5)
      let mixed =
        try hidden.silu() * hidden.gelu(tanhApproximation: true) + hidden.gelu() - hidden.quickGELU()
      return try (mixed + hidden.tanh() * hidden.sigmoid()).square().mean()
    }
  }

  @Test("convolution, group normalisation, upsampling")
  func images() throws {
    try expectGradients(at: [
      Grid(noise: 1, 4, 3, 3, seed: 54), Grid(noise: 2, 4, 3, 3, seed: 55), Grid(noise: 2, seed: 56),
      Grid(noise: 4, seed: 57),
    ]) { p in
      let normal = try p[0].groupNorm(2, p[3], p[3], eps: 1e-3)
      return try normal.upsampleNearest(2).conv2d(p[1], p[2], stride: 2, padding: 1).sin().sum()
    }
  }

  @Test("views, selections and joins send gradients to where the elements came from")
  func shapes() throws {
    try expectGradients(at: [Grid(noise: 3, 4, seed: 58), Grid(noise: 4, 2, seed: 59)]) { p in
      let picked = try p[0].indexSelect(1, try Tensor([3, 0, 3] as [Int64]))
      let gathered = try p[0].gather(1, try Tensor([1, 2, 0] as [Int64], shape: [3, 1]))
      let halves = try p[0].chunk(2, 1)
      let joined = try Tensor.cat([picked, gathered, halves[0].pad([1, 0]), p[0].matmul(p[1])], 1)
      let stacked = try Tensor.stack([p[0][0], p[0].select(0, 2)]).transpose(0, 1).reshape(2, 4)
      let spread = try p[1].repeatInterleave(2, 1).permute(1, 0).unsqueeze(0).expand(2, -1, -1)
      return try joined.square().sum() + (stacked.matmul(p[1])).cos().sum() + spread.exp().mean()
    }
  }

  @Test("reductions, softmax, powers, quotients, selection")
  func reductions() throws {
    try expectGradients(at: [Grid(noise: 3, 4, seed: 60, in: 0.5...2), Grid(noise: 3, 1, seed: 61)]) { p in
      let soft = try (p[0] * p[1]).softmax(-1) * p[0].log()
      let spread = try p[0].variance([1]) + p[0].amax([1]) - p[0].amin([1]) + p[0].minimum(along: 1).values
      let roots = try p[0].sqrt() / (p[0].rsqrt() + p[0].reciprocal()) + p[0].pow(1.5)
      let chosen = try p[0].less(1).select(p[0].square(), else: p[0].abs() * 3)
      let limited = try p[0].clamp(0.8, 1.4).maximum(p[1]) + p[1].minimum(p[0]).adding(product: p[0], p[1])
      return try soft.sum() + spread.mean() + roots.sum() + chosen.sum() + limited.sum()
    }
  }

  @Test("fused products and libtorch's attention")
  func products() throws {
    try expectGradients(at: [
      Grid(noise: 1, 2, 3, 4, seed: 62), Grid(noise: 1, 2, 3, 4, seed: 63), Grid(noise: 1, 2, 3, 4, seed: 64),
      Grid(noise: 3, 3, seed: 65),
    ]) { p in
      let mixed = try Tensor.attention(p[0], p[1], p[2], scale: 0.7).reshape(2, 3, 4)
      let more = try p[3].unsqueeze(0).expand(2, -1, -1).baddbmm(
        mixed, p[1].reshape(2, 3, 4).transpose(1, 2), alpha: 2)
      return try p[3].addmm(more[0], more[1], alpha: 0.5).square().sum()
    }
  }

  @Test("real Fourier transforms") func fourier() throws {
    try expectGradients(at: [Grid(noise: 3, 4, seed: 66), Grid(noise: 3, 4, seed: 67)]) { p in
      let product = try p[0].rfft2(4, 4) * p[1].rfft2(4, 4).conj()
      return try product.irfft2(4, 4).square().sum()
    }
  }

  // RMS statistics are float32: differences in float64 see them only to 1e-7, so the derivative is written out.
  // With r = 1/√(mean x² + eps): d(Σ s·x·r·w)/dx_i = r·s_i·w_i − x_i·r³/n·Σ s·w·x. Tolerance 1e-6: float32.
  @Test("rmsNorm: derivative by hand")
  func rmsNorm() throws {
    let (x, w, s) = (Grid(noise: 6, seed: 68), Grid(noise: 6, seed: 69), Grid(noise: 6, seed: 70))
    let r = 1 / (x.values.reduce(0) { $0 + $1 * $1 } / 6 + 0.1).squareRoot()
    let inner = (0..<6).reduce(0) { $0 + s[$1] * w[$1] * x[$1] }
    let (leaf, gain) = (try x.leaf(.float32), try w.leaf(.float32))
    try leaf.rmsNorm(gain, eps: 0.1).backward(try s.tensor(.float32))
    let dx = (0..<6).map { r * s[$0] * w[$0] - x[$0] * r * r * r / 6 * inner }
    try expectClose(try #require(try leaf.grad()), Grid(dx, [6]), absolute: 1e-6)
    try expectClose(
      try #require(try gain.grad()), Grid((0..<6).map { s[$0] * x[$0] * r }, [6]), absolute: 1e-6)
  }

  @Test("gradients add up until cleared; a seed weighs them; exact in small integers")
  func accumulation() throws {
    let leaf = try Grid([1, 2, 3], [3]).leaf()
    #expect(try leaf.grad() == nil)
    try leaf.square().sum().backward()
    #expect(try leaf.grad()?.doubles() == [2, 4, 6])
    try leaf.square().backward(try Tensor([1.0, 10, 100]))
    #expect(try leaf.grad()?.doubles() == [4, 44, 606])
    try leaf.clearGrad()
    #expect(try leaf.grad() == nil)
    try (leaf.detach() * leaf).sum().backward()
    #expect(try leaf.grad()?.doubles() == [1, 2, 3])
    try leaf.setRequiresGrad(false)
    #expect(!leaf.requiresGrad)
    let error = try #require(throws: TorchError.self) { try leaf.sum().backward() }
    #expect(error.operation == "backward")
  }

  @Test("lists: joint norm and scaling; 3-4-12-13 triangles are exact in float32")
  func lists() throws {
    let tensors = [try Tensor([3, 4] as [Float]), try Tensor([12] as [Float], shape: [1, 1])]
    #expect(try Foreach.norm(tensors).item() == 13)
    try Foreach.multiply(tensors, by: 0.5)
    #expect(try tensors[0].floats() == [1.5, 2] && tensors[1].floats() == [6])
  }
}
