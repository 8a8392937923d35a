import Foundation
import Testing
import Torch

@testable import FlowRewards

private func verifier(_ score: ScenesVerifier.Score = .graded) throws -> ScenesVerifier {
  try ScenesVerifier(sprites: Assets.locate("sprites.safetensors"), score: score)
}

@Suite("Scenes verifier")
struct ScenesVerifierTests {
  /// Oracle: scores and detections of the reference implementation, clean, noisy and wrongly captioned
  /// images.
  @Test("matches the reference on all 24 fixture images")
  func fixture() throws {
    let fixture = try VerifierFixture()
    let strict = try verifier(.strict).scores(fixture.images, prompts: fixture.prompts)
    let graded = try verifier(.graded).scores(fixture.images, prompts: fixture.prompts)
    let found = try verifier().detections(fixture.images)
    #expect(found.count == 24)
    for i in 0..<24 {
      // Ratios of small integers: only the fixture's float32 rounds.
      #expect(abs(try #require(strict[i].value) - fixture.strict[i]) < 1e-6, "image \(i)")
      #expect(abs(try #require(graded[i].value) - fixture.graded[i]) < 1e-6, "image \(i)")
      #expect(strict[i].parts["graded"] == graded[i].value && graded[i].parts["strict"] == strict[i].value)
      // Sorted by name: differences of clean images are rounding noise, and so is their order.
      let (ours, theirs) = (
        found[i].sorted { $0.name < $1.name }, fixture.detections[i].sorted { $0.name < $1.name }
      )
      #expect(ours.map(\.name) == theirs.map(\.name), "image \(i)")
      for (a, b) in zip(ours, theirs) {
        #expect((a.x, a.y) == (b.x, b.y) && a.size == b.size, "image \(i): \(a), expected \(b)")
        // The reference subtracts float32 sums of some thousand: 5e-6 of noise either side of 0.
        #expect(abs(a.error - b.error) < 1e-5, "image \(i): \(a), expected \(b)")
      }
    }
  }

  /// Oracle: the definition, by float64 convolutions of the white-padded image with white-margined templates.
  @Test("Fourier maps equal direct convolution")
  func fourierMatchesDirect() throws {
    let v = try verifier()
    let images = try Tensor.cat([VerifierFixture().images[10..<14], noise(1, side: 64, seed: 3)])
    let maps = try v.templates.smallestDifferences(images * -1 + 1)
    let padded = try images.to(.float64).pad([1, 1, 1, 1], value: 1)
    for (index, (size, ink)) in zip(v.sprites.sizes, v.sprites.ink).enumerated() {
      let (box, valid) = (size + 2, 65 - size)
      let glyphs = try Tensor(ink, shape: [32, 3, size, size]).to(.float64) * -1 + 1
      let templates = try glyphs.pad([1, 1, 1, 1], value: 1)
      let squares = try padded.square().conv2d(Tensor.full([1, 3, box, box], 1, dtype: .float64), nil)
      let energies = try templates.square().sum([1, 2, 3]).reshape(1, 32, 1, 1)
      let all = try (squares - padded.conv2d(templates, nil) * 2 + energies) / Double(3 * box * box)
      let ours = try maps[index].narrow(1, 0, valid).narrow(2, 0, valid).to(.float64)
      // Ours is float32, means of up to 2,700 numbers in 0…1: 3e-7 measured.
      let worst = try (ours - all.amin([1])).abs().amax().item()
      #expect(worst < 2e-6, "size \(size)")
    }
  }

