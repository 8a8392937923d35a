import Foundation
import Testing

@testable import ChunkGRPO

/// A published function's recorded transitions: its group in the fixture, our kind, its η.
struct PeerCase: Sendable, CustomTestStringConvertible {
  let group: String
  let kind: StepKind
  let eta: Double
  var testDescription: String { group }

  static let all = [
    PeerCase(group: "gcpo_flow", kind: .flowSDE, eta: 0.7),
    PeerCase(group: "mix_flow", kind: .flowSDE, eta: 0.7),
    PeerCase(group: "flow_grpo", kind: .flowSDE, eta: 0.7),
    PeerCase(group: "ff.Flow-SDE", kind: .flowSDE, eta: 0.7),
    PeerCase(group: "dance", kind: .danceSDE, eta: 0.3),
    PeerCase(group: "gcpo_dance", kind: .danceSDE, eta: 0.3),
    PeerCase(group: "ff.Dance-SDE", kind: .danceSDE, eta: 0.3),
    PeerCase(group: "ff.CPS", kind: .cps, eta: 0.8),
    PeerCase(group: "gcpo_ode", kind: .ode, eta: 0),
  ]
}

@Suite struct SDEStepTests {
  let schedule = try! NoiseSchedule.training(steps: 17, shift: 3)

  /// Peers compute in float32 throughout, we in Double from their float32 σ. Latents reach 4, so that a mean
  /// or next latent may differ by a few float32 roundings (3.5e-7 measured); log p amplifies those by
  /// residual/s² and is 9e-7 off at worst.
  @Test("means, next latents and log-probabilities are the published functions'", arguments: PeerCase.all)
  func matchesPeers(_ peer: PeerCase) throws {
    let f = Fixture.peers
    let own = f.has("\(peer.group).sigmas") ? peer.group : "gcpo"
    let schedule = try NoiseSchedule(sigmas: f.floats("\(own).sigmas"))
    let flow = peer.group == "flow_grpo"
    let x = try f.doubles(flow ? "flow_grpo.in.sample" : "in.latents")
    let v = try f.doubles(flow ? "flow_grpo.in.model_output" : "in.velocity")
    let noise = try f.doubles(flow ? "flow_grpo.in.noise" : "in.noise")
    var compared = 0
    for i in 0..<schedule.steps where f.has("\(peer.group).\(i).prev_sample") {
      let step = try schedule.step(i, kind: peer.kind, eta: peer.eta)
      let name = "\(peer.group).\(i)"
      let next = try f.doubles("\(name).prev_sample")
      let mean = zip(x, v).map { step.stateWeight * $0 + step.velocityWeight * $1 }
      expectClose(
        zip(mean, noise[(i * x.count)...]).map { $0 + step.noiseScale * $1 }, next, absolute: 6e-7,
        "\(name) next")
      compared += 1
      guard peer.kind != .ode else {
        expectClose(
          zip(x, v).map { $0 - step.sigma * $1 }, try f.doubles("\(name).pred_original"), absolute: 6e-7,
          "\(name) x̂0")
        continue
      }
      expectClose(mean, try f.doubles("\(name).mean"), absolute: 6e-7, "\(name) mean")
      guard step.isStochastic else { continue }
      let size = x.count / 3
      let logs = (0..<3).map { sample in
        let elements = sample * size..<(sample + 1) * size
        let residual = elements.reduce(0) { $0 + pow(next[$1] - mean[$1], 2) } / Double(size)
        return step.logProbability(meanSquaredResidual: residual)
      }
      expectClose(logs, try f.doubles("\(name).log_prob"), absolute: 1.5e-6, "\(name) log p")
    }
    #expect(compared == (peer.group.hasPrefix("ff.") ? 4 : schedule.steps))
  }

