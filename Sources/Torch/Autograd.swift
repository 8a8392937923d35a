import CTorch

// Grad mode and autocast are thread-local in libtorch and Swift tasks hop threads: these scopes take
// synchronous closures only, so that what is switched on a thread is switched back on it.

/// Runs `body` without recording operations for gradients.
public func withoutGrad<R, E: Error>(_ body: () throws(E) -> R) throws(E) -> R {
  let before = ctorch_set_grad_enabled(false)
  defer { _ = ctorch_set_grad_enabled(before) }
  return try body()
}

/// Runs `body` recording operations for gradients, inside ``withoutGrad(_:)`` as well.
public func withGrad<R, E: Error>(_ body: () throws(E) -> R) throws(E) -> R {
  let before = ctorch_set_grad_enabled(true)
  defer { _ = ctorch_set_grad_enabled(before) }
  return try body()
}

/// Runs `body` with libtorch's autocast to `dtype` on `device`.
public func withAutocast<R>(
  _ dtype: DType, device: Device = .cpu, _ body: () throws -> R
) throws -> R {
  var enabled = false
  var type: Int32 = 0
  try check("withAutocast", [], ctorch_autocast_get(device.code, &enabled, &type))
  try check("withAutocast", [], ctorch_autocast_set(device.code, true, dtype.rawValue))
  defer { _ = ctorch_autocast_set(device.code, enabled, type) }
  return try body()
}

extension Tensor {
  /// Whether gradients flow to or through this tensor.
  public var requiresGrad: Bool { ctorch_requires_grad(handle) }
  /// Makes a leaf collect gradients, or not.
  public func setRequiresGrad(_ value: Bool) throws(TorchError) {
    try check("setRequiresGrad", [self], ctorch_set_requires_grad(handle, value))
  }
  /// The accumulated gradient, if there is one.
  public func grad() throws(TorchError) -> Tensor? {
    var out: ctorch_tensor?
    try check("grad", [self], ctorch_grad(&out, handle))
    return out.map(Tensor.init(owning:))
  }
  /// Forgets the accumulated gradient.
  public func clearGrad() throws(TorchError) { try check("clearGrad", [self], ctorch_clear_grad(handle)) }
  /// Adds d(self)/d(leaf) to the gradient of every leaf; `gradient` seeds a tensor that is not a scalar.
  public func backward(_ gradient: Tensor? = nil) throws(TorchError) {
    try check("backward", [self, gradient], ctorch_backward(handle, gradient?.handle))
  }
}

/// Operations on whole lists of tensors.
public enum Foreach {
  /// 2-norm of all elements of all tensors, as a float32 scalar.
  public static func norm(_ tensors: [Tensor]) throws(TorchError) -> Tensor {
    try produce("norm", tensors) { out in withHandles(tensors) { ctorch_total_norm(out, $0, $1) } }
  }
  /// Multiplies every tensor in place.
  public static func multiply(_ tensors: [Tensor], by factor: Double) throws(TorchError) {
    try check("multiply", tensors, withHandles(tensors) { ctorch_foreach_mul_($0, $1, factor) })
  }
  /// One fused AdamW step with decoupled weight decay; `steps` are float32 scalars, one a parameter, and are
  /// advanced by one.
  public static func adamW(
    parameters: [Tensor], gradients: [Tensor], means: [Tensor], squares: [Tensor], steps: [Tensor],
    learningRate: Double, betas: (Double, Double), weightDecay: Double, epsilon: Double
  ) throws(TorchError) {
    guard [gradients, means, squares, steps].allSatisfy({ $0.count == parameters.count }) else {
      throw TorchError(
        "adamW", "\(parameters.count) parameters need as many gradients, means, squares and steps")
    }
    let status = withHandles(parameters) { p, n in
      withHandles(gradients) { g, _ in
        withHandles(means) { m, _ in
          withHandles(squares) { s, _ in
            withHandles(steps) { t, _ in
              ctorch_fused_adamw_(p, g, m, s, t, n, learningRate, betas.0, betas.1, weightDecay, epsilon)
            }
          }
        }
      }
    }
    try check("adamW", parameters, status)
  }
}
