import ChunkGRPO
import Torch
import TorchNN

/// How the weights of a model that is trained from scratch are drawn.
///
/// Gains of norms are 1 and biases 0 throughout. A value depends on the seed, the part and its parameter's key alone.
public struct WeightInitialisation: Sendable {
  enum Distribution: Equatable {
    case constant(Double)
    /// Around 0.
    case normal(deviation: Double)
    /// In ± bound.
    case uniform(bound: Double)
  }
  /// Of weights of two dimensions or more.
  let rule: @Sendable (_ key: String, _ shape: [Int]) -> Distribution

  /// Diffusion transformers, arXiv 2212.09748 and its authors' `initialize_weights`: Xavier-uniform layers; N(0, 0.02²) for
  /// the embedders of time and pooled text; zero for modulations and the last projection, so that every block starts as the
  /// identity and the velocity as 0.
  public static let diffusionTransformer = WeightInitialisation { key, shape in
    let parts = key.split(separator: ".")
    if parts[0] == "proj_out" || parts.contains(where: { $0.hasPrefix("norm") }) { return .constant(0) }
    if parts[0] == "time_text_embed" { return .normal(deviation: 0.02) }
    return .uniform(bound: (6 / Double(shape[0] + shape[1])).squareRoot())
  }

  /// CLIP's text tower, as openai/CLIP's `initialize_parameters`.
  public static func clip(_ c: CLIPTextEncoder.Config) -> WeightInitialisation {
    let width = 1 / Double(c.hiddenSize).squareRoot()
    let residual = width / Double(2 * c.numHiddenLayers).squareRoot()
    return WeightInitialisation { key, _ in
      if key.contains("token_embedding") { return .normal(deviation: 0.02) }
      if key.contains("position_embedding") { return .normal(deviation: 0.01) }
      if key.contains("fc1") { return .normal(deviation: width / 2.0.squareRoot()) }
      return .normal(deviation: key.contains("out_proj") || key.contains("fc2") ? residual : width)
    }
  }

  /// T5's encoder, as transformers' T5PreTrainedModel with `initializer_factor` 1: queries carry the 1/√d that its attention
  /// lacks.
  public static func t5(_ c: T5Encoder.Config) -> WeightInitialisation {
    let (width, head) = (1 / Double(c.dModel).squareRoot(), 1 / Double(c.dKv).squareRoot())
    return WeightInitialisation { key, shape in
      if key == "shared.weight" { return .normal(deviation: 1) }
      if key.contains("relative_attention_bias") { return .normal(deviation: width) }
      let incoming = 1 / Double(shape[1]).squareRoot()
      return .normal(deviation: key.hasSuffix("SelfAttention.q.weight") ? incoming * head : incoming)
    }
  }

  /// Convolutions and layers uniform in ± 1/√(inputs of a value), torch's own default.
  public static let convolutional = WeightInitialisation { _, shape in
    .uniform(bound: 1 / Double(shape.dropFirst().reduce(1, *)).squareRoot())
  }

  /// Overwrites every parameter of `modules`.
  ///
  /// - Parameters:
  ///   - part: name of the model's part, as in its folder.
  ///   - random: where values come from: one stream a parameter.
  public func fill(_ modules: ModuleRegistry, part: String, random: RandomPlan) throws {
    for parameter in modules.parameters {
      let (key, shape) = (parameter.key, parameter.tensor.shape)
      let count = parameter.tensor.count
      var stream = random.stream(.parameterInit, prompt: "\(part).\(key)")
      let values: [Float]
      switch shape.count > 1 ? rule(key, shape) : .constant(key.hasSuffix("bias") ? 0 : 1) {
      case .constant(let value): values = [Float](repeating: Float(value), count: count)
      case .normal(let deviation): values = stream.normals(count: count).map { $0 * Float(deviation) }
      case .uniform(let bound): values = (0..<count).map { _ in Float(bound * (2 * stream.uniform() - 1)) }
      }
      try parameter.tensor.copy(from: try Tensor(values, shape: shape))
    }
  }
}
