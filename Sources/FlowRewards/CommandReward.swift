import Foundation
import Pictures
import Synchronization
import Torch

/// What another program says: one line of JSON on its stdin for a few images, one on its stdout with their
/// scores.
///
/// The program is started once a worker, when the first images come, and kept. A request is
///
///     {"id": 7, "images": [{"png": "/tmp/…/0.png"}, …], "prompts": ["a cat", …], "metadata": [{…} or null, …]}
///
/// with `{"base64": "…"}` in place of `png` where ``Transport/base64`` is chosen; `metadata` holds the
/// prompts' lines of the prompt file. The answer repeats the id, with a score or null for each image and, if
/// it likes, the reasons of the nulls:
///
///     {"id": 7, "scores": [0.5, null], "errors": [null, "no face found"]}
///
/// Images are PNG files in a folder that only this user can read, gone when the answer is there. An answer has
/// ``RewardSettings/Failure/timeout`` seconds for each image, starting the program included. A program that
/// exceeds it, leaves, closes its pipes or answers anything else is killed with all it started, and a new one
/// is asked, up to ``RewardSettings/Failure/retries`` times, the last time image by image, so that one bad
/// image costs only itself. null, NaN and infinities are failures of their image alone, and final. stderr is
/// the program's own; its last line is quoted when it fails. A closed stdin tells it to leave.
public final class CommandReward: Reward {
  /// How images are handed over.
  public enum Transport: String, Sendable, CaseIterable {
    /// As files.
    case paths
    /// In the request.
    case base64
  }
  /// Images of a request, unless the settings say otherwise.
  public static let defaultBatch = 8

  /// `command`.
  public let name = "command"
  private let batch: Int
  private let queue = JobQueue()
  private let counter = Counter()

  /// Creates the reward; `settings` name the program, and nothing is started yet.
  ///
  /// - Throws: ``RewardError`` for settings that make no sense, such as a program that is not there.
  public init(_ settings: RewardSettings) throws(RewardError) {
    func bad(_ key: RewardSettings.Ingredient, _ expected: String, _ got: String) -> RewardError {
      .badValue(reward: "command", key: key.rawValue, expected: expected, got: got)
    }
    guard let program = settings.command.first else {
      throw .missingKey(
        reward: "command", key: "command",
        wanted: "the program and its arguments, such as [python3, judge.py]")
    }
    let path = ProcessInfo.processInfo.environment["PATH"] ?? "/usr/bin:/bin"
    guard let executable = ChildProcess.locate(program, path: path) else {
      throw bad(
        .command, "a program that can be run",
        program.contains("/")
          ? "\(program), which is " + (access(program, F_OK) == 0 ? "not executable (chmod +x)" : "not there")
          : "\(program), which is in no folder of PATH (\(path))")
    }
    batch = settings.batch ?? Self.defaultBatch
    let workers = settings.concurrency ?? 1
    guard batch > 0 else { throw bad(.batch, "at least 1", "\(batch)") }
    guard 1...256 ~= workers else { throw bad(.concurrency, "1 to 256", "\(workers)") }
    let transport = settings.score.flatMap(Transport.init) ?? .paths
    for _ in 0..<workers {
      // A thread of its own, because it waits in system calls: the executor's threads are few and must not.
      let thread = Thread { [queue, counter] in
        Worker(
          executable: executable, arguments: settings.command, transport: transport,
          failure: settings.failure,
          counter: counter
        ).serve(queue)
      }
      thread.name = "command reward"
      thread.start()
    }
  }

  // Workers hold the queue, not the reward; each then lets its program go.
  deinit { queue.close() }

  /// How many programs were started in place of one that failed.
  public var restarts: Int { counter.restarts.load(ordering: .relaxed) }

  /// Scores of images of any size, by as many programs at once as the settings allow.
  public func score(_ images: Tensor, prompts: [RewardPrompt]) async throws -> [RewardScore] {
    try checkImages(images, for: name, prompts: prompts.count)
    let finite = try finiteImages(images)
    let pictures = try rgbPictures(of: images)
    var scores = [RewardScore](
      repeating: .notFinite, count: prompts.count)
    let usable = prompts.indices.filter { finite[$0] }
    let batches = stride(from: 0, to: usable.count, by: batch).map {
      usable[$0..<min($0 + batch, usable.count)]
    }
    await withTaskGroup(of: (ArraySlice<Int>, [RewardScore]).self) { group in
      for indices in batches {
        let items = indices.map { Job.Item(picture: pictures[$0], prompt: prompts[$0]) }
        group.addTask { [queue] in
          (indices, await withCheckedContinuation { queue.push(Job(items: items, done: $0)) })
        }
      }
      for await (indices, found) in group {
        for (index, score) in zip(indices, found) { scores[index] = score }
      }
    }
    return scores
  }
}

