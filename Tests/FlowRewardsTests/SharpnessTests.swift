import Foundation
import Testing
import Torch

@testable import FlowRewards

/// Grey images [B, 3, height, width] from a function of (image, x, y).
private func grey(_ count: Int, _ height: Int, _ width: Int, _ value: (Int, Int, Int) -> Double) throws
  -> Tensor
{
  var values: [Float] = []
  for image in 0..<count {
    for _ in 0..<3 {
      for y in 0..<height { for x in 0..<width { values.append(Float(value(image, x, y))) } }
    }
  }
  return try Tensor(values, shape: [count, 3, height, width])
}

@Suite("sharpness and grid energy")
struct SharpnessTests {
  /// Oracle: closed forms. An image of one white pixel has the Laplacians 1, 1, 1, 1 and −4 among zeros.
  @Test("a point, stripes, a ramp and a plane")
  func closedForms() throws {
    let (h, w) = (9, 12)
    let n = Double((h - 2) * (w - 2))
    let images = try grey(4, h, w) { image, x, y in
      switch image {
      case 0: x == 5 && y == 4 ? 1 : 0
      case 1: x % 2 == 0 ? 1 : 0
      case 2: 0.25 + Double(x) / 32 + Double(y) / 64
      default: 0.7
      }
    }
    let values = try Sharpness.values(images)
    // Float32 luma weights add up to 1 within 1e-7.
    #expect(abs(values[0] - 20 / n) < 1e-6)
    // ±2 in equal numbers: 10 columns.
    #expect(abs(values[1] - 4) < 1e-5)
    #expect(values[2] < 1e-12 && values[3] == 0)
    let scores = try Sharpness().scores(images, prompts: Array(repeating: .init(text: ""), count: 4))
    #expect(scores.map(\.value) == values)
  }

  /// Oracle: the definition in Double, pixel by pixel, with the luma's weights.
  @Test("noise, against the definition; white noise scores 20 times its variance")
  func definition() throws {
    let (side, images) = (96, try noise(2, side: 96, seed: 5))
    let pixels = try images.doubles()
    let values = try Sharpness.values(images)
    for image in 0..<2 {
      func luma(_ x: Int, _ y: Int) -> Double {
        zip([0.299, 0.587, 0.114], 0..<3).reduce(0) {
          $0 + $1.0 * pixels[((image * 3 + $1.1) * side + y) * side + x]
        }
      }
      var all: [Double] = []
      for y in 1..<side - 1 {
        for x in 1..<side - 1 {
          all.append(luma(x - 1, y) + luma(x + 1, y) + luma(x, y - 1) + luma(x, y + 1) - 4 * luma(x, y))
        }
      }
      let mean = all.reduce(0, +) / Double(all.count)
      let variance = all.reduce(0) { $0 + ($1 - mean) * ($1 - mean) } / Double(all.count)
      #expect(abs(values[image] - variance) < 1e-6 * variance)
      // Uniform channels have variance 1/12; 8836 places give about 3 %.
      let expected = 20.0 / 12 * (0.299 * 0.299 + 0.587 * 0.587 + 0.114 * 0.114)
      #expect(abs(values[image] / expected - 1) < 0.1)
    }
  }

  /// Oracle: closed forms of the definition, (share) · v / (v + ε) with v the Laplacian's variance.
  @Test("what repeats with a period that divides the lattice's is near 1", arguments: [2, 4, 8, 16])
  func checkers(period: Int) throws {
    let images = try grey(1, 130, 66) { _, x, y in
      (x / (period / 2) + y / (period / 2)) % 2 == 0 ? 0.4 : 0.6
    }
    // Jumps of 0.2 give v ≥ 0.2² · 2 · 2/8 = 0.02, against ε = 1e-4.
    #expect(try GridEnergy.values(images, period: 16)[0] > 0.99)
    #expect(try GridEnergy.values(images)[0] > 0.99)
    let eight = try GridEnergy.values(images, period: 8)[0]
    // A checker of period 16 changes sign after 8 pixels: its mean tile is 0.
    #expect(period == 16 ? eight < 1e-6 : eight > 0.99)
  }

