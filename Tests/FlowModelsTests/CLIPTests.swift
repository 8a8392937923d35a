import FlowModels
import Foundation
import Testing
import Torch

@Suite("CLIP")
struct CLIPTests {
  // Oracle: the pooled embeddings of diffusers' StableDiffusion3Pipeline, CLIP-L's then CLIP-G's, of the first
  // prompts of flux_text_prompts.json. 2e-5: float32 modules of the README's table.
  @Test("text encoders with projection: SD3's pooled embedding")
  func projectedText() throws {
    struct Fixture: Decodable { let prompts: [String] }
    let io = Fixtures.parity.appending(path: "io")
    let fixture = try Data(contentsOf: io.appending(path: "flux_text_prompts.json"))
    let prompts = try JSONDecoder().decode(Fixture.self, from: fixture).prompts.prefix(2)
    let folder = Fixtures.parity.appending(path: "sd3-tiny")
    let parts = try ["", "_2"].map { suffix in
      let tokenizer = try CLIPTokenizer(folder: folder.appending(path: "tokenizer\(suffix)"))
      let encoder = try CLIPTextEncoder(folder: folder.appending(path: "text_encoder\(suffix)"))
      let ids = try Tensor(prompts.flatMap { tokenizer.encode($0, length: 77).ids }, shape: [2, 77])
      return try withoutGrad { try #require(try encoder(ids).projected) }
    }
    let expected = try SafetensorsFile(io.appending(path: "sd3_pipeline.safetensors")).require("out.pooled")
    let joined = try Tensor.cat(parts, -1)
    #expect(joined.shape == expected.shape)
    #expect(largestDifference(try joined.floats(), try expected.floats()) < 2e-5)
  }

  @Test("a text encoder without projection gives none; one that promises it must hold it")
  func noProjection() throws {
    let plain = try CLIPTextEncoder(folder: Fixtures.tiny.appending(path: "text_encoder"))
    #expect(try withoutGrad { try plain(try Tensor([Int64(712), 713], shape: [1, 2])).projected } == nil)
    let scratch = try Scratch()
    let copy = scratch.path("text_encoder")
    try FileManager.default.copyItem(at: Fixtures.parity.appending(path: "sd3-tiny/text_encoder"), to: copy)
    try rewrite(copy.appending(path: "model.safetensors")) { $0["text_projection.weight"] = nil }
    let text = message { _ = try CLIPTextEncoder(folder: copy) }
    #expect(text.contains("1 parameters not set (text_projection.weight)"))
  }

  // The embeddings themselves are checked by verify's rows (VerifierTests).

  private func copy(_ name: String) throws -> (scratch: Scratch, folder: URL) {
    let scratch = try Scratch()
    let folder = scratch.path(name)
    try FileManager.default.copyItem(at: Fixtures.parity.appending(path: name), to: folder)
    return (scratch, folder)
  }
  private func edit(_ file: URL, _ from: String, _ to: String) throws {
    let text = try String(contentsOf: file, encoding: .utf8)
    try #require(text.contains(from))
    try text.replacingOccurrences(of: from, with: to).write(to: file, atomically: true, encoding: .utf8)
  }

  @Test(
    "both namings: a missing, a misshapen and an unknown key are named",
    arguments: [
      ("clip-tiny-gelu", "model", "vision_model.pre_layrnorm.bias", "visual_projection.weight"),
      ("openclip-tiny", "open_clip_model", "visual.ln_pre.bias", "visual.proj"),
    ])
  func misfits(_ name: String, _ file: String, _ missing: String, _ misshapen: String) throws {
    let (scratch, folder) = try copy(name)
    try rewrite(folder.appending(path: "\(file).safetensors")) {
      $0[missing] = nil
      $0[misshapen] = try #require($0[misshapen]).reshape(-1)
      $0["stray"] = try Tensor([Float(1)])
      $0["text_model.embeddings.position_ids"] = try Tensor([Int64(0), 1])  // as older exporters, ignored
    }
    let text = message { _ = try CLIPModel(folder: folder) }
    #expect(text.contains("1 parameters not set (\(missing))"))
    #expect(text.contains("1 parameters of another shape (\(misshapen): expected"))
    #expect(text.contains("1 keys not used (stray)"))
    withExtendedLifetime(scratch) {}
  }

  @Test("open_clip configurations that are not computed are refused, all fields at once")
  func refusedConfiguration() throws {
    let (scratch, folder) = try copy("openclip-tiny")
    let file = folder.appending(path: "open_clip_config.json")
    try edit(file, "\"image_size\": 28,", "\"image_size\": 28, \"timm_model_name\": \"vit\",")
    try edit(file, "\"heads\": 3,", "\"heads\": 3, \"pool_type\": \"last\",")
    #expect(
      message { _ = try CLIPModel(folder: folder) }.hasSuffix(
        "open_clip_config.json: text_cfg.pool_type, vision_cfg.timm_model_name not supported; "
          + "expected a plain ViT with a causal text tower"))
    withExtendedLifetime(scratch) {}
  }

