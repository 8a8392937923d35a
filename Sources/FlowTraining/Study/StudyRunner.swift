import Foundation
import Torch

/// Trains and scores the runs of a study as processes of this program, side by side, and reports.
public final class StudyRunner {
  /// What is to be done.
  public let plan: StudyPlan
  /// Something worth a line.
  public var line: (String) -> Void = { _ in }
  /// What is going on, to replace what was said before.
  public var status: (String) -> Void = { _ in }
  private let program: URL

  /// Runs `plan` with `program`, which is this one.
  public init(_ plan: StudyPlan, program: URL) { (self.plan, self.program) = (plan, program) }

  // MARK: what there is

  /// All runs with their states.
  ///
  /// - Throws: ``StudyError`` that names every run whose folder holds something else.
  public func states() throws -> [(run: StudyRun, state: StudyRun.State)] {
    var problems: [String] = []
    let states = plan.runs.compactMap { run -> (run: StudyRun, state: StudyRun.State)? in
      do { return (run, try run.state(scoredBy: plan.evaluateArguments(run.folder.path))) } catch {
        problems.append("\(error)")
        return nil
      }
    }
    guard problems.isEmpty else { throw StudyError(problems: problems) }
    return states
  }

  /// What stays to be known of an arm before it is trained.
  public struct Outlook: Sendable {
    /// Name of the arm.
    public let arm: String
    /// Forward passes of an iteration, in words.
    public let passes: String
    /// Seconds of one run: its iterations, its looks at dev and its score.
    public let seconds: Double
    /// Peak memory of a run, in bytes.
    public let peakBytes: Int
  }

  /// Loads every arm's model and prompts as `train --dry-run` does, and times one iteration where no run of the arm
  /// has done one yet.
  ///
  /// - Throws: ``StudyError`` with the problems of all arms.
  public func outlook() throws -> [Outlook] {
    var problems: [String] = []
    let scratch = try Self.temporaryFolder()
    defer { try? FileManager.default.removeItem(at: scratch) }
    var result: [Outlook] = []
    for arm in plan.arms {
      let runs = plan.runs.filter { $0.arm == arm.arm.name }
      do {
        let (passes, peak) = try check(arm)
        var row = try runs.lazy.compactMap { try $0.rows().last }.first
        if row == nil {
          status("arm \(arm.arm.name): timing one iteration")
          let trial = StudyRun(
            arm: arm.arm.name, seed: runs[0].seed, configuration: runs[0].configuration,
            folder: scratch.appending(path: "trial-\(arm.arm.name)"))
          try wait(
            launch(
              plan.trainArguments(trial)
                + ["run.iterations=1", "run.evaluateEvery=0", "run.samplesEvery=0"].flatMap { ["--set", $0] },
              scratch.appending(path: "trial-\(arm.arm.name).log"), threads: processes(peak: peak).threads,
              name: "arm \(arm.arm.name): train"))
          row = try trial.rows().last
        }
        let c = arm.configuration
        let each = (row?.parts ?? [:]).mapValues { $0 / Double(c.samplesPerIteration) }
        // An image of an evaluation costs a deterministic rollout of its own number of steps.
        func images(_ split: String, _ count: Int, _ steps: Int) -> Double {
          let prompts =
            (try? PromptFile(file: URL(filePath: c.prompts.file), split: split).prompts.count) ?? 0
          return Double(prompts * count)
            * ((each["rollout"] ?? 0) * Double(steps) / Double(c.sampling.steps) + (each["decode"] ?? 0)
              + (each["reward"] ?? 0))
        }
        let looks = c.run.evaluateEvery > 0 ? c.run.iterations / c.run.evaluateEvery : 0
        result.append(
          Outlook(
            arm: arm.arm.name, passes: passes,
            seconds: Double(c.run.iterations) * (row?.seconds ?? 0) + Double(looks)
              * images("dev", 2, c.sampling.steps)
              + images(
                plan.study.evaluate.split, plan.study.evaluate.count,
                plan.study.evaluate.steps ?? plan.base.sampling.steps),
            peakBytes: peak))
      } catch let interrupted as Interrupted { throw interrupted } catch { problems.append("\(error)") }
    }
    guard problems.isEmpty else { throw StudyError(problems: problems) }
    return result
  }

