import Foundation
import Testing

/// The built executable, as a user runs it.
enum Tool {
  static let tests = URL(filePath: #filePath).deletingLastPathComponent()
  static let root = tests.deletingLastPathComponent().deletingLastPathComponent()
  static let binary = root.appending(path: "bin/chunkgrpo")
  /// 135 040 parameters, any size in multiples of 16 pixels.
  static let fluxTiny = root.appending(path: "Tests/Fixtures/parity/flux-tiny")
  static let fluxMini = root.appending(path: "Models/flux-mini")

  struct NotBuilt: Error, CustomStringConvertible {
    var description: String { "\(binary.path) is missing: run `make build` first" }
  }
  struct TimedOut: Error, CustomStringConvertible {
    let command: String, output: String
    var description: String { "\(command): killed after its time was up; it had said:\n\(output)" }
  }

  /// How a process ended and what it said.
  struct Result {
    /// Exit code, or 128 + signal.
    let status: Int32
    let killed: Bool
    let out, err: String

    /// Standard output as the one JSON object that `--json` promises.
    func json() throws -> [String: Any] {
      // JSONSerialization refuses anything before or after the object.
      let object = try JSONSerialization.jsonObject(with: Data(out.utf8)) as? [String: Any]
      return try #require(object, "not one JSON object: \(out)")
    }
  }

  /// Runs to the end; kills it and throws when it takes longer than `limit` seconds.
  static func run(
    _ arguments: [String], in folder: Scratch, binary: URL = binary, environment: [String: String]? = nil,
    limit: Double = 180
  ) throws -> Result {
    try start(arguments, in: folder, binary: binary, environment: environment).wait(limit: limit)
  }

  static func start(
    _ arguments: [String], in folder: Scratch, binary: URL = binary, environment: [String: String]? = nil
  ) throws -> Running {
    try Running(arguments, folder, binary, environment)
  }

  /// A process that may still run.
  final class Running {
    private let process = Process()
    private let command: String
    private let files: [URL]

    fileprivate init(
      _ arguments: [String], _ folder: Scratch, _ binary: URL, _ environment: [String: String]?
    ) throws {
      guard FileManager.default.isExecutableFile(atPath: binary.path) else { throw NotBuilt() }
      command = (["chunkgrpo"] + arguments).joined(separator: " ")
      process.executableURL = binary
      process.arguments = arguments
      process.currentDirectoryURL = folder.url
      // One thread: these models are too small for two, and tests run side by side.
      process.environment =
        environment ?? ProcessInfo.processInfo.environment.merging(["OMP_NUM_THREADS": "1"]) { $1 }
      // Files, not pipes: nothing blocks when they fill, and other children cannot hold them open.
      let logs = folder.logs
      files = ["out", "err"].map { logs.appending(path: "\(UUID()).\($0)") }
      let handles = try files.map { file in
        try Data().write(to: file)
        return try FileHandle(forWritingTo: file)
      }
      process.standardInput = FileHandle.nullDevice
      (process.standardOutput, process.standardError) = (handles[0], handles[1])
      // Threads of the test runner block signals, and children inherit that.
      var (signals, before) = (sigset_t(), sigset_t())
      sigemptyset(&signals)
      for signal in [SIGINT, SIGTERM] { sigaddset(&signals, signal) }
      pthread_sigmask(SIG_UNBLOCK, &signals, &before)
      defer { pthread_sigmask(SIG_SETMASK, &before, nil) }
      try process.run()
      for handle in handles { try handle.close() }
    }

    var isRunning: Bool { process.isRunning }
    var err: String { (try? String(contentsOf: files[1], encoding: .utf8)) ?? "" }
    func send(_ signal: Int32) { if process.isRunning { kill(process.processIdentifier, signal) } }

    func wait(limit: Double = 180) throws -> Result {
      guard waitUntil(limit: limit, { !self.process.isRunning }) else {
        send(SIGKILL)
        process.waitUntilExit()
        throw TimedOut(command: command, output: err)
      }
      let killed = process.terminationReason == .uncaughtSignal
      return Result(
        status: killed ? 128 + process.terminationStatus : process.terminationStatus, killed: killed,
        out: try String(contentsOf: files[0], encoding: .utf8), err: err)
    }
  }
}

/// Asks every millisecond until `condition` holds; false if it did not in `limit` seconds.
@discardableResult
func waitUntil(limit: Double, _ condition: () -> Bool) -> Bool {
  let end = ContinuousClock.now + .seconds(limit)
  while !condition() {
    guard ContinuousClock.now < end else { return false }
    usleep(1000)
  }
  return true
}

/// A folder of its own for one test, gone afterwards.
final class Scratch {
  let url: URL
  /// What processes said; beside `url`, so that listings hold only what the tool wrote.
  let logs: URL
  private let top: URL

  init() throws {
    let base = FileManager.default.temporaryDirectory.resolvingSymlinksInPath()
    top = base.appending(path: "chunkgrpo-cli-\(UUID())")
    (url, logs) = (top.appending(path: "work"), top.appending(path: "logs"))
    for folder in [url, logs] {
      try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    }
  }
  deinit { try? FileManager.default.removeItem(at: top) }

  subscript(_ path: String) -> URL { url.appending(path: path) }
  func path(_ path: String) -> String { self[path].path }
  func exists(_ path: String) -> Bool { FileManager.default.fileExists(atPath: self.path(path)) }
  func data(_ path: String) throws -> Data { try Data(contentsOf: self[path]) }
  func text(_ path: String) throws -> String { try String(contentsOf: self[path], encoding: .utf8) }

