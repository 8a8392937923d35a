import Foundation
import Pictures
import Torch

extension StudyReport {
  /// A table with a heading; the first row names the columns.
  public struct Table: Sendable {
    /// What it shows.
    public let title: String
    /// Cells.
    public let rows: [[String]]
  }

  /// What a person reads: scores, comparisons, cost, guards.
  public var tables: [Table] {
    var tables: [Table] = []
    for reward in base.keys.sorted() {
      let tests = Dictionary(
        uniqueKeysWithValues: comparisons.filter { $0.reward == reward }.map { ($0.arm, $0) })
      var rows = [
        [
          "arm", "seeds", "final", "± 95 %", "gain", "− \(reference)", "95 % interval", "p", "p (Holm)",
          "detectable",
        ]
      ]
      for arm in arms {
        let values = arm.rewards[reward]!
        rows.append(
          [
            arm.name, "\(arm.seeds.count)", number(values.final.mean), half(values.final.ci95),
            signed(values.gain.mean),
          ]
            + (tests[arm.name].map {
              [signed($0.difference), interval($0.ci95), short($0.p), short($0.pHolm), number($0.detectable)]
            } ?? []))
      }
      tables.append(Table(title: "\(reward), untrained \(number(base[reward]!))", rows: rows))

      guard arms.contains(where: { $0.rewards[reward]?.gainAtEqualSteps != nil }) else { continue }
      rows = [
        [
          "arm", "gain at equal steps", "± 95 %", "− \(reference)", "gain at equal CPU s", "± 95 %",
          "− \(reference)",
          "gain per CPU hour",
        ]
      ]
      for arm in arms {
        let (values, clock) = (arm.rewards[reward]!, arm.clock)
        func cells(_ values: Values?, _ against: Difference?) -> [String] {
          [
            values.map { signed($0.mean) } ?? "", half(values?.ci95),
            against.map { "\(signed($0.difference)) \(interval($0.ci95))" } ?? "",
          ]
        }
        rows.append(
          [arm.name] + cells(values.gainAtEqualSteps, values.gainAtEqualStepsAgainst)
            + cells(clock.gainAtEqualCPUSeconds[reward], clock.gainAtEqualCPUSecondsAgainst[reward])
            + [clock.gainPerCPUSecond[reward].map { signed($0.mean * 3600) } ?? ""])
      }
      tables.append(Table(title: "\(reward) on dev, at the cost that every run reached", rows: rows))
    }
    var rows = [["arm", "images", "trained steps", "network passes", "seconds", "CPU seconds"]]
    for arm in arms {
      rows.append([
        arm.name, whole(arm.images.mean), whole(arm.trainedSteps.mean), whole(arm.networkPasses.mean),
        String(format: "%.1f", arm.clock.seconds.mean), String(format: "%.1f", arm.clock.cpuSeconds.mean),
      ])
    }
    tables.append(Table(title: "cost of a run, mean over seeds", rows: rows))
    if let baseGuards {
      rows = [["arm"] + baseGuards.named.map(\.name) + ["collapsed"]]
      for (name, guards, collapsed) in [("untrained", baseGuards, [])]
        + arms.map({ ($0.name, $0.guards ?? baseGuards, $0.collapsed) })
      {
        rows.append(
          [name] + guards.named.map { number($0.value) } + [
            collapsed.isEmpty ? "no" : collapsed.joined(separator: "; ")
          ])
      }
      tables.append(Table(title: "guards", rows: rows))
    }
    return tables
  }

