import ChunkGRPO
import FlowModels
import FlowRewards
import Foundation
import Pictures
import Torch
import TorchNN

/// What a run tells whoever watches it.
public enum TrainingEvent: Sendable {
  /// Something worth knowing that does not stop the run.
  case warning(String)
  /// An iteration is done.
  case iteration(MetricsRow, of: Int)
  /// What a run found out before its first iteration.
  case note(String)
  /// The run ends before its last iteration, and why.
  case reached(String)
  /// A checkpoint is on disk.
  case checkpoint(String)
}

/// One training run: prompts → text embeddings → trajectories → images → rewards → advantages → chunk plans → drawn
/// chunks → gradients → parameters → checkpoint.
public final class Trainer {
  /// The resolved configuration.
  public let configuration: Configuration
  /// The model.
  public let engine: Engine
  /// The trained weights.
  public let policy: Policy
  /// Prompts trained on.
  public let prompts: [Prompt]
  /// Called on the training thread.
  public var report: (TrainingEvent) -> Void = { _ in }

  private let folder: RunFolder
  private let rewards: RewardSet
  private let table: TransitionTable
  /// `auto` until its pilot has run or a checkpoint has told, then the plan's list.
  private var strategy: ChunkStrategy
  private var choice: PlanChoice?
  private let draw: ChunkDraw
  private let timeWeight: TimeWeight
  private let optimizer: AdamW
  private let average: WeightAverage?
  private let random: RandomPlan
  private let fixedPrompts: [Prompt]
  private let evaluationPrompts: [Prompt]
  /// Iterations done.
  public private(set) var iteration = 0
  private var update = 0
  /// With running statistics: the rewards of each prompt in all iterations done.
  private var seen: [String: RewardStatistics] = [:]
  private var saved = -1
  private var boundary: [String: Tensor]?

  /// Loads everything and checks what can be checked before the first rollout.
  public init(_ configuration: Configuration, folder: RunFolder) throws {
    try configuration.validate()
    self.configuration = configuration
    self.folder = folder
    let c = configuration
    let file = try PromptFile(file: URL(filePath: c.prompts.file), split: c.prompts.split)
    prompts = file.prompts
    rewards = try RewardSet(c.rewards)
    engine = try Engine(c)
    random = RandomPlan(seed: c.seed)
    let schedule = try engine.trainingSchedule(c.sampling)
    // Every step that any window may hold; where the noise is, each group's path says.
    table = try TransitionTable(
      schedule: schedule, kind: StepKind(rawValue: c.sampling.step.rawValue)!, eta: c.sampling.eta,
      stochastic: 0..<(c.sampling.steps - 1), truncatedTimes: c.sampling.time == .truncated)
    strategy = try ChunkStrategy(c.chunk.plan)
    draw = try ChunkDraw(c.chunk.draw)
    timeWeight = TimeWeight(rawValue: c.chunk.timeWeight.rawValue)!
    policy = try Policy(
      c.trainable, engine.network.modules, device: engine.device, seeds: random, keepsReference: c.loss.kl > 0
    )
    optimizer = try AdamW(
      policy.parameters,
      AdamW.Options(
        learningRate: c.optim.lr, beta1: c.optim.betas[0], beta2: c.optim.betas[1], epsilon: c.optim.eps,
        weightDecay: c.optim.weightDecay),
      moments: AdamW.Moments(rawValue: c.optim.state.rawValue)!, offload: c.optim.offload)
    average = c.ema.decay > 0 ? try WeightAverage(policy.parameters, decay: c.ema.decay) : nil
    // A reward that cannot judge these prompts is found now, not after the first rollout.
    _ = try rewards.score(
      try Tensor.zeros([1, 3, c.sampling.height, c.sampling.width]), [RewardSet.probe(prompts)])
    let all = try PromptFile(file: URL(filePath: c.prompts.file), split: "all").prompts
    evaluationPrompts = all.filter { $0.split == "dev" }
    // One prompt of each kind, from the part for choosing settings where there is one.
    var tags: Set<String> = []
    let candidates = evaluationPrompts.isEmpty ? prompts : evaluationPrompts
    fixedPrompts = Array(candidates.filter { $0.tag == nil || tags.insert($0.tag!).inserted }.prefix(6))
  }