extension RewardKind {
  /// Another program's judgement.
  static let command = RewardKind(
    "command", keys: [.command, .batch, .concurrency],
    scores: CommandReward.Transport.allCases.map(\.rawValue)
  ) { settings, _ in try CommandReward(settings) }
}

private final class Counter: Sendable {
  let restarts = Atomic(0)
}

/// Images of one request, and who waits for them.
private struct Job: Sendable {
  struct Item: Sendable {
    let picture: Pictures.Image
    let prompt: RewardPrompt
  }
  let items: [Item]
  let done: CheckedContinuation<[RewardScore], Never>
}

/// Jobs in order of arrival.
private final class JobQueue: @unchecked Sendable {
  // Unchecked: `condition` guards the rest.
  private let condition = NSCondition()
  private var jobs: [Job] = []
  private var isClosed = false

  func push(_ job: Job) {
    condition.lock()
    jobs.append(job)
    condition.signal()
    condition.unlock()
  }

  /// Blocks for the next job; nil when there will be none.
  func next() -> Job? {
    condition.lock()
    defer { condition.unlock() }
    while jobs.isEmpty && !isClosed { condition.wait() }
    return jobs.isEmpty ? nil : jobs.removeFirst()
  }

  func close() {
    condition.lock()
    isClosed = true
    condition.broadcast()
    condition.unlock()
  }
}

/// One program and the thread that talks to it.
private final class Worker {
  private typealias Failure = ChildProcess.Failure
  private let executable: String
  private let arguments: [String]
  private let transport: CommandReward.Transport
  private let failure: RewardSettings.Failure
  private let counter: Counter
  private var process: ChildProcess?
  private var hasStarted = false
  private var id = 0

  init(
    executable: String, arguments: [String], transport: CommandReward.Transport,
    failure: RewardSettings.Failure, counter: Counter
  ) {
    (self.executable, self.arguments, self.transport) = (executable, arguments, transport)
    (self.failure, self.counter) = (failure, counter)
  }

  /// Works until the queue is closed.
  func serve(_ queue: JobQueue) {
    // Writing to a program that has left is an error to handle, not a reason to die.
    var signals = sigset_t()
    sigemptyset(&signals)
    sigaddset(&signals, SIGPIPE)
    pthread_sigmask(SIG_BLOCK, &signals, nil)
    while let job = queue.next() { job.done.resume(returning: score(job.items)) }
    process?.leave(within: 2)
  }

  private func score(_ items: [Job.Item]) -> [RewardScore] {
    var reason = ""
    let retries = max(0, failure.retries)
    for attempt in 0...retries {
      let isLast = attempt > 0 && attempt == retries
      if isLast && items.count > 1 {
        return items.map { item in
          do throws(Failure) { return try ask([item], retries: attempt)[0] } catch {
            return RewardScore(value: nil, failure: error.reason, retries: attempt)
          }
        }
      }
      do throws(Failure) { return try ask(items, retries: attempt) } catch { reason = error.reason }
    }
    return items.map { _ in RewardScore(value: nil, failure: reason, retries: retries) }
  }

  /// One request and its answer; a program that fails is gone afterwards.
  private func ask(_ items: [Job.Item], retries: Int) throws(Failure) -> [RewardScore] {
    do throws(Failure) {
      if process == nil {
        if hasStarted { counter.restarts.add(1, ordering: .relaxed) }
        hasStarted = true
        process = try ChildProcess(executable: executable, arguments: arguments)
      }
      id += 1
      let request = try Request(id: id, items: items, transport: transport)
      defer { request.remove() }
      let line = try process!.ask(request.line, within: failure.timeout * Double(items.count))
      do throws(Failure) { return try Self.scores(line, id: id, count: items.count, retries: retries) } catch
      {
        throw process!.rejected(error.reason)
      }
    } catch {
      process?.kill()
      process = nil
      throw error
    }
  }

  private struct Answer: Decodable {
    /// A number, null, or one of the names of ``quotingNonFinite(_:)``.
    struct Score: Decodable {
      let value: Double?
      let reason: String?
      init(from decoder: any Decoder) throws {
        let container = try decoder.singleValueContainer()
        if container.decodeNil() {
          (value, reason) = (nil, nil)
        } else if let name = try? container.decode(String.self),
          ["NaN", "Infinity", "-Infinity"].contains(name)
        {
          (value, reason) = (nil, "its score is \(name)")
        } else {
          (value, reason) = (try container.decode(Double.self), nil)
        }
      }
    }
    let id: Int
    let scores: [Score]
    let errors: [String?]?
  }

