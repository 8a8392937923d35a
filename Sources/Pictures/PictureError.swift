import CCairo

/// A picture that could not be made, read or written.
public enum PictureError: Error, CustomStringConvertible, Sendable, Equatable {
  /// cairo refused; `status` is its own message.
  case cairo(operation: String, status: String)
  /// The file system refused; `reason` is its own message.
  case file(path: String, reason: String)
  /// The file is not a PNG that cairo can decode.
  case notAPNG(path: String, status: String)
  /// libjpeg-turbo refused; `reason` is its own message.
  case jpeg(reason: String)
  /// The request contradicts itself, as in a size that does not match the pixels.
  case invalid(String)

  /// What failed, where, and the way out.
  public var description: String {
    switch self {
    case .cairo(let operation, let status): "cairo: \(operation): \(status)"
    case .file(let path, let reason): "\(path): \(reason); check that the folder exists and can be written"
    case .notAPNG(let path, let status): "\(path): not a readable PNG (\(status))"
    case .jpeg(let reason): "JPEG: \(reason)"
    case .invalid(let problem): problem
    }
  }

  static func check(_ status: cairo_status_t, _ operation: String) throws(PictureError) {
    guard status != CAIRO_STATUS_SUCCESS else { return }
    throw .cairo(operation: operation, status: String(cString: cairo_status_to_string(status)))
  }
}
