import Foundation
import Pictures

/// Why no text can be read, or asked for.
public enum OCRError: Error, CustomStringConvertible, Sendable, Equatable {
  /// The library cannot be loaded; `reason` is the loader's own message on the last name tried.
  case noLibrary(tried: [String], reason: String)
  /// A library of this name that lacks a function of tesseract's C API.
  case foreignLibrary(path: String, missing: String)
  /// The library has no data for the language.
  case noLanguage(language: String, version: String, folder: String?)
  /// Prompts without quoted text, the first of `count`.
  case noQuotedText(prompts: [String], count: Int)

  /// What, expected, got, and the way out.
  public var description: String {
    switch self {
    case .noLibrary(let tried, let reason):
      "ocr: cannot load \(tried.joined(separator: ", ")) (\(reason)); install tesseract: "
        + "apt-get install libtesseract5 tesseract-ocr-eng"
    case .foreignLibrary(let path, let missing):
      "ocr: \(path) has no \(missing): not the C API of tesseract 4 or 5; install libtesseract5"
    case .noLanguage(let language, let version, let folder):
      "ocr language: tesseract \(version) cannot read \"\(language)\": no such data in "
        + (folder.map { "TESSDATA_PREFIX=\($0)" } ?? "its own folder") + "; install it: apt-get install "
        + language.split(separator: "+").map { "tesseract-ocr-\($0.replacing("_", with: "-").lowercased())" }
        .joined(separator: " ") + ", or set TESSDATA_PREFIX to the folder of its .traineddata"
    case .noQuotedText(let prompts, let count):
      "ocr: \(count) prompt\(count == 1 ? "" : "s") without text in double quotes to look for, such as "
        + prompts.map { "'\($0)'" }.joined(separator: ", ") + (count > prompts.count ? ", …" : "")
        + "; write a photo of a sign that says \"OPEN\""
    }
  }
}

/// One engine of tesseract, found when the program runs: neither the build nor other rewards need it.
///
/// Source: tesseract 5.3.0 include/tesseract/capi.h.
final class Tesseract: @unchecked Sendable {
  // Unchecked: `lock` guards every use of the engine, which is not thread-safe.
  private let lock = NSLock()
  private let functions: Functions
  private let engine: OpaquePointer

  /// Names under which systems have the library.
  static let libraries = ["libtesseract.so.5", "libtesseract.so.4", "libtesseract.so"]
  /// Looks for text anywhere, in no order: a sign in a scene is no page (PSM_SPARSE_TEXT).
  private static let sparseText: Int32 = 11

  /// Creates an engine for `language`, one or more names of data files joined by `+`.
  ///
  /// - Throws: ``OCRError``.
  init(language: String, libraries: [String] = libraries) throws(OCRError) {
    let functions = try Functions(libraries)
    let engine = functions.create()
    // Its complaints go to stderr otherwise; ours say more.
    _ = functions.setVariable(engine, "debug_file", "/dev/null")
    guard functions.initialise(engine, nil, language) == 0 else {
      functions.delete(engine)
      throw .noLanguage(
        language: language, version: String(cString: functions.version()),
        folder: ProcessInfo.processInfo.environment["TESSDATA_PREFIX"])
    }
    // Only now: deinit runs as soon as all is set, also where init throws.
    (self.functions, self.engine) = (functions, engine)
    functions.setPageMode(engine, Self.sparseText)
  }

  deinit {
    functions.end(engine)
    functions.delete(engine)
  }

  /// What is written in a picture of 8-bit pixels, interleaved with `channels` (1 or 3) a pixel; nil if
  /// tesseract fails.
  func read(_ pixels: [UInt8], width: Int, height: Int, channels: Int) -> String? {
    lock.withLock {
      functions.onOneThread {
        functions.setImage(
          engine, pixels, Int32(width), Int32(height), Int32(channels), Int32(channels * width))
        // Pictures have no resolution; without one it guesses, from the size of what it takes for letters.
        functions.setResolution(engine, 300)
        guard let text = functions.text(engine) else { return nil }
        defer { functions.deleteText(text) }
        return String(cString: text)
      }
    }
  }
}

