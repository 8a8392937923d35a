extension Configuration {
  /// What the configuration can say and this version cannot do: shrinks as features arrive.
  private static var unsupported: [(path: String, supported: String, value: (Configuration) -> String?)] {
    [
      ("loss.kl", "0", { $0.loss.kl == 0 ? nil : $0.loss.kl.yamlText }),
      ("loss.anchor", "rollout", { $0.loss.anchor == .rollout ? nil : $0.loss.anchor.rawValue }),
      ("chunk.draw", "uniform or only:a,b,…", { $0.chunk.draw.hasPrefix("weighted") ? $0.chunk.draw : nil }),
      (
        "chunk.plan", "step, sequence, fixed:n or list:a,b,…",
        { ["adaptive", "adaptive-shared", "auto"].contains($0.chunk.plan) ? $0.chunk.plan : nil }
      ),
    ]
  }

  func refuseUnsupported() throws(ConfigurationError) {
    for row in Configuration.unsupported {
      if let value = row.value(self) {
        throw .unsupported(path: row.path, value: value, supported: row.supported)
      }
    }
  }
}
