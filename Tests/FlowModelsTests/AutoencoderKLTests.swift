import FlowModels
import Foundation
import Testing
import Torch

/// Oracle: diffusers' own tiled passes, recorded by Tools/reference/make_vae_tiling.py; and whole batches.
@Suite("Autoencoder in slices and tiles")
struct AutoencoderKLTests {
  private func autoencoder() throws -> AutoencoderKL {
    try AutoencoderKL(folder: Fixtures.tiny.appending(path: "vae"))
  }
  private func distance(_ a: Tensor, _ b: Tensor) throws -> Double {
    #expect(a.shape == b.shape)
    return try (a - b).abs().amax().item()
  }

  // Values reach about 5; the convolutions of some 30 layers add in another order than the reference's: 2e-5.
  @Test("tiles are diffusers' tiles: three by four, cut off on both sides, blended")
  func tiled() throws {
    let data = try SafetensorsFile(Fixtures.parity.appending(path: "../vae-tiled/vae_tiled.safetensors"))
    let vae = try autoencoder()
    #expect(vae.tileSize == 64, "sample_size")
    let plain = try vae.decode(try data.require("in.latents"))
    (vae.passes, vae.tileSize) = (.tiled, 32)
    let decoded = try vae.decode(try data.require("in.latents"))
    #expect(try distance(decoded, try data.require("out.decoded")) < 2e-5)
    #expect(try distance(decoded, plain) > 0.1, "tiles see less than the whole")
    let encoded = try vae.encode(try data.require("in.image"))
    #expect(try distance(encoded.mean, try data.require("out.enc_mean")) < 2e-5)
    #expect(try distance(encoded.logVariance, try data.require("out.enc_logvar")) < 2e-5)
  }

  @Test("images that fit one tile are not cut; one by one they equal the batch to rounding")
  func sliced() throws {
    let vae = try autoencoder()
    let (z, x) = (try Fixtures.normals([3, 16, 4, 6], "z"), try Fixtures.normals([3, 3, 32, 48], "x"))
    let (plain, moments) = (try vae.decode(z), try vae.encode(x))
    for passes in [AutoencoderKL.Passes.sliced, .tiled] {
      vae.passes = passes
      // A batch of one may take other kernels: float32 rounding of values up to 5, as above.
      #expect(try distance(vae.decode(z), plain) < 2e-5)
      #expect(try distance(vae.encode(x).mean, moments.mean) < 2e-5)
      #expect(try vae.decode(z)[1..<2].bytes() == vae.decode(try z[1..<2]).bytes(), "no image sees another")
    }
  }

  // Some 30 roundings of 2⁻⁹ one after the other, a third of that each on average: √30 · 2⁻⁹/3 = 0.004, four times that.
  @Test("bfloat16 between float32 latents and images")
  func bfloat16() throws {
    let z = try Fixtures.normals([3, 16, 4, 6], "z")
    let half = try AutoencoderKL(folder: Fixtures.tiny.appending(path: "vae"), dtype: .bfloat16)
    let (got, expected) = try withoutGrad { (try half.images(z), try autoencoder().images(z)) }
    #expect(half.dtype == .bfloat16 && got.dtype == .float32 && got.shape == [3, 3, 32, 48])
    let error = try ((got - expected).square().sum() / expected.square().sum()).sqrt().item()
    #expect(error > 1e-4 && error < 1.5e-2)
  }

  @Test("by itself: whole batches while they are small, then images, tiles above 1024 × 1024")
  func policy() throws {
    let vae = try autoencoder()
    // 4 channels in the last level: 48 bytes a pixel, so that 2 GiB hold 42.67 images of 1024 × 1024.
    #expect(vae.passes == .auto && vae.passes(count: 42, height: 1024, width: 1024) == .plain)
    #expect(vae.passes(count: 43, height: 1024, width: 1024) == .sliced)
    #expect(vae.passes(count: 1, height: 1024, width: 1024) == .plain)
    #expect(vae.passes(count: 1, height: 1024, width: 1032) == .tiled)
    vae.passes = .sliced
    #expect(vae.passes(count: 1, height: 4096, width: 4096) == .sliced, "what is asked for is done")
  }
}
