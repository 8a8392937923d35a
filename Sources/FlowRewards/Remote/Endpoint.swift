import Foundation

/// The address of a server, as a configuration gives it.
struct Endpoint: Sendable, Equatable {
  private var components: URLComponents

  /// Parses the value of `url`.
  ///
  /// - Throws: ``RewardError/badValue(reward:key:expected:got:)``, without a password that `text` may hold.
  init(_ text: String, reward: String) throws(RewardError) {
    func bad(_ expected: String, got: String) -> RewardError {
      .badValue(reward: reward, key: "url", expected: expected, got: got)
    }
    guard let components = URLComponents(string: text, encodingInvalidCharacters: false),
      let scheme = components.scheme?.lowercased(), ["http", "https"].contains(scheme),
      let host = components.host, !host.isEmpty, components.port.map((1...65535).contains) ?? true
    else {
      // What is no URL may still hold a password before an @.
      let shown = text.lastIndex(of: "@").map { "…" + text[$0...] } ?? text
      throw bad("an address such as http://127.0.0.1:8000", got: "\"\(shown)\"")
    }
    guard components.user == nil, components.password == nil else {
      throw bad("an address without name and password (tokenVariable can name a token)", got: "one with them")
    }
    guard components.fragment == nil else { throw bad("an address without #", got: "\"\(text)\"") }
    self.components = components
    while self.components.percentEncodedPath.hasSuffix("/") {
      self.components.percentEncodedPath.removeLast()
    }
  }

  /// The path without a slash at its end; empty for the server's root.
  var path: String { components.percentEncodedPath }

  /// The address of the same server with another path.
  func at(_ path: String) -> Endpoint {
    var copy = self
    copy.components.percentEncodedPath = path
    return copy
  }

  /// What is asked for, with the query.
  var url: String {
    var copy = components
    if path.isEmpty { copy.percentEncodedPath = "/" }
    return copy.string!
  }
  /// For messages: without the query, which may hold a key.
  var shown: String {
    var copy = components
    copy.query = nil
    return copy.string!
  }
  /// Whether it is this machine: no proxy is asked then.
  var isLoopback: Bool {
    let host = components.host!.lowercased()
    return host == "localhost" || host.hasPrefix("127.") || ["::1", "[::1]"].contains(host)
  }
}
