import Foundation
import Pictures

extension RewardKind {
  /// A reward server that speaks JSON.
  static let http = RewardKind("http", keys: [.url, .batch, .concurrency, .tokenVariable]) { settings, _ in
    try RemoteReward(settings) { JSONWire($0, reward: settings.name) }
  }
}

/// Flow-Factory's reward server: `GET /health`, `POST /compute`.
///
/// Source of the format: X-GenGroup/Flow-Factory@a0b2bc5 reward_server/example_server.py and
/// src/flow_factory/rewards/my_reward_remote.py. Additions, which that server ignores or does not send: `metadata` in
/// the request, and in the answer `errors` and null among the rewards.
struct JSONWire: RewardWire {
  static let batch = 16
  let reward: String
  let endpoint, greeting: Endpoint
  let contentType = "application/json"
  let start = "chunkgrpo-rewards, see RewardServer/README.md"

  /// - Parameter base: with or without `/compute`.
  init(_ base: Endpoint, reward: String) {
    self.reward = reward
    let path = base.path.hasSuffix("/compute") ? String(base.path.dropLast(8)) : base.path
    (endpoint, greeting) = (base.at(path + "/compute"), base.at(path + "/health"))
  }

  func check(_ prompts: [RewardPrompt]) throws {
    for prompt in prompts {
      guard let text = prompt.metadata else { continue }
      guard (try? JSONSerialization.jsonObject(with: Data(text.utf8))) is [String: Any] else {
        throw RemoteRewardError.badMetadata(reward: reward, prompt: prompt.text)
      }
    }
  }

  func encode(_ image: Image) throws -> Data { try image.png() }

  func body(_ items: ArraySlice<RemoteItem>) throws -> Data {
    var body = Data(capacity: items.reduce(1 << 12) { $0 + $1.image.count * 4 / 3 + 512 })
    body.append(contentsOf: #"{"prompt":"#.utf8)
    body.append(try JSONEncoder().encode(items.map(\.prompt.text)))
    body.append(contentsOf: #","image":["#.utf8)
    for (index, item) in items.enumerated() {
      body.append(contentsOf: (index == 0 ? "\"" : "\",\"").utf8)
      body.append(item.image.base64EncodedData())
    }
    body.append(contentsOf: #""],"video":null,"condition_images":null,"condition_videos":null"#.utf8)
    if items.contains(where: { $0.prompt.metadata != nil }) {
      let metadata = items.map { $0.prompt.metadata ?? "null" }.joined(separator: ",")
      body.append(contentsOf: #","metadata":[\#(metadata)]"#.utf8)
    }
    body.append(UInt8(ascii: "}"))
    return body
  }

  func scores(_ answer: Data, count: Int, quote: Quotation) throws(WireFailure) -> [RewardScore] {
    let fields: Answer
    do {
      let decoder = JSONDecoder()
      decoder.allowsJSON5 = true  // Python writes NaN, which JSON has no word for
      fields = try decoder.decode(Answer.self, from: answer)
    } catch {
      throw WireFailure(reason: "expected {\"rewards\": […]}, got \(quote(answer))")
    }
    if let error = fields.error { throw WireFailure(reason: "the server says: \(quote(error))") }
    guard let rewards = fields.rewards else {
      throw WireFailure(
        reason: "expected {\"rewards\": […]}, got \(quote(answer))")
    }
    guard rewards.count == count else {
      throw WireFailure(reason: "\(rewards.count) rewards for \(count) images")
    }
    return rewards.enumerated().map { index, reward in
      let error = fields.errors.flatMap { $0.count == count ? $0[index] : nil }
      // A number beside an error is no reward.
      if let error { return RewardScore(value: nil, failure: "the server says: \(quote(error))") }
      return reward.score
    }
  }

  private struct Answer: Decodable {
    var rewards: [LooseNumber]?
    var errors: [String?]?
    var error: String?

    enum CodingKeys: CodingKey { case rewards, errors, error }
    init(from decoder: any Decoder) throws {
      let container = try decoder.container(keyedBy: CodingKeys.self)
      rewards = try? container.decodeIfPresent([LooseNumber].self, forKey: .rewards)
      errors = try? container.decodeIfPresent([String?].self, forKey: .errors)
      // Empty, null or absent: none. FastAPI's own errors come with a status.
      if let text = try? container.decodeIfPresent(String.self, forKey: .error) {
        error = text.isEmpty ? nil : text
      } else if container.contains(.error), try !container.decodeNil(forKey: .error) {
        error = "an error that is no text"
      }
    }
  }
}

/// What stands where a number should.
enum LooseNumber: Decodable, Sendable, Equatable {
  case number(Double)
  case null
  case other

  init(from decoder: any Decoder) throws {
    let container = try decoder.singleValueContainer()
    if container.decodeNil() {
      self = .null
    } else if let number = try? container.decode(Double.self) {
      self = .number(number)
    } else {
      self = .other
    }
  }

  /// The score, or why it is none.
  var score: RewardScore {
    switch self {
    case .number(let value) where value.isFinite: RewardScore(value: value)
    case .number(let value): RewardScore(value: nil, failure: "the server's score is \(value)")
    case .null: RewardScore(value: nil, failure: "the server has no score")
    case .other: RewardScore(value: nil, failure: "the server's score is not a number")
    }
  }
}
