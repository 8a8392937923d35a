import FlowModels

extension Configuration {
  /// Refuses values that make no sense, alone or together.
  ///
  /// Not checked here: whether the model and the prompts exist, which sizes the model takes, and whether a
  /// reward is known; their owners do.
  /// - Throws: ``ConfigurationError/invalid(path:reason:)``, or ``ConfigurationError/several(_:)`` for all that are wrong
  ///   at once.
  public func validate() throws(ConfigurationError) {
    if let error = ConfigurationError(problems) { throw error }
  }

  /// Everything that ``validate()`` refuses.
  var problems: [ConfigurationError] {
    let validation = Validation(self)
    validation.run()
    return validation.problems
  }
}

/// Collects what is wrong with a configuration; a check whose subject is already refused is left out.
private final class Validation {
  let model, output: String
  let prompts: Configuration.Prompts
  let rewards: [Configuration.Reward]
  let aggregate: Configuration.Aggregate
  let sampling: Configuration.Sampling
  let group: Configuration.Group
  let chunk: Configuration.Chunk
  let loss: Configuration.Loss
  let optim: Configuration.Optim
  let trainable: Configuration.Trainable
  let ema: Configuration.EMA
  let guards: Configuration.Guards
  let network: Configuration.Network
  let runSettings: Configuration.Run
  private(set) var problems: [ConfigurationError] = []

  init(_ c: Configuration) {
    (model, output, prompts, rewards, sampling) = (c.model, c.output, c.prompts, c.rewards, c.sampling)
    (aggregate, group, chunk, loss, optim) = (c.aggregate, c.group, c.chunk, c.loss, c.optim)
    (trainable, ema, guards, network, runSettings) = (c.trainable, c.ema, c.guards, c.network, c.run)
  }

  func run() {
    validateSources()
    validateSampling()
    validateGroupAndOptim()
    validateLoss()
    validateChunks()
    validateTrainable()
    validateGuards()
    validateRun()
  }

  private func validateSources() {
    for (path, text) in [
      ("model", model), ("output", output), ("prompts.file", prompts.file), ("prompts.split", prompts.split),
      ("prompts.embeddings", prompts.embeddings),
    ] {
      require(!text.isEmpty, path, "expected a name, got an empty one")
    }
    require(!rewards.isEmpty, "rewards", "empty; name at least one, such as [{name: scenes}]")
    for (index, reward) in rewards.enumerated() {
      require(!reward.name.isEmpty, "rewards[\(index)].name", "missing or empty")
      require(
        reward.weight.isFinite, "rewards[\(index)].weight", "expected a finite number, got \(reward.weight)")
      validate(reward, at: index)
    }
    require(
      rewards.isEmpty || rewards.contains { !$0.watch && ($0.weight != 0 || $0.lateWeight ?? 0 != 0) },
      "rewards", "every weight is 0, nothing would be learned")
  }

