import Testing
import Torch

/// Oracle: element i of a counting tensor is i, so that every result is a list of indices; exact.
@Suite("Shapes and indexing")
struct ShapeTests {
  /// 0, 1, 2, … in `shape`.
  func counting(_ shape: Int...) throws -> Tensor {
    try Tensor((0..<shape.reduce(1, *)).map(Int64.init), shape: shape)
  }
  func expect(
    _ tensor: Tensor, _ shape: [Int], _ values: [Int64], sourceLocation: SourceLocation = #_sourceLocation
  ) throws {
    #expect(tensor.shape == shape, sourceLocation: sourceLocation)
    #expect(try tensor.int64s() == values, sourceLocation: sourceLocation)
  }

  @Test("reshape, permute, transpose, squeeze, unsqueeze, expand")
  func views() throws {
    let a = try counting(2, 3)
    try expect(a.reshape(3, -1), [3, 2], [0, 1, 2, 3, 4, 5])
    try expect(a.reshape([6]), [6], [0, 1, 2, 3, 4, 5])
    try expect(a.transpose(0, 1), [3, 2], [0, 3, 1, 4, 2, 5])
    try expect(a.transpose(-1, -2).contiguous(), [3, 2], [0, 3, 1, 4, 2, 5])
    try expect(counting(1, 2, 3).permute(2, 0, 1), [3, 1, 2], [0, 3, 1, 4, 2, 5])
    try expect(a.unsqueeze(1), [2, 1, 3], [0, 1, 2, 3, 4, 5])
    try expect(a.unsqueeze(1).squeeze(1), [2, 3], [0, 1, 2, 3, 4, 5])
    try expect(counting(2, 1).expand(-1, 3), [2, 3], [0, 0, 0, 1, 1, 1])
  }

  @Test("narrow, subscripts, select, chunk and split are views of the same elements")
  func parts() throws {
    let a = try counting(3, 4)
    try expect(a.narrow(1, 1, 2), [3, 2], [1, 2, 5, 6, 9, 10])
    try expect(a[1..<3], [2, 4], [4, 5, 6, 7, 8, 9, 10, 11])
    try expect(a[1], [4], [4, 5, 6, 7])
    try expect(a[-1], [4], [8, 9, 10, 11])
    try expect(a.select(1, 2), [3], [2, 6, 10])
    let halves = try a.chunk(2, -1)
    #expect(halves.count == 2)
    try expect(halves[0], [3, 2], [0, 1, 4, 5, 8, 9])
    try expect(halves[1], [3, 2], [2, 3, 6, 7, 10, 11])
    let pieces = try a.split([1, 0, 2], 0)
    #expect(pieces.count == 3)
    try expect(pieces[0], [1, 4], [0, 1, 2, 3])
    try expect(pieces[1], [0, 4], [])
    try expect(pieces[2], [2, 4], [4, 5, 6, 7, 8, 9, 10, 11])
    try halves[1].copy(from: try Tensor.zeros([3, 2]))
    try expect(a, [3, 4], [0, 1, 0, 0, 4, 5, 0, 0, 8, 9, 0, 0])
  }

