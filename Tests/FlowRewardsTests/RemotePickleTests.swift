import Foundation
import Pictures
import Testing
import Torch

@testable import FlowRewards

/// Bytes of a hand-made pickle of protocol 4.
private func pickle(_ parts: [UInt8]..., stop: Bool = true) -> Data {
  Data([0x80, 4] + parts.flatMap { $0 } + (stop ? [UInt8(ascii: ".")] : []))
}
private func letters(_ text: String) -> [UInt8] { Array(text.utf8) }

/// The opcode for which `bytes` are refused, if it is for one.
private func refusal(of bytes: Data) -> String? {
  let result = Result { try PickleReader.read(bytes) }
  guard case .failure(let error) = result, case .refused(let opcode, _)? = error as? PickleError else {
    return nil
  }
  return opcode
}

private func get(_ path: String) async throws -> Data {
  let server = try RemoteServer.shared.get()
  let endpoint = try Endpoint("http://127.0.0.1:\(server.port)\(path)", reward: "test")
  return try await HTTPClient(.init()).send(HTTPRequest(endpoint: endpoint))
}

@Suite("Pickles")
struct PickleTests {
  /// Oracle: Python writes what we read and compares what we write with the original, type by type.
  @Test("Python's pickles survive the round trip", arguments: 2...5)
  func roundTrip(version: Int) async throws {
    let value = try PickleReader.read(await get("/sample/\(version)"))
    let server = try RemoteServer.shared.get()
    let endpoint = try Endpoint("http://127.0.0.1:\(server.port)/same/\(version)", reward: "test")
    let answer = try await HTTPClient(.init()).send(
      HTTPRequest(endpoint: endpoint, contentType: "", body: PickleWriter.write(value)))
    #expect(String(decoding: answer, as: UTF8.self) == #"{"equal": true}"#)
  }

  @Test(
    "everything that is not plain data is refused by name",
    arguments: [
      ("c", "GLOBAL"), ("R", "REDUCE"), ("b", "BUILD"), ("i", "INST"), ("o", "OBJ"), ("\u{81}", "NEWOBJ"),
      ("\u{92}", "NEWOBJ_EX"), ("\u{93}", "STACK_GLOBAL"), ("P", "PERSID"), ("Q", "BINPERSID"),
      ("\u{82}", "EXT1"),
      ("\u{8f}", "EMPTY_SET"), ("S", "STRING"), ("\u{97}", "NEXT_BUFFER"), ("\u{ff}", "opcode 0xff"),
    ])
  func refused(opcode: String, name: String) {
    let code = UInt8(opcode.unicodeScalars.first!.value)
    let bytes = pickle(letters("N"), [code], letters("os\nsystem\n"))
    #expect(throws: PickleError.refused(opcode: name, offset: 3)) { try PickleReader.read(bytes) }
  }

  /// Oracle: Python's own table of opcodes.
  @Test("each of the 256 opcodes is one of plain data or refused by the name it has in Python")
  func everyOpcode() async throws {
    let names = try JSONDecoder().decode([String: String].self, from: await get("/opcodes"))
    let plain: Set = [
      "PROTO", "FRAME", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
      "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "EMPTY_LIST", "EMPTY_DICT",
      "EMPTY_TUPLE",
      "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "MEMOIZE",
      "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "STOP",
    ]
    for code in UInt8.min...UInt8.max {
      let name = names["\(code)"] ?? "opcode 0x" + String(code, radix: 16)
      #expect(refusal(of: pickle([code])) == (plain.contains(name) ? nil : name))
    }
  }

