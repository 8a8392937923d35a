extension Configuration {
  /// What the configuration can say and this version cannot do: shrinks as features arrive.
  private static var unsupported: [(path: String, supported: String, value: (Configuration) -> String?)] {
    [
      (
        "chunk.plan", "step, sequence, fixed:n, list:a,b,…, adaptive or adaptive-shared",
        { $0.chunk.plan == "auto" ? "auto" : nil }
      )
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
