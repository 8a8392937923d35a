import Foundation
import Testing
import Torch

@testable import TorchNN

/// AdamW of arXiv 1711.05101, algorithm 2, in Double.
private struct Reference {
  var values, mean, square: [Double]
  var steps = 0.0
  init(_ values: [Double]) {
    self.values = values
    mean = values.map { _ in 0 }
    square = mean
  }
  mutating func step(_ gradient: [Double], _ o: AdamW.Options) {
    steps += 1
    for i in values.indices {
      mean[i] = o.beta1 * mean[i] + (1 - o.beta1) * gradient[i]
      square[i] = o.beta2 * square[i] + (1 - o.beta2) * gradient[i] * gradient[i]
      let m = mean[i] / (1 - pow(o.beta1, steps))
      let v = square[i] / (1 - pow(o.beta2, steps))
      values[i] -= o.learningRate * (m / (v.squareRoot() + o.epsilon) + o.weightDecay * values[i])
    }
  }
}

/// Oracle: the algorithm in Double, torch's clip_grad_norm_ rule, and never having stopped.
@Suite("AdamW")
struct AdamWTests {
  let options = AdamW.Options(learningRate: 0.05, beta1: 0.8, beta2: 0.95, epsilon: 1e-3, weightDecay: 0.3)

  /// Σ weights·p²/2, whose gradient is weights·p.
  func accumulate(_ parameters: [String: Tensor], _ weights: [String: Double]) throws {
    for (name, weight) in weights { try (parameters[name]!.square().sum() * (weight / 2)).backward() }
  }

  // Three updates of order 0.05 in float32 around values of order 1: 1e-6. The step counts 1, 2, 3: with a
  // counter that does not advance, the second update is wrong by half.
  @Test("three steps against the algorithm, weight decay and step count included")
  func closedForm() throws {
    let start = ["a": Grid(noise: 2, 3, seed: 110), "b": Grid(noise: 5, seed: 111)]
    let leaves = try start.mapValues { try $0.leaf(.float32) }
    let optimizer = try AdamW(leaves, options)
    var references = start.mapValues { Reference($0.values) }
    let weights = ["a": 1.5, "b": -0.4]
    for step in 1...3 {
      try accumulate(leaves, weights)
      for name in start.keys {
        references[name]!.step(references[name]!.values.map { $0 * weights[name]! }, options)
      }
      try optimizer.step()
      for (name, reference) in references {
        let state = optimizer.state
        try expectClose(
          leaves[name]!.detach(), Grid(reference.values, start[name]!.shape), absolute: 1e-6, name)
        try expectClose(
          state["\(name).mean"]!, Grid(reference.mean, start[name]!.shape), absolute: 1e-6, name)
        try expectClose(
          state["\(name).square"]!, Grid(reference.square, start[name]!.shape), absolute: 1e-6, name)
        #expect(try state["\(name).step"]!.item() == Double(step))
        #expect(try leaves[name]!.grad() == nil, "gradients are forgotten")
      }
    }
  }

