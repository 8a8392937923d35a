import ChunkGRPO
import FlowModels
import Foundation
import Torch
import TorchNN

extension Verifier {
  mutating func scheduler(_ data: SafetensorsFile) throws {
    var flux = FlowMatchScheduler()
    (flux.shift, flux.useDynamicShifting) = (3, true)
    var plain = FlowMatchScheduler()
    for name in data.names where name.hasSuffix(".sigmas") {
      let parts = name.split(separator: ".").map(String.init)
      let steps = parts.count > 2 ? Int(parts[1].dropFirst()) ?? 0 : 0
      let schedule: NoiseSchedule
      switch parts[0] {
      case "flux":
        schedule = try flux.fluxSchedule(steps: steps, imageTokens: Int(parts[2].dropFirst(3)) ?? 0)
      case "schnell":
        plain.shift = 1
        schedule = try plain.fluxSchedule(steps: steps, imageTokens: 256)
      case "sd3", "zimage_turbo":
        plain.shift = 3
        schedule = try plain.sd3Schedule(steps: steps)
      case "qwen":
        var qwen = FlowMatchScheduler()
        (qwen.useDynamicShifting, qwen.maxShift, qwen.maxImageSeqLen, qwen.shiftTerminal) = (
          true, 0.9, 8192, 0.02
        )
        schedule = try qwen.fluxSchedule(steps: steps, imageTokens: Int(parts[2].dropFirst(3)) ?? 0)
      default: continue
      }
      let times = schedule.networkTimes(truncated: false)
      record(
        "scheduler \(name)", error: try Self.relative(schedule.sigmas, try data.require(name)),
        tolerance: 1e-6)
      let timesName = name.replacingOccurrences(of: ".sigmas", with: ".timesteps")
      if data.shape(timesName) != nil {
        let error = try Self.relative(times, try data.require(timesName))
        record("scheduler \(timesName)", error: error, tolerance: 1e-6)
      }
    }
    // An Euler trajectory with recorded velocities.
    guard data.shape("traj_f32.x") != nil else { return }
    let schedule = try NoiseSchedule(sigmas: try data.require("traj_f32.sigmas").floats())
    let table = try TransitionTable(schedule: schedule, kind: .ode, eta: 0, stochastic: 0..<0)
    let velocities = try data.require("traj_f32.v")
    var x = try data.require("traj_f32.x")[0]
    var states = [x]
    for i in 0..<schedule.steps {
      x = try table.mean(x, try velocities[i], [Int](repeating: i, count: x.size(0)))
      states.append(x)
    }
    try compare("scheduler traj_f32.x", try Tensor.stack(states), data, "traj_f32.x")
  }

  /// One recorded step function of a peer.
  private struct Peer {
    let prefix: String
    let kind: StepKind
    var latents = "in.latents"
    var velocity = "in.velocity"
    var noise = "in.noise"
    var sigmas = "gcpo.sigmas"
  }