  /// Oracle: the definition, O(n²): take the smallest that is left, remove its neighbours, repeat.
  @Test("suppression equals brute force on random maps", arguments: [UInt64(1), 2, 3, 4, 5])
  func suppression(seed: UInt64) {
    var generator = Seeded(state: seed)
    var left = (0..<600).map { _ in
      let (x, y) = (Int.random(in: 10..<54, using: &generator), Int.random(in: 10..<54, using: &generator))
      return ScenesVerifier.Candidate(
        error: .random(in: 0..<0.03, using: &generator), size: 0, left: x - 10, top: y - 10, x: x, y: y)
    }
    let kept = ScenesVerifier.keepBest(left)
    var expected: [ScenesVerifier.Candidate] = []
    while let best = left.min(by: { $0.error < $1.error }) {
      expected.append(best)
      left.removeAll { abs($0.x - best.x) < 14 && abs($0.y - best.y) < 14 }
    }
    #expect(kept == expected && kept.count > 3)
  }

  /// Oracle: the rule's own words; 14 px along one axis is far enough, 13 along both is not.
  @Test("suppression ends at 14 px along either axis")
  func suppressionEdge() {
    func at(_ x: Int, _ y: Int, _ error: Float) -> ScenesVerifier.Candidate {
      .init(error: error, size: 0, left: x - 10, top: y - 10, x: x, y: y)
    }
    let (best, far, near) = (at(20, 20, 0.01), at(34, 20, 0.02), at(33, 33, 0.015))
    #expect(ScenesVerifier.keepBest([near, far, best]) == [best, far])
  }

  struct Case: Sendable, CustomTestStringConvertible {
    let testDescription: String
    let found: [(String, Double, Double)]
    let scene: Scene
    let strict, graded: Double
  }

  /// Oracle: the scoring rule worked by hand.
  @Test(
    "scores by hand",
    arguments: [
      Case(
        testDescription: "all right", found: [("red circle", 16, 32), ("blue square", 48, 32)],
        scene: pair("left of"),
        strict: 1, graded: 1),
      Case(
        testDescription: "swapped", found: [("red circle", 48, 32), ("blue square", 16, 32)],
        scene: pair("left of"),
        strict: 0, graded: 5.0 / 6),
      Case(
        testDescription: "right of", found: [("red circle", 48, 32), ("blue square", 16, 32)],
        scene: pair("right of"), strict: 1, graded: 1),
      Case(
        testDescription: "above", found: [("red circle", 32, 16), ("blue square", 32, 48)],
        scene: pair("above"),
        strict: 1, graded: 1),
      Case(
        testDescription: "not below", found: [("red circle", 32, 16), ("blue square", 32, 48)],
        scene: pair("below"),
        strict: 0, graded: 5.0 / 6),
      Case(
        testDescription: "8 px are not enough", found: [("red circle", 28, 32), ("blue square", 36, 32)],
        scene: pair("left of"), strict: 0, graded: 5.0 / 6),
      Case(
        testDescription: "a diagonal is no side", found: [("red circle", 16, 16), ("blue square", 48, 48)],
        scene: pair("left of"), strict: 0, graded: 5.0 / 6),
      Case(  // circle 0 and 1 without colour, square 1 and 1, all 1
        testDescription: "wrong colour", found: [("green circle", 16, 32), ("blue square", 48, 32)],
        scene: pair(nil), strict: 0, graded: 4.0 / 5),
      Case(  // and a relation to a red circle that is not there
        testDescription: "wrong colour related", found: [("green circle", 16, 32), ("blue square", 48, 32)],
        scene: pair("left of"), strict: 0, graded: 4.0 / 6),
      Case(
        testDescription: "two of three", found: [("cat", 16, 16), ("cat", 48, 16)],
        scene: Scene(include: [.init(name: "cat", count: 3)]), strict: 0, graded: 2.0 / 3),
      Case(
        testDescription: "far too many", found: [("cat", 16, 16), ("cat", 48, 16), ("cat", 16, 48)],
        scene: Scene(include: [.init(name: "cat")]), strict: 0, graded: 0),
      Case(
        testDescription: "extra object", found: [("cat", 16, 16), ("dog", 48, 16)],
        scene: Scene(include: [.init(name: "cat")]), strict: 0, graded: 1.0 / 2),
      Case(
        testDescription: "any colour will do", found: [("purple heart", 32, 32)],
        scene: Scene(include: [.init(name: "heart")]), strict: 1, graded: 1),
      Case(testDescription: "nothing found", found: [], scene: pair("above"), strict: 0, graded: 0),
    ])
  func byHand(_ c: Case) throws {
    let found = c.found.map { ScenesVerifier.Detection(name: $0.0, error: 0, x: $0.1, y: $0.2, size: 24) }
    let (strict, graded) = try ScenesVerifier.score(found, against: c.scene)
    #expect(strict == c.strict)
    #expect(abs(graded - c.graded) < 1e-12)  // a mean of up to six fractions in float64
  }

