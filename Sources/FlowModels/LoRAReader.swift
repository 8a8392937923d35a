import Foundation
import Torch

/// Makes sense of the entries of a LoRA file; problems are collected rather than thrown, so that all are told.
struct LoRAReader {
  private(set) var prefix = ""
  private(set) var naming = LoRAFile.Naming.loraAB
  private(set) var scaling = LoRAFile.Scaling.none
  private(set) var layers: [LoRAFile.Layer] = []
  private(set) var problems: [String] = []
  private(set) var architecture: ModelArchitecture?
  private let source: SafetensorsFile
  private var settings: PEFTSettings?

  /// The keys of one layer.
  private struct Keys { var down, up, alpha: String? }
  /// A layer whose factors fit each other.
  private struct Found {
    let path: String, down: String, up: String
    let shape: (rank: Int, inSize: Int, outSize: Int)
    let alpha: Double?
  }

  init(_ source: SafetensorsFile, config: PEFTSettings?) throws {
    self.source = source
    settings = config
    if config != nil {
      scaling = .config
    } else if let text = source.metadata["lora_adapter_metadata"] {
      guard let object = try? JSONSerialization.jsonObject(with: Data(text.utf8)) as? [String: Any] else {
        throw ModelError("\(source.path): lora_adapter_metadata is not a JSON object")
      }
      // Other parts of a pipeline have entries of their own, e.g. text_encoder.r.
      let own = object.filter { $0.key.hasPrefix("transformer.") }
      guard !own.isEmpty else { return }
      settings = PEFTSettings(
        Dictionary(
          uniqueKeysWithValues: own.map { (String($0.key.dropFirst("transformer.".count)), $0.value) }),
        name: "lora_adapter_metadata")
      scaling = .metadata
    }
  }

  mutating func read() {
    problems += settings?.problems ?? []
    let found = whole(group())
    // What the file is of can be told from its layers, whether they can be used or not.
    let sizes = found.map { ($0.path, [$0.shape.outSize, $0.shape.inSize]) }
    architecture = ModelArchitecture.recognise(Dictionary(sizes) { first, _ in first })
    if let architecture, let reason = architecture.unreadable { problems.append(reason) }
    if found.isEmpty, problems.isEmpty {
      problems.append(
        "holds no LoRA layer; expected keys transformer.<layer>.lora_A.weight and lora_B.weight")
    }
    scale(found)
  }

  /// The entries by module path; those that belong to no layer become problems.
  private mutating func group() -> [String: Keys] {
    var groups: [String: Keys] = [:]
    var prefixes: Set<String> = []
    var namings: Set<LoRAFile.Naming> = []
    var (textEncoder, dora, other): ([String], [String], [String]) = ([], [], [])
    for name in source.names {
      let prefix = LoRAFile.prefixes.first { name.hasPrefix($0) } ?? ""
      let rest = String(name.dropFirst(prefix.count))
      if rest.hasPrefix("text_encoder") || rest.hasPrefix("lora_te") {
        textEncoder.append(name)
        continue
      }
      func path(_ suffix: String) -> String? {
        rest.hasSuffix(suffix) && rest.count > suffix.count ? String(rest.dropLast(suffix.count)) : nil
      }
      var isFactor = true
      if let naming = LoRAFile.Naming.allCases.first(where: { path($0.down) != nil }) {
        groups[path(naming.down)!, default: Keys()].down = name
        namings.insert(naming)
      } else if let naming = LoRAFile.Naming.allCases.first(where: { path($0.up) != nil }) {
        groups[path(naming.up)!, default: Keys()].up = name
        namings.insert(naming)
      } else if let path = path(".alpha") {
        groups[path, default: Keys()].alpha = name
      } else {
        isFactor = false
        let isDoRA = rest.contains("lora_magnitude_vector") || rest.hasSuffix(".dora_scale")
        if isDoRA { dora.append(name) } else { other.append(name) }
      }
      if isFactor { prefixes.insert(prefix) }
    }
    (prefix, naming) = (prefixes.sorted().last ?? "", namings.contains(.downUp) ? .downUp : .loraAB)
    func list(_ names: [String]) -> String {
      names.prefix(4).joined(separator: ", ") + (names.count > 4 ? ", …" : "")
    }
    if !textEncoder.isEmpty {
      problems.append(
        "\(textEncoder.count) keys adapt a text encoder (\(list(textEncoder))), which is not supported: "
          + "they would not apply; save the transformer's layers alone")
    }
    if !dora.isEmpty { problems.append("DoRA is not supported (\(list(dora)))") }
    if !other.isEmpty { problems.append("\(other.count) keys belong to no LoRA layer (\(list(other)))") }
    if prefixes.count > 1 || namings.count > 1 {
      let forms =
        prefixes.sorted().map { "\"\($0)\"" } + (namings.count > 1 ? namings.map(\.rawValue).sorted() : [])
      problems.append(
        "keys of different forms in one file (\(forms.joined(separator: ", "))): save it in one form")
    }
    return groups
  }

