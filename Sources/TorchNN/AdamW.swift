import Torch

/// AdamW with decoupled weight decay on float32 parameters.
///
/// Source: arXiv 1711.05101, algorithm 2; with float32 moments in libtorch's fused kernel.
public final class AdamW {
  /// How moments are kept.
  public enum Moments: String, Sendable, CaseIterable {
    /// 8 bytes a parameter.
    case float32
    /// 2.03 bytes a parameter: codes in blocks of 256 with one scale each, as arXiv 2110.02861, section 2.
    ///
    /// Differences from there: the *root* of the second moment is kept, which needs half the decades; the
    /// last value of each decade is its end, so that the code is symmetric; and codes are rounded up or down
    /// in proportion, by a lattice in (element, step), so that a moment that changes by less than a code's
    /// width in a step still moves. Parameters of fewer than ``AdamW/smallest`` elements keep float32.
    case int8
  }

  /// Hyper-parameters of the update.
  public struct Options: Sendable, Equatable {
    /// Step size.
    public var learningRate: Double
    /// Decay rates of the two running means.
    public var betas: (Double, Double) { (beta1, beta2) }
    /// Decay rate of the gradient's mean.
    public var beta1: Double
    /// Decay rate of the squared gradient's mean.
    public var beta2: Double
    /// Added to the root of the second mean.
    public var epsilon: Double
    /// Decoupled weight decay.
    public var weightDecay: Double
    /// Creates options; the defaults are the paper's (Table 8).
    public init(
      learningRate: Double = 1e-5, beta1: Double = 0.9, beta2: Double = 0.999, epsilon: Double = 1e-8,
      weightDecay: Double = 1e-4
    ) {
      self.learningRate = learningRate
      self.beta1 = beta1
      self.beta2 = beta2
      self.epsilon = epsilon
      self.weightDecay = weightDecay
    }
  }

  /// Parameters with fewer elements keep float32 moments whatever was asked for: they weigh nothing.
  public static let smallest = 4096
  /// Elements that share a scale.
  static let block = 256

  /// The options of the next step.
  public var options: Options
  private let names: [String]
  private let parameters, steps: [Tensor]
  /// Moments of each parameter, by the last part of their name.
  private let moments: [[String: Tensor]]
  private let tables: (mean: Tensor, root: Tensor)?
  private let offloads: Bool

  /// Optimises `parameters`, sorted by name; moments start at zero.
  ///
  /// - Parameters:
  ///   - moments: how they are kept.
  ///   - offload: keep them in host memory and bring one parameter's at a time to its device. On the CPU they
  ///     are there anyway.
  public init(
    _ parameters: [String: Tensor], _ options: Options, moments kind: Moments = .float32,
    offload: Bool = false
  ) throws(TorchError) {
    self.options = options
    offloads = offload
    names = parameters.keys.sorted()
    var tensors: [Tensor] = []
    var moments: [[String: Tensor]] = []
    var steps: [Tensor] = []
    for name in names {
      let parameter = parameters[name]!
      let home = offload ? .cpu : parameter.device
      func zeros(_ shape: [Int], _ dtype: DType = .float32) throws(TorchError) -> Tensor {
        try Tensor.zeros(shape, dtype: dtype, device: home)
      }
      tensors.append(parameter)
      if kind == .int8, parameter.count >= Self.smallest {
        let blocks = (parameter.count + Self.block - 1) / Self.block
        // Codes of any value stand for 0 while the scale is 0.
        moments.append([
          "mean": try zeros([blocks, Self.block], .uint8), "meanScale": try zeros([blocks]),
          "root": try zeros([blocks, Self.block], .uint8), "rootScale": try zeros([blocks]),
        ])
      } else {
        moments.append(["mean": try zeros(parameter.shape), "square": try zeros(parameter.shape)])
      }
      // A count each: parameters without a gradient are passed over.
      steps.append(try zeros([]))
    }
    (self.parameters, self.moments, self.steps) = (tensors, moments, steps)
    let device = tensors.first?.device ?? .cpu
    tables =
      kind == .float32
      ? nil
      : (
        try Tensor(Self.table(signed: true)).to(device), try Tensor(Self.table(signed: false)).to(device)
      )
  }

  /// Values of the codes, ascending: 0, and in each decade from 10⁻⁶ up to 1 evenly spaced values, 1, 2, 4 …
  /// 64 of them with either sign, or 2, 4, 8 … 128 without: 255 in all.
  static func table(signed: Bool) -> [Float] {
    var positive: [Double] = []
    var top = 1e-6
    for decade in 0..<7 {
      let count = 1 << (signed ? decade : decade + 1)
      positive += (1...count).map { top * (0.1 + 0.9 * Double($0) / Double(count)) }
      top *= 10
    }
    // 10⁻⁶ · 10⁶ is not 1 in every last bit.
    positive[positive.count - 1] = 1
    return ((signed ? positive.reversed().map { -$0 } : []) + [0] + positive).map { Float($0) }
  }