  /// Counts for `--dry-run`.
  public var summary: [(String, String)] {
    let c = configuration
    let total = engine.network.modules.parameters.reduce(0) { $0 + $1.tensor.count }
    let window = c.sampling.trainableSteps
    let plan = (try? strategy.plan(steps: window.count))?.sizes.description ?? strategy.description
    let sampled = (try? rowsOfRollout()) ?? c.samplesPerIteration * c.sampling.steps
    let moves = (c.sampling.window.moves ? "about " : "") + "\(sampled) in rollouts"
    let trained = (try? averageTrainedSteps()).map { "about \(Int($0.rounded())) in updates" }
    return [
      ("prompts", "\(prompts.count) (\(c.prompts.split))"),
      ("images per iteration", "\(c.samplesPerIteration)"),
      ("transformer parameters", "\(total)"),
      ("trainable parameters", "\(policy.count)"),
      ("network dtype, device", "\(engine.pipeline.network.dtype), \(engine.device)"),
      ("latents of an image", engine.latentShape.map(String.init).joined(separator: " × ")),
      (
        c.sampling.window.moves && c.sampling.window != .drawn
          ? "chunks over \(window.count) steps"
          : "chunks over steps \(window.lowerBound)…\(window.upperBound - 1)", plan
      ),
      (
        "forward passes per iteration",
        "\(moves), \(trained ?? "updates follow the latents")"
      ),
      ("optimizer steps", "\(c.run.iterations * c.optim.updatesPerIteration)"),
    ] + (strategy == .auto ? [("forward passes of the pilot", "about \(pilotPasses)")] : [])
  }

  private func averageTrainedSteps() throws -> Double {
    let plan = try strategy.plan(steps: configuration.sampling.trainableSteps.count)
    let inclusion = try draw.inclusionProbabilities(of: plan, fraction: configuration.chunk.fraction)
    return try zip(plan.sizes, inclusion).reduce(0) {
      $0 + Double(try ChunkDraw.count(chunks: $1.0, fraction: configuration.chunk.stepFraction)) * $1.1
    } * Double(configuration.samplesPerIteration)
  }

  /// Network evaluations of the first iteration's rollout.
  private func rowsOfRollout() throws -> Int {
    let size = configuration.group.size
    return try courses(samplesOfIteration()).reduce(0) { sum, course in
      let stem = configuration.sampling.prefix == .shared ? course.path.stem : 0
      return sum + stem + size * (course.path.moves.count - stem)
    }
  }

  /// Rows of every forward pass of rollout and update alike.
  private var rows: Int {
    Batches(configuration.samplesPerIteration, of: configuration.optim.microBatch).largest
  }

  // MARK: the run

  /// Trains to the end, from the newest whole checkpoint of the folder if `resume`.
  public func run(resume: Bool) throws {
    if resume {
      try restore()
      guard iteration <= configuration.run.iterations else {
        throw RunError(
          "run.iterations: \(folder.url.path) has done \(iteration) iterations, \(configuration.run.iterations) were asked for: ask for more"
        )
      }
      try folder.update(configuration)
    }
    try engine.encoder.prepare((prompts + fixedPrompts + evaluationPrompts).map(\.text))
    if let warning = engine.encoder.warning { report(.warning(warning)) }
    let total = configuration.run.iterations
    while iteration < total {
      do {
        try Interruption.check()
        let row = try step()
        iteration += 1
        boundary = nil
        try folder.append(row)
        if iteration == 1 { try choice?.write(to: folder.url) }
        report(.iteration(row, of: total))
        if let name = configuration.run.stopReward, let value = row.values["eval/\(name)"],
          value >= configuration.run.stopAbove
        {
          report(.reached("\(name) \(value) on dev: run.stopAbove \(configuration.run.stopAbove) is reached"))
          break
        }
      } catch let interrupted as Interrupted {
        if let boundary { try load(boundary) }
        if saved != iteration { try save() }
        throw interrupted
      }
      if iteration % configuration.run.checkpointEvery == 0 || iteration == total { try save() }
    }
    if saved != iteration { try save() }
  }