  mutating func peerLogProb(_ data: SafetensorsFile) throws {
    let peers = [
      Peer(prefix: "gcpo_flow", kind: .flowSDE),
      Peer(prefix: "gcpo_ode", kind: .ode),
      Peer(prefix: "mix_flow", kind: .flowSDE),
      Peer(prefix: "dance", kind: .danceSDE),
      Peer(prefix: "gcpo_dance", kind: .danceSDE),
      Peer(
        prefix: "flow_grpo", kind: .flowSDE, latents: "flow_grpo.in.sample",
        velocity: "flow_grpo.in.model_output", noise: "flow_grpo.in.noise", sigmas: "flow_grpo.sigmas"),
      Peer(prefix: "ff.Flow-SDE", kind: .flowSDE, sigmas: "ff.Flow-SDE.sigmas"),
      Peer(prefix: "ff.Dance-SDE", kind: .danceSDE, sigmas: "ff.Dance-SDE.sigmas"),
      Peer(prefix: "ff.CPS", kind: .cps, sigmas: "ff.CPS.sigmas"),
    ]
    let etas = try settings("peer_logprob")["eta"] as? [String: Any] ?? [:]
    func eta(_ prefix: String) -> Double? {
      let key = ["ff.Flow-SDE": "ff_flow", "ff.Dance-SDE": "ff_dance", "ff.CPS": "ff_cps"][prefix] ?? prefix
      return etas[key] as? Double ?? (etas[key] as? String).flatMap(Double.init)
    }
    if data.shape("gcpo.sigmas") != nil {
      let steps = data.shape("gcpo.sigmas")![0] - 1
      let schedule = try NoiseSchedule.training(steps: steps, shift: 3)
      let truncated = schedule.networkTimes(truncated: true)
      record(
        "peer_logprob gcpo.sigmas",
        error: try Self.relative(schedule.sigmas, try data.require("gcpo.sigmas")), tolerance: 1e-7)
      if data.shape("gcpo.timesteps_int") != nil {
        let error = try Self.relative(truncated, try data.require("gcpo.timesteps_int"))
        record("peer_logprob gcpo.timesteps_int", error: error, tolerance: 0)
      }
    }
    for peer in peers where data.shape(peer.sigmas) != nil {
      let schedule = try NoiseSchedule(sigmas: try data.require(peer.sigmas).floats())
      let table = try TransitionTable(
        schedule: schedule, kind: peer.kind,
        eta: peer.kind == .ode ? 0 : eta(peer.prefix) ?? peer.kind.defaultEta,
        stochastic: peer.kind == .ode ? 0..<0 : 0..<schedule.steps)
      let (x, v) = (try data.require(peer.latents), try data.require(peer.velocity))
      let noise = try data.require(peer.noise)
      var worst = (mean: 0.0, next: 0.0, logProb: 0.0)
      var steps = 0
      for i in 0..<schedule.steps where data.shape("\(peer.prefix).\(i).prev_sample") != nil {
        steps += 1
        let rows = [Int](repeating: i, count: x.size(0))
        let mean = try table.mean(x, v, rows)
        let next = peer.kind == .ode ? mean : try table.sample(mean, noise: try noise[i], rows)
        if data.shape("\(peer.prefix).\(i).mean") != nil {
          worst.mean = Self.worse(
            worst.mean, try Self.relative(mean, try data.require("\(peer.prefix).\(i).mean")))
        }
        worst.next = Self.worse(
          worst.next, try Self.relative(next, try data.require("\(peer.prefix).\(i).prev_sample")))
        // Into σ = 0 the density of most kinds is degenerate, and nobody trains there.
        guard data.shape("\(peer.prefix).\(i).log_prob") != nil,
          i < schedule.steps - 1 || peer.kind == .danceSDE
        else { continue }
        let residuals = try table.meanSquaredResidual(next, mean).doubles()
        let ours = residuals.map { table.logProbability(meanSquaredResidual: $0, step: i) }
        let theirs = try data.require("\(peer.prefix).\(i).log_prob").doubles()
        for (a, b) in zip(ours, theirs) { worst.logProb = Self.worse(worst.logProb, abs(a - b)) }
      }
      guard steps > 0 else { continue }
      if peer.kind != .ode {
        record("peer_logprob \(peer.prefix) mean (\(steps) steps)", error: worst.mean, tolerance: 2e-6)
        record(
          "peer_logprob \(peer.prefix) log_prob (\(steps) steps)", error: worst.logProb, tolerance: 2e-6,
          note: "largest absolute difference")
      }
      record("peer_logprob \(peer.prefix) next (\(steps) steps)", error: worst.next, tolerance: 2e-6)
    }
    try offPolicy(data, eta("gcpo_flow") ?? 0.7)
  }

