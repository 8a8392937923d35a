extension Configuration {
  /// What the configuration can say and this version cannot do: shrinks as features arrive.
  private static var unsupported: [(path: String, supported: String, value: (Configuration) -> String?)] {
    [
      ("loss.anchor", "rollout", { $0.loss.anchor == .rollout ? nil : $0.loss.anchor.rawValue })
    ]
  }

  /// Every such value.
  var unsupportedValues: [ConfigurationError] {
    Configuration.unsupported.compactMap { row in
      row.value(self).map { .unsupported(path: row.path, value: $0, supported: row.supported) }
    }
  }
}