  private func validate(_ reward: Configuration.Reward, at index: Int) {
    let (path, names) = ("rewards[\(index)]", RewardSet.names(rewards))
    let twin = names[..<index].firstIndex(of: names[index])
    require(
      twin == nil, path,
      "called \(names[index]) as rewards[\(twin ?? 0)] is; add up their weights in one, or give it a label")
    require(
      reward.label.map { !$0.isEmpty && !$0.contains("/") } ?? true, "\(path).label",
      "expected a name without /, got \"\(reward.label ?? "")\"")
    for (key, value) in [("lateWeight", reward.lateWeight), ("threshold", reward.threshold)] {
      require(value?.isFinite ?? true, "\(path).\(key)", "expected a finite number")
    }
    if let gate = reward.gate.reward {
      let at = names.firstIndex(of: gate)
      require(
        at != nil && at != index, "\(path).gate.reward",
        "expected another of the rewards (\(names.filter { $0 != names[index] }.joined(separator: ", "))), got \"\(gate)\""
      )
      require(
        at.map { !rewards[$0].watch } ?? true, "\(path).gate.reward",
        "\(gate) is only watched, samples have no score of it; drop its watch, its weight may be 0")
    }
    let failure = reward.failure
    positive(failure.timeout, "\(path).failure.timeout")
    atLeast(0, failure.retries, "\(path).failure.retries")
    require(
      0 <= failure.abortAbove && failure.abortAbove <= 1, "\(path).failure.abortAbove",
      "expected a share in [0, 1], got \(failure.abortAbove.yamlText)")
    if let batch = reward.batch { atLeast(1, batch, "\(path).batch") }
    if let concurrency = reward.concurrency { atLeast(1, concurrency, "\(path).concurrency") }
    require(
      !reward.watch || runSettings.evaluateEvery > 0, "\(path).watch",
      "is scored at evaluations, run.evaluateEvery 0 makes none; set it")
    require(
      reward.lateWeight == nil || group.statistics == .group, "\(path).lateWeight",
      "makes two sums of rewards, group.statistics running keeps one; use group")
  }

  private func validateGuards() {
    require(
      guards.blank >= 0 && guards.blank.isFinite, "guards.blank",
      "expected a number of 0 or more, got \(guards.blank.yamlText)")
    require(
      0 <= guards.diversity && guards.diversity <= 1, "guards.diversity",
      "expected a factor in [0, 1], got \(guards.diversity.yamlText)")
    for (key, band) in [("ink", guards.ink), ("sharpness", guards.sharpness), ("grid", guards.grid)] {
      require(
        band.count == 2 && 0 <= band[0] && band[0] <= 1 && 1 <= band[1] && band[1].isFinite, "guards.\(key)",
        "expected two factors around 1, [lower, upper], got \(Self.text(band))")
    }
    require(
      guards.action != .stop || runSettings.evaluateEvery > 0, "guards.action",
      "stop looks at evaluations, run.evaluateEvery 0 makes none; set it")
  }

  private func validateSampling() {
    atLeast(2, sampling.steps, "sampling.steps", "the last step is never trained on")
    positive(sampling.shift, "sampling.shift")
    if let guidance = sampling.guidance { notNegative(guidance, "sampling.guidance") }
    if let length = sampling.textLength { atLeast(1, length, "sampling.textLength") }
    atLeast(1, sampling.height, "sampling.height")
    atLeast(1, sampling.width, "sampling.width")
    require(
      sampling.step != .ode, "sampling.step",
      "an ode step has no log-probability, so it cannot be trained on; use flow-sde, dance-sde or cps")
    notNegative(sampling.eta, "sampling.eta")
    require(
      sampling.eta > 0, "sampling.eta",
      "0 makes every step deterministic: it has no log-probability, so it cannot be trained on; "
        + "use a value above 0")
    require(
      sampling.step != .cps || sampling.eta <= 1, "sampling.eta",
      "expected at most 1 for sampling.step cps, got \(sampling.eta.yamlText)")
    guard isGood("sampling.steps") else { return }
    if case .steps(let first, let last) = sampling.window {
      require(
        0 <= first && first <= last && last < sampling.steps, "sampling.window",
        "expected first-last within 0-\(sampling.steps - 1) for sampling.steps \(sampling.steps), "
          + "got \(sampling.window.rawValue)")
      require(
        !sampling.trainableSteps.isEmpty, "sampling.window",
        "\(sampling.window.rawValue) holds only the last step, which is never trained on")
    }
    validateMovingWindow()
    let deterministic = sampling.trainableSteps.count < sampling.steps - 1 || sampling.window == .drawn
    if let coarse = sampling.coarse {
      atLeast(1, coarse, "sampling.coarse")
      require(
        deterministic, "sampling.coarse",
        "sampling.window \(sampling.window.rawValue) leaves no deterministic steps to take in fewer; drop it")
    }
    guard sampling.prefix == .shared else { return }
    require(
      sampling.sharedNoise != .none, "sampling.prefix",
      "shared needs samples that start from the same noise, sampling.sharedNoise is none; use group")
    var fixed = sampling.trainableSteps.lowerBound == 0
    if case .steps = sampling.window {} else { fixed = !deterministic }
    require(
      !fixed, "sampling.prefix",
      "shared needs deterministic steps at the beginning, sampling.window \(sampling.window.rawValue) has none; "
        + "use each")
  }

