/// Which linear layers get an adapter.
///
/// Each entry is a preset (`attention`, `attention+mlp`, `all-linear`), a regular expression between slashes
/// that must match a whole module path (`/transformer_blocks\.\d+\.attn\.to_[qkv]/`), or the end of a path in
/// whole components: `attn.to_k` takes `transformer_blocks.0.attn.to_k`, not
/// `transformer_blocks.0.attn2.to_k`.
public struct LoRATargets {
  private let entries: [(text: String, matches: (String) -> Bool)]

  /// - Throws: ``ModelError`` for a regular expression that is none.
  public init(_ targets: [String]) throws(ModelError) {
    var entries: [(text: String, matches: (String) -> Bool)] = []
    for text in targets {
      if text == "all-linear" {
        entries.append((text, { _ in true }))
      } else if let preset = Self.presets[text] {
        entries.append((text, { Self.isInBlock($0, preset) }))
      } else if text.count > 2, text.hasPrefix("/"), text.hasSuffix("/") {
        guard let regex = try? Regex(String(text.dropFirst().dropLast())) else {
          throw ModelError("trainable.targets: \(text) is not a regular expression")
        }
        entries.append((text, { $0.wholeMatch(of: regex) != nil }))
      } else {
        entries.append((text, { $0 == text || $0.hasSuffix("." + text) }))
      }
    }
    self.entries = entries
  }

  private static let attention = ["attn", "attn2"].flatMap { name in
    ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"].map {
      "\(name).\($0)"
    }
  }
  private static let mlp =
    ["ff", "ff_context"].flatMap { ["\($0).net.0.proj", "\($0).net.2"] } + ["proj_mlp", "proj_out"]
  private static let presets = ["attention": Set(attention), "attention+mlp": Set(attention + mlp)]

  /// Whether `path` is a numbered block's layer of one of these names: FLUX has a proj_out outside too.
  private static func isInBlock(_ path: String, _ names: Set<String>) -> Bool {
    let parts = path.split(separator: ".", maxSplits: 2)
    return parts.count == 3 && parts[0].hasSuffix("transformer_blocks") && Int(parts[1]) != nil
      && names.contains(String(parts[2]))
  }

  /// The paths that are targets, sorted.
  ///
  /// - Throws: ``ModelError`` if an entry matches none of `paths`.
  public func select(_ paths: some Sequence<String>) throws(ModelError) -> [String] {
    let paths = paths.sorted()
    let unknown = entries.filter { entry in !paths.contains(where: entry.matches) }.map(\.text)
    guard unknown.isEmpty else {
      let known = Set(paths.map(Self.suffix)).sorted().joined(separator: ", ")
      throw ModelError(
        "trainable.targets: no linear layer matches \(unknown.joined(separator: ", ")); the model has \(known)"
      )
    }
    return paths.filter { path in entries.contains { $0.matches(path) } }
  }

  /// A path without its block: `transformer_blocks.3.attn.to_q` → `attn.to_q`.
  public static func suffix(_ path: String) -> String {
    let parts = path.split(separator: ".")
    guard let number = parts.firstIndex(where: { Int($0) != nil }), number + 1 < parts.count else {
      return path
    }
    return parts[(number + 1)...].joined(separator: ".")
  }
}
