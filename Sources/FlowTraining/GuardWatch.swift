import ChunkGRPO
import FlowRewards
import Foundation

/// Watches for a reward that rises at the expense of what it does not measure: guards and held-out rewards on the dev
/// prompts, against what they were before training.
struct GuardWatch {
  /// What was measured before the first iteration; `baseline.json` of the run folder.
  struct Baseline: Codable, Equatable {
    /// The guards, with ``Evaluation``'s prompts and noise.
    var guards: GuardValues?
    /// Reward name → mean over each prompt's images; null where it had no score.
    var rewards: [String: [Double?]]
    /// The trained reward, see ``trained(_:)``.
    var trained: Double
  }

  static let fileName = "baseline.json"
  private let bands: Configuration.Guards
  private let rewards: RewardSet
  private(set) var baseline: Baseline?

  init(_ bands: Configuration.Guards, _ rewards: RewardSet) { (self.bands, self.rewards) = (bands, rewards) }

  /// Takes `evaluation` as what everything is compared with from now on.
  mutating func begin(_ evaluation: Evaluation) -> Baseline {
    let baseline = Baseline(
      guards: evaluation.guards, rewards: evaluation.perPrompt, trained: trained(evaluation))
    self.baseline = baseline
    return baseline
  }

  /// Goes on with a baseline that was measured before.
  mutating func begin(in folder: URL) throws -> Bool {
    let file = folder.appending(path: Self.fileName)
    guard let data = FileManager.default.contents(atPath: file.path) else { return false }
    do { baseline = try JSONDecoder().decode(Baseline.self, from: data) } catch {
      throw RunError("\(file.path): cannot be read (\(error)): remove it to compare with the next evaluation")
    }
    return true
  }

  /// Σ weight·reward on the evaluation's images, means over prompts: what training should raise. Thresholds and gates
  /// apply to images, not to their means, and are left out.
  func trained(_ evaluation: Evaluation) -> Double {
    rewards.entries.filter { !$0.settings.watch && $0.settings.weight != 0 }.reduce(0) {
      $0 + $1.settings.weight * evaluation.mean($1.name)
    }
  }

  /// What is outside its band, each with its number and bound; empty if nothing is.
  ///
  /// A guard has a band around its baseline, set by `guards.*`; a held-out reward is outside when its mean over prompts
  /// has fallen and the 95 % interval of the paired difference excludes 0.
  func outside(_ evaluation: Evaluation) -> [String] {
    guard let baseline else { return [] }
    var found: [String] = []
    if let now = evaluation.guards, let base = baseline.guards { found += now.outside(bands, base: base) }
    for entry in rewards.entries where entry.settings.watch {
      let pairs = zip(evaluation.perPrompt[entry.name] ?? [], baseline.rewards[entry.name] ?? [])
      let differences = pairs.compactMap { a, b in a.flatMap { a in b.map { a - $0 } } }
      guard differences.count > 1, let test = try? PairedTest(differences: differences), test.ci95.high < 0
      else { continue }
      found.append(
        "held-out \(entry.name) has changed by \(short(test.difference)) [\(short(test.ci95.low)), \(short(test.ci95.high))]"
      )
    }
    return found
  }

  /// Whether the trained reward is above what it was before training.
  func hasRisen(_ evaluation: Evaluation) -> Bool {
    baseline.map { trained(evaluation) > $0.trained } ?? false
  }
}

extension GuardValues {
  /// Guards outside the bands around `base`.
  func outside(_ bands: Configuration.Guards, base: GuardValues) -> [String] {
    func check(_ name: String, _ value: Double?, _ base: Double?, _ band: [Double]) -> String? {
      guard let value, let base, band.count == 2 else { return nil }
      let (low, high) = (band[0] * base, band[1] * base)
      if value >= low && value <= high { return nil }
      return "\(name) \(short(value)) is \(value > high ? "above \(short(high))" : "below \(short(low))")"
    }
    return [
      blank > base.blank + bands.blank
        ? "blank \(short(blank)) is above \(short(base.blank + bands.blank))" : nil,
      diversity >= bands.diversity * base.diversity
        ? nil : "diversity \(short(diversity)) is below \(short(bands.diversity * base.diversity))",
      check("ink", ink, base.ink, bands.ink),
      check("sharpness", sharpness, base.sharpness, bands.sharpness),
      check("grid", grid, base.grid, bands.grid),
    ].compactMap { $0 }
  }
}

private func short(_ value: Double) -> String {
  value.isFinite ? "\((value * 1e4).rounded() / 1e4)" : "not a number"
}
