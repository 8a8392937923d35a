import Foundation
import Testing

@Suite("chunks")
struct ChunksCommandTests {
  // Oracle: what the numbers have to fulfil among each other, and the definitions of the plans without a curve.
  @Test("report, JSON and files agree, and the same seed gives the same numbers")
  func report() throws {
    let scratch = try Scratch()
    let arguments = [
      "chunks", Tool.fluxMini.path, "--steps", "7", "--shift", "2", "--count", "3", "--samples", "2",
      "--seed", "3",
    ]
    let result = try Tool.run(arguments + ["--json", "-o", "out"], in: scratch)
    #expect(result.status == 0 && result.err.isEmpty, "\(result.err)")
    let object = try result.json()
    let plans = try #require(object["plans"] as? [[String: Any]])
    let names = plans.compactMap { $0["plan"] as? String }
    #expect(names == ["step", "sequence", "fixed:2", "fixed:4", "adaptive", "adaptive-shared", "auto"])
    var risks: [String: Double] = [:]
    for plan in plans {
      let sizes = try #require(plan["sizes"] as? [Int])
      #expect(sizes.reduce(0, +) == 6)
      for key in ["uniform", "weighted", "softmax"] {
        let p = try #require(plan[key] as? [Double])
        #expect(p.count == sizes.count && abs(p.reduce(0, +) - 1) < 1e-12)  // rounding of K quotients
      }
      risks[try #require(plan["plan"] as? String)] = try #require(plan["risk"] as? Double)
      #expect(plan["plan"] as? String == "adaptive" || plan["distinct"] as? Int == 1)
    }
    #expect(plans[0]["sizes"] as? [Int] == [1, 1, 1, 1, 1, 1] && plans[3]["sizes"] as? [Int] == [4, 2])
    // auto is the least of those within its bounds, 2 … 7.
    for name in ["sequence", "fixed:2", "fixed:4", "adaptive", "adaptive-shared"] {
      #expect(risks["auto"]! <= risks[name]! * (1 + 1e-12), "\(name)")
    }
    let pattern = try #require(object["pattern"] as? [String: Any])
    let shares = ["step", "prompt", "prompt_step", "sample"].compactMap { pattern[$0] as? Double }
    #expect(abs(shares.reduce(0, +) - 1) < 1e-12)
    let steps = try #require(object["dynamics"] as? [[String: Any]])
    #expect(steps.map { $0["step"] as? Int } == [0, 1, 2, 3, 4, 5])

    let files = try FileManager.default.contentsOfDirectory(atPath: scratch.path("out")).sorted()
    #expect(
      files == [
        "chunks.json", "dynamics.csv", "dynamics.png", "dynamics.svg", "sensitivity.png", "sensitivity.svg",
      ])
    #expect(try scratch.text("out/chunks.json") == result.out)
    let rows = try scratch.text("out/dynamics.csv").split(separator: "\n")
    #expect(rows.count == 7 && rows[0].hasPrefix("step,sigma,next,mean"))
    let (listed, mean) = (
      Double(rows[1].split(separator: ",")[3]) ?? .nan, try #require(steps[0]["mean"] as? Double)
    )
    #expect(abs(listed - mean) <= 1e-15)  // a rounding of the reader

    let text = try Tool.run(arguments, in: scratch)
    #expect(text.status == 0)
    for word in [
      "3 prompts × 2 trajectories, T 7, shift 2", "rank correlation", "adaptive-shared", "planning",
    ] {
      #expect(text.out.contains(word), "\(text.out)")
    }
    let again = try Tool.run(arguments + ["--json"], in: scratch).json()
    #expect((again["dynamics"] as? [NSDictionary]) == (object["dynamics"] as? [NSDictionary]))
  }

  // Oracle: what the run itself wrote down.
  @Test("a run is measured with its own settings")
  func ofRun() throws {
    let scratch = try Scratch()
    try scratch.configure()
    try scratch.train(
      "config.yaml", "--set", "sampling.steps=5", "--set", "sampling.step=cps", "--set", "chunk.plan=auto")
    let object = try Tool.run(["chunks", "run", "--samples", "2", "--plan", "auto", "--json"], in: scratch)
      .json()
    #expect(
      object["steps"] as? Int == 5 && object["kind"] as? String == "cps" && object["height"] as? Int == 32)
    #expect(
      object["prompts"] as? [String] ?? [] == ["a photo of two dogs", "a photo of a cat"]
        || object["prompts"] as? [String] ?? [] == ["a photo of a cat", "a photo of two dogs"])
    let plan = try #require((object["plans"] as? [[String: Any]])?.first)
    #expect((plan["sizes"] as? [Int])?.reduce(0, +) == 4)
    #expect(
      scratch.exists("run/chunks.json") && scratch.exists("run/checkpoints/iteration-000002/chunks.json"))
  }
}
