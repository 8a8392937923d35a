/// What is wrong with a configuration file, a `--set` or the configuration they make.
///
/// `at` is `file:line`, or the `--set` option as it was written; `path` is the dotted key.
public enum ConfigurationError: Error, CustomStringConvertible, Sendable, Equatable {
  /// The file cannot be read.
  case unreadable(file: String, reason: String)
  /// The file holds no document.
  case empty(source: String)
  /// The text is not YAML.
  case syntax(at: String, reason: String)
  /// A mapping has a key twice.
  case duplicateKey(at: String, key: String)
  /// There is no such key.
  case unknownKey(at: String, path: String, nearest: String)
  /// The value has another type, or is outside a closed set.
  case wrongType(at: String, path: String, expected: String, got: String)
  /// A `--set` that is not `key=value`.
  case malformedOverride(text: String)
  /// A `--set` of a resumed run that would make it another run.
  case fixedOnResume(at: String, path: String)
  /// A value that makes no sense, alone or with others.
  case invalid(path: String, reason: String)
  /// All that is wrong, two or more of the others.
  indirect case several([ConfigurationError])

  /// One error for `problems`; nil if there are none.
  init?(_ problems: [ConfigurationError]) {
    guard let first = problems.first else { return nil }
    self = problems.count == 1 ? first : .several(problems)
  }

  /// The errors it stands for.
  var all: [ConfigurationError] { if case .several(let errors) = self { errors } else { [self] } }

  /// The key of a value that is refused, or that was meant.
  var path: String? {
    switch self {
    case .unknownKey(_, _, let path), .wrongType(_, let path, _, _), .invalid(let path, _),
      .fixedOnResume(_, let path):
      path
    default: nil
    }
  }

  /// What, where, expected, got, and the way out: one line, or a line each under the number of them.
  public var description: String {
    switch self {
    case .unreadable(let file, let reason): "\(file): \(reason)"
    case .empty(let source): "\(source): empty; write {} for a run with every default"
    case .syntax(let at, let reason): "\(at): not valid YAML: \(reason)"
    case .duplicateKey(let at, let key): "\(at): \(key) is given more than once; keep one"
    case .unknownKey(let at, let path, let nearest):
      "\(at): \(path) is not a key; did you mean \(nearest)?"
    case .wrongType(let at, let path, let expected, let got):
      "\(at): \(path.isEmpty ? "" : path + ": ")expected \(expected), got \(got)"
    case .malformedOverride(let text): "--set \(text): expected key=value, such as sampling.steps=9"
    case .fixedOnResume(let at, let path):
      "\(at): \(path) is fixed by the run being resumed; only \(Configuration.resumable) may be set; "
        + "start a new run to change it"
    case .invalid(let path, let reason): "\(path): \(reason)"
    case .several(let errors): "\(errors.count) problems\n" + errors.map { "  \($0)" }.joined(separator: "\n")
    }
  }
}