  /// One iteration: a rollout and its updates. ``run(resume:)`` counts, records and saves what this does; alone it
  /// repeats the same iteration with the weights as they have become.
  public func step() throws -> MetricsRow {
    var clock = Stopwatch()
    var row = MetricsRow()
    let planning = try choosePlan()
    // What an evaluation or the pilot left is not this iteration's.
    _ = (engine.network.takeSeconds(), engine.network.takePasses(), engine.network.takeRows())
    let spent = Stopwatch.processSeconds
    let batch = samplesOfIteration()
    let conditions = try batch.map { try engine.encoder($0.prompt.text) }

    let courses = try courses(batch)
    let trajectories = try clock.time("rollout") { try rollout(batch, conditions, courses) }
    row.counts["rows_rollout"] = engine.network.takeRows()
    let images = try clock.time("decode") {
      let last =
        configuration.sampling.decode == .x0 ? trajectories.clean : try trajectories.states[table.steps.count]
      return try engine.decode(last)
    }
    let scored = try clock.time("reward") {
      let scores = try rewards.score(images, batch.map(\.prompt))
      // An image with NaN has no score and masks its sample; the guards see it as black.
      let guards = try GuardValues.measure(images, groupSize: configuration.group.size, blackens: true)
      record(guards, "guards/", &row)
      return scores
    }
    let (advantages, seen) = try advantages(scored, batch, &row)
    let samples = try drawChunks(batch, courses, trajectories, advantages.values, &row)
    try clock.time("update") { try self.update(samples, trajectories, conditions, &row) }
    row.counts["rows_update"] = engine.network.takeRows()
    // Only now: a signal until here falls back to the state before.
    self.seen = seen

    row.iteration = iteration + 1
    row.update = update
    row.seconds = clock.seconds
    row.values["images_per_s"] = Double(batch.count) / clock.seconds.values.reduce(0, +)
    row.seconds.merge(planning.seconds) { $1 }
    row.seconds["network"] = engine.network.takeSeconds()
    row.seconds["cpu"] = Stopwatch.processSeconds - spent
    row.counts["network_passes"] = engine.network.takePasses()
    try look(&row)
    _ = (engine.network.takeSeconds(), engine.network.takeRows())
    return row
  }

  private var pilotPrompts: [String] {
    ChunkDynamics.choose(ChunkDynamics.pilot.prompts, of: prompts.map(\.text), random)
  }
  private var pilotPasses: Int {
    pilotPrompts.count * ChunkDynamics.pilot.samples * configuration.sampling.steps
  }

  /// Settles `chunk.plan: auto` once, with the network as it is before the first update; says how long it took.
  private func choosePlan() throws -> Stopwatch {
    var clock = Stopwatch()
    guard strategy == .auto else { return clock }
    let dynamics = try clock.time("pilot") {
      try ChunkDynamics.measure(
        engine, configuration.sampling, prompts: pilotPrompts, samples: ChunkDynamics.pilot.samples,
        distance: Distance(rawValue: configuration.chunk.distance.rawValue)!, random: random, rows: rows,
        check: Interruption.check)
    }
    adopt(try clock.time("planning") { try PlanChoice(dynamics, configuration.chunk) })
    if let choice { report(.note(choice.summary)) }
    return clock
  }

  /// Takes over a plan that was settled before; false if there is none.
  private func recall(from folder: URL) throws -> Bool {
    guard let choice = try PlanChoice(in: folder, steps: configuration.sampling.trainableSteps.count) else {
      return false
    }
    adopt(choice)
    return true
  }

  private func adopt(_ choice: PlanChoice) {
    self.choice = choice
    strategy = .list(choice.plan.sizes)
  }

  private struct Sample {
    let prompt: Prompt
    /// Number within the prompt: 0 ..< group size, further on if a prompt comes twice in an iteration.
    let number: Int
  }

  /// Groups of samples: prompts are taken in shuffled order, epoch after epoch.
  private func samplesOfIteration() -> [Sample] {
    let size = configuration.group.size
    var seen: [Int: Int] = [:]
    var result: [Sample] = []
    var orders: [Int: [Int]] = [:]
    for i in 0..<configuration.group.promptsPerIteration {
      let position = iteration * configuration.group.promptsPerIteration + i
      let epoch = position / prompts.count
      if orders[epoch] == nil {
        var stream = random.stream(.promptOrder, iteration: epoch)
        orders[epoch] = stream.shuffled(prompts.count)
      }
      let index = orders[epoch]![position % prompts.count]
      let before = seen[index, default: 0]
      seen[index] = before + size
      result += (0..<size).map { Sample(prompt: prompts[index], number: before + $0) }
    }
    return result
  }

