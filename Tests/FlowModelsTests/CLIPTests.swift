import FlowModels
import Foundation
import Testing
import Torch

@Suite("CLIP")
struct CLIPTests {
  // Oracle: the pooled embeddings of diffusers' StableDiffusion3Pipeline, CLIP-L's then CLIP-G's, of prompts that
  // the T5 fixture names. 2e-5: float32 modules of the README's table.
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
}
