import CCurl
import Foundation
import Synchronization

/// A request; with a body it is a POST, else a GET.
struct HTTPRequest: Sendable {
  var endpoint: Endpoint
  var contentType = "application/json"
  var body: Data?
}

/// Sends requests over kept connections: libcurl's multi interface on one thread of its own.
///
/// Servers are authenticated by TLS as curl does it; proxies come from the environment, but none stands between this
/// machine and itself; redirects are not followed.
final class HTTPClient: Sendable {
  struct Options: Sendable {
    /// Requests under way at once; further ones wait their turn, and their time does not run yet.
    var concurrency = 4
    /// Seconds for name, connection and TLS.
    var connectTimeout = 10.0
    /// Seconds for one request, from its turn to the last byte of the answer.
    var timeout = 60.0
    /// Bytes an answer may have; a longer one is cut off when it gets there.
    var responseLimit = 8 << 20
    /// Sent as a bearer token.
    var token: String?
    /// File of authorities trusted instead of the system's.
    var certificates: String?

    /// Authorities as the curl program finds them.
    static func certificates(_ environment: [String: String]) -> String? {
      ["CURL_CA_BUNDLE", "SSL_CERT_FILE"].lazy.compactMap { environment[$0] }.first { !$0.isEmpty }
    }
  }

  private let loop: TransferLoop

  /// Creates a client and its thread, which ends with the client.
  init(_ options: Options) throws(HTTPFailure) {
    precondition(options.concurrency > 0 && options.timeout > 0, "no request would ever end")
    loop = try TransferLoop(options)
    let loop = loop
    let thread = Thread { loop.run() }
    thread.name = "chunkgrpo http"
    thread.start()
  }
  deinit { loop.stop() }

  /// The body of the answer to `request`; cancelling the task ends the transfer.
  ///
  /// - Throws: ``HTTPFailure`` for everything but a whole answer with a status of 200 … 299; `CancellationError`.
  func send(_ request: HTTPRequest) async throws -> Data {
    // The thread must not end before the answer is there.
    defer { withExtendedLifetime(self) {} }
    let transfer = Transfer(request)
    return try await withTaskCancellationHandler {
      try await withCheckedThrowingContinuation { continuation in
        transfer.continuation = continuation
        loop.submit(transfer)
      }
    } onCancel: {
      transfer.cancelled.store(true, ordering: .releasing)
      loop.wake()
    }
  }
}

/// A request on its way.
///
/// Handed to the loop's thread through its mutex and touched by that thread only afterwards; `cancelled` is for
/// everybody.
private final class Transfer: @unchecked Sendable {
  let request: HTTPRequest
  let cancelled = Atomic(false)
  var continuation: CheckedContinuation<Data, any Error>?
  var received = Data()
  var headerBytes = 0
  var sent = 0
  var limit = 0
  var tooLarge = false
  var headers: UnsafeMutablePointer<curl_slist>?
  let message = UnsafeMutablePointer<CChar>.allocate(capacity: Int(CURL_ERROR_SIZE))

  init(_ request: HTTPRequest) {
    self.request = request
    message[0] = 0
  }
  deinit {
    curl_slist_free_all(headers)
    message.deallocate()
  }

  static func from(_ context: UnsafeMutableRawPointer?) -> Transfer {
    Unmanaged<Transfer>.fromOpaque(context!).takeUnretainedValue()
  }

  func receive(_ bytes: UnsafeMutablePointer<CChar>?, _ count: Int) -> Int {
    guard received.count + count <= limit else {
      tooLarge = true
      return count + 1  // anything but count ends the transfer, also for count = 0
    }
    if count > 0 {
      received.append(UnsafeRawPointer(bytes!).assumingMemoryBound(to: UInt8.self), count: count)
    }
    return count
  }
  func receiveHeader(_ count: Int) -> Int {
    headerBytes += count
    guard headerBytes <= 1 << 16 else {
      tooLarge = true
      return count + 1
    }
    return count
  }
  func send(into buffer: UnsafeMutablePointer<CChar>?, _ capacity: Int) -> Int {
    let body = request.body!
    let count = min(capacity, body.count - sent)
    if count > 0 {
      let start = body.startIndex + sent
      body.copyBytes(
        to: UnsafeMutableRawPointer(buffer!).assumingMemoryBound(to: UInt8.self), from: start..<start + count)
    }
    sent += count
    return count
  }
}

