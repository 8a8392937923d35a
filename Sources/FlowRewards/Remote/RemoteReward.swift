import Foundation
import Pictures
import Synchronization
import Torch

/// How images and prompts are put into a request, and scores read from the answer.
protocol RewardWire: Sendable {
  /// Where requests are posted.
  var endpoint: Endpoint { get }
  /// Of the body of a request.
  var contentType: String { get }
  /// Images of one request where the configuration does not say.
  static var batch: Int { get }
  /// What answers a GET if anything does.
  var greeting: Endpoint { get }
  /// The command that starts a server, for whoever has none.
  var start: String { get }
  /// See ``Reward/probe``.
  var probe: RewardProbe { get }
  /// See ``Reward/check(_:)``.
  func check(_ prompts: [RewardPrompt]) throws
  /// An image as the server reads it.
  func encode(_ image: Image) throws -> Data
  /// The request's body.
  func body(_ items: ArraySlice<RemoteItem>) throws -> Data
  /// The scores in an answer to a request for `count` images, as many; `quote` is for what is said of the answer.
  func scores(_ answer: Data, count: Int, quote: Quotation) throws(WireFailure) -> [RewardScore]
}

extension RewardWire {
  var probe: RewardProbe { .sign }
  func check(_ prompts: [RewardPrompt]) throws {}
}

/// An image, encoded, with its prompt.
struct RemoteItem: Sendable {
  var image: Data
  var prompt: RewardPrompt
}

/// An answer that holds no scores; none of its images has one.
struct WireFailure: Error, Equatable {
  var reason: String
}

/// A reward that a server computes.
///
/// Images go out in batches, a few requests at once. What fails for a reason that may pass is repeated; a batch that is
/// too large for the server, or that it keeps failing at, is halved, so that one bad image costs one score. What remains
/// without an answer is a score without value.
final class RemoteReward<Wire: RewardWire>: Reward {
  let name: String
  let wire: Wire
  private let client: HTTPClient
  private let policy: RetryPolicy
  private let concurrency: Int
  private let quote: Quotation
  /// Images of one request: what was asked for, or less once the server has refused that much.
  private let batch: Mutex<Int>
  private let requests = Atomic<UInt64>(0)

  /// - Throws: ``RewardError`` for bad settings, ``RemoteRewardError`` for a token that is not there.
  init(
    _ settings: RewardSettings, environment: [String: String] = ProcessInfo.processInfo.environment,
    firstPause: Double = 0.5, wire: (Endpoint) throws -> Wire
  ) throws {
    name = settings.name
    func require(_ holds: Bool, _ key: String, _ expected: String, _ got: Any) throws(RewardError) {
      if !holds { throw .badValue(reward: settings.name, key: key, expected: expected, got: "\(got)") }
    }
    guard let url = settings.url else {
      throw RewardError.missingKey(
        reward: name, key: "url", wanted: "the server's address, e.g. http://127.0.0.1:8000")
    }
    self.wire = try wire(Endpoint(url, reward: name))
    let batch = settings.batch ?? Wire.batch
    try require(batch >= 1, "batch", "1 or more", batch)
    self.batch = Mutex(batch)
    concurrency = settings.concurrency ?? 4
    try require(1...256 ~= concurrency, "concurrency", "1 to 256", concurrency)
    let failure = settings.failure
    try require(
      failure.timeout > 0 && failure.timeout.isFinite, "failure.timeout", "seconds above 0", failure.timeout)
    try require(failure.retries >= 0, "failure.retries", "0 or more", failure.retries)
    var options = HTTPClient.Options()
    options.concurrency = concurrency
    options.timeout = failure.timeout
    options.certificates = HTTPClient.Options.certificates(environment)
    options.token = try settings.tokenVariable.map { try Self.token($0, environment, reward: settings.name) }
    quote = Quotation(token: options.token)
    client = try HTTPClient(options)
    // Two runs that ask one server differ in this.
    let seed = UInt64(bitPattern: Int64(ProcessInfo.processInfo.processIdentifier))
    policy = RetryPolicy(retries: failure.retries, firstPause: firstPause, seed: seed)
  }

  private static func token(
    _ variable: String, _ environment: [String: String], reward: String
  ) throws(RemoteRewardError) -> String {
    guard let token = environment[variable], !token.isEmpty else {
      throw .noToken(reward: reward, variable: variable)
    }
    // RFC 6750 allows fewer characters; these cannot end the header.
    guard token.utf8.allSatisfy({ 33...126 ~= $0 }) else {
      throw .badToken(reward: reward, variable: variable)
    }
    return token
  }

  var probe: RewardProbe { wire.probe }
  func check(_ prompts: [RewardPrompt]) throws { try wire.check(prompts) }

  /// Asks the server for a sign of life.
  ///
  /// - Throws: ``RemoteRewardError/serverAbsent(reward:address:tried:times:reason:start:)``.
  func prepare() async throws {
    let (answer, repeats) = try await ask(HTTPRequest(endpoint: wire.greeting), retries: policy.retries)
    guard case .failure(let failure) = answer else { return }
    // A server that speaks but knows no such address: the probe will tell the rest.
    if let code = failure.code, [404, 405, 501].contains(code) { return }
    throw RemoteRewardError.serverAbsent(
      reward: name, address: wire.endpoint.shown,
      tried: "GET \(wire.greeting.path.isEmpty ? "/" : wire.greeting.path)",
      times: repeats + 1,
      reason: "\(failure)", start: wire.start)
  }

