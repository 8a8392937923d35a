import Pictures
import Torch

/// Each image of [B, 3, H, W] as 8-bit pixels: clamped to 0…1 and rounded to the nearest of 256 levels.
///
/// What NaN becomes is not said: ask ``finiteImages(_:)`` first.
func rgbPictures(of images: Tensor) throws -> [Pictures.Image] {
  guard images.size(0) > 0 else { return [] }
  let (height, width) = (images.size(2), images.size(3))
  let bytes = try withoutGrad {
    // Conversion truncates, so that adding a half rounds.
    try (images.to(.float32).clamp(0, 1) * 255 + 0.5).to(.uint8).permute(0, 2, 3, 1).contiguous().bytes()
  }
  let size = 3 * height * width
  return (0..<images.size(0)).map { i in
    var picture = Pictures.Image(width: width, height: height)
    picture.pixels = Array(bytes[i * size..<(i + 1) * size])
    return picture
  }
}