  @Test("indexSelect, gather, repeatInterleave, pad, cat, stack")
  func copies() throws {
    let a = try counting(2, 3)
    try expect(a.indexSelect(1, try Tensor([2, 0, 2] as [Int64])), [2, 3], [2, 0, 2, 5, 3, 5])
    try expect(a.gather(1, try Tensor([2, 0, 1, 1] as [Int64], shape: [2, 2])), [2, 2], [2, 0, 4, 4])
    try expect(a.gather(0, try Tensor([1, 0, 1] as [Int64], shape: [1, 3])), [1, 3], [3, 1, 5])
    try expect(a.repeatInterleave(2, 0), [4, 3], [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
    try expect(a.pad([1, 2], value: 9), [2, 6], [9, 0, 1, 2, 9, 9, 9, 3, 4, 5, 9, 9])
    try expect(a.pad([0, 0, 1, 0]), [3, 3], [0, 0, 0, 0, 1, 2, 3, 4, 5])
    try expect(a.pad([-1, 0]), [2, 2], [1, 2, 4, 5])
    let b = try a + 6
    try expect(Tensor.cat([a, b]), [4, 3], Array(0..<12))
    try expect(Tensor.cat([a, b], -1), [2, 6], [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11])
    try expect(Tensor.stack([a, b]), [2, 2, 3], Array(0..<12))
    try expect(Tensor.stack([a, b], 1), [2, 2, 3], [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11])
  }
}

/// Oracle: sums and products in Double by their definitions; 6 addends round to within 1e-14.
@Suite("Reductions")
struct ReductionTests {
  let grid = Grid(noise: 2, 3, seed: 6)

  @Test("sum, mean, amax, amin and variance over everything, rows and columns")
  func definitions() throws {
    func variance(_ x: [Double], _ correction: Double) -> Double {
      let mean = x.reduce(0, +) / Double(x.count)
      return x.reduce(0) { $0 + ($1 - mean) * ($1 - mean) } / (Double(x.count) - correction)
    }
    typealias Case = (String, ([Int], Bool) throws -> Tensor, ([Double]) -> Double)
    let t = try grid.tensor()
    let cases: [Case] = [
      ("sum", { try t.sum($0, keep: $1) }, { $0.reduce(0, +) }),
      ("mean", { try t.mean($0, keep: $1) }, { $0.reduce(0, +) / Double($0.count) }),
      ("amax", { try t.amax($0, keep: $1) }, { $0.max()! }),
      ("amin", { try t.amin($0, keep: $1) }, { $0.min()! }),
      ("variance", { try t.variance($0, keep: $1) }, { variance($0, 1) }),
      ("variance of n", { try t.variance($0, correction: 0, keep: $1) }, { variance($0, 0) }),
    ]
    let rows = (0..<2).map { i in (0..<3).map { grid[i, $0] } }
    let columns = (0..<3).map { j in (0..<2).map { grid[$0, j] } }
    for (name, operation, expected) in cases {
      try expectClose(operation([], false), Grid([expected(grid.values)], []), absolute: 1e-14, name)
      try expectClose(operation([0, 1], true), Grid([expected(grid.values)], [1, 1]), absolute: 1e-14, name)
      try expectClose(operation([-1], false), Grid(rows.map(expected), [2]), absolute: 1e-14, name)
      try expectClose(operation([0], true), Grid(columns.map(expected), [1, 3]), absolute: 1e-14, name)
    }
  }

  @Test("argmax and minimum(along:) give places, ties the first; exact")
  func places() throws {
    let t = try Tensor([3.0, 1, 1, 0, 5, 5], shape: [2, 3])
    #expect(try t.argmax(1).int64s() == [0, 1])
    #expect(try t.argmax(0, keep: true).shape == [1, 3])
    let (values, indices) = try t.minimum(along: 1)
    #expect(try values.doubles() == [1, 0])
    #expect(try indices.int64s() == [1, 0] && indices.dtype == .int64)
    let kept = try t.minimum(along: 0, keep: true)
    #expect(try kept.values.doubles() == [0, 1, 1] && kept.indices.int64s() == [1, 0, 0])
    #expect(kept.values.shape == [1, 3] && kept.indices.shape == [1, 3])
  }

  @Test("softmax by its definition, and unmoved by a large offset")
  func softmax() throws {
    var expected = Grid(2, 3)
    for i in 0..<2 {
      let powers = (0..<3).map { exponential(grid[i, $0]) }
      for j in 0..<3 { expected[i, j] = powers[j] / powers.reduce(0, +) }
    }
    try expectClose(grid.tensor().softmax(-1), expected, relative: 1e-14)
    // The offset 2⁹ costs nine bits of the input: 2⁻⁵³·2⁹·2 ≈ 1e-13.
    try expectClose((grid.tensor() + 512).softmax(1), expected, relative: 4e-13)
  }

  @Test("allFinite sees one NaN or infinity among many", arguments: [Float.nan, .infinity, -.infinity])
  func allFinite(_ bad: Float) throws {
    var values = [Float](repeating: 1, count: 1000)
    #expect(try Tensor(values).allFinite())
    values[777] = bad
    #expect(try !Tensor(values).allFinite())
    #expect(try Tensor([Float.greatestFiniteMagnitude, 1]).to(.float32).allFinite())
  }
}

import func Foundation.exp

private func exponential(_ x: Double) -> Double { exp(x) }
