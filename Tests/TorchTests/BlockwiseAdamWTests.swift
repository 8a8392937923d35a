import Foundation
import Testing
import Torch

@testable import TorchNN

/// Oracle: the definition of the code, AdamW's first step in closed form, and the float32 optimizer.
@Suite("AdamW with moments in codes, and in host memory")
struct BlockwiseAdamWTests {
  let options = AdamW.Options(learningRate: 0.01, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0)

  @Test("255 values, ascending, 0 and ±1 among them, down to 10⁻⁶", arguments: [true, false])
  func table(_ signed: Bool) {
    let values = AdamW.table(signed: signed)
    #expect(values.count == 255 && zip(values, values.dropFirst()).allSatisfy { $0 < $1 })
    #expect(values.last == 1 && values.contains(0) && values.first == (signed ? -1 : 0))
    if signed { #expect(values == values.reversed().map { -$0 }) }
    #expect(values.first { $0 > 0 } == (signed ? 1e-6 : 5.5e-7))
  }

  // The first step from zero moments uses them before they are rounded: m/(1 − β₁) = g and v/(1 − β₂) = g²,
  // so the parameter moves by lr·g/(|g| + ε). More than 16,384 blocks, the last one short: slices and
  // padding. Float32: 1e-6 of a step of 0.01, and one rounding of values up to 1.5.
  @Test("the first step in closed form, over more blocks than are taken at once")
  func firstStep() throws {
    let count = 16384 * 256 + 300
    let values = try Tensor.arange(to: Double(count)).sin()
    let leaf = try values.clone()
    try leaf.setRequiresGrad(true)
    let optimizer = try AdamW(["p": leaf], options, moments: .int8)
    try (leaf * (values + 2)).sum().backward()
    try optimizer.step()
    let gradient = try values + 2
    let expected = try values - (gradient / (gradient.abs() + 1e-8)) * 0.01
    #expect(try (leaf.detach() - expected).abs().amax().item() < 3e-7)
    #expect(
      optimizer.state["p.mean"]!.shape == [16386, 256] && optimizer.state["p.rootScale"]!.shape == [16386])
    // What is kept lies within a code's width of the moment: at most 0.9/64 of the block's largest value, and
    // a seventh of the value itself, (0.1 + 0.9/64)/0.1; half of both for the root.
    let scale = try optimizer.state["p.meanScale"]!.unsqueeze(1)
    let table = try Tensor(AdamW.table(signed: true))
    let codes = try optimizer.state["p.mean"]!.to(.int64).reshape(-1)
    let kept = try (table.indexSelect(0, codes).reshape(16386, 256) * scale).reshape(-1)[0..<count]
    let moment = try gradient * 0.1
    #expect(try ((kept - moment).abs() / moment.abs()).amax().item() < 0.15)
    #expect(try abs((kept - moment).mean().item()) < 1e-4 * moment.mean().item(), "kept on average")
  }

  /// Minimises ½·Σ h·(p − target)² from 0, with curvatures from 0.1 to 10 and a gradient noise of 0.1.
  private func quadratic(_ kind: AdamW.Moments, offload: Bool = false, steps: Int = 400) throws -> (
    loss: Double, parameter: Tensor, optimizer: AdamW
  ) {
    let count = 5000
    let target = try Tensor.arange(to: Double(count)).sin()
    let curvature = try (Tensor.arange(to: Double(count)) * 0.37).cos().pow(2) * 9.9 + 0.1
    let leaf = try Tensor.zeros([count])
    try leaf.setRequiresGrad(true)
    let optimizer = try AdamW(["p": leaf], options, moments: kind, offload: offload)
    for step in 0..<steps {
      let noise = try (Tensor.arange(to: Double(count)) * 12.9898 + Double(step) * 78.233).sin() * 0.1
      try leaf.backward(try curvature * (leaf.detach() - target) + noise)
      try optimizer.step()
    }
    let error = try leaf.detach() - target
    return (try (error.square() * curvature).sum().item() / 2, leaf, optimizer)
  }

  // From about 6,000 at the start float32 moments end near 1e-4: what is left is noise, and codes add to it.
  // A code's width is at most 14 % of its value and a step is a quotient of two moments: steps are off by
  // some percent, up or down alike, and half as much loss again is allowed.
  @Test("a noisy quadratic ends where float32 moments end, within half of it")
  func noisyQuadratic() throws {
    let (exact, coded) = (try quadratic(.float32).loss, try quadratic(.int8).loss)
    #expect(exact < 1e-3 && coded < 1.5 * exact, "\(exact), \(coded)")
  }

