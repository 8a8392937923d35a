import Foundation
import Testing
import Torch

@testable import FlowRewards

@Suite("HTTP client against a real server")
struct RemoteClientTests {
  /// Oracle: the server's own count.
  @Test("connections are used again, also for large bodies")
  func reuse() async throws {
    let behaviour = try Behaviour("good")
    let client = try HTTPClient(.init())
    var large = try behaviour.request(Array(repeating: 7, count: 40))
    large.body! += Data(repeating: UInt8(ascii: " "), count: 6 << 20)
    let requests = [try behaviour.request(), large, try behaviour.request(), large]
    // Off the pool that other tests block for minutes: a connection that idles so long is rightly given up.
    try await withTaskExecutorPreference(QuestionExecutor.shared) {
      for request in requests { _ = try await client.send(request) }
    }
    let statistics = try await behaviour.statistics()
    #expect(statistics.requests == 4 && statistics.connections == 1)
  }

  @Test("a kept connection that the server closed costs nothing")
  func closedWhileIdle() async throws {
    let behaviour = try Behaviour("close-idle")
    let client = try HTTPClient(.init())
    for _ in 0..<4 {
      _ = try await client.send(behaviour.request())
      try await Task.sleep(for: .milliseconds(50))  // for its FIN to arrive, or not: both must do
    }
    #expect(try await behaviour.statistics().requests == 4)
  }

  /// Oracle: the server's own count of requests in hand.
  @Test("no more requests at once than allowed, and further ones wait without their time running")
  func concurrency() async throws {
    let behaviour = try Behaviour("slow")  // 0.2 s each
    // 16 requests, two at once: the last ones wait for 1.4 s.
    let client = try HTTPClient(.init(concurrency: 2, timeout: 1.2))
    try await withThrowingTaskGroup(of: Void.self) { group in
      for _ in 0..<16 { group.addTask { _ = try await client.send(behaviour.request()) } }
      try await group.waitForAll()
    }
    let statistics = try await behaviour.statistics()
    #expect(statistics.requests == 16 && statistics.most == 2 && statistics.connections == 2)
  }

  @Test(
    "the deadline holds in every phase",
    arguments: [("never", "waiting for the answer"), ("slow-body", "reading")])
  func deadline(how: String, phase: String) async throws {
    let behaviour = try Behaviour(how)
    let client = try HTTPClient(.init(timeout: 0.5))
    let took = try await seconds {
      let error = try await failure { try await client.send(behaviour.request()) }
      #expect("\(error)".contains("timed out after 0.5 s while \(phase)"), "\(error)")
    }
    #expect(took >= 0.5)  // and had it not been cut off, the answer would have come in the end
  }

  @Test("cancelling a task ends its transfer, on the wire or waiting for its turn")
  func cancellation() async throws {
    let behaviour = try Behaviour("never")
    let client = try HTTPClient(.init(concurrency: 1, timeout: 900))
    let tasks = try (0..<3).map { _ in
      let request = try behaviour.request()
      return Task { try await client.send(request) }
    }
    while try await behaviour.server.statistics(behaviour.key).requests == 0 {
      try await Task.sleep(for: .milliseconds(20))
    }
    for task in tasks.reversed() { task.cancel() }
    for task in tasks {
      await #expect(throws: CancellationError.self) { try await task.value }
    }
    #expect(try await behaviour.statistics().requests == 1)
    // Cancelled before it begins.
    let task = Task {
      withUnsafeCurrentTask { $0?.cancel() }
      return try await client.send(behaviour.request())
    }
    await #expect(throws: CancellationError.self) { try await task.value }
  }