  private static func temporaryFolder() throws -> URL {
    let url = FileManager.default.temporaryDirectory.appending(path: "chunkgrpo-study-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    return url
  }

  /// What `train --dry-run` says of an arm.
  private func check(_ arm: StudyPlan.Arm) throws -> (passes: String, peak: Int) {
    let scratch = try Self.temporaryFolder()
    defer { try? FileManager.default.removeItem(at: scratch) }
    let run = plan.runs.first { $0.arm == arm.arm.name }!
    status("arm \(arm.arm.name): checking model and prompts")
    let child = try launch(
      plan.trainArguments(run) + ["--dry-run", "--json"],
      scratch.appending(path: "check-\(arm.arm.name).log"), threads: nil,
      name: "arm \(arm.arm.name): train")
    let output = try wait(child)
    struct Answer: Decodable {
      let counts: [String: String], peakBytes: Int
      enum CodingKeys: String, CodingKey { case counts, peakBytes = "peak_bytes" }
    }
    let answer = try JSONDecoder().decode(Answer.self, from: output)
    return (answer.counts["forward passes per iteration"] ?? "", answer.peakBytes)
  }

  /// How many runs are trained side by side, and on how many threads each.
  ///
  /// Small models waste a second core on waiting: `auto` gives each run one core where there is memory for as many.
  public func processes(peak: Int) -> (count: Int, threads: Int?) {
    let cores = Self.cores
    let count: Int
    switch plan.study.parallel {
    case .processes(let n): count = n
    case .auto:
      let memory = (try? TorchRuntime.availableMemory(.cpu)) ?? 0
      count = TorchRuntime.cudaAvailable ? 1 : max(1, min(cores, plan.runs.count, memory / max(peak, 1)))
    }
    return (count, count == 1 ? nil : max(1, cores / count))
  }

  /// Cores that this process may use.
  private static var cores: Int {
    let status = (try? String(contentsOfFile: "/proc/self/status", encoding: .utf8)) ?? ""
    let mask = status.split(separator: "\n").first { $0.hasPrefix("Cpus_allowed:") }?.split(separator: "\t")
      .last
    let count = mask?.reduce(0) { $0 + ($1.hexDigitValue ?? 0).nonzeroBitCount } ?? 0
    return count > 0 ? count : ProcessInfo.processInfo.activeProcessorCount
  }

  // MARK: running

  /// Does what is left to be done. On SIGINT or SIGTERM the runs stop at an iteration boundary, and another call goes on.
  public func run() throws {
    func open() throws -> [StudyRun] { try states().filter { $0.state.scores == nil }.map(\.run) }
    // Before anything is written: every arm that is to be trained is checked with its model.
    let unchecked = Set(try open().map(\.arm))
    var (problems, peak) = ([String](), 0)
    for arm in plan.arms where unchecked.contains(arm.arm.name) {
      do { peak = max(peak, try check(arm).peak) } catch let interrupted as Interrupted {
        throw interrupted
      } catch { problems.append("\(error)") }
    }
    guard problems.isEmpty else { throw StudyError(problems: problems) }
    try FileManager.default.createDirectory(at: logs, withIntermediateDirectories: true)
    let lock = try RunFolder(plan.folder).lock()
    defer { withExtendedLifetime(lock) {} }
    let left = try open()

    let (count, threads) = processes(peak: peak)
    if !left.isEmpty {
      line(
        "\(left.count) of \(plan.runs.count) runs to do, \(count) side by side\(threads.map { ", \($0) thread\($0 == 1 ? "" : "s") each" } ?? "")"
      )
    }
    try AtomicFile.write(Data(plan.untrained.yaml().utf8), to: baseFile)
    var work: [() throws -> Task?] = baselines().map { task in { task } }
    work += left.map { run in { try self.train(run) } }
    try execute(work, count: count, threads: threads)
  }

  /// A process to start, and what follows when it has ended well.
  private struct Task {
    let name: String
    let arguments: [String]
    let log: URL
    var run: StudyRun?
    let finish: (Data) throws -> Task?
  }

  private func train(_ run: StudyRun) throws -> Task {
    let exists = FileManager.default.fileExists(atPath: run.configFile.path)
    let arguments = plan.evaluateArguments(run.folder.path)
    let log = logs.appending(path: "\(run.arm)-seed-\(run.seed).log")
    return Task(
      name: "\(run.name): train",
      arguments: exists ? ["train", "--resume", run.folder.path] : plan.trainArguments(run),
      log: log, run: run
    ) { _ in
      Task(name: "\(run.name): evaluate", arguments: arguments, log: log, run: run) { output in
        try run.finish(output, arguments: arguments)
        let scores = try StudyRun.scores(output).rewards.sorted { $0.key < $1.key }
        self.line(
          "\(run.name): \(scores.map { "\($0.key) \(String(format: "%.4f", $0.value.mean))" }.joined(separator: ", "))"
        )
        return nil
      }
    }
  }

  private var logs: URL { plan.folder.appending(path: "logs") }
  private var baseFile: URL { plan.folder.appending(path: "base.yaml") }
  private var baseFolder: URL { plan.folder.appending(path: "base") }

  /// Scores of the untrained model: on what trained ones are scored on, and on dev for each seed.
  private struct Baseline: Codable {
    let arguments: [String]
    let base: String
    let scores: StudyRun.Scores
  }
  private var baselineCommands: [(name: String, arguments: [String])] {
    [("final", plan.evaluateArguments(baseFile.path))]
      + (plan.hasCurves ? plan.study.seeds : []).map { seed in
        // As a run looks at dev: with its own seed and two images a prompt.
        (
          "dev-seed-\(seed)",
          plan.evaluateArguments(
            baseFile.path, split: "dev", count: 2, steps: plan.base.sampling.steps, seed: seed)
        )
      }
  }
  private func baseline(_ name: String, _ arguments: [String]) -> StudyRun.Scores? {
    guard let data = try? Data(contentsOf: baseFolder.appending(path: "\(name).json")),
      let stored = try? JSONDecoder().decode(Baseline.self, from: data), stored.arguments == arguments,
      stored.base == plan.untrained.yaml()
    else { return nil }
    return stored.scores
  }
  private func baselines() -> [Task] {
    baselineCommands.filter { baseline($0.name, $0.arguments) == nil }.map { name, arguments in
      Task(
        name: "untrained model: evaluate", arguments: arguments, log: logs.appending(path: "base-\(name).log")
      ) { output in
        try FileManager.default.createDirectory(at: self.baseFolder, withIntermediateDirectories: true)
        let stored = Baseline(
          arguments: arguments, base: self.plan.untrained.yaml(), scores: try StudyRun.scores(output))
        try AtomicFile.write(try StudyRun.encode(stored), to: self.baseFolder.appending(path: "\(name).json"))
        return nil
      }
    }
  }

  /// Works through `work`, `count` processes at a time. Whatever ends it, no process is left.
  private func execute(_ work: [() throws -> Task?], count: Int, threads: Int?) throws {
    var waiting = work[...]
    var running: [(task: Task, child: Child)] = []
    let total = work.count
    func iterationsLeft() -> Int {
      plan.runs.reduce(0) { $0 + max(0, $1.configuration.run.iterations - $1.iterationsDone) }
    }
    let (start, first) = (ContinuousClock.now, iterationsLeft())
    var tick = 0
    do {
      while !waiting.isEmpty || !running.isEmpty {
        try Interruption.check()
        usleep(50_000)
        while running.count < count, let next = waiting.popFirst() {
          if let task = try next() {
            running.append((task, try launch(task.arguments, task.log, threads: threads, name: task.name)))
          }
        }
        for i in running.indices.reversed() where !running[i].child.process.isRunning {
          let (task, child) = running.remove(at: i)
          if let next = try task.finish(try child.output()) {
            running.append((next, try launch(next.arguments, next.log, threads: threads, name: next.name)))
          }
        }
        tick += 1
        guard tick % 20 == 0 else { continue }
        let left = iterationsLeft()
        let minutes =
          (ContinuousClock.now - start) / .seconds(60) * Double(left) / Double(max(1, first - left))
        status(
          (["\(total - waiting.count - running.count) of \(total) done"]
            + (left < first ? ["training ends in about \(Int(minutes.rounded(.up))) min"] : [])
            + running.map { describe($0.task) }).joined(separator: " · "))
      }
    } catch {
      // Children stop at an iteration boundary and save; a second signal to this process leaves them to do so alone.
      for (_, child) in running { child.process.terminate() }
      for (_, child) in running { child.process.waitUntilExit() }
      throw error
    }
  }

  private func describe(_ task: Task) -> String {
    task.run.map { "\(task.name) \($0.iterationsDone)/\($0.configuration.run.iterations)" } ?? task.name
  }

  // MARK: processes

  private struct Child {
    let name: String
    let process: Process
    let out, log: URL
    /// Whether the log outlives the error.
    let isKept: Bool

    /// What it printed.
    func output() throws -> Data {
      let (status, killed) = (process.terminationStatus, process.terminationReason == .uncaughtSignal)
      guard status == 0, !killed else {
        let said = (try? String(contentsOf: log, encoding: .utf8)) ?? ""
        let end = said.split(separator: "\n").filter { !$0.hasPrefix("$ ") }.suffix(3)
        throw RunError(
          "\(name) ended with \(killed ? "signal" : "status") \(status): "
            + (end.isEmpty ? "it said nothing" : end.joined(separator: "\n  "))
            + (isKept
              ? "\n  all it said is in \(log.path); what is done stays: solve this and run the study again"
              : "")
        )
      }
      return try Data(contentsOf: out)
    }
  }

  private func launch(_ arguments: [String], _ log: URL, threads: Int?, name: String) throws -> Child {
    let process = Process()
    process.executableURL = program
    process.arguments = arguments
    var environment = ProcessInfo.processInfo.environment
    environment[Interruption.parentVariable] = String(getpid())
    if let threads { environment["OMP_NUM_THREADS"] = String(threads) }
    process.environment = environment
    let out = log.deletingPathExtension().appendingPathExtension("out")
    func open(_ file: URL, truncated: Bool) throws -> FileHandle {
      if truncated || !FileManager.default.fileExists(atPath: file.path) { try Data().write(to: file) }
      let handle = try FileHandle(forWritingTo: file)
      try handle.seekToEnd()
      return handle
    }
    let handles = [try open(out, truncated: true), try open(log, truncated: false)]
    try handles[1].write(contentsOf: Data("$ \(Self.command(arguments))\n".utf8))
    (process.standardInput, process.standardOutput, process.standardError) = (
      FileHandle.nullDevice, handles[0], handles[1]
    )
    try process.run()
    for handle in handles { try handle.close() }
    return Child(
      name: name, process: process, out: out, log: log, isKept: log.path.hasPrefix(logs.path))
  }

  /// Waits for one process; an interruption ends it.
  @discardableResult
  private func wait(_ child: Child) throws -> Data {
    do {
      while child.process.isRunning {
        try Interruption.check()
        usleep(20_000)
      }
    } catch {
      child.process.terminate()
      child.process.waitUntilExit()
      throw error
    }
    return try child.output()
  }

  static func command(_ arguments: [String]) -> String {
    (["chunkgrpo"]
      + arguments.map { word in
        word.allSatisfy { $0.isLetter || $0.isNumber || "/._+-=:,".contains($0) }
          ? word : "'" + word.replacingOccurrences(of: "'", with: "'\\''") + "'"
      }).joined(separator: " ")
  }

  // MARK: reporting

  /// Reports on what is done, and writes the report into the study's folder.
  ///
  /// - Throws: ``RunError`` if no run is done yet.
  public func report() throws -> StudyReport {
    let done = try states().compactMap { run, state in state.scores.map { (run, $0) } }
    let found = baselineCommands.map { ($0.name, baseline($0.name, $0.arguments)) }
    guard !done.isEmpty, let base = found[0].1 else {
      throw RunError("\(plan.folder.path): no run is done yet: run the study without --report-only first")
    }
    var starts: [UInt64: [String: Double]] = [:]
    for (seed, (_, scores)) in zip(plan.study.seeds, found.dropFirst()) {
      starts[seed] = scores?.rewards.mapValues(\.mean)
    }
    let report = try StudyReport(plan, scores: done, base: base, starts: starts)
    try report.write(to: plan.folder, commands: plan.runs.map { Self.command(plan.trainArguments($0)) })
    return report
  }
}