  private static func scores(_ line: Data, id: Int, count: Int, retries: Int) throws(Failure) -> [RewardScore]
  {
    let answer: Answer
    do { answer = try JSONDecoder().decode(Answer.self, from: quotingNonFinite(line)) } catch {
      let start = String(decoding: line.prefix(80), as: UTF8.self)
      throw Failure(
        reason: "its answer is not {\"id\": …, \"scores\": [number or null, …]} but \(start)"
          + (line.count > 80 ? "…" : ""))
    }
    guard answer.id == id else { throw Failure(reason: "its answer has id \(answer.id), the request \(id)") }
    guard answer.scores.count == count else {
      throw Failure(reason: "its answer has \(answer.scores.count) scores for \(count) images")
    }
    if let errors = answer.errors, errors.count != count {
      throw Failure(
        reason: "its answer has \(errors.count) errors for \(count) images: give one or null for each")
    }
    return answer.scores.enumerated().map { i, score in
      guard let value = score.value else {
        let reason = answer.errors?[i] ?? score.reason ?? "it gave no score and no reason"
        return RewardScore(value: nil, failure: reason, retries: retries)
      }
      return RewardScore(value: value, retries: retries)
    }
  }

  /// `line` with NaN, Infinity and -Infinity, which Python writes and JSON does not have, in quotes.
  static func quotingNonFinite(_ line: Data) -> Data {
    var result = Data()
    var rest = line[...]
    var (isText, isEscaped) = (false, false)
    while let byte = rest.first {
      if !isText, let name = ["NaN", "Infinity", "-Infinity"].first(where: { rest.starts(with: $0.utf8) }) {
        result.append(contentsOf: "\"\(name)\"".utf8)
        rest = rest.dropFirst(name.utf8.count)
        continue
      }
      if byte == UInt8(ascii: "\""), !isEscaped { isText.toggle() }
      isEscaped = isText && !isEscaped && byte == UInt8(ascii: "\\")
      result.append(byte)
      rest = rest.dropFirst()
    }
    return result
  }
}

/// A line for the program, and the files it names.
private struct Request {
  let line: Data
  private let folder: String?

  init(id: Int, items: [Job.Item], transport: CommandReward.Transport) throws(ChildProcess.Failure) {
    var folder: String?
    do {
      let images: [[String: String]]
      switch transport {
      case .paths:
        let new = try Self.makeFolder()
        folder = new
        images = try items.enumerated().map { i, item in
          let file = "\(new)/\(i).png"
          try item.picture.write(png: URL(fileURLWithPath: file))
          return ["png": file]
        }
      case .base64: images = try items.map { ["base64": try $0.picture.png().base64EncodedString()] }
      }
      let encoder = JSONEncoder()
      encoder.outputFormatting = .withoutEscapingSlashes
      func json(_ value: some Encodable) throws -> String {
        String(decoding: try encoder.encode(value), as: UTF8.self)
      }
      // Metadata as it is; a line break in JSON can only be white space.
      let metadata = items.map { item in
        item.prompt.metadata.map { String($0.map { $0.isNewline ? " " : $0 }) } ?? "null"
      }
      let text = """
        {"id":\(id),"images":\(try json(images)),"prompts":\(try json(items.map(\.prompt.text))),\
        "metadata":[\(metadata.joined(separator: ","))]}

        """
      line = Data(text.utf8)
      self.folder = folder
    } catch {
      if let folder { try? FileManager.default.removeItem(atPath: folder) }
      throw ChildProcess.Failure(reason: "the images cannot be handed over: \(error)")
    }
  }

  func remove() {
    if let folder { try? FileManager.default.removeItem(atPath: folder) }
  }

  /// A new folder for this user alone.
  private static func makeFolder() throws -> String {
    let pattern = FileManager.default.temporaryDirectory.appendingPathComponent("chunkgrpo-XXXXXX").path
    var bytes = Array(pattern.utf8CString)
    guard mkdtemp(&bytes) != nil else {
      throw PictureError.file(path: pattern, reason: String(cString: strerror(errno)))
    }
    return String(decoding: bytes.dropLast().map(UInt8.init(bitPattern:)), as: UTF8.self)
  }
}