  /// What the samples of a group have in common: noise windows that differ within it would make rewards differ by them.
  private struct Course {
    /// Steps that chunks are planned for.
    let window: Range<Int>
    /// Chunks drawn for the whole group, where they decide where the noise is.
    let drawn: [Int]?
    let path: SamplingPath
  }

  /// One course a group.
  private func courses(_ batch: [Sample]) throws -> [Course] {
    let c = configuration
    return try stride(from: 0, to: batch.count, by: c.group.size).map { s in
      let (prompt, number) = (batch[s].prompt.text, batch[s].number)
      var stream = random.stream(.window, iteration: iteration, prompt: prompt, sample: number)
      let window = c.sampling.window(iteration: iteration, using: &stream)
      var (noisy, drawn) = ([window], [Int]?.none)
      if c.sampling.window == .drawn {
        let plan = try strategy.plan(steps: window.count)
        let chunks = try draw.draw(from: plan, fraction: c.chunk.fraction, using: &stream)
        (noisy, drawn) = (chunks.map { plan.ranges[$0] }, chunks)
      }
      let path = try SamplingPath(
        table.schedule, kind: StepKind(rawValue: c.sampling.step.rawValue)!, eta: c.sampling.eta,
        stochastic: noisy, coarse: c.sampling.coarse)
      return Course(window: window, drawn: drawn, path: path)
    }
  }

  private func rollout(
    _ batch: [Sample], _ conditions: [Condition], _ courses: [Course]
  ) throws -> Trajectories {
    let streams = batch.map { sample in
      switch configuration.sampling.sharedNoise {
      case .group: random.stream(.initialNoise, iteration: iteration, prompt: sample.prompt.text)
      case .batch: random.stream(.initialNoise, iteration: iteration)
      case .none:
        random.stream(.initialNoise, iteration: iteration, prompt: sample.prompt.text, sample: sample.number)
      }
    }
    var sampler = engine.rollout(table, rows: rows)
    sampler.beforeStep = Interruption.check
    sampler.keepsMeans = configuration.loss.keepsMeans
    let size = configuration.group.size
    return try sampler.sample(
      engine.network, initial: try engine.noise(streams), conditions: conditions,
      paths: batch.indices.map { courses[$0 / size].path },
      sharing: configuration.sampling.prefix == .shared ? size : 1
    ) { s, i, out in
      var stream = random.stream(
        .stepNoise, iteration: iteration, prompt: batch[s].prompt.text, sample: batch[s].number, step: i)
      stream.fillNormal(out)
    }
  }

  /// Rewards of all samples → advantages; invalid scores mask their sample out of its group.
  ///
  /// - Returns: also ``seen`` with these rewards.
  private func advantages(
    _ scores: [[Double?]], _ batch: [Sample], _ row: inout MetricsRow
  ) throws -> (Advantages, seen: [String: RewardStatistics]) {
    let (c, size) = (configuration, configuration.group.size)
    let total = c.samplesPerIteration
    let masked = (0..<total).map { s in scores.contains { $0[s] == nil || !$0[s]!.isFinite } }
    guard masked.contains(false) else {
      throw RunError("iteration \(iteration + 1): no sample has a valid reward")
    }
    let groups = stride(from: 0, to: total, by: size).map { $0..<($0 + size) }
    let aggregate = RewardAggregate(rawValue: c.aggregate.rawValue)!
    let weights = c.rewards.map(\.weight)
    let combined = try groups.map { group in
      try aggregate.combine(
        rewards: scores.map { $0[group].map { $0 ?? 0 } }, weights: weights, masked: Array(masked[group]))
    }
    let texts = groups.map { batch[$0.lowerBound].prompt.text }
    var seen = seen
    if c.group.statistics == .running {
      for (text, (rewards, group)) in zip(texts, zip(combined, groups)) {
        seen[text, default: RewardStatistics()].add(zip(rewards, masked[group]).filter { !$1 }.map(\.0))
      }
    }
    let advantages = try Advantages.groups(
      rewards: combined, masked: groups.map { Array(masked[$0]) },
      std: AdvantageStd(rawValue: c.loss.advantageStd.rawValue)!,
      clamp: c.loss.advantageClip, running: c.group.statistics == .running ? texts.map { seen[$0]! } : nil)
    // Means over valid samples; reward_mean is the weighted sum whatever the aggregation, so that curves compare.
    let valid = (0..<total).filter { !masked[$0] }
    for (name, values) in zip(rewards.names, scores) {
      row.values["reward/\(name)"] = valid.reduce(0) { $0 + values[$1]! } / Double(valid.count)
    }
    let sums = valid.map { s in zip(weights, scores).reduce(0) { $0 + $1.0 * $1.1[s]! } }
    let summary = try Summary(sums)
    row.values["reward_mean"] = summary.mean
    row.values["reward_std"] = summary.standardDeviation
    row.counts["zero_groups"] = advantages.zeroGroups
    row.counts["masked"] = advantages.masked
    return (advantages, seen)
  }

