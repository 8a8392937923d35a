import Dispatch
import Synchronization
import Torch

extension Reward {
  /// The scores, waited for on this thread; a ``LocalReward`` is computed on it.
  ///
  /// In asynchronous code await ``score(_:prompts:)`` instead.
  public func scoresNow(_ images: Tensor, prompts: [RewardPrompt]) throws -> [RewardScore] {
    if let local = self as? any LocalReward { return try local.scores(images, prompts: prompts) }
    return try waiting { try await score(images, prompts: prompts) }
  }
}

/// Threads for questions that a blocked thread waits for: were they tasks of the shared pool, whoever blocks one of its
/// few threads might wait for ever.
public final class QuestionExecutor: TaskExecutor {
  /// The only one there is.
  public static let shared = QuestionExecutor()
  private let queue = DispatchQueue(label: "rewards", attributes: .concurrent)

  /// Runs a part of a task.
  public func enqueue(_ job: consuming ExecutorJob) {
    let job = UnownedJob(job)
    queue.async { job.runSynchronously(on: self.asUnownedTaskExecutor()) }
  }
}

/// Runs `body` on threads of its own and blocks this one for its result.
///
/// - Parameter check: called several times a second; what it throws cancels `body` and is not waited for.
public func waiting<R: Sendable>(
  check: () throws -> Void = {}, _ body: @escaping @Sendable () async throws -> R
) throws -> R {
  let done = DispatchSemaphore(value: 0)
  let result = Box<R>()
  let task = Task.detached(executorPreference: QuestionExecutor.shared) {
    let outcome: Result<R, any Error>
    do { outcome = .success(try await body()) } catch { outcome = .failure(error) }
    result.value.withLock { $0 = outcome }
    done.signal()
  }
  do {
    while done.wait(timeout: .now() + .milliseconds(100)) == .timedOut { try check() }
  } catch {
    task.cancel()
    throw error
  }
  return try result.value.withLock { $0! }.get()
}

private final class Box<R: Sendable>: Sendable {
  let value = Mutex<Result<R, any Error>?>(nil)
}
