import Foundation
import Testing

@testable import FlowTraining
@testable import curves

@Suite("curves of a run")
struct CurvesTests {
  let shop: Workshop

  init() throws {
    shop = try Workshop()
    shop.configuration.rewards = [.init(name: "vivid"), .init(name: "sharpness")]
    shop.configuration.rewards[1].watch = true
    (shop.configuration.run.iterations, shop.configuration.run.evaluateEvery) = (4, 2)
  }

  // Oracle: the run's own files. Means of three prompts are written to five digits.
  @Test("what was measured before training and at every evaluation, one line each, and a picture")
  func files() throws {
    try shop.train("a")
    let name = shop.folder("curve").path
    try Curves.write(shop.folder("a"), to: name)
    let lines = try String(contentsOfFile: "\(name).csv", encoding: .utf8).split(separator: "\n")
      .map { $0.split(separator: ",", omittingEmptySubsequences: false).map(String.init) }
    let columns = try Dictionary(
      uniqueKeysWithValues: #require(lines.first).enumerated().map { ($1, $0) })
    #expect(lines.dropFirst().map { [$0[0], $0[1]] } == [["0", "0"], ["2", "16"], ["4", "32"]])
    let base = try JSONDecoder().decode(
      GuardWatch.Baseline.self, from: Data(contentsOf: shop.folder("a").appending(path: "baseline.json")))
    let rows = try shop.rows("a")
    for reward in ["vivid", "sharpness"] {
      let column = try #require(columns[reward])
      let before = try #require(base.rewards[reward]).reduce(0) { $0 + $1! } / 3
      let expected = [before] + [rows[1], rows[3]].map { $0["eval/\(reward)"] as! Double }
      for (line, value) in zip(lines.dropFirst(), expected) {
        #expect(abs(try #require(Double(line[column])) - value) <= 5e-5 * abs(value))
      }
    }
    #expect(columns.keys.contains("guards/diversity"))
    let png = try Data(contentsOf: URL(filePath: "\(name).png"))
    #expect(png.starts(with: [0x89, 0x50, 0x4E, 0x47]))
  }

  @Test("a run without a baseline says what it lacks")
  func noBaseline() throws {
    try shop.train("a") { ($0.guards.action, $0.run.iterations) = (.off, 1) }
    let error = #expect(throws: RunError.self) {
      try Curves.write(shop.folder("a"), to: shop.folder("curve").path)
    }
    #expect("\(try #require(error))".contains("no baseline.json: train with run.evaluateEvery above 0"))
    #expect(!FileManager.default.fileExists(atPath: shop.folder("curve.csv").path))
  }
}
