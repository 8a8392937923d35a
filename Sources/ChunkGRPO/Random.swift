import Foundation

/// The counter-based generator Philox4x32 with 10 rounds: a keyed bijection of 128-bit blocks.
///
/// Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
public enum Philox4x32 {
  /// Four 32-bit words.
  public typealias Block = (UInt32, UInt32, UInt32, UInt32)

  /// The block at `counter` of the sequence `key`.
  @inlinable
  public static func block(_ counter: Block, key: (UInt32, UInt32)) -> Block {
    var (c, k) = (counter, key)
    for _ in 0..<10 {
      let p = UInt64(c.0) &* 0xD251_1F53
      let q = UInt64(c.2) &* 0xCD9E_8D57
      c = (
        UInt32(truncatingIfNeeded: q >> 32) ^ c.1 ^ k.0, UInt32(truncatingIfNeeded: q),
        UInt32(truncatingIfNeeded: p >> 32) ^ c.3 ^ k.1, UInt32(truncatingIfNeeded: p)
      )
      k = (k.0 &+ 0x9E37_79B9, k.1 &+ 0xBB67_AE85)
    }
    return c
  }
}

/// What a stream is drawn for; the raw values are part of every run's reproducibility and never change.
public enum Purpose: UInt32, Sendable, CaseIterable {
  /// x_0 of a training trajectory.
  case initialNoise = 0
  /// ε of a training transition.
  case stepNoise = 1
  /// Which chunks a sample trains on.
  case chunkDraw = 2
  /// The order of the samples over an iteration's updates.
  case sampleOrder = 3
  /// The order of the prompts over the iterations.
  case promptOrder = 4
  /// Initial parameters; the stream's text is the parameter's name.
  case parameterInit = 5
  /// x_0 of an evaluation image.
  case evaluationNoise = 6
  /// ε of a stochastic evaluation transition.
  case evaluationStepNoise = 7
  /// Examples, levels and noise of flow-matching pretraining.
  case pretraining = 8
  /// Which steps of a drawn chunk a sample trains on.
  case stepDraw = 9
  /// Where the stochastic steps of a group are.
  case window = 10
  /// The trajectories that `chunk.plan: auto` is chosen by: their prompts, x_0 (step 0) and ε of step i (i + 1).
  case pilot = 11
}

/// Where all random numbers of a run come from: a stream is a pure function of the seed and of what it is
/// for, so that values do not depend on micro-batch, device count, device kind or resume point.
public struct RandomPlan: Sendable, Equatable, Codable {
  /// Sample indices below this have streams of their own.
  public static let sampleLimit = 1 << 16
  /// Step indices below this have streams of their own.
  public static let stepLimit = 1 << 12

  /// The run's seed.
  public let seed: UInt64

  /// A plan for one run.
  public init(seed: UInt64) { self.seed = seed }

  /// The stream for one use.
  ///
  /// One Philox block maps (iteration, hash of the text, sample, step, purpose), 128 bits, onto the stream's
  /// 64-bit key and 64-bit nonce. The map is a bijection: uses that differ in any of them have different
  /// streams, unless two texts share a 64-bit hash.
  /// - Parameters:
  ///   - purpose: what the numbers are for.
  ///   - iteration: in 0 ..< 2³².
  ///   - prompt: any text: the prompt, or a parameter's name.
  ///   - sample: in 0 ..< ``sampleLimit``.
  ///   - step: in 0 ..< ``stepLimit``.
  public func stream(
    _ purpose: Purpose, iteration: Int = 0, prompt: String = "", sample: Int = 0, step: Int = 0
  ) -> RandomStream {
    precondition((0..<Self.sampleLimit).contains(sample), "sample \(sample) has no stream")
    precondition((0..<Self.stepLimit).contains(step), "step \(step) has no stream")
    let text = Self.hash(prompt)
    let use = UInt32(sample) << 16 | UInt32(step) << 4 | purpose.rawValue
    let (k0, k1, n0, n1) = Philox4x32.block(
      (UInt32(iteration), UInt32(truncatingIfNeeded: text), UInt32(truncatingIfNeeded: text >> 32), use),
      key: (UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32)))
    return RandomStream(key: (k0, k1), nonce: (n0, n1))
  }

  /// FNV-1a, 64 bits, of the UTF-8 bytes: stable over processes and platforms, unlike `Hasher`.
  public static func hash(_ text: String) -> UInt64 {
    text.utf8.reduce(0xCBF2_9CE4_8422_2325) { ($0 ^ UInt64($1)) &* 0x100_0000_01B3 }
  }
}

