import Foundation
import Testing

/// `chunkgrpo score` on the probe images, of which `sign.png` says OPEN and `plane.png` is grey.
@Suite("score")
struct ScoreCommandTests {
  static let probe = Tool.root.appending(path: "Data/probe")
  private let scratch: Scratch

  init() throws {
    scratch = try Scratch()
    for name in ["sign.png", "plane.png", "canvas.png"] {
      try scratch.copy(Self.probe.appending(path: name), to: name)
    }
  }

  private func score(_ arguments: String...) throws -> Tool.Result {
    let before = scratch.listing()
    let result = try Tool.run(["score"] + arguments, in: scratch)
    #expect(scratch.listing() == before)
    return result
  }

  /// Oracle: a grey image has no colour, and no detail.
  @Test("a table of images of two sizes, with means; stderr stays empty")
  func table() throws {
    let result = try score(
      "plane.png", "canvas.png", "sign.png", "--reward", "vivid", "--reward", "sharpness")
    #expect(result.status == 0 && result.err.isEmpty, "\(result.err)")
    let rows = result.out.split(separator: "\n").map { $0.split(separator: " ").map(String.init) }
    #expect(rows.map { $0[0] } == ["image", "plane.png", "canvas.png", "sign.png", "mean"])
    #expect(rows[0] == ["image", "vivid", "sharpness"])
    #expect(rows[1] == ["plane.png", "0.0000", "0.0000"] && rows[2] == ["canvas.png", "0.0000", "0.0000"])
    let (sign, mean) = (try #require(Double(rows[3][1])), try #require(Double(rows[4][1])))
    #expect(sign > 0.1 && abs(mean - sign / 3) < 1e-4)
  }

  @Test("one prompt for all; a file with one for each; JSON keeps numbers, parts and means")
  func prompts() throws {
    let one = try score("sign.png", "plane.png", "--reward", "ocr", "--prompt", "says \"OPEN\"", "--json")
    #expect(one.status == 0, "\(one.err)")
    let object = try one.json()
    #expect(Set(object.keys) == ["rows", "means", "failed"])
    let rows = try #require(object["rows"] as? [[String: Any]])
    #expect(rows.map { $0["image"] as? String } == ["sign.png", "plane.png"])
    #expect(rows.map { ($0["scores"] as? [String: Double])?["ocr"] } == [1, 0])
    #expect(((rows[1]["parts"] as? [String: Any])?["ocr"] as? [String: Double])?["characters"] == 0)
    #expect((object["means"] as? [String: Double])?["ocr"] == 0.5 && object["failed"] as? Int == 0)

    try scratch.write("id,prompt\n1,\"a \"\"SHUT\"\" sign\"\n2,\"\"\"open\"\"\"\n", to: "p.csv")
    let each = try score("sign.png", "sign.png", "--reward", "ocr", "--prompts", "p.csv", "--json").json()
    let values = (each["rows"] as? [[String: Any]])?.map { ($0["scores"] as? [String: Double])?["ocr"] }
    #expect(values == [0, 1])
  }

  @Test("a mapping with a program's answer; what fails is shown, counted, and exits 1")
  func failures() throws {
    try scratch.write(
      """
      import json, sys
      for line in sys.stdin:
          r = json.loads(line)
          s = [None if "bad" in p else r["metadata"][i]["n"] for i, p in enumerate(r["prompts"])]
          print(json.dumps({"id": r["id"], "scores": s, "errors": [p if "bad" in p else None for p in r["prompts"]]}), flush=True)

      """, to: "judge.py")
    try scratch.write("{\"prompt\": \"good\", \"n\": 2.5}\n{\"prompt\": \"bad one\"}\n", to: "p.jsonl")
    let reward = "{name: command, label: judge, command: [python3, judge.py]}"
    let result = try score("sign.png", "plane.png", "--reward", reward, "--prompts", "p.jsonl")
    #expect(result.status == 1 && result.err == "error: 1 score failed\n", "\(result.err)")
    let lines = result.out.split(separator: "\n").map(String.init)
    #expect(lines.count == 5 && lines[1].hasSuffix("2.5000") && lines[2].hasSuffix("failed"), "\(result.out)")
    #expect(lines[3].hasPrefix("mean") && lines[3].hasSuffix("2.5000"))
    #expect(lines[4] == "plane.png: judge: bad one")
    let object = try score("sign.png", "plane.png", "--reward", reward, "--prompts", "p.jsonl", "--json")
    #expect(object.status == 1)
    let row = try #require((try object.json()["rows"] as? [[String: Any]])?.last)
    #expect((row["scores"] as? [String: Any])?["judge"] is NSNull)
    #expect((row["failures"] as? [String: String]) == ["judge": "bad one"])
  }

  static let mistakes: [Mistake] = [
    Mistake(
      what: "no reward of the name", arguments: ["sign.png", "--reward", "vibid"],
      words: ["no reward \"vibid\"", "known:", "jpeg-size"]),
    Mistake(
      what: "no such score", arguments: ["sign.png", "--reward", "jpeg-size:small"],
      words: ["no score \"small\"", "positive, negative"]),
    Mistake(
      what: "an unknown key", arguments: ["sign.png", "--reward", "{name: jpeg-size, qualty: 80}"],
      words: ["--reward {name: jpeg-size, qualty: 80}", "qualty is not a key", "did you mean quality"]),
    Mistake(
      what: "a key of another reward", arguments: ["sign.png", "--reward", "{name: vivid, quality: 80}"],
      words: ["vivid reads no quality"]),
    Mistake(
      what: "a quality that is none", arguments: ["sign.png", "--reward", "{name: jpeg-size, quality: 0}"],
      words: ["quality", "expected 1 to 100, got 0"]),
    Mistake(
      what: "a reward that reads prompts, without", arguments: ["sign.png", "--reward", "ocr"],
      words: ["ocr", "--prompt or --prompts"]),
    Mistake(
      what: "nothing quoted to read", arguments: ["sign.png", "--reward", "ocr", "--prompt", "a sign"],
      words: ["'a sign'", "double quotes"]),
    Mistake(
      what: "no such language",
      arguments: ["sign.png", "--reward", "{name: ocr, language: tlh}", "--prompt", "\"x\""],
      words: ["\"tlh\"", "apt-get install tesseract-ocr-tlh"]),
    Mistake(
      what: "no such program",
      arguments: ["sign.png", "--reward", "{name: command, command: [./judge]}", "--prompt", "x"],
      words: ["command", "./judge, which is not there"]),
    Mistake(
      what: "fewer prompts than images",
      arguments: ["sign.png", "plane.png", "--reward", "ocr", "--prompts", "p.txt"],
      words: ["p.txt has 1 prompt for 2 images", "one for all with --prompt"],
      prepare: { try $0.write("\"a\"\n", to: "p.txt") }),
    Mistake(
      what: "a table without prompts", arguments: ["sign.png", "--reward", "ocr", "--prompts", "p.csv"],
      words: ["p.csv:1", "no column \"prompt\"", "caption"],
      prepare: { try $0.write("caption\na\n", to: "p.csv") }),
    Mistake(
      what: "no such image", arguments: ["sign.png", "no.png", "--reward", "vivid"],
      words: ["no.png", "no such file"]),
    Mistake(
      what: "no image", arguments: ["a.jpg", "--reward", "vivid"], words: ["a.jpg", "not a readable PNG"],
      prepare: { try $0.write("text", to: "a.jpg") }),
    Mistake(
      what: "two rewards of one name", arguments: ["sign.png", "--reward", "vivid", "--reward", "vivid"],
      words: ["two are called vivid", "label"]),
    Mistake(
      what: "both kinds of prompts",
      arguments: ["sign.png", "--reward", "vivid", "--prompt", "a", "--prompts", "b.txt"],
      words: ["--prompt or --prompts, not both"], status: 64),
    Mistake(what: "no reward", arguments: ["sign.png"], words: ["--reward"], status: 64),
    Mistake(what: "no images", arguments: ["--reward", "vivid"], words: ["<images>"], status: 64),
  ]

  /// Oracle: the rule that every message says what, where and the way out.
  @Test("bad input", arguments: mistakes)
  func fails(_ mistake: Mistake) throws {
    try mistake.prepare(scratch)
    let result = try Tool.run(["score"] + mistake.arguments, in: scratch)
    #expect(result.status == mistake.status && !result.killed && result.out.isEmpty, "\(result.err)")
    for word in mistake.words { #expect(result.err.contains(word), "\(word): \(result.err)") }
    if mistake.status == 1 { #expect(result.err.split(separator: "\n").count == 1, "\(result.err)") }
  }

  // Oracle: one black and one white pixel deviate by 0.5 from their mean.
  @Test("an executable with a reward of its own is the whole tool, with that reward more")
  func ownReward() throws {
    let contrast = Tool.root.appending(path: ".build/debug/contrast")
    try Data(
      base64Encoded:
        "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAIAAAB7QOjdAAAAD0lEQVR4nGNgYGD4//8/AAYBAv4CsjmuAAAAAElFTkSuQmCC")!
      .write(to: scratch["two.png"])
    func run(_ arguments: String...) throws -> Tool.Result {
      try Tool.run(arguments, in: scratch, binary: contrast)
    }
    let result = try run("score", "two.png", "plane.png", "--reward", "contrast", "--json")
    #expect(result.status == 0, "\(result.err)")
    let rows = try #require(try result.json()["rows"] as? [[String: Any]])
    #expect(rows.map { ($0["scores"] as? [String: Double])?["contrast"] } == [0.5, 0])
    let unknown = try run("score", "two.png", "--reward", "contrst")
    #expect(unknown.status == 1 && unknown.err.contains("pickle, contrast"), "\(unknown.err)")
    let plain = try score("two.png", "--reward", "contrast")
    #expect(plain.status == 1 && plain.err.contains("no reward \"contrast\""), "\(plain.err)")
    #expect(try run("train", "--help").out.contains("USAGE: chunkgrpo train"))
  }
}
