import Torch

/// Differences of every glyph at every position, by Fourier transform: Σ(x − T)² = x²∗1 − 2x∗T + ΣT².
///
/// In ink (white = 0) the template's margin and the canvas around the image vanish, so that x∗T needs no
/// padding: a circular correlation of the image's own size wraps only where the glyph would leave the image.
/// The factor −2/n and ΣT²/n (n numbers a box) are folded into the spectra, which leaves one product and one
/// inverse transform a template. Energies x²∗1 are two small products with banded matrices.
struct TemplateSpectra: Sendable {
  private let side, sizes, objects: Int
  /// Conjugate spectra times −2/n, one tensor a channel: [sizes · objects, 1, side, side/2 + 1].
  private let channels: [Tensor]
  /// ΣT²/n as the zero frequency of a constant: complex [sizes · objects, 1, 1, 1].
  private let energies: Tensor
  /// Row p sums the pixels p − 1 … p + size, none where the glyph would leave the image: [sizes, 1, side,
  /// side].
  private let bands: Tensor
  /// `bands` transposed and divided by n.
  private let meanBands: Tensor

  init(_ sprites: SpriteSheet, side: Int) throws {
    (self.side, sizes, objects) = (side, sprites.sizes.count, sprites.objects.count)
    var spectra: [Tensor] = []
    var offsets: [Float] = []
    var band: [Float] = []
    var scales: [Float] = []
    for (size, ink) in zip(sprites.sizes, sprites.ink) {
      let n = Double(3 * (size + 2) * (size + 2))
      let spectrum = try Tensor(ink, shape: [objects, 3, size, size]).rfft2(side, side).viewAsReal()
      spectra.append(try spectrum * Tensor([Float(-2 / n), Float(2 / n)]))
      for object in 0..<objects {
        let energy = ink[object * 3 * size * size..<(object + 1) * 3 * size * size].reduce(0.0) {
          $0 + Double($1 * $1)
        }
        // irfft2 divides by side².
        offsets += [Float(energy / n * Double(side * side)), 0]
      }
      for p in 0..<side {
        band += (0..<side).map { p <= side - size && $0 >= p - 1 && $0 <= p + size ? 1 : 0 }
      }
      scales.append(Float(1 / n))
    }
    let all = try Tensor.cat(spectra)
    channels = try (0..<3).map { try all.narrow(1, $0, 1).contiguous().viewAsComplex() }
    energies = try Tensor(offsets, shape: [sizes * objects, 1, 1, 1, 2]).viewAsComplex()
    bands = try Tensor(band, shape: [sizes, 1, side, side])
    meanBands = try (bands.transpose(2, 3) * Tensor(scales, shape: [sizes, 1, 1, 1])).contiguous()
  }

  /// Mean squared difference to the nearest glyph of each size with its left and top edge at each position.
  ///
  /// - Parameter ink: [B, 3, side, side], float32.
  /// - Returns: [sizes, B, side, side]; rows and columns above side − size mean nothing.
  func smallestDifferences(_ ink: Tensor) throws(TorchError) -> Tensor {
    let count = ink.size(0)
    let image = try ink.rfft2(side, side)
    var product = try channels[0] * image.select(1, 0)
    product = try product.adding(product: channels[1], image.select(1, 1))
    product = try product.adding(product: channels[2], image.select(1, 2))
    try product.narrow(2, 0, 1).narrow(3, 0, 1).addInPlace(energies)
    var least = try product.irfft2(side, side).reshape(sizes, objects, count, side, side)
    // Halving keeps every pass a contiguous minimum; a reduction over this dimension is ten times slower.
    while least.size(1) > 1 {
      let (all, half) = (least.size(1), least.size(1) / 2)
      let rest = try least.narrow(1, half, all - half)
      least =
        try all % 2 == 0
        ? least.narrow(1, 0, half).minimum(rest)
        : Tensor.cat([least.narrow(1, 0, half).minimum(rest.narrow(1, 0, half)), rest.narrow(1, half, 1)], 1)
    }
    let squares = try ink.square().sum([1]).unsqueeze(0)  // [1, B, side, side]
    return try least.squeeze(1) + bands.matmul(squares).matmul(meanBands)
  }
}
