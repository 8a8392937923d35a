import Foundation

/// Quotes what a server said, for error messages: on one line, not too long, and never with the token.
struct Quotation: Sendable {
  /// What must not be shown, should the server repeat it.
  var token: String?

  /// At most `limit` characters of `text`.
  func callAsFunction(_ text: String, limit: Int = 200) -> String {
    // Replaced before it is cut: half a token is too much.
    let text = token.map { text.replacingOccurrences(of: $0, with: "…") } ?? text
    let line = text.split { $0.isWhitespace || $0.asciiValue.map { $0 < 32 || $0 == 127 } ?? false }
      .joined(separator: " ")
    return line.count > limit ? line.prefix(limit) + "…" : line
  }
  /// At most 200 characters of `body`.
  func callAsFunction(_ body: Data) -> String { self(String(decoding: body.prefix(1 << 14), as: UTF8.self)) }
}