  /// Scales the gradients so that their joint 2-norm is at most `maxNorm`, as torch's clip_grad_norm_.
  ///
  /// - Returns: the norm before.
  public func clipGradients(maxNorm: Double) throws(TorchError) -> Double {
    let gradients = try active().map(\.gradient)
    guard !gradients.isEmpty else { return 0 }
    let norm = try Foreach.norm(gradients).item()
    let factor = maxNorm / (norm + 1e-6)
    if factor < 1 { try Foreach.multiply(gradients, by: factor) }
    return norm
  }

  /// One update from the accumulated gradients, which are then forgotten.
  public func step() throws(TorchError) {
    let active = try active()
    guard !active.isEmpty else { return }
    let whole = active.filter { moments[$0.index]["square"] != nil }
    if offloads {
      for entry in whole { try fusedStep([entry]) }
    } else if !whole.isEmpty {
      try fusedStep(whole)
    }
    for entry in active where moments[entry.index]["root"] != nil { try blockwiseStep(entry) }
    for parameter in parameters { try parameter.clearGrad() }
  }

  private typealias Entry = (index: Int, gradient: Tensor)

  /// The parameters with a gradient: torch leaves the others alone, weight decay included.
  private func active() throws(TorchError) -> [Entry] {
    var result: [Entry] = []
    for (i, parameter) in parameters.enumerated() {
      if let gradient = try parameter.grad() { result.append((i, gradient)) }
    }
    return result
  }

  private func fusedStep(_ entries: [Entry]) throws(TorchError) {
    /// Those of `entries`, on their parameters' devices.
    func visiting(_ kept: (Int) -> Tensor) throws(TorchError) -> [Tensor] {
      var result: [Tensor] = []
      for entry in entries { result.append(try kept(entry.index).to(parameters[entry.index].device)) }
      return result
    }
    let means = try visiting { moments[$0]["mean"]! }
    let squares = try visiting { moments[$0]["square"]! }
    let counts = try visiting { steps[$0] }
    try Foreach.adamW(
      parameters: entries.map { parameters[$0.index] }, gradients: entries.map(\.gradient), means: means,
      squares: squares, steps: counts, learningRate: options.learningRate, betas: options.betas,
      weightDecay: options.weightDecay, epsilon: options.epsilon)
    for (i, entry) in entries.enumerated() {
      try keep(means[i], in: moments[entry.index]["mean"]!)
      try keep(squares[i], in: moments[entry.index]["square"]!)
      try keep(counts[i], in: steps[entry.index])
    }
  }

  private func blockwiseStep(_ entry: Entry) throws(TorchError) {
    let (parameter, kept) = (parameters[entry.index], moments[entry.index])
    func visiting(_ name: String) throws(TorchError) -> Tensor { try kept[name]!.to(parameter.device) }
    let (means, meanScales) = (try visiting("mean"), try visiting("meanScale"))
    let (roots, rootScales) = (try visiting("root"), try visiting("rootScale"))
    let count = steps[entry.index]
    try count.addInPlace(try Tensor.full([], 1, device: count.device))
    try Foreach.blockwiseAdamW(
      parameter: parameter, gradient: entry.gradient, means: means, meanScales: meanScales, roots: roots,
      rootScales: rootScales, meanTable: tables!.mean, rootTable: tables!.root, step: Int(try count.item()),
      learningRate: options.learningRate, betas: options.betas, weightDecay: options.weightDecay,
      epsilon: options.epsilon)
    try keep(means, in: kept["mean"]!)
    try keep(meanScales, in: kept["meanScale"]!)
    try keep(roots, in: kept["root"]!)
    try keep(rootScales, in: kept["rootScale"]!)
  }

  /// Brings a moment back to where it is kept; a tensor that never left is there already.
  private func keep(_ moved: Tensor, in home: Tensor) throws(TorchError) {
    if moved !== home { try home.copy(from: moved) }
  }

  /// Everything that must survive a restart, by name: `<parameter>.{mean,square,step}`, or
  /// `<parameter>.{mean,meanScale,root,rootScale,step}` for moments in codes.
  public var state: [String: Tensor] {
    var state: [String: Tensor] = [:]
    for (i, name) in names.enumerated() {
      for (part, tensor) in moments[i] { state["\(name).\(part)"] = tensor }
      state["\(name).step"] = steps[i]
    }
    return state
  }

  /// Bytes of ``state``.
  public var stateBytes: Int { state.values.reduce(0) { $0 + $1.count * $1.dtype.size } }

  /// Restores what ``state`` gave; every entry must be there with its shape.
  public func restore(_ saved: (String) throws -> Tensor) throws {
    for (name, tensor) in state { try tensor.copy(from: try saved(name)) }
  }
}
