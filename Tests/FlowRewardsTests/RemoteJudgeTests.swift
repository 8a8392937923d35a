import Foundation
import Testing
import Torch

@testable import FlowRewards

@Suite("Remote rewards from a judge")
struct RemoteJudgeTests {
  private func judge(
    _ behaviour: Behaviour, _ change: (inout RewardSettings) -> Void = { _ in }
  ) throws -> any Reward {
    try RewardFactory.make(
      behaviour.settings("judge") {
        $0.model = "some/model"
        change(&$0)
      })
  }

  /// Oracle: the server reads the image and says so in the words that the pattern looks for.
  @Test("a score is read from the answer")
  func pattern() async throws {
    let behaviour = try Behaviour("judge")
    let reds = [0, 51, 102, 255, 204, 153]
    let scores = try await judge(behaviour).score(flat(reds), prompts: captions(6))
    for (score, red) in zip(scores, reds) {
      let expected = (1 + 4 * level(red)) / 5
      #expect(abs(try #require(score.value) - expected) < 1e-4)  // it says three decimals
    }
    let statistics = try await behaviour.statistics()
    #expect(
      statistics.path.hasSuffix("/v1/chat/completions") && statistics.sizes == Array(repeating: 1, count: 6))
    let last = try #require(statistics.last)
    #expect(
      "\(last["model"]!)" == "\(PickleValue.string("some/model"))" && "\(last["temperature"]!)" == "int(0)")
    #expect(last["logprobs"] == nil && "\(last["max_tokens"]!)" == "int(1024)")
    guard case .string(let text) = last["text"] else {
      Issue.record("no text")
      return
    }
    #expect(text.contains("[caption ") && !text.contains("{prompt}") && text.contains("Final Score: x"))
  }

  @Test("template, pattern and scale are the configuration's")
  func own() async throws {
    let behaviour = try Behaviour("judge-other")
    let reward = try judge(behaviour) {
      $0.template = "How red is {prompt}, {prompt}?"
      $0.pattern = "give it (\\d+) points"
      $0.scale = 255
    }
    let prompts = [RewardPrompt(text: "a {prompt} \"rose\"")]
    #expect(try await reward.score(flat([51]), prompts: prompts) == [RewardScore(value: 0.2)])
    let last = try #require(try await behaviour.statistics().last)
    let question = "How red is a {prompt} \"rose\", a {prompt} \"rose\"?"
    #expect("\(last["text"]!)" == "\(PickleValue.string(question))")
  }

  @Test(
    "what cannot be read is no number",
    arguments: [
      (
        "judge-rambling",
        "does not match the pattern (cut off after 1024 tokens): I would say that " + "very very"
      ),
      ("judge-other", "does not match the pattern: I give it 9 points."),
      ("judge-silent", "no text"),
      ("judge-error", "status 404: {\"error\": {\"message\": \"The model `m` does not"),
    ])
  func failures(how: String, expected: String) async throws {
    let score = try await judge(Behaviour(how)).score(flat([9]), prompts: captions(1))[0]
    let text = try #require(score.failure)
    #expect(score.value == nil && text.contains(expected), "\(text)")
    #expect(text.count < 300)
  }

  @Test("a number too large for one is none")
  func hugeNumber() async throws {
    let reward = try judge(Behaviour("judge-huge-number")) { $0.pattern = "Final Score: (\\d+)" }
    let score = try await reward.score(flat([9]), prompts: captions(1))[0]
    #expect(score.value == nil && score.failure?.contains("is not a number") == true)
  }

  /// Oracle: the closed form of the server's log-probabilities, variants summed.
  @Test("the probability of Yes")
  func yes() async throws {
    let behaviour = try Behaviour("judge-yes")
    let reward = try judge(behaviour) { $0.score = "yes-probability" }
    let value = try #require(try await reward.score(flat([9]), prompts: captions(1))[0].value)
    let (yes, no) = (exp(-0.5) + exp(-3.0), exp(-2.0) + exp(-4.0))
    #expect(abs(value - yes / (yes + no)) < 1e-12)
    let last = try #require(try await behaviour.statistics().last)
    #expect("\(last["logprobs"]!)" == "bool(true)" && "\(last["top_logprobs"]!)" == "int(20)")
    #expect("\(last["max_tokens"]!)" == "int(1)")
    let no1 = try await judge(Behaviour("judge-only-no")) { $0.score = "yes-probability" }
      .score(flat([9]), prompts: captions(1))
    #expect(no1 == [RewardScore(value: 0)])
  }

  @Test(
    "without Yes or No there is no probability",
    arguments: [
      ("judge-neither", "neither Yes nor No but: The It"), ("judge-no-logprobs", "no top_logprobs"),
      ("judge-nonsense", "probabilities sum to"),
    ])
  func neither(how: String, expected: String) async throws {
    let reward = try judge(Behaviour(how)) { $0.score = "yes-probability" }
    let score = try await reward.score(flat([9]), prompts: captions(1))[0]
    #expect(score.value == nil && score.failure?.contains(expected) == true, "\(score)")
  }

  @Test("settings that cannot be are refused when the reward is made")
  func badSettings() throws {
    func message(_ change: (inout RewardSettings) -> Void) -> String {
      var settings = RewardSettings(name: "judge")
      (settings.url, settings.model) = ("http://127.0.0.1:1", "m")
      change(&settings)
      let error = #expect(throws: RewardError.self) { try RewardFactory.make(settings) }
      return "\(error!)"
    }
    #expect(message { $0.model = nil }.contains("judge needs model: the model's name on the server"))
    #expect(message { $0.pattern = "(" } == "rewards: judge pattern: expected a regular expression, got (")
    #expect(message { $0.pattern = "\\d" }.contains("with a group (…) around the number, got \\d"))
    #expect(message { $0.template = " \n" }.contains("judge template: expected a question"))
    #expect(message { $0.scale = 0 } == "rewards: judge scale: expected a number above 0, got 0.0")
    #expect(message { $0.batch = 4 }.contains("judge reads no batch"))
    #expect(
      message {
        $0.score = "yes-probability"
        $0.pattern = "(x)"
      }.contains("judge pattern: expected none beside score: yes-probability"))
    #expect(message { $0.score = "beauty" }.contains("known: pattern, yes-probability"))
  }

  @Test("addresses with and without /v1")
  func addresses() throws {
    var settings = RewardSettings(name: "judge")
    settings.model = "m"
    for base in ["http://h", "http://h/", "http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"] {
      let wire = try JudgeWire(Endpoint(base, reward: ""), settings)
      #expect(
        wire.endpoint.url == "http://h/v1/chat/completions" && wire.greeting.url == "http://h/v1/models")
    }
  }
}
