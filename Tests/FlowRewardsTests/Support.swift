import Foundation
import Torch

@testable import FlowRewards

/// SplitMix64: the same numbers on every run.
struct Seeded: RandomNumberGenerator {
  var state: UInt64
  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }
}

/// Uniform pixels in 0…1, [count, 3, side, side].
func noise(_ count: Int, side: Int, seed: UInt64) throws -> Tensor {
  var generator = Seeded(state: seed)
  let values = (0..<count * 3 * side * side).map { _ in Float.random(in: 0...1, using: &generator) }
  return try Tensor(values, shape: [count, 3, side, side])
}

/// The verifier's fixture: 24 images with scores and detections from the reference implementation.
struct VerifierFixture {
  let images: Tensor
  let prompts: [RewardPrompt]
  let strict, graded: [Double]
  let detections: [[ScenesVerifier.Detection]]

  init() throws {
    let file = try SafetensorsFile(Assets.locate("verifier.safetensors"))
    images = try file.require("in.images")
    strict = try file.require("out.strict").doubles()
    graded = try file.require("out.graded").doubles()
    let texts = try JSONDecoder().decode([String].self, from: Data(file.metadata["prompts"]!.utf8))
    let known = Dictionary(
      try promptLines().map { ($0.text, $0) }, uniquingKeysWith: { first, _ in first })
    prompts = texts.map { known[$0]! }
    let rows = try JSONSerialization.jsonObject(with: Data(file.metadata["detections"]!.utf8)) as! [[[Any]]]
    detections = rows.map { row in
      row.map { item in
        func number(_ i: Int) -> Double { (item[i] as! NSNumber).doubleValue }
        return .init(
          name: item[1] as! String, error: number(0), x: number(2), y: number(3), size: Int(number(4)))
      }
    }
  }
}

func promptLines() throws -> [RewardPrompt] {
  try Data(contentsOf: Assets.locate("prompts.jsonl")).split(separator: UInt8(ascii: "\n"))
    .map { try RewardPrompt(jsonLine: $0) }
}
