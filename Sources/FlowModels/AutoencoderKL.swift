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
    let latentChannels: Int
    let normNumGroups: Int?
    let inChannels: Int?
    let outChannels: Int?
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
  /// Pixels a latent cell covers along each side.
  public var downscale: Int { 1 << (config.blockOutChannels.count - 1) }
  private let encoder: Encoder
  private let decoder: Decoder
  private let quant, postQuant: Conv2d?

  /// Builds the autoencoder and takes every parameter of `folder`.
  public convenience init(folder: URL) throws {
    let config = try ModelFolder.decode(Config.self, folder.appending(path: "config.json"))
    try self.init(config: config, checkpoint: try Checkpoint(folder: folder))
  }

  /// Builds the autoencoder and takes every parameter of `checkpoint`; any key that does not fit is an error.
  public init(config: Config, checkpoint: Checkpoint) throws {
    self.config = config
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
    var moments = try encoder(images)
    if let quant { moments = try quant(moments) }
    let parts = try moments.chunk(2, 1)
    return (parts[0], try parts[1].clamp(-30, 20))
  }
  /// latents [B, C, h, w] → images [B, 3, H, W], about −1 … 1.
  public func decode(_ latents: Tensor) throws(TorchError) -> Tensor {
    try decoder(try postQuant?(latents) ?? latents)
  }
  /// Latents as the flow model has them → images in 0 … 1.
  public func images(_ latents: Tensor) throws(TorchError) -> Tensor {
    let z = try latents / (config.scalingFactor ?? 1) + (config.shiftFactor ?? 0)
    return try (try decode(z) * 0.5 + 0.5).clamp(0, 1)
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
      let hidden = try conv2(norm2(conv1(norm1(x).silu())).silu())
      return try (try shortcut?(x) ?? x) + hidden
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
      return try convOut(norm(try middle(x)).silu())
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
        if let up { x = try up(try x.upsampleNearest(2)) }
      }
      return try convOut(norm(x).silu())
    }
  }
}
