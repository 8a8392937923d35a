import Foundation

/// What can be wrong with chunks, with drawing them or with weighting them.
public enum ChunkError: Error, CustomStringConvertible, Sendable, Equatable {
  /// The sizes do not add up to the trainable steps.
  case sumMismatch(sizes: [Int], steps: Int)
  /// Sizes must be positive, and there must be one.
  case badSizes([Int])
  /// The text names no plan.
  case unknownPlan(String)
  /// An adaptive plan needs the change curve of a trajectory.
  case needsCurve(plan: String)
  /// The schedule has nothing to train on.
  case noSteps(Int)
  /// Values of the change curve must be finite and not negative.
  case badCurve(step: Int, value: Double)
  /// The sizes that bound an adaptive plan contradict each other.
  case badBounds(stopSize: Int, minChunk: Int)
  /// Curves of one shared plan must be equally long.
  case curveLengths([Int])
  /// The spread between trajectories takes two of them.
  case tooFewCurves(Int)
  /// The text names no way of drawing.
  case unknownDraw(String)
  /// A fixed chunk that the plan does not have.
  case noSuchChunk(index: Int, chunks: Int)
  /// The share of drawn chunks must be in (0, 1].
  case fractionOutOfRange(Double)
  /// Weighted drawing needs one finite, non-negative weight a chunk.
  case badWeights([Double]?, chunks: Int)
  /// The time weight is not defined for this kind of step.
  case undefinedTimeWeight(TimeWeight, kind: StepKind)

  /// What is wrong, what was expected, and the way out.
  public var description: String {
    switch self {
    case .sumMismatch(let sizes, let steps):
      "chunks \(sizes) cover \(sizes.reduce(0, +)) steps, the schedule has \(steps): "
        + "change chunk.plan or sampling.steps"
    case .badSizes(let sizes):
      "chunks \(sizes): expected at least one size, each 1 or more; change chunk.plan"
    case .unknownPlan(let text):
      "chunk.plan: expected \(ChunkStrategy.forms), got \"\(text)\""
    case .needsCurve(let plan):
      "chunk.plan: \(plan) follows the latents of a rollout and is not known before it; "
        + "choose step, sequence, fixed:n or list:…"
    case .noSteps(let steps):
      "chunk.plan: the schedule has \(steps) trainable steps, expected at least 1; raise sampling.steps"
    case .badCurve(let step, let value):
      "change curve: step \(step) is \(value), expected a finite number of 0 or more; "
        + "look for a latent that is zero or not finite"
    case .badBounds(let stopSize, let minChunk):
      "chunk.minChunk: expected 1 … (stopSize + 1)/2 = \((stopSize + 1) / 2), got \(minChunk); "
        + "lower chunk.minChunk or raise chunk.stopSize"
    case .curveLengths(let lengths):
      "change curves of \(lengths) steps: a shared plan expects equal lengths and at least one curve"
    case .tooFewCurves(let count):
      "chunk.plan: auto compares trajectories, expected at least 2, got \(count); use more prompts or samples"
    case .unknownDraw(let text):
      "chunk.draw: expected \(ChunkDraw.forms), got \"\(text)\""
    case .noSuchChunk(let index, let chunks):
      "chunk.draw: chunk \(index) does not exist, the plan has \(chunks) (0 … \(chunks - 1)); "
        + "change chunk.draw or chunk.plan"
    case .fractionOutOfRange(let fraction):
      "chunk.fraction: expected more than 0 and at most 1, got \(fraction)"
    case .badWeights(let weights, let chunks):
      "chunk.draw: weighted drawing expects \(chunks) finite weights of 0 or more, "
        + "got \(weights.map { "\($0)" } ?? "none"); use chunk.draw uniform"
    case .undefinedTimeWeight(let weight, let kind):
      "chunk.timeWeight: \(weight.rawValue) is not defined for \(kind.rawValue) steps; "
        + "use perChunk, none\(kind == .cps ? ", guard or equalised" : " or guard")"
    }
  }
}

/// Consecutive chunks that cover the trainable steps 0 ..< N; coded as the list of sizes.
public struct ChunkPlan: Sendable, Equatable, Codable {
  /// Steps in each chunk, each positive.
  public let sizes: [Int]

  /// N, the steps covered.
  public var steps: Int { sizes.reduce(0, +) }

  /// K, the number of chunks.
  public var count: Int { sizes.count }

  /// The steps of each chunk.
  public var ranges: [Range<Int>] {
    var start = 0
    return sizes.map { size in
      defer { start += size }
      return start..<start + size
    }
  }

