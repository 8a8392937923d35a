import ChunkGRPO
import FlowModels
import Foundation
import Torch

/// How fast trajectories of a model change along their steps, measured on a few of them: what plans are made from.
public struct ChunkDynamics: Sendable {
  /// Prompts and trajectories of each that a training run measures: fewer samples than one of its iterations.
  public static let pilot = (prompts: 8, samples: 4)

  /// One a curve's first index.
  public let prompts: [String]
  /// d_i as [prompt][sample][step].
  public let curves: [[[Double]]]
  /// How d is measured.
  public let distance: Distance
  /// The first of the steps in the schedule.
  public let firstStep: Int
  /// Their transitions.
  public let steps: [SDEStep]

  /// All curves.
  var all: [[Double]] { curves.flatMap { $0 } }

  /// Samples `samples` trajectories of each of `prompts` with the network as it is, each from noise of its own.
  ///
  /// Latents are kept for one batch at a time; nothing is decoded. The noise is a function of (seed, prompt, sample, step).
  /// - Parameters:
  ///   - sampling: schedule, steps and window; a window that moves is measured at its first place.
  ///   - rows: rows of every pass, filled up where a batch is short; nil for batches as they come.
  ///   - check: called before every pass; throws to stop.
  static func measure(
    _ engine: Engine, _ sampling: Configuration.Sampling, prompts: [String], samples: Int, distance: Distance,
    random: RandomPlan, rows: Int? = nil, check: @escaping () throws -> Void = {},
    progress: (_ done: Int, _ of: Int) -> Void = { _, _ in }
  ) throws -> ChunkDynamics {
    let kind = StepKind(rawValue: sampling.step.rawValue)!
    let window = sampling.trainableSteps
    let table = try TransitionTable(
      schedule: try engine.trainingSchedule(sampling), kind: kind, eta: sampling.eta, stochastic: window,
      truncatedTimes: sampling.time == .truncated)
    let path = try SamplingPath(
      table.schedule, kind: kind, eta: sampling.eta, stochastic: [window], coarse: sampling.coarse)
    var sampler = engine.rollout(table, rows: rows)
    sampler.beforeStep = check
    let members = prompts.flatMap { prompt in (0..<samples).map { (prompt, $0) } }
    var curves: [[Double]] = []
    for range in Batches(members.count, of: sampler.batch) {
      let batch = Array(members[range])
      let trajectories = try sampler.sample(
        engine.network,
        initial: try engine.noise(batch.map { random.stream(.pilot, prompt: $0, sample: $1) }),
        conditions: try batch.map { try engine.encoder($0.0) },
        paths: [SamplingPath](repeating: path, count: batch.count)
      ) { s, i, out in
        var stream = random.stream(.pilot, prompt: batch[s].0, sample: batch[s].1, step: i + 1)
        stream.fillNormal(out)
      }
      curves += try trajectories.dynamics(
        distance, over: [Range<Int>](repeating: window, count: batch.count))
      progress(curves.count, members.count)
    }
    return ChunkDynamics(
      prompts: prompts,
      curves: stride(from: 0, to: curves.count, by: samples).map { Array(curves[$0..<($0 + samples)]) },
      distance: distance, firstStep: window.lowerBound, steps: Array(table.steps[window]))
  }

  /// `count` different texts of `prompts`, or all, drawn by the seed.
  static func choose(_ count: Int, of prompts: [String], _ random: RandomPlan) -> [String] {
    var seen: Set<String> = []
    let texts = prompts.filter { seen.insert($0).inserted }
    var stream = random.stream(.pilot)
    return stream.shuffled(texts.count).prefix(count).map { texts[$0] }
  }
}

/// The plan that `chunk.plan: auto` settled on, and what by: `chunks.json` in a run and in each of its checkpoints.
public struct PlanChoice: Codable, Sendable, Equatable {
  /// The plan that the whole run uses.
  public let plan: ChunkPlan
  /// What it minimises.
  public let risk: PlanRisk

  static let fileName = "chunks.json"

  init(_ dynamics: ChunkDynamics, _ chunk: Configuration.Chunk) throws {
    risk = try PlanRisk(curves: dynamics.all, distance: dynamics.distance)
    plan = try risk.best(stopSize: chunk.stopSize, minChunk: chunk.minChunk)
  }

  /// Reads the file of a run or a checkpoint; nil if there is none.
  init?(in folder: URL, steps: Int) throws {
    let file = folder.appending(path: Self.fileName)
    guard FileManager.default.fileExists(atPath: file.path) else { return nil }
    guard let data = try? Data(contentsOf: file),
      let choice = try? JSONDecoder().decode(Self.self, from: data)
    else { throw RunError("\(file.path): damaged: fetch it again, or resume from another checkpoint") }
    guard choice.plan.steps == steps else {
      throw RunError(
        "\(file.path): chunks \(choice.plan.sizes) cover \(choice.plan.steps) steps, the configuration has \(steps) "
          + "trainable: put sampling.steps and sampling.window back, or start a new run")
    }
    self = choice
  }

  func write(to folder: URL) throws {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .prettyPrinted]
    try AtomicFile.write(try encoder.encode(self), to: folder.appending(path: Self.fileName))
  }

  /// One line for whoever watches.
  var summary: String {
    let one = risk.heterogeneity(risk.curve.indices) + risk.penalty
    return "chunk.plan auto: \(plan.sizes) by \(risk.trajectories) pilot trajectories; risk "
      + String(
        format: "%.2f, of one chunk %.2f, of single steps %.2f", risk(plan), one,
        Double(risk.curve.count) * risk.penalty)
  }
}
