import Foundation
import Testing

/// Help texts against `Snapshots/*.txt`, which were read by eye.
///
/// After a change that is meant: `RECORD_SNAPSHOTS=1 swift test --filter HelpTests`, and read the diff.
@Suite("help")
struct HelpTests {
  static let commands = [
    "", "train", "pretrain", "sample", "evaluate", "score", "encode", "inspect", "export", "merge", "convert",
    "chunks", "noise",
    "verify",
    "study",
    "demo",
    "bench",
  ]
  static let isRecording = ProcessInfo.processInfo.environment["RECORD_SNAPSHOTS"] != nil

  @Test("--help is the snapshot, with an example, on stdout", arguments: commands)
  func help(_ command: String) throws {
    let result = try Tool.run((command.isEmpty ? [] : [command]) + ["--help"], in: Scratch())
    #expect(result.status == 0)
    #expect(result.err.isEmpty)
    // A line to copy: at least the command itself with an argument.
    #expect(result.out.contains(try Regex("chunkgrpo \(command.isEmpty ? "train" : command) [A-Za-z]")))
    let name = (command.isEmpty ? "chunkgrpo" : command) + ".txt"
    let snapshot = Tool.tests.appending(path: "Snapshots/\(name)")
    if Self.isRecording { try Data(result.out.utf8).write(to: snapshot) }
    let expected = try String(contentsOf: snapshot, encoding: .utf8)
    #expect(
      result.out == expected, "Snapshots/\(name): see HelpTests.swift for how to record an intended change")
  }

  @Test("the root's help names every command that has a snapshot, and no other")
  func commandsAreListed() throws {
    // Oracle: the commands of the README's list, above.
    let root = try Tool.run(["--help"], in: Scratch()).out
    let listed = root.split(separator: "\n").drop { $0 != "SUBCOMMANDS:" }.dropFirst()
      .filter { $0.hasPrefix("  ") && !$0.hasPrefix("   ") && !$0.contains("See '") }
      .map { String($0.split(separator: " ")[0]) }
    #expect(listed == Array(Self.commands.dropFirst()))
  }

  @Test("--version prints a version alone")
  func version() throws {
    let result = try Tool.run(["--version"], in: Scratch())
    #expect(result.status == 0)
    #expect(result.err.isEmpty)
    #expect(try result.out.wholeMatch(of: Regex(#"\d+\.\d+\.\d+\n"#)) != nil)
  }
}
