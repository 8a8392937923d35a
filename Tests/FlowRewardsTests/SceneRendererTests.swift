import ChunkGRPO
import Foundation
import Testing
import Torch

@testable import FlowRewards

/// Oracle: the verifier, which is checked against the reference implementation, and the rules of placement.
@Suite("Scene renderer")
struct SceneRendererTests {
  private let renderer: SceneRenderer
  private let verifier: ScenesVerifier
  /// Every sixth prompt: all categories.
  private let prompts: [RewardPrompt]
  private let images: Tensor

  init() throws {
    let sprites = try Assets.locate("sprites.safetensors")
    (renderer, verifier) = (
      try SceneRenderer(sprites: sprites), try ScenesVerifier(sprites: sprites, score: .strict)
    )
    prompts = try promptLines().enumerated().filter { $0.offset % 6 == 0 }.map(\.element)
    images = try renderer.render(prompts, using: Self.streams(prompts.count))
  }

  private static func streams(_ count: Int, iteration: Int = 0) -> [RandomStream] {
    (0..<count).map { RandomPlan(seed: 5).stream(.pretraining, iteration: iteration, sample: $0) }
  }

  @Test("every scene shows its prompt; under shuffled captions almost none does")
  func scores() throws {
    let strict = try verifier.scores(images, prompts: prompts)
    #expect(Set(prompts.map(\.tag)) == Set(SceneRenderer.categoryWeights.keys))
    for (score, prompt) in zip(strict, prompts) { #expect(score.value == 1, "\(prompt.text)") }
    var stream = RandomPlan(seed: 6).stream(.promptOrder)
    let wrong = stream.shuffled(prompts.count).map { prompts[$0] }
    let mean = try verifier.scores(images, prompts: wrong).reduce(0) { $0 + $1.value! } / Double(wrong.count)
    // One caption stays in place on average and 0.007 of the others fit by chance, so 2 of 159: 9 would be a chance of 1 in 2000.
    #expect(mean < 0.055, "\(mean)")
  }

  @Test("places and sizes are those of the rules, and use their whole range")
  func placement() throws {
    var sizes: [Int: Set<Int>] = [:]
    for (found, prompt) in zip(try verifier.detections(images), prompts) {
      let count = found.count
      sizes[min(count, 3), default: []].formUnion(found.map(\.size))
      for object in found {
        // Half a pixel: centres are rounded to whole pixels.
        let distances = [object.x, object.y].map { min(abs($0 - 16), abs($0 - 48)) }
        switch count {
        case 1: #expect(abs(object.x - 32) <= 14.5 && abs(object.y - 32) <= 14.5, "\(prompt.text)")
        case 2:
          let across = distances[0] <= 2.5 ? object.y : object.x
          #expect(distances.min()! <= 2.5 && abs(across - 32) <= 9.5, "\(prompt.text): \(object)")
        default: #expect(distances.max()! <= 3 && object.size <= 26, "\(prompt.text): \(object)")
        }
      }
    }
    #expect(sizes[2] == [20, 22, 24, 26, 28])
    #expect(sizes[3]!.isSubset(of: [20, 22, 24, 26]))
    for border in [
      try images.narrow(2, 0, 1), try images.narrow(2, 63, 1), try images.narrow(3, 0, 1),
      try images.narrow(3, 63, 1),
    ] {
      #expect(try border.amin().item() == 1, "objects stay 1 px inside")
    }
  }

  @Test("an image is a function of its prompt and its stream alone")
  func determinism() throws {
    let some = Array(prompts[40..<44])
    let streams = Self.streams(4, iteration: 1)
    let together = try renderer.render(some, using: streams)
    let alone = try renderer.render([some[2]], using: [streams[2]])
    #expect(try together[2..<3].bytes() == alone.bytes())
    let other = try renderer.render([some[2]], using: Self.streams(1, iteration: 2))
    #expect(try other.bytes() != alone.bytes())
  }

  @Test("what cannot be drawn is refused by name")
  func refusals() throws {
    func problem(_ scene: Scene?) -> String {
      do {
        _ = try renderer.render([RewardPrompt(text: "so", scene: scene)], using: Self.streams(1))
        return ""
      } catch { return "\(error)" }
    }
    #expect(problem(nil).contains("no include list"))
    #expect(
      problem(Scene(include: [.init(name: "cat", count: 5)])).contains("5 objects do not fit, at most 4"))
    #expect(problem(Scene(include: [.init(name: "unicorn")])).contains("no glyph shows a unicorn"))
    let crowd = Scene(include: [.init(name: "cat", count: 2), .init(name: "dog")], relation: "above")
    #expect(problem(crowd).contains("only one between two"))
  }
}
