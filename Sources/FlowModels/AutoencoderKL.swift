import Foundation
import Torch
import TorchNN

/// The convolutional autoencoder between images and latents.
///
/// Reference: diffusers 0.42.1 AutoencoderKL (down, middle and up blocks of ResNet pairs, one-head attention in
/// the middle).
public final class AutoencoderKL {
  /// Sizes from `config.json`.
  public struct Config: Decodable, Sendable {
    let blockOutChannels: [Int]
    let layersPerBlock: Int
    /// Channels of a latent.
    public let latentChannels: Int
    let normNumGroups: Int?
    let inChannels: Int?
    let outChannels: Int?
    let sampleSize: Int?
    let scalingFactor: Double?
    let shiftFactor: Double?
    let useQuantConv: Bool?
    let usePostQuantConv: Bool?
    let midBlockAddAttention: Bool?
  }

  /// The sizes this was built with.
  public let config: Config
  /// Layers and parameters by checkpoint key.
  public let modules = ModuleRegistry()
  /// How much of a batch of images goes through the network at once.
  public enum Passes: String, Sendable, CaseIterable {
    /// ``tiled`` above 1024 × 1024 pixels, ``sliced`` where a batch's largest layers would take more than 2
    /// GiB, else ``plain``.
    case auto
    /// The whole batch.
    case plain
    /// One image at a time.
    case sliced
    /// One tile of one image at a time; see ``AutoencoderKL/tileSize``.
    case tiled
  }
  /// How batches are encoded and decoded.
  public var passes = Passes.auto
  /// Side of a tile in pixels; neighbours overlap by a quarter and are blended linearly there.
  ///
  /// Tiles are normalised and attended to by themselves: the result is close to that of ``Passes/plain``, not
  /// equal. Initially `sample_size` of config.json.
  public var tileSize: Int

  /// What it computes in: encode and decode take tensors of it. Norms, sums and what they are rounded from are float32.
  public private(set) var dtype = DType.float32

  /// Pixels a latent cell covers along each side.
  public var downscale: Int { 1 << (config.blockOutChannels.count - 1) }
  private let encoder: Encoder
  private let decoder: Decoder
  private let quant, postQuant: Conv2d?

  /// Builds the autoencoder and takes every parameter of `folder`, straight to `dtype` and `device`.
  public convenience init(folder: URL, dtype: DType = .float32, device: Device = .cpu) throws {
    let config = try ModelFolder.decode(Config.self, folder.appending(path: "config.json"))
    try self.init(
      config: config, checkpoint: try Checkpoint(folder: folder, dtype: dtype, device: device))
    try place(dtype, device)
  }

  /// Moves all parameters to `dtype` and `device`.
  public func place(_ dtype: DType, _ device: Device) throws(TorchError) {
    try modules.place(dtype, device)
    self.dtype = dtype
  }

  /// Builds the autoencoder and takes every parameter of `checkpoint`; any key that does not fit is an error.
  public init(config: Config, checkpoint: Checkpoint) throws {
    self.config = config
    tileSize = config.sampleSize ?? 512
    let (p, c, r) = (checkpoint.root, config, modules)
    encoder = try Encoder(c, p / "encoder", r)
    decoder = try Decoder(c, p / "decoder", r)
    let z = c.latentChannels
    quant = c.useQuantConv ?? true ? try Conv2d(2 * z, 2 * z, kernel: 1, p / "quant_conv", r) : nil
    postQuant = c.usePostQuantConv ?? true ? try Conv2d(z, z, kernel: 1, p / "post_quant_conv", r) : nil
    try checkpoint.finish()
  }

  /// images [B, 3, H, W] in −1 … 1 → mean and log-variance of the latent [B, C, h, w].
  public func encode(_ images: Tensor) throws(TorchError) -> (mean: Tensor, logVariance: Tensor) {
    let moments = try run(images, tile: tileSize, scale: (1, downscale)) { x throws(TorchError) in
      let moments = try encoder(x)
      return try quant?(moments) ?? moments
    }
    let parts = try moments.chunk(2, 1)
    return (parts[0], try parts[1].clamp(-30, 20))
  }
  /// latents [B, C, h, w] → images [B, 3, H, W], about −1 … 1.
  public func decode(_ latents: Tensor) throws(TorchError) -> Tensor {
    try run(latents, tile: tileSize / downscale, scale: (downscale, 1)) { z throws(TorchError) in
      try decoder(try postQuant?(z) ?? z)
    }
  }

  /// The passes of a batch of `count` images of `height` × `width` pixels; never ``Passes/auto``.
  public func passes(count: Int, height: Int, width: Int) -> Passes {
    guard passes == .auto else { return passes }
    if height * width > 1024 * 1024 { return .tiled }
    // The last level is the largest: float32 input, normalised input and output of its first convolution.
    let channels = config.blockOutChannels[min(1, config.blockOutChannels.count - 1)]
    return count > 1 && count * height * width * channels * 4 * 3 > 2 << 30 ? .sliced : .plain
  }

