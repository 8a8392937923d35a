import FlowModels
import Foundation
import Testing
import Torch

@testable import FlowRewards

/// The CLIP fixtures, and folders made of them.
private enum CLIPFixtures {
  static let folder = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .appending(path: "Fixtures")
  static let parity = folder.appending(path: "parity")
  static let rewards = folder.appending(path: "clip-rewards")
  static let head = rewards.appending(path: "head.safetensors").path

  static func scores() throws -> SafetensorsFile {
    try SafetensorsFile(rewards.appending(path: "scores.safetensors"))
  }
  static func prompts() throws -> [String] {
    try JSONDecoder().decode(
      [String].self, from: Data(contentsOf: rewards.appending(path: "prompts.json")))
  }
}

/// A folder of its own for one test, gone afterwards.
private final class Scratch {
  let url = FileManager.default.temporaryDirectory.appending(path: "chunkgrpo-clip-\(UUID())")
  init() throws { try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true) }
  deinit { try? FileManager.default.removeItem(at: url) }

  /// A copy of fixture `name`; open_clip's is given the vocabulary that the other two have.
  func model(_ name: String) throws -> URL {
    let copy = url.appending(path: name)
    try FileManager.default.copyItem(at: CLIPFixtures.parity.appending(path: name), to: copy)
    if name == "openclip-tiny" {
      for file in ["vocab.json", "merges.txt"] {
        try FileManager.default.copyItem(
          at: CLIPFixtures.parity.appending(path: "clip-tiny-gelu/\(file)"), to: copy.appending(path: file))
      }
    }
    return copy
  }
}

private func settings(
  _ name: String, _ model: URL?, score: String? = nil, head: String? = nil, batch: Int? = nil
) -> RewardSettings {
  var settings = RewardSettings(name: name, score: score)
  (settings.model, settings.head, settings.batch) = (model?.path, head, batch)
  return settings
}

private func make(
  _ name: String, _ model: URL, score: String? = nil, head: String? = nil, batch: Int? = nil
) throws -> CLIPReward {
  let reward = try RewardFactory.make(settings(name, model, score: score, head: head, batch: batch))
  return try #require(reward as? CLIPReward)
}

/// Bytes [B, H, W, 3] as the decoder gives them: [B, 3, H, W] in 0…1.
private func decoded(_ bytes: Tensor) throws -> Tensor {
  try (bytes.to(.float32) / 255).permute(0, 3, 1, 2).contiguous()
}

private func prompts(_ texts: [String]) -> [RewardPrompt] { texts.map { RewardPrompt(text: $0) } }

