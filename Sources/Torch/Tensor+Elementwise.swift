import CTorch

// One line an operation: names and semantics are libtorch's, shapes broadcast, gradients flow.

extension Tensor {
  /// Elementwise `abs`.
  public func abs() throws(TorchError) -> Tensor { try produce("abs", [self]) { ctorch_abs($0, handle) } }
  /// Elementwise `exp`.
  public func exp() throws(TorchError) -> Tensor { try produce("exp", [self]) { ctorch_exp($0, handle) } }
  /// Elementwise `log`.
  public func log() throws(TorchError) -> Tensor { try produce("log", [self]) { ctorch_log($0, handle) } }
  /// Elementwise `sqrt`.
  public func sqrt() throws(TorchError) -> Tensor { try produce("sqrt", [self]) { ctorch_sqrt($0, handle) } }
  /// `1/√x`.
  public func rsqrt() throws(TorchError) -> Tensor {
    try produce("rsqrt", [self]) { ctorch_rsqrt($0, handle) }
  }
  /// `x²`.
  public func square() throws(TorchError) -> Tensor {
    try produce("square", [self]) { ctorch_square($0, handle) }
  }
  /// Elementwise `sin`.
  public func sin() throws(TorchError) -> Tensor { try produce("sin", [self]) { ctorch_sin($0, handle) } }
  /// Elementwise `cos`.
  public func cos() throws(TorchError) -> Tensor { try produce("cos", [self]) { ctorch_cos($0, handle) } }
  /// Elementwise `sigmoid`.
  public func sigmoid() throws(TorchError) -> Tensor {
    try produce("sigmoid", [self]) { ctorch_sigmoid($0, handle) }
  }
  /// `x · sigmoid(x)`.
  public func silu() throws(TorchError) -> Tensor { try produce("silu", [self]) { ctorch_silu($0, handle) } }
  /// Elementwise `tanh`.
  public func tanh() throws(TorchError) -> Tensor { try produce("tanh", [self]) { ctorch_tanh($0, handle) } }
  /// Minus each element.
  public func neg() throws(TorchError) -> Tensor { try produce("neg", [self]) { ctorch_neg($0, handle) } }
  /// `1/x`.
  public func reciprocal() throws(TorchError) -> Tensor {
    try produce("reciprocal", [self]) { ctorch_reciprocal($0, handle) }
  }
  /// Nearest integer, halves to even.
  public func round() throws(TorchError) -> Tensor {
    try produce("round", [self]) { ctorch_round($0, handle) }
  }
  /// Elementwise `floor`.
  public func floor() throws(TorchError) -> Tensor {
    try produce("floor", [self]) { ctorch_floor($0, handle) }
  }
  /// Row-major in memory; the same storage if it is already.
  public func contiguous() throws(TorchError) -> Tensor {
    try produce("contiguous", [self]) { ctorch_contiguous($0, handle) }
  }
  /// A copy.
  public func clone() throws(TorchError) -> Tensor {
    try produce("clone", [self]) { ctorch_clone($0, handle) }
  }
  /// The same storage, cut from the gradient graph.
  public func detach() throws(TorchError) -> Tensor {
    try produce("detach", [self]) { ctorch_detach($0, handle) }
  }
  /// Complex conjugate.
  public func conj() throws(TorchError) -> Tensor { try produce("conj", [self]) { ctorch_conj($0, handle) } }
  /// Whether each element is neither infinite nor NaN, as bool.
  public func isFinite() throws(TorchError) -> Tensor {
    try produce("isFinite", [self]) { ctorch_isfinite($0, handle) }
  }
  /// Boolean negation.
  public func logicalNot() throws(TorchError) -> Tensor {
    try produce("logicalNot", [self]) { ctorch_logical_not($0, handle) }
  }
  /// Real [..., 2] float32 seen as complex [...].
  public func viewAsComplex() throws(TorchError) -> Tensor {
    try produce("viewAsComplex", [self]) { ctorch_view_as_complex($0, handle) }
  }
  /// Complex [...] seen as real [..., 2].
  public func viewAsReal() throws(TorchError) -> Tensor {
    try produce("viewAsReal", [self]) { ctorch_view_as_real($0, handle) }
  }
  /// The larger of two elements.
  public func maximum(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("maximum", [self, other]) { ctorch_maximum($0, handle, other.handle) }
  }
  /// The smaller of two elements.
  public func minimum(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("minimum", [self, other]) { ctorch_minimum($0, handle, other.handle) }
  }
  /// Matrix product, batched over leading dimensions.
  public func matmul(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("matmul", [self, other]) { ctorch_matmul($0, handle, other.handle) }
  }
  /// Both nonzero.
  public func logicalAnd(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("logicalAnd", [self, other]) { ctorch_logical_and($0, handle, other.handle) }
  }
  /// Either nonzero.
  public func logicalOr(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("logicalOr", [self, other]) { ctorch_logical_or($0, handle, other.handle) }
  }
  /// Elementwise `==`, as bool.
  public func equal(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("equal", [self, other]) { ctorch_eq($0, handle, other.handle) }
  }
  /// Elementwise `==`, as bool. Against a scalar.
  public func equal(_ value: Double) throws(TorchError) -> Tensor {
    try produce("equal", [self]) { ctorch_eq_scalar($0, handle, value) }
  }
  /// Elementwise `!=`, as bool.
  public func notEqual(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("notEqual", [self, other]) { ctorch_ne($0, handle, other.handle) }
  }
  /// Elementwise `!=`, as bool. Against a scalar.
  public func notEqual(_ value: Double) throws(TorchError) -> Tensor {
    try produce("notEqual", [self]) { ctorch_ne_scalar($0, handle, value) }
  }
  /// Elementwise `<`, as bool.
  public func less(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("less", [self, other]) { ctorch_lt($0, handle, other.handle) }
  }
  /// Elementwise `<`, as bool. Against a scalar.
  public func less(_ value: Double) throws(TorchError) -> Tensor {
    try produce("less", [self]) { ctorch_lt_scalar($0, handle, value) }
  }
  /// Elementwise `<=`, as bool.
  public func lessOrEqual(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("lessOrEqual", [self, other]) { ctorch_le($0, handle, other.handle) }
  }
  /// Elementwise `<=`, as bool. Against a scalar.
  public func lessOrEqual(_ value: Double) throws(TorchError) -> Tensor {
    try produce("lessOrEqual", [self]) { ctorch_le_scalar($0, handle, value) }
  }
  /// Elementwise `>`, as bool.
  public func greater(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("greater", [self, other]) { ctorch_gt($0, handle, other.handle) }
  }
  /// Elementwise `>`, as bool. Against a scalar.
  public func greater(_ value: Double) throws(TorchError) -> Tensor {
    try produce("greater", [self]) { ctorch_gt_scalar($0, handle, value) }
  }
  /// Elementwise `>=`, as bool.
  public func greaterOrEqual(_ other: Tensor) throws(TorchError) -> Tensor {
    try produce("greaterOrEqual", [self, other]) { ctorch_ge($0, handle, other.handle) }
  }
  /// Elementwise `>=`, as bool. Against a scalar.
  public func greaterOrEqual(_ value: Double) throws(TorchError) -> Tensor {
    try produce("greaterOrEqual", [self]) { ctorch_ge_scalar($0, handle, value) }
  }
  /// Elementwise power.
  public func pow(_ exponent: Double) throws(TorchError) -> Tensor {
    try produce("pow", [self]) { ctorch_pow_scalar($0, handle, exponent) }
  }
  /// Elements limited to `low ... high`.
  public func clamp(_ low: Double, _ high: Double) throws(TorchError) -> Tensor {
    try produce("clamp", [self]) { ctorch_clamp($0, handle, low, high) }
  }
  /// Gaussian error linear unit, exact or by tanh (T5, FLUX).
  public func gelu(tanhApproximation: Bool = false) throws(TorchError) -> Tensor {
    try produce("gelu", [self]) { ctorch_gelu($0, handle, tanhApproximation) }
  }
  /// `x · sigmoid(1.702·x)`, OpenAI CLIP's activation.
  public func quickGELU() throws(TorchError) -> Tensor { try self * (self * 1.702).sigmoid() }
  /// Elements of `a` where `self` is true, of `b` elsewhere.
  public func select(_ a: Tensor, else b: Tensor) throws(TorchError) -> Tensor {
    try produce("where", [self, a, b]) { ctorch_where($0, handle, a.handle, b.handle) }
  }
  /// `self + b·c` in one pass.
  public func adding(product b: Tensor, _ c: Tensor) throws(TorchError) -> Tensor {
    try produce("addcmul", [self, b, c]) { ctorch_addcmul($0, handle, b.handle, c.handle) }
  }