  /// Applies `part` to the batch, to its images or to their tiles.
  ///
  /// - Parameters:
  ///   - tile: side of a tile in cells of `x`.
  ///   - scale: side of a cell of `x` in pixels, and of a cell of the result.
  private func run(
    _ x: Tensor, tile: Int, scale: (input: Int, output: Int), _ part: (Tensor) throws(TorchError) -> Tensor
  ) throws(TorchError) -> Tensor {
    let s = x.shape
    let chosen = passes(count: s[0], height: s[2] * scale.input, width: s[3] * scale.input)
    guard chosen != .plain else { return try part(x) }
    var images: [Tensor] = []
    for i in 0..<s[0] {
      let image = try x[i..<(i + 1)]
      let tiles = chosen == .tiled && max(s[2], s[3]) > tile
      images.append(
        tiles ? try tiled(image, tile: tile, result: tileSize / scale.output, part) : try part(image))
    }
    return images.count == 1 ? images[0] : try Tensor.cat(images)
  }

  /// Applies `part` to overlapping tiles and joins the results.
  ///
  /// Reference: diffusers 0.42.1 AutoencoderKL.tiled_decode and _tiled_encode with tile_overlap_factor 0.25:
  /// a tile is blended with the one above it, then with the one to its left, as these were after their own
  /// blending.
  private func tiled(
    _ x: Tensor, tile: Int, result: Int, _ part: (Tensor) throws(TorchError) -> Tensor
  ) throws(TorchError) -> Tensor {
    let (step, blend) = (tile * 3 / 4, result / 4)
    let (height, width) = (x.size(2), x.size(3))
    var rows: [Tensor] = []
    var above: [Tensor] = []
    for top in stride(from: 0, to: height, by: step) {
      var row: [Tensor] = []
      var kept: [Tensor] = []
      for (j, left) in stride(from: 0, to: width, by: step).enumerated() {
        let piece = try x.narrow(2, top, min(tile, height - top)).narrow(3, left, min(tile, width - left))
        var y = try part(piece.contiguous())
        if !above.isEmpty { y = try blended(above[j], y, 2, blend) }
        if let before = row.last { y = try blended(before, y, 3, blend) }
        row.append(y)
        kept.append(
          try y.narrow(2, 0, min(result - blend, y.size(2))).narrow(3, 0, min(result - blend, y.size(3))))
      }
      rows.append(try Tensor.cat(kept, 3))
      above = row
    }
    return try Tensor.cat(rows, 2)
  }

  /// `b` with its first `extent` entries of `dim` faded in from the last ones of `a`.
  private func blended(_ a: Tensor, _ b: Tensor, _ dim: Int, _ extent: Int) throws(TorchError) -> Tensor {
    let extent = min(a.size(dim), b.size(dim), extent)
    guard extent > 0 else { return b }
    let shape = (0..<4).map { $0 == dim ? extent : 1 }
    func weights(_ value: (Double) -> Double) throws(TorchError) -> Tensor {
      try Tensor((0..<extent).map { Float(value(Double($0) / Double(extent))) }, shape: shape).to(b.device)
    }
    let end = try a.narrow(dim, a.size(dim) - extent, extent) * weights { 1 - $0 }
    let start = try end + b.narrow(dim, 0, extent) * weights { $0 }
    return try Tensor.cat([start, b.narrow(dim, extent, b.size(dim) - extent)], dim)
  }
  /// Latents as the flow model has them → images in 0 … 1, float32 both, whatever ``dtype`` lies between.
  public func images(_ latents: Tensor) throws(TorchError) -> Tensor {
    let z = try latents / (config.scalingFactor ?? 1) + (config.shiftFactor ?? 0)
    return try (try decode(try z.to(dtype)).to(.float32) * 0.5 + 0.5).clamp(0, 1)
  }

