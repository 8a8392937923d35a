import Foundation
import Testing

@testable import Pictures

#if canImport(FoundationXML)
  import FoundationXML
#endif

@Suite("LineChart")
struct LineChartTests {
  /// Rows and columns with a pixel of exactly the series' colour (edges of shapes are blended).
  private func extent(of series: Int, in image: Image) -> (rows: [Int], columns: [Int]) {
    let hex = Colour.series[series].hex
    let colour = [UInt8(hex >> 16), UInt8(hex >> 8 & 255), UInt8(hex & 255)]
    var rows: Set<Int> = [], columns: Set<Int> = []
    for y in 0..<image.height {
      for x in 0..<image.width where image[x, y] == colour {
        rows.insert(y)
        columns.insert(x)
      }
    }
    return (rows.sorted(), columns.sorted())
  }

  @Test("a constant series is one level line across the plot, half way up")
  func constant() throws {
    let chart = LineChart(
      title: "t", xLabel: "x", yLabel: "y", series: [.init("flat", x: [0, 1, 2], y: [5, 5, 5])], width: 400,
      height: 260)
    let image = try chart.render(scale: 1), found = extent(of: 0, in: image)
    // The legend's sample is 3 high, the line 2: any stray stroke would add rows.
    #expect(image.width == 400 && image.height == 260)
    #expect(found.rows.count <= 5 && found.rows.count >= 2)
    // Range 4.5…5.5 between marks 4.5 and 5.5: the line lies on the middle of three grid lines.
    let plot = try #require(found.rows.last)
    #expect(found.columns.count > 300 && plot > 100 && plot < 180)
  }

