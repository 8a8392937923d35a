import Foundation
import Testing

/// Runs that are stopped and killed. Oracle: the same run left alone; equal means every byte of the adapter, of
/// every metric that no clock measured, and no file more or less.
@Suite("interruption", .serialized)
struct InterruptionTests {
  /// More than 20 kills can let pass: 1 each, 2 where aimed at training.
  static let iterations = 25
  /// LoRA of all linear layers at this rank makes checkpoints of 7 MB, so that some kills hit their writing.
  static let settings = """
    trainable: {rank: 16, alpha: 16, targets: [all-linear]}
    run: {iterations: \(iterations), checkpointEvery: 1, keep: 2, samplesEvery: 0, evaluateEvery: 0}
    """

  /// What counts of a finished run.
  struct Outcome: Equatable {
    let adapter: Data
    let metrics: [String]
    let files: [String]

    init(_ scratch: Scratch) throws {
      adapter = try scratch.data("run/adapter/pytorch_lora_weights.safetensors")
      metrics = try scratch.metrics()
      files = scratch.listing("run").keys.sorted()
    }
  }

  /// The run left alone; made once.
  static let unbroken = Result {
    let scratch = try Scratch()
    try scratch.configure(model: Tool.fluxMini, settings: settings)
    try scratch.train()
    return try Outcome(scratch)
  }

  let scratch: Scratch

  init() throws {
    scratch = try Scratch()
    try scratch.configure(model: Tool.fluxMini, settings: Self.settings)
  }

  private var rows: Int {
    (try? scratch.data("run/metrics.jsonl"))?.count { $0 == UInt8(ascii: "\n") } ?? 0
  }
  private var latest: String? { try? scratch.text("run/LATEST") }
  private var checkpoints: [String] {
    (try? FileManager.default.contentsOfDirectory(atPath: scratch.path("run/checkpoints"))) ?? []
  }
  private var isWriting: Bool { checkpoints.contains { $0.hasPrefix(".unfinished-") } }

  private func expectUnbroken() throws {
    let (outcome, expected) = (try Outcome(scratch), try Self.unbroken.get())
    #expect(expected.metrics.count == Self.iterations)
    #expect(outcome.adapter == expected.adapter)
    #expect(outcome.metrics == expected.metrics)
    #expect(outcome.files == expected.files)
  }

  @Test("SIGINT and SIGTERM stop at an iteration boundary within 10 s; resuming is as never stopped")
  func signals() throws {
    // Parts of an iteration at which signals come: in rollout, decoding and each of the two updates.
    for (n, part) in [0.3, 0.5, 0.6, 0.7, 0.8, 0.95].enumerated() {
      let (signal, word) = n.isMultiple(of: 2) ? (SIGINT, "interrupted") : (SIGTERM, "terminated")
      // Checkpoints only at the end: the one that is found after the signal is the signal's.
      let every = ["--set", "run.checkpointEvery=\(Self.iterations)"]
      let run = try Tool.start(
        ["train"] + (n > 0 ? ["--resume", "run"] : ["config.yaml"]) + every, in: scratch)
      let start = rows
      try #require(waitUntil(limit: 60) { rows > start || !run.isRunning })
      let clock = ContinuousClock.now
      try #require(waitUntil(limit: 60) { rows > start + 1 || !run.isRunning })
      let iteration = (ContinuousClock.now - clock) / Duration.microseconds(1)
      usleep(UInt32(part * iteration))
      run.send(signal)
      let sent = ContinuousClock.now
      let result = try run.wait(limit: 20)
      #expect(ContinuousClock.now - sent < .seconds(10))
      #expect(result.status == 128 + signal && !result.killed, "\(result.err)")
      #expect(result.err.hasSuffix("\(word)\n"))
      #expect(result.out.isEmpty)
      #expect(rows >= start + 2 && rows < Self.iterations)
      // A row for every iteration of the checkpoint, and none for the one dropped.
      #expect(latest == String(format: "iteration-%06d\n", rows))
      #expect(scratch.exists("run/checkpoints/\(String(format: "iteration-%06d", rows))/state.json"))
      #expect(!isWriting)
    }
    try scratch.train("--resume", "run")
    let (outcome, expected) = (try Outcome(scratch), try Self.unbroken.get())
    #expect(outcome.adapter == expected.adapter)
    #expect(outcome.metrics == expected.metrics)
  }

