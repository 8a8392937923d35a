import Foundation

/// Why a safetensors file could not be read or written.
public struct SafetensorsError: Error, CustomStringConvertible, Sendable, Equatable {
  /// The file.
  public let path: String
  /// What is wrong and, where there is one, the way out.
  public let reason: String
  /// For people.
  public var description: String { "\(path): \(reason)" }
}

/// A safetensors file, memory-mapped: tensors are views of the mapping (copy-on-write) until converted.
///
/// Format: 8-byte little-endian header length, JSON header, data. No pickle is ever read.
public struct SafetensorsFile: Sendable {
  /// Where the file was read from.
  public let path: String
  /// The header's `__metadata__`.
  public let metadata: [String: String]
  /// Entry names, sorted.
  public var names: [String] { entries.keys.sorted() }

  private struct Entry: Sendable {
    let dtype: DType
    let shape: [Int]
    let offset: Int
  }
  private let entries: [String: Entry]
  private let mapping: Mapping

  /// Maps the file and checks every entry against its size.
  public init(_ url: URL) throws(SafetensorsError) {
    func bad(_ reason: String) -> SafetensorsError { SafetensorsError(path: url.path, reason: reason) }
    path = url.path
    mapping = try Mapping(url)
    let bytes = UnsafeRawBufferPointer(start: mapping.base, count: mapping.count)
    guard bytes.count >= 8 else { throw bad("\(bytes.count) bytes is too short for a safetensors file") }
    let length = UInt64(littleEndian: bytes.loadUnaligned(as: UInt64.self))
    guard length >= 2, length <= UInt64(bytes.count - 8) else {
      throw bad("header of \(length) bytes in a file of \(bytes.count): truncated, or not a safetensors file")
    }
    let data = 8 + Int(length)
    guard let object = try? JSONSerialization.jsonObject(with: Data(bytes[8..<data])),
      var header = object as? [String: Any]
    else { throw bad("header is not a JSON object: not a safetensors file") }
    let notes = header.removeValue(forKey: "__metadata__") ?? [String: String]()
    guard let notes = notes as? [String: String] else { throw bad("__metadata__ must map names to strings") }
    metadata = notes
    var entries: [String: Entry] = [:]
    for (name, value) in header {
      guard let fields = value as? [String: Any], let typeName = fields["dtype"] as? String,
        let shape = fields["shape"] as? [Int], let offsets = fields["data_offsets"] as? [Int],
        offsets.count == 2, shape.allSatisfy({ $0 >= 0 })
      else { throw bad("entry \(name): needs dtype, shape and data_offsets") }
      guard let dtype = DType(safetensors: typeName) else {
        throw bad("entry \(name): dtype \(typeName) is not supported")
      }
      var expected = dtype.size
      for side in shape {
        // Zeros aside: libtorch's strides overflow in an empty tensor too.
        let (product, overflow) = expected.multipliedReportingOverflow(by: max(side, 1))
        guard !overflow else { throw bad("entry \(name): shape \(shape) is too large") }
        expected = product
      }
      if shape.contains(0) { expected = 0 }
      guard offsets[0] >= 0, offsets[1] >= offsets[0], offsets[1] - offsets[0] == expected else {
        throw bad("entry \(name): \(typeName)\(shape) needs \(expected) bytes, offsets are \(offsets)")
      }
      guard offsets[1] <= bytes.count - data else {
        throw bad(
          "truncated: \(name) ends at byte \(offsets[1]) of the data, of which there are \(bytes.count - data); "
            + "fetch it again")
      }
      entries[name] = Entry(dtype: dtype, shape: shape, offset: data + offsets[0])
    }
    self.entries = entries
  }

  /// Shape of an entry, or nil.
  public func shape(_ name: String) -> [Int]? { entries[name]?.shape }
  /// Element type of an entry, or nil.
  public func dtype(_ name: String) -> DType? { entries[name]?.dtype }