  @Test("nothing reaches the edge, whatever the texts and values")
  func margins() throws {
    let long = String(repeating: "long label ", count: 40)
    let series = (0..<9).map { index in
      LineChart.Series(
        long, x: [-1e9, 0, 1e9], y: [1e-9, Double(index), 1e12], low: [-1e12, 0, 0], high: [0, 1, 1e13])
    }
    let chart = LineChart(title: long, xLabel: long, yLabel: long, series: series, width: 500, height: 400)
    let image = try chart.render(scale: 1)
    for y in 0..<image.height {
      for x in 0..<image.width where x < 8 || x >= 492 || y < 8 || y >= 392 {
        #expect(image[x, y] == [255, 255, 255])
      }
    }
    for index in 0..<7 { #expect(!extent(of: index, in: image).rows.isEmpty) }
  }

  @Test("degenerate data draws: no series, an empty one, one point, gaps, equal and extreme values")
  func degenerate() throws {
    let huge = 1e300, tiny = Double.leastNonzeroMagnitude
    let cases: [[LineChart.Series]] = [
      [], [.init("empty", x: [], y: [])], [.init("nan", x: [.nan], y: [1])],
      [.init("huge", x: [-huge, huge], y: [huge, -huge], low: [-huge, 0], high: [huge, huge])],
      [.init("tiny", x: [0, tiny], y: [tiny, -tiny])],
      [.init("close", x: [1, 1.0000000000000002], y: [1e9, 1e9 + 1e-6])],
      [.init("band only", x: [0, 1], y: [.nan, .nan], low: [0, 0], high: [1, .infinity])],
    ]
    for series in cases {
      let image = try LineChart(series: series, width: 300, height: 200).render(scale: 1)
      #expect(image.width == 300 && image.height == 200)
    }
    let single = try LineChart(series: [.init("", x: [3], y: [7])], width: 300, height: 200).render(scale: 1)
    let dot = extent(of: 0, in: single)
    #expect(dot.rows.contains { $0 > 60 })  // below the legend's sample
    // A NaN in the middle splits the line: the columns between its neighbours stay free of it.
    let gap = LineChart(
      series: [.init("", x: [0, 1, 2, 3, 4], y: [1, 1, .nan, 1, 1])], width: 300, height: 200)
    let columns = extent(of: 0, in: try gap.render(scale: 1)).columns
    #expect(zip(columns, columns.dropFirst()).contains { $1 - $0 > 80 })
  }

  @Test("a band lies between its edges")
  func band() throws {
    let chart = LineChart(
      series: [.init("a", x: [0, 1], y: [0, 0], low: [0, 0], high: [1, 1])], width: 300, height: 200)
    let image = try chart.render(scale: 1)
    // 16% of 0x0072B2 over white is (214, 232, 243), ±1 as cairo keeps the alpha in 8 bits.
    var rows: Set<Int> = []
    for y in 0..<200 {
      for x in 100..<200 {
        let distance = zip(image[x, y], [214, 232, 243]).map { abs(Int($0) - $1) }.max()
        if distance! <= 1 { rows.insert(y) }
      }
    }
    let line = try #require(extent(of: 0, in: image).rows.last)
    #expect(rows.count > 80 && rows.allSatisfy { $0 <= line })
  }

  @Test("contradictory series and impossible sizes are refused by name")
  func invalid() {
    func series(_ x: [Double], _ y: [Double], _ low: [Double] = [], _ high: [Double] = []) -> LineChart {
      LineChart(series: [.init("reward", x: x, y: y, low: low, high: high)])
    }
    var small = series([1], [1])
    small.width = 10
    let crowded = LineChart(series: (0..<400).map { .init("series \($0)", x: [0], y: [0]) })
    let charts = [
      (series([1, 2], [1]), "\"reward\" has unequal lengths [2, 1, 0, 0]"),
      (series([1], [1], [1], []), "[1, 1, 1, 0]"), (series([1, 2], [1, 2], [1], [2]), "[2, 2, 1, 1]"),
      (series([1], [1e301]), "1e+301"), (small, "size 10×500"), (crowded, "no room under the legend"),
    ]
    for (chart, reason) in charts {
      for draw in [{ _ = try chart.render() }, { _ = try chart.svg() }] {
        let error = #expect(throws: PictureError.self) { try draw() }
        #expect(error?.description.contains(reason) == true, "\(String(describing: error))")
      }
    }
    #expect(throws: PictureError.self) { try series([1], [1]).render(scale: 0) }
  }

  @Test("SVG is well-formed XML with the title and every series name; PNG and SVG land in files")
  func files() throws {
    try withFolder { folder in
      let names = ["chunks 4-4", "a < b & \"c\" ]]>", "é\u{1}\u{FFFE}🙂"]
      let chart = LineChart(title: "R & D", series: names.map { .init($0, x: [0, 1], y: [0, 1]) })
      try chart.write(svg: folder.appending(path: "chart.svg"))
      try chart.write(png: folder.appending(path: "chart.png"), scale: 1)
      let saved = try Image(png: folder.appending(path: "chart.png")), drawn = try chart.render(scale: 1)
      #expect(saved == drawn)
      try expect(folder, holds: ["chart.png", "chart.svg"])

      final class Texts: NSObject, XMLParserDelegate {
        var found: [String: String] = [:], element = ""
        func parser(
          _ parser: XMLParser, didStartElement name: String, namespaceURI: String?, qualifiedName: String?,
          attributes: [String: String]
        ) { element = name }
        func parser(_ parser: XMLParser, didEndElement: String, namespaceURI: String?, qualifiedName: String?)
        {
          element = ""
        }
        func parser(_ parser: XMLParser, foundCharacters text: String) { found[element, default: ""] += text }
      }
      let texts = Texts(), parser = XMLParser(data: try Data(contentsOf: folder.appending(path: "chart.svg")))
      parser.delegate = texts
      #expect(parser.parse(), "\(String(describing: parser.parserError))")
      #expect(texts.found["title"] == "R & D")
      #expect(texts.found["desc"] == "chunks 4-4, a < b & \"c\" ]]>, é  🙂")

      let missing = folder.appending(path: "nowhere/chart.svg")
      let error = #expect(throws: PictureError.self) { try chart.write(svg: missing) }
      #expect(error?.description.hasPrefix(missing.path) == true)
    }
  }

  // MARK: - Axes. Oracle: worked out by hand.

  @Test("marks are round numbers, labels have the digits that tell them apart")
  func axes() {
    func labels(_ axis: Axis) -> [String] { axis.marks.map { axis.label($0) } }
    #expect(labels(Axis([0, 1], marks: 5, rounded: true)) == ["0", "0.2", "0.4", "0.6", "0.8", "1.0"])
    #expect(labels(Axis([0.13, 0.87], marks: 4, rounded: true)) == ["0", "0.2", "0.4", "0.6", "0.8", "1.0"])
    #expect(labels(Axis([-3, 4], marks: 4, rounded: true)) == ["−4", "−2", "0", "2", "4"])
    #expect(labels(Axis([0, 1.9e-5], marks: 3, rounded: true)) == ["0", "1e−5", "2e−5"])
    #expect(
      labels(Axis([0, 2.5e6], marks: 5, rounded: true)) == ["0", "5e5", "1.0e6", "1.5e6", "2.0e6", "2.5e6"])
    #expect(labels(Axis([0, 3], marks: 9, wholeSteps: true)) == ["0", "1", "2", "3"])
    #expect(labels(Axis([1, 199], marks: 4)) == ["50", "100", "150"])
    #expect(labels(Axis([7, 7], marks: 2, wholeSteps: true)) == ["7"])
    #expect(labels(Axis([], marks: 2)) == ["0", "0.5", "1.0"])
  }

  @Test(
    "any two values give a few marks inside the range",
    arguments: [0, .leastNonzeroMagnitude, 1e-290, 1e-9, 0.1, 1, 3.3, 1e6, 1e17, 1e300] as [Double])
  func anyRange(value: Double) {
    for other in [-1e300, -1, -1e-9, 0, 1e-300, 0.1000001, 1, 1.0000000001, 1e17, 1e300] {
      for rounded in [true, false] {
        let axis = Axis([value, other], marks: 6, rounded: rounded)
        #expect((2...16).contains(axis.marks.count), "\(value), \(other): \(axis)")
        // 1e-5 of the range: a mark may miss the end by rounding.
        #expect(axis.marks.allSatisfy { (-1e-5...1.00001).contains(axis.fraction($0)) })
        #expect(Set(axis.marks.map { axis.label($0) }).count == axis.marks.count, "\(axis)")
      }
    }
  }
}