  /// A plan of consecutive chunks of these sizes.
  ///
  /// - Throws: ``ChunkError/badSizes(_:)``.
  public init(sizes: [Int]) throws(ChunkError) {
    guard !sizes.isEmpty, sizes.allSatisfy({ $0 > 0 }) else { throw .badSizes(sizes) }
    self.sizes = sizes
  }

  /// Reads a list of sizes, refusing what ``init(sizes:)`` refuses.
  public init(from decoder: any Decoder) throws {
    try self.init(sizes: decoder.singleValueContainer().decode([Int].self))
  }

  /// Writes the list of sizes.
  public func encode(to encoder: any Encoder) throws {
    var container = encoder.singleValueContainer()
    try container.encode(sizes)
  }

  /// The mean of per-step values over each chunk, such as the weights of weighted drawing from a change
  /// curve.
  public func means(of values: [Double]) -> [Double] {
    ranges.map { values[$0].reduce(0, +) / Double($0.count) }
  }

  /// The plan that follows how fast a trajectory changes.
  ///
  /// A piece of at most `stopSize` steps is a chunk. A longer one is cut where the sign of its n-th forward
  /// difference changes, short runs joining their neighbour, or in half if that leaves one run; its parts are
  /// treated alike with n + 1.
  /// - Parameters:
  ///   - d: relative change of each trainable step, see ``Distance``.
  ///   - stopSize: the largest chunk.
  ///   - minChunk: the smallest chunk, unless the whole curve is shorter.
  /// - Throws: ``ChunkError/noSteps(_:)``, ``ChunkError/badCurve(step:value:)`` or
  ///   ``ChunkError/badBounds(stopSize:minChunk:)``.
  public static func adaptive(
    curve d: [Double], stopSize: Int = 7, minChunk: Int = 2
  ) throws(ChunkError) -> ChunkPlan {
    guard !d.isEmpty else { throw .noSteps(0) }
    guard minChunk >= 1, minChunk <= (stopSize + 1) / 2 else {
      throw .badBounds(stopSize: stopSize, minChunk: minChunk)
    }
    if let i = d.firstIndex(where: { !($0.isFinite && $0 >= 0) }) { throw .badCurve(step: i, value: d[i]) }
    let noise = d.reduce(0, max) * 1e-6

    func split(_ piece: ArraySlice<Double>, order: Int) -> [Int] {
      guard piece.count > stopSize else { return [piece.count] }
      var sizes = signRuns(of: piece, order: order, noise: noise, minChunk: minChunk)
      if sizes.count < 2 { sizes = [piece.count / 2, piece.count - piece.count / 2] }
      var start = piece.startIndex
      return sizes.flatMap { size in
        defer { start += size }
        return split(piece[start..<start + size], order: order + 1)
      }
    }
    return try ChunkPlan(sizes: split(d[...], order: 1))
  }

  /// One plan for many trajectories: the adaptive plan of their mean curve.
  ///
  /// - Throws: as ``adaptive(curve:stopSize:minChunk:)``, and ``ChunkError/curveLengths(_:)``.
  public static func adaptive(
    sharedBy curves: [[Double]], stopSize: Int = 7, minChunk: Int = 2
  ) throws(ChunkError) -> ChunkPlan {
    guard let first = curves.first, curves.allSatisfy({ $0.count == first.count }) else {
      throw .curveLengths(curves.map(\.count))
    }
    let mean = first.indices.map { i in curves.reduce(0) { $0 + $1[i] } / Double(curves.count) }
    return try adaptive(curve: mean, stopSize: stopSize, minChunk: minChunk)
  }

  /// Lengths of the maximal runs of one sign of the `order`-th forward difference, runs below `minChunk`
  /// joined to their left neighbour (the first to its right one); empty when the difference is zero or has no
  /// elements.
  private static func signRuns(
    of piece: ArraySlice<Double>, order: Int, noise: Double, minChunk: Int
  ) -> [Int] {
    guard order < piece.count else { return [] }
    var delta = Array(piece)
    for _ in 0..<order { delta = zip(delta.dropFirst(), delta).map { $0 - $1 } }
    let limit = noise * pow(2, Double(order))
    let signs = delta.map { abs($0) <= limit ? 0 : $0 > 0 ? 1 : -1 }
    guard var sign = signs.first(where: { $0 != 0 }) else { return [] }

    var runs = [0]
    for next in signs {
      if next == -sign {
        sign = next
        runs.append(0)
      }
      runs[runs.count - 1] += 1
    }
    runs[runs.count - 1] += order  // the last steps have no difference of their own
    while runs.count > 1, let short = runs.firstIndex(where: { $0 < minChunk }) {
      let length = runs.remove(at: short)
      runs[max(short - 1, 0)] += length
    }
    return runs
  }
}