  @Test("the activation: by flag, and by the caller where the name of the model says it")
  func activation() throws {
    let pixels = try Fixtures.normals([1, 3, 28, 28], "pixels")
    func embedding(_ folder: URL, _ activation: String? = nil) throws -> [Float] {
      let model = try CLIPModel(folder: folder, activation: activation)
      return try withoutGrad { try model.embedImages(pixels).floats() }
    }
    let (scratch, folder) = try copy("openclip-tiny")
    let plain = try embedding(folder)
    let quick = try embedding(folder, "quick_gelu")
    #expect(plain != quick)
    try edit(
      folder.appending(path: "open_clip_config.json"), "\"embed_dim\": 20,",
      "\"embed_dim\": 20, \"quick_gelu\": true,")
    #expect(try embedding(folder) == quick)
    #expect(try embedding(folder, "gelu") == plain)
    #expect(
      message { _ = try embedding(folder, "relu") }.contains("hidden_act relu is not one of quick_gelu, gelu")
    )
    withExtendedLifetime(scratch) {}
  }

  @Test("images of another size and texts longer than the positions are refused")
  func inputs() throws {
    let model = try CLIPModel(folder: Fixtures.parity.appending(path: "clip-tiny-gelu"))
    #expect(
      message { _ = try model.embedImages(Tensor.zeros([1, 3, 28, 35])) }
        == "images [1, 3, 28, 35]: CLIP's vision tower takes [B, 3, 28, 28]")
    #expect(
      message { _ = try model.embedText(Tensor.zeros([1, 78], dtype: .int64)) }
        == "78 tokens exceed CLIP's 77 positions")
  }

  // Oracle: attention looks back, so what stands behind the end token cannot matter, masked or not, while
  // masking the first words must.
  @Test("the attention mask hides tokens; unit length")
  func attentionMask() throws {
    let model = try CLIPModel(folder: Fixtures.parity.appending(path: "clip-tiny-gelu"))
    let ids = try Tensor([712, 320, 79, 606, 713, 0, 0] as [Int64], shape: [1, 7])
    func embedding(_ mask: [Int64]?) throws -> [Float] {
      let mask = try mask.map { try Tensor($0, shape: [1, 7]) }
      return try withoutGrad { try model.embedText(ids, attentionMask: mask).floats() }
    }
    let plain = try embedding(nil)
    #expect(try embedding([1, 1, 1, 1, 1, 0, 0]) == plain)
    #expect(try largestDifference(embedding([1, 0, 1, 1, 1, 1, 1]), plain) > 1e-2)
    // the embedding is divided by its own norm in float32
    #expect(abs(plain.reduce(0) { $0 + $1 * $1 } - 1) < 1e-6)
  }
}
