import FlowModels
import Foundation
import Torch

extension RewardKind {
  /// Cosine of image and prompt by a CLIP folder, prepared as the folder says: CLIPScore.
  static let clip = RewardKind("clip", keys: [.model, .batch]) { settings, _ in
    try CLIPRecipe.clip.reward(settings) { _ in .cosine }
  }

  /// The CLIP reward of the Chunk-GRPO paper's code: DFN's ViT-H-14 on squashed images of 378 pixels.
  static let dfnCLIP = RewardKind("dfn-clip", keys: [.model, .batch]) { settings, _ in
    try CLIPRecipe.dfn.reward(settings) { _ in .cosine }
  }

  /// PickScore v1. The default is the plain cosine, as the paper's code has it: it lies where the other CLIP rewards do.
  static let pickScore = RewardKind(
    "pickscore", keys: [.score, .model, .batch], scores: ["cosine", "scaled", "over26"]
  ) { settings, _ in
    try CLIPRecipe.pickScore.reward(settings) { _ in
      switch settings.score {
      case "scaled": .scaled(by: 1)
      case "over26": .scaled(by: 26)
      default: .cosine
      }
    }
  }

  /// HPSv2.1.
  static let hpsv2 = RewardKind("hpsv2", keys: [.model, .batch]) { settings, _ in
    try CLIPRecipe.hpsv2.reward(settings) { _ in .cosine }
  }

  /// LAION's aesthetic predictor; the prompt plays no part.
  static let aesthetic = RewardKind("aesthetic", keys: [.model, .head, .batch]) { settings, _ in
    let head = try CLIPRecipe.head(settings)
    return try CLIPRecipe.aesthetic.reward(settings) { .head(try AestheticHead(head, inSize: $0)) }
  }
}

/// What a reward of the CLIP family is made of: published files, and how images and texts are prepared.
struct CLIPRecipe {
  /// What has to be in the model's folder, for whoever has to put it there.
  var wanted: String
  /// In place of the configuration's activation.
  var activation: String?
  /// In place of the folder's image preparation; `bytes` says whether resizing rounds.
  var images: (fit: CLIPImageProcessor.Fit, bytes: Bool)?
  /// Whose tokenizer; nil is by the folder: open_clip's where there is an `open_clip_config.json`.
  var style: CLIPTokenizer.Style?
  /// Whether it reads prompts.
  var readsText = true

  private static let vocabulary = "vocab.json and merges.txt of openai/clip-vit-large-patch14"
  private static let large = """
    config.json, model.safetensors, preprocessor_config.json, vocab.json and merges.txt of \
    openai/clip-vit-large-patch14
    """

  /// Source: transformers 5.23.0 CLIPModel and CLIPProcessor (slow), as Flow-Factory's CLIPScore uses them.
  static let clip = CLIPRecipe(
    wanted: "a folder with \(large); or of an open_clip model open_clip_config.json and "
      + "open_clip_model.safetensors, with the same vocabulary")
  /// Source: open_clip v3.3.0 hf-hub:apple/DFN5B-CLIP-ViT-H-14-378 (its activation follows from the name there).
  static let dfn = CLIPRecipe(
    wanted: """
      a folder with open_clip_config.json of apple/DFN5B-CLIP-ViT-H-14-378, \(vocabulary), and \
      open_clip_model.safetensors, made by: chunkgrpo convert open_clip_pytorch_model.bin open_clip_model.safetensors
      """,
    activation: "quick_gelu", images: (.squash, true), style: .openCLIP)
  /// Source: yifan123/flow_grpo@ac4c86e flow_grpo/pickscore_scorer.py, whose score is `over26`.
  static let pickScore = CLIPRecipe(
    wanted: """
      a folder with config.json and model.safetensors of yuvalkirstain/PickScore_v1, and preprocessor_config.json, \
      vocab.json, merges.txt and tokenizer_config.json of laion/CLIP-ViT-H-14-laion2B-s32B-b79K
      """)
  /// Source: hpsv2 1.2.0 img_score.py and src/open_clip/transform.py, which resizes after ToTensor, thus floats.
  static let hpsv2 = CLIPRecipe(
    wanted: """
      a folder with open_clip_config.json of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, \(vocabulary), and \
      open_clip_model.safetensors, made of xswu/HPSv2 by: \
      chunkgrpo convert HPS_v2.1_compressed.pt open_clip_model.safetensors --key state_dict
      """,
    activation: "gelu", images: (.longestEdge, false), style: .openCLIP)
  /// Source: yifan123/flow_grpo@ac4c86e flow_grpo/aesthetic_scorer.py.
  static let aesthetic = CLIPRecipe(
    wanted: "a folder with \(large) (its vocabulary is not read)", readsText: false)

