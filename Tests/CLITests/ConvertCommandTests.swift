import Foundation
import Testing

/// convert as a user runs it. Oracle: tensors that torch wrote (`make`, below), whose bytes are written down here; and for
/// what must not happen, a file that the pickle would have made.
@Suite("convert", .enabled(if: torchPython != nil || isCI, "no Python with torch"))
struct ConvertCommandTests {
  fileprivate static func run(_ program: String, _ arguments: [String]) throws -> Int32 {
    let process = Process()
    process.executableURL = URL(filePath: program)
    process.arguments = arguments
    process.standardError = FileHandle.nullDevice
    try process.run()
    process.waitUntilExit()
    return process.terminationStatus
  }

  private static let make = """
    import os, pickle, sys, torch
    base = torch.arange(6.).reshape(2, 3)
    state = {
        "base": base, "turned": base.t(), "same": base, "cut": torch.arange(10.)[1:8:3], "half": torch.tensor([1.5, -2]).half(),
        "brain": torch.tensor([[1.5], [-2]]).bfloat16(), "ids": torch.arange(3), "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "weight": torch.nn.Parameter(torch.ones(2))}
    os.chdir(sys.argv[1])
    torch.save({"epoch": 3, "inner": {"state_dict": state}, "a.b": {"x": base}}, "nested.pt")
    torch.save(state | {"step": 7}, "flat.pth")
    torch.save(state, "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"x": base.to_sparse()}, "sparse.pt")
    torch.save(base, "one.pt")
    torch.save([base], "list.pt")

    class Evil:
        def __reduce__(self): return (os.system, (f"touch {sys.argv[1]}/harm",))

    class Other:
        pass

    torch.save({"x": base, "y": Evil()}, "evil.pt")
    torch.save({"x": base, "y": Evil()}, "old-evil.pt", _use_new_zipfile_serialization=False)
    pickle.dump(Evil(), open("evil.bin", "wb"))
    torch.save({"x": base, "y": Other()}, "other.pt")
    """

  let scratch: Scratch
  init() throws {
    scratch = try Scratch()
    let made = try Self.checkpoints.get()
    for name in try FileManager.default.contentsOfDirectory(atPath: made.path) where name != "harm" {
      try scratch.copy(made.appending(path: name), to: name)
    }
  }

  /// What `make` writes, once for all tests.
  private static let checkpoints = Result {
    let folder = checkpointFolder
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    atexit { try? FileManager.default.removeItem(at: checkpointFolder) }
    try #require(try run(try #require(torchPython), ["-c", make, folder.path]) == 0)
    return folder
  }

  private func convert(_ arguments: String..., status: Int32 = 0) throws -> Tool.Result {
    var environment = ProcessInfo.processInfo.environment
    environment["PYTHON"] = torchPython
    let result = try Tool.run(["convert"] + arguments, in: scratch, environment: environment)
    try #require(result.status == status, "\(arguments): \(result.out) \(result.err)")
    return result
  }