/// How the change d_i from x_i to x_{i+1} is measured, over all elements of one sample, in Double.
public enum Distance: String, Codable, CaseIterable, Sendable {
  /// ‖x_{i+1} − x_i‖₁ / ‖x_i‖₁.
  case l1
  /// ‖x_{i+1} − x_i‖₂ / ‖x_i‖₂.
  case l2
  /// 1 − cos(x_i, x_{i+1}), at least 0.
  case cosine

  /// The change from one latent to the next; not finite when a latent is zero.
  ///
  /// Arrays, not collections: called from other modules, a generic loop takes a hundred times as long.
  public func callAsFunction(from x: [Float], to next: [Float]) -> Double {
    precondition(x.count == next.count, "latents of \(x.count) and \(next.count) elements")
    var (difference, own, other) = (0.0, 0.0, 0.0)
    func each(_ add: (_ x: Double, _ next: Double) -> Void) {
      for i in x.indices { add(Double(x[i]), Double(next[i])) }
    }
    switch self {
    case .l1:
      each { x, next in
        difference += abs(next - x)
        own += abs(x)
      }
    case .l2:
      each { x, next in
        difference += (next - x) * (next - x)
        own += x * x
      }
    case .cosine:
      each { x, next in
        difference += x * next
        own += x * x
        other += next * next
      }
    }
    return switch self {
    case .l1: difference / own
    case .l2: (difference / own).squareRoot()
    // rounding can push the cosine of parallel latents above 1
    case .cosine: own * other > 0 ? max(0, 1 - difference / (own * other).squareRoot()) : .nan
    }
  }
}

/// How the trainable steps are cut into chunks: the configuration's `chunk.plan`.
public enum ChunkStrategy: Sendable, Equatable, CustomStringConvertible {
  /// Chunks of one step: Flow-GRPO and Dance-GRPO.
  case step
  /// One chunk.
  case sequence
  /// Chunks of n steps, the remainder last.
  case fixed(Int)
  /// These sizes.
  case list([Int])
  /// A plan for each trajectory from its own change curve.
  case adaptive
  /// One plan from the mean change curve of all trajectories.
  case adaptiveShared
  /// One plan of least ``PlanRisk``, from a pilot's change curves.
  case auto

  static let forms = "step, sequence, fixed:n, list:a,b,…, adaptive, adaptive-shared or auto"