  @Test("bombs go off nowhere")
  func bombs() throws {
    // l0 = []; l1 = [l0] * 10; … each memoized, recalled ten times: 10²⁰ values of 400 bytes.
    var laughs = letters("]") + [0x94]
    for level in 0..<20 {
      laughs += letters("](") + (0..<10).flatMap { _ in letters("h") + [UInt8(level * 2)] } + letters("e")
      laughs += [0x94] + letters("](") + letters("h") + [UInt8(level * 2 + 1)] + letters("e") + [0x94]
    }
    let bomb = pickle(letters("("), laughs, letters("t"))
    #expect(throws: PickleError.self) { try PickleReader.read(bomb) }
    // A list that holds itself.
    let cycle = pickle(letters("]"), [0x94], letters("h"), [0], letters("a"))
    #expect("\(try #require(throws: PickleError.self) { try PickleReader.read(cycle) })".contains("deep"))
    // A million lists in one another, by APPEND and by growing the innermost one through the memo.
    let deep = pickle(
      Array(repeating: UInt8(ascii: "]"), count: 500_000), Array(repeating: 0x61, count: 499_999))
    #expect("\(try #require(throws: PickleError.self) { try PickleReader.read(deep) })".contains("deep"))
    let many = pickle(letters("("), Array(repeating: UInt8(ascii: "N"), count: 2_000_000), letters("t"))
    #expect("\(try #require(throws: PickleError.self) { try PickleReader.read(many) })".contains("more than"))
    // 4 GiB announced.
    for opcode in ["X", "B"] {
      let long = pickle(letters(opcode), [0xFF, 0xFF, 0xFF, 0xFF], letters("abc"))
      #expect(throws: PickleError.malformed(reason: "it ends too early", offset: 2)) {
        try PickleReader.read(long)
      }
    }
    let frame = pickle([0x95], Array(repeating: 0xFF, count: 8))
    #expect(throws: PickleError.self) { try PickleReader.read(frame) }
  }

  @Test(
    "nonsense is refused",
    arguments: [
      Data(), Data("no pickle".utf8), Data([0x80]), Data([0x80, 1, 0x4E, 0x2E]), Data([0x80, 6, 0x4E, 0x2E]),
      pickle(), pickle(letters("NN")), pickle(letters("(N")), pickle(letters("t")), pickle(letters("a")),
      pickle(letters("Na")), pickle(letters("NNa")), pickle(letters("}Ns")), pickle(letters("}(Nu")),
      pickle(letters("](NNa")), pickle(letters("h"), [0]), pickle([0x94]), pickle([0x86]),
      pickle([0x8C, 2, 0xC3, 0x28]), pickle([0x8A, 9], Array(repeating: 1, count: 9)),
      pickle(letters("N"), stop: false),
      pickle(letters("N.N")), pickle([0x80, 4], letters("N")),
    ])
  func nonsense(bytes: Data) {
    let error = #expect(throws: PickleError.self) { try PickleReader.read(bytes) }
    #expect("\(error!)".contains("not a pickle that can be read"))
  }

  /// Oracle: it returns or throws; a trap would end the tests.
  @Test("mutated pickles never trap")
  func fuzz() async throws {
    var seeds: [[UInt8]] = [
      Array(PickleWriter.write(.dictionary([(.string("outputs"), .list([.float(1), .int(-1)]))])))
    ]
    for version in 2...5 {
      // The head of the sample with its many kinds, closed by a STOP.
      seeds.append(Array(try await get("/sample/\(version)").prefix(700)) + [UInt8(ascii: ".")])
    }
    let small = PickleReader.Limits(depth: 16, count: 4096)
    var generator = Seeded(state: 20)
    var read = 0
    for round in 0..<8000 {
      var bytes = seeds[round % seeds.count]
      for _ in 0..<Int.random(in: 1...6, using: &generator) {
        let place = Int.random(in: 0..<bytes.count, using: &generator)
        switch Int.random(in: 0..<6, using: &generator) {
        case 0: bytes[place] ^= 1 << UInt8.random(in: 0..<8, using: &generator)
        case 1: bytes[place] = UInt8.random(in: 0...255, using: &generator)
        case 2: bytes.insert(letters("()]}aeustqrhj.NJKMGXCB0").randomElement(using: &generator)!, at: place)
        case 3: bytes.remove(at: place)
        case 4: bytes.removeSubrange(place..<min(bytes.count, place + 20))
        default: bytes.insert(contentsOf: bytes[place..<min(bytes.count, place + 20)], at: place)
        }
        if bytes.isEmpty { bytes = [0x80] }
      }
      if (try? PickleReader.read(Data(bytes), limits: small)) != nil { read += 1 }
    }
    #expect(read > 50, "all were refused: the mutations are too strong to test anything")
  }
}

