import Foundation
import Torch

/// Folders that appear complete, or not at all.
public enum StagedFolder {
  /// Fills a hidden folder beside `url` through `body`, and renames it to `url` at the end.
  ///
  /// - Throws: ``ModelError`` if `url` is there and not an empty folder, or its parent cannot be written; and
  ///   what `body` throws, after which nothing is left behind.
  public static func write(to url: URL, _ body: (URL) throws -> Void) throws {
    let files = FileManager.default
    let target = url.standardizedFileURL
    let parent = target.deletingLastPathComponent()
    try requireNew(target)
    let staging = parent.appending(path: ".\(target.lastPathComponent).unfinished-\(getpid())")
    try? files.removeItem(at: staging)
    guard mkdir(staging.path, 0o755) == 0 else {
      throw ModelError(
        "\(parent.path): cannot be written (\(String(cString: strerror(errno)))); choose another folder")
    }
    do {
      try body(staging)
      AtomicFile.syncFolder(staging)
      try requireNew(target)
      // Replaces an empty folder too.
      guard rename(staging.path, target.path) == 0 else {
        throw ModelError("\(target.path): \(String(cString: strerror(errno)))")
      }
      AtomicFile.syncFolder(parent)
    } catch {
      try? files.removeItem(at: staging)
      throw error
    }
  }

  /// Throws unless `url` is an empty folder or nothing.
  public static func requireNew(_ url: URL) throws(ModelError) {
    var isFolder: ObjCBool = false
    guard FileManager.default.fileExists(atPath: url.path, isDirectory: &isFolder) else { return }
    guard isFolder.boolValue, let names = try? FileManager.default.contentsOfDirectory(atPath: url.path),
      names.isEmpty
    else {
      throw ModelError(
        "\(url.path) is there already and is not an empty folder; choose another, or remove it first")
    }
  }
}
