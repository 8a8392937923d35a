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

/// Runs `body` keeping only `inputs` for the backward pass, which runs `body` once more and goes through
/// that: memory of one body at a time for one more forward pass (arXiv 1604.06174).
///
/// Every value of `body` that needs a gradient must come in through `inputs` or be a leaf, such as a
/// parameter: a tensor that `body` captures with a graph of its own would be differentiated there a second
/// time. A leaf used by several bodies has its gradient summed body by body. `body` must give the same
/// tensors when run again; modes of grad and autocast are those of this call. On the CPU it is run again on
/// the thread that calls `backward()`; for tensors of a CUDA device on libtorch's thread of that device,
/// while the caller waits in `backward()`, so that it never runs on two threads at once.
///
/// Without gradient mode this is `body(inputs)`.
///
/// - Parameters:
///   - inputs: tensors that may or may not need gradients.
///   - body: gives at most 16 tensors.
/// - Returns: what `body` gives; outputs of a floating-point type need gradients.
/// - Throws: what `body` throws. An error of the second run comes out of `backward()` as a ``TorchError``
///   that quotes it; gradients that were complete before it stay.
public func checkpointed(
  _ inputs: [Tensor], _ body: @escaping ([Tensor]) throws -> [Tensor]
) throws -> [Tensor] {
  guard isGradEnabled else { return try body(inputs) }
  let call = CheckpointedBody(body)
  var outputs = [ctorch_tensor?](repeating: nil, count: CheckpointedBody.most)
  var count: Int32 = 0
  let status = withHandles(inputs) { handles, total in
    ctorch_checkpointed(
      &outputs, Int32(outputs.count), &count, handles, total,
      { context, inputs, count, outputs, capacity in
        Unmanaged<CheckpointedBody>.fromOpaque(context!).takeUnretainedValue()
          .run(UnsafeBufferPointer(start: inputs, count: Int(count)), outputs!, Int(capacity))
      },
      { Unmanaged<CheckpointedBody>.fromOpaque($0!).release() }, Unmanaged.passRetained(call).toOpaque())
  }
  if status != 0, let error = call.error { throw error }
  try check("checkpointed", inputs, status)
  return outputs[..<Int(count)].map { Tensor(owning: $0!) }
}

/// A body as libtorch holds it.
private final class CheckpointedBody {
  static let most = 16
  private let body: ([Tensor]) throws -> [Tensor]
  /// What the last run threw.
  private(set) var error: (any Error)?

  init(_ body: @escaping ([Tensor]) throws -> [Tensor]) { self.body = body }

  func run(
    _ inputs: UnsafeBufferPointer<ctorch_tensor?>, _ outputs: UnsafeMutablePointer<ctorch_tensor?>,
    _ capacity: Int
  ) -> Int32 {
    do {
      let results = try body(inputs.map { Tensor(owning: $0!) })
      guard results.count <= capacity else {
        throw TorchError("checkpointed", "the body gave \(results.count) tensors, at most \(capacity) fit")
      }
      // libtorch takes over references of its own: the tensors here go with `results`.
      for (i, result) in results.enumerated() { outputs[i] = ctorch_retain(result.handle) }
      return Int32(results.count)
    } catch {
      self.error = error
      ctorch_fail("\(error)")
      return -1
    }
  }
}

/// Whether operations of this thread are recorded for gradients.
public var isGradEnabled: Bool { ctorch_grad_enabled() }

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
  /// One AdamW step of one parameter whose moments are kept as codes; see `ctorch_blockwise_adamw_`.
  ///
  /// - Parameters:
  ///   - parameter: float32, contiguous, n elements.
  ///   - means, roots: uint8 [⌈n/256⌉, 256] with `meanScales`, `rootScales` [⌈n/256⌉] float32: mean of the
  ///     gradient and root of the mean of its square.
  ///   - meanTable, rootTable: ascending values of the codes, float32; the second starts at 0.
  ///   - step: number of this step, from 1.
  public static func blockwiseAdamW(
    parameter: Tensor, gradient: Tensor, means: Tensor, meanScales: Tensor, roots: Tensor, rootScales: Tensor,
    meanTable: Tensor, rootTable: Tensor, step: Int, learningRate: Double, betas: (Double, Double),
    weightDecay: Double, epsilon: Double
  ) throws(TorchError) {
    try check(
      "blockwiseAdamW", [parameter, gradient, means, roots],
      ctorch_blockwise_adamw_(
        parameter.handle, gradient.handle, means.handle, meanScales.handle, roots.handle, rootScales.handle,
        meanTable.handle, rootTable.handle, Int64(step), learningRate, betas.0, betas.1, weightDecay, epsilon)
    )
  }
}