  /// Cuts every trajectory into chunks and draws those it is trained on.
  private func drawChunks(
    _ batch: [Sample], _ courses: [Course], _ trajectories: Trajectories, _ advantages: [Double],
    _ row: inout MetricsRow
  ) throws -> [UpdateSample] {
    let c = configuration.chunk
    let courses = batch.indices.map { courses[$0 / configuration.group.size] }
    let windows = courses.map(\.window)
    let curves =
      strategy.needsCurve || draw.needsWeights
      ? try trajectories.dynamics(Distance(rawValue: c.distance.rawValue)!, over: windows) : []
    let plans = try strategy.plans(
      steps: windows[0].count, samples: batch.count, curves: curves, stopSize: c.stopSize,
      minChunk: c.minChunk)
    /// w_j, the mean change of a chunk's steps
    func weights(_ plan: ChunkPlan, _ curve: [Double]?) -> [Double]? {
      draw.needsWeights ? curve.map(plan.means) : nil
    }
    let mean = curves.first?.indices.map { i in
      curves.reduce(0) { $0 + $1[i] } / Double(curves.count)
    }
    let plan =
      strategy == .adaptive
      ? try .adaptive(curve: mean ?? [], stopSize: c.stopSize, minChunk: c.minChunk) : plans[0]
    row.chunkSizes = plan.sizes
    row.drawProbabilities = try draw.probabilities(of: plan, weights: weights(plan, mean))
    row.inclusion = try draw.inclusionProbabilities(
      of: plan, fraction: c.fraction, weights: weights(plan, mean))
    if strategy == .adaptive { row.counts["plans"] = Set(plans.map(\.sizes)).count }
    let samples = try batch.enumerated().map { r, sample in
      let (plan, window) = (plans[r], windows[r])
      let timeWeights = try timeWeight.weights(plan: plan, steps: Array(table.steps[window]))
      var stream = random.stream(
        .chunkDraw, iteration: iteration, prompt: sample.prompt.text, sample: sample.number)
      let drawn =
        try courses[r].drawn
        ?? draw.draw(
          from: plan, fraction: c.fraction, weights: weights(plan, curves.isEmpty ? nil : curves[r]),
          using: &stream)
      var choice = random.stream(
        .stepDraw, iteration: iteration, prompt: sample.prompt.text, sample: sample.number)
      let chunks = try drawn.map { j in
        let steps = try ChunkDraw.steps(of: plan.ranges[j], fraction: c.stepFraction, using: &choice)
        return (steps: steps.map { $0 + window.lowerBound }, weight: timeWeights[j])
      }
      return UpdateSample(row: r, advantage: advantages[r], steps: chunks)
    }
    row.counts["zero_samples"] = samples.count { $0.advantage == 0 }
    // A divergence from the reference trains on the others too.
    row.counts["trained_steps"] = samples.reduce(0) {
      $0 + ($1.advantage != 0 || configuration.loss.kl > 0 ? $1.stepCount : 0)
    }
    return samples
  }