private func values(_ scores: [RewardScore]) throws -> [Double] { try scores.map { try #require($0.value) } }

/// Relative 2-norm.
private func error(_ ours: [Double], _ theirs: [Double]) -> Double {
  let difference = zip(ours, theirs).reduce(0) { $0 + ($1.0 - $1.1) * ($1.0 - $1.1) }
  return ours.count == theirs.count
    ? (difference / theirs.reduce(0) { $0 + $1 * $1 }).squareRoot() : .infinity
}

private func message(_ body: () throws -> Void) -> String {
  do { try body() } catch { return "\(error)" }
  return "nothing was thrown"
}

/// Oracle: transformers, open_clip, Pillow, torchvision (Tools/reference/make_clip_rewards.py and make_fixtures.py).
/// 2e-5: float32 modules of Tests/Fixtures/parity/README.md.
@Suite("CLIP rewards")
struct CLIPRewardTests {
  private let scratch: Scratch
  init() throws { scratch = try Scratch() }

  struct Case: CustomTestStringConvertible {
    let name, score: String?
    let model, key: String
    var testDescription: String { key }
  }
  static let cases = [
    Case(name: "clip", score: nil, model: "clip-tiny-quickgelu", key: "clip"),
    Case(name: "aesthetic", score: nil, model: "clip-tiny-quickgelu", key: "aesthetic"),
    Case(name: "pickscore", score: nil, model: "clip-tiny-gelu", key: "pickscore.cosine"),
    Case(name: "pickscore", score: "cosine", model: "clip-tiny-gelu", key: "pickscore.cosine"),
    Case(name: "pickscore", score: "scaled", model: "clip-tiny-gelu", key: "pickscore.scaled"),
    Case(name: "pickscore", score: "over26", model: "clip-tiny-gelu", key: "pickscore.over26"),
    Case(name: "dfn-clip", score: nil, model: "openclip-tiny", key: "dfn-clip"),
    Case(name: "hpsv2", score: nil, model: "openclip-tiny", key: "hpsv2"),
  ]

  @Test(
    "scores of images and texts are the reference libraries'", arguments: cases, ["wide", "tall", "square"])
  func parity(_ c: Case, _ size: String) throws {
    let file = try CLIPFixtures.scores()
    let reward = try make(
      c.name!, try scratch.model(c.model), score: c.score,
      head: c.name == "aesthetic" ? CLIPFixtures.head : nil, batch: 3)  // 4 images: a full pass and a rest
    #expect(reward.name == c.name)
    let images = try decoded(try file.require("in.\(size)"))
    let ours = try reward.scores(images, prompts: prompts(CLIPFixtures.prompts()))
    #expect(error(try values(ours), try file.require("out.\(size).\(c.key)").doubles()) < 2e-5)
    #expect(ours.allSatisfy { $0.failure == nil && $0.retries == 0 })
    // Truncation: 6 × 8 words. Lengths by the reference's tokenizers, which keep 75 tokens of any text.
    let dropped = ours.map { $0.parts["truncated"] }
    if c.name == "aesthetic" {
      #expect(dropped == [nil, nil, nil, nil])
    } else {
      #expect(dropped[0] == 0 && dropped[1] == 0 && dropped[3] == 0)
      #expect(try #require(dropped[2]) > 0)
    }
    if c.key == "pickscore.scaled" || c.key == "pickscore.over26" {
      let cosines = try ours.map { try #require($0.parts["cosine"]) }
      #expect(error(cosines, try file.require("out.\(size).pickscore.cosine").doubles()) < 2e-5)
    }
  }

  @Test(
    "prepared images: bytes of Pillow to the grey level, hpsv2's floats",
    arguments: ["wide", "tall", "square"])
  func pixels(_ size: String) throws {
    let file = try CLIPFixtures.scores()
    let deviation = try Tensor(CLIPImageProcessor.openAIDeviation, shape: [1, 3, 1, 1])
    for (name, model) in [
      ("clip", "clip-tiny-quickgelu"), ("dfn-clip", "openclip-tiny"), ("hpsv2", "openclip-tiny"),
    ] {
      let folder = scratch.url.appending(path: model)
      let reward = try make(
        name, FileManager.default.fileExists(atPath: folder.path) ? folder : try scratch.model(model))
      let images = try decoded(try file.require("in.\(size)"))
      let ours = try reward.processor(try CLIPReward.bytes(images))
      let theirs = try file.require("pixels.\(size).\(name)")
      let levels = try ((ours - theirs) * deviation * 255).abs().amax().item()
      // A grey level is 1. The reference resizes floats in another order of sums than we do.
      #expect(levels < 1e-3, "\(name)")
    }
  }

  // Oracle: the same fixtures that verify reads, here through the rewards.
  @Test(
    "scores of stored pixels and stored tokens",
    arguments: [
      ("clip", "clip-tiny-quickgelu", "clip-tiny-quickgelu", "clipscore"),
      ("clip", "clip-tiny-gelu", "clip-tiny-gelu", "clipscore"),
      ("pickscore", "clip-tiny-gelu", "clip-tiny-gelu", "pickscore"),
      ("pickscore", "clip-tiny-quickgelu", "clip-tiny-quickgelu", "pickscore"),
      ("hpsv2", "openclip-tiny", "openclip", "hpsv2_score"),
    ])
  func stored(_ name: String, _ model: String, _ fixture: String, _ key: String) throws {
    let file = try SafetensorsFile(CLIPFixtures.parity.appending(path: "io/\(fixture).safetensors"))
    let reward = try make(name, try scratch.model(model), score: name == "pickscore" ? "scaled" : nil)
    let pixels = try file.tensor("in.pixel_values") ?? file.require("out.pixel_values")
    let ids = try file.require("in.input_ids")
    let rows = try (0..<ids.size(0)).map { try ids[$0].array(of: Int64.self) }
    let expected = try file.require("out.\(key)").doubles()
    #expect(error(try values(try reward.scores(pixels: pixels, ids: rows)), expected) < 2e-5)
    // Without what stands behind the end token.
    let end = rows[0].max()!
    let short = rows.map { Array($0[...$0.firstIndex(of: end)!]) }
    #expect(error(try values(try reward.scores(pixels: pixels, ids: short)), expected) < 2e-5)
    guard let bytes = try file.tensor("in.images_u8") else { return }
    // make_fixtures.py: its first three prompts.
    let texts = [
      "a photo of a cat sitting on a wooden table", "two red apples and a blue cup, studio light",
      "an astronaut riding a horse on mars, oil painting",
    ]
    let whole = try reward.scores(try decoded(bytes), prompts: prompts(texts))
    #expect(error(try values(whole), expected) < 2e-5)
  }

  @Test("padding goes, one end token stays")
  func trimmed() {
    #expect(CLIPEmbedder.trimmed([5, 1, 9, 0, 0], pad: 0, end: 9) == [5, 1, 9])
    #expect(CLIPEmbedder.trimmed([5, 0, 9], pad: 0, end: 9) == [5, 0, 9])
    #expect(CLIPEmbedder.trimmed([5, 1, 9, 9, 9], pad: 9, end: 9) == [5, 1, 9])
    #expect(CLIPEmbedder.trimmed([5, 9, 9], pad: 9, end: 9) == [5, 9])
    #expect(CLIPEmbedder.trimmed([5, 1, 2, 9], pad: 9, end: 9) == [5, 1, 2, 9])
  }

  @Test("a text's embedding does not depend on its neighbours, nor on what is remembered")
  func texts() throws {
    let folder = try scratch.model("clip-tiny-gelu")
    let few = try CLIPEmbedder(folder: folder, activation: nil, style: .transformers, limit: 2)
    let many = try CLIPEmbedder(folder: folder, activation: nil, style: .transformers)
    #expect(few.sharesModel(with: many))
    let other = try CLIPEmbedder(folder: folder, activation: "quick_gelu", style: nil)
    #expect(!few.sharesModel(with: other))
    let list = ["a cat", "two dogs", "three birds", "a cat", "a cat", "two dogs", "a cat"]
    let first = try many.text("a cat").embedding
    for text in list {
      #expect(try few.text(text).embedding.floats() == many.text(text).embedding.floats())
    }
    #expect(try many.text("a cat").embedding === first)
  }

  @Test("weights are read at first use, once for all rewards of a folder")
  func loads() throws {
    let folder = try scratch.model("clip-tiny-quickgelu")
    _ = try make("clip", folder)
    let (clip, again) = (try make("clip", folder), try make("clip", folder))
    let aesthetic = try make("aesthetic", folder, head: CLIPFixtures.head)
    #expect(clip.embedder.loads == 0)
    let images = try Tensor.zeros([1, 3, 32, 32])
    for reward in [clip, again, aesthetic] {
      _ = try reward.scores(images, prompts: prompts(["a cat"]))
      #expect(reward.embedder.loads == 1)
    }
    #expect(clip.readsPrompts && !aesthetic.readsPrompts)
  }

  // Oracle: the file, and libtorch's allocator.
  @Test("memory is known before the weights are read", arguments: [8, 128])
  func memory(_ side: Int) throws {
    let folder = try scratch.model("clip-tiny-quickgelu")
    let reward = try make("clip", folder, batch: 8)
    let memory = try #require(reward.memory(height: side, width: side))
    #expect(reward.embedder.loads == 0)
    let file = try SafetensorsFile(folder.appending(path: "model.safetensors"))
    #expect(memory.weights == 4 * file.names.reduce(0) { $0 + file.shape($1)!.reduce(1, *) })
    let images = try Tensor.zeros([16, 3, side, side])
    let texts = prompts(.init(repeating: "a cat", count: 16))
    _ = try reward.scores(images, prompts: texts)
    let measured = try TorchRuntime.peakAllocation { try reward.scores(images, prompts: texts) }.bytes
    // A tiny model's pass is small enough for norms and copies to count.
    let error = Double(memory.call) / Double(measured) - 1
    #expect(abs(error) < 0.25, "estimated \(memory.call), measured \(measured)")
  }

  @Test("levels: nearest, within 0…255")
  func bytes() throws {
    let every = try Tensor((0..<768).map { UInt8($0 % 256) }, shape: [1, 16, 16, 3])
    #expect(try CLIPReward.bytes(try decoded(every)).array(of: UInt8.self) == every.array(of: UInt8.self))
    let odd = try Tensor([1.4, 1.6, -3, 300, 254.6, 0.2].map { Float($0) / 255 }, shape: [1, 3, 1, 2])
    #expect(try CLIPReward.bytes(odd).array(of: UInt8.self) == [1, 0, 255, 2, 255, 0])
  }

  @Test("an image that is not finite has no score, the others keep theirs")
  func notFinite() throws {
    let file = try CLIPFixtures.scores()
    let reward = try make("clip", try scratch.model("clip-tiny-quickgelu"))
    let images = try decoded(try file.require("in.wide"))
    let texts = prompts(try CLIPFixtures.prompts())
    let expected = try file.require("out.wide.clip").doubles()
    try images[1].select(0, 0).multiplyInPlace(.nan)
    let ours = try reward.scores(images, prompts: texts)
    #expect(ours[1] == RewardScore(value: nil, failure: "pixels are not finite"))
    let kept = [0, 2, 3]
    #expect(error(try values(kept.map { ours[$0] }), kept.map { expected[$0] }) < 2e-5)
    #expect(try reward.scores(images[0..<0], prompts: []).isEmpty)
    #expect(throws: RewardError.promptCount(images: 4, prompts: 1)) {
      try reward.scores(images, prompts: prompts(["one"]))
    }
  }

  // Oracle: closed form. Zero weights leave the last bias; the published sizes.
  @Test("the published aesthetic head: 768-1024-128-64-16-1")
  func publishedHead() throws {
    let sizes = [768, 1024, 128, 64, 16, 1]
    var tensors: [String: Tensor] = [:]
    for (i, place) in [0, 2, 4, 6, 7].enumerated() {
      tensors["layers.\(place).weight"] = try Tensor.zeros([sizes[i + 1], sizes[i]])
      tensors["layers.\(place).bias"] = try Tensor.full([sizes[i + 1]], i == 4 ? 5.5 : 1)
    }
    let file = scratch.url.appending(path: "head.safetensors")
    try Safetensors.write(tensors, to: file)
    let head = try AestheticHead(file, inSize: 768)
    #expect(try head(Tensor.full([2, 768], 0.3)).doubles() == [5.5, 5.5])
    #expect(
      message { _ = try AestheticHead(file, inSize: 1024) }
        .contains("1 parameters of another shape (layers.0.weight: expected [1024, 1024], got [1024, 768])"))
    tensors["layers.7.bias"] = nil
    try Safetensors.write(tensors, to: file)
    #expect(message { _ = try AestheticHead(file, inSize: 768) }.contains("not set (layers.7.bias)"))
  }

  @Test("float16 files are computed in float32")
  func halfPrecision() throws {
    let folder = try scratch.model("clip-tiny-quickgelu")
    let file = folder.appending(path: "model.safetensors")
    let whole = try SafetensorsFile(file)
    let halves = try whole.names.map { ($0, try whole.require($0).to(.float16)) }
    try Safetensors.write(Dictionary(uniqueKeysWithValues: halves), to: file)
    let fixture = try CLIPFixtures.scores()
    let ours = try make("clip", folder).scores(
      try decoded(try fixture.require("in.wide")), prompts: prompts(CLIPFixtures.prompts()))
    // Weights rounded to 11 bits, 2⁻¹¹ = 5e-4, through two layers; computing in float16 would not run at all.
    #expect(error(try values(ours), try fixture.require("out.wide.clip").doubles()) < 1e-2)
  }

  // MARK: what is missing

  @Test(
    "without a model: what to put where",
    arguments: [
      ("clip", ["openai/clip-vit-large-patch14", "preprocessor_config.json"]),
      ("dfn-clip", ["apple/DFN5B-CLIP-ViT-H-14-378", "chunkgrpo convert open_clip_pytorch_model.bin"]),
      ("pickscore", ["yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]),
      ("hpsv2", ["xswu/HPSv2", "chunkgrpo convert HPS_v2.1_compressed.pt", "--key state_dict"]),
    ])
  func noModel(_ name: String, _ words: [String]) throws {
    let none = message { _ = try RewardFactory.make(name: name) }
    #expect(none.hasPrefix("rewards: \(name) needs model: a folder with "))
    let gone = message { _ = try RewardFactory.make(settings(name, scratch.url.appending(path: "gone"))) }
    #expect(gone.hasPrefix("rewards: \(name) model: expected a folder with "))
    #expect(gone.hasSuffix("gone, which does not exist"))
    for word in words { #expect(none.contains(word) && gone.contains(word)) }
  }

  @Test("files that are missing are named, all at once")
  func missingFiles() throws {
    let folder = try scratch.model("openclip-tiny")
    let files = FileManager.default
    for file in ["open_clip_model.safetensors", "merges.txt"] {
      try files.removeItem(at: folder.appending(path: file))
    }
    #expect(
      message { _ = try RewardFactory.make(settings("hpsv2", folder)) }
        .hasSuffix("openclip-tiny, which lacks open_clip_model.safetensors or model.safetensors, merges.txt"))
    #expect(
      message { _ = try RewardFactory.make(settings("clip", folder.appending(path: "vocab.json"))) }
        .hasSuffix("vocab.json, which is no folder"))
    let empty = message { _ = try RewardFactory.make(settings("clip", scratch.url)) }
    #expect(
      empty.contains("which lacks open_clip_config.json or config.json, open_clip_model.safetensors or"))
    // aesthetic reads no texts
    let silent = message {
      _ = try RewardFactory.make(settings("aesthetic", folder, head: CLIPFixtures.head))
    }
    #expect(silent.hasSuffix("which lacks open_clip_model.safetensors or model.safetensors"))
  }

  @Test("the aesthetic head: missing, a pickle, of another model")
  func heads() throws {
    let folder = try scratch.model("clip-tiny-quickgelu")
    let none = message { _ = try RewardFactory.make(settings("aesthetic", folder)) }
    #expect(none.hasPrefix("rewards: aesthetic needs head: a safetensors file, made of "))
    #expect(none.contains("chunkgrpo convert sac+logos+ava1-l14-linearMSE.pth aesthetic.safetensors"))
    #expect(
      message { _ = try RewardFactory.make(settings("aesthetic", folder, head: "/x/head.pth")) }
        .hasSuffix("got /x/head.pth, which is no safetensors file"))
    #expect(
      message { _ = try RewardFactory.make(settings("aesthetic", folder, head: "/x/h.safetensors")) }
        .hasSuffix("got /x/h.safetensors, which does not exist"))
  }

  @Test("keys that a reward does not read, scores it does not have, passes of no image")
  func badSettings() throws {
    let folder = try scratch.model("clip-tiny-gelu")
    #expect(
      throws: RewardError.unknownScore(
        reward: "pickscore", score: "raw", known: ["cosine", "scaled", "over26"])
    ) {
      try RewardFactory.make(settings("pickscore", folder, score: "raw"))
    }
    #expect(throws: RewardError.foreignKey(reward: "clip", key: "head", known: ["model", "batch"])) {
      try RewardFactory.make(settings("clip", folder, head: "x"))
    }
    #expect(
      message { _ = try RewardFactory.make(settings("clip", folder, batch: 0)) }
        == "rewards: clip batch: expected images of one pass, at least 1, got 0")
  }
}
