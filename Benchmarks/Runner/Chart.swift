import Foundation
import Pictures

/// A line chart as the driver describes it.
struct Chart: Decodable {
  struct Series: Decodable {
    var name: String
    var x, y: [Double]
  }
  var title, x, y, file: String
  var series: [Series]

  /// Writes `file`.png and `file`.svg.
  func write() throws {
    let chart = LineChart(
      title: title, xLabel: x, yLabel: y, series: series.map { LineChart.Series($0.name, x: $0.x, y: $0.y) })
    try chart.write(png: URL(filePath: file + ".png"))
    try chart.write(svg: URL(filePath: file + ".svg"))
  }
}