  private static let wantedHead = """
    a safetensors file, made of christophschuhmann/improved-aesthetic-predictor by: \
    chunkgrpo convert sac+logos+ava1-l14-linearMSE.pth aesthetic.safetensors
    """

  /// The file of `settings.head`.
  static func head(_ settings: RewardSettings) throws -> URL {
    guard let path = settings.head else {
      throw RewardError.missingKey(reward: settings.name, key: "head", wanted: wantedHead)
    }
    let file = URL(filePath: path)
    guard file.pathExtension == "safetensors", FileManager.default.fileExists(atPath: path) else {
      let found =
        file.pathExtension == "safetensors" ? "which does not exist" : "which is no safetensors file"
      throw RewardError.badValue(
        reward: settings.name, key: "head", expected: wantedHead, got: "\(path), \(found)")
    }
    return file
  }

  /// The reward that `settings` describe.
  ///
  /// - Parameter formula: given the size of the embeddings.
  /// - Throws: ``RewardError`` that says what to put where; what is wrong inside a file names the file.
  func reward(
    _ settings: RewardSettings, _ formula: (_ size: Int) throws -> CLIPReward.Formula
  ) throws -> CLIPReward {
    let folder = try folder(settings)
    let batch = settings.batch ?? 16
    guard batch >= 1 else {
      throw RewardError.badValue(
        reward: settings.name, key: "batch", expected: "images of one pass, at least 1", got: "\(batch)")
    }
    var processor = try CLIPImageProcessor(folder: folder)
    if let images { (processor.fit, processor.bytes) = images }
    let isOpen = Self.exists("open_clip_config.json", folder)
    let style = readsText ? style ?? (isOpen ? .openCLIP : .transformers) : nil
    let embedder = try CLIPEmbedder(folder: folder, activation: activation, style: style)
    return CLIPReward(
      name: settings.name, embedder: embedder, processor: processor, formula: try formula(embedder.size),
      batch: batch)
  }

  /// The folder of `settings.model`, with every file there that is read.
  private func folder(_ settings: RewardSettings) throws -> URL {
    guard let path = settings.model else {
      throw RewardError.missingKey(reward: settings.name, key: "model", wanted: wanted)
    }
    let folder = URL(filePath: path)
    func bad(_ what: String) -> RewardError {
      .badValue(reward: settings.name, key: "model", expected: wanted, got: "\(path), \(what)")
    }
    var isFolder: ObjCBool = false
    guard FileManager.default.fileExists(atPath: path, isDirectory: &isFolder) else {
      throw bad("which does not exist")
    }
    guard isFolder.boolValue else { throw bad("which is no folder") }
    let needed = [
      ["open_clip_config.json", "config.json"],
      ["open_clip_model", "model"].flatMap { ["\($0).safetensors", "\($0).safetensors.index.json"] },
    ]
    let texts = readsText ? [["vocab.json"], ["merges.txt"]] : []
    let missing = (needed + texts).filter { !$0.contains { Self.exists($0, folder) } }
    guard missing.isEmpty else {
      let names = missing.map { $0.filter { !$0.hasSuffix("index.json") }.joined(separator: " or ") }
      throw bad("which lacks \(names.joined(separator: ", "))")
    }
    return folder
  }

  private static func exists(_ name: String, _ folder: URL) -> Bool {
    FileManager.default.fileExists(atPath: folder.appending(path: name).path)
  }
}
