import Foundation

/// Lines with optional bands over a common pair of axes, as PNG or SVG from the same drawing.
public struct LineChart: Sendable, Equatable {
  /// One named line. Points with a NaN or infinite coordinate are left out and break the line there.
  public struct Series: Sendable, Equatable {
    /// Shown in the legend.
    public var name: String
    /// Coordinates, in drawing order; equally many. A lone point is drawn as a dot.
    public var x, y: [Double]
    /// Edges of the shaded band around the line, one per point; empty for no band.
    public var low, high: [Double]

    /// A line through (x, y).
    public init(_ name: String, x: [Double], y: [Double], low: [Double] = [], high: [Double] = []) {
      (self.name, self.x, self.y, self.low, self.high) = (name, x, y, low, high)
    }
  }

  /// Texts; an empty one takes no space.
  public var title, xLabel, yLabel: String
  /// In legend order. Colours repeat, dashed, after the seventh.
  public var series: [Series]
  /// Size in points: SVG user units, or pixels at scale 1.
  public var width, height: Int

  /// A chart to render.
  public init(
    title: String = "", xLabel: String = "", yLabel: String = "", series: [Series], width: Int = 880,
    height: Int = 500
  ) {
    (self.title, self.xLabel, self.yLabel, self.series) = (title, xLabel, yLabel, series)
    (self.width, self.height) = (width, height)
  }

  /// Draws the chart as pixels, `scale` for each point.
  ///
  /// - Throws: ``PictureError/invalid(_:)`` for series of unequal lengths, values beyond ±1e300, or a size that
  ///   leaves no room.
  public func render(scale: Int = 2) throws(PictureError) -> Image { try canvas(scale: scale).image() }

  /// Writes a PNG, `scale` pixels for each point; whole or not at all.
  ///
  /// - Throws: ``PictureError`` as ``render(scale:)`` does, or when the file cannot be written.
  public func write(png file: URL, scale: Int = 2) throws(PictureError) {
    try canvas(scale: scale).png().writeAtomically(to: file)
  }

  /// The chart as an SVG document; letters are shapes, so the title and the series are repeated as metadata.
  ///
  /// - Throws: ``PictureError/invalid(_:)`` as ``render(scale:)`` does.
  public func svg() throws(PictureError) -> Data {
    try validate()
    let canvas = try Canvas(svgWidth: Double(width), height: Double(height))
    try draw(on: canvas)
    let document = try canvas.finish()
    guard let tag = document.range(of: Data("<svg".utf8)),
      let end = document[tag.upperBound...].firstIndex(of: UInt8(ascii: ">"))
    else { throw .cairo(operation: "SVG encoding", status: "no <svg> element in the output") }
    let names = series.map { Self.escaped($0.name) }.joined(separator: ", ")
    let metadata = "\n<title>\(Self.escaped(title))</title>\n<desc>\(names)</desc>"
    return document[...end] + Data(metadata.utf8) + document[(end + 1)...]
  }

  /// Writes an SVG; whole or not at all.
  ///
  /// - Throws: ``PictureError`` as ``svg()`` does, or when the file cannot be written.
  public func write(svg file: URL) throws(PictureError) { try svg().writeAtomically(to: file) }

  private static func escaped(_ text: String) -> String {
    Canvas.printable(text).replacingOccurrences(of: "&", with: "&amp;")
      .replacingOccurrences(of: "<", with: "&lt;").replacingOccurrences(of: ">", with: "&gt;")
  }

  private func canvas(scale: Int) throws(PictureError) -> Canvas {
    try validate()
    guard (1...32).contains(scale) else { throw .invalid("LineChart: scale \(scale), need 1 to 32") }
    let canvas = try Canvas(width: width * scale, height: height * scale, scale: Double(scale))
    try draw(on: canvas)
    return canvas
  }

