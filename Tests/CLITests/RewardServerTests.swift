import Foundation
import Testing

/// Runs whose reward server dies, hangs or is not there: `RewardServer/` itself, its colourfulness, over loopback.
///
/// Oracle: the run against a server that had no trouble, and what the server's scorer wrote down.
@Suite(
  "a reward server in trouble", .serialized,
  .enabled(if: RewardServer.python != nil || RewardServer.isCI, "\(RewardServer.missing)"))
struct RewardServerTests {
  static let iterations = 6
  static let samples = 4

  /// Six iterations of one group of four, asked about in one request; a checkpoint only at the end.
  static func settings(port: Int, retries: Int, timeout: Int = 120) -> String {
    """
    model: \(Tool.fluxTiny.path)
    output: run
    prompts: {file: prompts.jsonl}
    rewards:
      - {name: http, url: "http://127.0.0.1:\(port)", failure: {timeout: \(timeout), retries: \(retries)}}
    sampling: {steps: 3, height: 32, width: 48}
    group: {size: \(samples), promptsPerIteration: 1}
    chunk: {plan: step}
    optim: {lr: 1.0e-3, maxGradNorm: 1, microBatch: \(samples)}
    network: {dtype: float32}
    run: {iterations: \(iterations), checkpointEvery: \(iterations), samplesEvery: 0, evaluateEvery: 0}

    """
  }

  /// What counts of a finished run.
  struct Outcome: Sendable {
    let adapter: Data
    let rows: [Row]
    /// The rows without what a clock measured, and without how often the server was asked again.
    let metrics: [Data]

    /// What is said of the reward.
    struct Row: Decodable {
      let reward, mean: Double?
      let failed, masked: Int
      let retries: Int?
      enum CodingKeys: String, CodingKey {
        case reward = "reward/http"
        case mean = "reward_mean"
        case failed = "failed/http"
        case masked
        case retries = "retries/http"
      }
    }

    init(_ scratch: Scratch) throws {
      adapter = try scratch.data("run/adapter/pytorch_lora_weights.safetensors")
      let lines = try scratch.metrics().map { Data($0.utf8) }
      rows = try lines.map { try JSONDecoder().decode(Row.self, from: $0) }
      metrics = try lines.map { line in
        var row = try #require(try JSONSerialization.jsonObject(with: line) as? [String: Any])
        row["retries/http"] = nil
        return try JSONSerialization.data(withJSONObject: row, options: .sortedKeys)
      }
    }
  }

  /// One server for all of these tests; each leaves it running.
  static let server = Result { try RewardServer() }
  /// The run that had no trouble; made once.
  static let unbroken = Result {
    let (scratch, server) = (try Scratch(), try Self.server.get())
    try prepare(scratch, port: server.port, retries: 0)
    let before = try server.log().count
    try scratch.train()
    return (outcome: try Outcome(scratch), log: Array(try server.log()[before...]))
  }

  static func prepare(_ scratch: Scratch, port: Int, retries: Int) throws {
    try scratch.configure()
    try scratch.write(settings(port: port, retries: retries), to: "config.yaml")
  }

  let scratch: Scratch
  let server: RewardServer

  init() throws {
    (scratch, server) = (try Scratch(), try Self.server.get())
  }

