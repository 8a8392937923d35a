import ChunkGRPO
import Foundation

/// A Hugging Face model folder: `model_index.json` and one folder a part.
public struct ModelFolder: Sendable {
  /// The folder.
  public let url: URL
  /// `_class_name` of model_index.json, e.g. `FluxPipeline`.
  public let pipeline: String

  /// Reads model_index.json.
  public init(_ url: URL) throws {
    self.url = url
    var isFolder: ObjCBool = false
    guard FileManager.default.fileExists(atPath: url.path, isDirectory: &isFolder), isFolder.boolValue else {
      throw ModelError("\(url.path): no such folder; expected a model folder with model_index.json")
    }
    struct Index: Decodable {
      let pipeline: String
      enum CodingKeys: String, CodingKey { case pipeline = "_className" }
    }
    let file = url.appending(path: "model_index.json")
    guard FileManager.default.fileExists(atPath: file.path) else {
      throw ModelError(
        "\(url.path): no model_index.json, so this is not a model folder in the diffusers layout")
    }
    pipeline = try Self.decode(Index.self, file).pipeline
  }

  /// The folder of a part, e.g. `transformer`.
  public func part(_ name: String) -> URL { url.appending(path: name) }

  /// A part's JSON configuration; fields the type does not name are ignored.
  public func config<C: Decodable>(_ type: C.Type, _ part: String, _ file: String = "config.json") throws -> C
  {
    try Self.decode(type, url.appending(path: part).appending(path: file))
  }

  static func decode<C: Decodable>(_ type: C.Type, _ file: URL) throws -> C {
    guard let data = try? Data(contentsOf: file) else { throw ModelError("\(file.path): cannot be read") }
    return try decode(type, data, file.path)
  }

  /// Decodes `data`, which came from `source`.
  static func decode<C: Decodable>(_ type: C.Type, _ data: Data, _ source: String) throws -> C {
    do {
      let decoder = JSONDecoder()
      // The scheduler's type spells its keys out.
      if type != FlowMatchScheduler.self { decoder.keyDecodingStrategy = .convertFromSnakeCase }
      return try decoder.decode(type, from: data)
    } catch DecodingError.keyNotFound(let key, _) {
      throw ModelError("\(source): field \(key.stringValue) is missing")
    } catch DecodingError.typeMismatch(_, let context) {
      let path = context.codingPath.map(\.stringValue).joined(separator: ".")
      throw ModelError("\(source): field \(path) has the wrong type")
    } catch {
      throw ModelError("\(source): not valid JSON, or not the expected object")
    }
  }
}

extension KeyedDecodingContainer {
  /// Overwrites `value` with the field `key`, where it is there and not null.
  func read<T: Decodable>(_ key: Key, into value: inout T) throws {
    value = try decodeIfPresent(T.self, forKey: key) ?? value
  }
}