  private func validate() throws(PictureError) {
    guard (200...8192).contains(width), (120...8192).contains(height) else {
      throw .invalid("LineChart: size \(width)×\(height), need 200×120 to 8192×8192")
    }
    for line in series {
      let counts = [line.x.count, line.y.count, line.low.count, line.high.count]
      guard counts[0] == counts[1], counts[2] == counts[3], counts[2] == 0 || counts[2] == counts[0] else {
        throw .invalid("LineChart: series \"\(line.name)\" has unequal lengths \(counts) (x, y, low, high)")
      }
      let values = [line.x, line.y, line.low, line.high].joined()
      if let value = values.first(where: { $0.isFinite && abs($0) > 1e300 }) {
        throw .invalid("LineChart: series \"\(line.name)\" holds \(value), the limit is ±1e300")
      }
    }
  }

  // MARK: - Drawing

  private typealias Point = (x: Double, y: Double)

  private func draw(on canvas: Canvas) throws(PictureError) {
    let full = Double(width), margin = 18.0
    var top = margin
    if !title.isEmpty {
      canvas.font(size: 16, bold: true)
      canvas.text(canvas.fitted(title, width: full - 2 * margin), x: margin, y: top + 13, .ink)
      top += 28
    }
    top = drawLegend(on: canvas, left: margin, top: top, width: full - 2 * margin)
    let bottom = Double(height) - margin - 20 - (xLabel.isEmpty ? 0 : 22)

    guard bottom - top >= 40 else {
      throw .invalid("LineChart: height \(height) leaves no room under the legend of \(series.count) series")
    }

    let xs = series.flatMap { $0.x.filter(\.isFinite) }
    let whole = xs.allSatisfy { $0 == $0.rounded() }
    let vertical = Axis(
      series.flatMap { ($0.y + $0.low + $0.high).filter(\.isFinite) }, marks: (bottom - top) / 56,
      rounded: true)
    canvas.font(size: 11.5)
    let labels = vertical.marks.map { vertical.label($0) }
    let left = margin + (yLabel.isEmpty ? 0 : 22) + (labels.map { canvas.width(of: $0) }.max() ?? 0) + 8
    let right = full - margin - 8
    guard right - left >= 40 else {
      throw .invalid("LineChart: width \(width) leaves no room beside the labels of the y axis")
    }
    let horizontal = Axis(xs, marks: (right - left) / 90, wholeSteps: whole)
    func place(_ x: Double, _ y: Double) -> Point {
      (left + horizontal.fraction(x) * (right - left), bottom - vertical.fraction(y) * (bottom - top))
    }

    for (mark, label) in zip(vertical.marks, labels) {
      let y = bottom - vertical.fraction(mark) * (bottom - top)
      canvas.line([(left, y), (right, y)], .line, width: 1)
      canvas.text(label, x: left - 8, y: y + 4, .muted, anchor: .end)
    }
    canvas.line([(left, bottom), (right, bottom)], .axis, width: 1)
    for mark in horizontal.marks {
      let x = left + horizontal.fraction(mark) * (right - left)
      canvas.line([(x, bottom), (x, bottom + 4)], .axis, width: 1)
      canvas.text(horizontal.label(mark), x: x, y: bottom + 18, .muted, anchor: .middle)
    }
    canvas.font(size: 12.5)
    if !xLabel.isEmpty {
      let text = canvas.fitted(xLabel, width: right - left)
      canvas.text(text, x: (left + right) / 2, y: Double(height) - margin, .ink, anchor: .middle)
    }
    if !yLabel.isEmpty {
      let text = canvas.fitted(yLabel, width: bottom - top)
      canvas.text(text, x: margin + 10, y: (top + bottom) / 2, .ink, anchor: .middle, turned: true)
    }

    if !series.contains(where: { !Self.runs($0, [$0.x, $0.y]).isEmpty }) {
      canvas.text("no data", x: (left + right) / 2, y: (top + bottom) / 2, .muted, anchor: .middle)
    }
    for (index, line) in series.enumerated() {  // all bands lie below all lines
      for run in Self.runs(line, [line.x, line.low, line.high]) where !line.low.isEmpty {
        let edge =
          run.map { place(line.x[$0], line.high[$0]) }
          + run.reversed().map { place(line.x[$0], line.low[$0]) }
        canvas.fill(edge, style(index).colour, alpha: 0.16)
      }
    }
    for (index, line) in series.enumerated() {
      for run in Self.runs(line, [line.x, line.y]) {
        canvas.line(
          run.map { place(line.x[$0], line.y[$0]) }, style(index).colour, width: 2,
          dashes: style(index).dashes)
      }
    }
  }

