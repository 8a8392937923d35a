import Torch

/// AdamW with decoupled weight decay on float32 parameters.
///
/// Source: arXiv 1711.05101, algorithm 2, in libtorch's fused kernel.
public final class AdamW {
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

  /// The options of the next step.
  public var options: Options
  private let names: [String]
  private let parameters, means, squares, steps: [Tensor]

  /// Optimises `parameters`, sorted by name; moments start at zero.
  public init(_ parameters: [String: Tensor], _ options: Options) throws(TorchError) {
    self.options = options
    names = parameters.keys.sorted()
    var tensors: [Tensor] = []
    var means: [Tensor] = []
    var squares: [Tensor] = []
    var steps: [Tensor] = []
    for name in names {
      let parameter = parameters[name]!
      tensors.append(parameter)
      means.append(try Tensor.zeros(like: parameter))
      squares.append(try Tensor.zeros(like: parameter))
      steps.append(try Tensor.zeros([], device: parameter.device))
    }
    (self.parameters, self.means, self.squares, self.steps) = (tensors, means, squares, steps)
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
    try Foreach.adamW(
      parameters: active.map { parameters[$0.index] }, gradients: active.map(\.gradient),
      means: active.map { means[$0.index] }, squares: active.map { squares[$0.index] },
      steps: active.map { steps[$0.index] },
      learningRate: options.learningRate, betas: options.betas, weightDecay: options.weightDecay,
      epsilon: options.epsilon)
    for parameter in parameters { try parameter.clearGrad() }
  }

  /// The parameters with a gradient: torch leaves the others alone, weight decay included.
  private func active() throws(TorchError) -> [(index: Int, gradient: Tensor)] {
    var result: [(index: Int, gradient: Tensor)] = []
    for (i, parameter) in parameters.enumerated() {
      if let gradient = try parameter.grad() { result.append((i, gradient)) }
    }
    return result
  }

  /// Everything that must survive a restart, by name: `<parameter>.{mean,square,step}`.
  public var state: [String: Tensor] {
    var state: [String: Tensor] = [:]
    for (i, name) in names.enumerated() {
      state["\(name).mean"] = means[i]
      state["\(name).square"] = squares[i]
      state["\(name).step"] = steps[i]
    }
    return state
  }

  /// Restores what ``state`` gave; every entry must be there with its shape.
  public func restore(_ saved: (String) throws -> Tensor) throws {
    for (name, tensor) in state { try tensor.copy(from: try saved(name)) }
  }
}
