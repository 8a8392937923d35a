import CCairo
import Foundation

/// An opaque 8-bit RGB picture.
public struct Image: Sendable, Equatable {
  /// Size in pixels.
  public let width, height: Int
  /// R, G, B of each pixel, rows from the top: [height, width, 3].
  public var pixels: [UInt8]

  /// A picture of one colour.
  ///
  /// - Precondition: the size is positive.
  public init(width: Int, height: Int, red: UInt8 = 255, green: UInt8 = 255, blue: UInt8 = 255) {
    precondition(width > 0 && height > 0, "Image: size \(width)×\(height), need at least 1×1")
    self.init(width: width, height: height) { pixels in
      for index in pixels.indices { pixels[index] = index % 3 == 0 ? red : index % 3 == 1 ? green : blue }
    }
  }

  /// `body` writes all 3·width·height bytes.
  init(width: Int, height: Int, body: (_ pixels: UnsafeMutableBufferPointer<UInt8>) -> Void) {
    (self.width, self.height) = (width, height)
    pixels = [UInt8](unsafeUninitializedCapacity: 3 * width * height) { buffer, count in
      count = 3 * width * height
      body(UnsafeMutableBufferPointer(rebasing: buffer[..<count]))
    }
  }

  /// Takes channel planes, as a decoded tensor has them.
  ///
  /// - Parameter planar: [3, height, width], 0…1; values outside are clamped, NaN becomes 0 (black), and the
  ///   rest is rounded to the nearest of 256 levels, halves up.
  /// - Throws: ``PictureError/invalid(_:)`` when the count is not 3·height·width or the size is not positive.
  public init(planar: [Float], width: Int, height: Int) throws(PictureError) {
    guard width > 0, height > 0, planar.count == 3 * width * height else {
      throw .invalid("\(planar.count) values for an RGB picture of \(width)×\(height): need 3·width·height")
    }
    let count = width * height
    self.init(width: width, height: height) { pixels in
      for pixel in 0..<count {
        for channel in 0..<3 {
          let value = planar[channel * count + pixel]
          // NaN fails the first comparison; the limits keep infinities out of the conversion.
          pixels[3 * pixel + channel] = value > 0 ? UInt8((min(value, 1) * 255).rounded()) : 0
        }
      }
    }
  }

  /// Reads a PNG; transparent parts are shown over white.
  ///
  /// - Throws: ``PictureError/file(path:reason:)`` or ``PictureError/notAPNG(path:status:)``.
  public init(png file: URL) throws(PictureError) {
    guard let data = FileManager.default.contents(atPath: file.path) else {
      throw .file(path: file.path, reason: "no such file, or not readable")
    }
    var rest = data[...]
    let decoded = withUnsafeMutablePointer(to: &rest) { rest in
      cairo_image_surface_create_from_png_stream(
        { closure, out, count in
          let rest = closure!.assumingMemoryBound(to: Data.self)
          guard rest.pointee.count >= Int(count) else { return CAIRO_STATUS_READ_ERROR }
          rest.pointee.copyBytes(to: out!, count: Int(count))
          rest.pointee = rest.pointee.dropFirst(Int(count))
          return CAIRO_STATUS_SUCCESS
        }, rest)
    }
    defer { cairo_surface_destroy(decoded) }
    let status = cairo_surface_status(decoded)
    guard status == CAIRO_STATUS_SUCCESS else {
      throw .notAPNG(path: file.path, status: String(cString: cairo_status_to_string(status)))
    }
    // Painting onto an opaque surface turns every format that cairo decodes to into one.
    let canvas = try Canvas(
      width: Int(cairo_image_surface_get_width(decoded)), height: Int(cairo_image_surface_get_height(decoded))
    )
    cairo_set_source_surface(canvas.context, decoded, 0, 0)
    cairo_paint(canvas.context)
    self = try canvas.image()
  }

  /// ``pixels`` can be set to anything; what is drawn or written has to match the size.
  func validate() throws(PictureError) {
    guard pixels.count == 3 * width * height else {
      throw .invalid("\(pixels.count) bytes for an RGB picture of \(width)×\(height): need 3·width·height")
    }
  }

  /// The picture as a PNG file's bytes.
  ///
  /// - Throws: ``PictureError/invalid(_:)`` when ``pixels`` does not match the size or a side is over 32767.
  public func png() throws(PictureError) -> Data {
    try Canvas(self).png()
  }

  /// Writes a PNG; the file appears whole or not at all, and replaces an older one.
  ///
  /// - Throws: ``PictureError/file(path:reason:)`` and leaves nothing behind.
  public func write(png file: URL) throws(PictureError) {
    try png().writeAtomically(to: file)
  }

  /// Copies `image`, each of its pixels `scale`×`scale` large, to the given top-left corner.
  mutating func place(_ image: Image, x: Int, y: Int, scale: Int) {
    for row in 0..<(image.height * scale) {
      for column in 0..<(image.width * scale) {
        let from = 3 * (row / scale * image.width + column / scale)
        let to = 3 * ((y + row) * width + x + column)
        for channel in 0..<3 { pixels[to + channel] = image.pixels[from + channel] }
      }
    }
  }
}

extension Data {
  /// Writes to a temporary file in the same folder, then renames it.
  func writeAtomically(to file: URL) throws(PictureError) {
    let temporary = file.deletingLastPathComponent()
      .appendingPathComponent(".\(UUID().uuidString).tmp").path
    // stdio, because it keeps the system's reason in errno.
    func attempt(_ succeeded: Bool) throws(PictureError) {
      guard !succeeded else { return }
      let reason = String(cString: strerror(errno))
      unlink(temporary)
      throw .file(path: file.path, reason: reason)
    }
    let stream = fopen(temporary, "wb")
    try attempt(stream != nil)
    let written = withUnsafeBytes { fwrite($0.baseAddress, 1, $0.count, stream!) }
    let closed = fclose(stream!) == 0
    try attempt(written == count && closed)
    try attempt(rename(temporary, file.path) == 0)
  }
}