  /// Oracle: one image at a time; libtorch may split a larger batch otherwise, but the maps feed comparisons
  /// only.
  @Test("scores do not depend on the block or the batch", arguments: [2, 5, 24])
  func blockIndependence(block: Int) throws {
    let (v, images) = (try verifier(), try VerifierFixture().images)
    #expect(try v.detections(images, block: block) == v.detections(images, block: 1))
    #expect(try v.detections(images[7..<9]) == Array(v.detections(images)[7..<9]))
  }

  /// Oracle: a white canvas shows nothing; a pixel that is no number makes no score and touches no neighbour.
  @Test("blank and broken images")
  func blankAndBroken() throws {
    let fixture = try VerifierFixture()
    let v = try verifier()
    let broken = try fixture.images[1].clone()
    try broken.narrow(2, 5, 1).multiplyInPlace(.nan)
    let images = try Tensor.stack([Tensor.full([3, 64, 64], 1), broken, fixture.images[2]])
    let scores = try v.scores(images, prompts: Array(fixture.prompts[0..<3]))
    #expect(scores[0] == RewardScore(value: 0, parts: ["strict": 0, "graded": 0, "detections": 0]))
    #expect(scores[1].value == nil)
    #expect(scores[2].value == fixture.graded[2])
    #expect(try v.scores(Tensor.zeros([0, 3, 64, 64]), prompts: []).isEmpty)
  }

  @Test("errors name the prompt and the shapes")
  func errors() throws {
    let v = try verifier()
    let image = try Tensor.full([1, 3, 64, 64], 1)
    #expect(throws: RewardError.promptWithoutScene(prompt: "a quiet sea")) {
      try v.scores(image, prompts: [RewardPrompt(text: "a quiet sea")])
    }
    let zebra = RewardPrompt(text: "a zebra", scene: Scene(include: [.init(name: "zebra")]))
    let error = #expect(throws: RewardError.self) { try v.scores(image, prompts: [zebra]) }
    #expect(
      "\(try #require(error))".hasPrefix(
        "scenes: prompt \"a zebra\": no glyph shows a zebra; known: red circle, orange"))
    let pink = RewardPrompt(text: "pink", scene: Scene(include: [.init(name: "circle", color: "pink")]))
    #expect(throws: RewardError.self) { try v.scores(image, prompts: [pink]) }
    #expect(throws: RewardError.promptCount(images: 1, prompts: 2)) {
      try v.scores(image, prompts: [zebra, zebra])
    }
    #expect(
      throws: RewardError.badImages(consumer: "scenes", shape: [1, 3, 32, 32], expected: "[B, 3, 64, 64]")
    ) {
      try v.detections(Tensor.zeros([1, 3, 32, 32]))
    }
    #expect(throws: RewardError.badImages(consumer: "scenes", shape: [3, 64, 64], expected: "[B, 3, H, W]")) {
      try v.detections(Tensor.zeros([3, 64, 64]))
    }
    let other = try Assets.locate("verifier.safetensors")
    #expect(throws: RewardError.self) { try ScenesVerifier(sprites: other) }
  }
}

private func pair(_ relation: String?) -> Scene {
  Scene(
    include: [.init(name: "circle", color: "red"), .init(name: "square", color: "blue")], relation: relation)
}