  @Test("a finished run whose last adapter was not written any more writes it when resumed")
  func adapterAfterLastCheckpoint() throws {
    try scratch.configure(
      settings: "run: {iterations: 1, checkpointEvery: 1, samplesEvery: 0, evaluateEvery: 0}")
    try scratch.train()
    let adapter = "run/adapter/pytorch_lora_weights.safetensors"
    let expected = try scratch.data(adapter)
    // What a kill leaves between the last checkpoint and the adapter.
    try FileManager.default.removeItem(at: scratch["run/adapter"])
    try scratch.train("--resume", "run")
    try #require(scratch.exists(adapter))
    #expect(try scratch.data(adapter) == expected)
  }

  @Test("files that killed writes left are gone after resuming")
  func leftovers() throws {
    try scratch.configure(
      settings: "run: {iterations: 1, checkpointEvery: 1, samplesEvery: 0, evaluateEvery: 0}")
    try scratch.train()
    let files = scratch.listing("run").keys.sorted()
    for name in [
      "run/LATEST.tmp-1", "run/adapter/pytorch_lora_weights.safetensors.tmp-1",
      "run/checkpoints/.unfinished-iteration-000009/training.safetensors.tmp-1",
    ] { try scratch.write("half", to: name) }
    try scratch.train("--resume", "run")
    #expect(scratch.listing("run").keys.sorted() == files)
  }

  /// Where kills are aimed, in turn.
  enum Aim: CaseIterable { case startUp, anywhere, checkpoint, training, checkpointAgain, afterCheckpoint }

  @Test("20 kills at random times, each resumed, change nothing")
  func kills() throws {
    var random = SplitMix(state: 2024)
    var found: [String: Int] = [:]
    var kills = 0
    while kills < 20 {
      let hasConfig = scratch.exists("run/config.yaml")
      // Before there is a configuration there is nothing to resume: as a user, start again.
      let run = try Tool.start(["train"] + (hasConfig ? ["--resume", "run"] : ["config.yaml"]), in: scratch)
      let before = latest
      // No attempt may go on beyond a new checkpoint or two, or the run is done before the last kill.
      func wait(_ limit: Double, until condition: (() -> Bool)? = nil) {
        let condition = condition ?? { latest != before }
        waitUntil(limit: limit) { condition() || !run.isRunning }
      }
      func pause(_ range: ClosedRange<Double>) { usleep(UInt32(1e6 * .random(in: range, using: &random))) }
      switch Aim.allCases[kills % Aim.allCases.count] {
      case .startUp where !hasConfig: wait(60) { scratch.exists("run/config.yaml") }
      case .startUp: wait(.random(in: 0...0.4, using: &random))
      case .anywhere: wait(.random(in: 0...1.5, using: &random))
      case .checkpoint, .checkpointAgain:
        wait(60) { isWriting }
        pause(0...0.03)
      case .training:
        wait(60)
        let first = latest
        wait(.random(in: 0.02...0.2, using: &random)) { latest != first }
      case .afterCheckpoint:
        wait(60)
        pause(0...0.01)
      }
      run.send(SIGKILL)
      let result = try run.wait()
      try #require(result.killed, "the run ended by itself: \(result.status) \(result.err)")
      kills += 1
      found[state, default: 0] += 1
    }
    // What the folders looked like; the aims make each of these likely, chance decides how often.
    print("kills:", found.sorted { $0.key < $1.key }.map { "\($0.value) \($0.key)" }.joined(separator: ", "))
    #expect(found["no checkpoint yet", default: 0] >= 1)
    #expect(found["checkpoint half written", default: 0] >= 3)
    #expect(found["between checkpoints", default: 0] >= 5)
    try scratch.train("--resume", "run")
    try expectUnbroken()
  }

  /// What a kill left.
  private var state: String {
    if isWriting { return "checkpoint half written" }
    guard let latest else { return "no checkpoint yet" }
    if scratch.listing("run").keys.contains(where: { $0.contains(".tmp-") }) {
      return "other file half written"
    }
    let newest = checkpoints.max() ?? ""
    if newest + "\n" != latest { return "checkpoint not named by LATEST" }
    return rows > Int(latest.dropFirst(10).dropLast()) ?? 0
      ? "row without its checkpoint" : "between checkpoints"
  }
}

/// Steele, Lea and Flood's SplitMix64: kills at the same times in every run of the tests.
struct SplitMix: RandomNumberGenerator {
  var state: UInt64
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }
}