/// A sequence of random words with random access: word n is lane n mod 4 of block n / 4.
///
/// Uniform numbers, indices and normals all read the same words from ``position`` on, so a stream is best
/// used for one kind of value. Value n never depends on how earlier calls were split.
public struct RandomStream: RandomNumberGenerator, Sendable {
  /// Words read so far; may be set to jump.
  public var position: UInt64 = 0
  private let key: (UInt32, UInt32)
  private let nonce: (UInt32, UInt32)

  init(key: (UInt32, UInt32), nonce: (UInt32, UInt32)) { (self.key, self.nonce) = (key, nonce) }

  private func block(_ index: UInt64) -> Philox4x32.Block {
    let low = UInt32(truncatingIfNeeded: index)
    let high = UInt32(truncatingIfNeeded: index >> 32)
    return Philox4x32.block((low, high, nonce.0, nonce.1), key: key)
  }

  /// 64 uniform bits: the next two words, from an even position on.
  public mutating func next() -> UInt64 {
    let start = (position + 1) & ~1
    let words = block(start / 4)
    position = start + 2
    let (low, high) = start & 2 == 0 ? (words.0, words.1) : (words.2, words.3)
    return UInt64(high) << 32 | UInt64(low)
  }

  /// A standard normal for every element of `out`.
  ///
  /// Box–Muller in Double from 32-bit uniforms in (0, 1), one word a value, rounded to float32; the largest
  /// magnitude is 6.77.
  public mutating func fillNormal(_ out: UnsafeMutableBufferPointer<Float>) {
    var i = 0
    while i < out.count {
      let words = block(position / 4)
      let lane = Int(position & 3)
      if lane == 0 && out.count - i >= 4 {
        (out[i], out[i + 1]) = Self.normalPair(words.0, words.1)
        (out[i + 2], out[i + 3]) = Self.normalPair(words.2, words.3)
        i += 4
        position += 4
      } else {  // the ragged ends of a fill
        let pair = lane < 2 ? Self.normalPair(words.0, words.1) : Self.normalPair(words.2, words.3)
        out[i] = lane & 1 == 0 ? pair.0 : pair.1
        i += 1
        position += 1
      }
    }
  }

  @inline(__always)
  private static func normalPair(_ first: UInt32, _ second: UInt32) -> (Float, Float) {
    let radius = (-2 * log((Double(first) + 0.5) * 0x1p-32)).squareRoot()
    let angle = (Double(second) + 0.5) * (0x1p-31 * Double.pi)
    return (Float(radius * cos(angle)), Float(radius * sin(angle)))
  }

  /// The next `count` standard normals.
  public mutating func normals(count: Int) -> [Float] {
    [Float](unsafeUninitializedCapacity: count) { buffer, initialized in
      fillNormal(UnsafeMutableBufferPointer(rebasing: buffer[..<count]))
      initialized = count
    }
  }

  /// The indices 0 ..< n in random order (Fisher–Yates; ours, so that it cannot change with the standard
  /// library).
  public mutating func shuffled(_ n: Int) -> [Int] {
    var order = Array(0..<n)
    for i in stride(from: n - 1, to: 0, by: -1) { order.swapAt(i, index(below: i + 1)) }
    return order
  }
}

extension RandomNumberGenerator {
  /// A uniform Double in [0, 1) with 53 random bits.
  public mutating func uniform() -> Double { Double(next() >> 11) * 0x1p-53 }

  /// A uniform index in 0 ..< n: the high half of a 128-bit product; its bias, below n / 2⁶⁴, cannot be
  /// observed.
  public mutating func index(below n: Int) -> Int {
    precondition(n > 0, "an index needs a non-empty range")
    return Int(next().multipliedFullWidth(by: UInt64(n)).high)
  }
}
