import Foundation
import Testing
import Torch

/// Oracle: Foundation's functions in Double.
///
/// Tolerance 1e-14 relative, 1e-15 absolute: vectorised functions are good to a few units in the last place
/// (2e-16), and composites such as gelu lose some to cancellation.
@Suite("Elementwise operations in closed form")
struct ElementwiseTests {
  struct Unary: Sendable, CustomTestStringConvertible {
    let name: String
    let operation: @Sendable (Tensor) throws -> Tensor
    let expected: @Sendable (Double) -> Double
    var testDescription: String { name }
    init(
      _ name: String, _ operation: @escaping @Sendable (Tensor) throws -> Tensor,
      _ expected: @escaping @Sendable (Double) -> Double
    ) {
      (self.name, self.operation, self.expected) = (name, operation, expected)
    }
  }
  static func sigmoid(_ x: Double) -> Double { 1 / (1 + exp(-x)) }

  // 41 elements: whole vectors and a remainder; halves decide how `round` breaks ties.
  static let points = Grid(
    Grid(noise: 35, seed: 3, in: -4...4).values + [0.5, 1.5, 2.5, -0.5, -2.5, 3], [41])

  static let unary: [Unary] = [
    Unary("abs", { try $0.abs() }, { abs($0) }),
    Unary("exp", { try $0.exp() }, { exp($0) }),
    Unary("log", { try $0.abs().log() }, { log(abs($0)) }),
    Unary("sqrt", { try $0.abs().sqrt() }, { abs($0).squareRoot() }),
    Unary("rsqrt", { try $0.abs().rsqrt() }, { 1 / abs($0).squareRoot() }),
    Unary("square", { try $0.square() }, { $0 * $0 }),
    Unary("sin", { try $0.sin() }, { sin($0) }),
    Unary("cos", { try $0.cos() }, { cos($0) }),
    Unary("sigmoid", { try $0.sigmoid() }, { sigmoid($0) }),
    Unary("silu", { try $0.silu() }, { $0 * sigmoid($0) }),
    Unary("tanh", { try $0.tanh() }, { tanh($0) }),
    Unary("neg", { try $0.neg() }, { -$0 }),
    Unary("prefix -", { try -$0 }, { -$0 }),
    Unary("reciprocal", { try $0.reciprocal() }, { 1 / $0 }),
    Unary("round", { try $0.round() }, { $0.rounded(.toNearestOrEven) }),
    Unary("floor", { try $0.floor() }, { $0.rounded(.down) }),
    Unary("clone", { try $0.clone() }, { $0 }),
    Unary("contiguous", { try $0.contiguous() }, { $0 }),
    Unary("detach", { try $0.detach() }, { $0 }),
    Unary("gelu", { try $0.gelu() }, { 0.5 * $0 * erfc(-$0 / 2.0.squareRoot()) }),
    Unary("gelu by tanh", { try $0.gelu(tanhApproximation: true) }) {
      0.5 * $0 * (1 + tanh((2 / Double.pi).squareRoot() * ($0 + 0.044715 * $0 * $0 * $0)))
    },
    Unary("quickGELU", { try $0.quickGELU() }, { $0 * sigmoid(1.702 * $0) }),
    Unary("pow", { try $0.abs().pow(1.7) }, { pow(abs($0), 1.7) }),
    Unary("clamp", { try $0.clamp(-1, 0.5) }, { min(max($0, -1), 0.5) }),
    Unary("+ scalar", { try $0 + 0.3 }, { $0 + 0.3 }),
    Unary("scalar +", { try 0.3 + $0 }, { 0.3 + $0 }),
    Unary("- scalar", { try $0 - 0.3 }, { $0 - 0.3 }),
    Unary("* scalar", { try $0 * 0.3 }, { $0 * 0.3 }),
    Unary("scalar *", { try 0.3 * $0 }, { 0.3 * $0 }),
    Unary("/ scalar", { try $0 / 0.3 }, { $0 / 0.3 }),
    Unary("equal scalar", { try $0.equal(0.5) }, { $0 == 0.5 ? 1 : 0 }),
    Unary("notEqual scalar", { try $0.notEqual(0.5) }, { $0 != 0.5 ? 1 : 0 }),
    Unary("less scalar", { try $0.less(0.5) }, { $0 < 0.5 ? 1 : 0 }),
    Unary("lessOrEqual scalar", { try $0.lessOrEqual(0.5) }, { $0 <= 0.5 ? 1 : 0 }),
    Unary("greater scalar", { try $0.greater(0.5) }, { $0 > 0.5 ? 1 : 0 }),
    Unary("greaterOrEqual scalar", { try $0.greaterOrEqual(0.5) }, { $0 >= 0.5 ? 1 : 0 }),
    Unary("logicalNot", { try $0.greater(0.5).logicalNot() }, { $0 > 0.5 ? 0 : 1 }),
    Unary("isFinite", { try ($0 - 0.5).reciprocal().isFinite() }, { $0 == 0.5 ? 0 : 1 }),
  ]