  /// log p of a recorded next state under another velocity, and under a bfloat16 one.
  private mutating func offPolicy(_ data: SafetensorsFile, _ eta: Double) throws {
    guard data.shape("in.velocity_perturbed") != nil, data.shape("gcpo.sigmas") != nil else { return }
    let schedule = try NoiseSchedule(sigmas: try data.require("gcpo.sigmas").floats())
    let table = try TransitionTable(
      schedule: schedule, kind: .flowSDE, eta: eta, stochastic: 0..<schedule.steps)
    let x = try data.require("in.latents")
    let v = try data.require("in.velocity")
    let noise = try data.require("in.noise")
    let bf16 = try v.to(.bfloat16)
    for prefix in ["gcpo_flow_pert", "gcpo_flow_bf16v"] {
      var worst = 0.0
      var steps = 0
      for i in 0..<(schedule.steps - 1) where data.shape("\(prefix).\(i).log_prob") != nil {
        let rows = [Int](repeating: i, count: x.size(0))
        steps += 1
        let next = try table.sample(try table.mean(x, v, rows), noise: try noise[i], rows)
        let mean: Tensor
        if prefix == "gcpo_flow_pert" {
          mean = try table.mean(x, try data.require("in.velocity_perturbed"), rows)
        } else {
          // What the peer does with a bfloat16 network: both factors of the velocity term round to bfloat16.
          let step = table.steps[i]
          let term = try (bf16 * (step.velocityWeight / step.delta)) * step.delta
          mean = try x * step.stateWeight + term.to(.float32)
        }
        let residuals = try table.meanSquaredResidual(next, mean).doubles()
        let theirs = try data.require("\(prefix).\(i).log_prob").doubles()
        for (r, b) in zip(residuals, theirs) {
          let ours = table.logProbability(meanSquaredResidual: r, step: i)
          worst = Self.worse(worst, abs(ours - b) / max(1, abs(b)))
        }
      }
      if steps > 0 {
        record("peer_logprob \(prefix) log_prob (\(steps) steps)", error: worst, tolerance: 2e-5)
      }
    }
  }

