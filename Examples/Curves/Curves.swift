import FlowTraining
import Foundation
import Pictures

/// Draws how the rewards and guards of a run moved on the dev split: `swift run curves RUN NAME` writes NAME.png and
/// NAME.csv. Everything is its change from before training, in percent of that; what was 0 before is only in the CSV.
@main
struct Curves {
  static func main() throws {
    let arguments = CommandLine.arguments.dropFirst()
    guard arguments.count == 2, let run = arguments.first.map({ URL(filePath: $0) }),
      let name = arguments.last
    else { throw RunError("usage: curves RUN NAME") }
    try write(run, to: name)
  }

  /// Writes `name`.png and `name`.csv of a run that was evaluated before training and at least once since.
  static func write(_ run: URL, to name: String) throws {
    let configuration = try Configuration.load(file: run.appending(path: "config.yaml"))
    let points = try points(
      of: run, images: configuration.group.size * configuration.group.promptsPerIteration)
    let names = Set(points.flatMap(\.values.keys)).sorted()
    try Data(csv(points, names).utf8).write(to: URL(filePath: "\(name).csv"))

    let watched = Set(configuration.rewards.filter(\.watch).map { $0.label ?? $0.name })
    // Rewards first: they get the strongest colours.
    let shown = names.filter { !$0.hasPrefix("guards/") } + names.filter { $0.hasPrefix("guards/") }
    let series = shown.compactMap { key -> LineChart.Series? in
      guard let base = points[0].values[key], base != 0 else { return nil }
      let here = points.filter { $0.values[key] != nil }
      let label =
        key.hasPrefix("guards/")
        ? String(key.dropFirst(7)) : watched.contains(key) ? "\(key) (held out)" : key
      return LineChart.Series(
        label, x: here.map { Double($0.images) }, y: here.map { 100 * ($0.values[key]! - base) / abs(base) })
    }
    try LineChart(
      title: "\(run.lastPathComponent) on dev", xLabel: "images generated", yLabel: "change from the base, %",
      series: series, width: 680, height: 400
    ).write(png: URL(filePath: "\(name).png"), scale: 1)
  }

  private struct Point {
    let iteration, images: Int
    let values: [String: Double]
  }

  /// What was measured before training, then each evaluation.
  private static func points(of run: URL, images: Int) throws -> [Point] {
    func object(_ data: some DataProtocol) throws -> [String: Any] {
      try JSONSerialization.jsonObject(with: Data(data)) as? [String: Any] ?? [:]
    }
    guard let data = try? Data(contentsOf: run.appending(path: "baseline.json")) else {
      throw RunError(
        "\(run.path): no baseline.json: train with run.evaluateEvery above 0 and guards.action other than off"
      )
    }
    let baseline = try object(data)
    var before = (baseline["rewards"] as? [String: [Any]] ?? [:]).mapValues { scores in
      let valid = scores.compactMap { $0 as? Double }
      return valid.reduce(0, +) / Double(valid.count)
    }
    for (name, value) in baseline["guards"] as? [String: Any] ?? [:] {
      before["guards/\(name)"] = value as? Double
    }
    let rows = try Data(contentsOf: run.appending(path: "metrics.jsonl")).split(separator: UInt8(ascii: "\n"))
      .map(object)
    return [Point(iteration: 0, images: 0, values: before)]
      + rows.compactMap { row in
        let evaluated = row.filter { $0.key.hasPrefix("eval/") && !$0.key.hasPrefix("eval/failed/") }
        guard let iteration = row["iteration"] as? Int, !evaluated.isEmpty else { return nil }
        let values = evaluated.compactMap { key, value in
          (value as? Double).map { (String(key.dropFirst(5)), $0) }
        }
        return Point(
          iteration: iteration, images: iteration * images, values: Dictionary(uniqueKeysWithValues: values))
      }
  }

  private static func csv(_ points: [Point], _ names: [String]) -> String {
    let rows = points.map { point in
      ["\(point.iteration)", "\(point.images)"]
        + names.map { name in point.values[name].map { String(format: "%.5g", $0) } ?? "" }
    }
    return ([["iteration", "images"] + names] + rows).map { $0.joined(separator: ",") + "\n" }.joined()
  }
}
