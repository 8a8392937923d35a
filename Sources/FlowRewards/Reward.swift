import Foundation
import Torch

/// A function of images and their prompts: what training raises.
///
/// A reward that is computed in this process conforms to ``LocalReward`` instead; one that waits for another process or
/// a server conforms to this, and is asked while the next samples are drawn.
public protocol Reward: Sendable {
  /// The name in configuration and error messages.
  var name: String { get }
  /// Throws for prompts that it can never judge, before any image is drawn.
  func check(_ prompts: [RewardPrompt]) throws
  /// Called once before the probe: throws where what it needs is not there.
  func prepare() async throws
  /// What it is tried with before a run.
  var probe: RewardProbe { get }
  /// Whether the prompts change its scores.
  var readsPrompts: Bool { get }
  /// Scores `images`, one score a prompt, in order.
  ///
  /// - Parameters:
  ///   - images: [B, 3, H, W], float32 in 0…1, on any device.
  ///   - prompts: B prompts.
  /// - Returns: B scores; an image that could not be scored has a nil value and the reason, never a number.
  /// - Throws: ``RewardError`` or `TorchError` when the call as a whole is wrong: a mistake of ours or of the
  ///   configuration. What may be otherwise the next time is a score without value.
  func score(_ images: Tensor, prompts: [RewardPrompt]) async throws -> [RewardScore]
}

extension Reward {
  /// Any prompt will do.
  public func check(_ prompts: [RewardPrompt]) throws {}
  /// Nothing to prepare.
  public func prepare() async throws {}
  /// A sign with a word, against a grey plane.
  public var probe: RewardProbe { .sign }
  /// They do.
  public var readsPrompts: Bool { true }
}

/// A reward that is computed here, on the thread that asks.
public protocol LocalReward: Reward {
  /// ``Reward/score(_:prompts:)`` without waiting for anybody.
  func scores(_ images: Tensor, prompts: [RewardPrompt]) throws -> [RewardScore]
  /// What its model takes with images of this size; nil for rewards without one, whose memory grows with the images.
  func memory(height: Int, width: Int) -> RewardMemory?
}

/// What a reward's model takes, known before it is loaded.
public struct RewardMemory: Sendable, Equatable {
  /// Whose weights: rewards of one model hold them once.
  public var model: String
  /// Their bytes.
  public var weights: Int
  /// Bytes of a call beside its images, however many these are.
  public var call: Int
}

extension LocalReward {
  /// None.
  public func memory(height: Int, width: Int) -> RewardMemory? { nil }
  /// The same, for whoever does not care where it is computed.
  public func score(_ images: Tensor, prompts: [RewardPrompt]) async throws -> [RewardScore] {
    try scores(images, prompts: prompts)
  }
}

/// What one image earned.
public struct RewardScore: Sendable, Equatable {
  /// The score, or nil where there is none: the sample is then masked out of its group.
  public var value: Double?
  /// Named components for the metrics.
  public var parts: [String: Double]
  /// Why there is no value, in a few words.
  public var failure: String?
  /// How often it was asked again.
  public var retries: Int

  /// Creates a score.
  public init(value: Double?, parts: [String: Double] = [:], failure: String? = nil, retries: Int = 0) {
    self.value = value
    self.parts = parts
    self.failure = failure
    self.retries = retries
  }

  /// That of an image with pixels that are no numbers.
  public static let notFinite = RewardScore(value: nil, failure: "the image holds infinities or NaN")
}

/// Two images of known order for a prompt: a reward that cannot tell them apart would teach nothing.
public struct RewardProbe: Sendable, Equatable {
  /// The prompt.
  public var prompt: RewardPrompt
  /// Files in `Data/probe`: the image that should score higher, and the other; PNG.
  public var better: String, worse: String

  /// Creates a probe.
  public init(prompt: RewardPrompt, better: String, worse: String) {
    (self.prompt, self.better, self.worse) = (prompt, better, worse)
  }

  /// 256 × 256 pixels: a colourful sign that says OPEN, against a grey plane; with metadata as detectors read it.
  public static let sign = RewardProbe(
    prompt: RewardPrompt(
      text: "a red sign with the word \"OPEN\" beside a green tree", tag: "single_object",
      metadata: """
        {"tag": "single_object", "include": [{"class": "stop sign", "count": 1}], "prompt": "a photo of a stop sign"}
        """), better: "sign.png", worse: "plane.png")
  /// 64 × 64 pixels: the built-in task's scene of its prompt, against an empty canvas.
  public static let scene = RewardProbe(
    prompt: RewardPrompt(
      text: "a red circle and a dog",
      scene: Scene(include: [.init(name: "circle", color: "red"), .init(name: "dog")]), tag: "two_object"),
    better: "scene.png", worse: "canvas.png")
  /// The same images, the other one first.
  public var reversed: RewardProbe {
    var probe = self
    (probe.better, probe.worse) = (worse, better)
    return probe
  }
}

