import Foundation
import Testing

@testable import ChunkGRPO

@Suite struct RandomTests {
  /// Random123's kat_vectors for philox4x32, 10 rounds.
  @Test("Philox known answers")
  func knownAnswers() {
    let ones = UInt32.max
    #expect(
      Philox4x32.block((0, 0, 0, 0), key: (0, 0)) == (0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8))
    #expect(
      Philox4x32.block((ones, ones, ones, ones), key: (ones, ones))
        == (0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD))
    #expect(
      Philox4x32.block((0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344), key: (0xA409_3822, 0x299F_31D0))
        == (0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1))
  }

  /// The published FNV test vectors.
  @Test(
    "FNV-1a",
    arguments: [("", 0xCBF2_9CE4_8422_2325), ("a", 0xAF63_DC4C_8601_EC8C), ("foobar", 0x8594_4171_F739_67E8)])
  func fnv(_ text: String, _ hash: UInt64) { #expect(RandomPlan.hash(text) == hash) }

  static let seed: UInt64 = 0x1234_5678_90AB_CDEF
  var stream: RandomStream {
    RandomPlan(seed: Self.seed).stream(.stepNoise, iteration: 3, prompt: "a red fox, 狐", sample: 2, step: 5)
  }

  /// Oracle: the same definition in Python's integers and math module. It pins every run's numbers: if it
  /// fails, old seeds no longer reproduce. Double log, cos and sin may differ by a unit between libraries,
  /// hence 1e-7 after rounding to float32.
  @Test("a stream's words and normals, pinned")
  func snapshot() {
    var words = stream
    #expect(
      (0..<4).map { _ in words.next() }
        == [0xB84A_E916_B025_2834, 0xE3F0_F735_877D_89A1, 0x0F1C_14BA_4162_D7CC, 0x990F_8C33_06CB_674E])
    var normals = stream
    expectClose(
      normals.normals(count: 12).map(Double.init),
      [
        -0.162602887, -0.849292934, 0.870981455, -0.716899514, 1.53987598, 0.598763227, -2.20033121,
        -1.55455995,
        -0.68954742, -0.38132292, -0.733491361, 2.02924919,
      ], relative: 1e-7)
  }

  @Test("values do not depend on how a fill is split, and position jumps to any of them")
  func splits() {
    var whole = stream
    let expected = whole.normals(count: 64)
    for pieces in [[1, 2, 3, 5, 7, 11, 35], [3, 4, 4, 53], [64], [0, 63, 1]] {
      var split = stream
      #expect(pieces.flatMap { split.normals(count: $0) } == expected)
      #expect(split.position == 64)
    }
    var jumped = stream
    jumped.position = 29
    #expect(jumped.normals(count: 10) == Array(expected[29..<39]))
    // 64-bit words continue from the next even word
    var (words, odd) = (stream, stream)
    odd.position = 3
    _ = (words.next(), words.next())
    #expect(odd.next() == words.next())
    // beyond 2³² blocks
    var far = stream
    far.position = 1 << 34
    #expect(far.normals(count: 4) != Array(expected[..<4]))
  }

  @Test("every field, and the seed, gives another stream")
  func distinct() {
    let plan = RandomPlan(seed: Self.seed)
    var streams = Purpose.allCases.map { plan.stream($0) }
    streams += [
      plan.stream(.stepNoise, iteration: 1), plan.stream(.stepNoise, prompt: "a"),
      plan.stream(.stepNoise, sample: 1),
      plan.stream(.stepNoise, step: 1), plan.stream(.stepNoise, sample: RandomPlan.sampleLimit - 1),
      plan.stream(.stepNoise, step: RandomPlan.stepLimit - 1), RandomPlan(seed: 0).stream(.stepNoise),
      RandomPlan(seed: Self.seed ^ 1 << 40).stream(.stepNoise),
    ]
    var first = Set<UInt64>()
    for var stream in streams { first.insert(stream.next()) }
    #expect(first.count == streams.count)
    #expect(Set(Purpose.allCases.map(\.rawValue)).count == Purpose.allCases.count)
    #expect(Purpose.allCases.allSatisfy { $0.rawValue < 16 })  // the field's width
  }

  /// Moments of n = 40000 normals: standard errors 1/√n, √(2/n), √(6/n), √(24/n); 4.5 of them at a fixed
  /// seed.
  @Test("normals have the moments and tails of normals")
  func normalMoments() {
    var random = stream
    let x = random.normals(count: 40_000).map(Double.init)
    func moment(_ k: Int) -> Double { x.reduce(0) { $0 + pow($1, Double(k)) } / Double(x.count) }
    let error = 4.5 / Double(x.count).squareRoot()
    expectClose(moment(1), 0, absolute: error)
    expectClose(moment(2), 1, absolute: error * 2.0.squareRoot())
    expectClose(moment(3), 0, absolute: error * 15.0.squareRoot())  // variance of x³
    expectClose(moment(4), 3, absolute: error * 96.0.squareRoot())  // variance of x⁴
    let outside = Double(x.filter { abs($0) > 1.959964 }.count) / Double(x.count)
    expectClose(outside, 0.05, absolute: error * (0.05 * 0.95).squareRoot())
  }

  /// Correlations of 10000 pairs have standard error 1/√n; 4.5 of them.
  @Test("neighbouring streams and neighbouring values are uncorrelated")
  func independence() {
    let plan = RandomPlan(seed: 7)
    func normals(_ sample: Int, _ step: Int) -> [Double] {
      var stream = plan.stream(.stepNoise, prompt: "p", sample: sample, step: step)
      return stream.normals(count: 10_000).map(Double.init)
    }
    let base = normals(0, 0)
    for other in [normals(1, 0), normals(0, 1), Array(base.dropFirst()) + [base[0]]] {
      let correlation = zip(base, other).reduce(0) { $0 + $1.0 * $1.1 } / 10_000
      expectClose(correlation, 0, absolute: 4.5 / 100)
    }
  }

  @Test("shuffles are permutations, each equally often; indices stay in range")
  func shuffles() {
    var random = testStream("shuffle")
    #expect(random.shuffled(0) == [] && random.shuffled(1) == [0])
    #expect(random.shuffled(50).sorted() == Array(0..<50))
    var seen: [[Int]: Int] = [:]
    for _ in 0..<6000 { seen[random.shuffled(3), default: 0] += 1 }
    #expect(seen.count == 6)
    // 1000 expected of each, standard deviation √(6000·5/36) = 28.9; 4.5 of them
    #expect(seen.values.allSatisfy { abs($0 - 1000) < 130 })
    #expect((0..<200).allSatisfy { _ in (0..<7).contains(random.index(below: 7)) })
    #expect((0..<200).allSatisfy { _ in (0..<1).contains(random.uniform()) })
  }
}
