import Foundation
import Pictures

extension RewardKind {
  /// A reward server of flow_grpo.
  static let pickle = RewardKind(
    "pickle", keys: [.url, .batch, .concurrency, .tokenVariable],
    scores: PickleWire.Score.allCases.map(\.rawValue)
  ) { settings, _ in
    try RemoteReward(settings) {
      PickleWire($0, reward: settings.name, score: settings.score.flatMap(PickleWire.Score.init) ?? .geneval)
    }
  }
}

/// The servers that flow_grpo asks: a pickle each way.
///
/// Source of the format: yifan123/flow_grpo@ac4c86e flow_grpo/rewards.py#L112-L283.
struct PickleWire: RewardWire {
  enum Score: String, CaseIterable, Sendable {
    case geneval
    case genevalStrict = "geneval-strict"
    case deqa, unifiedreward
  }

  static let batch = 64
  static let jpegQuality = 95
  let reward: String
  let endpoint: Endpoint
  let contentType = "application/octet-stream"
  let score: Score

  var greeting: Endpoint { endpoint }
  var start: String { "the reward-server repository of flow_grpo's author has those for GenEval and DeQA" }

  init(_ endpoint: Endpoint, reward: String, score: Score) {
    (self.endpoint, self.reward, self.score) = (endpoint, reward, score)
  }

  private var wantsMetadata: Bool { score == .geneval || score == .genevalStrict }

  func check(_ prompts: [RewardPrompt]) throws {
    if wantsMetadata { for prompt in prompts { _ = try metadata(prompt) } }
  }

  private func metadata(_ prompt: RewardPrompt) throws(RemoteRewardError) -> PickleValue {
    guard let text = prompt.metadata else {
      throw .noMetadata(reward: reward, score: score.rawValue, prompt: prompt.text)
    }
    guard let value = try? JSONDecoder().decode(PickleValue.self, from: Data(text.utf8)),
      case .dictionary = value
    else { throw .badMetadata(reward: reward, prompt: prompt.text) }
    return value
  }

  func encode(_ image: Image) throws -> Data { try image.jpeg(quality: Self.jpegQuality) }

  func body(_ items: ArraySlice<RemoteItem>) throws -> Data {
    var fields: [(PickleValue, PickleValue)] = [
      (.string("images"), .list(items.map { .bytes($0.image) }))
    ]
    switch score {
    case .geneval, .genevalStrict:
      fields.append((.string("meta_datas"), .list(try items.map { try metadata($0.prompt) })))
      fields.append((.string("only_strict"), .bool(score == .genevalStrict)))
    case .unifiedreward: fields.append((.string("prompts"), .list(items.map { .string($0.prompt.text) })))
    case .deqa: break
    }
    return PickleWriter.write(.dictionary(fields))
  }

  func scores(_ answer: Data, count: Int, quote: Quotation) throws(WireFailure) -> [RewardScore] {
    let value: PickleValue
    do { value = try PickleReader.read(answer) } catch { throw WireFailure(reason: "\(error)") }
    let key =
      switch score {
      case .geneval: "scores"
      case .genevalStrict: "strict_rewards"
      case .deqa, .unifiedreward: "outputs"
      }
    guard let entry = value[key] else { throw WireFailure(reason: "the answer has no \"\(key)\"") }
    guard let items = entry.items else { throw WireFailure(reason: "\"\(key)\" in the answer is not a list") }
    guard items.count == count else {
      throw WireFailure(reason: "\(items.count) \(key) for \(count) images")
    }
    var scores = items.map(\.number.score)
    if score == .geneval, let strict = value["strict_rewards"]?.items, strict.count == count {
      for (index, item) in strict.enumerated() { scores[index].parts["strict"] = item.number.score.value }
    }
    return scores
  }
}

extension PickleValue {
  /// What stands where a number should.
  var number: LooseNumber {
    switch self {
    case .int(let value): .number(Double(value))
    case .float(let value): .number(value)
    case .none: .null
    default: .other
    }
  }
}