  func score(_ images: Tensor, prompts: [RewardPrompt]) async throws -> [RewardScore] {
    try checkImages(images, for: name, prompts: prompts.count)
    try check(prompts)
    let pixels = try images.to(.cpu)  // once, not image by image
    let total = prompts.count
    var scores = [RewardScore?](repeating: nil, count: total)
    try await withThrowingTaskGroup(of: (Range<Int>, [RewardScore]).self) { group in
      var next = 0
      // Images are encoded when it is their turn, so that few encodings are held at once.
      func add() {
        guard next < total else { return }
        let range = next..<min(total, next + batch.withLock { $0 })
        next = range.upperBound
        group.addTask { (range, try await self.score(pixels, prompts, range)) }
      }
      for _ in 0..<concurrency { add() }
      while let (range, part) = try await group.next() {
        for (index, score) in zip(range, part) { scores[index] = score }
        add()
      }
    }
    return scores.map { $0! }
  }

  private func score(
    _ pixels: Tensor, _ prompts: [RewardPrompt], _ range: Range<Int>
  ) async throws -> [RewardScore] {
    var items: [RemoteItem] = []
    var scores = [RewardScore](
      repeating: RewardScore(value: nil, failure: "the image has pixels that are infinite or NaN"),
      count: range.count)
    var places: [Int] = []
    let (height, width) = (pixels.size(2), pixels.size(3))
    for index in range {
      try Task.checkCancellation()
      let planes = try pixels[index].floats()
      guard planes.allSatisfy(\.isFinite) else { continue }
      let image = try Image(planar: planes, width: width, height: height)
      items.append(RemoteItem(image: try wire.encode(image), prompt: prompts[index]))
      places.append(index - range.lowerBound)
    }
    guard !items.isEmpty else { return scores }
    let answers = try await score(items[...], retries: policy.retries, spent: 0)
    for (place, answer) in zip(places, answers) { scores[place] = answer }
    return scores
  }

  /// Scores of `items`, halved where that may help.
  private func score(
    _ items: ArraySlice<RemoteItem>, retries: Int, spent: Int
  ) async throws -> [RewardScore] {
    let request = HTTPRequest(
      endpoint: wire.endpoint, contentType: wire.contentType, body: try wire.body(items))
    let (answer, repeats) = try await ask(request, retries: retries)
    let spent = spent + repeats
    func none(_ reason: String) -> [RewardScore] {
      Array(repeating: RewardScore(value: nil, failure: reason, retries: spent), count: items.count)
    }
    switch answer {
    case .success(let data):
      do throws(WireFailure) {
        var scores = try wire.scores(data, count: items.count, quote: quote)
        for index in scores.indices { scores[index].retries = spent }
        return scores
      } catch {
        return none("\(wire.endpoint.shown): \(error.reason)")
      }
    case .failure(let failure) where items.count > 1 && [413, 500].contains(failure.code):
      let half = items.count / 2
      // The batch failed every time: the server is not flaky, an image is bad. Its halves get one repetition.
      let retries = failure.code == 413 ? retries : min(retries, 1)
      if failure.code == 413 { batch.withLock { $0 = min($0, half) } }
      let middle = items.startIndex + half
      async let first = score(items[..<middle], retries: retries, spent: spent)
      async let second = score(items[middle...], retries: retries, spent: spent)
      return try await first + second
    case .failure(let failure):
      return none(repeats == 0 ? "\(failure)" : "\(failure) (tried \(repeats + 1) times)")
    }
  }

  /// Sends `request` until it succeeds, fails for good, or has been repeated `retries` times.
  private func ask(
    _ request: HTTPRequest, retries: Int
  ) async throws -> (Result<Data, HTTPFailure>, repeats: Int) {
    let number = requests.wrappingAdd(1, ordering: .relaxed).newValue
    var repeats = 0
    while true {
      do {
        return (.success(try await client.send(request)), repeats)
      } catch let failure as HTTPFailure {
        guard repeats < retries, policy.repeats(failure) else { return (.failure(failure), repeats) }
        repeats += 1
        try await Task.sleep(for: .seconds(policy.pause(before: repeats, of: number, after: failure)))
      }
    }
  }
}

/// Why a server's reward cannot be asked at all.
public enum RemoteRewardError: Error, CustomStringConvertible, Sendable, Equatable {
  /// Nobody answers at the address.
  case serverAbsent(
    reward: String, address: String, tried: String, times: Int, reason: String, start: String)
  /// The environment variable of the token is not set.
  case noToken(reward: String, variable: String)
  /// The environment variable holds what cannot be a token.
  case badToken(reward: String, variable: String)
  /// A prompt without the metadata that the server wants.
  case noMetadata(reward: String, score: String, prompt: String)
  /// Metadata that is no JSON object.
  case badMetadata(reward: String, prompt: String)

  /// What, where, expected, got, and the way out.
  public var description: String {
    switch self {
    case .serverAbsent(let reward, let address, let tried, let times, let reason, let start):
      "rewards: \(reward): no server at \(address): tried \(tried) \(times == 1 ? "once" : "\(times) times"), last: "
        + "\(reason); start one (\(start)) or change url"
    case .noToken(let reward, let variable):
      "rewards: \(reward) tokenVariable: environment variable \(variable) is not set; export it or drop tokenVariable"
    case .badToken(let reward, let variable):
      "rewards: \(reward) tokenVariable: \(variable) holds spaces, line breaks or other characters that no token has"
    case .noMetadata(let reward, let score, let prompt):
      "rewards: \(reward) \(score): prompt \"\(prompt)\" has no metadata; give prompts as JSON lines as GenEval does"
    case .badMetadata(let reward, let prompt):
      "rewards: \(reward): metadata of prompt \"\(prompt)\" is not a JSON object"
    }
  }
}