/// The thread that moves all bytes, and what reaches it from others.
///
/// `queue` and `active` are the thread's own; `inbox` is shared; the multi handle is used by the thread, but for the
/// wake-up call, which libcurl allows from anywhere while the handle exists.
private final class TransferLoop: @unchecked Sendable {
  private struct Inbox {
    var arrived: [Transfer] = []
    var stopped = false
    /// Why it stopped by itself.
    var reason: String?
  }

  private let options: HTTPClient.Options
  private let multi: UnsafeMutableRawPointer
  private let inbox = Mutex(Inbox())
  private var queue: [Transfer] = []
  private var active: [UnsafeMutableRawPointer: Transfer] = [:]

  private static let libraryStatus = ccurl_global_init()

  init(_ options: HTTPClient.Options) throws(HTTPFailure) {
    self.options = options
    guard Self.libraryStatus == CURLE_OK, let multi = curl_multi_init() else {
      throw .refused(address: "libcurl", reason: "cannot start; are memory or file descriptors used up?")
    }
    self.multi = UnsafeMutableRawPointer(multi)
    // One idle connection a request that may be under way: all of them are used again.
    _ = ccurl_multi_set_long(multi, CURLMOPT_MAXCONNECTS, options.concurrency)
  }

  func submit(_ transfer: Transfer) {
    let refused: String? = inbox.withLock {
      if $0.stopped { return $0.reason ?? "the client is closed" }
      $0.arrived.append(transfer)
      curl_multi_wakeup(multi)
      return nil
    }
    if let refused {
      let address = transfer.request.endpoint.shown
      transfer.continuation!.resume(throwing: HTTPFailure.refused(address: address, reason: refused))
    }
  }
  func wake() { inbox.withLock { if !$0.stopped { curl_multi_wakeup(multi) } } }
  func stop() {
    inbox.withLock {
      guard !$0.stopped else { return }
      $0.stopped = true
      curl_multi_wakeup(multi)
    }
  }

  func run() {
    // A connection that the server closed must not end the program; older OpenSSL writes without MSG_NOSIGNAL.
    var signals = sigset_t()
    sigemptyset(&signals)
    sigaddset(&signals, SIGPIPE)
    pthread_sigmask(SIG_BLOCK, &signals, nil)

    while true {
      let (arrived, stopped) = inbox.withLock { inbox in
        defer { inbox.arrived = [] }
        return (inbox.arrived, inbox.stopped)
      }
      queue += arrived
      if stopped { break }
      dropCancelled()
      while active.count < options.concurrency, !queue.isEmpty { start(queue.removeFirst()) }
      var running: Int32 = 0
      var code = curl_multi_perform(multi, &running)
      finish()
      if !queue.isEmpty && active.count < options.concurrency { continue }
      if code == CURLM_OK { code = curl_multi_poll(multi, nil, 0, 60_000, nil) }
      if code != CURLM_OK {
        let reason = "libcurl: " + String(cString: curl_multi_strerror(code))
        inbox.withLock { ($0.stopped, $0.reason) = (true, reason) }
      }
    }
    let reason = inbox.withLock { $0.reason } ?? "the client is closed"
    for (easy, transfer) in active {
      end(
        easy, transfer,
        .failure(HTTPFailure.refused(address: transfer.request.endpoint.shown, reason: reason)))
    }
    for transfer in queue {
      transfer.continuation!.resume(
        throwing: HTTPFailure.refused(address: transfer.request.endpoint.shown, reason: reason))
    }
    curl_multi_cleanup(multi)
  }

  private func dropCancelled() {
    queue.removeAll { transfer in
      guard transfer.cancelled.load(ordering: .acquiring) else { return false }
      transfer.continuation!.resume(throwing: CancellationError())
      return true
    }
    for (easy, transfer) in active where transfer.cancelled.load(ordering: .acquiring) {
      end(easy, transfer, .failure(CancellationError()))
    }
  }

