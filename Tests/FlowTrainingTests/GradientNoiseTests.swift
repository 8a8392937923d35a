import ChunkGRPO
import Foundation
import Testing
import Torch

@testable import FlowTraining

@Suite("gradient noise of a configuration, on flux-tiny")
struct GradientNoiseTests {
  let shop: Workshop
  init() throws {
    shop = try Workshop()
    shop.configuration.aggregate = .normalised
    shop.configuration.rewards = [
      .init(name: "vivid"), .init(name: "colourfulness", weight: -2), .init(name: "sharpness", weight: 0),
    ]
  }

  // Oracles: a reward and its negative have one scale; their weighted sum −z is that reward's, too.
  @Test("a row for each reward that is trained on and one for all, which agree where the rewards do")
  func rows() throws {
    var seen: [Int] = []
    let noise = try GradientNoise.measure(shop.configuration, groups: 5) { done, total in
      seen.append(done)
      #expect(total == 15)
    }
    #expect(seen == Array(0..<15))
    #expect(noise.rows.map(\.reward) == ["vivid", "colourfulness", "all"] && noise.groups == 5)
    #expect(noise.imagesOfUpdate == 4)  // 2 prompts × 4 samples in 2 updates
    let vivid = noise.rows[0].scale
    #expect(vivid.groups == 5 && vivid.noise > 0)
    for row in noise.rows {
      #expect(row.groups == 5)
      // Standardised once or twice, up to the 1e-8 beside standard deviations of about 1e-2; float32 gradients.
      #expect(abs(row.scale.noise / vivid.noise - 1) < 1e-4)
      #expect(abs(row.scale.signal - vivid.signal) < 1e-4 * vivid.noise)
      #expect(row.cosine == row.scale.cosine(groups: 1))
      #expect(row.images.map { abs($0 / (4 * row.scale.scale!) - 1) < 1e-12 } ?? (row.scale.signal <= 0))
    }
  }

  // Oracle: the run itself: |mean of the groups' gradients| is the norm that training reports for its first update.
  @Test("the groups' gradients are those of training")
  func gradients() throws {
    shop.configuration.rewards = [.init(name: "vivid")]
    shop.configuration.group.promptsPerIteration = 3
    shop.configuration.optim.updatesPerIteration = 1
    shop.configuration.optim.maxGradNorm = 1e9
    shop.configuration.run.iterations = 1
    let scale = try GradientNoise.measure(shop.configuration, groups: 3).rows[0].scale
    try shop.train("a")
    let norm = try shop.numbers("a", "grad_norm")[0]
    // E|Ĝ|² without its bias: |mean|² = signal + noise/n, an identity. float32 sums in another order.
    #expect(abs((scale.signal + scale.noise / 3).squareRoot() / norm - 1) < 1e-4)
  }
}