  /// Oracle: they have no fine structure.
  @Test("planes, ramps and slow waves are near 0, also in 8 bits")
  func smooth() throws {
    let images = try grey(5, 200, 150) { image, x, y in
      switch image {
      case 0: 0.3
      case 1: Double(x) / 150
      case 2: (Double(x) + Double(y)) / 350
      case 3: 0.5 + 0.4 * sin(Double(x) / 40) * cos(Double(y) / 50)
      default: (Double(x) / 150 * 255).rounded() / 255
      }
    }
    let values = try GridEnergy.values(images)
    #expect(values[0] == 0)
    // Rounding to 8 bits makes steps, some of which repeat: bounded by ε.
    for value in values { #expect(value >= 0 && value < 0.02, "\(values)") }
  }

  /// Oracle: the expectation p²/(h·w), and the Fourier form of the definition by a transform of libtorch's.
  @Test("white noise scores the lattice's share of the frequencies", arguments: [8, 16])
  func whiteNoise(period: Int) throws {
    let (count, side) = (24, 130)
    let images = try noise(count, side: side, seed: 11)
    let values = try GridEnergy.values(images, period: period)
    let mean = values.reduce(0, +) / Double(count)
    let share = Double(period * period) / Double(128 * 128)
    // About p² free numbers an image: 24 · 64 of them give 4 %.
    #expect(abs(mean / share - 1) < 0.12, "\(mean) \(share)")

    let z = try Sharpness.laplacian(images[0..<1])
    let centred = try z - z.mean([1, 2], keep: true)
    let spectrum = try centred.rfft2(128, 128).viewAsReal().square().sum([-1]).doubles()  // [1, 128, 65]
    var (all, lattice) = (0.0, 0.0)
    for row in 0..<128 {
      for column in 0...64 {
        // Columns 1 … 63 stand for two frequencies.
        let energy = spectrum[row * 65 + column] * (column == 0 || column == 64 ? 1 : 2)
        all += energy
        if row % (128 / period) == 0 && column % (128 / period) == 0 { lattice += energy }
      }
    }
    let floor = 1e-4 * Double(128 * 128 * 128 * 128)
    // float32 transforms and sums: a few 1e-6.
    #expect(abs(values[0] / (lattice / (all + floor)) - 1) < 1e-4)
  }

  /// Oracle: a lattice added to a picture shows, in proportion to its energy.
  @Test("seams on noise are found")
  func seams() throws {
    var generator = Seeded(state: 3)
    let images = try grey(2, 258, 258) { image, x, y in
      0.5 + Double.random(in: -0.02...0.02, using: &generator)
        + (image == 1 && (x % 16 == 0 || y % 16 == 0) ? 0.1 : 0)
    }
    let values = try GridEnergy.values(images)
    #expect(values[0] < 0.01 && values[1] > 0.5, "\(values)")
  }

  @Test("small images: the lattice of 8 below 34 pixels, an error below 18, none for no images")
  func sizes() throws {
    let small = try noise(1, side: 33, seed: 1)
    #expect(try GridEnergy.values(small) == GridEnergy.values(small, period: 8))
    let large = try noise(1, side: 34, seed: 1)
    #expect(try GridEnergy.values(large) == GridEnergy.values(large, period: 16))
    #expect(
      throws: RewardError.badImages(
        consumer: "grid energy", shape: [1, 3, 17, 17], expected: "sides of at least 18 pixels")
    ) { try GridEnergy.values(noise(1, side: 17, seed: 1)) }
    #expect(
      throws: RewardError.badImages(
        consumer: "sharpness", shape: [1, 3, 2, 2], expected: "sides of at least 3 pixels")
    ) { try Sharpness.values(noise(1, side: 2, seed: 1)) }
    #expect(try GridEnergy.values(Tensor.zeros([0, 3, 64, 64])).isEmpty)
    #expect(try Sharpness.values(Tensor.zeros([0, 3, 64, 64])).isEmpty)
  }

  @Test("NaN stays with its image")
  func notFinite() throws {
    let images = try Tensor.cat([noise(1, side: 40, seed: 2), Tensor.full([1, 3, 40, 40], .nan)])
    let scores = try Sharpness().scores(images, prompts: [.init(text: ""), .init(text: "")])
    #expect(scores[0].value != nil && scores[1] == .notFinite)
    let grid = try GridEnergy.values(images)
    #expect(grid[0].isFinite && !grid[1].isFinite)
  }
}
