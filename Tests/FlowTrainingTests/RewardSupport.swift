import FlowRewards
import Foundation
import Synchronization
import Testing
import Torch

@testable import FlowTraining

/// What a test wants a reward to be: a function of images and prompts, computed here.
struct FunctionReward: LocalReward {
  var name = "function"
  let body: @Sendable (Tensor, [RewardPrompt]) throws -> [RewardScore]
  func scores(_ images: Tensor, prompts: [RewardPrompt]) throws -> [RewardScore] { try body(images, prompts) }

  /// One whose scores depend on the number of the call, from 1 on.
  static func counting(
    _ body: @escaping @Sendable (Int, Tensor, [RewardPrompt]) throws -> [RewardScore]
  ) -> FunctionReward {
    let calls = Mutex(0)
    return FunctionReward { images, prompts in
      let call = calls.withLock {
        $0 += 1
        return $0
      }
      return try body(call, images, prompts)
    }
  }
}

/// The same, but somewhere else and after a while: it counts its calls and how many overlapped others.
final class WaitingReward: Reward {
  let name = "waiting"
  private let seconds: Double
  private let body: @Sendable (Tensor, [RewardPrompt]) throws -> [RewardScore]
  private let state = Mutex((calls: 0, running: 0, most: 0, cancelled: 0))

  init(seconds: Double = 0, _ body: @escaping @Sendable (Tensor, [RewardPrompt]) throws -> [RewardScore]) {
    (self.seconds, self.body) = (seconds, body)
  }
  convenience init(_ local: any LocalReward) { self.init { try local.scores($0, prompts: $1) } }

  var calls: Int { state.withLock { $0.calls } }
  var most: Int { state.withLock { $0.most } }
  var cancelled: Int { state.withLock { $0.cancelled } }

  func score(_ images: Tensor, prompts: [RewardPrompt]) async throws -> [RewardScore] {
    state.withLock {
      $0.calls += 1
      $0.running += 1
      $0.most = max($0.most, $0.running)
    }
    defer { state.withLock { $0.running -= 1 } }
    do { try await Task.sleep(for: .seconds(seconds)) } catch {
      state.withLock { $0.cancelled += 1 }
      throw error
    }
    return try body(images, prompts)
  }
}

extension RewardSet {
  /// Rewards with their settings, named by them.
  init(_ list: [(any Reward, RewardSettings)]) {
    let names = Self.names(list.map(\.1))
    self.init(zip(list, names).map { Entry(reward: $0.0, settings: $0.1, name: $1) })
  }
}

/// Settings with a few keys changed.
func settings(
  _ label: String, weight: Double = 1, _ change: (inout RewardSettings) -> Void = { _ in }
) -> RewardSettings {
  var settings = RewardSettings(name: "function", weight: weight)
  settings.label = label
  change(&settings)
  return settings
}