  /// Header and data of a safetensors file.
  private func read(_ name: String) throws -> [String: (dtype: String, shape: [Int], data: [UInt8])] {
    let bytes = try scratch.data(name)
    let length = bytes.prefix(8).enumerated().reduce(0) { $0 | Int($1.element) << (8 * $1.offset) }
    #expect(length % 8 == 0)
    let header = try #require(
      try JSONSerialization.jsonObject(with: bytes[8..<(8 + length)]) as? [String: Any])
    return try header.mapValues { entry in
      let entry = try #require(entry as? [String: Any])
      let offsets = try #require(entry["data_offsets"] as? [Int])
      return (
        try #require(entry["dtype"] as? String), try #require(entry["shape"] as? [Int]),
        [UInt8](bytes[(8 + length + offsets[0])..<(8 + length + offsets[1])])
      )
    }
  }
  private func floats(_ values: [Float]) -> [UInt8] {
    values.flatMap { value in withUnsafeBytes(of: value.bitPattern.littleEndian) { [UInt8]($0) } }
  }

  private func expectState(_ name: String) throws {
    let found = try read(name)
    #expect(found.count == 11)
    func expect(_ key: String, _ dtype: String, _ shape: [Int], _ data: [UInt8]) throws {
      let entry = try #require(found[key], "\(key)")
      #expect(entry.dtype == dtype && entry.shape == shape && entry.data == data, "\(key): \(entry)")
    }
    try expect("base", "F32", [2, 3], floats([0, 1, 2, 3, 4, 5]))
    try expect("same", "F32", [2, 3], floats([0, 1, 2, 3, 4, 5]))
    try expect("turned", "F32", [3, 2], floats([0, 3, 1, 4, 2, 5]))
    try expect("cut", "F32", [3], floats([1, 4, 7]))
    try expect("half", "F16", [2], [0x00, 0x3E, 0x00, 0xC0])
    try expect("brain", "BF16", [2, 1], [0xC0, 0x3F, 0x00, 0xC0])
    try expect("ids", "I64", [3], [0, 1, 2].flatMap { [$0, 0, 0, 0, 0, 0, 0, 0] })
    try expect("mask", "BOOL", [2], [1, 0])
    try expect("scalar", "F32", [], floats([2.5]))
    try expect("none", "F32", [0, 3], [])
    try expect("weight", "F32", [2], floats([1, 1]))
  }

  @Test("a nested state_dict: found by --key, to the byte; --json")
  func nested() throws {
    let result = try convert("nested.pt", "out.safetensors", "--key", "inner.state_dict", "--json")
    try expectState("out.safetensors")
    let answer = try result.json()
    #expect(answer["tensors"] as? Int == 11)
    #expect(answer["dtypes"] as? [String: Int] == ["F32": 7, "F16": 1, "BF16": 1, "I64": 1, "BOOL": 1])
    #expect((answer["sandbox"] as? [String])?.first == "limits")
    #expect(scratch.listing().keys.filter { $0.contains("tmp") }.isEmpty)
    // A key with a dot in it is that key.
    _ = try convert("nested.pt", "dot.safetensors", "--key", "a.b")
    #expect(try read("dot.safetensors").keys.sorted() == ["x"])
  }

  @Test("flat files of both formats; what is no tensor is named; another dtype for floats only")
  func flat() throws {
    let flat = try convert("flat.pth", "flat.safetensors")
    #expect(flat.err.contains("left out, as it is no tensor: step (int)"))
    #expect(flat.out.contains("11 tensors (1 BF16, 1 BOOL, 1 F16, 7 F32, 1 I64)"))
    try expectState("flat.safetensors")
    _ = try convert("old.bin", "old.safetensors")
    try expectState("old.safetensors")
    _ = try convert("old.bin", "half.safetensors", "--dtype", "float16")
    let halves = try read("half.safetensors")
    #expect(halves.values.map(\.dtype).sorted() == ["BOOL"] + [String](repeating: "F16", count: 9) + ["I64"])
    #expect(halves["scalar"]?.data == [0x00, 0x41])  // 2.5
    // What the tool writes, it reads.
    #expect(try Tool.run(["inspect", "half.safetensors"], in: scratch).out.contains("11 tensors"))
  }

  @Test("a pickle that would run a program is refused, by name, and nothing runs")
  func evil() throws {
    let harm = checkpointFolder.appending(path: "harm").path
    for (file, words) in [
      ("evil.pt", "refused: it asks for"), ("old-evil.pt", "refused: it asks for"), ("evil.bin", "refused"),
      ("other.pt", "refused: it asks for __main__.Other"),
    ] {
      let result = try convert(file, "out.safetensors", status: 1)
      #expect(result.err.contains("error: \(file): \(words)"), "\(result.err)")
      #expect(!result.err.contains("Traceback"))
      #expect(!FileManager.default.fileExists(atPath: harm) && !scratch.exists("out.safetensors"))
    }
    // Read without care, it does run: the trap is a real one.
    let careless = "import sys, torch; torch.load(sys.argv[1], weights_only=False)"
    _ = try Self.run(try #require(torchPython), ["-c", careless, scratch.path("evil.pt")])
    #expect(FileManager.default.fileExists(atPath: harm))
  }

  // Oracle: the files and errors that are there afterwards. The shipped script, with its work replaced by what a pickle
  // could do that had broken out of torch.load.
  @Test("behind the doors nothing is written, started or sent")
  func doors() throws {
    struct Answer: Decodable { let doors, done: [String] }
    let attack = """
      import socket, subprocess
      here, done = os.path.dirname(source), []
      def attempt(name, action):
          try:
              action()
              done.append(name)
          except (OSError, MemoryError):
              pass
      attempt("write", lambda: open(here + "/harm", "w"))
      attempt("append", lambda: open(source, "ab"))
      attempt("truncate", lambda: os.truncate(source, 1))
      attempt("remove", lambda: os.unlink(source))
      attempt("rename", lambda: os.rename(source, source + "2"))
      attempt("folder", lambda: os.mkdir(here + "/folder"))
      attempt("link", lambda: os.symlink(source, here + "/link"))
      attempt("mode", lambda: os.chmod(source, 0o777))
      attempt("program", lambda: subprocess.check_call(["true"]))
      attempt("exec", lambda: os.execv("/bin/true", ["true"]))
      attempt("fork", lambda: os.fork())
      attempt("socket", lambda: socket.socket())
      attempt("local socket", lambda: socket.socket(socket.AF_UNIX))
      attempt("signal", lambda: os.kill(os.getppid(), 0))
      attempt("memory", lambda: bytearray(16 << 30))
      attempt("output", lambda: (output.write(bytes(100 << 20)), output.flush()))
      end(doors=doors, done=done)
      """
    let file = Tool.root.appending(path: "Sources/ChunkGRPOCommands/PickleScript.swift")
    let swift = try String(contentsOf: file, encoding: .utf8)
    let literal = try #require(
      swift.components(separatedBy: "#\"\"\"\n").last?.components(separatedBy: "\"\"\"#")[0])
    let script = literal.split(separator: "\n", omittingEmptySubsequences: false).map { $0.dropFirst(4) }
      .joined(separator: "\n")
    let parts = script.components(separatedBy: "try:\n    end(**convert()")
    try #require(parts.count == 2)
    try Data().write(to: scratch["answer.json"])
    let out = try FileHandle(forWritingTo: scratch["answer.json"])
    let before = try scratch.data("old.bin")
    let process = Process()
    process.executableURL = URL(filePath: try #require(torchPython))
    process.arguments = [
      "-I", "-B", "-c", parts[0] + attack, scratch.path("old.bin"), scratch.path("target"), "", "",
    ]
    (process.standardOutput, process.standardError) = (out, FileHandle.nullDevice)
    try process.run()
    process.waitUntilExit()
    let answer = try JSONDecoder().decode(Answer.self, from: scratch.data("answer.json"))
    #expect(answer.doors.first == "limits")
    // A kernel without them is not a failure of ours; both are in every one that CI uses.
    if answer.doors == ["limits", "landlock", "seccomp"] { #expect(answer.done == []) }
    #expect(!answer.done.contains("memory") && !answer.done.contains("output"))
    #expect(try scratch.data("old.bin") == before)
  }

  @Test("what cannot be converted says why, and how it can")
  func refused() throws {
    func expect(_ arguments: [String], _ words: [String]) throws {
      let environment = ProcessInfo.processInfo.environment.merging(["PYTHON": try #require(torchPython)]) {
        $1
      }
      let result = try Tool.run(["convert"] + arguments, in: scratch, environment: environment)
      #expect(result.status != 0 && result.out.isEmpty, "\(arguments)")
      for word in words { #expect(result.err.contains(word), "\(arguments): \(result.err)") }
      #expect(!scratch.exists("out.safetensors"))
    }
    let out = "out.safetensors"
    try expect(
      ["nested.pt", out],
      ["no tensors, but: epoch (int), inner (dictionary of 1), a.b (1 tensors); pass --key"])
    try expect(
      ["nested.pt", out, "--key", "inner"], ["state_dict (11 tensors); pass --key inner.state_dict"])
    try expect(
      ["nested.pt", out, "--key", "model"], ["there is no model under --key model; there is: epoch (int)"])
    try expect(["nested.pt", out, "--key", "epoch"], ["expected a dictionary of tensors, got: int"])
    try expect(["one.pt", out], ["expected a dictionary of tensors, got: tensor"])
    try expect(["list.pt", out], ["expected a dictionary of tensors, got: list"])
    try expect(["sparse.pt", out], ["x is torch.float32 torch.sparse_coo on cpu"])
    try expect(["gone.pt", out], ["gone.pt: no such file"])
    try expect([".", out], [".: is a folder"])
    try expect(["one.pt", "out.bin"], ["out.bin: expected a name that ends in .safetensors"])
    try expect(["one.pt", "no/out.safetensors"], ["no is not a folder that can be written"])
    try expect(["one.pt", out, "--dtype", "int8"], ["--dtype"])
    try scratch.write("not a checkpoint", to: "text.pt")
    try expect(["text.pt", out], ["text.pt: refused by torch.load(weights_only=True): "])
  }

  @Test("nothing is overwritten without --force")
  func overwriting() throws {
    try scratch.write("mine", to: "out.safetensors")
    let kept = try convert("old.bin", "out.safetensors", status: 1)
    #expect(kept.err.contains("out.safetensors: is there already; pass --force"))
    #expect(try scratch.text("out.safetensors") == "mine")
    _ = try convert("evil.pt", "out.safetensors", "--force", status: 1)
    #expect(try scratch.text("out.safetensors") == "mine")
    _ = try convert("old.bin", "out.safetensors", "--force")
    try expectState("out.safetensors")
    #expect(
      try convert("out.safetensors", "again.safetensors", status: 1).err
        .contains("out.safetensors: is a safetensors file already"))
  }

  @Test("a Python that is not there, or has no torch, is named")
  func noPython() throws {
    var environment = ProcessInfo.processInfo.environment
    environment["PYTHON"] = "/gone/python"
    let gone = try Tool.run(["convert", "old.bin", "out.safetensors"], in: scratch, environment: environment)
    #expect(gone.status == 1)
    #expect(
      gone.err.contains("tried /gone/python (not there); set PYTHON to one that has torch 2.6 or newer"))
    try scratch.write("#!/bin/sh\nexit 3\n", to: "python")
    try FileManager.default.setAttributes([.posixPermissions: 0o755], ofItemAtPath: scratch.path("python"))
    environment["PYTHON"] = scratch.path("python")
    let bare = try Tool.run(["convert", "old.bin", "out.safetensors"], in: scratch, environment: environment)
    #expect(bare.status == 1 && bare.err.contains("python (no torch)"))
  }
}

private let checkpointFolder = FileManager.default.temporaryDirectory.appending(
  path: "chunkgrpo-checkpoints-\(UUID())")

/// One that has torch, whichever of those that the build knows.
private let torchPython: String? = {
  let environment = ProcessInfo.processInfo.environment
  let known: [String?] = [
    environment["PYTHON"], environment["CHUNKGRPO_TEST_PYTHON"],
    Tool.root.appending(path: ".python/bin/python").path,
    Tool.root.appending(path: ".python-tests/bin/python").path, "/usr/bin/python3",
  ]
  return known.compactMap { $0 }.first { path in
    guard FileManager.default.isExecutableFile(atPath: path) else { return false }
    return
      (try? ConvertCommandTests.run(
        path, ["-c", "import importlib.util as u; exit(u.find_spec('torch') is None)"])) == 0
  }
}()

private let isCI = ProcessInfo.processInfo.environment["CI"] == "true"
