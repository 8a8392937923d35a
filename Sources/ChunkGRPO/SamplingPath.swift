/// One trajectory's way from noise to image: which of the schedule's levels it visits, where it is stochastic and how it
/// crosses the levels between.
///
/// Stochastic moves are single steps of the schedule, so that what is trained on is the same whatever the rest does.
/// The rest is the ODE: Euler steps from level to level, or, with `coarse`, fewer and larger ones by the two-step
/// Adams–Bashforth rule, x' = x + Δ·(v + ρ·(v − v_previous)) with ρ = Δ/(2Δ_previous), which is of second order and
/// evaluates the network once a move. The first move after noise has no velocity of its own ODE behind it: there ρ = 0.
///
/// Chosen by error at equal network evaluations on the shipped model, `Documentation/Configuration.md`: Heun's and the
/// midpoint rule take two a move, and the two-step exponential rule (DPM-Solver++ 2M) falls back to first order at σ = 1
/// and σ' = 0, half of the moves when there are four.
public struct SamplingPath: Sendable, Equatable {
  /// One evaluation of the network and the transition it makes.
  public struct Move: Sendable, Equatable {
    /// The level it leaves and the one it reaches, indices of the schedule.
    public let from, to: Int
    /// Its weights.
    public let step: SDEStep
    /// ρ, how far the velocity is extrapolated; 0 takes it as it is.
    public let extrapolation: Double
  }

  /// From level 0 to level T.
  public let moves: [Move]

  /// How many moves come before the first stochastic one: all trajectories from one x_0 share them.
  public var stem: Int { moves.firstIndex(where: \.step.isStochastic) ?? moves.count }

  /// A way through all levels of `schedule`, or fewer.
  ///
  /// - Parameters:
  ///   - kind: kind of the stochastic steps.
  ///   - eta: their η.
  ///   - stochastic: which steps they are. The step into σ = 0, never trained on, is like the one before it.
  ///   - coarse: most moves of each run of deterministic steps; they reach levels of the schedule and are equally
  ///     many steps long, the first ones a step longer where that does not divide. nil takes every step by itself, by Euler's rule.
  /// - Throws: ``ScheduleError``.
  public init(
    _ schedule: NoiseSchedule, kind: StepKind, eta: Double, stochastic: [Range<Int>], coarse: Int? = nil
  ) throws(ScheduleError) {
    precondition(coarse ?? 1 > 0, "a run of deterministic steps takes a move")
    let last = schedule.steps - 1
    func noisy(_ i: Int) -> Bool {
      stochastic.contains { $0.contains(i) || (i == last && i > 0 && $0.contains(i - 1)) }
    }
    var moves: [Move] = []
    var at = 0
    while at <= last {
      if noisy(at) {
        let step = try schedule.step(at, kind: kind, eta: eta)
        moves.append(Move(from: at, to: at + 1, step: step, extrapolation: 0))
        at += 1
        continue
      }
      let steps = ((at + 1)...(last + 1)).first { $0 > last || noisy($0) }! - at
      let count = min(coarse ?? steps, steps)
      let levels = (0...count).map { at + $0 * (steps / count) + min($0, steps % count) }
      var previous: Double?
      for (from, to) in zip(levels, levels.dropFirst()) {
        let step = try SDEStep(
          kind: .ode, sigma: Double(schedule.sigmas[from]), next: Double(schedule.sigmas[to]), eta: 0,
          secondLevel: Double(schedule.sigmas[1]))
        let ratio = coarse == nil ? 0 : previous.map { step.delta / (2 * $0) } ?? 0
        moves.append(Move(from: from, to: to, step: step, extrapolation: ratio))
        previous = step.delta
      }
      at += steps
    }
    self.moves = moves
  }
}
