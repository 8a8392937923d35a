import CZlib
import Foundation

/// Reads gzip files.
enum Gzip {
  /// The uncompressed bytes of `file`; a file that is not compressed is read as it is.
  ///
  /// - Throws: ``RunError`` for a file that is missing, cut short or damaged.
  static func read(_ file: URL) throws(RunError) -> Data {
    guard let handle = gzopen(file.path, "rb") else {
      throw RunError("\(file.path): \(String(cString: strerror(errno)))")
    }
    defer { gzclose(handle) }
    var data = Data()
    var buffer = [UInt8](repeating: 0, count: 1 << 16)
    while true {
      let count = Int(gzread(handle, &buffer, UInt32(buffer.count)))
      var status: Int32 = 0
      let message = String(cString: gzerror(handle, &status))
      // A file that ends early gives what there is, then this status.
      guard count >= 0, status == Z_OK || status == Z_STREAM_END else {
        throw RunError("\(file.path): not a sound gzip file (\(message)); fetch it again")
      }
      if count == 0 { return data }
      data.append(contentsOf: buffer[..<count])
    }
  }
}
