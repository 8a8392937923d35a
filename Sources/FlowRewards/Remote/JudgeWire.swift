import Foundation
import Pictures

extension RewardKind {
  /// A vision-language model that is asked about each image.
  static let judge = RewardKind(
    "judge", keys: [.url, .model, .template, .pattern, .scale, .concurrency, .tokenVariable],
    scores: JudgeWire.Score.allCases.map(\.rawValue)
  ) { settings, _ in
    try RemoteReward(settings) { try JudgeWire($0, settings) }
  }
}

/// An OpenAI-compatible chat endpoint with vision, as vLLM, SGLang and llama.cpp serve it: one image a request.
///
/// `pattern` reads a number from the answer, by default UnifiedReward's `Final Score: x` of 5
/// (yifan123/flow_grpo@ac4c86e flow_grpo/rewards.py). `yes-probability` is P(Yes) / (P(Yes) + P(No)) for the first token
/// (X-GenGroup/Flow-Factory@a0b2bc5 src/flow_factory/rewards/vllm_evaluate.py, canonical form); where neither word is
/// likely there is no score, not 0.
struct JudgeWire: RewardWire {
  enum Score: String, CaseIterable, Sendable {
    case pattern
    case yesProbability = "yes-probability"
  }

  static let batch = 1
  /// Tokens of an answer that is read, which bounds what a model that does not stop costs.
  static let longestAnswer = 1024
  static let usualPattern = #"Final Score:\s*([1-5](?:\.\d+)?)"#
  static let usualScale = 5.0

  static func usualTemplate(_ score: Score) -> String {
    switch score {
    case .pattern:
      """
      This image was generated for the caption: [{prompt}]

      Judge two things. Does the image show everything that the caption names, as the caption describes it: objects, \
      numbers, colours, positions, written words? And is it a good picture: sharp, detailed, natural, without \
      distortions? Explain your judgement in a few sentences. Then end with one line "Final Score: x", where x is a \
      number from 1 (bad) to 5 (perfect).
      """
    case .yesProbability:
      """
      This image was generated for the caption: [{prompt}]

      Does it show everything that the caption names, as the caption describes it, and without visible flaws? Answer \
      Yes or No.
      """
    }
  }

  let endpoint, greeting: Endpoint
  let contentType = "application/json"
  let model: String
  let score: Score
  let template: String
  let pattern: NSRegularExpression
  let scale: Double

  var start: String { "e.g. vllm serve \(model)" }

  /// - Parameter base: the server, its `/v1`, or the whole address of its chat completions.
  init(_ base: Endpoint, _ settings: RewardSettings) throws(RewardError) {
    let name = settings.name
    var root = base.path
    if root.hasSuffix("/chat/completions") {
      root = String(root.dropLast(17))
    } else if !root.hasSuffix("/v1") {
      root += "/v1"
    }
    (endpoint, greeting) = (base.at(root + "/chat/completions"), base.at(root + "/models"))
    guard let model = settings.model, !model.isEmpty else {
      throw .missingKey(
        reward: name, key: "model", wanted: "the model's name on the server; GET /v1/models lists them")
    }
    self.model = model
    score = settings.score.flatMap(Score.init) ?? .pattern
    template = settings.template ?? Self.usualTemplate(score)
    func bad(_ key: String, _ expected: String, _ got: String) -> RewardError {
      .badValue(reward: name, key: key, expected: expected, got: got)
    }
    guard template.contains(where: { !$0.isWhitespace }) else {
      throw bad("template", "a question, with {prompt} for the caption", "nothing")
    }
    if score == .yesProbability {
      if let pattern = settings.pattern {
        throw bad("pattern", "none beside score: yes-probability", pattern)
      }
      if let scale = settings.scale { throw bad("scale", "none beside score: yes-probability", "\(scale)") }
    }
    let text = settings.pattern ?? Self.usualPattern
    guard let pattern = try? NSRegularExpression(pattern: text) else {
      throw bad("pattern", "a regular expression", text)
    }
    guard pattern.numberOfCaptureGroups > 0 else {
      throw bad("pattern", "a regular expression with a group (…) around the number", text)
    }
    self.pattern = pattern
    scale = settings.scale ?? Self.usualScale
    guard scale > 0, scale.isFinite else { throw bad("scale", "a number above 0", "\(scale)") }
  }

  func encode(_ image: Image) throws -> Data { try image.png() }

