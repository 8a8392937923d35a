import Foundation
import Torch

/// The exact verifier of the built-in scenes: GenEval in miniature, by template matching instead of a
/// detector.
///
/// A template is a glyph on white with a 1-px white margin. At every position the mean squared colour
/// difference over the template's box is compared; positions below 0.03 are detections, best first, each
/// suppressing those with centres nearer than 14 px in both x and y. Scores: see ``score(_:against:)``.
public final class ScenesVerifier: LocalReward {
  /// Which of the two scores is the reward's value; both are among the parts.
  public enum Score: String, Sendable, CaseIterable { case graded, strict }

  /// An object found in an image.
  public struct Detection: Sendable, Equatable, Codable {
    /// The glyph: class as last word, colour, where it has one, as first.
    public var name: String
    /// Mean squared colour difference to the glyph over its box, ≥ 0.
    public var error: Double
    /// Centre in pixels from the left edge.
    public var x: Double
    /// Centre in pixels from the top edge.
    public var y: Double
    /// Side length in pixels.
    public var size: Int

    /// Creates a detection.
    public init(name: String, error: Double, x: Double, y: Double, size: Int) {
      (self.name, self.error, self.x, self.y, self.size) = (name, error, x, y, size)
    }
  }

  /// Side length of the images it scores.
  public static let side = 64
  static let threshold: Float = 0.03
  static let suppression = 14

  /// `scenes`.
  public let name = "scenes"
  private let score: Score
  let sprites: SpriteSheet
  let templates: TemplateSpectra

  /// Loads the glyphs from `sprites.safetensors` and transforms them once.
  public init(sprites url: URL, score: Score = .graded) throws {
    sprites = try SpriteSheet(url)
    templates = try TemplateSpectra(sprites, side: Self.side)
    self.score = score
  }

  /// Every prompt must name objects that the glyphs show.
  public func check(_ prompts: [RewardPrompt]) throws {
    for prompt in prompts { _ = try sprites.scene(of: prompt) }
  }
  /// A scene of the built-in task.
  public var probe: RewardProbe { .scene }

  /// Scores as ``Reward/score(_:prompts:)`` says, of images [B, 3, 64, 64].
  ///
  /// - Throws: ``RewardError/promptWithoutScene(prompt:)`` and ``RewardError/badScene(prompt:reason:)``,
  ///   naming the prompt.
  public func scores(_ images: Tensor, prompts: [RewardPrompt]) throws -> [RewardScore] {
    try checkImages(images, for: name, prompts: prompts.count)
    let scenes = try prompts.map(sprites.scene)
    return try zip(zip(detections(images), finiteImages(images)), scenes).map { found, scene in
      guard found.1 else { return RewardScore(value: nil) }
      let (strict, graded) = try Self.score(found.0, against: scene)
      return RewardScore(
        value: score == .strict ? strict : graded,
        parts: ["strict": strict, "graded": graded, "detections": Double(found.0.count)])
    }
  }

  /// Scores what was found in an image.
  ///
  /// `found` is best first; a relation is between the best of either entry. *strict* is 1 if every entry is
  /// found exactly `count` times, nothing else is, and the relation holds. *graded* is the mean of max(0, 1 −
  /// |found − count|/count) for every entry, again ignoring colour for every entry with one, the relation (0
  /// or 1) where there is one, and the same of all found against all wanted.
  /// - Throws: ``RewardError/badScene(prompt:reason:)`` for a scene that no image can show.
  public static func score(
    _ found: [Detection], against scene: Scene
  ) throws(RewardError) -> (strict: Double, graded: Double) {
    if let flaw = scene.flaw { throw .badScene(prompt: "\(scene.include.map(\.name))", reason: flaw) }
    func closeness(_ found: Int, _ wanted: Int) -> Double {
      max(0, 1 - Double(abs(found - wanted)) / Double(wanted))
    }
    let wanted = scene.include.reduce(0) { $0 + $1.count }
    var exact = found.count == wanted
    var terms: [Double] = []
    var firsts: [Detection?] = []
    for entry in scene.include {
      let sameClass = found.filter { SpriteSheet.className($0.name) == entry.name }
      let matching = sameClass.filter { entry.color == nil || SpriteSheet.color($0.name) == entry.color }
      exact = exact && matching.count == entry.count
      firsts.append(matching.first)
      terms.append(closeness(matching.count, entry.count))
      if entry.color != nil { terms.append(closeness(sameClass.count, entry.count)) }
    }
    if let relation = scene.relation.flatMap(Relation.init) {
      let holds =
        firsts[0].flatMap { a in firsts[1].map { b in relation.holds(dx: a.x - b.x, dy: a.y - b.y) } }
        ?? false
      exact = exact && holds
      terms.append(holds ? 1 : 0)
    }
    terms.append(closeness(found.count, wanted))
    return (exact ? 1 : 0, terms.reduce(0, +) / Double(terms.count))
  }

