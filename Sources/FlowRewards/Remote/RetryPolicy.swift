import ChunkGRPO

/// Which failures are tried again, how often, and after how long.
struct RetryPolicy: Sendable, Equatable {
  /// Further tries after the first.
  var retries = 3
  /// Seconds of the longest possible pause before the first repetition; it doubles with each.
  var firstPause = 0.5
  /// Seconds that no pause exceeds, whatever the server asks for.
  var longestPause = 30.0
  /// What the jitter is drawn by: servers are shared, so that two runs should not knock in step.
  var seed: UInt64 = 0

  /// Whether the same request may succeed the next time.
  func repeats(_ failure: HTTPFailure) -> Bool {
    switch failure {
    case .cannotConnect, .timedOut, .broken: true
    case .status(_, let code, _, _): [408, 425, 429].contains(code) || 500...599 ~= code
    case .notTrusted, .tooLarge, .refused: false
    }
  }

  /// Seconds before repetition `attempt` = 1, 2, … of request number `request`.
  ///
  /// Full jitter: uniform between 0 and the doubled pause. What the server asks for by Retry-After is waited for first,
  /// as far as ``longestPause`` allows.
  func pause(before attempt: Int, of request: UInt64, after failure: HTTPFailure) -> Double {
    precondition(attempt >= 1, "the first try has no pause")
    let ceiling = min(longestPause, firstPause * Double(1 << min(attempt - 1, 30)))
    let block = Philox4x32.block(
      (
        UInt32(truncatingIfNeeded: request), UInt32(truncatingIfNeeded: request >> 32),
        UInt32(truncatingIfNeeded: attempt), 0
      ), key: (UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32)))
    let jitter = ceiling * Double(block.0) * 0x1p-32
    guard case .status(_, _, _, let asked?) = failure, asked > 0 else { return jitter }
    return min(longestPause, asked + jitter)
  }
}
