import Foundation
import Testing

@testable import Pictures

/// A ramp in each channel: what JPEG stores well.
private func ramps(width: Int, height: Int) -> Image {
  var image = Image(width: width, height: height)
  for y in 0..<height {
    for x in 0..<width {
      let at = 3 * (y * width + x)
      image.pixels[at] = UInt8(x * 255 / max(1, width - 1))
      image.pixels[at + 1] = UInt8(y * 255 / max(1, height - 1))
      image.pixels[at + 2] = UInt8((x + y) * 255 / max(1, width + height - 2))
    }
  }
  return image
}

/// Peak signal to noise ratio, dB.
private func psnr(_ a: Image, _ b: Image) -> Double {
  let squares = zip(a.pixels, b.pixels).reduce(0.0) { $0 + pow(Double($1.0) - Double($1.1), 2) }
  return 10 * log10(255 * 255 * Double(a.pixels.count) / max(squares, 1e-9))
}

@Suite("JPEG")
struct JPEGTests {
  /// Oracle: the picture. A ramp loses little at quality 95: about a level, 45 dB.
  @Test("round trip", arguments: [(1, 1), (2, 3), (67, 41), (256, 16), (33, 300)])
  func roundTrip(width: Int, height: Int) throws {
    let image = ramps(width: width, height: height)
    let best = try Image(jpeg: image.jpeg(quality: 100))
    #expect(best.width == width && best.height == height)
    // Colour is stored at half resolution, which tiny pictures feel.
    #expect(psnr(image, best) > (width < 10 ? 12 : 40))
    if width > 10 {
      let coarse = try Image(jpeg: image.jpeg(quality: 20))
      #expect(psnr(image, coarse) > 25 && psnr(image, coarse) < psnr(image, best))
    }
  }

  @Test("channels keep their places")
  func channels() throws {
    for (red, green, blue) in [(200, 30, 40), (30, 200, 40), (30, 40, 200)] as [(UInt8, UInt8, UInt8)] {
      let read = try Image(
        jpeg: Image(width: 20, height: 20, red: red, green: green, blue: blue).jpeg(quality: 95))
      for (a, b) in zip(read[7, 9], [red, green, blue]) { #expect(abs(Int(a) - Int(b)) <= 2) }
    }
  }

  /// Oracle: bytes that Pillow 13.0.0 (libjpeg-turbo 3.2.0) writes for the same pixels with its defaults.
  @Test(
    "files are as large as Pillow's",
    arguments: [
      ("pattern", 67, 41, [1299, 2477, 3964]), ("pattern", 128, 96, [2723, 6993, 12259]),
      ("ramps", 67, 41, [782, 963, 1294]), ("ramps", 128, 96, [1055, 1579, 2481]),
    ])
  func sizes(name: String, width: Int, height: Int, sizes: [Int]) throws {
    let image = name == "ramps" ? ramps(width: width, height: height) : pattern(width: width, height: height)
    let own = try [20, 80, 95].map { try image.jpeg(quality: $0).count }
    // Other versions of the library may round a coefficient differently.
    for (a, b) in zip(own, sizes) { #expect(abs(a - b) <= b / 100, "\(own) \(sizes)") }
  }

  /// Oracle: Pillow, where python3 has it.
  @Test("Pillow reads the same pixels")
  func pillow() throws {
    try withFolder { folder in
      let file = folder.appending(path: "a.jpg"), image = ramps(width: 50, height: 40)
      try image.jpeg(quality: 90).write(to: file)
      let process = Process(), pipe = Pipe()
      process.executableURL = URL(filePath: "/usr/bin/env")
      process.arguments = [
        "python3", "-c",
        "import sys\ntry:\n from PIL import Image\nexcept ImportError: sys.exit(77)\n"
          + "sys.stdout.buffer.write(Image.open(sys.argv[1]).convert('RGB').tobytes())", file.path,
      ]
      process.standardOutput = pipe
      try process.run()
      let data = pipe.fileHandleForReading.readDataToEndOfFile()
      process.waitUntilExit()
      guard process.terminationStatus != 77 else { return }  // no Pillow here; sizes() has its numbers
      let own = try Image(file: file)
      #expect(process.terminationStatus == 0 && data.count == own.pixels.count)
      // Inverse transforms and upsampling of two libraries: a few levels at most.
      #expect(zip(own.pixels, data).allSatisfy { abs(Int($0) - Int($1)) <= 4 })
    }
  }

  @Test("files cut short, and others, are refused")
  func damaged() throws {
    let data = try ramps(width: 60, height: 60).jpeg(quality: 90)
    for count in [2, 20, 300, data.count / 2, data.count - 30] {
      #expect(throws: PictureError.self) { try Image(jpeg: data.prefix(count)) }
    }
    #expect(throws: PictureError.self) { try Image(jpeg: Data()) }
    #expect(throws: PictureError.self) { try Image(jpeg: Data("no picture".utf8)) }
    try withFolder { folder in
      let file = folder.appending(path: "half.jpg")
      try data.prefix(data.count / 2).write(to: file)
      let error = #expect(throws: PictureError.self) { try Image(file: file) }
      #expect("\(try #require(error))".contains(file.path))
      #expect(throws: PictureError.file(path: "/no/a.jpg", reason: "no such file, or not readable")) {
        try Image(file: URL(filePath: "/no/a.jpg"))
      }
    }
  }

  @Test("qualities and sizes that are none are refused", arguments: [0, -1, 101])
  func quality(value: Int) {
    #expect(throws: PictureError.invalid("JPEG quality \(value): expected 1 to 100")) {
      try Image(width: 4, height: 4).jpeg(quality: value)
    }
    var image = Image(width: 4, height: 4)
    image.pixels.removeLast()
    #expect(throws: PictureError.self) { try image.jpeg(quality: 90) }
  }

  @Test("a file is told apart by its first bytes, not by its name")
  func anyFile() throws {
    try withFolder { folder in
      let image = ramps(width: 20, height: 10)
      let (png, jpeg) = (folder.appending(path: "a.jpg"), folder.appending(path: "b.png"))
      try image.write(png: png)
      try image.jpeg(quality: 95).write(to: jpeg)
      #expect(try Image(file: png) == image)
      #expect(try Image(file: jpeg) == Image(jpeg: Data(contentsOf: jpeg)))
    }
  }
}

@Suite("enlarging")
struct EnlargeTests {
  /// Oracle: a constant stays, and a ramp stays one away from its ends, where the filter has no neighbours.
  @Test("constants and ramps", arguments: [1, 2, 5])
  func constants(factor: Int) throws {
    let plain = Image(width: 7, height: 5, red: 10, green: 128, blue: 250)
    let large = try plain.enlarged(factor)
    #expect(large == Image(width: 7 * factor, height: 5 * factor, red: 10, green: 128, blue: 250))
    var ramp = Image(width: 16, height: 4)
    for i in ramp.pixels.indices { ramp.pixels[i] = UInt8(i / 3 % 16 * 16) }
    let wide = try ramp.enlarged(factor)
    for x in (3 * factor)..<(13 * factor) {
      let expected = 16 * ((Double(x) + 0.5) / Double(factor) - 0.5)
      // Interpolation keeps ramps; cairo rounds its weights.
      #expect(abs(Double(wide[x, 2 * factor][1]) - expected) <= 1)
    }
  }
}
