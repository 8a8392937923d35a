import FlowRewards
import Foundation
import Pictures
import Testing

@testable import FlowTraining

@Suite("--reward and scoring of pictures")
struct RewardOptionTests {
  /// Oracle: the same entry of a configuration file.
  @Test("a name, a score, or a mapping as in a file")
  func options() throws {
    #expect(try Configuration.Reward(option: "vivid") == .init(name: "vivid"))
    #expect(try Configuration.Reward(option: "scenes:strict") == .init(name: "scenes", score: "strict"))
    let text = "{name: command, command: [python3, 'a:b.py'], batch: 4, failure: {retries: 1}, label: j}"
    let file = try Configuration.load(yaml: "rewards: [\(text)]", source: "c.yaml").rewards
    #expect(try [Configuration.Reward(option: text)] == file)
    #expect(file[0].command == ["python3", "a:b.py"] && file[0].failure.retries == 1)
  }

  @Test(
    "what is none says so",
    arguments: [
      (
        "{name: ocr, langage: deu}",
        "--reward {name: ocr, langage: deu}: langage is not a key; did you mean language?"
      ),
      ("{name: jpeg-size, quality: high}", "quality: expected an integer, got \"high\""),
      ("{name: vivid", "not valid YAML"), ("{score: strict}", "expected name, name:score or a mapping"),
      ("scenes:", "expected name, name:score or a mapping"), ("", "expected name, name:score or a mapping"),
    ])
  func mistakes(option: String, words: String) {
    let error = #expect(throws: ConfigurationError.self) { try Configuration.Reward(option: option) }
    #expect(error.map { "\($0)".contains(words) } == true, "\(error.map { "\($0)" } ?? "")")
  }

  /// Oracle: each picture alone.
  @Test("pictures of several sizes keep their order")
  func sizes() throws {
    let scoring = try ImageScoring([.init(name: "vivid"), .init(name: "jpeg-size", score: "negative")])
    #expect(scoring.names == ["vivid", "jpeg-size"] && !scoring.readsPrompts)
    let pictures = (0..<5).map { i in
      Pictures.Image(width: [8, 16, 8, 16, 12][i], height: 8, red: UInt8(50 * i), green: 0, blue: 90)
    }
    let prompts = pictures.indices.map { Prompt(text: "\($0)") }
    let scores = try scoring.scores(pictures, prompts: prompts)
    for (i, picture) in pictures.enumerated() {
      let alone = try scoring.scores([picture], prompts: [prompts[i]])
      #expect(alone.map { $0[0] } == scores.map { $0[i] })
      #expect(scores[1][i].value == (try -Double(picture.jpeg(quality: 95).count) / 1000))
    }
    #expect(try ImageScoring([.init(name: "ocr")]).readsPrompts)
    #expect(throws: RunError.self) {
      try ImageScoring([.init(name: "vivid"), .init(name: "vivid")])
    }
  }
}
