/// Antialiased bicubic resizing of interleaved images, as Pillow does it: each side in its own pass, the
/// horizontal one first.
///
/// Source: Pillow@12.0.0 src/libImaging/Resample.c (precompute_coeffs, normalize_coeffs_8bpc,
/// ImagingResampleHorizontal_8bpc, ImagingResampleVertical_8bpc). Bytes are reproduced exactly: weights are
/// integers of 22 fractional bits, and the result of each pass is rounded to bytes.
enum BicubicResize {
  /// An interleaved image [height, width, channels], row-major.
  struct Image<Sample> {
    var values: [Sample]
    var height, width, channels: Int
  }

  /// `image` at `height` × `width`; sides of at least 1.
  static func resize<S: BicubicSample>(_ image: Image<S>, height: Int, width: Int) -> Image<S> {
    var result = image
    if width != image.width {
      result.values = pass(
        result.values, outer: image.height, from: image.width, to: width, inner: image.channels)
      result.width = width
    }
    if height != image.height {
      result.values = pass(
        result.values, outer: 1, from: image.height, to: height, inner: result.width * image.channels)
      result.height = height
    }
    return result
  }

  /// [outer, from, inner] → [outer, to, inner].
  private static func pass<S: BicubicSample>(
    _ values: [S], outer: Int, from inSize: Int, to outSize: Int, inner: Int
  ) -> [S] {
    let taps = (0..<outSize).map { place in
      let (first, weights) = weights(from: inSize, to: outSize, at: place)
      return (first, weights.map(S.weight))
    }
    // Pointers: bounds checks took most of the time.
    return values.withUnsafeBufferPointer { source in
      [S](unsafeUninitializedCapacity: outer * outSize * inner) { result, count in
        withUnsafeTemporaryAllocation(of: S.Weight.self, capacity: inner) { sums in
          sums.initialize(repeating: 0)
          for slab in 0..<outer {
            for (first, weights) in taps {
              for i in 0..<inner { sums[i] = 0 }
              var start = (slab * inSize + first) * inner
              for weight in weights {
                for i in 0..<inner { sums[i] = source[start + i].accumulate(sums[i], weight) }
                start += inner
              }
              for i in 0..<inner { (result.baseAddress! + count + i).initialize(to: S(sum: sums[i])) }
              count += inner
            }
          }
        }
      }
    }
  }

  /// The first source sample that output `place` depends on, and the weights from it on, of sum 1.
  static func weights(from inSize: Int, to outSize: Int, at place: Int) -> (first: Int, weights: [Double]) {
    let scale = Double(inSize) / Double(outSize)
    let stretch = max(scale, 1)  // shrinking widens the filter: that is the antialiasing
    let support = 2 * stretch
    let centre = (Double(place) + 0.5) * scale
    // Truncation, not floor, and a limit at zero: as in the source.
    let first = max(Int(centre - support + 0.5), 0)
    let last = min(Int(centre + support + 0.5), inSize)
    let raw = (first..<last).map { filter((Double($0) - centre + 0.5) * (1 / stretch)) }
    let sum = raw.reduce(0, +)
    return (first, raw.map { sum == 0 ? $0 : $0 / sum })
  }

  /// Keys' cubic with a = −1/2.
  private static func filter(_ x: Double) -> Double {
    let (a, x) = (-0.5, abs(x))
    if x < 1 { return ((a + 2) * x - (a + 3)) * x * x + 1 }
    if x < 2 { return (((x - 5) * x + 8) * x - 4) * a }
    return 0
  }
}

/// A kind of sample that can be resized, and how it is summed.
protocol BicubicSample {
  associatedtype Weight: Numeric
  /// A weight as it is multiplied.
  static func weight(_ value: Double) -> Weight
  /// `sum + self · weight`.
  func accumulate(_ sum: Weight, _ weight: Weight) -> Weight
  /// The sample of a finished sum.
  init(sum: Weight)
}

extension UInt8: BicubicSample {
  static func weight(_ value: Double) -> Int32 {
    let scaled = value * Double(1 << 22)
    return Int32(scaled < 0 ? scaled - 0.5 : scaled + 0.5)
  }
  // 255 · 2²² times weights of absolute sum below 2 fits 32 bits.
  func accumulate(_ sum: Int32, _ weight: Int32) -> Int32 { sum &+ Int32(self) &* weight }
  init(sum: Int32) { self.init(clamping: (sum &+ 1 << 21) >> 22) }
}

/// Neither rounded nor limited: what torchvision does with float images.
extension Float: BicubicSample {
  static func weight(_ value: Double) -> Float { Float(value) }
  func accumulate(_ sum: Float, _ weight: Float) -> Float { sum + self * weight }
  init(sum: Float) { self = sum }
}