  /// Windows whose place an iteration or the draw decides.
  private func validateMovingWindow() {
    let window = sampling.window
    switch window {
    case .all, .steps: return
    case .drawn:
      require(
        !chunk.plan.hasPrefix("adaptive"), "sampling.window",
        "drawn places the noise before the rollout, chunk.plan \(chunk.plan) follows its latents: use step, sequence, "
          + "fixed:n or list:a,b,…")
      require(
        !chunk.draw.hasPrefix("weighted"), "sampling.window",
        "drawn draws before the rollout, chunk.draw \(chunk.draw) weighs by its latents: use uniform or only:a,b,…"
      )
    case .sliding(let width, _, _), .random(let width):
      require(
        chunk.plan != "auto", "sampling.window",
        "\(window.rawValue) moves, chunk.plan auto has one plan for the whole run: use chunk.plan adaptive")
      require(
        1..<sampling.steps ~= width, "sampling.window",
        "expected a width of 1 to \(sampling.steps - 1), the trainable steps, got \(window.rawValue)")
      if case .sliding(_, let stride, let iterations) = window {
        require(
          stride > 0 && iterations > 0, "sampling.window",
          "expected a stride and iterations of 1 or more, got \(window.rawValue)")
      } else {
        require(
          chunk.plan != "adaptive-shared", "sampling.window",
          "\(window.rawValue) has other steps for every group, adaptive-shared has one plan: use chunk.plan adaptive"
        )
      }
    }
  }

  private func validateGroupAndOptim() {
    atLeast(2, group.size, "group.size", "an advantage compares the samples of one prompt")
    atLeast(1, group.promptsPerIteration, "group.promptsPerIteration")
    let samples = group.size.multipliedReportingOverflow(by: group.promptsPerIteration)
    require(!samples.overflow, "group.size", "times group.promptsPerIteration is too large")
    require(
      group.statistics == .group || aggregate == .sum, "group.statistics",
      "running compares with rewards of earlier iterations, aggregate \(aggregate.rawValue) leaves none that compare: its "
        + "z-scores have mean 0 in every group; use aggregate sum, or group.statistics group")
    positive(optim.lr, "optim.lr")
    notNegative(optim.weightDecay, "optim.weightDecay")
    require(
      optim.betas.count == 2 && optim.betas.allSatisfy { 0 <= $0 && $0 < 1 }, "optim.betas",
      "expected two numbers in [0, 1), got \(Self.text(optim.betas))")
    positive(optim.eps, "optim.eps")
    positive(optim.maxGradNorm, "optim.maxGradNorm")
    atLeast(1, optim.updatesPerIteration, "optim.updatesPerIteration")
    require(
      optim.updatesPerIteration <= samples.partialValue || !isGood("group.size", "group.promptsPerIteration"),
      "optim.updatesPerIteration",
      "\(optim.updatesPerIteration) updates need as many samples, group.size \(group.size) times "
        + "group.promptsPerIteration \(group.promptsPerIteration) makes \(samples.partialValue)")
    atLeast(1, optim.microBatch, "optim.microBatch")
  }

  private func validateLoss() {
    require(
      loss.clip.count == 2 && loss.clip.allSatisfy { $0 > 0 && $0.isFinite }, "loss.clip",
      "expected two numbers above 0, [lower, upper], got \(Self.text(loss.clip))")
    positive(loss.advantageClip, "loss.advantageClip")
    notNegative(loss.kl, "loss.kl")
    require(
      loss.kl == 0 || sampling.step != .cps || loss.klForm != .flowGRPO, "loss.klForm",
      "flowGRPO divides by g, which sampling.step cps does not have; use exact or k3")
  }

