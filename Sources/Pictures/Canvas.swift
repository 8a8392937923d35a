import CCairo
import Foundation

/// An opaque colour, 0xRRGGBB.
struct Colour: Equatable {
  let hex: UInt32
  init(_ hex: UInt32) { self.hex = hex }

  static let ink = Colour(0x1F2328), muted = Colour(0x57606A), line = Colour(0xE4E7EB),
    axis = Colour(0x8C959F)

  /// Okabe and Ito's colours, told apart with every common colour vision; the ones that fade on white come last.
  static let series = [0x0072B2, 0xD55E00, 0x009E73, 0xCC79A7, 0xE69F00, 0x56B4E9, 0x3B3B3B].map {
    Colour($0)
  }

  fileprivate func channel(_ shift: UInt32) -> Double { Double(hex >> shift & 0xFF) / 255 }
}

/// What cairo has written so far.
private final class Buffer {
  var data = Data()
}

/// cairo's callback; `buffer` is the unretained ``Buffer`` of a canvas.
private func append(
  _ buffer: UnsafeMutableRawPointer?, _ bytes: UnsafePointer<UInt8>?, _ count: UInt32
) -> cairo_status_t {
  Unmanaged<Buffer>.fromOpaque(buffer!).takeUnretainedValue().data.append(bytes!, count: Int(count))
  return CAIRO_STATUS_SUCCESS
}

/// A cairo surface with its context; the drawing calls are the same for pixels and for SVG.
final class Canvas {
  let context: OpaquePointer
  private let surface: OpaquePointer
  private let buffer = Buffer()

  enum Anchor: Double { case start = 0, middle = 0.5, end = 1 }

  /// White pixels; drawing coordinates are multiplied by `scale`.
  init(width: Int, height: Int, scale: Double = 1) throws(PictureError) {
    guard (1...32767).contains(width), (1...32767).contains(height) else {
      throw .invalid("a picture of \(width)×\(height) pixels: each side must be 1 to 32767 (cairo's limit)")
    }
    surface = cairo_image_surface_create(CAIRO_FORMAT_RGB24, Int32(width), Int32(height))
    context = cairo_create(surface)
    try PictureError.check(cairo_status(context), "\(width)×\(height) pixels")
    prepare()
    cairo_scale(context, scale, scale)
  }

  /// A canvas that shows `image`.
  convenience init(_ image: Image) throws(PictureError) {
    try image.validate()
    try self.init(width: image.width, height: image.height)
    cairo_surface_flush(surface)
    let stride = Int(cairo_image_surface_get_stride(surface)), bytes = cairo_image_surface_get_data(surface)!
    for row in 0..<image.height {
      let line = UnsafeMutableRawPointer(bytes + row * stride).assumingMemoryBound(to: UInt32.self)
      for column in 0..<image.width {
        let from = 3 * (row * image.width + column)
        let (red, green, blue) = (image.pixels[from], image.pixels[from + 1], image.pixels[from + 2])
        line[column] = UInt32(red) << 16 | UInt32(green) << 8 | UInt32(blue)
      }
    }
    cairo_surface_mark_dirty(surface)
  }

  /// A vector canvas; ``finish()`` completes it.
  init(svgWidth width: Double, height: Double) throws(PictureError) {
    surface = cairo_svg_surface_create_for_stream(
      append, Unmanaged.passUnretained(buffer).toOpaque(), width, height)
    cairo_svg_surface_set_document_unit(surface, CAIRO_SVG_UNIT_PX)
    context = cairo_create(surface)
    try PictureError.check(cairo_status(context), "SVG of \(width)×\(height)")
    prepare()
  }

  deinit {
    cairo_destroy(context)
    cairo_surface_destroy(surface)
  }

  /// White paper, and text metrics that do not depend on the output's resolution.
  private func prepare() {
    set(Colour(0xFFFFFF))
    cairo_paint(context)
    let options = cairo_font_options_create()
    cairo_font_options_set_hint_metrics(options, CAIRO_HINT_METRICS_OFF)
    cairo_font_options_set_hint_style(options, CAIRO_HINT_STYLE_NONE)
    cairo_font_options_set_antialias(options, CAIRO_ANTIALIAS_GRAY)
    cairo_set_font_options(context, options)
    cairo_font_options_destroy(options)
    cairo_set_line_join(context, CAIRO_LINE_JOIN_ROUND)
    cairo_set_line_cap(context, CAIRO_LINE_CAP_ROUND)
  }

  // MARK: - Results

  /// The pixels drawn so far.
  func image() throws(PictureError) -> Image {
    try PictureError.check(cairo_status(context), "drawing")
    cairo_surface_flush(surface)
    let width = Int(cairo_image_surface_get_width(surface)),
      height = Int(cairo_image_surface_get_height(surface))
    let stride = Int(cairo_image_surface_get_stride(surface)), bytes = cairo_image_surface_get_data(surface)!
    return Image(width: width, height: height) { pixels in
      for row in 0..<height {
        let line = UnsafeRawPointer(bytes + row * stride).assumingMemoryBound(to: UInt32.self)
        for column in 0..<width {
          let to = 3 * (row * width + column), pixel = line[column]
          pixels[to] = UInt8(pixel >> 16 & 0xFF)
          pixels[to + 1] = UInt8(pixel >> 8 & 0xFF)
          pixels[to + 2] = UInt8(pixel & 0xFF)
        }
      }
    }
  }

