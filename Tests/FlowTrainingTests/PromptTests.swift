import Foundation
import Testing

@testable import FlowTraining

@Suite("prompt files")
struct PromptTests {
  /// The result of reading `bytes` as a file called `name`, with the file's own path shortened to its name.
  private func read(
    _ bytes: some Sequence<UInt8>, name: String = "p.jsonl", split: String = "all"
  ) throws -> Result<PromptFile, PromptError> {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent(
      "prompts-\(UUID())", isDirectory: true)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: folder) }
    try Data(bytes).write(to: folder.appendingPathComponent(name))
    let file = URL(fileURLWithPath: name, relativeTo: folder)
    return Result { () throws(PromptError) in try PromptFile(file: file, split: split) }
  }

  private func message(
    _ bytes: some Sequence<UInt8>, name: String = "p.jsonl", split: String = "all"
  ) throws -> String {
    switch try read(bytes, name: name, split: split) {
    case .success: "no error"
    case .failure(let error): error.description
    }
  }

  static let position = """
    {"tag": "position", "include": [{"class": "circle", "color": "red", "count": 1}, \
    {"class": "square", "count": 2}], "prompt": "a \\"circle\\" left of a square", "split": "train", \
    "relation": "left of", "extra": [1]}
    """

  @Test("every field of a line is read and the line is kept")
  func oneLine() throws {
    // Oracle: the line, read by eye.
    let prompt = try #require(try read(Self.position.utf8).get().prompts.first)
    #expect(
      prompt
        == Prompt(
          text: "a \"circle\" left of a square", tag: "position", split: "train",
          include: [.init(name: "circle", color: "red"), .init(name: "square", count: 2)],
          relation: "left of",
          raw: Self.position))
    #expect(try JSONDecoder().decode(Prompt.self, from: JSONEncoder().encode(prompt)) == prompt)
  }

  @Test("plain text: one prompt a line, blank lines and margins dropped")
  func plainText() throws {
    let file = try read("\u{FEFF} a cat \r\n\r\nzwei Hunde 🐕\n".utf8, name: "p.TXT").get()
    #expect(file.prompts == [Prompt(text: "a cat"), Prompt(text: "zwei Hunde 🐕")])
    #expect(file.prompts[0].raw == #"{"prompt":"a cat"}"#)
    #expect(file.warnings.isEmpty)
  }

  @Test("splits are selected, all takes every prompt")
  func splits() throws {
    let lines =
      #"{"prompt": "a", "split": "train"}"# + "\n" + #"{"prompt": "b", "split": "test"}"#
      + "\n{\"prompt\": \"c\"}"
    #expect(try read(lines.utf8, split: "test").get().prompts.map(\.text) == ["b"])
    #expect(try read(lines.utf8).get().prompts.map(\.text) == ["a", "b", "c"])
    #expect(
      try message(lines.utf8, split: "dev")
        == "p.jsonl: no prompt in split dev; the file has test, train (or all)")
    #expect(
      try message("a".utf8, name: "p.txt", split: "train")
        == "p.txt: no prompt in split train, the file has no splits; ask for the split all")
  }

  @Test("copies of a text are reported with their lines and splits")
  func copies() throws {
    let lines = ["a,train", "b,train", "a,test", "b,train"].map { line in
      #"{"prompt": "\#(line.first!)", "split": "\#(line.dropFirst(2))"}"#
    }
    let file = try read(lines.joined(separator: "\n").utf8, split: "train").get()
    #expect(file.prompts.map(\.text) == ["a", "b", "b"])
    #expect(
      file.warnings == [
        "p.jsonl: \"a\" appears 2 times: line 1 (train), line 3 (test)",
        "p.jsonl: \"b\" appears 2 times: line 2 (train), line 4 (train)",
      ])
  }

  @Test(
    "bad lines name the line and the reason",
    arguments: [
      ("{\"prompt\": \"a\"}\n\n{\"prompt\": ", "p.jsonl:3: not a JSON object"),
      ("a photo of a cat", "p.jsonl:1: not a JSON object"),
      ("[1]", "p.jsonl:1: expected an object"),
      ("\"text\"", "p.jsonl:1: expected an object"),
      ("{\"text\": \"a\"}", "p.jsonl:1: no \"prompt\" field"),
      ("{\"prompt\": 5}", "p.jsonl:1: prompt: expected a string"),
      ("{\"prompt\": null}", "p.jsonl:1: prompt: expected a string"),
      ("{\"prompt\": \" \"}", "p.jsonl:1: prompt: empty"),
      ("{\"prompt\": \"a\", \"include\": {}}", "p.jsonl:1: include: expected a list"),
      ("{\"prompt\": \"a\", \"include\": [{\"count\": 1}]}", "p.jsonl:1: include[0]: no \"class\" field"),
      (
        "{\"prompt\": \"a\", \"include\": [{\"class\": \"cat\"}]}",
        "p.jsonl:1: include[0]: no \"count\" field"
      ),
      (
        "{\"prompt\": \"a\", \"include\": [{\"class\": \"cat\", \"count\": \"x\"}]}",
        "p.jsonl:1: include[0].count: expected an integer"
      ),
      (
        "{\"prompt\": \"a\", \"include\": [{\"class\": \"cat\", \"count\": 0}]}",
        "p.jsonl:1: include[0].count: expected at least 1, got 0"
      ),
      ("", "p.jsonl: no prompt in it"),
      (" \n\n", "p.jsonl: no prompt in it"),
    ])
  func badLines(_ text: String, _ expected: String) throws {
    #expect(try message(text.utf8) == expected)
  }

  @Test("bytes that are not UTF-8 are located")
  func notUTF8() throws {
    // 2-byte ä, a newline, "b", then a lone continuation byte: offset 4, second line.
    #expect(
      try message([0xC3, 0xA4, 0x0A, 0x62, 0x80, 0x0A], name: "p.txt")
        == "p.txt:2: not UTF-8 at byte 4; save it as UTF-8")
    // A sequence cut off by the end of the file begins at offset 1.
    #expect(
      try message([0x61, 0xE2, 0x82], name: "p.txt") == "p.txt:1: not UTF-8 at byte 1; save it as UTF-8")
  }

  @Test("files that cannot be read")
  func unreadable() {
    let file = URL(fileURLWithPath: "/nowhere/p.txt")
    #expect(throws: PromptError.unreadable(file: "/nowhere/p.txt", reason: "no such file")) {
      try PromptFile.load(file: file, split: "all")
    }
    let folder = FileManager.default.temporaryDirectory
    #expect(throws: PromptError.unreadable(file: folder.path, reason: "is a folder, expected a file")) {
      try PromptFile.load(file: folder, split: "all")
    }
  }

  @Test("the shipped file", arguments: [("train", 665), ("dev", 97), ("test", 192), ("all", 954)])
  func shippedFile(_ split: String, _ count: Int) throws {
    // Oracle: the counts its description publishes.
    var root = URL(fileURLWithPath: #filePath)
    for _ in 0..<3 { root.deleteLastPathComponent() }
    let file = try PromptFile(file: root.appendingPathComponent("Data/prompts.jsonl"), split: split)
    #expect(file.prompts.count == count)
    #expect(file.warnings.isEmpty)
    for prompt in file.prompts {
      #expect(!prompt.include.isEmpty && prompt.tag != nil)
      #expect((prompt.tag == "position") == (prompt.relation != nil))
    }
  }
}