  /// Elementwise sum, broadcast.
  public static func + (a: Tensor, b: Tensor) throws(TorchError) -> Tensor {
    try produce("add", [a, b]) { ctorch_add($0, a.handle, b.handle) }
  }
  /// Elementwise sum, broadcast.
  public static func + (a: Tensor, b: Double) throws(TorchError) -> Tensor {
    try produce("add", [a]) { ctorch_add_scalar($0, a.handle, b) }
  }
  /// Elementwise difference, broadcast.
  public static func - (a: Tensor, b: Tensor) throws(TorchError) -> Tensor {
    try produce("sub", [a, b]) { ctorch_sub($0, a.handle, b.handle) }
  }
  /// Elementwise difference, broadcast.
  public static func - (a: Tensor, b: Double) throws(TorchError) -> Tensor {
    try produce("sub", [a]) { ctorch_sub_scalar($0, a.handle, b) }
  }
  /// Elementwise product, broadcast.
  public static func * (a: Tensor, b: Tensor) throws(TorchError) -> Tensor {
    try produce("mul", [a, b]) { ctorch_mul($0, a.handle, b.handle) }
  }
  /// Elementwise product, broadcast.
  public static func * (a: Tensor, b: Double) throws(TorchError) -> Tensor {
    try produce("mul", [a]) { ctorch_mul_scalar($0, a.handle, b) }
  }
  /// Elementwise quotient, broadcast.
  public static func / (a: Tensor, b: Tensor) throws(TorchError) -> Tensor {
    try produce("div", [a, b]) { ctorch_div($0, a.handle, b.handle) }
  }
  /// Elementwise quotient, broadcast.
  public static func / (a: Tensor, b: Double) throws(TorchError) -> Tensor {
    try produce("div", [a]) { ctorch_div_scalar($0, a.handle, b) }
  }
  /// Elementwise product, broadcast.
  public static func * (a: Double, b: Tensor) throws(TorchError) -> Tensor { try b * a }
  /// Elementwise sum, broadcast.
  public static func + (a: Double, b: Tensor) throws(TorchError) -> Tensor { try b + a }
  /// Elementwise negation, broadcast.
  public static prefix func - (a: Tensor) throws(TorchError) -> Tensor { try a.neg() }
}