  /// Oracle: the server counts what it could send; a gigabyte does not fit into the sockets' buffers.
  @Test("an answer of a gigabyte is cut off", arguments: ["huge", "huge-declared"])
  func huge(how: String) async throws {
    let behaviour = try Behaviour(how)
    let client = try HTTPClient(.init(timeout: 60))
    let error = try await failure { try await client.send(behaviour.request()) }
    #expect("\(error)".hasSuffix("answer larger than the 8388608 bytes allowed"), "\(error)")
    // What has not been sent has not been kept; this process's memory is also that of the tests beside this one.
    #expect(try await behaviour.statistics().sent < 64 << 20)
  }

  @Test("headers without end are cut off")
  func hugeHeader() async throws {
    let error = try await failure { try await HTTPClient(.init()).send(Behaviour("huge-header").request()) }
    guard case .tooLarge = error else {
      Issue.record("\(error)")
      return
    }
  }

  @Test(
    "what went wrong is said",
    arguments: [
      ("hang-mid-body", "connection broken: "), ("hang-up", "connection broken: "),
      ("always-503", "status 503: loading"), ("always-500", "status 500: broken for good"),
      ("moved", "status 307: redirects are not followed; it points to example.invalid/elsewhere"),
    ])
  func failures(how: String, expected: String) async throws {
    let behaviour = try Behaviour(how)
    let error = try await failure { try await HTTPClient(.init()).send(behaviour.request()) }
    #expect("\(error)".hasPrefix(behaviour.url + "/compute: " + expected), "\(error)")
  }

  @Test("nobody there")
  func refused() async throws {
    let request = HTTPRequest(endpoint: try Endpoint("http://127.0.0.1:1/x?key=secret", reward: "http"))
    let error = try await failure { try await HTTPClient(.init()).send(request) }
    #expect("\(error)".hasPrefix("http://127.0.0.1:1/x: cannot connect: "), "\(error)")
    let unknown = HTTPRequest(endpoint: try Endpoint("http://no-such-host.invalid", reward: "http"))
    guard case .cannotConnect = try await failure({ try await HTTPClient(.init(timeout: 20)).send(unknown) })
    else {
      // Where a proxy is set, it is the proxy that says so.
      #expect(ProcessInfo.processInfo.environment.keys.contains { $0.lowercased() == "http_proxy" })
      return
    }
  }

  /// Oracle: the same server with the same certificate is trusted once the certificate is.
  @Test(
    "TLS: a certificate of an unknown authority is refused",
    .enabled("needs the openssl program") { FileManager.default.isExecutableFile(atPath: "/usr/bin/openssl") }
  )
  func tls() async throws {
    let folder = FileManager.default.temporaryDirectory.appending(path: UUID().uuidString)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: folder) }
    let (key, certificate) = (folder.appending(path: "key.pem").path, folder.appending(path: "cert.pem").path)
    let openssl = Process()
    openssl.executableURL = URL(filePath: "/usr/bin/openssl")
    openssl.arguments = [
      "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
      "-subj", "/CN=reward", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate,
    ]
    openssl.standardError = FileHandle.nullDevice
    try openssl.run()
    openssl.waitUntilExit()
    try #require(openssl.terminationStatus == 0)

    let server = try RemoteServer([certificate, key])
    func request(_ host: String) throws -> HTTPRequest {
      HTTPRequest(endpoint: try Endpoint("https://\(host):\(server.port)/good/key/health", reward: "http"))
    }
    let error = try await failure { try await HTTPClient(.init()).send(request("127.0.0.1")) }
    guard case .notTrusted = error, !RetryPolicy().repeats(error) else {
      Issue.record("\(error)")
      return
    }
    let trusting = HTTPClient.Options(certificates: certificate)
    #expect(try await !HTTPClient(trusting).send(request("127.0.0.1")).isEmpty)
    // Trusted, but for another name.
    guard case .notTrusted = try await failure({ try await HTTPClient(trusting).send(request("localhost")) })
    else {
      Issue.record("the name was not checked")
      return
    }
    // http where https is spoken.
    let plain = HTTPRequest(endpoint: try Endpoint("http://127.0.0.1:\(server.port)/", reward: "http"))
    guard case .broken = try await failure({ try await HTTPClient(.init()).send(plain) }) else {
      Issue.record("no HTTP was spoken")
      return
    }
    withExtendedLifetime(server) {}
  }

  @Test("authorities come from the variables that curl reads")
  func authorities() {
    let find = HTTPClient.Options.certificates
    #expect(find([:]) == nil && find(["SSL_CERT_FILE": "a"]) == "a" && find(["CURL_CA_BUNDLE": ""]) == nil)
    #expect(find(["SSL_CERT_FILE": "a", "CURL_CA_BUNDLE": "b"]) == "b")
  }

  @Test("clients come and go with their threads")
  func lifetime() async throws {
    let behaviour = try Behaviour("good")
    func threads() throws -> Int {
      try FileManager.default.contentsOfDirectory(atPath: "/proc/self/task").count
    }
    let before = try threads()
    for _ in 0..<100 { _ = try await HTTPClient(.init()).send(behaviour.request()) }
    try await Task.sleep(for: .milliseconds(300))
    #expect(try threads() < before + 50)  // others come and go beside this test
  }
}