  /// Writes study.json, study.csv, curves.csv, study.md and, where there are curves, pictures of them.
  func write(to folder: URL, commands: [String]) throws {
    func put(_ text: String, _ name: String) throws {
      try AtomicFile.write(Data(text.utf8), to: folder.appending(path: name))
    }
    try AtomicFile.write(try json() + Data("\n".utf8), to: folder.appending(path: "study.json"))

    let rewards = base.keys.sorted()
    var lines = [
      ["arm", "seed", "images", "trained_steps", "network_passes", "seconds", "cpu_seconds"] + rewards
    ]
    for arm in arms {
      for (i, seed) in arm.seeds.enumerated() {
        lines.append(
          [arm.name, "\(seed)"]
            + [arm.images, arm.trainedSteps, arm.networkPasses, arm.clock.seconds, arm.clock.cpuSeconds].map {
              "\($0.values[i])"
            }
            + rewards.map { "\(arm.rewards[$0]!.final.values[i])" })
      }
    }
    try put(Self.csv(lines), "study.csv")
    lines = [["arm", "reward", "iteration", "images", "trained_steps", "mean", "low", "high"]]
    for curve in curves {
      for i in curve.iterations.indices {
        lines.append(
          [
            curve.arm, curve.reward, "\(curve.iterations[i])", "\(curve.images[i])",
            "\(curve.trainedSteps[i])", "\(curve.mean[i])",
          ]
            + (curve.low.isEmpty ? ["", ""] : ["\(curve.low[i])", "\(curve.high[i])"]))
      }
    }
    try put(Self.csv(lines), "curves.csv")

    let pictures = try rewards.flatMap { try draw($0, in: folder) }
    var text =
      "# Study\n\n\(runsDone) of \(runs) runs; budget: \(budget == "images" ? "equal images" : "none"); reference arm: \(reference); "
      + "seeds \(seeds.map(String.init).joined(separator: ", ")). "
      + "Intervals are Student's t over seeds; p is the paired t-test over seeds, p (Holm) is corrected for all \(comparisons.count) comparisons "
      + "of this report; detectable is the true difference that this many seeds find four times in five at the 5 % level.\n"
    for note in notes { text += "\n- \(note)" }
    if !notes.isEmpty { text += "\n" }
    for table in tables {
      let width = table.rows[0].count
      let rows = table.rows.map { row in
        "| " + (row + Array(repeating: "", count: width - row.count)).joined(separator: " | ") + " |"
      }
      text +=
        "\n## \(table.title)\n\n\(rows[0])\n|---|" + String(repeating: "---:|", count: width - 1) + "\n"
        + rows.dropFirst().joined(separator: "\n") + "\n"
    }
    for picture in pictures { text += "\n![\(picture)](\(picture).png)\n" }
    text += "\n## Commands\n\n```\n" + commands.joined(separator: "\n") + "\n```\n"
    try put(text, "study.md")
  }

  /// Learning curves over images and over trained steps, as PNG and SVG; names without extension.
  private func draw(_ reward: String, in folder: URL) throws -> [String] {
    let mine = curves.filter { $0.reward == reward }
    guard !mine.isEmpty else { return [] }
    let file = reward.map { $0.isLetter || $0.isNumber || $0 == "-" ? String($0) : "-" }.joined()
    let axes: [(String, String, (Curve) -> [Double])] = [
      ("images", "images generated", { $0.images.map(Double.init) }),
      ("steps", "trained steps", \.trainedSteps),
    ]
    return try axes.map { name, label, x in
      let chart = LineChart(
        title: "\(reward) on dev: mean over seeds, 95 % interval of the gain", xLabel: label, yLabel: reward,
        series: mine.map { .init($0.arm, x: x($0), y: $0.mean, low: $0.low, high: $0.high) })
      try chart.write(png: folder.appending(path: "\(file)-\(name).png"))
      try chart.write(svg: folder.appending(path: "\(file)-\(name).svg"))
      return "\(file)-\(name)"
    }
  }

  private static func csvNumber(_ x: Double) -> String {
    x == x.rounded() && abs(x) < 1e15 ? "\(Int(x))" : "\(x)"
  }
  private static func csv(_ rows: [[String]]) -> String {
    rows.map { row in
      row.map {
        $0.contains(where: { ",\"\n".contains($0) })
          ? "\"" + $0.replacingOccurrences(of: "\"", with: "\"\"") + "\"" : $0
      }
      .joined(separator: ",") + "\n"
    }.joined()
  }

  private func number(_ x: Double) -> String { String(format: "%.4f", x) }
  private func signed(_ x: Double) -> String { String(format: "%+.4f", x) }
  private func short(_ p: Double) -> String { String(format: p < 0.001 ? "%.0e" : "%.3f", p) }
  private func whole(_ x: Double) -> String { String(format: "%.0f", x) }
  private func half(_ ci: [Double]?) -> String { ci.map { number(($0[1] - $0[0]) / 2) } ?? "" }
  private func interval(_ ci: [Double]?) -> String { ci.map { "[\(signed($0[0])), \(signed($0[1]))]" } ?? "" }
}