/// What a prompt's image must show, in GenEval's metadata form.
public struct Scene: Sendable, Equatable, Codable {
  /// One kind of object and how many of it.
  public struct Entry: Sendable, Equatable, Codable {
    /// The class, e.g. `circle`.
    public var name: String
    /// The colour, or nil for any.
    public var color: String?
    /// How many, at least 1.
    public var count: Int

    /// Creates an entry.
    public init(name: String, color: String? = nil, count: Int = 1) {
      self.name = name
      self.color = color
      self.count = count
    }
    private enum CodingKeys: String, CodingKey {
      case name = "class"
      case color, count
    }
  }
  /// The objects, in the order the prompt names them.
  public var include: [Entry]
  /// Where the first entry is, seen from the second: `left of`, `right of`, `above` or `below`.
  public var relation: String?

  /// Creates a scene.
  public init(include: [Entry], relation: String? = nil) {
    self.include = include
    self.relation = relation
  }
}

/// A prompt with what rewards need to know of it.
public struct RewardPrompt: Sendable, Equatable {
  /// The prompt itself.
  public var text: String
  /// What the image must show, if the prompt file says so.
  public var scene: Scene?
  /// The category scores are averaged by, e.g. `color_attr`; empty if there is none.
  public var tag: String
  /// The whole JSON object of the prompt file, for rewards that hand it on; nil for a plain text.
  public var metadata: String?

  /// Creates a prompt.
  public init(text: String, scene: Scene? = nil, tag: String = "", metadata: String? = nil) {
    self.text = text
    self.scene = scene
    self.tag = tag
    self.metadata = metadata
  }

  /// Decodes one line of a `prompts.jsonl`: `prompt`, and optionally `tag`, `include` and `relation`.
  ///
  /// - Throws: ``RewardError/badPromptLine(line:reason:)``.
  public init(jsonLine: Data) throws(RewardError) {
    struct Line: Decodable {
      var prompt: String
      var tag: String?
      var include: [Scene.Entry]?
      var relation: String?
    }
    func bad(_ reason: String) -> RewardError {
      .badPromptLine(line: String(decoding: jsonLine, as: UTF8.self), reason: reason)
    }
    let line: Line
    do { line = try JSONDecoder().decode(Line.self, from: jsonLine) } catch { throw bad(Self.explain(error)) }
    guard line.relation == nil || line.include != nil else { throw bad("a relation needs an include list") }
    self.init(
      text: line.prompt, scene: line.include.map { Scene(include: $0, relation: line.relation) },
      tag: line.tag ?? "", metadata: String(decoding: jsonLine, as: UTF8.self))
    if let reason = scene?.flaw { throw bad(reason) }
  }

  private static func explain(_ error: any Error) -> String {
    switch error {
    case DecodingError.keyNotFound(let key, _): "no \(key.stringValue)"
    case DecodingError.typeMismatch(let type, let context),
      DecodingError.valueNotFound(let type, let context):
      "\(context.codingPath.last?.stringValue ?? "the line") is not of type \(type)"
    default: "not a JSON object"
    }
  }
}

extension Scene {
  /// Why no image can show this scene, or nil.
  var flaw: String? {
    if include.isEmpty { return "include is empty" }
    if let entry = include.first(where: { $0.count < 1 }) {
      return "\(entry.name) has count \(entry.count), not ≥ 1"
    }
    guard let relation else { return nil }
    guard Relation(rawValue: relation) != nil else {
      return
        "relation \"\(relation)\" is not one of \(Relation.allCases.map(\.rawValue).joined(separator: ", "))"
    }
    return include.count == 2 ? nil : "a relation needs two included classes, found \(include.count)"
  }
}

/// The relations GenEval knows.
enum Relation: String, CaseIterable {
  case leftOf = "left of"
  case rightOf = "right of"
  case above, below

  /// Whether the offset (`dx`, `dy`) of the first centre from the second, y downwards, is > 8 px this way and
  /// larger than across.
  func holds(dx: Double, dy: Double) -> Bool {
    let (along, across) =
      switch self {
      case .leftOf: (-dx, dy)
      case .rightOf: (dx, dy)
      case .above: (-dy, dx)
      case .below: (dy, dx)
      }
    return along > 8 && along > abs(across)
  }
}