@Suite("Remote rewards over pickles")
struct RemotePickleTests {
  private func remote(_ behaviour: Behaviour, _ score: String) throws -> any Reward {
    try RewardFactory.make(behaviour.settings("pickle") { $0.score = score })
  }
  private let scenes = (1...3).map {
    RewardPrompt(
      text: "\($0) cats",
      metadata:
        #"{"tag": "counting", "include": [{"class": "cat", "count": \#($0)}], "prompt": "\#($0) cats"}"#)
  }

  /// Oracle: the server, which unpickles with Python, computes its scores from the metadata.
  @Test("GenEval")
  func geneval() async throws {
    let behaviour = try Behaviour("pickle-geneval")
    let loose = try await remote(behaviour, "geneval").score(flat([1, 2, 3]), prompts: scenes)
    #expect(
      loose
        == zip([0.1, 0.2, 0.3], [0.0, 1, 1]).map { RewardScore(value: $0, parts: ["strict": $1]) })
    #expect("\(try await behaviour.statistics().last!["only_strict"]!)" == "bool(false)")
    let strict = try await remote(behaviour, "geneval-strict").score(flat([1, 2, 3]), prompts: scenes)
    #expect(strict == [0, 1, 1].map { RewardScore(value: $0) })
    #expect("\(try await behaviour.statistics().last!["only_strict"]!)" == "bool(true)")
    let error = #expect(throws: RemoteRewardError.self) {
      try remote(behaviour, "geneval").check(captions(1))
    }
    #expect("\(error!)".contains("geneval: prompt \"caption 0\" has no metadata"))
    let reward = try remote(behaviour, "geneval")
    try reward.check([reward.probe.prompt])
  }

  @Test("prompts are sent where they are read")
  func prompts() async throws {
    let behaviour = try Behaviour("pickle-prompts")
    let prompts = ["", "né", "four"].map { RewardPrompt(text: $0) }
    let scores = try await remote(behaviour, "unifiedreward").score(flat([1, 2, 3]), prompts: prompts)
    #expect(scores.map(\.value) == [0, 2, 4])
  }

  /// Oracle: the same JPEG, made here.
  @Test("images arrive as JPEG, 64 a request, in order")
  func images() async throws {
    let behaviour = try Behaviour("pickle-lengths")
    let images = try noise(70, side: 16, seed: 3)
    let scores = try await remote(behaviour, "deqa").score(images, prompts: captions(70))
    let expected = try (0..<70).map {
      Double(try Pictures.Image(planar: images[$0].floats(), width: 16, height: 16).jpeg(quality: 95).count)
    }
    #expect(scores.map(\.value) == expected && Set(expected).count > 5)
    #expect(try await behaviour.statistics().sizes.sorted() == [6, 64])
    #expect(try await behaviour.statistics().headers["Content-Type"] == "application/octet-stream")
  }

  @Test(
    "answers that are none",
    arguments: [
      ("pickle-short", "1 outputs for 2 images"), ("pickle-key", "the answer has no \"outputs\""),
      ("pickle-text", "not a pickle that can be read: no PROTO at byte 0"),
    ])
  func failures(how: String, expected: String) async throws {
    for score in try await remote(Behaviour(how), "deqa").score(flat([1, 2]), prompts: captions(2)) {
      #expect(score.value == nil && score.failure?.contains(expected) == true, "\(score)")
    }
  }

  @Test("NaN and its like cost their own image only")
  func notNumbers() async throws {
    let scores = try await remote(Behaviour("pickle-nan"), "deqa").score(
      flat([1, 2, 3, 4, 5]), prompts: captions(5))
    #expect(scores.map(\.value) == [1, nil, nil, nil, nil])
    #expect(scores.map { $0.failure != nil } == [false, true, true, true, true])
  }

  /// Oracle: Python's own pickle of an object whose unpickling makes a folder; Python would make it.
  @Test("an answer that would run code runs none")
  func trap() async throws {
    let folder = FileManager.default.temporaryDirectory.appending(path: "trap-\(UUID().uuidString)")
    let behaviour = try Behaviour("pickle-trap")
    let settings = behaviour.settings("pickle") {
      $0.score = "deqa"
      $0.url! += folder.path
    }
    let score = try await RewardFactory.make(settings).score(flat([1]), prompts: captions(1))[0]
    #expect(score.value == nil && score.failure?.contains("STACK_GLOBAL at byte") == true, "\(score)")
    #expect(!FileManager.default.fileExists(atPath: folder.path))
  }
}