  /// The pixels as a PNG file.
  func png() throws(PictureError) -> Data {
    buffer.data.removeAll()
    let status = cairo_surface_write_to_png_stream(
      surface, append, Unmanaged.passUnretained(buffer).toOpaque())
    try PictureError.check(status, "PNG encoding")
    return buffer.data
  }

  /// Lends the surface to be drawn elsewhere.
  func withSurface(_ body: (OpaquePointer) -> Void) {
    cairo_surface_flush(surface)
    withExtendedLifetime(self) { body(surface) }
  }

  /// Completes a vector drawing and returns the document.
  func finish() throws(PictureError) -> Data {
    try PictureError.check(cairo_status(context), "drawing")
    cairo_surface_finish(surface)
    try PictureError.check(cairo_surface_status(surface), "SVG encoding")
    return buffer.data
  }

  // MARK: - Drawing

  func set(_ colour: Colour, alpha: Double = 1) {
    cairo_set_source_rgba(context, colour.channel(16), colour.channel(8), colour.channel(0), alpha)
  }

  /// A polyline; a single point becomes a dot.
  func line(_ points: [(x: Double, y: Double)], _ colour: Colour, width: Double, dashes: [Double] = []) {
    guard let first = points.first else { return }
    set(colour)
    if points.count == 1 {
      cairo_new_path(context)
      cairo_arc(context, first.x, first.y, width * 1.6, 0, 2 * .pi)
      cairo_fill(context)
      return
    }
    cairo_set_line_width(context, width)
    cairo_set_dash(context, dashes, Int32(dashes.count), 0)
    path(points)
    cairo_stroke(context)
    cairo_set_dash(context, nil, 0, 0)
  }

  func fill(_ points: [(x: Double, y: Double)], _ colour: Colour, alpha: Double) {
    set(colour, alpha: alpha)
    path(points)
    cairo_fill(context)
  }

  private func path(_ points: [(x: Double, y: Double)]) {
    cairo_new_path(context)  // text leaves its end as the current point
    for point in points { cairo_line_to(context, point.x, point.y) }
  }

  // MARK: - Text

  func font(size: Double, bold: Bool = false) {
    let weight = bold ? CAIRO_FONT_WEIGHT_BOLD : CAIRO_FONT_WEIGHT_NORMAL
    cairo_select_font_face(context, "DejaVu Sans", CAIRO_FONT_SLANT_NORMAL, weight)
    cairo_set_font_size(context, size)
  }

  /// Advance width in the current font.
  func width(of text: String) -> Double {
    var extents = cairo_text_extents_t()
    cairo_text_extents(context, Self.printable(text), &extents)
    return extents.x_advance
  }

  /// Draws on the baseline `y`; `turned` is a quarter turn to the left around (x, y).
  func text(
    _ text: String, x: Double, y: Double, _ colour: Colour, anchor: Anchor = .start, turned: Bool = false
  ) {
    set(colour)
    cairo_save(context)
    cairo_translate(context, x, y)
    if turned { cairo_rotate(context, -.pi / 2) }
    cairo_move_to(context, -anchor.rawValue * width(of: text), 0)
    cairo_show_text(context, Self.printable(text))
    cairo_restore(context)
  }

  /// `text`, or as much of its start as fits with an ellipsis.
  func fitted(_ text: String, width limit: Double) -> String {
    if width(of: text) <= limit { return text }
    var low = 0, high = text.count  // the longest start that fits, by bisection
    while low < high {
      let middle = (low + high + 1) / 2
      if width(of: Self.ellipsed(text.prefix(middle))) <= limit { low = middle } else { high = middle - 1 }
    }
    return Self.ellipsed(text.prefix(low))
  }

  /// `text` in at most `lines` lines broken between words; what is left over ends in an ellipsis.
  func wrapped(_ text: String, width limit: Double, lines: Int) -> [String] {
    let words = text.split(whereSeparator: \.isWhitespace)
    var result: [String] = [], index = 0
    while index < words.count {
      if result.count == lines - 1 {
        return result + [fitted(words[index...].joined(separator: " "), width: limit)]
      }
      var line = String(words[index])
      index += 1
      while index < words.count, width(of: line + " " + words[index]) <= limit {
        line += " " + words[index]
        index += 1
      }
      result.append(fitted(line, width: limit))
    }
    return result
  }

  private static func ellipsed(_ text: Substring) -> String {
    var text = text
    while let last = text.last, last.isWhitespace || last == "," { text.removeLast() }
    return text + "…"
  }

  /// Control characters, of which a zero would end the C string, and what cairo and XML refuse, as spaces.
  static func printable(_ text: String) -> String {
    let scalars = text.unicodeScalars.map { scalar -> Unicode.Scalar in
      let kind = scalar.properties
      return kind.generalCategory == .control || kind.isNoncharacterCodePoint ? " " : scalar
    }
    return String(String.UnicodeScalarView(scalars))
  }
}
