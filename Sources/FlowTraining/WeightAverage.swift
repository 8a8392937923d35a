import Torch

/// An exponential moving average of trained weights: a ← d·a + (1 − d)·θ after every optimizer step, from a = θ at
/// the start.
///
/// It is what is evaluated and exported; sampling for training goes on with θ, whose log-probabilities the ratios
/// need.
final class WeightAverage {
  /// The averages by parameter name.
  let values: [String: Tensor]
  private let parameters: [String: Tensor]
  private let decay: Double

  init(_ parameters: [String: Tensor], decay: Double) throws {
    self.parameters = parameters
    self.decay = decay
    values = try parameters.mapValues { try $0.detach().clone() }
  }

  /// Takes in the parameters as they are now.
  func update() throws {
    for (name, value) in values {
      try value.copy(from: try value * decay + parameters[name]!.detach() * (1 - decay))
    }
  }

  /// Runs `body` with the averages in place of the parameters, which come back bit for bit.
  func withAverage<R>(_ body: () throws -> R) throws -> R {
    try parameters.exchanged(with: values, body)
  }

  /// Overwrites the averages with saved ones.
  func restore(_ saved: (String) throws -> Tensor) throws {
    for (name, value) in values { try value.copy(from: try saved(name)) }
  }
}

extension [String: Tensor] {
  /// Runs `body` with the values of `others` in place of these, and these in place of them; both come back bit for bit.
  ///
  /// Tensor by tensor: no second copy of all is made.
  func exchanged<R>(with others: [String: Tensor], _ body: () throws -> R) throws -> R {
    func exchange() throws {
      for (name, tensor) in self {
        let kept = try tensor.detach().clone()
        try tensor.copy(from: others[name]!)
        try others[name]!.copy(from: kept)
      }
    }
    try exchange()
    let result = Result(catching: body)
    try exchange()
    return try result.get()
  }
}