  /// Two optimizer steps of the authors' own train_one_step, by our update.
  mutating func gcpoStep(_ name: String, _ data: SafetensorsFile) throws {
    let settings = try settings(name)
    func number(_ key: String) throws -> Double {
      guard let value = settings[key] as? NSNumber else { throw RunError("\(name).json: \(key) is missing") }
      return value.doubleValue
    }
    let network = try FluxTransformer(folder: try modelFolder(name).appending(path: "transformer"))
    try network.modules.makeTrainable()
    guard let gridList = settings["token_grid"] as? [Int], gridList.count == 2 else {
      throw RunError("\(name).json: token_grid")
    }
    let model = TimedNetwork(FluxFlowModel(network, grid: (gridList[0], gridList[1])))
    let steps = Int(try number("sampling_steps"))
    let schedule = try NoiseSchedule.training(steps: steps, shift: try number("shift"))
    let table = try TransitionTable(
      schedule: schedule, kind: .flowSDE, eta: try number("eta"), stochastic: 0..<(steps - 1),
      truncatedTimes: settings["time"] as? String == "truncated")
    let latents = try data.require("out.latents")
    let count = latents.size(0)
    let old = try data.require("out.log_probs").doubles()
    let trajectories = Trajectories(
      states: try latents.transpose(0, 1).contiguous(), clean: latents,
      logProbabilities: (0..<count).map { s in Array(old[(s * steps)..<(s * steps + steps - 1)]) })
    let condition = Condition([try data.require("in.encoder_hidden_states"), try data.require("in.pooled")])
    let rewards = try data.require("out.rewards").doubles()
    let advantages = try Advantages.group(rewards: rewards).values
    let usesChunks = settings["use_chunk"] as? Bool ?? false
    let strategy =
      usesChunks
      ? try ChunkStrategy(
        "list:" + ((settings["chunks"] as? [Int]) ?? []).map(String.init).joined(separator: ","))
      : try ChunkStrategy("step")
    let plan = try strategy.plan(steps: steps - 1)
    let trained = try ChunkDraw.count(chunks: plan.count, fraction: try number("timestep_fraction"))
    // The authors' random order: of chunks per sample, and of the samples.
    let draws = try (0..<count).map {
      try data.require("out.randperm.\($0)").int64s().prefix(trained).map { Int($0) }
    }
    let order = try data.tensor("out.randperm.\(count)")?.int64s().map { Int($0) } ?? Array(0..<count)
    let clip = (settings["clip_range"] as? [Double]) ?? [5e-5, 5e-5]
    let rule = PolicyUpdate(
      network: model, table: table, guidance: try number("guidance"), microBatch: 16, ratio: .chunk,
      clip: ClipRange(low: clip[0], high: clip[1]))
    let optimizer = try AdamW(
      Dictionary(uniqueKeysWithValues: network.modules.parameters.map { ($0.key, $0.tensor) }),
      AdamW.Options(learningRate: try number("lr"), weightDecay: try number("weight_decay")))
    let each = Int(try number("grad_accum"))
    var ratios: [Double] = []
    var norms: [Float] = []
    var gradients: [[String: Tensor]] = []
    for start in stride(from: 0, to: count, by: each) {
      let samples = order[start..<min(start + each, count)].map { row in
        UpdateSample(row: row, advantage: advantages[row], chunks: draws[row].map { (plan.ranges[$0], 1) })
      }
      let report = try rule.accumulate(
        samples, trajectories, conditions: [Condition](repeating: condition, count: count), first: start == 0)
      ratios += report.ratios
      gradients.append(
        try Dictionary(
          uniqueKeysWithValues: network.modules.parameters.compactMap { p in
            try p.tensor.grad().map { (p.key, try $0.clone()) }
          }))
      norms.append(Float(try optimizer.clipGradients(maxNorm: try number("max_grad_norm"))))
      try optimizer.step()
    }

    record(
      "\(name) sigmas", error: try Self.relative(schedule.sigmas, try data.require("out.sigmas")),
      tolerance: 1e-7)
    let expected = try data.require("out.ratios").doubles()
    let worst = zip(ratios, expected).map { abs($0 - $1) }.reduce(0, Self.worse)
    record(
      "\(name) ratios (\(expected.count))", error: ratios.count == expected.count ? worst : .infinity,
      tolerance: 2e-6,
      note: "largest absolute difference")
    record(
      "\(name) gradient norms", error: try Self.relative(norms, try data.require("out.grad_norms")),
      tolerance: 1e-3)
    let parameters = Dictionary(uniqueKeysWithValues: network.modules.parameters.map { ($0.key, $0.tensor) })
    for key in data.names {
      if key.hasPrefix("out.grad_preclip."), !key.hasSuffix("l2_by_tensor") {
        let parts = key.dropFirst("out.grad_preclip.".count).split(separator: ".", maxSplits: 1)
        guard let u = Int(parts[0]), let gradient = gradients[u][String(parts[1])] else {
          throw RunError("no gradient \(key)")
        }
        try compare("\(name) \(key.dropFirst(4))", gradient, data, key, tolerance: 1e-4)
      } else if key.hasPrefix("out.param.") {
        guard let parameter = parameters[String(key.dropFirst(10))] else {
          throw RunError("no parameter \(key)")
        }
        // Two AdamW steps move a weight by about 2·lr whatever its gradient: rounding of tiny gradients shows.
        try compare("\(name) \(key.dropFirst(4))", parameter, data, key, tolerance: 1e-3)
      }
    }
    try gcpoByTensor(name, settings, data, gradients, parameters)
  }

  /// Norms of all gradients and parameters, in the fixture's order.
  private mutating func gcpoByTensor(
    _ name: String, _ settings: [String: Any], _ data: SafetensorsFile, _ gradients: [[String: Tensor]],
    _ parameters: [String: Tensor]
  ) throws {
    guard let order = settings["tensor_order"] as? [String] else { return }
    func norms(_ tensors: [String: Tensor]) throws -> [Float] {
      try order.map {
        Float(try (tensors[$0]?.detach().to(.float64).square().sum().item() ?? .nan).squareRoot())
      }
    }
    for u in gradients.indices where data.shape("out.grad_preclip.\(u).l2_by_tensor") != nil {
      let ours = try norms(gradients[u])
      let key = "out.grad_preclip.\(u).l2_by_tensor"
      record(
        "\(name) gradient \(u), all \(order.count) tensors",
        error: try Self.relative(ours, try data.require(key)), tolerance: 1e-4)
    }
    if data.shape("out.param_l2_by_tensor") != nil {
      let ours = try norms(parameters)
      record(
        "\(name) parameters, all \(order.count) tensors",
        error: try Self.relative(ours, try data.require("out.param_l2_by_tensor")), tolerance: 1e-5)
    }
  }
}