  private struct ResNet {
    let norm1, norm2: GroupNorm
    let conv1, conv2: Conv2d
    let shortcut: Conv2d?
    init(_ inSize: Int, _ outSize: Int, _ groups: Int, _ p: ParameterPath, _ r: ModuleRegistry) throws {
      norm1 = try GroupNorm(groups, inSize, eps: 1e-6, p / "norm1", r)
      conv1 = try Conv2d(inSize, outSize, kernel: 3, padding: 1, p / "conv1", r)
      norm2 = try GroupNorm(groups, outSize, eps: 1e-6, p / "norm2", r)
      conv2 = try Conv2d(outSize, outSize, kernel: 3, padding: 1, p / "conv2", r)
      shortcut = inSize == outSize ? nil : try Conv2d(inSize, outSize, kernel: 1, p / "conv_shortcut", r)
    }
    func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
      try conv2(try conv1(x, norm: norm1), norm: norm2, adding: try shortcut?(x) ?? x)
    }
  }

  private struct MiddleAttention {
    let norm: GroupNorm
    let qkv: LinearGroup
    let out: Linear
    init(_ size: Int, _ groups: Int, _ p: ParameterPath, _ r: ModuleRegistry) throws {
      norm = try GroupNorm(groups, size, eps: 1e-6, p / "group_norm", r)
      qkv = r.group(try ["to_q", "to_k", "to_v"].map { try Linear(size, size, p / $0, r) })
      out = try Linear(size, size, p / "to_out" / 0, r)
    }
    func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
      let s = x.shape
      let rows = try norm(try x.reshape(s[0], s[1], s[2] * s[3])).transpose(1, 2)
      let parts = try qkv(rows).unsqueeze(1).chunk(3, -1)
      let mixed = try Tensor.attention(parts[0], parts[1], parts[2]).squeeze(1)
      return try x + out(mixed).transpose(1, 2).reshape(s)
    }
  }

  private struct Middle {
    let first, second: ResNet
    let attention: MiddleAttention?
    init(_ size: Int, _ c: Config, _ p: ParameterPath, _ r: ModuleRegistry) throws {
      let groups = c.normNumGroups ?? 32
      first = try ResNet(size, size, groups, p / "resnets" / 0, r)
      second = try ResNet(size, size, groups, p / "resnets" / 1, r)
      let attends = c.midBlockAddAttention ?? true
      attention = attends ? try MiddleAttention(size, groups, p / "attentions" / 0, r) : nil
    }
    func callAsFunction(_ x: Tensor) throws(TorchError) -> Tensor {
      let x = try first(x)
      return try second(try attention?(x) ?? x)
    }
  }

  private struct Encoder {
    let convIn, convOut: Conv2d
    let levels: [(resnets: [ResNet], down: Conv2d?)]
    let middle: Middle
    let norm: GroupNorm
    init(_ c: Config, _ p: ParameterPath, _ r: ModuleRegistry) throws {
      let (sizes, groups) = (c.blockOutChannels, c.normNumGroups ?? 32)
      convIn = try Conv2d(c.inChannels ?? 3, sizes[0], kernel: 3, padding: 1, p / "conv_in", r)
      var before = sizes[0]
      levels = try sizes.enumerated().map { i, size in
        let path = p / "down_blocks" / i
        let resnets = try (0..<c.layersPerBlock).map { j in
          try ResNet(j == 0 ? before : size, size, groups, path / "resnets" / j, r)
        }
        before = size
        let last = i == sizes.count - 1
        return (
          resnets,
          last ? nil : try Conv2d(size, size, kernel: 3, stride: 2, path / "downsamplers" / 0 / "conv", r)
        )
      }
      middle = try Middle(before, c, p / "mid_block", r)
      norm = try GroupNorm(groups, before, eps: 1e-6, p / "conv_norm_out", r)
      convOut = try Conv2d(before, 2 * c.latentChannels, kernel: 3, padding: 1, p / "conv_out", r)
    }
    func callAsFunction(_ images: Tensor) throws(TorchError) -> Tensor {
      var x = try convIn(images)
      for (resnets, down) in levels {
        for resnet in resnets { x = try resnet(x) }
        // Padding on the right and below only, as the reference's strided convolution.
        if let down { x = try down(try x.pad([0, 1, 0, 1])) }
      }
      return try convOut(try middle(x), norm: norm)
    }
  }

  private struct Decoder {
    let convIn, convOut: Conv2d
    let levels: [(resnets: [ResNet], up: Conv2d?)]
    let middle: Middle
    let norm: GroupNorm
    init(_ c: Config, _ p: ParameterPath, _ r: ModuleRegistry) throws {
      let (sizes, groups) = (Array(c.blockOutChannels.reversed()), c.normNumGroups ?? 32)
      convIn = try Conv2d(c.latentChannels, sizes[0], kernel: 3, padding: 1, p / "conv_in", r)
      middle = try Middle(sizes[0], c, p / "mid_block", r)
      var before = sizes[0]
      levels = try sizes.enumerated().map { i, size in
        let path = p / "up_blocks" / i
        let resnets = try (0...c.layersPerBlock).map { j in
          try ResNet(j == 0 ? before : size, size, groups, path / "resnets" / j, r)
        }
        before = size
        let last = i == sizes.count - 1
        return (
          resnets,
          last ? nil : try Conv2d(size, size, kernel: 3, padding: 1, path / "upsamplers" / 0 / "conv", r)
        )
      }
      norm = try GroupNorm(groups, before, eps: 1e-6, p / "conv_norm_out", r)
      convOut = try Conv2d(before, c.outChannels ?? 3, kernel: 3, padding: 1, p / "conv_out", r)
    }
    func callAsFunction(_ latents: Tensor) throws(TorchError) -> Tensor {
      var x = try middle(try convIn(latents))
      for (resnets, up) in levels {
        for resnet in resnets { x = try resnet(x) }
        if let up { x = try up(x, upsampled: true) }
      }
      return try convOut(x, norm: norm)
    }
  }
}