  @Test("one operand", arguments: unary)
  func oneOperand(_ c: Unary) throws {
    try expectClose(
      c.operation(Self.points.tensor()), Self.points.map(c.expected), absolute: 1e-15, relative: 1e-14)
  }

  struct Binary: Sendable, CustomTestStringConvertible {
    let name: String
    let operation: @Sendable (Tensor, Tensor) throws -> Tensor
    let expected: @Sendable (Double, Double) -> Double
    var testDescription: String { name }
    init(
      _ name: String, _ operation: @escaping @Sendable (Tensor, Tensor) throws -> Tensor,
      _ expected: @escaping @Sendable (Double, Double) -> Double
    ) {
      (self.name, self.operation, self.expected) = (name, operation, expected)
    }
  }
  static let binary: [Binary] = [
    Binary("+", { try $0 + $1 }, { $0 + $1 }),
    Binary("-", { try $0 - $1 }, { $0 - $1 }),
    Binary("*", { try $0 * $1 }, { $0 * $1 }),
    Binary("/", { try $0 / ($1 + 0.25) }, { $0 / ($1 + 0.25) }),
    Binary("maximum", { try $0.maximum($1) }, { max($0, $1) }),
    Binary("minimum", { try $0.minimum($1) }, { min($0, $1) }),
    Binary("equal", { try $0.equal($1) }, { $0 == $1 ? 1 : 0 }),
    Binary("notEqual", { try $0.notEqual($1) }, { $0 != $1 ? 1 : 0 }),
    Binary("less", { try $0.less($1) }, { $0 < $1 ? 1 : 0 }),
    Binary("lessOrEqual", { try $0.lessOrEqual($1) }, { $0 <= $1 ? 1 : 0 }),
    Binary("greater", { try $0.greater($1) }, { $0 > $1 ? 1 : 0 }),
    Binary("greaterOrEqual", { try $0.greaterOrEqual($1) }, { $0 >= $1 ? 1 : 0 }),
    Binary("logicalAnd", { try $0.logicalAnd($1) }, { $0 != 0 && $1 != 0 ? 1 : 0 }),
    Binary("logicalOr", { try $0.logicalOr($1) }, { $0 != 0 || $1 != 0 ? 1 : 0 }),
    Binary("select", { try $0.less($1).select($0, else: $1 * 2) }, { $0 < $1 ? $0 : $1 * 2 }),
    Binary("adding(product:)", { try $0.adding(product: $0, $1) }, { $0 + $0 * $1 }),
  ]

  // Multiples of a half: ties and zeros occur on both sides.
  @Test("two operands, broadcast over a column and a row", arguments: binary)
  func twoOperands(_ c: Binary) throws {
    let column = [-1.5, -0.5, 0, 0.5, 2]
    let row = [-1.0, -0.5, 0, 0.5, 1, 2, 3]
    try expectClose(
      c.operation(try Tensor(column, shape: [5, 1]), try Tensor(row)),
      Grid(column.flatMap { a in row.map { c.expected(a, $0) } }, [5, 7]), absolute: 1e-15, relative: 1e-14)
  }

  @Test("comparisons give bool")
  func boolean() throws {
    let a = try Tensor([1.0, 2])
    for result in [try a.less(a), try a.less(1), try a.isFinite(), try a.logicalNot(), try a.logicalOr(a)] {
      #expect(result.dtype == .bool)
    }
  }

  @Test("a clone owns its elements, a detached tensor shares them and is cut from the graph")
  func storage() throws {
    let leaf = try Grid([1, 2], [2]).leaf()
    let (copy, same) = (try leaf.clone(), try leaf.detach())
    #expect(copy.requiresGrad && !same.requiresGrad)
    try same.multiplyInPlace(3)
    #expect(try leaf.doubles() == [3, 6])
    #expect(try copy.doubles() == [1, 2])
  }

  @Test("matrix products, batched: triple loop; 4 products of at most 2.25 round to within 1e-14")
  func matmul() throws {
    let (a, b) = (Grid(noise: 2, 3, 4, seed: 4), Grid(noise: 4, 5, seed: 5))
    var expected = Grid(2, 3, 5)
    for n in 0..<2 {
      for i in 0..<3 { for j in 0..<5 { for k in 0..<4 { expected[n, i, j] += a[n, i, k] * b[k, j] } } }
    }
    try expectClose(a.tensor().matmul(try b.tensor()), expected, absolute: 1e-14)
  }

  @Test("complex numbers: views of pairs, products with the conjugate are |z|²; exact in small integers")
  func complex() throws {
    let pairs = try Tensor([1, 2, -3, 4] as [Float], shape: [2, 2])
    let z = try pairs.viewAsComplex()
    #expect(z.dtype == .complex64 && z.shape == [2])
    #expect(try z.viewAsReal().floats() == [1, 2, -3, 4])
    #expect(try (z * z.conj()).viewAsReal().floats() == [5, 0, 25, 0])
    #expect(try (z * z).viewAsReal().floats() == [-3, 4, -7, -24])
  }
}
