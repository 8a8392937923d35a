import ChunkGRPO
import Foundation
import Pictures

/// What `chunkgrpo chunks` says about a model: its dynamics, whether they depend on the prompt, and the plans they make.
public struct ChunkReport: Encodable, Sendable {
  /// One trainable step.
  public struct Step: Encodable, Sendable {
    /// Number, and the levels it leaves and reaches.
    public let step: Int, sigma: Double, next: Double
    /// d_i: its mean, and standard deviations between prompts' means and of samples around them.
    public let mean: Double, betweenPrompts: Double, withinPrompts: Double
    /// |∂μ/∂v| / s.
    public let sensitivity: Double
  }

  /// Where differences of log d_i come from.
  public struct Pattern: Encodable, Sendable {
    /// Shares of the sum of squares: of the steps, whose pattern all trajectories share; of prompts that change more or
    /// less at every step; of prompts with a pattern of their own; of samples around their prompt.
    public let step: Double, prompt: Double, promptStep: Double, sample: Double
    /// What `promptStep` would be if prompts had no pattern of their own, by the spread of samples; nil for one sample each.
    public let promptStepByChance: Double?
    /// Mean rank correlation of two curves, of different prompts and of one; nil where there is no pair.
    public let rankBetween: Double?, rankWithin: Double?
    /// τ, the standard deviation of log d_i between trajectories, their levels taken out.
    public let noise: Double

    init(_ dynamics: ChunkDynamics, _ risk: PlanRisk) throws {
      let logs = try dynamics.curves.map { try $0.map { try PlanRisk.logarithms($0, dynamics.distance) } }
      let v = NestedVariance(logs)
      (step, prompt, promptStep, sample) = (v.step, v.prompt, v.promptStep, v.sample)
      noise = risk.noise.squareRoot()
      let (prompts, samples, steps) = (logs.count, logs[0].count, logs[0][0].count)
      promptStepByChance =
        samples > 1
        ? v.sample * Double((prompts - 1) * (steps - 1)) / Double(prompts * (samples - 1) * steps) : nil
      (rankBetween, rankWithin) = meanRankCorrelations(dynamics.curves)
    }
  }

  /// What one strategy makes of the dynamics.
  public struct Plan: Encodable, Sendable {
    /// The configuration's `chunk.plan`.
    public let plan: String
    /// Sizes of its chunks; of the commonest plan where every trajectory has its own.
    public let sizes: [Int]
    /// Different plans of the trajectories, and the share of them with these sizes.
    public let distinct: Int, share: Double
    /// ``PlanRisk``, what `auto` minimises; the mean over trajectories; nil if there is no plan.
    public let risk: Double?
    /// Mean d_i of each chunk.
    public let means: [Double]
    /// Chance of each chunk to be the one drawn next by uniform, weighted and weighted:softmax.
    public let uniform: [Double], weighted: [Double], softmax: [Double]
    /// Why there is no such plan; nil if there is.
    public let problem: String?

    init(_ strategy: ChunkStrategy, _ dynamics: ChunkDynamics, _ risk: PlanRisk, stopSize: Int, minChunk: Int)
    {
      plan = strategy.description
      var found: [ChunkPlan] = []
      do {
        let all = dynamics.all
        found = try strategy.plans(
          steps: dynamics.steps.count, samples: all.count, curves: all, distance: dynamics.distance,
          stopSize: stopSize, minChunk: minChunk
        )
        problem = nil
      } catch { problem = "\(error)" }
      let counts = Dictionary(grouping: found, by: \.sizes).mapValues(\.count)
      let commonest = counts.max { ($0.value, $1.key.description) < ($1.value, $0.key.description) }
      (sizes, distinct) = (commonest?.key ?? [], counts.count)
      share = Double(commonest?.value ?? 0) / Double(max(1, found.count))
      self.risk = found.isEmpty ? nil : found.reduce(0) { $0 + risk($1) } / Double(found.count)
      guard let shown = try? ChunkPlan(sizes: sizes) else {
        (means, uniform, weighted, softmax) = ([], [], [], [])
        return
      }
      let mean = NestedVariance(dynamics.curves).steps
      means = shown.means(of: mean)
      func chances(_ draw: ChunkDraw, _ weights: [Double]) -> [Double] {
        (try? draw.probabilities(of: shown, weights: weights)) ?? []
      }
      (uniform, weighted, softmax) = (
        chances(.uniform, means), chances(.weighted, means), chances(.weightedSoftmax, means)
      )
    }
  }