  private func start(_ transfer: Transfer) {
    let address = transfer.request.endpoint.shown
    func refuse(_ reason: String) {
      transfer.continuation!.resume(throwing: HTTPFailure.refused(address: address, reason: reason))
    }
    guard let handle = curl_easy_init() else { return refuse("libcurl: no memory for a request") }
    let easy = UnsafeMutableRawPointer(handle)
    let code = configure(easy, transfer)
    guard code == CURLE_OK else {
      curl_easy_cleanup(easy)
      return refuse("libcurl: " + String(cString: curl_easy_strerror(code)))
    }
    let added = curl_multi_add_handle(multi, easy)
    guard added == CURLM_OK else {
      curl_easy_cleanup(easy)
      return refuse("libcurl: " + String(cString: curl_multi_strerror(added)))
    }
    active[easy] = transfer
  }

  private func configure(_ easy: UnsafeMutableRawPointer, _ transfer: Transfer) -> CURLcode {
    let request = transfer.request
    let context = Unmanaged.passUnretained(transfer).toOpaque()  // `active` keeps it
    transfer.limit = options.responseLimit
    var headers = ["Content-Type: \(request.contentType)"]
    if let token = options.token { headers.append("Authorization: Bearer \(token)") }
    // Else curl waits up to a second for leave to send a large body.
    headers.append("Expect:")
    for header in headers {
      guard let longer = curl_slist_append(transfer.headers, header) else { return CURLE_OUT_OF_MEMORY }
      transfer.headers = longer
    }

    var failed = CURLE_OK
    func set(_ code: CURLcode) { if failed == CURLE_OK { failed = code } }
    set(ccurl_set_string(easy, CURLOPT_URL, request.endpoint.url))
    set(ccurl_allow_http_only(easy))
    set(ccurl_set_long(easy, CURLOPT_FOLLOWLOCATION, 0))
    set(ccurl_set_long(easy, CURLOPT_SSL_VERIFYPEER, 1))
    set(ccurl_set_long(easy, CURLOPT_SSL_VERIFYHOST, 2))
    if let file = options.certificates { set(ccurl_set_string(easy, CURLOPT_CAINFO, file)) }
    if request.endpoint.isLoopback { set(ccurl_set_string(easy, CURLOPT_PROXY, "")) }
    set(ccurl_set_long(easy, CURLOPT_NOSIGNAL, 1))
    set(ccurl_set_long(easy, CURLOPT_TCP_KEEPALIVE, 1))
    set(ccurl_set_string(easy, CURLOPT_USERAGENT, "chunkgrpo"))
    set(ccurl_set_list(easy, CURLOPT_HTTPHEADER, transfer.headers))
    set(ccurl_set_pointer(easy, CURLOPT_ERRORBUFFER, transfer.message))
    set(ccurl_set_long(easy, CURLOPT_TIMEOUT_MS, milliseconds(options.timeout)))
    set(
      ccurl_set_long(
        easy, CURLOPT_CONNECTTIMEOUT_MS, milliseconds(min(options.connectTimeout, options.timeout))))
    set(ccurl_set_offset(easy, CURLOPT_MAXFILESIZE_LARGE, curl_off_t(options.responseLimit)))

    set(ccurl_set_pointer(easy, CURLOPT_WRITEDATA, context))
    set(
      ccurl_set_data_function(easy, CURLOPT_WRITEFUNCTION) { bytes, size, count, context in
        Transfer.from(context).receive(bytes, size * count)
      })
    set(ccurl_set_pointer(easy, CURLOPT_HEADERDATA, context))
    set(
      ccurl_set_data_function(easy, CURLOPT_HEADERFUNCTION) { _, size, count, context in
        Transfer.from(context).receiveHeader(size * count)
      })
    if let body = request.body {
      set(ccurl_set_long(easy, CURLOPT_POST, 1))
      set(ccurl_set_offset(easy, CURLOPT_POSTFIELDSIZE_LARGE, curl_off_t(body.count)))
      set(ccurl_set_pointer(easy, CURLOPT_READDATA, context))
      set(
        ccurl_set_data_function(easy, CURLOPT_READFUNCTION) { buffer, size, count, context in
          Transfer.from(context).send(into: buffer, size * count)
        })
      // curl starts again by itself where a kept connection turns out to be closed.
      set(ccurl_set_pointer(easy, CURLOPT_SEEKDATA, context))
      set(
        ccurl_set_seek_function(easy) { context, offset, origin in
          let transfer = Transfer.from(context)
          guard origin == SEEK_SET, 0...transfer.request.body!.count ~= Int(offset) else { return 1 }
          transfer.sent = Int(offset)
          return 0
        })
    }
    return failed
  }

