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
  /// Those that samples are scored with.
  let sampled: RewardSet
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
  private var watch: GuardWatch
  /// Why the run is to end before its last iteration.
  private var ending: String?
  private var isProbed = false
  /// Iterations done.
  public private(set) var iteration = 0
  private var update = 0
  /// With running statistics: the rewards of each prompt in all iterations done.
  private var seen: [String: RewardStatistics] = [:]
  private var saved = -1
  private var boundary: [String: Tensor]?

  /// Loads everything and checks what can be checked before the first rollout.
  public convenience init(_ configuration: Configuration, folder: RunFolder) throws {
    try configuration.validate()
    try self.init(configuration, folder: folder, rewards: RewardSet(configuration.rewards))
  }

  /// With rewards that are made already, of a valid configuration.
  init(_ configuration: Configuration, folder: RunFolder, rewards: RewardSet) throws {
    self.configuration = configuration
    self.folder = folder
    let c = configuration
    let file = try PromptFile(file: URL(filePath: c.prompts.file), split: c.prompts.split)
    prompts = file.prompts
    self.rewards = rewards
    sampled = rewards.sampled
    watch = GuardWatch(c.guards, rewards)
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
    let all = try PromptFile(file: URL(filePath: c.prompts.file), split: "all").prompts
    evaluationPrompts = all.filter { $0.split == "dev" }
    if evaluationPrompts.isEmpty, c.guards.action == .stop || c.rewards.contains(where: \.watch) {
      throw RunError(
        "prompts.file: \(c.prompts.file) has no split dev, on which held-out rewards (watch) and guards.action stop depend: "
          + "give some lines split dev, or drop those keys")
    }
    // A reward that cannot judge these prompts or images is found now, not after the first rollout.
    try rewards.check(prompts + evaluationPrompts)
    let blank = try Tensor.zeros([1, 3, c.sampling.height, c.sampling.width])
    _ = try RewardSet(rewards.entries.filter { $0.reward is any LocalReward }).judge(blank, [prompts[0]])
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
    try probeRewards()
    try engine.encoder.prepare((prompts + fixedPrompts + evaluationPrompts).map(\.text))
    if let warning = engine.encoder.warning { report(.warning(warning)) }
    try measureBaseline()
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
        if ending != nil { break }
      } catch let error where error is Interrupted || error is RewardFailure {
        // Either can be gone on from: the unfinished iteration is dropped.
        if let boundary { try load(boundary) }
        if saved != iteration { try save() }
        guard error is RewardFailure else { throw error }
        throw RunError("\(error); mend that and go on with train --resume \(folder.url.path)")
      }
      if iteration % configuration.run.checkpointEvery == 0 || iteration == total { try save() }
    }
    if saved != iteration { try save() }
    if let ending { try returnToBest(ending) }
  }

  /// One iteration: a rollout and its updates. ``run(resume:)`` counts, records and saves what this does; alone it
  /// repeats the same iteration with the weights as they have become.
  public func step() throws -> MetricsRow {
    var clock = Stopwatch()
    var row = MetricsRow()
    let pilot = try choosePlan()
    // What an evaluation or the pilot left is not this iteration's.
    _ = (engine.network.takeSeconds(), engine.network.takePasses(), engine.network.takeRows())
    let spent = Stopwatch.processSeconds
    let batch = samplesOfIteration()
    let conditions = try batch.map { try engine.encoder($0.prompt.text) }

    let courses = try courses(batch)
    let (trajectories, images, asked) = try sampleAndDecode(batch, conditions, courses, &clock)
    row.counts["rows_rollout"] = engine.network.takeRows()
    let judgement = try clock.time("reward") {
      // An image with NaN has no score and masks its sample; the guards see it as black.
      let guards = try GuardValues.measure(images, groupSize: configuration.group.size, blackens: true)
      record(guards, "guards/", &row)
      return try Judgement(asked.map { ($0.rows, try $0.pending.finish(check: Interruption.check)) })
    }
    record(judgement, &row)
    try sampled.checkFailures(judgement, iteration: iteration + 1)
    let (advantages, seen) = try advantages(judgement.values, batch, &row)
    let samples = try clock.time("planning") {
      try drawChunks(batch, courses, trajectories, advantages, &row)
    }
    try clock.time("update") { try self.update(samples, trajectories, conditions, &row) }
    row.counts["rows_update"] = engine.network.takeRows()
    // Only now: a signal until here falls back to the state before.
    self.seen = seen

    row.iteration = iteration + 1
    row.update = update
    row.seconds = clock.seconds
    row.values["images_per_s"] = Double(batch.count) / clock.seconds.values.reduce(0, +)
    row.seconds.merge(pilot.seconds) { $1 }
    for (name, seconds) in zip(sampled.names, judgement.seconds) { row.seconds["reward/\(name)"] = seconds }
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
    adopt(try clock.time("pilot") { try PlanChoice(dynamics, configuration.chunk) })
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

  struct Sample {
    let prompt: Prompt
    /// Number within the prompt: 0 ..< group size, further on if a prompt comes twice in an iteration.
    let number: Int
  }

  /// Groups of samples: prompts are taken in shuffled order, epoch after epoch.
  func samplesOfIteration() -> [Sample] {
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
  struct Course {
    /// Steps that chunks are planned for.
    let window: Range<Int>
    /// Chunks drawn for the whole group, where they decide where the noise is.
    let drawn: [Int]?
    let path: SamplingPath
  }

  /// One course a group.
  func courses(_ batch: [Sample]) throws -> [Course] {
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
    _ batch: [Sample], _ conditions: [Condition], _ courses: [Course],
    arrived: (([Int], Tensor, Tensor) throws -> Void)? = nil
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
    sampler.arrived = arrived
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

  /// Trajectories, images and the questions put to rewards, with the samples that each is about.
  ///
  /// A reward that waits for others is asked about every batch of samples as soon as it has arrived, and answers while
  /// the next one is sampled; local rewards gain nothing by that where the network takes all cores.
  func sampleAndDecode(
    _ batch: [Sample], _ conditions: [Condition], _ courses: [Course], _ clock: inout Stopwatch
  ) throws -> (Trajectories, images: Tensor, asked: [(rows: [Int], pending: PendingJudgement)]) {
    let clean = configuration.sampling.decode == .x0
    guard sampled.waits else {
      let trajectories = try clock.time("rollout") { try rollout(batch, conditions, courses) }
      let images = try clock.time("decode") {
        try engine.decode(clean ? trajectories.clean : try trajectories.states[table.steps.count])
      }
      return (trajectories, images, [(Array(batch.indices), sampled.begin(images, batch.map(\.prompt)))])
    }
    var (decoding, parts) = (Stopwatch(), [(rows: [Int], images: Tensor)]())
    var asked: [(rows: [Int], pending: PendingJudgement)] = []
    let trajectories = try clock.time("rollout") {
      try rollout(batch, conditions, courses) { rows, estimate, end in
        let images = try decoding.time("decode") { try self.engine.decode(clean ? estimate : end) }
        parts.append((rows, images))
        asked.append((rows, self.sampled.begin(images, rows.map { batch[$0].prompt })))
      }
    }
    clock.move(decoding.seconds["decode"] ?? 0, from: "rollout", to: "decode")
    var place = [Int](repeating: 0, count: batch.count)
    for (at, row) in parts.flatMap(\.rows).enumerated() { place[row] = at }
    let images = try Tensor.cat(parts.map(\.images))
    return (
      trajectories, try images.indexSelect(0, try Tensor(place.map(Int64.init)).to(images.device)), asked
    )
  }

  /// Means of each reward, and how often it failed or was asked again.
  private func record(_ judgement: Judgement, _ row: inout MetricsRow) {
    for (name, scores) in zip(sampled.names, judgement.scores) {
      let valid = scores.compactMap(\.value)
      row.values["reward/\(name)"] = valid.isEmpty ? .nan : valid.reduce(0, +) / Double(valid.count)
      for part in Set(scores.flatMap(\.parts.keys)).sorted() {
        let values = scores.compactMap { $0.value == nil ? nil : $0.parts[part] }
        if !values.isEmpty {
          row.values["reward/\(name)/\(part)"] = values.reduce(0, +) / Double(values.count)
        }
      }
      let (failed, retries) = (scores.count - valid.count, scores.reduce(0) { $0 + $1.retries })
      row.counts["failed/\(name)"] = failed
      if retries > 0 { row.counts["retries/\(name)"] = retries }
      if failed > 0, let reason = scores.last(where: { $0.value == nil })?.failure {
        report(.warning("reward \(name) failed for \(failed) of \(scores.count) samples: \(reason)"))
      }
    }
  }

  /// Tries every reward on two images of known order, unless this has been done.
  ///
  /// ``run(resume:)`` does it too: call this first where nothing is to be written if it fails.
  public func probeRewards() throws {
    guard !isProbed else { return }
    try rewards.probe(check: Interruption.check) { report(.warning($0)) }
    isProbed = true
  }

  /// Advantages of all samples in early chunks, and in late ones where rewards weigh otherwise there.
  struct ChunkAdvantages {
    let early: Advantages
    let late: Advantages?
  }

  /// Rewards of all samples → advantages; invalid scores mask their sample out of its group.
  ///
  /// - Returns: also ``seen`` with these rewards.
  /// - Parameter weights: factors of the rewards, in early and late chunks alike; nil for those of the configuration.
  func advantages(
    _ scores: [[Double?]], _ batch: [Sample], weights: [Double]? = nil, _ row: inout MetricsRow
  ) throws -> (ChunkAdvantages, seen: [String: RewardStatistics]) {
    let (c, size) = (configuration, configuration.group.size)
    let total = c.samplesPerIteration
    let masked = sampled.masked(scores)
    let counted = sampled.counted(scores)
    let groups = stride(from: 0, to: total, by: size).map { $0..<($0 + size) }
    let aggregate = RewardAggregate(rawValue: c.aggregate.rawValue)!
    let texts = groups.map { batch[$0.lowerBound].prompt.text }
    var seen = seen
    func advantages(_ weights: [Double]) throws -> Advantages {
      // A reward without weight may have failed: it is no part of the sum.
      let chosen = weights.indices.filter { weights[$0] != 0 }
      let combined = try groups.map { group in
        guard !chosen.isEmpty else { return [Double](repeating: 0, count: size) }
        return try aggregate.combine(
          rewards: chosen.map { counted[$0][group].map { $0 ?? 0 } }, weights: chosen.map { weights[$0] },
          masked: Array(masked[group]), clamp: c.loss.advantageClip)
      }
      let hidden = groups.map { Array(masked[$0]) }
      if aggregate == .advantages {
        return .summed(combined, masked: hidden, clamp: c.loss.advantageClip)
      }
      if c.group.statistics == .running {
        for (text, (rewards, group)) in zip(texts, zip(combined, groups)) {
          seen[text, default: RewardStatistics()].add(zip(rewards, masked[group]).filter { !$1 }.map(\.0))
        }
      }
      return try Advantages.groups(
        rewards: combined, masked: hidden, std: AdvantageStd(rawValue: c.loss.advantageStd.rawValue)!,
        clamp: c.loss.advantageClip,
        running: c.group.statistics == .running ? texts.map { seen[$0]! } : nil)
    }
    let settings = sampled.entries.map(\.settings)
    let early = try advantages(weights ?? settings.map(\.weight))
    let late =
      weights == nil && settings.contains { $0.lateWeight != nil }
      ? try advantages(settings.map { $0.lateWeight ?? $0.weight }) : nil
    // The weighted sum whatever the aggregation, over valid samples, so that curves compare.
    let sums = (0..<total).filter { !masked[$0] }.map { s in
      zip(settings, counted).reduce(0) { $0 + ($1.0.weight == 0 ? 0 : $1.0.weight * $1.1[s]!) }
    }
    let summary = try Summary(sums)
    row.values["reward_mean"] = summary.mean
    row.values["reward_std"] = summary.standardDeviation
    row.counts["zero_groups"] = early.zeroGroups
    row.counts["masked"] = early.masked
    return (ChunkAdvantages(early: early, late: late), seen)
  }

  /// Cuts every trajectory into chunks and draws those it is trained on.
  func drawChunks(
    _ batch: [Sample], _ courses: [Course], _ trajectories: Trajectories, _ advantages: ChunkAdvantages,
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
      let own = drawn.map { j in
        let start = table.schedule.sigmas[plan.ranges[j].lowerBound + window.lowerBound]
        let late = Double(start) < c.lateBelow ? advantages.late : nil
        return (late ?? advantages.early).values[r]
      }
      return UpdateSample(row: r, advantages: own, steps: chunks)
    }
    row.counts["zero_samples"] = samples.count { !$0.counts }
    // A divergence from the reference trains on the others too.
    row.counts["trained_steps"] = samples.reduce(0) {
      $0 + ($1.counts || configuration.loss.kl > 0 ? $1.stepCount : 0)
    }
    return samples
  }

  /// How samples become gradients; without a penalty.
  func updateRule() -> PolicyUpdate {
    let c = configuration
    var rule = engine.update(
      table, microBatch: rows, ratio: RatioKind(rawValue: c.chunk.ratio.rawValue)!,
      clip: ClipRange(low: c.loss.clip[0], high: c.loss.clip[1]))
    rule.beforeStep = Interruption.check
    rule.ratioNorm = RatioNorm(rawValue: c.loss.ratioNorm.rawValue)!
    return rule
  }

  /// The updates of one iteration.
  private func update(
    _ samples: [UpdateSample], _ trajectories: Trajectories, _ conditions: [Condition],
    _ row: inout MetricsRow
  ) throws {
    let c = configuration
    var rule = updateRule()
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
    for (name, value) in guards.named { row.values[prefix + name] = value }
  }

  /// Pictures and evaluation, when they are due after this iteration.
  private func look(_ row: inout MetricsRow) throws {
    let run = configuration.run
    func due(_ every: Int) -> Bool { every > 0 && row.iteration % every == 0 }
    if due(run.samplesEvery), !fixedPrompts.isEmpty {
      try averaged { try draw(name: row.iteration) }
    }
    if due(run.evaluateEvery), !evaluationPrompts.isEmpty {
      let evaluation = try evaluate()
      for name in rewards.names { row.values["eval/\(name)"] = evaluation.mean(name) }
      for (name, failures) in evaluation.failures.sorted(by: { $0.key < $1.key }) {
        row.counts["eval/failed/\(name)"] = failures.images
        report(
          .warning(
            "evaluation: reward \(name) failed for \(failures.images) of \(2 * evaluationPrompts.count) images: "
              + failures.reason))
      }
      if let guards = evaluation.guards { record(guards, "eval/guards/", &row) }
      try judge(evaluation, &row)
    }
  }

  /// The dev split, two images a prompt.
  private func evaluate() throws -> Evaluation {
    try averaged {
      try Evaluation.run(
        engine, evaluationPrompts, rewards, count: 2, steps: configuration.sampling.steps,
        seed: configuration.seed, check: Interruption.check)
    }
  }

  /// What guards and held-out rewards are before training, once a run.
  private func measureBaseline() throws {
    guard configuration.guards.action != .off, configuration.run.evaluateEvery > 0,
      !evaluationPrompts.isEmpty,
      try !watch.begin(in: folder.url)
    else { return }
    guard iteration == 0 else {
      return report(
        .warning("\(folder.url.path) has no \(GuardWatch.fileName): guards are compared with nothing"))
    }
    let evaluation = try evaluate()
    guard watch.trained(evaluation).isFinite else {
      let reason = evaluation.failures.values.first?.reason ?? "no score"
      return report(
        .warning("no reward for any dev image before training (\(reason)): guards are compared with nothing"))
    }
    let encoder = JSONEncoder()
    encoder.outputFormatting = .sortedKeys
    try AtomicFile.write(
      try encoder.encode(watch.begin(evaluation)), to: folder.url.appending(path: GuardWatch.fileName))
  }

  /// Compares an evaluation with the baseline: warns, keeps the best, or ends the run.
  private func judge(_ evaluation: Evaluation, _ row: inout MetricsRow) throws {
    guard watch.baseline != nil else { return }
    let outside = watch.outside(evaluation)
    row.counts["guards_outside"] = outside.count
    if outside.isEmpty {
      if configuration.guards.action == .stop, watch.trained(evaluation).isFinite {
        try keepIfBest(watch.trained(evaluation), row.iteration)
      }
      return
    }
    guard watch.hasRisen(evaluation) else { return }
    let text = "iteration \(row.iteration): the reward rises, but \(outside.joined(separator: ", "))"
    report(.warning(text))
    if configuration.guards.action == .stop { ending = text }
  }

  // MARK: the best evaluation

  private struct Best: Codable { let iteration: Int, value: Double }
  private var best: URL { folder.url.appending(path: "best") }
  private var bestNote: URL { best.appending(path: "best.json") }

  /// Keeps the weights that are shipped, if no evaluation with all guards inside was as good.
  private func keepIfBest(_ value: Double, _ iteration: Int) throws {
    if let data = FileManager.default.contents(atPath: bestNote.path),
      let before = try? JSONDecoder().decode(Best.self, from: data), before.value >= value,
      before.iteration < iteration
    {
      return
    }
    try averaged { try policy.export(to: best, config: transformerConfig) }
    try AtomicFile.write(try JSONEncoder().encode(Best(iteration: iteration, value: value)), to: bestNote)
  }

  /// Ships the best weights instead of the last.
  private func returnToBest(_ reason: String) throws {
    guard let data = FileManager.default.contents(atPath: bestNote.path),
      let best = try? JSONDecoder().decode(Best.self, from: data)
    else {
      return report(
        .reached(
          "\(reason): the run ends; no evaluation had all guards inside, so the adapter is the last one"))
    }
    for name in try FileManager.default.contentsOfDirectory(atPath: self.best.path) where name != "best.json"
    {
      let (target, copy) = (
        folder.adapter.appending(path: name), folder.adapter.appending(path: "\(name).tmp-best")
      )
      try? FileManager.default.removeItem(at: copy)
      try FileManager.default.copyItem(at: self.best.appending(path: name), to: copy)
      guard rename(copy.path, target.path) == 0 else {
        throw RunError("\(target.path): \(String(cString: strerror(errno)))")
      }
    }
    report(
      .reached("\(reason): the run ends with the adapter of iteration \(best.iteration), the best before"))
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