  /// Parses `step`, `sequence`, `fixed:4`, `list:2,3,4,7`, `adaptive`, `adaptive-shared` or `auto`.
  ///
  /// - Throws: ``ChunkError/unknownPlan(_:)`` or ``ChunkError/badSizes(_:)``.
  public init(_ text: String) throws(ChunkError) {
    let parts = text.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false)
    let numbers = parts.count == 2 ? integers(parts[1]) : nil
    switch (parts[0], parts.count, numbers) {
    case ("step", 1, _): self = .step
    case ("sequence", 1, _): self = .sequence
    case ("adaptive", 1, _): self = .adaptive
    case ("adaptive-shared", 1, _): self = .adaptiveShared
    case ("auto", 1, _): self = .auto
    case ("fixed", 2, let sizes?) where sizes.count == 1: self = .fixed(try ChunkPlan(sizes: sizes).sizes[0])
    case ("list", 2, let sizes?): self = .list(try ChunkPlan(sizes: sizes).sizes)
    default: throw .unknownPlan(text)
    }
  }

  /// The text it is parsed from.
  public var description: String {
    switch self {
    case .step: "step"
    case .sequence: "sequence"
    case .fixed(let size): "fixed:\(size)"
    case .list(let sizes): "list:" + sizes.map(String.init).joined(separator: ",")
    case .adaptive: "adaptive"
    case .adaptiveShared: "adaptive-shared"
    case .auto: "auto"
    }
  }

  /// Whether the plan is made from the latents of a rollout.
  public var needsCurve: Bool { self == .adaptive || self == .adaptiveShared || self == .auto }

  /// The plan over `n` trainable steps.
  ///
  /// - Throws: ``ChunkError/sumMismatch(sizes:steps:)``, ``ChunkError/noSteps(_:)``,
  ///   ``ChunkError/badSizes(_:)``, or ``ChunkError/needsCurve(plan:)`` for those made from curves.
  public func plan(steps n: Int) throws(ChunkError) -> ChunkPlan {
    guard n > 0 else { throw .noSteps(n) }
    switch self {
    case .step: return try ChunkPlan(sizes: Array(repeating: 1, count: n))
    case .sequence: return try ChunkPlan(sizes: [n])
    case .fixed(let size):
      guard size > 0 else { throw .badSizes([size]) }
      return try ChunkPlan(sizes: stride(from: 0, to: n, by: size).map { min(size, n - $0) })
    case .list(let sizes):
      let plan = try ChunkPlan(sizes: sizes)
      guard plan.steps == n else { throw .sumMismatch(sizes: sizes, steps: n) }
      return plan
    case .adaptive, .adaptiveShared, .auto: throw .needsCurve(plan: description)
    }
  }

  /// The plan of each of `samples` trajectories over `n` trainable steps.
  ///
  /// - Parameter curves: one change curve of `n` steps for each sample; read by the strategies that need them only.
  /// - Parameter distance: what the curves measure, for `auto`.
  /// - Throws: as ``plan(steps:)``, ``ChunkPlan/adaptive(sharedBy:stopSize:minChunk:)`` and ``PlanRisk``.
  public func plans(
    steps n: Int, samples: Int, curves: [[Double]], distance: Distance = .l1, stopSize: Int, minChunk: Int
  ) throws(ChunkError) -> [ChunkPlan] {
    switch self {
    case .adaptive:
      var plans: [ChunkPlan] = []
      for curve in curves {
        plans.append(try .adaptive(curve: curve, stopSize: stopSize, minChunk: minChunk))
      }
      return plans
    case .adaptiveShared:
      let plan = try ChunkPlan.adaptive(sharedBy: curves, stopSize: stopSize, minChunk: minChunk)
      return [ChunkPlan](repeating: plan, count: samples)
    case .auto:
      let plan = try PlanRisk(curves: curves, distance: distance).best(stopSize: stopSize, minChunk: minChunk)
      return [ChunkPlan](repeating: plan, count: samples)
    default: return [ChunkPlan](repeating: try plan(steps: n), count: samples)
    }
  }
}

/// `1,2,3` as integers; nil if any part is not one.
func integers(_ text: Substring) -> [Int]? {
  let parts = text.split(separator: ",", omittingEmptySubsequences: false).map {
    Int($0.trimmingCharacters(in: .whitespaces))
  }
  return parts.contains(nil) ? nil : parts.compactMap { $0 }
}

/// How much a chunk counts in a sample's objective: the configuration's `chunk.timeWeight`.
public enum TimeWeight: String, Codable, CaseIterable, Sendable {
  /// W_j = 1: every trained chunk alike, the paper's choice.
  case perChunk
  /// W_j = cs_j: every trained step alike.
  case none
  /// w_i = g/η, after TempFlow-GRPO.
  case tempflow
  /// w_i = 1/(−Δ), after GRPO-Guard.
  case `guard`
  /// w_i = 1/sensitivity: every step's velocity is pulled alike.
  case equalised

  /// W_j of every chunk; for the last three cs_j·mean w_i = Σ w_i over its steps.
  ///
  /// - Parameters:
  ///   - plan: the chunks.
  ///   - steps: the plan's trainable steps, in order.
  /// - Throws: ``ChunkError/sumMismatch(sizes:steps:)`` or ``ChunkError/undefinedTimeWeight(_:kind:)``.
  public func weights(plan: ChunkPlan, steps: [SDEStep]) throws(ChunkError) -> [Double] {
    guard plan.steps == steps.count else { throw .sumMismatch(sizes: plan.sizes, steps: steps.count) }
    let perStep: (SDEStep) -> Double
    switch self {
    case .perChunk: return plan.sizes.map { _ in 1 }
    case .none: return plan.sizes.map(Double.init)
    case .tempflow: perStep = { $0.diffusion / $0.eta }
    case .guard: perStep = { -1 / $0.delta }
    case .equalised: perStep = { 1 / $0.sensitivity }
    }
    let w = steps.map(perStep)
    if let bad = w.indices.first(where: { !(w[$0].isFinite && w[$0] > 0) }) {
      throw .undefinedTimeWeight(self, kind: steps[bad].kind)
    }
    return plan.ranges.map { w[$0].reduce(0, +) }
  }
}