  /// A view of entry `name`, or nil if the file has none.
  public func tensor(_ name: String) throws(TorchError) -> Tensor? {
    guard let entry = entries[name] else { return nil }
    let address = mapping.base + entry.offset
    // Headers of other writers may leave data unaligned, which vector loads do not forgive.
    guard entry.offset % entry.dtype.size == 0, entry.shape.reduce(1, *) > 0 else {
      let copy = AlignedCopy(address, count: entry.shape.reduce(entry.dtype.size, *))
      return try Tensor.view(of: copy.base, dtype: entry.dtype, shape: entry.shape, owner: copy)
    }
    return try Tensor.view(of: address, dtype: entry.dtype, shape: entry.shape, owner: mapping)
  }

  /// Lets the operating system take back the pages of an entry that has been copied; they come back if read again.
  public func letGo(_ name: String) {
    guard let entry = entries[name] else { return }
    let page = Int(sysconf(Int32(_SC_PAGESIZE)))
    let count = entry.shape.reduce(entry.dtype.size, *)
    // Whole pages only: the first and the last may belong to neighbours that are views.
    let start = (entry.offset + page - 1) / page * page
    let end = (entry.offset + count) / page * page
    if end > start { madvise(mapping.base + start, end - start, MADV_DONTNEED) }
  }

  /// Entry `name`; its absence is an error naming the file.
  public func require(_ name: String) throws -> Tensor {
    guard let tensor = try tensor(name) else {
      throw SafetensorsError(
        path: path, reason: "no tensor \(name); it holds \(names.prefix(8).joined(separator: ", "))…")
    }
    return tensor
  }

  private final class AlignedCopy {
    let base: UnsafeMutableRawPointer
    init(_ source: UnsafeMutableRawPointer, count: Int) {
      base = .allocate(byteCount: max(count, 1), alignment: 64)
      base.copyMemory(from: source, byteCount: count)
    }
    deinit { base.deallocate() }
  }

  private final class Mapping: @unchecked Sendable {
    let base: UnsafeMutableRawPointer
    let count: Int
    init(_ url: URL) throws(SafetensorsError) {
      func bad() -> SafetensorsError {
        SafetensorsError(path: url.path, reason: String(cString: strerror(errno)))
      }
      let descriptor = open(url.path, O_RDONLY)
      guard descriptor >= 0 else { throw bad() }
      defer { close(descriptor) }
      var status = stat()
      guard fstat(descriptor, &status) == 0 else { throw bad() }
      guard status.st_mode & S_IFMT == S_IFREG else {
        throw SafetensorsError(path: url.path, reason: "not a regular file")
      }
      count = Int(status.st_size)
      // Private: writing to a loaded parameter never reaches the file.
      guard let address = mmap(nil, max(count, 1), PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0),
        address != MAP_FAILED
      else { throw bad() }
      base = address
    }
    deinit { munmap(base, max(count, 1)) }
  }
}

/// Writes safetensors files.
public enum Safetensors {
  /// Writes `tensors` to `url` atomically: the file appears complete and on disk, or not at all.
  public static func write(
    _ tensors: [String: Tensor], metadata: [String: String] = [:], to url: URL
  ) throws {
    let layout = tensors.mapValues { (dtype: $0.dtype, shape: $0.shape) }
    try write(layout: layout, metadata: metadata, to: url) { tensors[$0]! }
  }