  func body(_ items: ArraySlice<RemoteItem>) throws -> Data {
    precondition(items.count == 1, "a judge sees one image at a time")
    let item = items.first!
    let question = template.replacingOccurrences(of: "{prompt}", with: item.prompt.text)
    let request = Request(
      model: model,
      messages: [
        .init(content: [
          .init(
            type: "image_url",
            image_url: .init(url: "data:image/png;base64," + item.image.base64EncodedString())),
          .init(type: "text", text: question),
        ])
      ],
      max_tokens: score == .pattern ? Self.longestAnswer : 1,
      logprobs: score == .yesProbability ? true : nil, top_logprobs: score == .yesProbability ? 20 : nil)
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.withoutEscapingSlashes, .sortedKeys]
    return try encoder.encode(request)
  }

  func scores(_ answer: Data, count: Int, quote: Quotation) throws(WireFailure) -> [RewardScore] {
    guard let choice = (try? JSONDecoder().decode(Answer.self, from: answer))?.choices.first else {
      throw WireFailure(reason: "expected a chat completion, got \(quote(answer))")
    }
    switch score {
    case .pattern: return [score(choice, quote)]
    case .yesProbability: return [Self.yesProbability(choice, quote)]
    }
  }

  private func score(_ choice: Answer.Choice, _ quote: Quotation) -> RewardScore {
    func none(_ reason: String) -> RewardScore { RewardScore(value: nil, failure: reason) }
    guard let text = choice.message.content else { return none("the judge's answer has no text") }
    let start = quote(text, limit: 80)
    let cut = choice.finish_reason == "length" ? " (cut off after \(Self.longestAnswer) tokens)" : ""
    guard let match = pattern.firstMatch(in: text, range: NSRange(text.startIndex..., in: text)),
      let range = Range(match.range(at: 1), in: text)
    else { return none("the judge's answer does not match the pattern\(cut): \(start)") }
    guard let value = Double(text[range]), value.isFinite else {
      return none("the judge's score \"\(quote(String(text[range]), limit: 80))\" is not a number: \(start)")
    }
    return RewardScore(value: value / scale)
  }

  private static func yesProbability(_ choice: Answer.Choice, _ quote: Quotation) -> RewardScore {
    guard let likely = choice.logprobs?.content?.first?.top_logprobs, !likely.isEmpty else {
      return RewardScore(value: nil, failure: "the judge's answer has no top_logprobs")
    }
    func probability(_ word: String) -> Double {
      likely.reduce(0) { sum, entry in
        // Some servers show the tokenizer's own signs for a space, which are no whitespace.
        let token = entry.token.filter { !$0.isWhitespace && $0 != "\u{2581}" && $0 != "\u{0120}" }
          .lowercased()
        // A log-probability above 0 is rounding, or nonsense that the sum below shows.
        return token == word ? sum + exp(entry.logprob) : sum
      }
    }
    let (yes, no) = (probability("yes"), probability("no"))
    guard yes + no > 0, yes + no < 1.01 else {
      let text = quote(likely.prefix(5).map(\.token).joined(separator: " "), limit: 80)
      return RewardScore(
        value: nil,
        failure: yes + no > 0
          ? "the judge's probabilities sum to \(yes + no)" : "the judge says neither Yes nor No but: \(text)")
    }
    return RewardScore(value: yes / (yes + no))
  }

  // Names as in the format.
  // swift-format-ignore: AlwaysUseLowerCamelCase
  private struct Request: Encodable {
    struct Message: Encodable {
      var role = "user"
      var content: [Part]
    }
    struct Part: Encodable {
      struct Address: Encodable { var url: String }
      var type: String
      var text: String?
      var image_url: Address?
    }
    var model: String
    var messages: [Message]
    var temperature = 0
    var max_tokens: Int
    var logprobs: Bool?
    var top_logprobs: Int?
  }

  // swift-format-ignore: AlwaysUseLowerCamelCase
  private struct Answer: Decodable {
    struct Choice: Decodable {
      struct Message: Decodable { var content: String? }
      struct LogProbs: Decodable {
        struct Position: Decodable { var top_logprobs: [Entry] }
        struct Entry: Decodable {
          var token: String
          var logprob: Double
        }
        var content: [Position]?
      }
      var message: Message
      var finish_reason: String?
      var logprobs: LogProbs?
    }
    var choices: [Choice]
  }
}
