import ArgumentParser
import FlowTraining
import Foundation
import Torch

struct Convert: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Turn a PyTorch checkpoint (.pt, .pth, .bin) into safetensors.",
    discussion: """
      Such files are pickles, which can run code when they are read: this program
      reads none. A Python with torch reads this one once, tensors only, in a process
      that can neither write other files, nor start programs, nor use the network
      (Documentation/CLIPRewards.md says how far that goes). Python is $PYTHON, else
      the checkout's .python/bin/python, else python3.

      Examples:
        chunkgrpo convert open_clip_pytorch_model.bin open_clip_model.safetensors
        chunkgrpo convert HPS_v2.1_compressed.pt hps.safetensors --key state_dict
      """)

  /// What floating-point tensors are converted to.
  enum Precision: String, CaseIterable, ExpressibleByArgument {
    case float32, float16, bfloat16
  }

  @Argument(help: "The checkpoint.")
  var input: String
  @Argument(help: "The file to write, ending in .safetensors.")
  var output: String
  @Option(help: "Where the tensors are, if not at the top: a key, or keys joined by dots.")
  var key: String?
  @Option(help: "Store floating-point tensors so: float32, float16 or bfloat16; others as they are.")
  var dtype: Precision?
  @Flag(help: "Replace the output if it is there.")
  var force = false
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  func validate() throws {
    guard output.hasSuffix(".safetensors") else {
      throw ValidationError("\(output): expected a name that ends in .safetensors")
    }
    guard key != "" else { throw ValidationError("--key: expected a key, got an empty one") }
  }

  func run() throws {
    var isFolder: ObjCBool = false
    guard FileManager.default.fileExists(atPath: input, isDirectory: &isFolder), !isFolder.boolValue else {
      throw RunError("\(input): \(isFolder.boolValue ? "is a folder; name a file in it" : "no such file")")
    }
    guard !input.hasSuffix(".safetensors") else {
      throw RunError("\(input): is a safetensors file already")
    }
    let target = URL(filePath: output)
    func requireNew() throws {
      guard force || !FileManager.default.fileExists(atPath: target.path) else {
        throw RunError("\(output): is there already; pass --force to replace it")
      }
    }
    try requireNew()
    try Terminal.requireWritable(output, "output")
    Interruption.watch()
    let temporary = URL(filePath: "\(target.path).tmp-\(getpid())")
    defer { unlink(temporary.path) }
    Terminal.status("\(input): reading")
    let reply = try convert(to: temporary)
    Terminal.clearLine()
    // The other side may be wrong as well: what it wrote is checked as any file is.
    let file = try SafetensorsFile(temporary)
    guard file.names.count == reply.tensors else {
      throw RunError("\(input): \(reply.tensors ?? 0) tensors announced, \(file.names.count) written")
    }
    try requireNew()
    guard rename(temporary.path, target.path) == 0 else {
      throw RunError("\(output): \(String(cString: strerror(errno)))")
    }
    AtomicFile.syncFolder(target.deletingLastPathComponent())
    for name in reply.leftOut ?? [] { Terminal.line("left out, as it is no tensor: \(name)") }
    if json {
      struct Result: Encodable {
        let output: String, tensors, bytes: Int, dtypes: [String: Int], leftOut, sandbox: [String]
      }
      print(
        try Terminal.json(
          Result(
            output: target.path, tensors: reply.tensors ?? 0, bytes: reply.bytes ?? 0,
            dtypes: reply.dtypes ?? [:], leftOut: reply.leftOut ?? [], sandbox: reply.sandbox ?? [])))
    } else {
      let dtypes = (reply.dtypes ?? [:]).sorted { $0.key < $1.key }.map { "\($0.value) \($0.key)" }
      let size = Double(reply.bytes ?? 0) / 1e6
      print(
        "\(target.path): \(reply.tensors ?? 0) tensors (\(dtypes.joined(separator: ", "))), "
          + "\((size * 10).rounded() / 10) MB; read by torch \(reply.torch ?? "?") behind "
          + (reply.sandbox ?? []).joined(separator: ", "))
    }
  }

  /// What ``PickleScript`` answers.
  private struct Reply: Decodable {
    var error, torch: String?
    var tensors, bytes: Int?
    var dtypes: [String: Int]?
    var leftOut, sandbox: [String]?
  }

  /// Asks the first Python that has torch.
  private func convert(to file: URL) throws -> Reply {
    let home = FileManager.default.temporaryDirectory.appending(path: "chunkgrpo-convert-\(UUID())")
    try FileManager.default.createDirectory(at: home, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: home) }
    var tried: [String] = []
    for python in Self.pythons() {
      guard let program = Self.found(python) else {
        tried.append("\(python) (not there)")
        continue
      }
      let (status, killed, out, err) = try ask(program, file, home)
      if status == 3, !killed {
        tried.append("\(program) (no torch)")
        continue
      }
      if let reply = try? JSONDecoder().decode(Reply.self, from: out) {
        if let error = reply.error { throw RunError("\(input): \(error)") }
        return reply
      }
      let said = err.split(separator: "\n").last.map { ": \($0)" } ?? ""
      throw RunError("\(input): \(program) ended with \(killed ? "signal" : "status") \(status)\(said)")
    }
    throw RunError(
      "no Python with torch, which reading \(input) needs; tried \(tried.joined(separator: ", ")); "
        + "set PYTHON to one that has torch 2.6 or newer")
  }

  private func ask(
    _ program: String, _ file: URL, _ home: URL
  ) throws -> (status: Int32, killed: Bool, out: Data, err: String) {
    let process = Process()
    process.executableURL = URL(filePath: program)
    // -I: neither the environment nor the current folder says what is imported; -B: no byte code is written.
    process.arguments = [
      "-I", "-B", "-c", PickleScript.text, URL(filePath: input).path, file.path, key ?? "",
      dtype?.rawValue ?? "",
    ]
    process.currentDirectoryURL = home
    var environment = [
      "PATH": "/usr/bin:/bin", "HOME": home.path, "TMPDIR": home.path, "LANG": "C.UTF-8",
      "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    ]
    // Where some installations have their libraries.
    environment["LD_LIBRARY_PATH"] = ProcessInfo.processInfo.environment["LD_LIBRARY_PATH"]
    process.environment = environment
    let logs = try ["out", "err"].map { name in
      let log = home.appending(path: name)
      try Data().write(to: log)
      return (log, try FileHandle(forWritingTo: log))
    }
    process.standardInput = FileHandle.nullDevice
    (process.standardOutput, process.standardError) = (logs[0].1, logs[1].1)
    do { try process.run() } catch {
      throw RunError("\(program): cannot be started: \(error.localizedDescription)")
    }
    for (_, handle) in logs { try handle.close() }
    do {
      while process.isRunning {
        try Interruption.check()
        usleep(10_000)
      }
    } catch {
      kill(process.processIdentifier, SIGKILL)
      process.waitUntilExit()
      throw error
    }
    process.waitUntilExit()
    let err = (try? String(contentsOf: logs[1].0, encoding: .utf8)) ?? ""
    return (
      process.terminationStatus, process.terminationReason == .uncaughtSignal,
      try Data(contentsOf: logs[0].0), err
    )
  }

  /// Where Python may be, in order; `$PYTHON` alone if it is set.
  private static func pythons() -> [String] {
    if let set = ProcessInfo.processInfo.environment["PYTHON"], !set.isEmpty { return [set] }
    let program = URL(filePath: "/proc/self/exe").resolvingSymlinksInPath()
    let checkout = program.deletingLastPathComponent().deletingLastPathComponent()
    var paths = [checkout.appending(path: ".python/bin/python").path]
    let here = FileManager.default.currentDirectoryPath + "/.python/bin/python"
    if !paths.contains(here) { paths.append(here) }
    return paths + ["python3"]
  }

  /// The program's path, looked up in PATH where it is a bare name; links stay: an environment is known by its own.
  private static func found(_ program: String) -> String? {
    let folders = (ProcessInfo.processInfo.environment["PATH"] ?? "").split(separator: ":")
    let candidates = program.contains("/") ? [program] : folders.map { "\($0)/\(program)" }
    return candidates.first { FileManager.default.isExecutableFile(atPath: $0) }
      .map { URL(filePath: $0).path }
  }
}
