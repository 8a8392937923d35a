import Foundation
import Testing
import Torch

@testable import FlowRewards

/// A judge written to a folder of its own.
private final class Judge {
  let folder: URL
  /// Python that reads requests and calls `answer(request)` for the line to print.
  init(python body: String) throws {
    folder = FileManager.default.temporaryDirectory.appending(path: "judge-\(UUID())")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    let program = """
      import json, os, sys, time
      def brightness(image):
          return open(image["png"], "rb").read().__len__()
      \(body)
      for line in sys.stdin:
          print(answer(json.loads(line)), flush=True)
      """
    try Data(program.utf8).write(to: folder.appending(path: "judge.py"))
  }
  deinit { try? FileManager.default.removeItem(at: folder) }

  func settings(_ change: (inout RewardSettings) -> Void = { _ in }) -> RewardSettings {
    var settings = RewardSettings(name: "command")
    settings.command = ["python3", folder.appending(path: "judge.py").path, folder.path]
    settings.failure.timeout = 20
    change(&settings)
    return settings
  }
  func reward(_ change: (inout RewardSettings) -> Void = { _ in }) throws -> CommandReward {
    try CommandReward(settings(change))
  }
  func lines(_ file: String) -> [String] {
    let text = (try? String(contentsOf: folder.appending(path: file), encoding: .utf8)) ?? ""
    return text.split(separator: "\n").map(String.init)
  }
}

private func prompts(_ texts: String...) -> [RewardPrompt] { texts.map { RewardPrompt(text: $0) } }

/// Waits up to ten seconds.
private func eventually(_ condition: () -> Bool) -> Bool {
  for _ in 0..<1000 where !condition() { usleep(10_000) }
  return condition()
}

/// Whether a process of this id runs.
private func runs(_ pid: String) -> Bool {
  guard let status = try? String(contentsOfFile: "/proc/\(pid)/stat", encoding: .utf8) else { return false }
  return !status.contains(") Z ")
}

/// Oracle of all: what the little programs here do, as read.
@Suite("command")
struct CommandRewardTests {
  /// Scores by the number at the end of the prompt.
  static let byPrompt = """
    def answer(request):
        return json.dumps({"id": request["id"], "scores": [float(p.split()[-1]) for p in request["prompts"]]})
    """

  @Test("scores come back in order, over batches and programs", arguments: [1, 3])
  func order(concurrency: Int) async throws {
    let judge = try Judge(
      python: """
        open(os.path.join(sys.argv[1], "started"), "a").write("x\\n")
        def answer(request):
            time.sleep(0.02 * (request["id"] % 3))
            return json.dumps({"id": request["id"], "scores": [float(p.split()[-1]) for p in request["prompts"]]})
        """)
    let reward = try judge.reward {
      $0.batch = 2
      $0.concurrency = concurrency
    }
    let list = (0..<11).map { RewardPrompt(text: "image \($0)") }
    for _ in 0..<2 {
      let scores = try await reward.score(noise(11, side: 8, seed: 1), prompts: list)
      #expect(scores == (0..<11).map { RewardScore(value: Double($0)) })
    }
    #expect(reward.restarts == 0)
    #expect((1...concurrency).contains(judge.lines("started").count))
  }

