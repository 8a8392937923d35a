import Testing
import Torch

@testable import FlowRewards

@Suite("Vivid and the guards")
struct GuardsTests {
  /// Oracle: the formula in float64, two passes, pixel by pixel.
  @Test("colourfulness equals the formula")
  func vivid() throws {
    let images = try Tensor.cat([noise(2, side: 64, seed: 7), VerifierFixture().images[0..<4]])
    let pixels = try images.doubles()
    let area = 64 * 64
    let ours = try Vivid().scores(images, prompts: Array(repeating: RewardPrompt(text: ""), count: 6))
    for i in 0..<6 {
      func channel(_ c: Int, _ p: Int) -> Double { pixels[(i * 3 + c) * area + p] }
      let rg = (0..<area).map { channel(0, $0) - channel(1, $0) }
      let yb = (0..<area).map { (channel(0, $0) + channel(1, $0)) / 2 - channel(2, $0) }
      func moments(_ v: [Double]) -> (mean: Double, variance: Double) {
        let mean = v.reduce(0, +) / Double(area)
        return (mean, v.reduce(0) { $0 + ($1 - mean) * ($1 - mean) } / Double(area))
      }
      let (a, b) = (moments(rg), moments(yb))
      let expected =
        (a.variance + b.variance).squareRoot() + 0.3 * (a.mean * a.mean + b.mean * b.mean).squareRoot()
      // float32 sums of 4,096 pixels: a few units in the seventh digit.
      #expect(abs(try #require(ours[i].value) - expected) < 1e-6)
    }
  }

  /// Oracle: closed forms. Grey has no colour; pure red everywhere has rg = 1 and yb = 0.5 without spread.
  @Test("colourfulness of plain images")
  func plain() throws {
    let grey = try Tensor.full([1, 3, 8, 8], 0.25)
    let red = try Tensor.cat([Tensor.full([1, 1, 8, 8], 1), Tensor.zeros([1, 2, 8, 8])], 1)
    let broken = try Tensor.full([1, 3, 8, 8], .nan)
    let prompts = Array(repeating: RewardPrompt(text: ""), count: 3)
    let values = try Vivid().scores(Tensor.cat([grey, red, broken]), prompts: prompts).map(\.value)
    #expect(values[0] == 0)
    #expect(abs(try #require(values[1]) - 0.3 * 1.25.squareRoot()) < 1e-7)  // one float32 rounding
    #expect(values[2] == nil)
  }

  /// Oracle: the published scale of generated images of these prompts, vivid 0.245 and ink 0.195; twelve real
  /// scenes lie within a quarter of it.
  @Test("scale on real scenes")
  func scale() throws {
    let values = try GuardValues.measure(VerifierFixture().images[0..<12], groupSize: 12)
    #expect(abs(values.vivid - 0.245) < 0.06 && abs(values.ink - 0.195) < 0.05, "\(values)")
    #expect(values.blank == 0 && values.diversity > 0.2)
  }

  /// Oracle: every pair of every group in float64, pixel by pixel.
  @Test("diversity equals brute force", arguments: [2, 3, 6])
  func diversity(groupSize: Int) throws {
    let images = try noise(12, side: 10, seed: 11)
    let pixels = try images.doubles()
    var groups: [Double] = []
    for start in stride(from: 0, to: 12, by: groupSize) {
      var pairs: [Double] = []
      for a in start..<start + groupSize {
        for b in a + 1..<start + groupSize {
          let sum = (0..<300).reduce(0.0) {
            let d = pixels[a * 300 + $1] - pixels[b * 300 + $1]
            return $0 + d * d
          }
          pairs.append((sum / 300).squareRoot())
        }
      }
      groups.append(pairs.reduce(0, +) / Double(pairs.count))
    }
    let expected = groups.reduce(0, +) / Double(groups.count)
    // float32 means of 300 squares.
    #expect(abs(try GuardValues.measure(images, groupSize: groupSize).diversity - expected) < 1e-6)
  }

  /// Oracle: closed form; white has no ink, no colour and no difference.
  @Test("blank images")
  func blank() throws {
    let white = try Tensor.full([3, 3, 8, 8], 1)
    #expect(
      try GuardValues.measure(white, groupSize: 3)
        == GuardValues(blank: 1, diversity: 0, ink: 0, vivid: 0, sharpness: 0))
    let dotted = try white.clone()
    try dotted[0].narrow(0, 1, 1).narrow(1, 2, 1).narrow(2, 3, 1).multiplyInPlace(0.5)
    let values = try GuardValues.measure(dotted, groupSize: 3)
    #expect(values.blank == 2.0 / 3)
    #expect(abs(values.ink - 0.5 / 192) < 1e-7)  // 1 − a float32 mean near 1
  }

  @Test("groups and pixels that measure nothing are errors")
  func errors() throws {
    let images = try Tensor.full([4, 3, 8, 8], 1)
    for size in [0, 1, 3] {
      #expect(throws: RewardError.badGroups(images: 4, groupSize: size)) {
        try GuardValues.measure(images, groupSize: size)
      }
    }
    try images[2].multiplyInPlace(.infinity)
    #expect(throws: RewardError.notFinite(images: 1, of: 4)) { try GuardValues.measure(images, groupSize: 2) }
  }

  /// Oracle: the bounds of the contract, on either side.
  @Test("collapse names what, how far and the bound")
  func collapsed() {
    let base = GuardValues(blank: 0.01, diversity: 0.3, ink: 0.2, vivid: 0.25)
    func with(blank: Double = 0.01, diversity: Double = 0.3, ink: Double = 0.2) -> [String] {
      GuardValues(blank: blank, diversity: diversity, ink: ink, vivid: 0).collapsed(against: base)
    }
    #expect(with() == [] && with(blank: 0.029, diversity: 0.241, ink: 0.319) == [] && with(ink: 0.121) == [])
    #expect(with(blank: 0.031) == ["blank 0.031 is above 0.03"])
    #expect(with(diversity: 0.239) == ["diversity 0.239 is below 0.24"])
    #expect(with(ink: 0.119) == ["ink 0.119 is below 0.12"])
    #expect(with(ink: 0.33) == ["ink 0.33 is above 0.32"])
    #expect(with(blank: .nan, ink: .nan) == ["blank nan is not a number", "ink nan is not a number"])
  }
}