  /// An off-policy velocity shows the sign of log p's derivative; tolerance as above, residuals are larger.
  @Test("log-probability under another velocity is GCPO's", arguments: [0, 3, 9, 15])
  func offPolicy(_ i: Int) throws {
    let f = Fixture.peers
    let (x, v) = (try f.doubles("in.latents"), try f.doubles("in.velocity_perturbed"))
    let next = try f.doubles("gcpo_flow.\(i).prev_sample")
    let step = try schedule.step(i, kind: .flowSDE, eta: 0.7)
    let size = x.count / 3
    let logs = (0..<3).map { sample in
      let residual =
        (sample * size..<(sample + 1) * size).reduce(0) {
          $0 + pow(next[$1] - step.stateWeight * x[$1] - step.velocityWeight * v[$1], 2)
        } / Double(size)
      return step.logProbability(meanSquaredResidual: residual)
    }
    expectClose(logs, try f.doubles("gcpo_flow_pert.\(i).log_prob"), absolute: 2e-6)
  }

  @Test("samples at different steps in one batch: flow_grpo's mixed case")
  func mixedSteps() throws {
    let f = Fixture.peers
    let schedule = try NoiseSchedule(sigmas: f.floats("flow_grpo.sigmas"))
    let times = try f.floats("flow_grpo.timesteps")
    let (x, v) = (try f.doubles("flow_grpo.in.sample"), try f.doubles("flow_grpo.in.model_output"))
    let expected = try f.doubles("flow_grpo.mixed.mean")
    let size = x.count / 3
    for (sample, time) in try f.floats("flow_grpo.mixed.timesteps").enumerated() {
      let step = try schedule.step(#require(times.firstIndex(of: time)), kind: .flowSDE, eta: 0.7)
      for k in sample * size..<(sample + 1) * size {
        expectClose(step.stateWeight * x[k] + step.velocityWeight * v[k], expected[k], absolute: 6e-7)
      }
    }
  }

  /// A recorded sampling loop: each latent follows from the recorded one before it by one float32
  /// multiply-add.
  @Test("ode steps are diffusers' Euler steps")
  func eulerTrajectory() throws {
    let f = Fixture.scheduler
    let schedule = try NoiseSchedule(sigmas: f.floats("traj_f32.sigmas"))
    let (x, v) = (try f.doubles("traj_f32.x"), try f.doubles("traj_f32.v"))
    let size = v.count / schedule.steps
    for i in 0..<schedule.steps {
      let step = try schedule.step(i, kind: .ode, eta: 0)
      for k in i * size..<(i + 1) * size {
        expectClose(step.stateWeight * x[k] + step.velocityWeight * v[k], x[k + size], absolute: 6e-7)
      }
    }
  }

  /// Oracle: the tables' own forms, with x̂0, x̂1 and the score written out. Rounding only.
  @Test("dance-sde and cps equal their published forms")
  func publishedForms() throws {
    for i in 0..<schedule.steps {
      let (x, v) = (0.83 - 0.1 * Double(i), 0.4 * Double(i) - 1.7)
      let dance = try schedule.step(i, kind: .danceSDE, eta: 0.3)
      let (sigma, next) = (dance.sigma, dance.next)
      let clean = x - sigma * v
      let score = -(x - (1 - sigma) * clean) / (sigma * sigma)
      expectClose(
        dance.stateWeight * x + dance.velocityWeight * v,
        x + dance.delta * v - 0.5 * 0.09 * score * dance.delta,
        absolute: 1e-13)
      let cps = try schedule.step(i, kind: .cps, eta: 0.8)
      let kept = (next * next - cps.noiseScale * cps.noiseScale).squareRoot()
      expectClose(
        cps.stateWeight * x + cps.velocityWeight * v, clean * (1 - next) + (x + (1 - sigma) * v) * kept,
        absolute: 1e-13)
      expectClose(cps.noiseScale, next * sin(0.4 * .pi), relative: 1e-15)
    }
  }

  @Test("η = 0 is the ODE for every kind", arguments: StepKind.allCases)
  func zeroEta(_ kind: StepKind) throws {
    for i in 0..<schedule.steps {
      let step = try schedule.step(i, kind: kind, eta: 0)
      let ode = try schedule.step(i, kind: .ode, eta: 0)
      // cps adds and subtracts σ' in Double; the others are exact
      expectClose(step.stateWeight, ode.stateWeight, absolute: kind == .cps ? 3e-16 : 0)
      expectClose(step.velocityWeight, ode.velocityWeight, absolute: kind == .cps ? 3e-16 : 0)
      #expect(step.noiseScale == 0 && !step.isStochastic && step.sensitivity == .infinity)
    }
  }

  @Test("σ_1 replaces σ at σ = 1 only, and under the root only")
  func firstStep() throws {
    let first = try schedule.step(0, kind: .flowSDE, eta: 0.7)
    let second = Double(schedule.sigmas[1])
    let g2 = 0.49 / (1 - second)
    expectClose(first.diffusion * first.diffusion, g2, relative: 1e-15)
    expectClose(first.stateWeight, 1 + g2 * (second - 1) / 2, relative: 1e-15)
    #expect(first.velocityWeight == second - 1)  // 1 − σ = 0
    let a = try SDEStep(kind: .flowSDE, sigma: 0.9, next: 0.8, eta: 0.7, secondLevel: 0.95)
    #expect(a == (try SDEStep(kind: .flowSDE, sigma: 0.9, next: 0.8, eta: 0.7, secondLevel: 0.1)))
  }

  /// Data N(m, τ²): x_σ is Gaussian, its exact velocity linear, so mean and variance of a trajectory obey a
  /// linear recursion.
  private func velocity(_ sigma: Double, _ m: Double, _ tau2: Double) -> (slope: Double, offset: Double) {
    let variance = (1 - sigma) * (1 - sigma) * tau2 + sigma * sigma
    let slope = (sigma - (1 - sigma) * tau2) / variance
    return (slope, -m - slope * (1 - sigma) * m)
  }

  private func moments(_ steps: [SDEStep], _ m: Double, _ tau2: Double) -> (mean: Double, variance: Double) {
    steps.reduce((0.0, 1.0)) { state, step in
      let v = velocity(step.sigma, m, tau2)
      let factor = step.stateWeight + step.velocityWeight * v.slope
      return (
        factor * state.0 + step.velocityWeight * v.offset,
        factor * factor * state.1 + step.noiseScale * step.noiseScale
      )
    }
  }

  /// The simulation uses the table's form of flow-sde, not our weights. 4.5 standard errors: √(V/n) for the
  /// mean, V·√(2/n) for the variance; a wrong drift sign moves both by dozens.
  @Test("Monte Carlo moments of flow-sde match the exact discrete recursion")
  func monteCarlo() throws {
    let (m, tau2, paths) = (0.7, 0.36, 4000)
    let steps = try schedule.allSteps(kind: .flowSDE, eta: 0.7)
    var random = testStream("monte carlo")
    var ends: [Double] = []
    for _ in 0..<paths {
      let noise = random.normals(count: steps.count + 1).map(Double.init)
      var x = noise[0]
      for (i, step) in steps.enumerated() {
        let linear = velocity(step.sigma, m, tau2)
        let v = linear.slope * x + linear.offset
        let g = 0.7 * (step.sigma / (1 - (i == 0 ? step.next : step.sigma))).squareRoot()
        let mean =
          x * (1 + g * g * step.delta / (2 * step.sigma))
          + v * (1 + g * g * (1 - step.sigma) / (2 * step.sigma)) * step.delta
        x = mean + g * (-step.delta).squareRoot() * noise[i + 1]
      }
      ends.append(x)
    }
    let exact = moments(steps, m, tau2)
    let got = ChunkGRPO.moments(ends)
    let n = Double(paths)
    expectClose(got.mean, exact.mean, absolute: 4.5 * (exact.variance / n).squareRoot())
    expectClose(
      got.standardDeviation * got.standardDeviation, exact.variance,
      absolute: 4.5 * exact.variance * (2 / n).squareRoot())
  }

  /// Exact recursion, no sampling: the discretisation error falls as 1/T and is below 1 % at T = 1000.
  @Test(
    "the final marginal tends to the data's",
    arguments: [(StepKind.flowSDE, 0.7), (.danceSDE, 0.3), (.ode, 0)])
  func finalMarginal(_ kind: StepKind, _ eta: Double) throws {
    for (m, tau2) in [(0.7, 0.36), (-0.4, 1.0), (0.0, 0.25)] {
      let fine = moments(
        try NoiseSchedule.training(steps: 1000, shift: 3).allSteps(kind: kind, eta: eta), m, tau2)
      expectClose(fine.mean, m, absolute: 0.01)
      expectClose(fine.variance, tau2, relative: 0.01)
    }
  }

  /// Numbers measured by an earlier independent computation, given to the digits shown.
  @Test("sensitivity differs 34-fold over the steps")
  func sensitivity() throws {
    let s = try schedule.trainingSteps(kind: .flowSDE, eta: 0.7).map(\.sensitivity)
    expectClose(s[0], 0.029, absolute: 5e-4)
    expectClose(s[15], 1.005, absolute: 5e-4)
    expectClose(s[15] / s[0], 34, absolute: 0.5)
    let plan = try ChunkPlan(sizes: [2, 3, 4, 7])
    let sums = zip(plan.means(of: s), plan.sizes).map { $0 * Double($1) }
    expectClose(sums.map { 100 * $0 / sums.reduce(0, +) }, [1.5, 5.1, 14, 79], absolute: 0.51)
    let means = plan.means(of: s)
    expectClose(means.map { 100 * $0 / means.reduce(0, +) }, [4.3, 9.9, 20, 66], absolute: 0.51)
  }

  @Test("KL weights: exact is the Gaussians' KL, the other leaves Δ out")
  func klWeights() throws {
    let step = try schedule.step(5, kind: .flowSDE, eta: 0.7)
    expectClose(try step.klWeight(exact: true), 1 / (2 * step.noiseScale * step.noiseScale), relative: 1e-15)
    expectClose(
      try step.klWeight(exact: false), try step.klWeight(exact: true) * -step.delta, relative: 1e-14)
    let cps = try schedule.step(5, kind: .cps, eta: 0.8)
    #expect(try cps.klWeight(exact: true) > 0)
    #expect(throws: ScheduleError.noDiffusion(kind: .cps)) { try cps.klWeight(exact: false) }
    let ode = try schedule.step(5, kind: .ode, eta: 0)
    #expect(throws: ScheduleError.self) { try ode.klWeight(exact: true) }
  }

  @Test("bad steps are refused")
  func refusals() {
    #expect(throws: ScheduleError.levelsOutOfOrder(sigma: 0.5, next: 0.5)) {
      try SDEStep(kind: .flowSDE, sigma: 0.5, next: 0.5, eta: 0.7, secondLevel: 0.9)
    }
    #expect(throws: ScheduleError.etaOutOfRange(kind: .cps, eta: 1.1)) {
      try SDEStep(kind: .cps, sigma: 0.5, next: 0.4, eta: 1.1, secondLevel: 0.9)
    }
    #expect(throws: ScheduleError.etaOutOfRange(kind: .danceSDE, eta: -0.1)) {
      try SDEStep(kind: .danceSDE, sigma: 0.5, next: 0.4, eta: -0.1, secondLevel: 0.9)
    }
    #expect(throws: ScheduleError.secondLevelOutOfRange(1)) {
      try SDEStep(kind: .flowSDE, sigma: 1, next: 0.9, eta: 0.7, secondLevel: 1)
    }
    #expect(
      ScheduleError.etaOutOfRange(kind: .cps, eta: 1.1).description
        == "sampling.eta: cps expects 0…1, got 1.1; its usual value is 0.8")
  }
}