  @Test("a request holds what it should: files that open, prompts, metadata; nothing is left afterwards")
  func request() async throws {
    let judge = try Judge(
      python: """
        def answer(request):
            paths = [image["png"] for image in request["images"]]
            folder = os.path.dirname(paths[0])
            note = {"keys": sorted(request), "paths": paths, "mode": oct(os.stat(folder).st_mode & 0o777),
                    "png": [open(p, "rb").read(4).hex() for p in paths], "prompts": request["prompts"],
                    "metadata": request["metadata"]}
            open(os.path.join(sys.argv[1], "note"), "w").write(json.dumps(note))
            return json.dumps({"id": request["id"], "scores": [1 for p in paths]})
        """)
    let list = [
      RewardPrompt(text: "a \"quoted\"\nprompt/ü", metadata: "{\"a\": [1,\n 2.50], \"b\": \"x\"}"),
      RewardPrompt(text: "b"),
    ]
    let scores = try await judge.reward().score(noise(2, side: 8, seed: 1), prompts: list)
    #expect(scores.map(\.value) == [1, 1])
    let note = try #require(
      try JSONSerialization.jsonObject(with: Data(contentsOf: judge.folder.appending(path: "note")))
        as? [String: Any])
    #expect(note["keys"] as? [String] == ["id", "images", "metadata", "prompts"])
    #expect(note["mode"] as? String == "0o700")
    #expect(note["png"] as? [String] == ["89504e47", "89504e47"])
    #expect(note["prompts"] as? [String] == list.map(\.text))
    let metadata = try #require(note["metadata"] as? [Any])
    #expect(
      metadata[0] as? NSDictionary == ["a": [1, 2.5], "b": "x"] as NSDictionary && metadata[1] is NSNull)
    for path in try #require(note["paths"] as? [String]) {
      #expect(
        path.hasPrefix("/")
          && !FileManager.default.fileExists(atPath: URL(filePath: path).deletingLastPathComponent().path))
    }
  }

  @Test("base64 holds the same PNG")
  func base64() async throws {
    let judge = try Judge(
      python: """
        import base64, struct
        def answer(request):
            data = [base64.b64decode(image["base64"]) for image in request["images"]]
            return json.dumps({"id": request["id"], "scores": [struct.unpack(">I", d[16:20])[0] for d in data]})
        """)
    let reward = try judge.reward { $0.score = "base64" }
    #expect(
      try await reward.score(noise(2, side: 24, seed: 1), prompts: prompts("a", "b")).map(\.value) == [
        24, 24,
      ])
  }

  @Test("a program that dies on one image costs that image alone, with its last words")
  func crash() async throws {
    let judge = try Judge(
      python: """
        def answer(request):
            if any("bad" in p for p in request["prompts"]):
                sys.stderr.write("loading\\nno such thing as a bad image\\n\\n")
                sys.exit(3)
            return json.dumps({"id": request["id"], "scores": [1.5 for p in request["prompts"]]})
        """)
    let reward = try judge.reward { $0.failure.retries = 2 }
    let scores = try await reward.score(noise(3, side: 8, seed: 1), prompts: prompts("a", "bad", "c"))
    #expect(scores.map(\.value) == [1.5, nil, 1.5])
    #expect(scores.map(\.retries) == [2, 2, 2])
    #expect(scores[1].failure == "exited with status 3; its stderr ends: no such thing as a bad image")
    // Twice the whole batch, then the bad image alone: after each a new program.
    #expect(reward.restarts == 3)
    let again = try await reward.score(noise(1, side: 8, seed: 1), prompts: prompts("a"))
    #expect(again == [RewardScore(value: 1.5)])
  }

  @Test("a program that is slow is killed with its children, and asked again")
  func slow() async throws {
    let judge = try Judge(
      python: """
        import subprocess
        def answer(request):
            count = len(os.listdir(sys.argv[1]))
            if not os.path.exists(os.path.join(sys.argv[1], "child")):
                child = subprocess.Popen(["sleep", "1000"])
                open(os.path.join(sys.argv[1], "child"), "w").write(f"{os.getpid()}\\n{child.pid}\\n")
                time.sleep(1000)
            return json.dumps({"id": request["id"], "scores": [2]})
        """)
    let reward = try judge.reward { $0.failure.timeout = 3 }
    let scores = try await reward.score(noise(1, side: 8, seed: 1), prompts: prompts("a"))
    #expect(scores == [RewardScore(value: 2, retries: 1)] && reward.restarts == 1)
    let pids = judge.lines("child")
    #expect(pids.count == 2 && eventually { !pids.contains(where: runs) })
  }

  @Test("without retries, what failed has no value and a reason")
  func deadline() async throws {
    let judge = try Judge(python: "def answer(request):\n    time.sleep(1000)")
    let reward = try judge.reward {
      $0.failure.timeout = 0.25
      $0.failure.retries = 0
    }
    let scores = try await reward.score(noise(2, side: 8, seed: 1), prompts: prompts("a", "b"))
    #expect(
      scores == [RewardScore](repeating: .init(value: nil, failure: "no answer within 0.5 s"), count: 2))
  }

  @Test(
    "answers that are none",
    arguments: [
      (
        "print(\"Loading weights…\")",
        "its answer is not {\"id\": …, \"scores\": [number or null, …]} but Loading weights…"
      ),
      ("return '[0.5]'", "its answer is not {\"id\": …, \"scores\": [number or null, …]} but [0.5]"),
      ("return json.dumps({'id': request['id'], 'scores': [True]})", "its answer is not"),
      ("return json.dumps({'id': request['id'], 'scores': ['0.5']})", "its answer is not"),
      (
        "return json.dumps({'id': request['id'], 'scores': [0.5, 0.5]})",
        "its answer has 2 scores for 1 images"
      ),
      ("return json.dumps({'id': 99, 'scores': [0.5]})", "its answer has id 99, the request 1"),
      (
        "return json.dumps({'id': request['id'], 'scores': [None], 'errors': []})",
        "its answer has 0 errors for 1 images: give one or null for each"
      ),
      ("return 'x' * 3000000", "its answer is longer than 1048576 bytes"),
      ("os.close(1); time.sleep(1000)", "closed its stdin or stdout"),
      ("os.kill(os.getpid(), 9)", "was killed by signal 9"),
    ])
  func garbage(body: String, reason: String) async throws {
    let judge = try Judge(python: "def answer(request):\n    \(body)")
    let reward = try judge.reward { $0.failure.retries = 0 }
    let scores = try await reward.score(noise(1, side: 8, seed: 1), prompts: prompts("a"))
    #expect(scores[0].value == nil && scores[0].failure?.hasPrefix(reason) == true, "\(scores)")
  }

  @Test("null, NaN and infinities are failures of one image, and final")
  func notNumbers() async throws {
    let judge = try Judge(
      python: """
        def answer(request):
            return json.dumps({"id": request["id"], "scores": [1, None, float("nan"), -float("inf"), None],
                               "errors": [None, "saw NaN \\\\\\"", None, None, None]})
        """)
    let reward = try judge.reward()
    let scores = try await reward.score(
      noise(5, side: 8, seed: 1), prompts: prompts("a", "b", "c", "d", "e"))
    #expect(scores.map(\.value) == [1, nil, nil, nil, nil])
    #expect(
      scores.map(\.failure) == [
        nil, "saw NaN \\\"", "its score is NaN", "its score is -Infinity", "it gave no score and no reason",
      ])
    #expect(reward.restarts == 0 && scores.allSatisfy { $0.retries == 0 })
  }

  @Test("images that are not finite are not sent")
  func notFinite() async throws {
    let judge = try Judge(python: Self.byPrompt)
    let images = try Tensor.cat([Tensor.full([1, 3, 8, 8], .nan), noise(1, side: 8, seed: 1)])
    let scores = try await judge.reward().score(images, prompts: prompts("a 1", "b 2"))
    #expect(scores == [.notFinite, RewardScore(value: 2)])
  }

  @Test("a program that does not read, and one that talks all the time, do not stop the clock")
  func deaf() async throws {
    for program in ["exec sleep 1000", "while :; do echo noise >&2; done", "exec yes"] {
      var settings = RewardSettings(name: "command", score: "base64")
      settings.command = ["sh", "-c", program]
      settings.failure.timeout = 0.5
      settings.failure.retries = 0
      // More than a pipe holds.
      let scores = try await CommandReward(settings).score(
        noise(1, side: 256, seed: 1), prompts: prompts("a"))
      #expect(scores[0].value == nil && scores[0].failure != nil)
    }
  }

  @Test("a program that has left between two requests is noticed and started again")
  func leaves() async throws {
    let judge = try Judge(
      python: """
        def answer(request):
            print(json.dumps({"id": request["id"], "scores": [4]}), flush=True)
            os._exit(0)
        """)
    let reward = try judge.reward()
    for retries in [0, 1, 1] {
      #expect(
        try await reward.score(noise(1, side: 8, seed: 1), prompts: prompts("a"))
          == [RewardScore(value: 4, retries: retries)])
      usleep(200_000)
    }
    #expect(reward.restarts == 2)
  }

  @Test("when the reward goes, so does the program")
  func release() async throws {
    let judge = try Judge(
      python: "open(os.path.join(sys.argv[1], \"pid\"), \"w\").write(str(os.getpid()))\n" + Self.byPrompt)
    do {
      let reward = try judge.reward()
      _ = try await reward.score(noise(1, side: 8, seed: 1), prompts: prompts("a 1"))
    }
    let pid = try #require(judge.lines("pid").first)
    #expect(eventually { !runs(pid) })
  }

  @Test("waiting takes no thread of the executor: more calls than it has threads wait at once")
  func manyAtOnce() async throws {
    let judge = try Judge(
      python:
        "def answer(request):\n    time.sleep(0.05)\n    return json.dumps({'id': request['id'], 'scores': [1]})"
    )
    let reward = try judge.reward { $0.concurrency = 2 }
    let images = try noise(1, side: 8, seed: 1)
    let total = try await withThrowingTaskGroup(of: Double.self) { group in
      for _ in 0..<24 {
        group.addTask { try await reward.score(images, prompts: prompts("a"))[0].value ?? 0 }
      }
      return try await group.reduce(0, +)
    }
    #expect(total == 24)
  }

  @Test("settings that cannot work are refused when the reward is made")
  func badSettings() throws {
    func message(_ change: (inout RewardSettings) -> Void) -> String {
      var settings = RewardSettings(name: "command")
      settings.command = ["sh"]
      change(&settings)
      do {
        _ = try RewardFactory.make(settings)
        return ""
      } catch { return "\(error)" }
    }
    #expect(message { $0.command = [] }.contains("command needs command: the program and its arguments"))
    #expect(message { $0.command = ["no-such-program"] }.contains("which is in no folder of PATH"))
    #expect(message { $0.command = ["/no/such/program"] }.contains("/no/such/program, which is not there"))
    #expect(message { $0.command = [#filePath] }.contains("not executable (chmod +x)"))
    #expect(message { $0.batch = 0 } == "rewards: command batch: expected at least 1, got 0")
    #expect(message { $0.concurrency = 0 } == "rewards: command concurrency: expected 1 to 256, got 0")
    #expect(message { $0.score = "pickles" }.contains("known: paths, base64"))
    #expect(message { $0.quality = 3 }.contains("reads no quality"))
    #expect(message { _ in } == "")
  }

  /// Oracle: the text that users read.
  @Test("the example of the documentation works")
  func documented() async throws {
    let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
      .deletingLastPathComponent()
    let page = try String(contentsOf: root.appending(path: "Documentation/NativeRewards.md"), encoding: .utf8)
    let start = try #require(page.range(of: "```python\n")).upperBound
    let end = try #require(page.range(of: "```", range: start..<page.endIndex)).lowerBound
    let folder = FileManager.default.temporaryDirectory.appending(path: "example-\(UUID())")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    defer { try? FileManager.default.removeItem(at: folder) }
    try Data(page[start..<end].utf8).write(to: folder.appending(path: "judge.py"))
    var settings = RewardSettings(name: "command")
    settings.command = ["python3", folder.appending(path: "judge.py").path]
    let images = try Tensor.cat([noise(1, side: 32, seed: 1), Tensor.full([1, 3, 32, 32], 0.5)])
    let scores = try await CommandReward(settings).score(images, prompts: prompts("a", "b"))
    // It scores by the size of the file.
    let values = scores.compactMap(\.value)
    #expect(values.count == 2 && values[0] > values[1] && values[1] > 0, "\(scores)")
  }
}