@Suite("Retry policy")
struct RetryPolicyTests {
  static func status(_ code: Int, _ retryAfter: Double? = nil) -> HTTPFailure {
    .status(address: "", code: code, excerpt: "", retryAfter: retryAfter)
  }

  @Test("what may pass is repeated, nothing else")
  func repeats() {
    let policy = RetryPolicy()
    for failure in [
      .cannotConnect(address: "", reason: ""), .timedOut(address: "", seconds: 1, phase: .waiting),
      .broken(address: "", reason: ""),
    ] + [408, 425, 429, 500, 502, 503, 504, 529].map({ Self.status($0) }) {
      #expect(policy.repeats(failure), "\(failure)")
    }
    for failure in [
      .notTrusted(address: "", reason: ""), .tooLarge(address: "", limit: 1),
      .refused(address: "", reason: ""),
    ] + [301, 307, 400, 401, 403, 404, 405, 413, 422].map({ Self.status($0) }) {
      #expect(!policy.repeats(failure), "\(failure)")
    }
  }

  /// Oracle: full jitter's definition; uniform on 0 ..< ceiling has mean ½ and maximum 1.
  @Test("pauses double, are jittered over their whole length, and are the same for the same numbers")
  func pauses() {
    let policy = RetryPolicy(firstPause: 0.5, longestPause: 30, seed: 5)
    let failure = Self.status(503)
    for (attempt, ceiling) in [(1, 0.5), (2, 1), (3, 2), (6, 16), (7, 30), (60, 30), (1000, 30)] {
      let pauses = (0..<1000).map { policy.pause(before: attempt, of: UInt64($0), after: failure) / ceiling }
      #expect(pauses.allSatisfy { (0..<1).contains($0) })
      // Standard error 0.009 of the mean; the extremes are within 1 % of the ends with probability 1 − 4e-5.
      #expect(abs(pauses.reduce(0, +) / 1000 - 0.5) < 0.04 && pauses.min()! < 0.01 && pauses.max()! > 0.99)
      #expect(pauses[0] == policy.pause(before: attempt, of: 0, after: failure) / ceiling)
    }
    let other = RetryPolicy(firstPause: 0.5, longestPause: 30, seed: 6)
    #expect(other.pause(before: 1, of: 0, after: failure) != policy.pause(before: 1, of: 0, after: failure))
  }

  @Test("Retry-After is waited for, within bounds")
  func retryAfter() {
    let policy = RetryPolicy(firstPause: 0.5, longestPause: 30)
    for request in 0..<100 {
      #expect((7..<7.5).contains(policy.pause(before: 1, of: UInt64(request), after: Self.status(429, 7))))
    }
    #expect(policy.pause(before: 1, of: 0, after: Self.status(503, 86400)) == 30)
    #expect(policy.pause(before: 1, of: 0, after: Self.status(503, -5)) < 0.5)
  }
}
