import Foundation
import Glibc

/// A program that answers each line on its stdin with a line on its stdout.
///
/// It leads a process group of its own: a Ctrl-C at the terminal is ours alone, and ``kill()`` takes its
/// children along. When this process ends, however it ends, the program's stdin closes, which is its cue to
/// leave.
///
/// To be used by one thread that blocks SIGPIPE and may be blocked: not by a thread of the concurrent executor.
final class ChildProcess {
  /// Why there is no answer, in a few words.
  struct Failure: Error, Equatable { let reason: String }

  /// Bytes of an answer above which it is taken for something else.
  static let longestLine = 1 << 20
  /// Bytes of stderr that are kept: the last ones.
  static let longestLog = 4096

  let pid: pid_t
  private var input, output, log: Int32
  private var received = Data()
  private var logged = Data()
  private var isWaitedFor = false

  /// Starts the program at the path `executable`.
  ///
  /// - Throws: ``Failure`` where the system refuses.
  init(executable: String, arguments: [String]) throws(Failure) {
    var pipes: [(read: Int32, write: Int32)] = []
    func closePipes() {
      for pipe in pipes {
        close(pipe.read)
        close(pipe.write)
      }
    }
    for _ in 0..<3 {
      var ends: [Int32] = [-1, -1]
      guard Self.pipe2(&ends, O_CLOEXEC) == 0 else {
        let reason = Self.text(errno)
        closePipes()
        throw Failure(reason: "no pipe to it: \(reason)")
      }
      pipes.append((ends[0], ends[1]))
    }
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_adddup2(&actions, pipes[0].read, STDIN_FILENO)
    posix_spawn_file_actions_adddup2(&actions, pipes[1].write, STDOUT_FILENO)
    posix_spawn_file_actions_adddup2(&actions, pipes[2].write, STDERR_FILENO)
    var attributes = posix_spawnattr_t()
    posix_spawnattr_init(&attributes)
    defer { posix_spawnattr_destroy(&attributes) }
    // Neither our handlers nor what this thread blocks.
    var (none, usual) = (sigset_t(), sigset_t())
    sigemptyset(&none)
    sigemptyset(&usual)
    for signal in [SIGPIPE, SIGINT, SIGTERM, SIGHUP] { sigaddset(&usual, signal) }
    posix_spawnattr_setsigmask(&attributes, &none)
    posix_spawnattr_setsigdefault(&attributes, &usual)
    posix_spawnattr_setpgroup(&attributes, 0)
    posix_spawnattr_setflags(
      &attributes, Int16(POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF))
    let environment = ProcessInfo.processInfo.environment.map { "\($0)=\($1)" }
    var child: pid_t = 0
    let status = Self.withStrings(arguments) { arguments in
      Self.withStrings(environment) { environment in
        posix_spawn(&child, executable, &actions, &attributes, arguments, environment)
      }
    }
    guard status == 0 else {
      closePipes()
      throw Failure(reason: "cannot be started: \(Self.text(status))")
    }
    pid = child
    close(pipes[0].read)
    close(pipes[1].write)
    close(pipes[2].write)
    (input, output, log) = (pipes[0].write, pipes[1].read, pipes[2].read)
    for end in [input, output, log] { _ = fcntl(end, F_SETFL, fcntl(end, F_GETFL) | O_NONBLOCK) }
  }

  deinit { kill() }

  /// Sends `request`, which ends in a newline, and returns the next line, without its newline.
  ///
  /// - Throws: ``Failure`` when there is none within `seconds`; the program is then of no more use.
  func ask(_ request: Data, within seconds: Double) throws(Failure) -> Data {
    let end = ContinuousClock.now + .seconds(seconds)
    var rest = request[...]
    while true {
      if let newline = received.firstIndex(of: UInt8(ascii: "\n")) {
        guard rest.isEmpty else { throw failure("answered before it was asked") }
        let line = received[..<newline]
        received = Data(received[(newline + 1)...])
        return Data(line)
      }
      guard received.count <= Self.longestLine else {
        throw failure("its answer is longer than \(Self.longestLine) bytes")
      }
      let left = ContinuousClock.now.duration(to: end) / .milliseconds(1)
      guard left > 0 else { throw failure("no answer within \(Self.number(seconds)) s") }
      // A descriptor of −1 is passed over.
      var events = [
        pollfd(fd: rest.isEmpty ? -1 : input, events: Int16(POLLOUT), revents: 0),
        pollfd(fd: output, events: Int16(POLLIN), revents: 0),
        pollfd(fd: log, events: Int16(POLLIN), revents: 0),
      ]
      guard poll(&events, nfds_t(events.count), Int32(min(left.rounded(.up), 1e6))) >= 0 || errno == EINTR
      else {
        throw failure("cannot be waited for: \(Self.text(errno))")
      }
      if events[2].revents != 0, !readLog() { log = closed(log) }
      if events[1].revents != 0, !read(output, { received.append($0) }),
        // An answer given in leaving is one.
        !received.contains(UInt8(ascii: "\n"))
      {
        throw ended()
      }
      if events[0].revents != 0 {
        let sent = rest.withUnsafeBytes { write(input, $0.baseAddress, $0.count) }
        if sent >= 0 {
          rest = rest.dropFirst(sent)
        } else if errno != EAGAIN && errno != EINTR {
          throw ended()
        }
      }
    }
  }