  private func validateTrainable() {
    if trainable.kind == .lora {
      atLeast(1, trainable.rank, "trainable.rank")
      positive(trainable.alpha, "trainable.alpha")
      require(
        !trainable.targets.isEmpty && !trainable.targets.contains(""), "trainable.targets",
        "expected names of linear layers such as [to_q, to_v], got \(trainable.targets)")
      for target in trainable.targets {
        require(
          (try? LoRATargets([target])) != nil, "trainable.targets", "\(target) is not a regular expression")
      }
    }
    require(
      0 <= ema.decay && ema.decay < 1, "ema.decay", "expected a number in [0, 1), got \(ema.decay.yamlText)")
    require(
      network.memory == nil || network.memoryBytes != nil, "network.memory",
      "expected a size such as 80GiB or 24GB, got \"\(network.memory ?? "")\"")
    if case .every(let n) = network.checkpointing {
      atLeast(1, n, "network.checkpointing", "every:n counts blocks")
    }
    require(
      network.weights == .model || trainable.kind == .lora, "network.weights",
      "\(network.weights.rawValue) keeps weights that are not trained, trainable.kind full trains all; "
        + "use model, or trainable.kind lora")
  }

  private func validateRun() {
    atLeast(1, runSettings.iterations, "run.iterations")
    atLeast(1, runSettings.checkpointEvery, "run.checkpointEvery")
    atLeast(1, runSettings.keep, "run.keep", "a run resumes from its newest checkpoint")
    atLeast(0, runSettings.samplesEvery, "run.samplesEvery", "0 writes none")
    atLeast(0, runSettings.evaluateEvery, "run.evaluateEvery", "0 makes none")
    if let name = runSettings.stopReward {
      require(
        RewardSet.names(rewards).contains(name), "run.stopReward",
        "expected one of the rewards (\(RewardSet.names(rewards).joined(separator: ", "))), got \"\(name)\"")
      require(runSettings.evaluateEvery > 0, "run.stopReward", "needs evaluations: set run.evaluateEvery")
    }
  }

  private func validateChunks() {
    for (path, share) in [("chunk.fraction", chunk.fraction), ("chunk.stepFraction", chunk.stepFraction)] {
      require(share > 0 && share <= 1, path, "expected a number in (0, 1], got \(share.yamlText)")
    }
    require(
      0 <= chunk.lateBelow && chunk.lateBelow <= 1, "chunk.lateBelow",
      "expected a noise level in [0, 1], got \(chunk.lateBelow.yamlText)")
    atLeast(1, chunk.stopSize, "chunk.stopSize")
    atLeast(1, chunk.minChunk, "chunk.minChunk")
    let largest = chunk.stopSize / 2 + chunk.stopSize % 2
    require(
      chunk.minChunk <= largest || !isGood("chunk.stopSize"), "chunk.minChunk",
      "expected at most \(largest), half of chunk.stopSize \(chunk.stopSize) rounded up, "
        + "got \(chunk.minChunk)")
    require(
      chunk.timeWeight != .tempflow || sampling.step != .cps, "chunk.timeWeight",
      "tempflow needs g, which sampling.step cps does not have; use equalised or another kind of step")
    let chunks = chunkCount()
    guard let drawn = drawnChunks(), isGood("sampling.steps", "sampling.window", "chunk.plan") else { return }
    if let chunks {
      let outside = drawn.first { $0 >= chunks }
      require(
        outside == nil, "chunk.draw",
        "chunk \(outside ?? 0) is not in 0...\(chunks - 1), those of chunk.plan \(chunk.plan)")
    } else {
      require(
        false, "chunk.draw",
        "\(chunk.draw) names chunks, chunk.plan \(chunk.plan) "
          + (chunk.plan == "auto" ? "is made after a pilot: " : "has others for every rollout: ")
          + "use uniform or weighted, or another plan")
    }
  }

