import FlowModels
import Foundation

extension Configuration {
  /// Refuses what ``validate()`` refuses, and prompts, rewards and model folders that are not there, all at once.
  ///
  /// Reads no weights; what is in the files of a model is for its loading to judge.
  /// - Throws: the one error, or a ``RunError`` that lists all.
  public func validateSources() throws {
    let refused = problems
    var errors: [any Error] = refused
    func attempt(_ key: String, _ body: () throws -> Void) {
      guard !refused.contains(where: { $0.path?.hasPrefix(key) == true }) else { return }
      do { try body() } catch { errors.append(error) }
    }
    attempt("prompts") { _ = try PromptFile(file: URL(filePath: prompts.file), split: prompts.split) }
    attempt("rewards") { _ = try RewardSet(rewards) }
    attempt("model") { _ = try ModelFolder(URL(filePath: model)) }
    if errors.count == 1 { throw errors[0] }
    if errors.count > 1 {
      throw RunError("\(errors.count) problems\n" + errors.map { "  \($0)" }.joined(separator: "\n"))
    }
  }
}