  /// The layers with two factors that fit each other; the others become problems.
  private mutating func whole(_ groups: [String: Keys]) -> [Found] {
    var found: [Found] = []
    for (path, keys) in groups.sorted(by: { $0.key < $1.key }) {
      guard let down = keys.down, let up = keys.up else {
        let there = keys.down ?? keys.up ?? keys.alpha!
        let missing = [(keys.down, naming.down), (keys.up, naming.up)].filter { $0.0 == nil }.map(\.1)
        problems.append("\(there) stands alone: \(path)\(missing.joined(separator: " and ")) missing")
        continue
      }
      let (a, b) = (source.shape(down)!, source.shape(up)!)
      guard a.count == 2, b.count == 2, a[0] == b[1], a[0] > 0 else {
        problems.append(
          "\(path): A \(a) and B \(b): expected [rank, in] and [out, rank] of one rank; export it again")
        continue
      }
      guard source.dtype(down)!.isFloatingPoint, source.dtype(up)!.isFloatingPoint else {
        problems.append(
          "\(path): factors of \(source.dtype(down)!) and \(source.dtype(up)!), not floating-point")
        continue
      }
      var alpha: Double?
      if let key = keys.alpha {
        guard let value = try? source.tensor(key)?.item(), value.isFinite else {
          problems.append("\(key): expected one finite number")
          continue
        }
        alpha = value
      }
      found.append(Found(path: path, down: down, up: up, shape: (a[0], a[1], b[0]), alpha: alpha))
    }
    return found
  }

  /// Gives every layer its scale.
  private mutating func scale(_ found: [Found]) {
    let without = found.filter { $0.alpha == nil }
    let hasAlpha = without.count < found.count
    if hasAlpha, let first = without.first {
      problems.append(
        "\(without.count) of \(found.count) layers have no alpha tensor (\(first.path), …), the others do: "
          + "readers disagree on their scale")
    }
    var conflicts: [String] = []
    for layer in found {
      let rank = layer.shape.rank
      var (alpha, scale) = (Double(rank), 1.0)
      if let settings {
        do {
          (alpha, scale) = try settings.scale(layer.path, rank: rank)
        } catch {
          conflicts.append("\(error)")
          continue
        }
      }
      if let own = layer.alpha {
        // Stored in float16 or bfloat16 perhaps: three decimal digits.
        if settings != nil, abs(own / Double(rank) - scale) > 2e-3 * abs(scale) {
          conflicts.append(
            "\(layer.path): alpha tensor \(own)/\(rank) and \(scaling.rawValue) (scale \(scale)) disagree; "
              + "diffusers refuses files with both: remove one")
          continue
        }
        if settings == nil { (alpha, scale) = (own, own / Double(rank)) }
      }
      layers.append(
        LoRAFile.Layer(
          path: layer.path, rank: rank, inSize: layer.shape.inSize, outSize: layer.shape.outSize,
          dtype: source.dtype(layer.down)!, alpha: alpha, scale: scale, down: layer.down, up: layer.up))
    }
    if hasAlpha { scaling = settings == nil ? .alphaTensors : scaling == .metadata ? .both : scaling }
    problems += conflicts.prefix(1)
    if conflicts.count > 1 { problems.append("and \(conflicts.count - 1) more layers like it") }
  }
}