/// Entry points of the C API.
private struct Functions: Sendable {
  typealias Engine = OpaquePointer
  let create: @Sendable @convention(c) () -> Engine
  let version: @Sendable @convention(c) () -> UnsafePointer<CChar>
  let setVariable: @Sendable @convention(c) (Engine, UnsafePointer<CChar>, UnsafePointer<CChar>) -> Int32
  let initialise: @Sendable @convention(c) (Engine, UnsafePointer<CChar>?, UnsafePointer<CChar>) -> Int32
  let setPageMode: @Sendable @convention(c) (Engine, Int32) -> Void
  let setImage: @Sendable @convention(c) (Engine, UnsafePointer<UInt8>, Int32, Int32, Int32, Int32) -> Void
  let setResolution: @Sendable @convention(c) (Engine, Int32) -> Void
  let text: @Sendable @convention(c) (Engine) -> UnsafeMutablePointer<CChar>?
  let deleteText: @Sendable @convention(c) (UnsafeMutablePointer<CChar>) -> Void
  let end: @Sendable @convention(c) (Engine) -> Void
  let delete: @Sendable @convention(c) (Engine) -> Void
  /// OpenMP's, of the library that tesseract was linked to; nil where it was built without.
  let levels: (@Sendable @convention(c) () -> Int32)?
  let setLevels: (@Sendable @convention(c) (Int32) -> Void)?

  init(_ names: [String]) throws(OCRError) {
    var found: (path: String, handle: UnsafeMutableRawPointer)?
    var reason = ""
    for name in names where found == nil {
      // Never closed: OpenMP's threads would go on in code that is gone.
      if let handle = dlopen(name, RTLD_NOW | RTLD_LOCAL) {
        found = (name, handle)
      } else {
        reason = dlerror().map { String(cString: $0) } ?? "no reason given"
      }
    }
    guard let (path, handle) = found else { throw .noLibrary(tried: names, reason: reason) }
    func load<F>(_ name: String, as type: F.Type) throws(OCRError) -> F {
      guard let symbol = dlsym(handle, name) else { throw .foreignLibrary(path: path, missing: name) }
      return unsafeBitCast(symbol, to: type)
    }
    create = try load("TessBaseAPICreate", as: (@Sendable @convention(c) () -> Engine).self)
    version = try load("TessVersion", as: (@Sendable @convention(c) () -> UnsafePointer<CChar>).self)
    setVariable = try load(
      "TessBaseAPISetVariable",
      as: (@Sendable @convention(c) (Engine, UnsafePointer<CChar>, UnsafePointer<CChar>) -> Int32).self)
    initialise = try load(
      "TessBaseAPIInit3",
      as: (@Sendable @convention(c) (Engine, UnsafePointer<CChar>?, UnsafePointer<CChar>) -> Int32).self)
    setPageMode = try load(
      "TessBaseAPISetPageSegMode", as: (@Sendable @convention(c) (Engine, Int32) -> Void).self)
    setImage = try load(
      "TessBaseAPISetImage",
      as: (@Sendable @convention(c) (Engine, UnsafePointer<UInt8>, Int32, Int32, Int32, Int32) -> Void).self)
    setResolution = try load(
      "TessBaseAPISetSourceResolution", as: (@Sendable @convention(c) (Engine, Int32) -> Void).self)
    text = try load(
      "TessBaseAPIGetUTF8Text", as: (@Sendable @convention(c) (Engine) -> UnsafeMutablePointer<CChar>?).self)
    deleteText = try load(
      "TessDeleteText", as: (@Sendable @convention(c) (UnsafeMutablePointer<CChar>) -> Void).self)
    end = try load("TessBaseAPIEnd", as: (@Sendable @convention(c) (Engine) -> Void).self)
    delete = try load("TessBaseAPIDelete", as: (@Sendable @convention(c) (Engine) -> Void).self)
    levels = try? load("omp_get_max_active_levels", as: (@Sendable @convention(c) () -> Int32).self)
    setLevels = try? load("omp_set_max_active_levels", as: (@Sendable @convention(c) (Int32) -> Void).self)
  }

  /// Runs `body` with OpenMP's parallel regions taken by this thread alone.
  ///
  /// Tesseract asks for four threads by number, so that a smaller default does not help; they would compete
  /// with libtorch's, and letters are too small to share. The level is this thread's own from GCC 11 on.
  func onOneThread<R>(_ body: () -> R) -> R {
    guard let levels, let setLevels else { return body() }
    let before = levels()
    setLevels(0)
    defer { setLevels(before) }
    return body()
  }
}
