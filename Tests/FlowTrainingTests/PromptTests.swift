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

  // MARK: - Tables

  @Test("a table: quotes, commas and line breaks in fields; every column is kept in order")
  func table() throws {
    // Oracle: RFC 4180 section 2, by eye.
    let text =
      "\u{FEFF}id,prompt,tag,split\r\n1,a cat,animals,train\r\n\r\n"
      + "2,\"a sign, that says \"\"OPEN\"\"\",,test\r\n3,\"two\nlines\",x,\"train\"\n4,\"\"\"quoted\"\"\",,"
    let file = try read(text.utf8, name: "p.CSV").get()
    #expect(
      file.prompts == [
        Prompt(
          text: "a cat", tag: "animals", split: "train",
          raw: #"{"id":"1","prompt":"a cat","tag":"animals","split":"train"}"#),
        Prompt(
          text: "a sign, that says \"OPEN\"", split: "test",
          raw: #"{"id":"2","prompt":"a sign, that says \"OPEN\"","tag":"","split":"test"}"#),
        Prompt(
          text: "two\nlines", tag: "x", split: "train",
          raw: #"{"id":"3","prompt":"two\nlines","tag":"x","split":"train"}"#),
        Prompt(text: "\"quoted\"", raw: #"{"id":"4","prompt":"\"quoted\"","tag":"","split":""}"#),
      ])
    #expect(
      try read(text.utf8, name: "p.csv", split: "test").get().prompts.map(\.text) == [
        "a sign, that says \"OPEN\""
      ])
    #expect(try read("prompt\na\n b \n".utf8, name: "p.csv").get().prompts.map(\.text) == ["a", " b "])
    #expect(
      try read("prompt,n\na,1\n\"x\ny\",2\na,3\n".utf8, name: "p.csv").get().warnings
        == ["p.csv: \"a\" appears 2 times: line 2, line 5"])
  }

  @Test(
    "tables that are none name the line and the reason",
    arguments: [
      (
        "caption,id\na,1",
        "p.csv:1: no column \"prompt\"; the first row names the columns, and it has caption, id"
      ),
      (
        "a photo of a cat",
        "p.csv:1: no column \"prompt\"; the first row names the columns, and it has a photo of a cat"
      ),
      ("prompt,x,x\na,1,2", "p.csv:1: two columns are called \"x\""),
      ("prompt,id\na,1\nb", "p.csv:3: expected 2 fields as in the header, got 1"),
      ("prompt\na cat, and a dog", "p.csv:2: expected 1 fields as in the header, got 2"),
      ("prompt,id\n\"a\nb\",1\n ,2", "p.csv:4: prompt: empty"),
      ("prompt\na\n\"b\nc\n", "p.csv:3: a quoted field is not closed"),
      ("prompt\n\"a\" b\n", "p.csv:2: \" \" after a closing quote; double quotes inside a field"),
      (
        "prompt\na sign \"OPEN\"\n",
        "p.csv:2: a quote in a field that does not begin with one; write \"a \"\"word\"\"\" with the whole field quoted"
      ),
      ("", "p.csv: no prompt in it"), ("prompt,id\n\n", "p.csv: no prompt in it"),
    ])
  func badTables(_ text: String, _ expected: String) throws {
    #expect(try message(text.utf8, name: "p.csv") == expected)
  }

  // MARK: - GenEval

  @Test("GenEval's metadata is read, with positions as relations, and kept whole")
  func genEval() throws {
    // Oracle: lines in the form of djghosh13/geneval@5348fb5 prompts/create_prompts.py, read by eye: "a photo of a
    // dog right of a teddy bear" says where the second entry is; a relation says it of the first.
    let lines = [
      #"{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"}"#,
      #"{"tag": "position", "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}], "prompt": "a photo of a dog right of a teddy bear"}"#,
      #"{"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "tie", "count": 1, "color": "pink"}], "prompt": "a photo of a red cup and a pink tie"}"#,
    ]
    let prompts = try read(lines.joined(separator: "\n").utf8).get().prompts
    #expect(prompts.map(\.raw) == lines)
    #expect(prompts.map(\.relation) == [nil, "left of", nil])
    #expect(prompts[0].include == [.init(name: "clock", count: 2)])
    #expect(prompts[2].include == [.init(name: "cup", color: "red"), .init(name: "tie", color: "pink")])
    let first =
      #"{"prompt": "x", "include": [{"class": "a", "count": 1, "position": ["above", 1]}, {"class": "b", "count": 1}]}"#
    #expect(try read(first.utf8).get().prompts[0].relation == "above")
  }

  @Test(
    "positions that are none",
    arguments: [
      (
        #"["near", 0]"#,
        "p.jsonl:1: include[1].position: expected left of, right of, above or below, got \"near\""
      ),
      (#"["above"]"#, "p.jsonl:1: include[1].position[1]: expected an integer"),
      (#""above""#, "p.jsonl:1: include[1].position: expected a list"),
    ])
  func badPositions(_ position: String, _ expected: String) throws {
    let line =
      #"{"prompt": "x", "include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": "#
      + position + "}]}"
    #expect(try message(line.utf8) == expected)
  }
}
