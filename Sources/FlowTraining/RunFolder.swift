import Foundation
import Torch

/// A run that cannot start, go on or be read, and the way out.
public struct RunError: Error, CustomStringConvertible, Sendable, Equatable {
  /// What is wrong, where, and what to do.
  public let description: String
  /// Creates the error.
  public init(_ description: String) { self.description = description }
}

/// The folder of one training run.
///
/// `config.yaml` · `metrics.jsonl` · `samples/` · `checkpoints/iteration-000050/` · `LATEST` · `adapter/` ·
/// `summary.json`. Checkpoints appear complete or not at all; `keep` of them stay.
public struct RunFolder: Sendable {
  /// The folder.
  public let url: URL
  /// The command whose run it is, for messages.
  private let command: String

  /// A folder that exists or will be created.
  public init(_ url: URL, command: String = "train") { (self.url, self.command) = (url, command) }

  /// The resolved configuration.
  public var configFile: URL { url.appending(path: "config.yaml") }
  /// One row an iteration.
  public var metricsFile: URL { url.appending(path: "metrics.jsonl") }
  /// Pictures of fixed prompts and seeds.
  public var samples: URL { url.appending(path: "samples") }
  /// What other programs load.
  public var adapter: URL { url.appending(path: "adapter") }
  private var checkpoints: URL { url.appending(path: "checkpoints") }

  /// Throws if the folder holds anything.
  public func requireNew() throws {
    // A temporary configuration is all that a start leaves that was killed before there was a run.
    if let present = try? FileManager.default.contentsOfDirectory(atPath: url.path),
      present.contains(where: { !$0.hasPrefix("config.yaml.tmp-") })
    {
      throw RunError(
        "output: \(url.path) is not empty: continue that run with \(command) --resume \(url.path), or choose another --set output=…"
      )
    }
  }

  /// Starts a new run: the folder must be empty or not exist.
  public func create(_ configuration: Configuration) throws { try create(yaml: configuration.yaml()) }

  /// Starts a new run of the configuration `yaml`.
  public func create(yaml: String) throws {
    try requireNew()
    let files = FileManager.default
    do {
      // The configuration first: from then on the folder is a run that can be resumed.
      try files.createDirectory(at: url, withIntermediateDirectories: true)
      try AtomicFile.write(Data(yaml.utf8), to: configFile)
    } catch {
      throw RunError(
        "output: \(url.path) cannot be written (\(Self.reason(error))): choose another --set output=…")
    }
  }

  /// Keeps other processes from writing here while the returned lock lives; one that is about to end is waited for.
  ///
  /// - Throws: ``RunError`` if the folder stays locked for `patience` seconds.
  public func lock(patience: Double = 20) throws -> FolderLock {
    let end = ContinuousClock.now + .seconds(patience)
    repeat {
      if let lock = FolderLock(url) { return lock }
      usleep(50_000)
    } while ContinuousClock.now < end
    throw RunError("\(url.path): another process is writing there: wait for it, or end it")
  }

  /// Stores a configuration whose run.* keys were changed on resuming, so that the next resume knows them.
  func update(_ configuration: Configuration) throws {
    try AtomicFile.write(Data(configuration.yaml().utf8), to: configFile)
  }

  /// Checks that the folder is a run.
  public func requireRun() throws {
    guard FileManager.default.fileExists(atPath: configFile.path) else {
      throw RunError(
        "--resume: \(url.path) is no run folder (it has no config.yaml); start one with \(command) CONFIG.yaml"
      )
    }
  }

  /// Refuses a configuration under which the newest checkpoint would mean something else.
  ///
  /// - Throws: ``RunError`` that names every key which was edited.
  public func requireUnchanged(_ configuration: Configuration) throws {
    // What cannot be read is damaged, and passed over on restoring.
    guard let newest = list().first,
      let stored = try? Configuration.load(file: newest.appending(path: "config.yaml"))
    else { return }
    let changed = configuration.differences(from: stored).filter { !Configuration.mayDiffer($0.path) }
    guard !changed.isEmpty else { return }
    let list = changed.map { "\($0.path) is \($0.value), was \($0.other)" }.joined(separator: "; ")
    throw RunError(
      "\(configFile.path): not as it was for \(newest.lastPathComponent): \(list): put it back, or start a new run"
    )
  }

  static func reason(_ error: any Error) -> String {
    if let cocoa = error as? CocoaError, let underlying = cocoa.userInfo[NSUnderlyingErrorKey] as? any Error {
      return underlying.localizedDescription
    }
    return error is CocoaError ? error.localizedDescription : "\(error)"
  }

  /// Removes what killed writes left: temporary files and unfinished checkpoints.
  func removeLeftovers() {
    let files = FileManager.default
    for name in (try? files.subpathsOfDirectory(atPath: url.path)) ?? [] {
      let last = URL(filePath: name).lastPathComponent
      if last.contains(".unfinished-") || last.contains(".tmp-") {
        try? files.removeItem(at: url.appending(path: name))
      }
    }
  }

  // MARK: metrics

  /// Appends one row.
  func append(_ row: MetricsRow) throws {
    let handle = open(metricsFile.path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0o644)
    guard handle >= 0 else { throw RunError("\(metricsFile.path): \(String(cString: strerror(errno)))") }
    defer { close(handle) }
    let line = [UInt8]((try row.json() + "\n").utf8)
    guard write(handle, line, line.count) == line.count else {
      throw RunError("\(metricsFile.path): \(String(cString: strerror(errno)))")
    }
  }

