import Foundation
import Testing

@testable import ChunkGRPO

@Suite("sampling paths")
struct SamplingPathTests {
  private let schedule = try! NoiseSchedule.training(steps: 10, shift: 3)

  /// Oracle: counted by hand, runs of m steps in at most n moves with the longer ones first.
  @Test(
    "levels visited, noise and where the velocity is extrapolated",
    arguments: [
      ([0..<9], nil, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], Array(0..<10), [], 0),
      ([0..<5], nil, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], Array(0..<5), [], 0),
      ([0..<5], 2, [1, 2, 3, 4, 5, 8, 10], Array(0..<5), [8], 0),
      ([3..<5], 2, [2, 3, 4, 5, 8, 10], [3, 4], [2, 8], 2),
      ([3..<5], 9, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [3, 4], [1, 2, 6, 7, 8, 9], 3),
      ([4..<5, 8..<9], 1, [4, 5, 8, 9, 10], [4, 8, 9], [], 1),
      ([], 4, [3, 6, 8, 10], [], [3, 6, 8], 4),
    ] as [([Range<Int>], Int?, [Int], [Int], [Int], Int)])
  func levels(
    _ stochastic: [Range<Int>], _ coarse: Int?, _ to: [Int], _ noisy: [Int], _ extrapolated: [Int],
    _ stem: Int
  ) throws {
    let path = try SamplingPath(schedule, kind: .flowSDE, eta: 0.7, stochastic: stochastic, coarse: coarse)
    #expect(path.moves.map(\.to) == to)
    #expect(path.moves.map(\.from) == [0] + to.dropLast())
    #expect(path.moves.filter(\.step.isStochastic).map(\.from) == noisy)
    #expect(path.moves.filter { $0.extrapolation != 0 }.map(\.from) == extrapolated)
    #expect(path.stem == stem)
    // What is trained on is the full schedule's step, whatever the rest does.
    for move in path.moves where move.step.isStochastic {
      #expect(try move.step == schedule.step(move.from, kind: .flowSDE, eta: 0.7))
    }
    for move in path.moves {
      #expect(move.step.sigma == Double(schedule.sigmas[move.from]))
      #expect(move.step.next == Double(schedule.sigmas[move.to]))
    }
  }

  /// The weights of the probability-flow ODE of data N(m, τ²): v(x, σ), linear in x.
  private func velocity(_ x: Double, _ sigma: Double) -> Double {
    let (m, tau2) = (0.7, 0.36)
    let variance = (1 - sigma) * (1 - sigma) * tau2 + sigma * sigma
    return (sigma - (1 - sigma) * tau2) / variance * (x - (1 - sigma) * m) - m
  }

  /// Oracle: closed form. The ODE keeps (x − mean)/deviation, so that x_0 = z ends at m + τ·z.
  ///
  /// Errors of a method of order p fall by 2^p when its moves double: 2 for Euler, 4 here; from 128 moves on the
  /// next order leaves them within a fifth of that.
  @Test("coarse moves are of second order on Gaussian data, Euler steps of first")
  func order() throws {
    func error(_ moves: Int, coarse: Bool) throws -> Double {
      let schedule = try NoiseSchedule.training(steps: coarse ? 1024 : moves, shift: 3)
      let path = try SamplingPath(
        schedule, kind: .ode, eta: 0, stochastic: [], coarse: coarse ? moves : nil)
      #expect(path.moves.count == moves)
      var x = 1.3
      var previous = 0.0
      for move in path.moves {
        let v = velocity(x, move.step.sigma)
        x =
          move.step.stateWeight * x
          + move.step.velocityWeight * (v + move.extrapolation * (v - previous))
        previous = v
      }
      return abs(x - (0.7 + 0.6 * 1.3))
    }
    for moves in [128, 256] {
      let second = try error(moves, coarse: true) / error(2 * moves, coarse: true)
      let first = try error(moves, coarse: false) / error(2 * moves, coarse: false)
      #expect(3.2...4.8 ~= second && 1.6...2.4 ~= first, "\(second), \(first)")
      #expect(try error(moves, coarse: true) < error(moves, coarse: false) / 20)
    }
  }

  /// Data N(m, τ²) and an exact velocity: mean and variance obey a linear recursion, in which a coarse run is the linear
  /// map that two of its trajectories tell. The simulation draws 4000 paths; 4.5 standard errors, as for single steps.
  @Test("moments of a path with noise in the middle match the exact recursion")
  func moments() throws {
    let path = try SamplingPath(schedule, kind: .flowSDE, eta: 0.7, stochastic: [3..<5], coarse: 2)
    func run(_ x: Double, _ noise: (Int) -> Double) -> Double {
      var (x, previous) = (x, 0.0)
      for move in path.moves {
        let v = velocity(x, move.step.sigma)
        x =
          move.step.stateWeight * x + move.step.velocityWeight * (v + move.extrapolation * (v - previous))
          + (move.step.isStochastic ? move.step.noiseScale * noise(move.from) : 0)
        previous = v
      }
      return x
    }
    // The end is linear in x_0, ε_3 and ε_4, all standard normal.
    let mean = run(0) { _ in 0 }
    let weights = [run(1) { _ in 0 }] + [3, 4].map { i in run(0) { $0 == i ? 1 : 0 } }
    let variance = weights.reduce(0) { $0 + ($1 - mean) * ($1 - mean) }
    var random = testStream("path")
    let ends = (0..<4000).map { _ in
      let e = random.normals(count: 3).map(Double.init)
      return run(e[0]) { e[$0 - 2] }
    }
    let got = ChunkGRPO.moments(ends)
    expectClose(got.mean, mean, absolute: 4.5 * (variance / 4000).squareRoot())
    expectClose(
      got.standardDeviation * got.standardDeviation, variance,
      absolute: 4.5 * variance * (2.0 / 4000).squareRoot())
  }
}