  func write(_ bytes: some Sequence<UInt8>, to path: String) throws {
    try FileManager.default.createDirectory(
      at: self[path].deletingLastPathComponent(), withIntermediateDirectories: true)
    try Data(bytes).write(to: self[path])
  }
  func write(_ text: String, to path: String) throws { try write(text.utf8, to: path) }
  func copy(_ source: URL, to path: String) throws {
    try FileManager.default.copyItem(at: source, to: self[path])
  }

  /// `source` as the Hugging Face hub caches it: links in `snapshots/REVISION/…` to `blobs/HASH`, whose names
  /// have no extension. Returns the snapshot's path.
  func hubCache(of source: URL) throws -> String {
    let snapshot = "hub/models--maker--tiny/snapshots/0123abc"
    let files = FileManager.default
    let blobs = path("hub/models--maker--tiny/blobs")
    var count = ((try? files.contentsOfDirectory(atPath: blobs)) ?? []).count
    for case let name as String in files.enumerator(atPath: source.path) ?? .init() {
      var isFolder: ObjCBool = false
      _ = files.fileExists(atPath: source.appending(path: name).path, isDirectory: &isFolder)
      if isFolder.boolValue { continue }
      let blob = String(count + 0xAB_C000, radix: 16)
      try write(
        try Data(contentsOf: source.appending(path: name)), to: "hub/models--maker--tiny/blobs/\(blob)")
      let link = self["\(snapshot)/\(name)"]
      try files.createDirectory(at: link.deletingLastPathComponent(), withIntermediateDirectories: true)
      let up = String(repeating: "../", count: 1 + name.split(separator: "/").count)
      try files.createSymbolicLink(atPath: link.path, withDestinationPath: "\(up)blobs/\(blob)")
      count += 1
    }
    return snapshot
  }

  /// Writes `config.yaml` for the smallest run there is, into `run`, and the prompts it names.
  func configure(_ name: String = "config.yaml", model: URL = Tool.fluxTiny, settings: String = "") throws {
    let size = model == Tool.fluxMini ? "guidance: null, height: 64, width: 64" : "height: 32, width: 48"
    try write(
      """
      model: \(model.path)
      output: run
      prompts: {file: prompts.jsonl}
      rewards: [{name: vivid}]
      sampling: {steps: 3, \(size)}
      group: {size: 2, promptsPerIteration: 1}
      chunk: {plan: step}
      optim: {lr: 1.0e-3, maxGradNorm: 1}
      network: {dtype: float32}
      \(settings.isEmpty ? "run: {iterations: 2, checkpointEvery: 1, samplesEvery: 0, evaluateEvery: 0}" : settings)

      """, to: name)
    let prompts = [
      ("a photo of a cat", "single", "train"), ("a photo of two dogs", "count", "train"),
      ("a photo of a red star", "colour", "dev"), ("a photo of a cube", "single", "dev"),
      ("a photo of a blue house", "colour", "test"), ("a photo of three birds", "count", "test"),
    ]
    try write(
      prompts.map { #"{"prompt": "\#($0.0)", "tag": "\#($0.1)", "split": "\#($0.2)"}"# + "\n" }.joined(),
      to: self[name].deletingLastPathComponent().path.dropFirst(url.path.count) + "/prompts.jsonl")
  }

  /// Trains; the configuration here unless `arguments` say otherwise.
  func train(_ arguments: String...) throws {
    let result = try Tool.run(["train"] + (arguments.isEmpty ? ["config.yaml"] : arguments), in: self)
    try #require(result.status == 0, "\(result.err)")
  }

  /// Everything below `path`: files with their contents, folders with nil.
  func listing(_ path: String = "") -> [String: Data?] {
    let start = path.isEmpty ? url : self[path]
    var found: [String: Data?] = [:]
    for case let name as String in FileManager.default.enumerator(atPath: start.path) ?? .init() {
      found.updateValue(FileManager.default.contents(atPath: start.appending(path: name).path), forKey: name)
    }
    return found
  }

  /// The rows of a run's metrics without what a clock measured, as canonical JSON.
  func metrics(_ run: String = "run") throws -> [String] {
    try text("\(run)/metrics.jsonl").split(separator: "\n").map { line in
      var row = try #require(try JSONSerialization.jsonObject(with: Data(line.utf8)) as? [String: Any])
      for key in ["seconds", "images_per_s"] { row[key] = nil }
      return String(
        decoding: try JSONSerialization.data(withJSONObject: row, options: .sortedKeys), as: UTF8.self)
    }
  }
}

/// Changes a safetensors file: its header (as JSON) or its data (offsets as in the header).
func editSafetensors(_ file: URL, _ edit: (inout [String: Any], inout Data) throws -> Void) throws {
  let bytes = try Data(contentsOf: file)
  let length = bytes.prefix(8).enumerated().reduce(0) { $0 | Int($1.element) << (8 * $1.offset) }
  let object = try JSONSerialization.jsonObject(with: bytes[8..<(8 + length)])
  var header = try #require(object as? [String: Any])
  var data = Data(bytes[(8 + length)...])
  try edit(&header, &data)
  let json = try JSONSerialization.data(withJSONObject: header)
  let prefix = withUnsafeBytes(of: UInt64(json.count).littleEndian) { Data($0) }
  try (prefix + json + data).write(to: file)
}
