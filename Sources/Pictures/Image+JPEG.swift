import CTurboJPEG
import Foundation

extension Image {
  /// The picture as a JPEG file's bytes, colour at half resolution (4:2:0) as most programs write it.
  ///
  /// - Parameter quality: 1 … 100 on libjpeg's scale.
  /// - Throws: ``PictureError/invalid(_:)`` when ``pixels`` does not match the size or the quality is none, or
  ///   ``PictureError/jpeg(reason:)``.
  public func jpeg(quality: Int) throws(PictureError) -> Data {
    try validate()
    guard 1...100 ~= quality else { throw .invalid("JPEG quality \(quality): expected 1 to 100") }
    let codec = try Codec(tjInitCompress())
    var (bytes, size) = (UnsafeMutablePointer<UInt8>?.none, UInt(0))
    defer { tjFree(bytes) }
    let status = pixels.withUnsafeBufferPointer {
      tjCompress2(
        codec.handle, $0.baseAddress!, Int32(width), 0, Int32(height), TJPF_RGB.format, &bytes, &size,
        Int32(TJSAMP_420.rawValue), Int32(quality), TJFLAG_ACCURATEDCT)
    }
    try codec.check(status)
    return Data(bytes: bytes!, count: Int(size))
  }

  /// Reads a JPEG file's bytes.
  ///
  /// - Throws: ``PictureError/jpeg(reason:)``.
  public init(jpeg data: Data) throws(PictureError) {
    let codec = try Codec(tjInitDecompress())
    let source = [UInt8](data)
    var (width, height, sampling, space) = (Int32(0), Int32(0), Int32(0), Int32(0))
    try codec.check(
      tjDecompressHeader3(codec.handle, source, UInt(source.count), &width, &height, &sampling, &space))
    var status: Int32 = 0
    self.init(width: Int(width), height: Int(height)) { pixels in
      status = tjDecompress2(
        codec.handle, source, UInt(source.count), pixels.baseAddress!, width, 0, height, TJPF_RGB.format,
        TJFLAG_ACCURATEDCT)
    }
    try codec.check(status)
  }

  /// Reads a PNG or JPEG, told apart by their first bytes.
  ///
  /// - Throws: ``PictureError``, naming the file.
  public init(file: URL) throws(PictureError) {
    guard let data = FileManager.default.contents(atPath: file.path) else {
      throw .file(path: file.path, reason: "no such file, or not readable")
    }
    guard data.starts(with: [0xFF, 0xD8]) else {
      try self.init(png: file)
      return
    }
    do { try self.init(jpeg: data) } catch {
      throw .invalid("\(file.path): \(error)")
    }
  }
}

/// A handle of libjpeg-turbo.
private final class Codec {
  let handle: tjhandle

  init(_ handle: tjhandle?) throws(PictureError) {
    guard let handle else { throw .jpeg(reason: String(cString: tjGetErrorStr2(nil))) }
    self.handle = handle
  }
  deinit { tjDestroy(handle) }

  func check(_ status: Int32) throws(PictureError) {
    // A warning is a picture with a blemish, as from a file cut short: not what anybody meant to score.
    guard status == 0 else { throw .jpeg(reason: String(cString: tjGetErrorStr2(handle))) }
  }
}

extension TJPF {
  fileprivate var format: Int32 { Int32(rawValue) }
}
