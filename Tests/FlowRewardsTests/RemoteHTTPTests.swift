import Foundation
import Testing
import Torch

@testable import FlowRewards

/// Values and failures of images with these reds.
private func ask(
  _ reward: any Reward, _ reds: [Int], prompts: [RewardPrompt]? = nil
) async throws -> [RewardScore] {
  try await reward.score(flat(reds), prompts: prompts ?? captions(reds.count))
}

@Suite("Remote rewards over JSON")
struct RemoteHTTPTests {
  /// Oracle: the server decodes each PNG and answers with its first pixel.
  @Test("scores come back in the order of the images, whatever the batches")
  func order() async throws {
    let behaviour = try Behaviour("slow")
    let reward = try RewardFactory.make(
      behaviour.settings("http") {
        $0.batch = 3
        $0.concurrency = 3
      })
    let reds = (0..<32).map { ($0 * 37 + 11) % 256 }
    let scores = try await ask(reward, reds)
    #expect(scores == reds.map { RewardScore(value: level($0)) })
    let statistics = try await behaviour.statistics()
    #expect(statistics.sizes.sorted() == [2] + Array(repeating: 3, count: 10))
    #expect(statistics.most <= 3 && statistics.most >= 2 && statistics.connections <= 3)
    #expect(try await reward.score(Tensor.zeros([0, 3, 8, 8]), prompts: []) == [])
  }

  /// Oracle: nearest rounding by hand; truncation would give 100, 100 and 254.
  @Test("pixels are rounded to the nearest level")
  func rounding() async throws {
    let reward = try RewardFactory.make(try Behaviour("good").settings("http"))
    let levels = [100.4, 100.6, 254.9, -3, 300]
    let images = try Tensor.cat(levels.map { try Tensor.full([1, 3, 8, 8], $0 / 255) })
    let scores = try await reward.score(images, prompts: captions(5))
    #expect(scores.map(\.value) == [100, 101, 255, 0, 255].map(level))
  }

  @Test("the request holds Flow-Factory's fields, and metadata where a prompt has some")
  func fields() async throws {
    let behaviour = try Behaviour("good")
    let reward = try RewardFactory.make(behaviour.settings("http"))
    let prompts = [
      RewardPrompt(text: "a \"quoted\" sign\n\u{1F600} \\"),
      RewardPrompt(text: "two", metadata: #"{"prompt": "two", "count": 2}"#),
    ]
    _ = try await ask(reward, [1, 2], prompts: prompts)
    let last = try #require(try await behaviour.statistics().last)
    #expect("\(last["prompt"]!)" == "\(PickleValue.list(prompts.map { .string($0.text) }))")
    #expect(
      "\(last["metadata"]!)"
        == "\(PickleValue.list([.none, .dictionary([(.string("count"), .int(2)), (.string("prompt"), .string("two"))])]))"
    )
    for key in ["video", "condition_images", "condition_videos"] { #expect("\(last[key]!)" == "none") }
    #expect(try await behaviour.statistics().path.hasSuffix("/compute"))
    #expect(throws: RemoteRewardError.badMetadata(reward: "http", prompt: "x")) {
      try reward.check([RewardPrompt(text: "x", metadata: "[1]")])
    }
  }