  private func milliseconds(_ seconds: Double) -> Int { Int(max(1, min(seconds * 1000, 0x1p31 - 1))) }

  /// Takes transfers that ended from the multi handle.
  private func finish() {
    var left: Int32 = 0
    while let message = curl_multi_info_read(multi, &left)?.pointee {
      guard message.msg == CURLMSG_DONE, let handle = message.easy_handle else { continue }
      let easy = UnsafeMutableRawPointer(handle)
      guard let transfer = active[easy] else { continue }
      end(easy, transfer, outcome(easy, transfer, message.data.result))
    }
  }

  private func end(
    _ easy: UnsafeMutableRawPointer, _ transfer: Transfer, _ outcome: Result<Data, any Error>
  ) {
    curl_multi_remove_handle(multi, easy)
    curl_easy_cleanup(easy)
    active[easy] = nil
    transfer.continuation!.resume(with: outcome)
  }

  private func outcome(
    _ easy: UnsafeMutableRawPointer, _ transfer: Transfer, _ code: CURLcode
  ) -> Result<Data, any Error> {
    let address = transfer.request.endpoint.shown
    let status = ccurl_get_long(easy, CURLINFO_RESPONSE_CODE)
    // Also where its body came only in part: the status says more than that.
    if status >= 300 {
      var excerpt = Quotation(token: options.token)(transfer.received)
      if 300..<400 ~= status, let target = ccurl_get_string(easy, CURLINFO_REDIRECT_URL) {
        let there = URLComponents(string: String(cString: target))
        excerpt =
          "redirects are not followed; it points to \(there?.host ?? "another host")\(there?.path ?? "")"
      }
      let retryAfter = ccurl_get_offset(easy, CURLINFO_RETRY_AFTER)
      return .failure(
        HTTPFailure.status(
          address: address, code: status, excerpt: excerpt,
          retryAfter: retryAfter > 0 ? Double(retryAfter) : nil))
    }
    if code == CURLE_OK && 200..<300 ~= status { return .success(transfer.received) }
    return .failure(failure(easy, transfer, code, address))
  }

  private func failure(
    _ easy: UnsafeMutableRawPointer, _ transfer: Transfer, _ code: CURLcode, _ address: String
  ) -> HTTPFailure {
    let own = String(cString: transfer.message)
    let reason = own.isEmpty ? String(cString: curl_easy_strerror(code)) : own
    switch code {
    case CURLE_COULDNT_RESOLVE_HOST, CURLE_COULDNT_RESOLVE_PROXY, CURLE_COULDNT_CONNECT,
      CURLE_SSL_CONNECT_ERROR:
      return .cannotConnect(address: address, reason: reason)
    case CURLE_PEER_FAILED_VERIFICATION, CURLE_SSL_CACERT_BADFILE, CURLE_SSL_CERTPROBLEM,
      CURLE_SSL_ISSUER_ERROR:
      return .notTrusted(address: address, reason: reason)
    case CURLE_OPERATION_TIMEDOUT:
      let phase: HTTPFailure.Phase =
        ccurl_get_offset(easy, CURLINFO_PRETRANSFER_TIME_T) == 0
        ? .connecting
        : transfer.sent < transfer.request.body?.count ?? 0
          ? .sending : transfer.headerBytes == 0 ? .waiting : .reading
      let limit =
        phase == .connecting ? min(options.connectTimeout, options.timeout) : options.timeout
      return .timedOut(address: address, seconds: limit, phase: phase)
    case _ where transfer.tooLarge || code == CURLE_FILESIZE_EXCEEDED:
      return .tooLarge(address: address, limit: options.responseLimit)
    case CURLE_SEND_ERROR, CURLE_RECV_ERROR, CURLE_GOT_NOTHING, CURLE_PARTIAL_FILE, CURLE_HTTP2,
      CURLE_HTTP2_STREAM,
      CURLE_HTTP3, CURLE_SEND_FAIL_REWIND:
      return .broken(address: address, reason: reason)
    default:
      return .refused(address: address, reason: code == CURLE_OK ? "an answer without status" : reason)
    }
  }
}
