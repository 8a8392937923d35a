import Foundation

/// What `adapter_config.json`, or diffusers' `lora_adapter_metadata`, says about scales.
///
/// Source: peft 0.21.2, LoraConfig; patterns as `get_pattern_key`: `(.*\.)?(pattern)` is the whole path.
struct PEFTSettings {
  /// Options that change what the adapter computes and are not implemented.
  private(set) var problems: [String] = []
  private let name: String
  private let rank: Int?
  private let alpha: Double?
  private let isRankStabilised: Bool
  private let alphaPatterns, rankPatterns: [(pattern: Regex<AnyRegexOutput>, value: Double)]

  /// Options that must be unset: null, false, empty or "none".
  private static let unsupported = [
    "alora_invocation_tokens", "arrow_config", "bias", "fan_in_fan_out", "kasa_config", "layer_replication",
    "lora_bias", "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora",
    "use_dora", "use_qalora", "velora_config",
  ]
  /// Initialisations that change the base weights too.
  private static let changingBase = ["pissa", "olora", "corda", "loftq", "lora_ga", "loraga"]

  /// - Parameter name: of what `object` was read from, for messages.
  init(_ object: [String: Any], name: String) {
    self.name = name
    func number(_ key: String) -> Double? { (object[key] as? NSNumber)?.doubleValue }
    var problems: [String] = []
    func patterns(_ key: String) -> [(pattern: Regex<AnyRegexOutput>, value: Double)] {
      (object[key] as? [String: Any] ?? [:]).sorted { $0.key < $1.key }.compactMap { text, value in
        guard let value = (value as? NSNumber)?.doubleValue, let regex = try? Regex("(?:.*\\.)?(?:\(text))")
        else {
          problems.append("\(name): \(key): \"\(text)\" is not a regular expression with a number")
          return nil
        }
        return (regex, value)
      }
    }
    rank = number("r").map { Int($0) }
    alpha = number("lora_alpha")
    isRankStabilised = Self.isSet(object["use_rslora"])
    (alphaPatterns, rankPatterns) = (patterns("alpha_pattern"), patterns("rank_pattern"))
    if let type = object["peft_type"] as? String, type != "LORA" {
      problems.append("\(name): peft_type \(type) is not supported; expected LORA")
    }
    for option in Self.unsupported where Self.isSet(object[option]) {
      problems.append("\(name): \(option) is not supported, it changes what the adapter computes")
    }
    if let initial = object["init_lora_weights"] as? String,
      Self.changingBase.contains(where: { initial.lowercased().hasPrefix($0) })
    {
      problems.append(
        "\(name): init_lora_weights \(initial) changes the base weights too; save it as plain LoRA first "
          + "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)")
    }
    if alpha == nil { problems.append("\(name): lora_alpha is missing, so the scale is not known") }
    self.problems = problems
  }

  private static func isSet(_ value: Any?) -> Bool {
    switch value {
    case nil, is NSNull: false
    case let text as String: !text.isEmpty && text != "none"
    case let list as [Any]: !list.isEmpty
    case let object as [String: Any]: !object.isEmpty
    case let number as NSNumber: number.doubleValue != 0
    default: true
    }
  }

  /// alpha and scale of the layer at `path` whose factors have `rank`.
  func scale(_ path: String, rank: Int) throws(ModelError) -> (alpha: Double, scale: Double) {
    let stated = try Self.match(rankPatterns, path, "\(name): rank_pattern") ?? self.rank.map(Double.init)
    if let stated, stated != Double(rank) {
      throw ModelError("\(path): \(name) says rank \(Int(stated)), the factors have \(rank)")
    }
    // A missing lora_alpha is a problem already: this value is never used.
    let alpha = try Self.match(alphaPatterns, path, "\(name): alpha_pattern") ?? self.alpha ?? Double(rank)
    return (alpha, isRankStabilised ? alpha / Double(rank).squareRoot() : alpha / Double(rank))
  }

  /// PEFT takes the first that matches; JSON objects have no order here, so that several must agree.
  private static func match(
    _ patterns: [(pattern: Regex<AnyRegexOutput>, value: Double)], _ path: String, _ what: String
  ) throws(ModelError) -> Double? {
    let values = Set(patterns.filter { path.wholeMatch(of: $0.pattern) != nil }.map(\.value))
    guard values.count < 2 else {
      throw ModelError("\(path): several patterns of \(what) match it, with different values")
    }
    return values.first
  }
}