  @Test(
    "failures that pass are repeated and counted",
    arguments: [("500-twice", 2), ("hang-once", 1), ("busy-once", 1)])
  func retries(how: String, count: Int) async throws {
    let behaviour = try Behaviour(how)
    let reward = try RewardFactory.make(behaviour.settings("http"))
    let took = try await seconds {
      let scores = try await ask(reward, [10, 20])
      #expect(scores == [10, 20].map { RewardScore(value: level($0), retries: count) })
    }
    #expect(try await behaviour.statistics().requests == count + 1)
    if how == "busy-once" { #expect(took >= 1) }  // it said so
  }

  @Test(
    "failures that stay are no numbers, after as many tries as allowed",
    arguments: [
      ("hang-mid-body", 3, "connection broken"), ("always-503", 3, "status 503: loading (tried 3 times)"),
      ("bad-request", 1, "status 400: your token is absent xxx"),
      ("garbage", 1, "got <html>It works!</html>"),
      ("no-rewards", 1, "expected {\"rewards\": […]}"), ("wrong-length", 1, "1 rewards for 2 images"),
      ("echo-error", 1, "the server says: token absent"), ("never", 3, "timed out after 0.3 s"),
      ("moved", 1, "redirects are not followed"),
    ])
  func failures(how: String, requests: Int, expected: String) async throws {
    let behaviour = try Behaviour(how)
    let settings = behaviour.settings("http") {
      $0.failure.retries = 2
      if how == "never" { $0.failure.timeout = 0.3 }
    }
    let reward = try RemoteReward(settings, firstPause: 0.05) { JSONWire($0, reward: "http") }
    for score in try await ask(reward, [10, 20]) {
      #expect(score.value == nil && score.retries == requests - 1)
      let text = try #require(score.failure)
      #expect(text.contains(expected) && text.contains(behaviour.url), "\(text)")
      #expect(text.count < 400)
    }
    #expect(try await behaviour.statistics().requests == requests)
  }

  @Test("an answer that is no number costs its own image only")
  func notNumbers() async throws {
    let reward = try RewardFactory.make(try Behaviour("nan").settings("http"))
    let scores = try await ask(reward, Array(1...7))
    #expect(scores.map(\.value) == [0.5, nil, nil, nil, nil, nil, nil])
    #expect(
      scores.map(\.failure) == [
        nil, "the server's score is nan", "the server's score is -inf", "the server has no score",
        "the server's score is not a number", "the server's score is not a number",
        "the server's score is not a number",
      ])
    let errors = try RewardFactory.make(try Behaviour("errors").settings("http"))
    #expect(
      try await ask(errors, [1, 2, 3]) == [
        RewardScore(value: 0.5), RewardScore(value: nil, failure: "the server says: no face found"),
        RewardScore(value: nil, failure: "the server says: too dark"),
      ])
  }

  @Test("an image of NaN is not sent")
  func brokenImage() async throws {
    let behaviour = try Behaviour("good")
    let reward = try RewardFactory.make(behaviour.settings("http"))
    let images = try Tensor.cat([flat([5]), Tensor.full([1, 3, 8, 8], .nan), flat([6])])
    let scores = try await reward.score(images, prompts: captions(3))
    #expect(scores.map(\.value) == [level(5), nil, level(6)])
    #expect(scores[1].failure == "the image has pixels that are infinite or NaN")
    #expect(try await behaviour.statistics().sizes == [2])
    _ = try await reward.score(Tensor.full([1, 3, 8, 8], .nan), prompts: captions(1))
    #expect(try await behaviour.statistics().requests == 1)
  }

  @Test("a batch that is too large is halved, and smaller ones are sent from then on")
  func tooLarge() async throws {
    let behaviour = try Behaviour("413-above-2")
    let reward = try RewardFactory.make(
      behaviour.settings("http") {
        $0.batch = 8
        $0.concurrency = 1
      })
    let reds = Array(1...16)
    #expect(try await ask(reward, reds) == reds.map { RewardScore(value: level($0)) })
    // 8, 4 + 4, four of 2; then what was learned.
    #expect(try await behaviour.statistics().sizes.sorted() == [2, 2, 2, 2, 2, 2, 2, 2, 4, 4, 8])
  }

  @Test("one bad image masks only itself")
  func oneBadImage() async throws {
    let behaviour = try Behaviour("one-bad-image")
    let settings = behaviour.settings("http") { $0.failure.retries = 1 }
    let reward = try RemoteReward(settings, firstPause: 0.02) { JSONWire($0, reward: "http") }
    let reds = [9, 8, 7, 6, 5, 0, 4, 3, 2, 1]
    let scores = try await ask(reward, reds)
    #expect(scores.map(\.value) == reds.map { $0 == 0 ? nil : level($0) })
    #expect(scores[5].failure?.contains("status 500: an image is black") == true)
    // Of its ancestors and itself (10, 5, 2 of 5, 1), each was repeated once.
    #expect(scores[5].retries >= 3 && scores[0].retries == 1)
  }

  @Test("cancelling the scoring ends it")
  func cancellation() async throws {
    let behaviour = try Behaviour("never")
    let reward = try RewardFactory.make(behaviour.settings("http") { $0.failure.timeout = 900 })
    let images = try flat([1, 2])
    let task = Task { try await reward.score(images, prompts: captions(2)) }
    try await Task.sleep(for: .milliseconds(300))
    task.cancel()
    // Not ended, it would answer with scores that failed.
    await #expect(throws: CancellationError.self) { try await task.value }
  }

  @Test("before the probe the server is looked for")
  func prepare() async throws {
    try await RewardFactory.make(try Behaviour("good").settings("http")).prepare()
    // A server that knows no such address is one nevertheless.
    for name in ["judge", "pickle"] {
      try await RewardFactory.make(
        try Behaviour("good").settings(name) { $0.model = name == "judge" ? "m" : nil }
      )
      .prepare()
    }
    var settings = RewardSettings(name: "http")
    settings.url = "http://127.0.0.1:1"
    settings.failure.retries = 3
    let absent = try RemoteReward(settings, firstPause: 0.01) { JSONWire($0, reward: "http") }
    let error = await #expect(throws: RemoteRewardError.self) { try await absent.prepare() }
    let text = "\(try #require(error))"
    for part in [
      "http: no server at http://127.0.0.1:1/compute", "tried GET /health 4 times, last: ", "cannot connect",
      "chunkgrpo-rewards, see RewardServer/README.md", "change url",
    ] { #expect(text.contains(part), "\(text)") }
    let sick = try Behaviour("sick").settings("http") { $0.failure.retries = 0 }
    let other = await #expect(throws: RemoteRewardError.self) { try await RewardFactory.make(sick).prepare() }
    #expect("\(try #require(other))".contains("tried GET /sick"), "\(other!)")
    #expect("\(try #require(other))".contains("status 503: the model is not loaded"))
  }

  @Test("the token goes to the server and into no message", arguments: ["bad-request", "echo-error"])
  func token(how: String) async throws {
    let behaviour = try Behaviour(how)
    let settings = behaviour.settings("http") { $0.tokenVariable = "REWARD_TOKEN" }
    let secret = "s3cr3t-t0ken/+="
    let reward = try RemoteReward(settings, environment: ["REWARD_TOKEN": secret]) {
      JSONWire($0, reward: "http")
    }
    let failure = try #require(try await ask(reward, [1])[0].failure)
    #expect(failure.contains("Bearer …") && !failure.contains("s3cr3t"), "\(failure)")
    #expect(try await behaviour.statistics().headers["Authorization"] == "Bearer \(secret)")
    func make(_ environment: [String: String]) throws {
      _ = try RemoteReward(settings, environment: environment) { JSONWire($0, reward: "http") }
    }
    #expect(throws: RemoteRewardError.noToken(reward: "http", variable: "REWARD_TOKEN")) { try make([:]) }
    #expect(throws: RemoteRewardError.badToken(reward: "http", variable: "REWARD_TOKEN")) {
      try make(["REWARD_TOKEN": "a\r\nX-Other: b"])
    }
  }

  @Test(
    "addresses that are none",
    arguments: [
      "localhost:8000", "127.0.0.1:8000", "ftp://host/x", "file:///etc/passwd", "http://", "http:///x", "",
      "host",
      "http://host:0", "http://host:70000", "http://a b/", "http://host/#part",
    ])
  func badAddresses(url: String) {
    var settings = RewardSettings(name: "http")
    settings.url = url
    let error = #expect(throws: RewardError.self) { try RewardFactory.make(settings) }
    #expect(
      "\(error!)".contains("http url: expected an address") && "\(error!)".hasSuffix("got \"\(url)\""),
      "\(error!)")
  }

  @Test("addresses are completed, and shown without what may be secret")
  func addresses() throws {
    for base in ["http://h:1", "http://h:1/", "http://h:1/compute", "http://h:1/compute/"] {
      let wire = JSONWire(try Endpoint(base, reward: ""), reward: "")
      #expect(wire.endpoint.url == "http://h:1/compute" && wire.greeting.url == "http://h:1/health")
    }
    let wire = JSONWire(try Endpoint("https://h/a/b?key=secret", reward: ""), reward: "")
    #expect(wire.endpoint.url == "https://h/a/b/compute?key=secret")
    #expect(wire.endpoint.shown == "https://h/a/b/compute")
    #expect(try Endpoint("http://h", reward: "").url == "http://h/")
    for (host, isLoopback) in [
      ("localhost", true), ("127.0.0.1", true), ("[::1]", true), ("example.org", false), ("10.0.0.1", false),
    ] { #expect(try Endpoint("http://\(host):80/", reward: "").isLoopback == isLoopback, "\(host)") }
    for url in ["http://me:hunter2@h/", "ftp://me:hunter2@h/"] {
      let error = #expect(throws: RewardError.self) { try Endpoint(url, reward: "http") }
      #expect(!"\(error!)".contains("hunter2"))
    }
  }

  @Test("settings that cannot be are refused when the reward is made")
  func badSettings() throws {
    func message(_ change: (inout RewardSettings) -> Void) -> String {
      var settings = RewardSettings(name: "http")
      settings.url = "http://127.0.0.1:1"
      change(&settings)
      let error = #expect(throws: RewardError.self) { try RewardFactory.make(settings) }
      return "\(error!)"
    }
    #expect(
      message { $0.url = nil } == "rewards: http needs url: the server's address, e.g. http://127.0.0.1:8000")
    #expect(message { $0.batch = 0 } == "rewards: http batch: expected 1 or more, got 0")
    #expect(message { $0.concurrency = 1000 } == "rewards: http concurrency: expected 1 to 256, got 1000")
    #expect(message { $0.failure.timeout = .nan }.contains("failure.timeout: expected seconds above 0"))
    #expect(message { $0.failure.retries = -1 }.contains("failure.retries: expected 0 or more, got -1"))
    #expect(message { $0.template = "x" }.contains("http reads no template"))
  }
}