  /// Number of chunks of the plan, nil where it depends on the trajectory.
  private func chunkCount() -> Int? {
    let trained = sampling.trainableSteps.count
    let (kind, argument) = Self.split(chunk.plan)
    switch (kind, argument) {
    case ("adaptive", nil), ("adaptive-shared", nil), ("auto", nil):
      require(
        chunk.minChunk <= trained || !isGood("sampling.steps", "sampling.window"), "chunk.minChunk",
        "\(chunk.minChunk) steps do not fit in the \(trained) trainable ones: lower it, or raise sampling.steps"
      )
      return nil
    case ("step", nil): return trained
    case ("sequence", nil): return 1
    case ("fixed", let argument?):
      guard let n = Configuration.count(argument), n > 0 else { break }
      return trained / n + (trained % n == 0 ? 0 : 1)
    case ("list", let argument?):
      guard let sizes = Configuration.counts(argument), !sizes.contains(0) else { break }
      let covered = sizes.reduce(0, +)
      let windowed = sampling.window != .all
      require(
        covered == trained || !isGood("sampling.steps", "sampling.window"), "chunk.plan",
        "chunks \(sizes) cover \(covered) steps, sampling.steps \(sampling.steps)"
          + (windowed ? " with sampling.window \(sampling.window.rawValue)" : "")
          + " has \(trained) trainable: change chunk.plan or sampling.\(windowed ? "window" : "steps")")
      return sizes.count
    default: break
    }
    require(
      false, "chunk.plan",
      "expected step, sequence, fixed:n, list:a,b,… (sizes of 1 or more), adaptive, adaptive-shared "
        + "or auto, got \"\(chunk.plan)\"")
    return nil
  }

  /// Chunks of an `only:` draw, nil where chance decides.
  private func drawnChunks() -> [Int]? {
    let (kind, argument) = Self.split(chunk.draw)
    if ["uniform", "weighted", "weighted:normalised", "weighted:softmax"].contains(chunk.draw) { return nil }
    if kind == "only", let argument, let chunks = Configuration.counts(argument) {
      require(Set(chunks).count == chunks.count, "chunk.draw", "\(chunk.draw) names a chunk twice")
      return chunks
    }
    require(
      false, "chunk.draw",
      "expected uniform, weighted, weighted:softmax or only:a,b,… (chunks from 0), got \"\(chunk.draw)\"")
    return nil
  }

  /// `kind:argument`, or `kind` alone.
  private static func split(_ text: String) -> (kind: Substring, argument: Substring?) {
    let parts = text.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
    return (parts[0], parts.count == 2 ? parts[1] : nil)
  }

  private static func text(_ numbers: [Double]) -> String {
    "[" + numbers.map(\.yamlText).joined(separator: ", ") + "]"
  }

  /// Whether nothing has been refused yet at these keys.
  private func isGood(_ paths: String...) -> Bool { !problems.contains { paths.contains($0.path ?? "") } }

  /// Refuses a value, once.
  private func require(_ condition: Bool, _ path: String, _ reason: @autoclosure () -> String) {
    if !condition, isGood(path) { problems.append(.invalid(path: path, reason: reason())) }
  }
  private func atLeast(_ bound: Int, _ value: Int, _ path: String, _ why: String? = nil) {
    require(
      value >= bound, path, "expected at least \(bound), got \(value)" + (why.map { ": \($0)" } ?? ""))
  }
  private func positive(_ value: Double, _ path: String) {
    require(value > 0 && value.isFinite, path, "expected a number above 0, got \(value.yamlText)")
  }
  private func notNegative(_ value: Double, _ path: String) {
    require(value >= 0 && value.isFinite, path, "expected a number of 0 or more, got \(value.yamlText)")
  }
}
