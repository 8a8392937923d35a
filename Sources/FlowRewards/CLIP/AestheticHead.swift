import FlowModels
import Foundation
import Torch
import TorchNN

/// LAION's aesthetic predictor on an image embedding: five linear layers in a row, with nothing between them.
///
/// Source: christophschuhmann/improved-aesthetic-predictor@fe88a16 simple_inference.py (MLP); its dropouts do nothing outside
/// training, which is why the layers are numbered 0, 2, 4, 6, 7.
///
/// `@unchecked`: layers prepare their weights on first use, so that one thread at a time computes.
final class AestheticHead: @unchecked Sendable {
  /// Where the reference's sequence holds linear layers.
  private static let places = [0, 2, 4, 6, 7]
  /// Sizes of the published head, between the embedding and the score; those of a file count.
  private static let published = [1024, 128, 64, 16]
  private let layers: [Linear]
  private let lock = NSLock()

  /// Takes every parameter of `file`; any key that does not fit is an error.
  init(_ file: URL, inSize: Int) throws {
    let shapes = try SafetensorsFile(file)
    let checkpoint = try Checkpoint(
      folder: file.deletingLastPathComponent(), names: [file.deletingPathExtension().lastPathComponent],
      dtype: .float32)
    let path = checkpoint.root / "layers"
    var (layers, size): ([Linear], Int) = ([], inSize)
    let registry = ModuleRegistry()
    for (i, place) in Self.places.enumerated() {
      let last = i == Self.published.count
      let outSize = last ? 1 : shapes.shape("layers.\(place).weight")?.first ?? Self.published[i]
      layers.append(try Linear(size, outSize, path / place, registry))
      size = outSize
    }
    try checkpoint.finish()
    self.layers = layers
  }

  /// Unit vectors [B, size] → scores [B].
  func callAsFunction(_ x: Tensor) throws -> Tensor {
    lock.lock()
    defer { lock.unlock() }
    return try withoutGrad { try layers.reduce(x) { try $1($0) }.squeeze(1) }
  }
}