  @Test("defaults are the paper's, Table 8; options count from the next step on")
  func defaults() throws {
    #expect(
      AdamW.Options()
        == AdamW.Options(learningRate: 1e-5, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 1e-4))
    #expect(options.betas == (0.8, 0.95))
    let leaf = try Grid([1], [1]).leaf(.float32)
    let optimizer = try AdamW(["a": leaf], options)
    optimizer.options.learningRate = 0
    try leaf.sum().backward()
    try optimizer.step()
    #expect(try leaf.floats() == [1])
  }

  @Test("parameters without gradient are left alone, decay, moments and count included; exact")
  func untouched() throws {
    let leaves = ["used": try Grid([1, 2], [2]).leaf(.float32), "idle": try Grid([3], [1]).leaf(.float32)]
    let optimizer = try AdamW(leaves, options)
    try accumulate(leaves, ["used": 1])
    try optimizer.step()
    #expect(try leaves["idle"]!.floats() == [3] && leaves["used"]!.floats() != [1, 2])
    #expect(try optimizer.state["idle.step"]!.item() == 0 && optimizer.state["used.step"]!.item() == 1)
    let after = try leaves["used"]!.floats()
    try optimizer.step()
    #expect(try leaves["used"]!.floats() == after, "no gradient, no step")
    #expect(try optimizer.clipGradients(maxNorm: 1) == 0)
  }

  struct Clip: Sendable, CustomTestStringConvertible {
    let scale: Float
    let maxNorm: Double
    var testDescription: String { "norm \(13 * scale), at most \(maxNorm)" }
  }
  // The joint norm of 3, 4 and 12 is 13. Tolerance 2e-7: one float32 norm and product.
  @Test(
    "clipping multiplies by max/(norm + 1e-6) over all parameters, only when that is below 1",
    arguments: [
      Clip(scale: 1, maxNorm: 1), Clip(scale: 1, maxNorm: 13), Clip(scale: 1, maxNorm: 13.1),
      Clip(scale: 1e-7, maxNorm: 1e-6), Clip(scale: 1e-7, maxNorm: 2e-6), Clip(scale: 0, maxNorm: 1),
    ])
  func clipping(_ c: Clip) throws {
    let leaves = ["a": try Grid(2).leaf(.float32), "b": try Grid(1).leaf(.float32)]
    let optimizer = try AdamW(leaves, options)
    let gradients = ["a": [3, 4].map { $0 * c.scale }, "b": [12 * c.scale]]
    for (name, leaf) in leaves { try leaf.backward(try Tensor(gradients[name]!)) }
    let norm = 13 * Double(c.scale)
    let got = try optimizer.clipGradients(maxNorm: c.maxNorm)
    #expect(abs(got - norm) <= 2e-7 * norm, "the norm before")
    let factor = c.maxNorm / (norm + 1e-6)
    for (name, leaf) in leaves {
      let clipped = try #require(try leaf.grad()).floats()
      if factor >= 1 {
        #expect(clipped == gradients[name]!, "left as they are, bit for bit")
      } else {
        try expectClose(
          try Tensor(clipped), Grid(gradients[name]!.map { Double($0) * factor }, [clipped.count]),
          relative: 2e-7)
      }
    }
  }

  @Test("a restored state continues as if never stopped; bit for bit")
  func resume() throws {
    let folder = try TemporaryFolder()
    let start = ["a": Grid(noise: 2, 3, seed: 112), "b": Grid(noise: 5, seed: 113)]
    let weights = ["a": 1.5, "b": -0.4]
    func advance(_ leaves: [String: Tensor], _ optimizer: AdamW, _ steps: Int) throws {
      for _ in 0..<steps {
        try accumulate(leaves, weights)
        try optimizer.step()
      }
    }
    let whole = try start.mapValues { try $0.leaf(.float32) }
    try advance(whole, try AdamW(whole, options), 5)

    let first = try start.mapValues { try $0.leaf(.float32) }
    let optimizer = try AdamW(first, options)
    try advance(first, optimizer, 2)
    #expect(
      optimizer.state.keys.sorted() == ["a.mean", "a.square", "a.step", "b.mean", "b.square", "b.step"])
    let url = folder.file("optimizer.safetensors")
    try Safetensors.write(optimizer.state.merging(first) { a, _ in a }, to: url)

    let file = try SafetensorsFile(url)
    let second = try start.mapValues { try Grid($0.values.map { _ in 0 }, $0.shape).leaf(.float32) }
    for (name, leaf) in second { try leaf.copy(from: try file.require(name)) }
    let resumed = try AdamW(second, options)
    try resumed.restore { try file.require($0) }
    try advance(second, resumed, 3)
    for (name, leaf) in second { try expectIdentical(leaf, whole[name]!) }
  }

  @Test("a state that lacks an entry or has another shape is refused")
  func badState() throws {
    struct Absent: Error {}
    let optimizer = try AdamW(["a": try Grid(2).leaf(.float32)], options)
    #expect(throws: Absent.self) { try optimizer.restore { _ in throw Absent() } }
    let error = try #require(throws: TorchError.self) {
      try optimizer.restore { try Tensor.zeros($0.hasSuffix("step") ? [] : [1]) }
    }
    #expect(error.operation == "copy" && error.operands.last == "float32[1]", "broadcasting is not restoring")
  }
}
