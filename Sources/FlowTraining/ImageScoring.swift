import FlowRewards
import Foundation
import Pictures
import Torch

/// Scores pictures that are there already, whoever made them.
public struct ImageScoring {
  private let rewards: RewardSet
  /// What the scores are called: labels, or names as metrics use them.
  public var names: [String] { rewards.names }

  /// Makes the rewards.
  ///
  /// - Throws: what ``RewardFactory/make(_:assets:)`` does; ``RunError`` for two of one name.
  public init(_ entries: [Configuration.Reward]) throws {
    rewards = try RewardSet(entries)
    let names = names
    if let twin = names.first(where: { name in names.count { $0 == name } > 1 }) {
      throw RunError("--reward: two are called \(twin); give one a label, as in {name: …, label: other}")
    }
  }

  /// Whether any of the rewards reads prompts.
  public var readsPrompts: Bool { rewards.entries.contains(where: \.reward.readsPrompts) }

  /// Throws for prompts that a reward can never judge, and where what a reward needs is not there.
  public func check(_ prompts: [Prompt]) throws {
    try rewards.check(prompts)
    try rewards.prepare()
  }

  /// Scores of pictures of any sizes; those of one size are judged together.
  ///
  /// - Parameter prompts: one for each picture.
  /// - Returns: one list of scores for each reward, in the pictures' order.
  public func scores(_ pictures: [Pictures.Image], prompts: [Prompt]) throws -> [[RewardScore]] {
    precondition(pictures.count == prompts.count, "ImageScoring: one prompt for each picture")
    struct Size: Hashable { let width, height: Int }
    let groups = Dictionary(grouping: pictures.indices) {
      Size(width: pictures[$0].width, height: pictures[$0].height)
    }
    return try Judgement(
      groups.values.sorted { $0[0] < $1[0] }.map { rows in
        let images = try Tensor(pictures: rows.map { pictures[$0] })
        return (rows, try rewards.judge(images, rows.map { prompts[$0] }))
      }
    ).scores
  }
}

extension Tensor {
  /// Pictures of one size as [B, 3, H, W], float32 in 0…1.
  convenience init(pictures: [Pictures.Image]) throws {
    let (height, width) = (pictures[0].height, pictures[0].width)
    let plane = height * width
    var values = [Float](repeating: 0, count: pictures.count * 3 * plane)
    for (i, picture) in pictures.enumerated() {
      for pixel in 0..<plane {
        for channel in 0..<3 {
          values[(3 * i + channel) * plane + pixel] = Float(picture.pixels[3 * pixel + channel]) / 255
        }
      }
    }
    try self.init(values, shape: [pictures.count, 3, height, width])
  }
}