  /// Writes a file whose tensors are asked for one after the other, so that one at a time is in memory.
  ///
  /// - Parameters:
  ///   - layout: dtype and shape of every entry.
  ///   - tensor: the entry of the name given, of the dtype and shape announced.
  public static func write(
    layout: [String: (dtype: DType, shape: [Int])], metadata: [String: String] = [:], to url: URL,
    tensor: (String) throws -> Tensor
  ) throws {
    guard layout["__metadata__"] == nil else {
      throw SafetensorsError(path: url.path, reason: "__metadata__ is not a name for a tensor")
    }
    // The order of the reference library: widest dtype first, then by name.
    let order = layout.sorted { ($1.value.dtype.size, $0.key) < ($0.value.dtype.size, $1.key) }
    var header: [String: Any] = [:]
    if !metadata.isEmpty { header["__metadata__"] = metadata }
    var offset = 0
    for (name, entry) in order {
      let end = offset + entry.shape.reduce(entry.dtype.size, *)
      header[name] = [
        "dtype": entry.dtype.safetensorsName, "shape": entry.shape, "data_offsets": [offset, end],
      ]
      offset = end
    }
    var json = try JSONSerialization.data(
      withJSONObject: header, options: [.sortedKeys, .withoutEscapingSlashes])
    json.append(Data(repeating: 0x20, count: (8 - json.count % 8) % 8))
    try AtomicFile.write(to: url) { file in
      try file.append(withUnsafeBytes(of: UInt64(json.count).littleEndian) { [UInt8]($0) })
      try file.append([UInt8](json))
      for (name, entry) in order {
        let value = try tensor(name)
        guard value.dtype == entry.dtype, value.shape == entry.shape else {
          throw SafetensorsError(
            path: url.path,
            reason: "\(name): announced \(entry.dtype)\(entry.shape), given \(value.dtype)\(value.shape)")
        }
        try file.append(try value.bytes())
      }
    }
  }
}

/// Files that appear complete and on disk, or not at all.
public enum AtomicFile {
  /// A file being written.
  public final class Writer {
    private let descriptor: Int32
    private let path: String
    fileprivate init(path: String) throws {
      self.path = path
      descriptor = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o644)
      guard descriptor >= 0 else {
        throw SafetensorsError(path: path, reason: String(cString: strerror(errno)))
      }
    }
    /// Appends `bytes`.
    public func append(_ bytes: [UInt8]) throws {
      var done = 0
      while done < bytes.count {
        let n = bytes.withUnsafeBytes {
          Foundation.write(descriptor, $0.baseAddress! + done, bytes.count - done)
        }
        guard n > 0 || errno == EINTR else {
          throw SafetensorsError(path: path, reason: String(cString: strerror(errno)))
        }
        done += max(n, 0)
      }
    }
    fileprivate func finish() throws {
      guard fsync(descriptor) == 0 else {
        throw SafetensorsError(path: path, reason: String(cString: strerror(errno)))
      }
    }
    deinit { close(descriptor) }
  }

  /// Writes through `body` to a temporary file beside `url`, syncs it and renames it into place.
  public static func write(to url: URL, _ body: (Writer) throws -> Void) throws {
    let temporary = url.path + ".tmp-\(getpid())"
    do {
      let writer = try Writer(path: temporary)
      try body(writer)
      try writer.finish()
    } catch {
      unlink(temporary)
      throw error
    }
    guard rename(temporary, url.path) == 0 else {
      let reason = String(cString: strerror(errno))
      unlink(temporary)
      throw SafetensorsError(path: url.path, reason: reason)
    }
    syncFolder(url.deletingLastPathComponent())
  }

  /// Writes `data` atomically.
  public static func write(_ data: Data, to url: URL) throws {
    try write(to: url) { try $0.append([UInt8](data)) }
  }

  /// Makes renames inside `folder` survive a power cut.
  public static func syncFolder(_ folder: URL) {
    let descriptor = open(folder.path, O_RDONLY | O_DIRECTORY)
    if descriptor >= 0 {
      fsync(descriptor)
      close(descriptor)
    }
  }
}

extension DType {
  private static let safetensorsNames: [(DType, String)] = [
    (.uint8, "U8"), (.int8, "I8"), (.int32, "I32"), (.int64, "I64"), (.float16, "F16"), (.float32, "F32"),
    (.float64, "F64"),
    (.complex64, "C64"), (.bool, "BOOL"), (.bfloat16, "BF16"), (.float8, "F8_E4M3"),
  ]
  init?(safetensors name: String) {
    guard let found = Self.safetensorsNames.first(where: { $0.1 == name }) else { return nil }
    self = found.0
  }
  var safetensorsName: String { Self.safetensorsNames.first { $0.0 == self }!.1 }
}
