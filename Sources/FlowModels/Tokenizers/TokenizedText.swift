import Foundation

/// Token ids of one prompt at a fixed length.
public struct TokenizedText: Sendable, Equatable {
  /// Ids [length], end token included, padded at the end.
  public let ids: [Int64]
  /// Tokens of the text that did not fit and were dropped; 0 when the whole text is in ``ids``.
  public let truncated: Int
}

/// A vocabulary that cannot be used.
public enum TokenizerError: Error, CustomStringConvertible, Sendable, Equatable {
  /// The file is missing or cannot be read.
  case unreadable(path: String, reason: String)
  /// The file is damaged or contradicts itself.
  case malformed(path: String, problem: String)
  /// The file is sound, but asks for an algorithm that is not implemented.
  case unsupported(path: String, feature: String)

  /// What is wrong, in which file, and the way out.
  public var description: String {
    switch self {
    case .unreadable(let path, let reason):
      "\(path): cannot be read (\(reason)); pass a tokenizer folder as published with the model"
    case .malformed(let path, let problem):
      "\(path): \(problem); the file is damaged or cut short, download it again"
    case .unsupported(let path, let feature):
      "\(path): \(feature) is not supported; use the vocabulary published with the model"
    }
  }

  /// The bytes of `name` in `folder`.
  static func read(_ name: String, in folder: URL) throws(TokenizerError) -> Data {
    let file = folder.appendingPathComponent(name)
    do { return try Data(contentsOf: file) } catch {
      let reason = FileManager.default.fileExists(atPath: file.path) ? "not a readable file" : "no such file"
      throw .unreadable(path: file.path, reason: reason)
    }
  }
}