  private var rows: Int { (try? scratch.data("run/metrics.jsonl"))?.count { $0 == UInt8(ascii: "\n") } ?? 0 }
  private func expectOneError(_ result: Tool.Result, _ parts: String...) {
    #expect(result.status == 1 && !result.killed && result.out.isEmpty)
    let errors = result.err.split(separator: "\n").filter {
      !$0.hasPrefix("warning:") && $0.contains("error")
    }
    #expect(errors.count == 1, "\(result.err)")
    for part in parts { #expect(errors.last?.contains(part) == true, "\(result.err)") }
  }
  private func expectUnbroken() throws {
    let (outcome, expected) = (try Outcome(scratch), try Self.unbroken.get().outcome)
    #expect(outcome.adapter == expected.adapter)
    #expect(outcome.metrics == expected.metrics)
    #expect(outcome.rows.count == Self.iterations)
    #expect(scratch.exists(String(format: "run/checkpoints/iteration-%06d/state.json", Self.iterations)))
  }

  /// A run that is waiting for the server's answer, two or more iterations after its start.
  private func runThatWaits() throws -> Tool.Running {
    let run = try Tool.start(["train", "config.yaml"], in: scratch)
    try #require(waitUntil(limit: 60) { rows >= 2 || !run.isRunning })
    try server.hold()
    try #require(waitUntil(limit: 60) { server.isHolding || !run.isRunning })
    try #require(run.isRunning, "\(run.err)")
    return run
  }

  @Test("metrics count what the scorer did not score")
  func counts() throws {
    let (outcome, log) = try Self.unbroken.get()
    try #require(log.count == Self.iterations && outcome.rows.count == Self.iterations)
    for (row, scores) in zip(outcome.rows, log) {
      let valid = scores.compactMap { $0 }
      #expect(scores.count == Self.samples)
      #expect(row.failed == Self.samples - valid.count)
      #expect(row.masked == Self.samples - valid.count)
      #expect(row.retries == nil)
      // The same numbers, read from decimal text that is exact, added in the same order.
      let mean = valid.reduce(0, +) / Double(valid.count)
      #expect(row.reward == mean && row.mean == mean)
    }
    // Two prompts in turn, one of which costs a sample: the test is about both.
    #expect(log.count { $0.contains { $0 == nil } } == Self.iterations / 2)
  }

  @Test("killed in the middle of a request and started again: the run ends as if nothing had happened")
  func restart() throws {
    // Enough for any restart: pauses grow to 30 s.
    try Self.prepare(scratch, port: server.port, retries: 20)
    _ = try Self.unbroken.get()
    let before = try server.log().count
    let run = try runThatWaits()
    try server.kill()
    try server.start()
    let result = try run.wait()
    try #require(result.status == 0, "\(result.err)")
    try expectUnbroken()
    // Every image of the one request that was repeated counts its repetitions.
    let retries = try Outcome(scratch).rows.compactMap(\.retries)
    try #require(retries.count == 1)
    #expect(retries[0] >= Self.samples && retries[0].isMultiple(of: Self.samples))
    // Each iteration was scored once: the request that died left nothing.
    #expect(try Array(server.log()[before...]) == Self.unbroken.get().log)
  }

  @Test(
    "killed for good: the run stops at its last whole iteration and can be resumed when the server is back")
  func stop() throws {
    try Self.prepare(scratch, port: server.port, retries: 1)
    _ = try Self.unbroken.get()
    let run = try runThatWaits()
    try server.kill()
    expectOneError(
      try run.wait(), "iteration \(rows + 1): reward http failed for 4 of 4 samples", "cannot connect",
      "(tried 2 times)", "train --resume \(scratch.path("run"))")
    #expect(rows >= 2 && rows < Self.iterations)
    #expect(try scratch.text("run/LATEST") == String(format: "iteration-%06d\n", rows))

    // Without the server there is nothing to go on with, and nothing changes.
    let files = scratch.listing("run")
    expectOneError(
      try Tool.run(["train", "--resume", "run"], in: scratch), "no server at", "GET /health",
      "chunkgrpo-rewards")
    #expect(scratch.listing("run") == files)

    try server.start()
    try scratch.train("--resume", "run")
    try expectUnbroken()
  }

  @Test("no server: one error, before anything is written; --dry-run finds it too")
  func absent() throws {
    let listener = try Listener()
    let port = listener.port
    listener.close()
    try Self.prepare(scratch, port: port, retries: 1)
    let files = scratch.listing()
    for arguments in [["config.yaml"], ["config.yaml", "--dry-run", "--json"]] {
      expectOneError(
        try Tool.run(["train"] + arguments, in: scratch), "no server at http://127.0.0.1:\(port)/compute",
        "tried GET /health 2 times", "chunkgrpo-rewards")
      #expect(scratch.listing() == files)
    }
  }

  @Test("SIGINT stops a run that waits for an answer within 10 s; resuming is as never stopped")
  func interruptedRequest() throws {
    try Self.prepare(scratch, port: server.port, retries: 3)
    _ = try Self.unbroken.get()
    let run = try runThatWaits()
    try expectInterrupted(run)
    #expect(rows >= 2 && rows < Self.iterations)
    #expect(try scratch.text("run/LATEST") == String(format: "iteration-%06d\n", rows))
    try server.release()
    try scratch.train("--resume", "run")
    try expectUnbroken()
  }

  @Test("SIGINT stops a run within 10 s that waits for the probe")
  func interruptedProbe() throws {
    try Self.prepare(scratch, port: server.port, retries: 3)
    try server.hold()
    let run = try Tool.start(["train", "config.yaml"], in: scratch)
    try #require(waitUntil(limit: 60) { server.isHolding || !run.isRunning })
    try expectInterrupted(run)
    try server.release()
  }

  @Test("SIGINT stops a run within 10 s whose server takes connections and says nothing")
  func interruptedGreeting() throws {
    let listener = try Listener()
    defer { listener.close() }
    try Self.prepare(scratch, port: listener.port, retries: 3)
    let run = try Tool.start(["train", "config.yaml"], in: scratch)
    try #require(listener.accept(limit: 60))
    try expectInterrupted(run)
  }

  private func expectInterrupted(_ run: Tool.Running) throws {
    run.send(SIGINT)
    let sent = ContinuousClock.now
    let result = try run.wait(limit: 20)
    #expect(ContinuousClock.now - sent < .seconds(10))
    #expect(result.status == 130 && !result.killed, "\(result.err)")
    #expect(result.err.hasSuffix("interrupted\n") && result.out.isEmpty, "\(result.err)")
  }
}

/// `python -m chunkgrpo_rewards`, with a scorer that can be held up and writes down what it scored.
final class RewardServer: @unchecked Sendable {
  static let isCI = ProcessInfo.processInfo.environment["CI"] == "true"
  private static let candidate =
    ProcessInfo.processInfo.environment["CHUNKGRPO_TEST_PYTHON"]
    ?? Tool.root.appending(path: ".python-tests/bin/python").path
  static let missing = """
    no Python with fastapi, uvicorn, numpy and pillow at \(candidate): \
    run Tools/setup-python-tests.sh, or set CHUNKGRPO_TEST_PYTHON
    """
  /// nil where packages of the server are missing.
  static let python: URL? = {
    let python = URL(filePath: candidate)
    guard FileManager.default.isExecutableFile(atPath: candidate), let scratch = try? Scratch(),
      let found = try? Tool.run(["-c", "import fastapi, uvicorn, numpy, PIL"], in: scratch, binary: python),
      found.status == 0
    else { return nil }
    return python
  }()
  struct Failed: Error, CustomStringConvertible { let description: String }

