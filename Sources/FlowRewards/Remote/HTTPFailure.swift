/// Why a server gave no answer that could be used.
enum HTTPFailure: Error, Sendable, Equatable, CustomStringConvertible {
  /// Where a transfer was when its time was up.
  enum Phase: String, Sendable {
    case connecting
    case sending = "sending the request"
    case waiting = "waiting for the answer"
    case reading = "reading the answer"
  }

  /// No connection; `reason` is curl's own message, as in the other cases.
  case cannotConnect(address: String, reason: String)
  /// The certificate is none that this machine trusts.
  case notTrusted(address: String, reason: String)
  /// No whole answer within `seconds`.
  case timedOut(address: String, seconds: Double, phase: Phase)
  /// The connection ended before the answer did.
  case broken(address: String, reason: String)
  /// An answer of more than `limit` bytes; it was not read to its end.
  case tooLarge(address: String, limit: Int)
  /// An answer that is not a success; `excerpt` is the start of its body, `retryAfter` the seconds it asks for.
  case status(address: String, code: Int, excerpt: String, retryAfter: Double?)
  /// Something else, which would be the same the next time.
  case refused(address: String, reason: String)

  /// What failed, where, and the way out.
  var description: String {
    switch self {
    case .cannotConnect(let address, let reason): "\(address): cannot connect: \(reason)"
    case .notTrusted(let address, let reason):
      "\(address): certificate not trusted: \(reason); SSL_CERT_FILE can name a file of further authorities"
    case .timedOut(let address, let seconds, let phase):
      "\(address): timed out after \(seconds) s while \(phase.rawValue); failure.timeout sets the limit"
    case .broken(let address, let reason): "\(address): connection broken: \(reason)"
    case .tooLarge(let address, let limit): "\(address): answer larger than the \(limit) bytes allowed"
    case .status(let address, let code, let excerpt, _):
      "\(address): status \(code)" + (excerpt.isEmpty ? "" : ": \(excerpt)")
    case .refused(let address, let reason): "\(address): \(reason)"
    }
  }

  /// The status, where there is one.
  var code: Int? { if case .status(_, let code, _, _) = self { code } else { nil } }
}
