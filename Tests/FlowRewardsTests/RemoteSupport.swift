import Foundation
import Testing
import Torch

@testable import FlowRewards

/// `reward_server.py`, running: a server of the reference language's own HTTP, JSON and pickle.
final class RemoteServer: Sendable {
  /// One for all tests, which tell themselves apart by their keys.
  static let shared = Result { try RemoteServer([]) }

  let port: Int
  private let process: Process
  /// The server ends when this does, also when the tests crash.
  private let input: Pipe

  init(_ arguments: [String]) throws {
    let script = URL(filePath: #filePath).deletingLastPathComponent().appending(path: "reward_server.py")
    let output = Pipe()
    (process, input) = (Process(), Pipe())
    process.executableURL = URL(filePath: "/usr/bin/env")
    process.arguments = ["python3", script.path] + arguments
    (process.standardInput, process.standardOutput) = (input, output)
    try process.run()
    var line = Data()
    while line.last != UInt8(ascii: "\n") {
      let part = output.fileHandleForReading.availableData
      guard !part.isEmpty else { throw Failed() }
      line += part
    }
    port = Int(String(decoding: line.dropLast(), as: UTF8.self))!
  }
  deinit { try? input.fileHandleForWriting.close() }

  struct Failed: Error, CustomStringConvertible {
    var description: String { "reward_server.py did not start; is python3 on PATH?" }
  }

  /// What the server counted under `key`.
  struct Statistics: Decodable {
    var requests = 0, connections = 0, most = 0, sent = 0
    var sizes: [Int] = []
    var path = ""
    var headers: [String: String] = [:]
    var last: PickleValue?
  }
  func statistics(_ key: String) async throws -> Statistics {
    let request = HTTPRequest(endpoint: try Endpoint("http://127.0.0.1:\(port)/stats/\(key)", reward: "test"))
    return try JSONDecoder().decode(Statistics.self, from: try await HTTPClient(.init()).send(request))
  }
}

/// A server's behaviour, with statistics of its own.
struct Behaviour {
  let server: RemoteServer
  let key = UUID().uuidString
  let how: String

  init(_ how: String) throws { (server, self.how) = (try RemoteServer.shared.get(), how) }

  var url: String { "http://127.0.0.1:\(server.port)/\(how)/\(key)" }
  func statistics() async throws -> RemoteServer.Statistics { try await server.statistics(key) }

  /// Settings that ask it.
  func settings(_ name: String, _ change: (inout RewardSettings) -> Void = { _ in }) -> RewardSettings {
    var settings = RewardSettings(name: name)
    settings.url = url
    settings.failure.timeout = 20
    change(&settings)
    return settings
  }
  /// A request as the client takes it.
  func request(_ reds: [Int] = [100]) throws -> HTTPRequest {
    let wire = JSONWire(try Endpoint(url, reward: "http"), reward: "http")
    let pixels = try flat(reds)
    let items = try reds.indices.map {
      RemoteItem(
        image: try wire.encode(.init(planar: pixels[$0].floats(), width: 8, height: 8)),
        prompt: RewardPrompt(text: ""))
    }
    return HTTPRequest(endpoint: wire.endpoint, body: try wire.body(items[...]))
  }
}

/// Images of one colour, red `reds` of 255.
func flat(_ reds: [Int]) throws -> Tensor {
  try Tensor.cat(
    reds.map {
      try Tensor.cat([Tensor.full([1, 1, 8, 8], Double($0) / 255), Tensor.zeros([1, 2, 8, 8])], 1)
    })
}

/// The score that the server gives an image with this red.
func level(_ red: Int) -> Double { Double(red) / 255 }

func captions(_ count: Int) -> [RewardPrompt] { (0..<count).map { RewardPrompt(text: "caption \($0)") } }

/// The failure that `body` throws.
func failure(_ body: () async throws -> some Sendable) async throws -> HTTPFailure {
  do { _ = try await body() } catch let failure as HTTPFailure { return failure }
  throw Unexpected()
}
struct Unexpected: Error {}

/// Seconds that `body` takes.
func seconds(_ body: () async throws -> Void) async throws -> Double {
  let start = ContinuousClock.now
  try await body()
  return (ContinuousClock.now - start) / .seconds(1)
}