  /// Colourfulness, but one image of the second prompt has no score.
  private static let scorer = """
    import json, os, threading, time
    from pathlib import Path
    from chunkgrpo_rewards.scorers import make

    here, parent = Path(__file__).parent, os.getppid()
    colourfulness = make("colourfulness", {})


    def end_with_the_tests():
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(0)


    threading.Thread(target=end_with_the_tests, daemon=True).start()


    def score(images, prompts):
        if (here / "hold").exists():
            (here / "holding").touch()
            while (here / "hold").exists():
                time.sleep(0.005)
        scores = [float(s) for s in colourfulness(images, prompts, [None] * len(images))]
        rewards = [None if i == 1 and "dogs" in p else s for i, (s, p) in enumerate(zip(scores, prompts))]
        # The grey image and the probe are not the run's.
        if set(prompts) <= {"a photo of a cat", "a photo of two dogs"}:
            with (here / "log").open("a") as log:
                log.write(json.dumps(rewards) + "\\n")
        return rewards

    """

  private let scratch: Scratch
  private var process: Tool.Running?
  private(set) var port = 0

  init() throws {
    scratch = try Scratch()
    try scratch.write(Self.scorer, to: "held.py")
    try scratch.write("", to: "log")
    try start()
  }
  deinit { process?.send(SIGKILL) }

  /// Starts it, at the port that it had before, and returns when it is ready.
  func start() throws {
    guard let python = Self.python else { throw Failed(description: Self.missing) }
    let environment = ProcessInfo.processInfo.environment.merging([
      "PYTHONPATH": Tool.root.appending(path: "RewardServer").path, "PYTHONDONTWRITEBYTECODE": "1",
      "OMP_NUM_THREADS": "1",
    ]) { $1 }
    let process = try Tool.start(
      ["-m", "chunkgrpo_rewards", "held:score", "--port", "\(port)"], in: scratch, binary: python,
      environment: environment)
    self.process = process
    guard waitUntil(limit: 120, { !process.isRunning || process.err.contains("is ready after") }),
      process.isRunning,
      let found = process.err.firstMatch(of: /on http:\/\/127\.0\.0\.1:(\d+)/)
    else { throw Failed(description: "the reward server did not start: \(process.err)") }
    port = Int(found.1)!
  }

  /// As a machine that loses power: nothing is finished, and whoever waits sees the connection break.
  func kill() throws {
    process?.send(SIGKILL)
    _ = try process?.wait(limit: 20)
    try release()
  }

  /// Lets the next call of the scorer wait until ``release()``.
  func hold() throws { try scratch.write("", to: "hold") }
  /// Whether a call waits.
  var isHolding: Bool { scratch.exists("holding") }
  func release() throws {
    for name in ["hold", "holding"] where scratch.exists(name) {
      try FileManager.default.removeItem(at: scratch[name])
    }
  }

  /// What training images scored, request by request.
  func log() throws -> [[Double?]] {
    try scratch.text("log").split(separator: "\n").map {
      try JSONDecoder().decode([Double?].self, from: Data($0.utf8))
    }
  }
}

/// A port of this machine that takes connections.
final class Listener {
  let port: Int
  private let descriptor: Int32

  init() throws {
    let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
    var address = sockaddr_in()
    address.sin_family = sa_family_t(AF_INET)
    address.sin_addr.s_addr = UInt32(0x7F00_0001).bigEndian
    var size = socklen_t(MemoryLayout<sockaddr_in>.size)
    let done = withUnsafeMutablePointer(to: &address) {
      $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
        bind(descriptor, $0, size) == 0 && listen(descriptor, 8) == 0
          && getsockname(descriptor, $0, &size) == 0
      }
    }
    (self.descriptor, port) = (descriptor, Int(UInt16(bigEndian: address.sin_port)))
    try #require(done, "no port of this machine can be listened to")
  }

  /// Takes a connection and keeps it.
  func accept(limit: Double) -> Bool {
    var poller = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
    return poll(&poller, 1, Int32(limit * 1000)) == 1 && Foundation.accept(descriptor, nil, nil) >= 0
  }
  func close() { Foundation.close(descriptor) }
}