/// Why a reward could not be made or asked.
public enum RewardError: Error, CustomStringConvertible, Sendable, Equatable {
  /// No reward of this name.
  case unknownReward(name: String, known: [String])
  /// A reward of this name is there already.
  case nameTaken(name: String)
  /// A key that the reward does not read.
  case foreignKey(reward: String, key: String, known: [String])
  /// A key that the reward cannot do without, and what to put there.
  case missingKey(reward: String, key: String, wanted: String)
  /// A key's value that is none.
  case badValue(reward: String, key: String, expected: String, got: String)
  /// The reward has no such score.
  case unknownScore(reward: String, score: String, known: [String])
  /// A line of a prompt file that is not a prompt.
  case badPromptLine(line: String, reason: String)
  /// A prompt that names no objects, given to a reward that counts them.
  case promptWithoutScene(prompt: String)
  /// A scene that no image can show.
  case badScene(prompt: String, reason: String)
  /// Images of another shape than `consumer` takes.
  case badImages(consumer: String, shape: [Int], expected: String)
  /// Not one prompt an image.
  case promptCount(images: Int, prompts: Int)
  /// Pixels that are infinite or NaN.
  case notFinite(images: Int, of: Int)
  /// Images that do not form groups of this size.
  case badGroups(images: Int, groupSize: Int)
  /// A file without the glyphs it should hold.
  case badSprites(path: String, reason: String)
  /// A data file that is in none of the folders.
  case assetNotFound(file: String, searched: [String])

  /// What, where, expected, got, and the way out.
  public var description: String {
    switch self {
    case .unknownReward(let name, let known):
      "rewards: no reward \"\(name)\"; known: \(known.joined(separator: ", "))"
    case .nameTaken(let name):
      "rewards: there is a reward \"\(name)\" already: register yours by another name"
    case .foreignKey(let reward, let key, let known):
      "rewards: \(reward) reads no \(key)"
        + (known.isEmpty ? "; drop it" : "; it reads \(known.joined(separator: ", "))")
    case .missingKey(let reward, let key, let wanted): "rewards: \(reward) needs \(key): \(wanted)"
    case .badValue(let reward, let key, let expected, let got):
      "rewards: \(reward) \(key): expected \(expected), got \(got)"
    case .unknownScore(let reward, let score, let known):
      known.isEmpty
        ? "rewards: \(reward) has no scores to choose from; drop score: \(score)"
        : "rewards: \(reward) has no score \"\(score)\"; known: \(known.joined(separator: ", "))"
    case .badPromptLine(let line, let reason): "prompt line \(line): \(reason)"
    case .promptWithoutScene(let prompt):
      "scenes: prompt \"\(prompt)\" has no include list to check images by; add one or drop this reward"
    case .badScene(let prompt, let reason): "scenes: prompt \"\(prompt)\": \(reason)"
    case .badImages(let consumer, let shape, let expected):
      "\(consumer): images are \(shape), expected \(expected)"
    case .promptCount(let images, let prompts):
      "\(images) images but \(prompts) prompts: pass one prompt an image"
    case .notFinite(let images, let total):
      "guards: \(images) of \(total) images hold infinities or NaN; drop them or stop the run"
    case .badGroups(let images, let size):
      "guards: \(images) images are not groups of \(size); the size must be ≥ 2 and divide their number"
    case .badSprites(let path, let reason): "\(path): \(reason)"
    case .assetNotFound(let file, let searched):
      "\(file) not found; looked in \(searched.joined(separator: ", ")); set CHUNKGRPO_DATA to its folder"
    }
  }
}

/// Whether each image [C, H, W] of [B, C, H, W] holds finite numbers only.
func finiteImages(_ images: Tensor) throws -> [Bool] {
  images.count == 0
    ? [] : try images.isFinite().to(.uint8).amin([1, 2, 3]).array(of: UInt8.self).map { $0 == 1 }
}

/// Throws unless `images` is [B, 3, H, W] with B prompts (nil: any B).
///
/// - Parameter consumer: whose name the error carries, e.g. a reward's.
public func checkImages(_ images: Tensor, for consumer: String, prompts: Int?) throws(RewardError) {
  let shape = images.shape
  guard shape.count == 4, shape[1] == 3, shape[2] > 0, shape[3] > 0 else {
    throw .badImages(consumer: consumer, shape: shape, expected: "[B, 3, H, W]")
  }
  if let prompts, prompts != shape[0] { throw .promptCount(images: shape[0], prompts: prompts) }
}