  /// The updates of one iteration.
  private func update(
    _ samples: [UpdateSample], _ trajectories: Trajectories, _ conditions: [Condition],
    _ row: inout MetricsRow
  ) throws {
    let c = configuration
    var rule = engine.update(
      table, microBatch: rows, ratio: RatioKind(rawValue: c.chunk.ratio.rawValue)!,
      clip: ClipRange(low: c.loss.clip[0], high: c.loss.clip[1]))
    rule.beforeStep = Interruption.check
    rule.ratioNorm = RatioNorm(rawValue: c.loss.ratioNorm.rawValue)!
    if c.loss.kl > 0 {
      rule.penalty = ReferencePenalty(
        beta: c.loss.kl, form: ReferencePenalty.Form(rawValue: c.loss.klForm.rawValue)!
      ) { [policy] in try policy.reference($0) }
    }
    // Until the iteration is done this is the state that a signal falls back to.
    boundary = try snapshot()
    let trajectories =
      c.loss.anchor == .replay
      ? try rule.anchored(samples, trajectories, conditions: conditions) : trajectories
    var stream = random.stream(.sampleOrder, iteration: iteration)
    let order = stream.shuffled(samples.count)
    var deviations: [Double] = []
    var clipped = 0
    var norms: [Double] = []
    var divergence = 0.0
    let parts = c.optim.updatesPerIteration
    for u in 0..<parts {
      let chosen = order[(samples.count * u / parts)..<(samples.count * (u + 1) / parts)].map { samples[$0] }
      let result = try rule.accumulate(chosen, trajectories, conditions: conditions, first: u == 0)
      if u == 0 {
        row.values["replay_gap"] = result.replayGap
        try check(result)
      }
      let norm = try optimizer.clipGradients(maxNorm: c.optim.maxGradNorm)
      guard norm.isFinite else {
        throw RunError(
          "iteration \(iteration + 1), update \(u + 1): the gradient's norm is \(norm); lower optim.lr and resume from the last checkpoint"
        )
      }
      try optimizer.step()
      try average?.update()
      update += 1
      norms.append(norm)
      deviations += result.ratios.map { abs($0 - 1) }
      clipped += result.clipped
      divergence += result.divergence / Double(parts)
    }
    if c.loss.kl > 0 { row.values["kl"] = divergence }
    row.values["grad_norm"] = norms.reduce(0, +) / Double(norms.count)
    row.values["ratio_dev"] = deviations.isEmpty ? 0 : deviations.reduce(0, +) / Double(deviations.count)
    row.values["ratio_dev_max"] = deviations.max() ?? 0
    row.values["clip_share"] = deviations.isEmpty ? 0 : Double(clipped) / Double(deviations.count)
  }

  /// Stops a run whose replay does not reproduce the rollout: its ratios would mean nothing.
  ///
  /// Anchored in a replay they start at 1 whatever the gap; one as wide as the clip range is more than rounding.
  private func check(_ report: UpdateReport) throws {
    let replays = configuration.loss.anchor == .replay
    let limit = configuration.loss.clip.min()! / (replays ? 1 : 10)
    guard let at = report.replayGapAt, !(report.replayGap <= limit) else { return }
    throw RunError(
      "iteration \(iteration + 1): replayed log-probability of sample \(at.row), step \(at.step) differs from the rollout's by "
        + "\(report.replayGap), \(replays ? "" : "a tenth of ")the clip range is \(limit): "
        + (replays ? "that is more than rounding. " : "ratios would not start at 1. ")
        + "Try network.dtype=float32, \(replays ? "" : "loss.anchor=replay, ")or another optim.microBatch")
  }

  // MARK: looking

  private func record(_ guards: GuardValues, _ prefix: String, _ row: inout MetricsRow) {
    row.values[prefix + "blank"] = guards.blank
    row.values[prefix + "diversity"] = guards.diversity
    row.values[prefix + "ink"] = guards.ink
    row.values[prefix + "vivid"] = guards.vivid
  }

