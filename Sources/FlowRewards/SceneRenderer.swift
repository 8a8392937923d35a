import ChunkGRPO
import Foundation
import Torch

/// Draws the built-in scenes that ``ScenesVerifier`` checks: what a base model is pretrained on.
///
/// White canvas of 64 × 64 pixels; every object has a size of its own, 20 to 28 px, and stays 1 px inside. A class
/// without colour gets one, the same for all objects of the entry. One object: centre 32 ± 14 along both axes. Two: side by side or one above the other,
/// centres 16 ± 2 and 48 ± 2 along that axis and 32 ± 9 across; a relation says which, else chance does. Three or four:
/// cells of a 2 × 2 grid, centres 16 and 48 ± 2.5, sizes up to 26.
public struct SceneRenderer: Sendable {
  /// Pixels of a side.
  public static let side = ScenesVerifier.side
  /// How often scenes of a category are drawn for training, relative to each other; others count 1.
  public static let categoryWeights: [String: Double] = [
    "single_object": 1, "two_object": 2, "counting": 2, "colors": 1, "position": 3, "color_attr": 3,
  ]
  /// Most objects of a scene.
  public static let most = 4

  private let sprites: SpriteSheet

  /// Loads the glyphs of `sprites.safetensors`.
  public init(sprites url: URL) throws { sprites = try SpriteSheet(url) }

  /// One object's place.
  private struct Placement {
    var glyph: Int
    var size: Int
    var x, y: Double
  }

  /// One image a prompt.
  ///
  /// - Parameters:
  ///   - prompts: B prompts, each with a scene.
  ///   - streams: one a prompt; an image is a function of its prompt and its stream alone.
  /// - Returns: [B, 3, 64, 64], float32 in 0 … 1.
  /// - Throws: ``RewardError/promptWithoutScene(prompt:)`` and ``RewardError/badScene(prompt:reason:)``.
  public func render(
    _ prompts: [RewardPrompt], using streams: [some RandomNumberGenerator]
  ) throws -> Tensor {
    let plane = Self.side * Self.side
    var pixels = [Float](repeating: 1, count: prompts.count * 3 * plane)
    for (i, (prompt, stream)) in zip(prompts, streams).enumerated() {
      var stream = stream
      for object in try place(try requireDrawable(prompt), using: &stream) {
        let (side, size) = (Self.side, sprites.sizes[object.size])
        func start(_ centre: Double) -> Int {
          min(max(Int((centre - Double(size) / 2).rounded()), 1), side - 1 - size)
        }
        let (left, top) = (start(object.x), start(object.y))
        for line in 0..<3 * size {
          let to = i * 3 * plane + line / size * plane + (top + line % size) * side + left
          let from = (object.glyph * 3 * size + line) * size
          for x in 0..<size { pixels[to + x] = 1 - sprites.ink[object.size][from + x] }
        }
      }
    }
    return try Tensor(pixels, shape: [prompts.count, 3, Self.side, Self.side])
  }

  /// The scene of a prompt that can be drawn.
  ///
  /// - Throws: as ``render(_:using:)``.
  @discardableResult
  public func requireDrawable(_ prompt: RewardPrompt) throws(RewardError) -> Scene {
    let scene = try sprites.scene(of: prompt)
    let count = scene.include.reduce(0) { $0 + $1.count }
    guard count <= Self.most, scene.relation == nil || count == 2 else {
      throw .badScene(
        prompt: prompt.text,
        reason: count > Self.most
          ? "\(count) objects do not fit, at most \(Self.most) do"
          : "a relation between \(count) objects cannot be drawn, only one between two")
    }
    return scene
  }

  private func place(_ scene: Scene, using g: inout some RandomNumberGenerator) throws -> [Placement] {
    /// Uniform in `centre` ± `spread`.
    func near(_ centre: Double, _ spread: Double) -> Double { centre + spread * (2 * g.uniform() - 1) }
    var glyphs: [Int] = []
    for entry in scene.include {
      let fitting = sprites.objects.indices.filter { i in
        SpriteSheet.className(sprites.objects[i]) == entry.name
          && (entry.color == nil || SpriteSheet.color(sprites.objects[i]) == entry.color)
      }
      glyphs += [Int](repeating: fitting[g.index(below: fitting.count)], count: entry.count)
    }
    let sizes = sprites.sizes.indices.filter { glyphs.count < 3 || sprites.sizes[$0] <= 26 }
    var objects = glyphs.map {
      Placement(glyph: $0, size: sizes[g.index(below: sizes.count)], x: 0, y: 0)
    }
    switch objects.count {
    case 1: (objects[0].x, objects[0].y) = (near(32, 14), near(32, 14))
    case 2:
      let relation = scene.relation.flatMap(Relation.init) ?? Relation.allCases[g.index(below: 4)]
      let isFirst = relation == .leftOf || relation == .above
      for i in 0..<2 {
        let (along, across) = (near((i == 0) == isFirst ? 16 : 48, 2), near(32, 9))
        let stacked = relation == .above || relation == .below
        (objects[i].x, objects[i].y) = stacked ? (across, along) : (along, across)
      }
    default:
      var cells = Array(0..<4)
      for i in objects.indices {
        let cell = cells.remove(at: g.index(below: cells.count))
        (objects[i].x, objects[i].y) = (
          near(cell % 2 == 0 ? 16 : 48, 2.5), near(cell / 2 == 0 ? 16 : 48, 2.5)
        )
      }
    }
    return objects
  }
}
