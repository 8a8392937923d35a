import FlowTraining
import Foundation

/// What a person sees: a progress bar on a terminal, plain lines elsewhere. Everything goes to stderr; stdout is
/// for results.
enum Terminal {
  static let isInteractive = isatty(STDERR_FILENO) == 1

  static func error(_ text: String) {
    clearLine()
    FileHandle.standardError.write(Data((text + "\n").utf8))
  }
  static func line(_ text: String) { error(text) }

  /// Replaces the current line; nothing where the output is no terminal.
  static func status(_ text: String) {
    guard isInteractive else { return }
    FileHandle.standardError.write(Data("\r\u{1B}[2K\(text.prefix(width - 1))".utf8))
  }
  static func clearLine() {
    if isInteractive { FileHandle.standardError.write(Data("\r\u{1B}[2K".utf8)) }
  }

  /// Throws unless a file can be written at `path`: asked before hours of drawing, not after.
  static func requireWritable(_ path: String, _ option: String) throws {
    let url = URL(filePath: path)
    let folder = url.deletingLastPathComponent()
    var isFolder: ObjCBool = false
    guard !(FileManager.default.fileExists(atPath: url.path, isDirectory: &isFolder) && isFolder.boolValue)
    else {
      throw RunError("\(option): \(path) is a folder; name a file in it")
    }
    guard FileManager.default.isWritableFile(atPath: folder.path) else {
      throw RunError("\(option): \(folder.path) is not a folder that can be written")
    }
  }

  /// Throws unless `folder` is empty, or can be made.
  static func requireNewFolder(_ folder: URL, _ option: String) throws {
    let files = FileManager.default
    guard files.fileExists(atPath: folder.path) else {
      return try requireWritable(folder.path, option)
    }
    guard let present = try? files.contentsOfDirectory(atPath: folder.path) else {
      throw RunError("\(option): \(folder.path) is not a folder that can be read: name a new one")
    }
    guard present.isEmpty else {
      throw RunError("\(option): \(folder.path) is not empty, and nothing is overwritten: name a new folder")
    }
  }

  private static var width: Int {
    var size = winsize()
    return ioctl(STDERR_FILENO, UInt(TIOCGWINSZ), &size) == 0 && size.ws_col > 20 ? Int(size.ws_col) : 100
  }

  static func duration(_ seconds: Double) -> String {
    let s = Int(seconds.rounded())
    return s >= 3600 ? "\(s / 3600)h\(two(s / 60 % 60))m" : s >= 60 ? "\(s / 60)m\(two(s % 60))s" : "\(s)s"
  }
  private static func two(_ n: Int) -> String { n < 10 ? "0\(n)" : "\(n)" }

  static func fixed(_ value: Double, _ digits: Int) -> String { String(format: "%.\(digits)f", value) }
  static func signed(_ value: Double, _ digits: Int) -> String { String(format: "%+.\(digits)f", value) }

  /// Rows with columns aligned, numbers to the right.
  static func table(_ rows: [[String]]) -> String {
    let widths = (0..<(rows.map(\.count).max() ?? 0)).map { c in
      rows.map { c < $0.count ? $0[c].count : 0 }.max() ?? 0
    }
    return rows.map { row in
      let cells = row.enumerated().map { c, text in
        let padding = String(repeating: " ", count: widths[c] - text.count)
        return c == 0 ? text + padding : padding + text
      }
      return cells.joined(separator: "  ").trimmingTrailingSpaces
    }.joined(separator: "\n")
  }

  static func json(_ value: some Encodable) throws -> String {
    let encoder = JSONEncoder()
    encoder.keyEncodingStrategy = .convertToSnakeCase
    encoder.outputFormatting = [.sortedKeys, .prettyPrinted, .withoutEscapingSlashes]
    return String(decoding: try encoder.encode(value), as: UTF8.self)
  }
}

extension String {
  var trimmingTrailingSpaces: String {
    var text = self[...]
    while text.last == " " { text.removeLast() }
    return String(text)
  }
}

/// Shows the progress of a training run.
final class TrainingProgress {
  private let start = Date()
  private var first: Int?

  func show(_ event: TrainingEvent) {
    switch event {
    case .warning(let text): Terminal.line("warning: \(text)")
    case .note(let text), .reached(let text): Terminal.line(text)
    case .checkpoint(let name): if !Terminal.isInteractive { Terminal.line("checkpoint: \(name)") }
    case .iteration(let row, let total): iteration(row, total)
    }
  }

  private func iteration(_ row: MetricsRow, _ total: Int) {
    if first == nil { first = row.iteration - 1 }
    let done = row.iteration - first!
    let spent = Date().timeIntervalSince(start)
    let left = spent / Double(done) * Double(total - row.iteration)
    func value(_ key: String) -> Double { row.values[key] ?? .nan }
    let evaluations = row.values.filter { $0.key.hasPrefix("eval/") && !$0.key.contains("guards") }
      .sorted { $0.key < $1.key }.map { "\($0.key) \(Terminal.fixed($0.value, 4))" }
    let rewards = row.values.filter { $0.key.hasPrefix("reward/") && !$0.key.dropFirst(7).contains("/") }
      .sorted { $0.key < $1.key }
      .map { "\($0.key.dropFirst(7)) \(Terminal.fixed($0.value, 4))" }
    let text =
      ([
        "iteration \(row.iteration)/\(total)",
        "reward \(Terminal.fixed(value("reward_mean"), 4)) (\(rewards.joined(separator: ", ")))",
        "|ratio−1| \(String(format: "%.1e", value("ratio_dev")))",
        "grad \(String(format: "%.2e", value("grad_norm")))",
        "\(Terminal.fixed(value("images_per_s"), 1)) images/s",
      ] + evaluations + ["ETA \(Terminal.duration(left))"]).joined(separator: " · ")
    guard Terminal.isInteractive else { return Terminal.line(text) }
    if !evaluations.isEmpty { Terminal.line(text) }
    let filled = 20 * row.iteration / max(total, 1)
    let bar = String(repeating: "█", count: filled) + String(repeating: "░", count: 20 - filled)
    Terminal.status(bar + " " + text)
    if row.iteration == total { Terminal.line(bar + " " + text) }
  }
}