  /// Forgets rows after `iteration`, and a row cut off by a crash.
  func truncateMetrics(after iteration: Int) throws {
    guard let data = FileManager.default.contents(atPath: metricsFile.path) else { return }
    let kept = data.split(separator: UInt8(ascii: "\n")).filter { line in
      guard let row = try? JSONSerialization.jsonObject(with: Data(line)) as? [String: Any],
        let at = row["iteration"] as? Int
      else { return false }
      return at <= iteration
    }
    try AtomicFile.write(Data(kept.flatMap { $0 + [UInt8(ascii: "\n")] }), to: metricsFile)
  }

  // MARK: checkpoints

  /// What a checkpoint says of itself.
  struct State: Codable {
    struct File: Codable, Equatable { let bytes: Int, checksum: String }
    var format = 1
    let iteration: Int
    let update: Int
    let files: [String: File]
  }

  private func folder(_ iteration: Int) -> URL {
    checkpoints.appending(path: "iteration-" + String(iteration).leftPadded(to: 6))
  }

  /// Writes a checkpoint; `body` fills the folder it is given.
  func save(iteration: Int, update: Int, keep: Int, _ body: (URL) throws -> Void) throws {
    let files = FileManager.default
    try files.createDirectory(at: checkpoints, withIntermediateDirectories: true)
    let target = folder(iteration)
    let temporary = checkpoints.appending(path: ".unfinished-\(target.lastPathComponent)")
    try? files.removeItem(at: temporary)
    try files.createDirectory(at: temporary, withIntermediateDirectories: true)
    try body(temporary)
    var listed: [String: State.File] = [:]
    for name in try files.contentsOfDirectory(atPath: temporary.path) {
      listed[name] = try Self.describe(temporary.appending(path: name))
    }
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .prettyPrinted]
    try AtomicFile.write(
      try encoder.encode(State(iteration: iteration, update: update, files: listed)),
      to: temporary.appending(path: "state.json"))
    try? files.removeItem(at: target)
    try files.moveItem(at: temporary, to: target)
    AtomicFile.syncFolder(checkpoints)
    try AtomicFile.write(Data((target.lastPathComponent + "\n").utf8), to: url.appending(path: "LATEST"))
    // Newer ones are those a fall-back passed over as damaged: they would push this one out.
    for stale in list() where stale.lastPathComponent > target.lastPathComponent {
      try? files.removeItem(at: stale)
    }
    for old in list().dropFirst(keep) { try? files.removeItem(at: old) }
  }

  /// Checkpoint folders, newest first.
  private func list() -> [URL] {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: checkpoints.path)) ?? []
    return names.filter { $0.hasPrefix("iteration-") }.sorted(by: >).map { checkpoints.appending(path: $0) }
  }

  /// Brings the folder back to its newest whole checkpoint: without later rows, and what killed writes left.
  ///
  /// - Parameter warn: called with one line about each damaged checkpoint, or about there being none.
  /// - Returns: the checkpoint's folder and the iterations it has done; nil where there is none.
  func rewind(_ warn: (String) -> Void) throws -> (folder: URL, iteration: Int)? {
    removeLeftovers()
    let (found, warnings) = newestCheckpoint()
    for warning in warnings { warn(warning) }
    if found == nil { warn("no checkpoint yet: starting at iteration 0") }
    try truncateMetrics(after: found?.state.iteration ?? 0)
    return found.map { ($0.folder, $0.state.iteration) }
  }

  /// The newest checkpoint that is whole, and one line about each newer one that is not.
  func newestCheckpoint() -> (checkpoint: (folder: URL, state: State)?, warnings: [String]) {
    var warnings: [String] = []
    for folder in list() {
      do {
        return ((folder, try Self.validate(folder)), warnings)
      } catch {
        warnings.append("\(error); the checkpoint before it is used")
      }
    }
    return (nil, warnings)
  }

  /// The state of a checkpoint folder whose files are all as they were written.
  static func validate(_ folder: URL) throws -> State {
    guard let data = try? Data(contentsOf: folder.appending(path: "state.json")),
      let state = try? JSONDecoder().decode(State.self, from: data)
    else { throw RunError("\(folder.path): state.json is missing or damaged") }
    guard state.format == 1 else {
      throw RunError(
        "\(folder.path): checkpoint format \(state.format), this version reads 1: use a newer version")
    }
    for (name, expected) in state.files.sorted(by: { $0.key < $1.key }) {
      guard let found = try? describe(folder.appending(path: name)), found == expected else {
        throw RunError("\(folder.path): \(name) is missing, cut off or damaged")
      }
    }
    return state
  }

  private static func describe(_ file: URL) throws -> State.File {
    let data = try Data(contentsOf: file, options: .mappedIfSafe)
    return State.File(bytes: data.count, checksum: checksum(data))
  }

  /// FNV-1a, 64 bits: finds cuts and bit rot; it is no protection against intent.
  static func checksum(_ data: Data) -> String {
    let hash = data.withUnsafeBytes { bytes in
      bytes.reduce(UInt64(0xCBF2_9CE4_8422_2325)) { ($0 ^ UInt64($1)) &* 0x100_0000_01B3 }
    }
    return String(hash, radix: 16)
  }
}

/// A lock on a folder, gone with the process at the latest.
public final class FolderLock {
  private let descriptor: Int32

  /// nil if another process has it.
  init?(_ folder: URL) {
    descriptor = open(folder.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
    guard descriptor >= 0, flock(descriptor, LOCK_EX | LOCK_NB) == 0 else {
      if descriptor >= 0 { close(descriptor) }
      return nil
    }
  }
  deinit { close(descriptor) }
}
