import Foundation
import Testing

@testable import density

/// The example of a flow model that is not an image model.
@Suite("Density")
struct DensityTests {
  @Test("points of the plane are learnt by flow matching and tuned by Chunk-GRPO, within the guards")
  func example() throws {
    let density = try Density(seed: 1)
    _ = try density.pretrain(iterations: 3000, batch: 512)
    let count = 512
    let base = Density.Guards(try density.draw(count))
    // Closed forms of the density: mean and variance of the reward; a Gaussian point is deviation·√(π/2) from its centre.
    let (mean, square) = (Density.moment(1), Density.moment(2))
    let error = ((square - mean * mean) / Double(count)).squareRoot()
    let distance = Density.deviation * (Double.pi / 2).squareRoot()
    // Four standard errors, and as much for what the model has not learnt.
    #expect(abs(base.reward - mean) < 8 * error, "\(base), expected \(mean)")
    #expect(base.modes == 8)
    #expect(base.distance < 1.5 * distance, "\(base), expected \(distance)")

    let iterations = try density.tune(iterations: 30, size: 128, rate: 1e-3)
    // Exactly: rollout and update compute the same bits, and the first update comes before anything has moved.
    for iteration in iterations {
      #expect(iteration.replayGap == 0 && iteration.ratios.allSatisfy { $0 == 1 })
    }
    let tuned = Density.Guards(try density.draw(count))
    // Twenty standard errors of the mean reward of that many points.
    #expect(tuned.reward - base.reward > 20 * error, "\(base) \(tuned)")
    // The guards: tuning spreads the Gaussians, but not to twice their width, and keeps more than one of them.
    #expect(tuned.distance < 2 * distance && tuned.modes > 1, "\(tuned)")
  }
}