  /// The objects in each of `images` [B, 3, 64, 64], best first; none where pixels are not finite.
  ///
  /// Images are transformed one by one: the spectra and maps of one, 5.4 MB, stay near the cache, those of
  /// eight take three times as long an image.
  public func detections(_ images: Tensor) throws -> [[Detection]] { try detections(images, block: 1) }

  /// The same, `block` images a transform.
  func detections(_ images: Tensor, block: Int) throws -> [[Detection]] {
    try checkImages(images, for: name, prompts: nil)
    guard Array(images.shape[2...]) == [Self.side, Self.side] else {
      throw RewardError.badImages(
        consumer: name, shape: images.shape, expected: "[B, 3, \(Self.side), \(Self.side)]")
    }
    return try withoutGrad {
      let ink = try images.to(.cpu).to(.float32) * -1 + 1
      let total = ink.size(0)
      var result: [[Detection]] = []
      for start in stride(from: 0, to: total, by: block) {
        let part = try ink[start..<min(start + block, total)]
        let maps = try templates.smallestDifferences(part).floats()
        let pixels = try part.floats()
        let count = part.size(0)
        for image in 0..<count {
          let kept = Self.keepBest(candidates(maps, image: image, of: count))
          result.append(kept.map { identify($0, in: pixels, image: image) })
        }
      }
      return result
    }
  }

  /// A position where the best glyph of one size differs by less than the threshold.
  struct Candidate: Equatable {
    var error: Float
    /// Index into the sizes.
    var size: Int
    /// The glyph's left and top edges.
    var left, top: Int
    /// Its centre.
    var x, y: Int
  }

  /// Positions below the threshold, of maps [sizes, B, 64, 64].
  private func candidates(_ maps: [Float], image: Int, of count: Int) -> [Candidate] {
    let side = Self.side
    var result: [Candidate] = []
    maps.withUnsafeBufferPointer { maps in
      for (index, size) in sprites.sizes.enumerated() {
        for top in 0...side - size {
          let row = ((index * count + image) * side + top) * side
          for left in 0...side - size where maps[row + left] < Self.threshold {
            result.append(
              Candidate(
                error: maps[row + left], size: index, left: left, top: top, x: left + size / 2,
                y: top + size / 2))
          }
        }
      }
    }
    return result
  }

  /// In order of error, the candidates that are not near a better one that was kept.
  static func keepBest(_ candidates: [Candidate]) -> [Candidate] {
    var kept: [Candidate] = []
    // Equal errors in order of size, row and column, so that the result is one and the same on every run.
    for c in candidates.sorted(by: {
      ($0.error, $0.size, $0.top, $0.left) < ($1.error, $1.size, $1.top, $1.left)
    })
    where !kept.contains(where: { abs($0.x - c.x) < suppression && abs($0.y - c.y) < suppression }
    ) {
      kept.append(c)
    }
    return kept
  }

  /// The glyph that is nearest at a candidate, and the difference, by its definition and in float64.
  private func identify(_ c: Candidate, in pixels: [Float], image: Int) -> Detection {
    let (side, size) = (Self.side, sprites.sizes[c.size])
    var best = (object: 0, sum: Double.infinity)
    var margin = 0.0
    pixels.withUnsafeBufferPointer { pixels in
      sprites.ink[c.size].withUnsafeBufferPointer { ink in
        for object in sprites.objects.indices {
          var sum = 0.0
          for line in 0..<3 * size where sum < best.sum {
            let (channel, y) = (line / size, line % size)
            let from = ((image * 3 + channel) * side + c.top + y) * side + c.left
            let glyph = (object * 3 * size + line) * size
            for x in 0..<size {
              let d = Double(pixels[from + x] - ink[glyph + x])
              sum += d * d
            }
          }
          if sum < best.sum { best = (object, sum) }
        }
        // The white margin, where it lies inside the image: outside, the canvas is as white as the template.
        for channel in 0..<3 {
          for y in max(0, c.top - 1)...min(side - 1, c.top + size) {
            let from = ((image * 3 + channel) * side + y) * side
            let inside = y >= c.top && y < c.top + size
            for x in max(0, c.left - 1)...min(side - 1, c.left + size)
            where !(inside && x >= c.left && x < c.left + size) {
              margin += Double(pixels[from + x] * pixels[from + x])
            }
          }
        }
      }
    }
    return Detection(
      name: sprites.objects[best.object], error: (best.sum + margin) / Double(3 * (size + 2) * (size + 2)),
      x: Double(c.x), y: Double(c.y), size: size)
  }
}