  // Least squares y = x·W with 64 × 64 weights and batches of 32: the loss on all 512 rows falls from about 7
  // to the labels' own noise, 0.1²/3: both must get there.
  @Test("a regression in small batches ends where float32 moments end, within 1 %")
  func regression() throws {
    let truth = try Grid(noise: 64, 64, seed: 7, in: -1...1).tensor(.float32)
    let rows = try Grid(noise: 512, 64, seed: 8, in: -1...1).tensor(.float32)
    let labels = try rows.matmul(truth) + Grid(noise: 512, 64, seed: 9, in: -0.1...0.1).tensor(.float32)
    func train(_ kind: AdamW.Moments) throws -> Double {
      let leaf = try Tensor.zeros([64, 64])
      try leaf.setRequiresGrad(true)
      let optimizer = try AdamW(["w": leaf], options, moments: kind)
      for step in 0..<640 {
        let part = (step * 32 % 512)..<(step * 32 % 512 + 32)
        try (rows[part].matmul(leaf) - labels[part]).square().mean().backward()
        try optimizer.step()
      }
      return try withoutGrad { try (rows.matmul(leaf) - labels).square().mean().item() }
    }
    let (exact, coded) = (try train(.float32), try train(.int8))
    #expect(exact < 0.004 && abs(coded / exact - 1) < 0.01, "\(exact), \(coded)")
  }

  @Test("2 bytes and 8/256 a parameter; small parameters keep float32 moments, and their steps, bit for bit")
  func bytes() throws {
    let (coded, plain) = (
      try quadratic(.int8, steps: 1).optimizer, try quadratic(.float32, steps: 1).optimizer
    )
    // 5000 elements are 20 blocks; each parameter has one count.
    #expect(coded.stateBytes == 20 * (512 + 8) + 4 && plain.stateBytes == 8 * 5000 + 4)
    func small(_ kind: AdamW.Moments) throws -> (Tensor, AdamW) {
      let leaf = try Grid(noise: AdamW.smallest - 1, seed: 3).leaf(.float32)
      let optimizer = try AdamW(["p": leaf], options, moments: kind)
      for _ in 0..<3 {
        try leaf.square().sum().backward()
        try optimizer.step()
      }
      return (leaf.detached(), optimizer)
    }
    let (a, b) = (try small(.int8), try small(.float32))
    try expectIdentical(a.0, b.0)
    #expect(a.1.state.keys.sorted() == ["p.mean", "p.square", "p.step"])
  }

  @Test("host memory: on the CPU the same bits", arguments: AdamW.Moments.allCases)
  func offload(_ kind: AdamW.Moments) throws {
    let (here, there) = (try quadratic(kind, steps: 5), try quadratic(kind, offload: true, steps: 5))
    try expectIdentical(here.parameter.detach(), there.parameter.detach())
    for (name, tensor) in here.optimizer.state { try expectIdentical(tensor, there.optimizer.state[name]!) }
  }

  @Test("saved, read and restored it goes on as if never stopped; bit for bit")
  func resume() throws {
    let whole = try quadratic(.int8, steps: 6)
    let half = try quadratic(.int8, steps: 3)
    let folder = try TemporaryFolder()
    try Safetensors.write(
      half.optimizer.state.merging(["value": half.parameter.detach()]) { a, _ in a },
      to: folder.file("a.safetensors"))
    let file = try SafetensorsFile(folder.file("a.safetensors"))
    let leaf = try file.require("value").clone()
    try leaf.setRequiresGrad(true)
    let resumed = try AdamW(["p": leaf], options, moments: .int8)
    try resumed.restore { try file.require($0) }
    let count = 5000
    let target = try Tensor.arange(to: Double(count)).sin()
    let curvature = try (Tensor.arange(to: Double(count)) * 0.37).cos().pow(2) * 9.9 + 0.1
    for step in 3..<6 {
      let noise = try (Tensor.arange(to: Double(count)) * 12.9898 + Double(step) * 78.233).sin() * 0.1
      try leaf.backward(try curvature * (leaf.detach() - target) + noise)
      try resumed.step()
    }
    try expectIdentical(leaf.detach(), whole.parameter.detach())
    for (name, tensor) in resumed.state { try expectIdentical(tensor, whole.optimizer.state[name]!) }
  }
}

extension Tensor {
  fileprivate func detached() -> Tensor { try! detach() }
}
