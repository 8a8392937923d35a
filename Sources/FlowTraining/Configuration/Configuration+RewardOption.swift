import FlowRewards
import Foundation
import Yams

extension Configuration.Reward {
  /// Reads a reward as `--reward` takes it: `name`, `name:score`, or a YAML mapping with the keys of a
  /// configuration's entry, such as `{name: jpeg-size, quality: 80}`.
  ///
  /// - Throws: ``ConfigurationError``, with the option as its place, for what is not that and for unknown keys.
  public init(option text: String) throws(ConfigurationError) {
    let place = Configuration.Place(source: "--reward \(text)", isFile: false)
    let trimmed = text.trimmingCharacters(in: .whitespaces)
    if trimmed.hasPrefix("{") {
      guard let node = try Configuration.compose(trimmed, place) else { throw .empty(source: place.source) }
      let entry = try Self.read(node, over: nil, place)
      if let error = ConfigurationError(place.problems.list) { throw error }
      self = entry
    } else {
      let parts = trimmed.split(separator: ":", maxSplits: 1, omittingEmptySubsequences: false).map(
        String.init)
      self.init(name: parts[0], score: parts.count > 1 ? parts[1] : nil)
    }
    guard !name.isEmpty, score?.isEmpty != true else {
      throw .invalid(
        path: "--reward \(text)",
        reason: "expected name, name:score or a mapping such as {name: jpeg-size, quality: 80}")
    }
  }
}
