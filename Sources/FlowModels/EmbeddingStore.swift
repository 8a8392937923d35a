import Foundation
import Torch

/// Prompt embeddings on disk, by content: text, encoder weights and lengths. Encoders are needed for misses only.
///
/// A folder with `store.json` (the encoders' digest and lengths) and one safetensors file a prompt. A store made by
/// `chunkgrpo encode` is complete for its prompts, so that the encoders need not be there at all.
public final class EmbeddingStore {
  /// What `store.json` says.
  struct Manifest: Codable, Equatable {
    var format = 1
    let encoders: String
    let lengths: [Int]
  }

  /// The folder.
  public let folder: URL
  private let manifest: Manifest

  /// Opens a store that exists or creates an empty one.
  ///
  /// - Throws: ``ModelError`` if the store holds the embeddings of other encoders or lengths.
  public init(_ folder: URL, for text: any TextEncoding) throws {
    self.folder = folder
    let file = folder.appending(path: "store.json")
    let present = text.bytes != nil
    let lengths = text.lengths
    if let data = try? Data(contentsOf: file) {
      guard let found = try? JSONDecoder().decode(Manifest.self, from: data), found.format == 1 else {
        throw ModelError("\(file.path): damaged, or written by another version: encode the prompts again")
      }
      guard found.lengths == lengths else {
        throw ModelError(
          "\(folder.path): embeddings of \(found.lengths) tokens, the model is set to \(lengths): change "
            + "sampling.textLength or encode the prompts again")
      }
      if present, try Self.digest(text) != found.encoders {
        throw ModelError(
          "\(folder.path): embeddings by other encoders than those of "
            + "\(text.folders[0].deletingLastPathComponent().path): encode the prompts again")
      }
      manifest = found
      return
    }
    guard present else {
      throw ModelError(
        "\(text.folders[0].path): no text encoder here and no embeddings in \(folder.path): fetch the encoders, "
          + "or make the embeddings elsewhere with chunkgrpo encode")
    }
    manifest = Manifest(encoders: try Self.digest(text), lengths: lengths)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .prettyPrinted]
    try AtomicFile.write(try encoder.encode(manifest), to: file)
  }

  private func file(_ text: String) -> URL {
    var hash = ContentHash()
    hash.combine(text)
    return folder.appending(path: hash.hex + ".safetensors")
  }

  /// Whether `text` has been encoded.
  public func contains(_ text: String) -> Bool {
    FileManager.default.fileExists(atPath: file(text).path)
  }

  /// The stored condition of `text` and the number of tokens that were cut off; nil if there is none.
  public func load(_ text: String) throws -> (condition: Condition, truncated: Int)? {
    guard contains(text) else { return nil }
    let data = try SafetensorsFile(file(text))
    // The text itself is compared: equal hashes of different texts would be caught.
    guard data.metadata["text"] == text, let cut = Int(data.metadata["truncated"] ?? "") else {
      throw ModelError("\(data.path): does not hold \"\(text.prefix(60))\": delete it and encode again")
    }
    return (Condition(try data.names.map { try data.require($0).clone() }), cut)
  }

  /// Stores the condition of `text`.
  public func save(_ condition: Condition, truncated: Int, for text: String) throws {
    var tensors: [String: Tensor] = [:]
    for (i, tensor) in condition.tensors.enumerated() { tensors["\(i)"] = try tensor.to(.cpu).contiguous() }
    try Safetensors.write(
      tensors, metadata: ["text": text, "truncated": String(truncated)], to: file(text))
  }

  /// A digest of the encoders' configurations and weights, and of what the tokenizers read.
  ///
  /// Digests of weight files are remembered beside the files' sizes and dates, since reading 9 GB takes a while.
  static func digest(_ text: any TextEncoding) throws -> String {
    var hash = ContentHash()
    var known = FileDigests()
    for folder in text.folders {
      let names = try FileManager.default.contentsOfDirectory(atPath: folder.path).sorted()
      for name in names where name == "config.json" || name.hasSuffix(".safetensors") {
        hash.combine(try known.digest(folder.appending(path: name)))
      }
    }
    for folder in text.tokenizerFolders {
      let names = try FileManager.default.contentsOfDirectory(atPath: folder.path).sorted()
      for name in ["merges.txt", "spiece.model", "tokenizer_config.json", "vocab.json"]
      where names.contains(name) {
        hash.combine(try known.digest(folder.appending(path: name)))
      }
    }
    known.save()
    return hash.hex
  }

  /// Where embeddings go when nothing else is said: `$CHUNKGRPO_CACHE`, `$XDG_CACHE_HOME/chunkgrpo` or
  /// `~/.cache/chunkgrpo`.
  public static var cacheFolder: URL {
    let environment = ProcessInfo.processInfo.environment
    if let folder = environment["CHUNKGRPO_CACHE"], !folder.isEmpty { return URL(filePath: folder) }
    if let folder = environment["XDG_CACHE_HOME"], !folder.isEmpty {
      return URL(filePath: folder).appending(path: "chunkgrpo")
    }
    return URL(filePath: NSHomeDirectory()).appending(path: ".cache/chunkgrpo")
  }

  /// The store for `text` in the user's cache, one folder for each set of encoders and lengths.
  public static func cached(for text: any TextEncoding) throws -> EmbeddingStore {
    let lengths = text.lengths.map(String.init).joined(separator: "-")
    let name = "\(try digest(text))-\(lengths)"
    return try EmbeddingStore(cacheFolder.appending(path: "embeddings/\(name)"), for: text)
  }
}

/// Digests of files, remembered by path, size and date.
private struct FileDigests {
  private struct Entry: Codable {
    let bytes: Int
    let date: Double
    let digest: String
  }
  private var entries: [String: Entry] = [:]
  private var changed = false
  private static var file: URL { EmbeddingStore.cacheFolder.appending(path: "digests.json") }

  init() {
    if let data = try? Data(contentsOf: Self.file),
      let known = try? JSONDecoder().decode([String: Entry].self, from: data)
    {
      entries = known
    }
  }

  mutating func digest(_ url: URL) throws -> String {
    let file = url.resolvingSymlinksInPath()
    let attributes = try FileManager.default.attributesOfItem(atPath: file.path)
    let bytes = attributes[.size] as? Int ?? 0
    let date = (attributes[.modificationDate] as? Date)?.timeIntervalSince1970 ?? 0
    if let known = entries[file.path], known.bytes == bytes, known.date == date { return known.digest }
    var hash = ContentHash()
    let data = try Data(contentsOf: file, options: .mappedIfSafe)
    data.withUnsafeBytes { hash.combine($0) }
    // Small files are read again faster than their digests are looked up.
    if bytes > 1 << 26 {
      entries[file.path] = Entry(bytes: bytes, date: date, digest: hash.hex)
      changed = true
    }
    return hash.hex
  }

  /// A cache that cannot be written costs time, not the run.
  func save() {
    guard changed, let data = try? JSONEncoder().encode(entries) else { return }
    try? FileManager.default.createDirectory(
      at: EmbeddingStore.cacheFolder, withIntermediateDirectories: true)
    try? AtomicFile.write(data, to: Self.file)
  }
}