  /// Closes the program's stdin and gives it `seconds` to leave by itself.
  func leave(within seconds: Double) {
    input = closed(input)
    let end = ContinuousClock.now + .seconds(seconds)
    while ContinuousClock.now < end, !hasExited() { usleep(5000) }
    kill()
  }

  /// Ends the program and what it started, at once.
  func kill() {
    if !isWaitedFor {
      _ = Glibc.kill(-pid, SIGKILL)
      waitpid(pid, &status, 0)
      isWaitedFor = true
    }
    (input, output, log) = (closed(input), closed(output), closed(log))
  }

  // MARK: - How it ended

  private var status: Int32 = 0

  private func hasExited() -> Bool {
    if !isWaitedFor, waitpid(pid, &status, WNOHANG) == pid {
      // Its children may go on; the group is theirs as long as one of them lives.
      _ = Glibc.kill(-pid, SIGKILL)
      isWaitedFor = true
    }
    return isWaitedFor
  }

  /// What a closed pipe means: it takes a moment until the system knows.
  private func ended() -> Failure {
    let end = ContinuousClock.now + .milliseconds(500)
    while ContinuousClock.now < end, !hasExited() { usleep(1000) }
    guard isWaitedFor else { return failure("closed its stdin or stdout") }
    let signal = status & 0x7F
    return failure(
      signal == 0 ? "exited with status \(status >> 8 & 0xFF)" : "was killed by signal \(signal)")
  }

  /// With the last line of stderr, which tends to say why.
  private func failure(_ reason: String) -> Failure {
    if log >= 0 { _ = readLog() }
    let lines = String(decoding: logged, as: UTF8.self).split(whereSeparator: \.isNewline)
    let last = lines.last { !$0.allSatisfy(\.isWhitespace) }?.trimmingCharacters(in: .whitespaces).prefix(200)
    return Failure(reason: reason + (last.map { "; its stderr ends: \($0)" } ?? ""))
  }

  /// ``failure(_:)`` of what the answer says.
  func rejected(_ reason: String) -> Failure { failure(reason) }

  // MARK: - Reading and writing

  private func readLog() -> Bool {
    read(log) { bytes in
      logged.append(bytes)
      if logged.count > Self.longestLog { logged = Data(logged.suffix(Self.longestLog)) }
    }
  }

  /// Takes what there is, up to a limit; false at the end.
  private func read(_ end: Int32, _ take: (Data) -> Void) -> Bool {
    var buffer = [UInt8](repeating: 0, count: 1 << 16)
    // Not forever: a program that never stops talking would keep us from the clock.
    for _ in 0..<8 {
      let count = Glibc.read(end, &buffer, buffer.count)
      if count > 0 {
        take(Data(buffer[..<count]))
      } else {
        return count < 0 && (errno == EAGAIN || errno == EINTR)
      }
    }
    return true
  }

  private func closed(_ end: Int32) -> Int32 {
    if end >= 0 { close(end) }
    return -1
  }

  /// Swift's view of the C library lacks it; with pipe and fcntl, a program started in between would keep our
  /// ends open.
  private static let pipe2 = unsafeBitCast(
    dlsym(nil, "pipe2")!, to: (@Sendable @convention(c) (UnsafeMutablePointer<Int32>, Int32) -> Int32).self)

  private static func text(_ code: Int32) -> String { String(cString: strerror(code)) }
  private static func number(_ seconds: Double) -> String {
    seconds == seconds.rounded() ? "\(Int(seconds))" : "\(seconds)"
  }

  private static func withStrings<R>(
    _ strings: [String], _ body: (UnsafePointer<UnsafeMutablePointer<CChar>?>) -> R
  ) -> R {
    let copies = strings.map { strdup($0) } + [nil]
    defer { copies.forEach { free($0) } }
    return copies.withUnsafeBufferPointer { body($0.baseAddress!) }
  }

  /// The file that a shell would run for `command`: a path if it has a slash, else the first on `path`.
  static func locate(_ command: String, path: String) -> String? {
    func runs(_ file: String) -> Bool {
      var isFolder: ObjCBool = false
      return access(file, X_OK) == 0
        && FileManager.default.fileExists(atPath: file, isDirectory: &isFolder) && !isFolder.boolValue
    }
    if command.contains("/") { return runs(command) ? command : nil }
    return path.split(separator: ":", omittingEmptySubsequences: false).lazy
      .map { ($0.isEmpty ? "." : $0) + "/" + command }.first(where: runs)
  }
}