  /// The model, and how its trajectories were sampled.
  public let model: String, steps: Int, shift: Double, kind: String, eta: Double, guidance: Double?
  /// Pixels.
  public let height: Int, width: Int
  /// How d is measured, the sizes that bound plans, and the seed.
  public let distance: String, stopSize: Int, minChunk: Int, seed: UInt64
  /// Prompts, and trajectories of each.
  public let prompts: [String], samples: Int
  /// The trainable steps.
  public let dynamics: [Step]
  /// Whether the prompt matters.
  public let pattern: Pattern
  /// In the order asked for.
  public let plans: [Plan]
  /// Wall-clock seconds of the trajectories, and of choosing the plan of `auto` by their curves.
  public let secondsPilot: Double, secondsPlanning: Double

  /// Every strategy without numbers, and with some usual ones; the published list where it fits.
  public static func usualPlans(steps: Int) -> [String] {
    ["step", "sequence", "fixed:2", "fixed:4"] + (steps == 16 ? ["list:2,3,4,7"] : [])
      + ["adaptive", "adaptive-shared", "auto"]
  }

  /// Samples trajectories of `reference` as its configuration says, and reports on them.
  ///
  /// - Parameters:
  ///   - prompts: where `count` different ones are drawn from.
  ///   - plans: as `chunk.plan`; ``usualPlans(steps:)`` if empty.
  ///   - samples: trajectories of each prompt; there must be two or more in all.
  public init(
    _ reference: ModelReference, prompts: [String], count: Int, samples: Int, plans: [String], seed: UInt64,
    progress: (_ done: Int, _ of: Int) -> Void = { _, _ in }
  ) throws {
    var c = reference.configuration
    // The plans are what is asked about: the configuration's own neither has to fit nor to be there.
    let moves = c.sampling.window.moves && c.sampling.window != .drawn
    (c.chunk.plan, c.chunk.draw) = (moves ? "adaptive" : "auto", "uniform")
    try c.validate()
    let trained = c.sampling.trainableSteps.count
    let strategies = try (plans.isEmpty ? Self.usualPlans(steps: trained) : plans).map { text in
      let strategy = try ChunkStrategy(text)
      if !strategy.needsCurve { _ = try strategy.plan(steps: trained) }
      return strategy
    }
    let random = RandomPlan(seed: seed)
    let chosen = ChunkDynamics.choose(count, of: prompts, random)
    guard chosen.count * samples > 1 else { throw ChunkError.tooFewCurves(chosen.count * samples) }
    let engine = try reference.load()
    try engine.encoder.prepare(chosen)
    var clock = Stopwatch()
    let measured = try clock.time("pilot") {
      try ChunkDynamics.measure(
        engine, c.sampling, prompts: chosen, samples: samples,
        distance: Distance(rawValue: c.chunk.distance.rawValue)!, random: random, check: Interruption.check,
        progress: progress)
    }
    let risk = try clock.time("planning") {
      let risk = try PlanRisk(curves: measured.all, distance: measured.distance)
      _ = try risk.best(stopSize: c.chunk.stopSize, minChunk: c.chunk.minChunk)
      return risk
    }
    let spread = NestedVariance(measured.curves)
    (model, steps, shift, kind) = (
      reference.name, c.sampling.steps, c.sampling.shift, c.sampling.step.rawValue
    )
    (eta, guidance, height, width) = (
      c.sampling.eta, c.sampling.guidance, c.sampling.height, c.sampling.width
    )
    (distance, stopSize, minChunk) = (c.chunk.distance.rawValue, c.chunk.stopSize, c.chunk.minChunk)
    (self.seed, self.prompts, self.samples) = (seed, chosen, samples)
    dynamics = measured.steps.enumerated().map { i, step in
      Step(
        step: measured.firstStep + i, sigma: step.sigma, next: step.next, mean: spread.steps[i],
        betweenPrompts: spread.betweenPrompts[i], withinPrompts: spread.withinPrompts[i],
        sensitivity: step.sensitivity)
    }
    pattern = try Pattern(measured, risk)
    self.plans = strategies.map {
      Plan($0, measured, risk, stopSize: c.chunk.stopSize, minChunk: c.chunk.minChunk)
    }
    (secondsPilot, secondsPlanning) = (clock.seconds["pilot"] ?? 0, clock.seconds["planning"] ?? 0)
  }

