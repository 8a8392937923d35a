import Foundation
import Testing

@testable import Pictures

/// A folder of its own for each test, removed at the end.
func withFolder(_ body: (URL) throws -> Void) throws {
  let folder = FileManager.default.temporaryDirectory.appending(path: "pictures-\(UUID().uuidString)")
  try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
  defer { try? FileManager.default.removeItem(at: folder) }
  try body(folder)
}

func expect(_ folder: URL, holds names: [String], _ location: SourceLocation = #_sourceLocation) throws {
  let found = try FileManager.default.contentsOfDirectory(atPath: folder.path).sorted()
  #expect(found == names, sourceLocation: location)
}

/// Every pixel differs from its neighbours in all channels, so that a shift or a swap shows.
func pattern(width: Int, height: Int, seed: Int = 0) -> Image {
  var image = Image(width: width, height: height)
  for index in image.pixels.indices {
    image.pixels[index] = UInt8((index * 37 + index / 7 + seed * 91) % 256)
  }
  return image
}

extension Image {
  /// R, G, B at a place.
  subscript(_ x: Int, _ y: Int) -> [UInt8] {
    Array(pixels[(3 * (y * width + x))..<(3 * (y * width + x) + 3)])
  }
}

@Suite("Image")
struct ImageTests {
  @Test("PNG round trip is exact", arguments: [(1, 1), (2, 3), (67, 41), (256, 1)])
  func roundTrip(width: Int, height: Int) throws {
    try withFolder { folder in
      let file = folder.appending(path: "picture.png"), image = pattern(width: width, height: height)
      try image.write(png: file)
      #expect(try Image(png: file) == image)
      try Image(width: 3, height: 2).write(png: file)  // replaces the older one
      #expect(try Image(png: file) == Image(width: 3, height: 2))
      try expect(folder, holds: ["picture.png"])
    }
  }

  // Oracle: PNGs encoded by Pillow 13.0.0 from the pixels given here.
  @Test(
    "PNGs of another encoder: RGB, RGBA over white, grey",
    arguments: [
      (
        "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGP4z8DA0PCfgZGJ+d/fPwAfhQV8386SfgAAAABJRU5E"
          + "rkJggg==", 2, [255, 0, 0, 0, 128, 255, 1, 2, 3, 254, 253, 252]
      ),
      (
        "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAYAAAD0In+KAAAAEUlEQVR4nGPkEpH7H+nvyggACXkCKwQ2vTsAAAAASUVORK5CYII=",
        2, [10, 20, 30, 255, 255, 255]
      ),
      (
        "iVBORw0KGgoAAAANSUhEUgAAAAMAAAABCAAAAAA+i0toAAAADElEQVR4nGNg8P0PAAGdAU2K0fFtAAAAAElFTkSuQmCC", 3,
        [0, 0, 0, 77, 77, 77, 255, 255, 255]
      ),
    ] as [(String, Int, [UInt8])])
  func foreign(base64: String, width: Int, pixels: [UInt8]) throws {
    try withFolder { folder in
      let file = folder.appending(path: "foreign.png")
      try #require(Data(base64Encoded: base64)).write(to: file)
      let image = try Image(png: file)
      #expect(image.width == width && image.pixels == pixels)
    }
  }

  @Test("planes are interleaved, clamped and rounded; NaN is black")
  func planar() throws {
    // Two pixels: R 0.5 and −1, G 2 and NaN, B +∞ and 1/255. 0.5·255 = 127.5 rounds up.
    let image = try Image(planar: [0.5, -1, 2, .nan, .infinity, 1 / 255], width: 2, height: 1)
    #expect(image.pixels == [128, 255, 255, 0, 0, 1])
    #expect(try Image(planar: [-.infinity, -.nan, -0.0], width: 1, height: 1).pixels == [0, 0, 0])
    let levels = (0...255).map { Float($0) / 255 }
    let ramp = try Image(planar: levels + levels + levels, width: 256, height: 1)
    #expect(ramp.pixels == (0...255).flatMap { [UInt8($0), UInt8($0), UInt8($0)] })
  }

  @Test("a count that does not match the size is refused", arguments: [(2, 2), (0, 4), (-1, -4), (1, 5)])
  func wrongCount(width: Int, height: Int) {
    let error = #expect(throws: PictureError.self) {
      try Image(planar: [Float](repeating: 0, count: 13), width: width, height: height)
    }
    #expect(error?.description.contains("13 values for an RGB picture of \(width)×\(height)") == true)
  }

  @Test("pixels of another count, or a side over cairo's limit, are refused when written")
  func unwritable() throws {
    try withFolder { folder in
      var image = Image(width: 2, height: 2)
      image.pixels.removeLast()
      let file = folder.appending(path: "a.png")
      #expect(throws: PictureError.invalid("11 bytes for an RGB picture of 2×2: need 3·width·height")) {
        try image.write(png: file)
      }
      #expect(throws: PictureError.self) { try Image(width: 32768, height: 1).write(png: file) }
      try expect(folder, holds: [])
    }
  }

  @Test("an unwritable path names itself and leaves nothing behind")
  func noFolder() throws {
    try withFolder { folder in
      let missing = folder.appending(path: "nowhere/picture.png")
      let error = #expect(throws: PictureError.self) { try Image(width: 1, height: 1).write(png: missing) }
      guard case .file(let path, let reason) = error else {
        Issue.record("expected .file, got \(String(describing: error))")
        return
      }
      #expect(path == missing.path && reason.contains("No such file"))

      // A folder where the file should be: the temporary file is written, the rename fails.
      let occupied = folder.appending(path: "occupied.png")
      try FileManager.default.createDirectory(at: occupied, withIntermediateDirectories: true)
      #expect(throws: PictureError.self) { try Image(width: 1, height: 1).write(png: occupied) }
      try expect(folder, holds: ["occupied.png"])
    }
  }

  @Test("files that are missing, empty, cut short or no PNG are refused")
  func unreadable() throws {
    try withFolder { folder in
      let file = folder.appending(path: "picture.png")
      #expect(throws: PictureError.file(path: file.path, reason: "no such file, or not readable")) {
        try Image(png: file)
      }
      let whole = try pattern(width: 40, height: 40).png()
      for content in [Data(), Data("GIF89a".utf8), whole.prefix(8), whole.prefix(60), whole.dropFirst()] {
        try content.write(to: file)
        let error = #expect(throws: PictureError.self) { try Image(png: file) }
        guard case .notAPNG(let path, let status) = error else {
          Issue.record("expected .notAPNG, got \(String(describing: error))")
          continue
        }
        #expect(path == file.path && !status.isEmpty)
      }
    }
  }
}
