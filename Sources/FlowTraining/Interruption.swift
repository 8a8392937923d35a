import Foundation

/// The run was asked to stop by a signal, and stopped at an iteration boundary.
public struct Interrupted: Error, Sendable, CustomStringConvertible {
  /// SIGINT or SIGTERM.
  public let signal: Int32
  /// 130 or 143, as shells report it.
  public var exitCode: Int32 { 128 + signal }
  /// For people.
  public var description: String { signal == SIGINT ? "interrupted" : "terminated" }
}

/// Turns the first SIGINT or SIGTERM into an ``Interrupted`` error at the next check.
public enum Interruption {
  // Written by the handler only, which may not lock or allocate.
  nonisolated(unsafe) private static var received: sig_atomic_t = 0
  /// Environment variable that holds the process without which this one is to stop: a study's, for its runs.
  static let parentVariable = "CHUNKGRPO_PARENT"
  private static let parent = ProcessInfo.processInfo.environment[parentVariable].flatMap { Int32($0) }

  /// Watches for signals from now on; a second one ends the process as usual.
  public static func watch() {
    for number in [SIGINT, SIGTERM] {
      signal(number) { number in
        Interruption.received = sig_atomic_t(number)
        signal(number, SIG_DFL)
      }
    }
  }

  /// Throws if a signal has come, or the study is gone that this run belongs to.
  public static func check() throws {
    if received != 0 { throw Interrupted(signal: Int32(received)) }
    if let parent, getppid() != parent { throw Interrupted(signal: SIGTERM) }
  }
}