  /// Pictures and evaluation, when they are due after this iteration.
  private func look(_ row: inout MetricsRow) throws {
    let run = configuration.run
    func due(_ every: Int) -> Bool { every > 0 && row.iteration % every == 0 }
    if due(run.samplesEvery), !fixedPrompts.isEmpty {
      try averaged { try draw(name: row.iteration) }
    }
    if due(run.evaluateEvery), !evaluationPrompts.isEmpty {
      let evaluation = try averaged {
        try Evaluation.run(
          engine, evaluationPrompts, rewards, count: 2, steps: configuration.sampling.steps,
          seed: configuration.seed,
          check: Interruption.check)
      }
      for (name, values) in evaluation.perPrompt {
        row.values["eval/\(name)"] = values.reduce(0, +) / Double(values.count)
      }
      if let guards = evaluation.guards { record(guards, "eval/guards/", &row) }
    }
  }

  /// Runs `body` with the weights that are shipped: the average where one is kept.
  private func averaged<R>(_ body: () throws -> R) throws -> R {
    try average?.withAverage(body) ?? body()
  }

  /// A labelled grid of fixed prompts and noise.
  private func draw(name: Int) throws {
    let count = 4
    try FileManager.default.createDirectory(at: folder.samples, withIntermediateDirectories: true)
    let images = try engine.draw(
      fixedPrompts.map(\.text), count: count, steps: configuration.sampling.steps, seed: configuration.seed,
      check: Interruption.check)
    let rows = try fixedPrompts.enumerated().map { i, prompt in
      Grid.Row(prompt.text, cells: try (0..<count).map { Grid.Cell(try Image(try images[i * count + $0])) })
    }
    let scale = max(1, 128 / configuration.sampling.width)
    try Grid(title: "iteration \(name)", rows: rows, scale: scale).render()
      .write(png: folder.samples.appending(path: "iteration-\(String(name).leftPadded(to: 6)).png"))
  }

  // MARK: checkpoints

  private var state: TrainingState {
    TrainingState(parameters: policy.parameters, optimizer: optimizer, average: average)
  }
  private func snapshot() throws -> [String: Tensor] {
    var snapshot = try state.snapshot(update: update)
    if configuration.group.statistics == .running {
      snapshot["rewards"] = try Tensor(
        prompts.flatMap { (seen[$0.text] ?? RewardStatistics()).values }, shape: [prompts.count, 5])
    }
    return snapshot
  }
  private func load(_ snapshot: [String: Tensor]) throws {
    update = try state.load(snapshot)
    guard configuration.group.statistics == .running else { return }
    let rewards = try TrainingState.entry("rewards", of: snapshot)
    let rows = try rewards.doubles()
    guard rewards.shape == [prompts.count, 5] else {
      throw RunError(
        "checkpoint: rewards are those of \(rewards.shape[0]) prompts, \(configuration.prompts.file) has \(prompts.count): "
          + "give the run its own prompt file back")
    }
    for (i, prompt) in prompts.enumerated() {
      seen[prompt.text] = RewardStatistics(values: Array(rows[(5 * i)..<(5 * i + 5)]))
    }
  }

  private func save() throws {
    try folder.save(iteration: iteration, update: update, keep: configuration.run.keep) { target in
      try TrainingState.write(try snapshot(), iteration: iteration, to: target)
      try averaged { try policy.export(to: target, config: transformerConfig) }
      try AtomicFile.write(Data(configuration.yaml().utf8), to: target.appending(path: "config.yaml"))
      try choice?.write(to: target)
    }
    try exportAdapter()
    saved = iteration
    report(.checkpoint("iteration \(iteration)"))
  }

  private var transformerConfig: URL {
    URL(filePath: configuration.model).appending(path: "transformer/config.json")
  }
  private func exportAdapter() throws {
    try averaged { try policy.export(to: folder.adapter, config: transformerConfig) }
  }

  private func restore() throws {
    guard let found = try folder.rewind({ report(.warning($0)) }) else {
      if strategy == .auto { _ = try recall(from: folder.url) }
      return
    }
    try load(try TrainingState.read(found.folder))
    iteration = found.iteration
    saved = iteration
    if strategy == .auto, !(try recall(from: found.folder)), iteration > 0 {
      throw RunError("\(found.folder.path): \(PlanChoice.fileName), the plan of chunk.plan auto, is missing")
    }
    // A kill may have come between the checkpoint and the adapter.
    try exportAdapter()
  }
}

extension String {
  func leftPadded(to width: Int) -> String { String(repeating: "0", count: max(0, width - count)) + self }
}
