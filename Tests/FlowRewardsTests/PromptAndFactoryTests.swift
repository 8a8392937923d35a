import Foundation
import Testing
import Torch

@testable import FlowRewards

@Suite("Reward prompts, names and files")
struct PromptAndFactoryTests {
  /// Oracle: the counts of the data's own description, and two lines decoded by eye.
  @Test("every line of prompts.jsonl decodes")
  func prompts() throws {
    let prompts = try promptLines()
    #expect(prompts.count == 954)
    #expect(prompts.filter { $0.scene?.relation != nil }.count == 440)
    #expect(Set(prompts.map(\.tag)).count == 6)
    let line = #"""
      {"tag": "position", "include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1}],
       "prompt": "a photo of a circle right of a square", "split": "train", "relation": "right of"}
      """#
    let position = try RewardPrompt(jsonLine: Data(line.utf8))
    #expect(
      position
        == RewardPrompt(
          text: "a photo of a circle right of a square",
          scene: Scene(include: [.init(name: "circle"), .init(name: "square")], relation: "right of"),
          tag: "position", metadata: line))
    #expect(
      try RewardPrompt(jsonLine: Data(#"{"prompt": "a quiet sea"}"#.utf8))
        == RewardPrompt(text: "a quiet sea", metadata: #"{"prompt": "a quiet sea"}"#))
  }

  @Test(
    "bad prompt lines say why",
    arguments: [
      ("{", "not a JSON object"), ("{\"tag\": \"x\"}", "no prompt"),
      (#"{"prompt": 3}"#, "prompt is not of type String"),
      (#"{"prompt": "x", "include": []}"#, "include is empty"),
      (#"{"prompt": "x", "include": [{"class": "cat", "count": 0}]}"#, "cat has count 0, not ≥ 1"),
      (#"{"prompt": "x", "relation": "above"}"#, "a relation needs an include list"),
      (
        #"{"prompt": "x", "relation": "above", "include": [{"class": "cat", "count": 1}]}"#,
        "a relation needs two included classes, found 1"
      ),
      (
        #"{"prompt": "x", "relation": "near", "include": [{"class": "cat", "count": 1}]}"#,
        "relation \"near\" is not one of left of, right of, above, below"
      ),
    ])
  func badLines(line: String, reason: String) {
    #expect(throws: RewardError.badPromptLine(line: line, reason: reason)) {
      try RewardPrompt(jsonLine: Data(line.utf8))
    }
  }

  /// Oracle: the same reward made directly.
  @Test("the factory knows every name it lists")
  func factory() throws {
    let fixture = try VerifierFixture()
    let data = try Assets.locate("sprites.safetensors").deletingLastPathComponent()
    func score(_ name: String, _ score: String?) throws -> [Double?] {
      let reward = try RewardFactory.make(name: name, score: score, assets: data)
      #expect(reward.name == name)
      return try reward.scoresNow(fixture.images[20..<24], prompts: Array(fixture.prompts[20..<24])).map(
        \.value)
    }
    #expect(try score("scenes", nil) == score("scenes", "graded"))
    #expect(try score("scenes", "strict") == fixture.strict[20..<24].map { $0 })
    #expect(try score("vivid", nil) == score("colourfulness", nil))
    for name in RewardFactory.names {
      // Some cannot do without keys of their own.
      do { #expect(try RewardFactory.make(name: name).name == name) } catch RewardError.missingKey(
        let reward, _, _)
      {
        #expect(reward == name)
      }
    }
    #expect(throws: RewardError.unknownReward(name: "vibid", known: RewardFactory.names)) {
      try RewardFactory.make(name: "vibid")
    }
    #expect(throws: RewardError.unknownScore(reward: "scenes", score: "lax", known: ["graded", "strict"])) {
      try RewardFactory.make(name: "scenes", score: "lax")
    }
    #expect(throws: RewardError.unknownScore(reward: "vivid", score: "strict", known: [])) {
      try RewardFactory.make(name: "vivid", score: "strict")
    }
  }

  /// Oracle: the documented order of folders.
  @Test("a name that is taken cannot be registered, an alias neither, and nothing is added")
  func taken() {
    let before = RewardFactory.names
    #expect(throws: RewardError.nameTaken(name: "vivid")) {
      try RewardFactory.register(RewardKind("vivid") { _, _ in Vivid() })
    }
    #expect(throws: RewardError.nameTaken(name: "colourfulness")) {
      try RewardFactory.register(RewardKind("mine", "colourfulness") { _, _ in Vivid() })
    }
    #expect(RewardFactory.names == before)
  }

  @Test("assets are sought in the documented order")
  func assets() throws {
    let executable = URL(fileURLWithPath: "/opt/tool/bin/program")
    let folders = Assets.folders(environment: ["CHUNKGRPO_DATA": "/elsewhere"], executable: executable).map(
      \.path)
    #expect(
      folders == [
        "/elsewhere", "/opt/tool/Data", "/opt/tool/share/chunkgrpo/Data", "/opt/tool/bin/Data", "/opt/Data",
        "/Data",
      ])
    let root = FileManager.default.temporaryDirectory.appendingPathComponent("assets-\(UUID())")
    defer { try? FileManager.default.removeItem(at: root) }
    let (first, second) = (root.appendingPathComponent("a"), root.appendingPathComponent("b"))
    for folder in [first, second] {
      try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    }
    let file = second.appendingPathComponent("x.bin")
    try Data().write(to: file)
    #expect(try Assets.locate("x.bin", in: [first, second]).path == file.path)
    #expect(throws: RewardError.assetNotFound(file: "y.bin", searched: [first.path, second.path])) {
      try Assets.locate("y.bin", in: [first, second])
    }
  }
}