  // MARK: files

  /// Names of what ``write(to:)`` makes.
  public static let files = [
    "chunks.json", "dynamics.csv", "dynamics.png", "dynamics.svg", "sensitivity.png", "sensitivity.svg",
  ]

  /// Writes ``files``; `json` is this report as the caller encodes it.
  public func write(json: Data, to folder: URL) throws {
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    func url(_ name: String) -> URL { folder.appending(path: name) }
    try json.write(to: url("chunks.json"), options: .atomic)
    let rows = dynamics.map {
      [Double($0.step), $0.sigma, $0.next, $0.mean, $0.betweenPrompts, $0.withinPrompts, $0.sensitivity]
        .enumerated().map { i, x in i == 0 ? "\(Int(x))" : "\(x)" }.joined(separator: ",")
    }
    let head = "step,sigma,next,mean,between_prompts,within_prompts,sensitivity"
    try Data(([head] + rows).map { $0 + "\n" }.joined().utf8).write(to: url("dynamics.csv"), options: .atomic)
    for (name, chart) in [("dynamics", dynamicsChart), ("sensitivity", sensitivityChart)] {
      try chart.write(png: url("\(name).png"))
      try chart.write(svg: url("\(name).svg"))
    }
  }

  private var positions: [Double] { dynamics.map { Double($0.step) } }

  /// The mean curve with its spread over prompts, and what plans from curves make of it: a level for each chunk.
  private var dynamicsChart: LineChart {
    let mean = dynamics.map(\.mean)
    func band(_ spread: (Step) -> Double) -> (low: [Double], high: [Double]) {
      (dynamics.map { max(0, $0.mean - spread($0)) }, dynamics.map { $0.mean + spread($0) })
    }
    let between = band(\.betweenPrompts)
    var series = [
      LineChart.Series(
        "d of each step, ± 1 sd between prompts", x: positions, y: mean, low: between.low, high: between.high)
    ]
    for plan in plans where ["adaptive-shared", "auto"].contains(plan.plan) && plan.problem == nil {
      var (x, y, start): ([Double], [Double], Double) = ([], [], positions[0])
      for (size, level) in zip(plan.sizes, plan.means) {
        // A chunk spans its steps; a gap parts it from the next.
        x += [start - 0.4, start + Double(size) - 0.6, .nan]
        y += [level, level, .nan]
        start += Double(size)
      }
      series.append(LineChart.Series("\(plan.plan) \(plan.sizes)", x: x, y: y))
    }
    return LineChart(
      title: "Dynamics of \(prompts.count) prompts × \(samples) samples, \(kind) η \(eta), T \(steps)",
      xLabel: "step", yLabel: "d, relative change (\(distance))", series: series)
  }

  private var sensitivityChart: LineChart {
    LineChart(
      title: "Sensitivity of a step to the velocity, \(kind) η \(eta), T \(steps)", xLabel: "step",
      yLabel: "|∂μ/∂v| / s",
      series: [LineChart.Series("sensitivity", x: positions, y: dynamics.map(\.sensitivity))])
  }
}
