import Foundation
import Torch

/// The glyphs that scenes are made of, at every size, as ink: 1 − colour on a white canvas, so white is 0.
struct SpriteSheet: Sendable {
  /// Names as in the file, e.g. `red circle` or `cat`.
  let objects: [String]
  /// Side lengths in pixels, ascending.
  let sizes: [Int]
  /// For each size, [objects, 3, size, size] row-major.
  let ink: [[Float]]

  /// Reads `rgba_<size>` (uint8, premultiplied, [objects, size, size, 4]) and the metadata's `objects`.
  init(_ url: URL) throws {
    let file = try SafetensorsFile(url)
    func bad(_ reason: String) -> RewardError { .badSprites(path: url.path, reason: reason) }
    guard let names = file.metadata["objects"],
      let objects = try? JSONDecoder().decode([String].self, from: Data(names.utf8)), !objects.isEmpty
    else { throw bad("metadata objects is not a list of names") }
    let sizes = file.names.compactMap { $0.hasPrefix("rgba_") ? Int($0.dropFirst(5)) : nil }.sorted()
    guard !sizes.isEmpty else { throw bad("no rgba_<size> tensor; is this sprites.safetensors?") }
    self.objects = objects
    self.sizes = sizes
    ink = try sizes.map { size in
      let rgba = try file.require("rgba_\(size)")
      guard rgba.dtype == .uint8, rgba.shape == [objects.count, size, size, 4] else {
        throw bad("rgba_\(size) is \(rgba), expected uint8[\(objects.count), \(size), \(size), 4]")
      }
      // On white a premultiplied pixel is rgb + (1 − α), so its ink is α − rgb.
      let planes = try rgba.to(.float32).permute(0, 3, 1, 2)
      return try ((planes.narrow(1, 3, 1) - planes.narrow(1, 0, 3)) / 255).floats()
    }
  }

  /// The prompt's scene, if it has one that the glyphs can show.
  func scene(of prompt: RewardPrompt) throws(RewardError) -> Scene {
    guard let scene = prompt.scene else { throw .promptWithoutScene(prompt: prompt.text) }
    if let flaw = scene.flaw { throw .badScene(prompt: prompt.text, reason: flaw) }
    let classes = Set(objects.map(Self.className))
    for entry in scene.include {
      let wanted = entry.color.map { "\($0) \(entry.name)" } ?? entry.name
      if entry.color == nil ? classes.contains(wanted[...]) : objects.contains(wanted) { continue }
      let known = objects.joined(separator: ", ")
      throw .badScene(prompt: prompt.text, reason: "no glyph shows a \(wanted); known: \(known)")
    }
    return scene
  }

  /// The last word of an object's name.
  static func className(_ object: String) -> Substring { object.split(separator: " ").last ?? "" }
  /// The first word of an object's name if it has two.
  static func color(_ object: String) -> String? {
    let words = object.split(separator: " ")
    return words.count > 1 ? String(words[0]) : nil
  }
}
