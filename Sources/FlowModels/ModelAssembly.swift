import Foundation
import Torch

/// Model folders made of another's configurations and of weights trained here.
public enum ModelAssembly {
  /// Writes the parts that `model`'s model_index.json names, those in `weights` with these instead of their own.
  ///
  /// - Parameters:
  ///   - weights: tensors by key, by part: `transformer`, `text_encoder`, …
  ///   - settings: fields of a part's config.json to change.
  ///   - output: must not exist, or be an empty folder; it appears at the end or not at all.
  /// - Throws: ``ModelError`` for a part that is not there, or values that are not finite.
  public static func write(
    _ model: ModelFolder, weights: [String: [String: Tensor]], settings: [String: [String: Double]] = [:],
    to output: URL
  ) throws {
    let files = FileManager.default
    let index = try object(model.url.appending(path: "model_index.json"))
    let parts = index.filter { !$0.key.hasPrefix("_") && ($0.value as? [Any])?.first is String }.keys.sorted()
    try StagedFolder.write(to: output) { staging in
      try files.copyItem(
        at: model.url.appending(path: "model_index.json").resolvingSymlinksInPath(),
        to: staging.appending(path: "model_index.json"))
      for part in parts {
        let (source, target) = (model.part(part), staging.appending(path: part))
        guard let names = try? files.contentsOfDirectory(atPath: source.path) else {
          throw ModelError("\(source.path): no such folder, though model_index.json names it")
        }
        try files.createDirectory(at: target, withIntermediateDirectories: false)
        for name in names.sorted() where !name.hasPrefix(".") {
          if weights[part] != nil, ModelMerge.holdsWeights(name) { continue }
          try files.copyItem(
            at: source.appending(path: name).resolvingSymlinksInPath(), to: target.appending(path: name))
        }
        if let changes = settings[part] {
          let file = target.appending(path: "config.json")
          let config = try object(file).merging(changes) { $1 }
          try AtomicFile.write(
            try JSONSerialization.data(withJSONObject: config, options: [.prettyPrinted, .sortedKeys]),
            to: file)
        }
        if let tensors = weights[part] {
          for (key, tensor) in tensors {
            guard try tensor.allFinite() else {
              throw ModelError("\(part): \(key): NaN or infinite values; the run has diverged")
            }
          }
          // The names that diffusers and transformers look for.
          let name = part.hasPrefix("text_encoder") ? "model" : "diffusion_pytorch_model"
          try Safetensors.write(
            tensors, metadata: ["format": "pt"], to: target.appending(path: "\(name).safetensors"))
        }
      }
    }
  }

  private static func object(_ file: URL) throws -> [String: Any] {
    guard let data = try? Data(contentsOf: file),
      let object = try? JSONSerialization.jsonObject(with: data) as? [String: Any]
    else { throw ModelError("\(file.path): missing or not a JSON object") }
    return object
  }
}
