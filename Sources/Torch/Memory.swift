import CTorch
import Foundation

extension TorchRuntime {
  /// Forgets the peak of memory use, so that ``peakMemory(_:)`` counts from here; on the CPU gives back what is kept for
  /// later operations.
  ///
  /// - Throws: ``TorchError`` where there is no such device, or where the system does not let a process reset
  ///   its peak.
  public static func resetPeakMemory(_ device: Device = .cpu) throws(TorchError) {
    try check("resetPeakMemory", [], ctorch_reset_peak_memory(device.code, device.index))
    guard device == .cpu else { return }
    #if os(Linux)
      // "5" resets the peak resident set size (Linux, Documentation/filesystems/proc.rst).
      let descriptor = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC)
      let written = descriptor < 0 ? -1 : write(descriptor, "5", 1)
      let reason = String(cString: strerror(errno))
      if descriptor >= 0 { close(descriptor) }
      guard written == 1 else { throw TorchError("resetPeakMemory", "/proc/self/clear_refs: \(reason)") }
    #else
      throw TorchError("resetPeakMemory", "not supported on this system")
    #endif
  }

  /// Most bytes in use at a time since ``resetPeakMemory(_:)``, or since the start.
  ///
  /// CUDA: what libtorch's allocator handed out on the device. CPU: resident memory of the whole process, its
  /// code and mapped files included.
  public static func peakMemory(_ device: Device = .cpu) throws(TorchError) -> Int {
    guard device == .cpu else {
      var bytes: Int64 = 0
      try check("peakMemory", [], ctorch_peak_memory(&bytes, device.code, device.index))
      return Int(bytes)
    }
    return try processStatus("VmHWM")
  }

  /// Bytes in use now: resident memory of the process.
  public static func residentMemory() throws(TorchError) -> Int { try processStatus("VmRSS") }

  /// Runs `body` and counts what libtorch's CPU allocator hands out on this thread: the most held at a time, of what
  /// was allocated meanwhile.
  public static func peakAllocation<R>(_ body: () throws -> R) throws -> (result: R, bytes: Int) {
    try check("peakAllocation", [], ctorch_watch_begin())
    let result = Result(catching: body)
    var bytes: Int64 = 0
    try check("peakAllocation", [], ctorch_watch_end(&bytes))
    return (try result.get(), Int(bytes))
  }

  /// Bytes that a run on `device` could use now: free memory of a CUDA device, or of the host (MemAvailable).
  public static func availableMemory(_ device: Device = .cpu) throws(TorchError) -> Int {
    guard device == .cpu else {
      var (free, total): (Int64, Int64) = (0, 0)
      try check("availableMemory", [], ctorch_device_memory(&free, &total))
      return Int(free)
    }
    return try size("MemAvailable", in: "/proc/meminfo")
  }

  /// A size of /proc/self/status, in bytes.
  private static func processStatus(_ key: String) throws(TorchError) -> Int {
    try size(key, in: "/proc/self/status")
  }

  private static func size(_ key: String, in file: String) throws(TorchError) -> Int {
    // Read to the end: sizes of files in /proc are not known beforehand.
    let handle = FileHandle(forReadingAtPath: file)
    let text = (try? handle?.readToEnd()).map { String(decoding: $0, as: UTF8.self) } ?? ""
    let line = text.split(separator: "\n").first { $0.hasPrefix(key + ":") }
    guard let kilobytes = line?.split(whereSeparator: \.isWhitespace).dropFirst().first.flatMap({ Int($0) })
    else {
      throw TorchError("peakMemory", "\(file) has no \(key): not supported on this system")
    }
    return kilobytes * 1024
  }
}