  /// Samples and names from the left in as many rows as they need; returns where the plot may start.
  private func drawLegend(on canvas: Canvas, left: Double, top: Double, width: Double) -> Double {
    guard !series.isEmpty else { return top + 6 }
    canvas.font(size: 12)
    var x = left, y = top + 8
    for (index, line) in series.enumerated() {
      let name = canvas.fitted(line.name, width: width - 28), advance = 28 + canvas.width(of: name)
      if x > left, x + advance > left + width { (x, y) = (left, y + 19) }
      canvas.line([(x + 1, y), (x + 19, y)], style(index).colour, width: 3, dashes: style(index).dashes)
      canvas.text(name, x: x + 26, y: y + 4.5, .ink)
      x += advance + 18
    }
    return y + 22
  }

  private func style(_ index: Int) -> (colour: Colour, dashes: [Double]) {
    let count = Colour.series.count
    return (Colour.series[index % count], index < count ? [] : [5, 5])
  }

  /// Stretches of neighbouring points at which all `values` are finite.
  private static func runs(_ line: Series, _ values: [[Double]]) -> [Range<Int>] {
    var runs: [Range<Int>] = []
    for index in line.x.indices where values.allSatisfy({ index < $0.count && $0[index].isFinite }) {
      if let last = runs.last, last.upperBound == index {
        runs[runs.count - 1] = last.lowerBound..<(index + 1)
      } else {
        runs.append(index..<(index + 1))
      }
    }
    return runs
  }
}

/// A range of values and the round numbers marked on it, 1, 2 or 5 times a power of ten apart.
struct Axis: Equatable {
  let low, high, step: Double

  /// Covers `values`; without any, or around equal ones, a range is made up.
  ///
  /// - Parameters:
  ///   - marks: about how many marks there is room for.
  ///   - rounded: whether the range ends on marks.
  ///   - wholeSteps: whether marks are only set at whole numbers.
  init(_ values: [Double], marks: Double, rounded: Bool = false, wholeSteps: Bool = false) {
    var low = values.min() ?? 0, high = values.max() ?? 1
    // Closer than this, neighbouring marks would print alike.
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-280) {
      let room = abs(low) < 1e-280 ? 1 : abs(low) * 0.1
      (low, high) = (low - room, high + room)
    }
    let ideal = (high - low) / max(2, marks), power = pow(10, log10(ideal).rounded(.down))
    let round = ([1, 2, 5, 10].first { $0 * power >= ideal * 0.999 } ?? 10) * power
    let step = wholeSteps ? max(1, round) : round
    self.step = step
    (self.low, self.high) =
      rounded ? ((low / step).rounded(.down) * step, (high / step).rounded(.up) * step) : (low, high)
  }

  /// Multiples of the step in the range.
  var marks: [Double] {
    // A mark may miss an end of the range by rounding.
    let first = (low / step - 1e-6).rounded(.up), last = (high / step + 1e-6).rounded(.down)
    return first <= last ? stride(from: first, through: last, by: 1).map { $0 * step } : []
  }

  /// 0 at the low end, 1 at the high end.
  func fraction(_ value: Double) -> Double { (value - low) / (high - low) }

  /// `value` with just the digits that tell marks apart.
  func label(_ value: Double) -> String {
    let size = max(abs(low), abs(high)), digits = Int(log10(step * 1.001).rounded(.down))
    if abs(value) < step / 2 { return "0" }
    if size < 1e6, size >= 1e-3 { return Self.minus(String(format: "%.*f", max(0, -digits), value)) }
    let power = Int(log10(abs(value) * 1.000001).rounded(.down))
    return Self.minus(
      String(format: "%.*fe%d", max(0, power - digits), value / pow(10, Double(power)), power))
  }

  private static func minus(_ text: String) -> String { text.replacingOccurrences(of: "-", with: "−") }
}
