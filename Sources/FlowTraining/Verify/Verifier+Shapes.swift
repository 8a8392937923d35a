import FlowModels
import Foundation
import TorchNN

extension Verifier {
  /// A list of a published model's keys and shapes, `shapes/<name>.json.gz` or `.json`: our class, built from
  /// the published configuration, must want exactly these, and as many elements. Nothing is allocated.
  ///
  /// A name that is not known is compared with every model.
  mutating func shapes(_ name: String) throws {
    let file = folder.appending(path: "shapes").appending(path: name)
    guard let list = try? JSONDecoder().decode([String: [Int]].self, from: Gzip.read(file)) else {
      _ = try Gzip.read(file)  // says what is wrong with the file itself
      throw RunError("\(file.path): not a JSON object from key to shape")
    }
    func build(_ model: PublishedModel) throws -> ModuleRegistry? {
      try model.build?(Data(model.configuration.utf8), Checkpoint(shapes: list, source: file))
    }
    let stem = name.replacingOccurrences(of: ".json.gz", with: "").replacingOccurrences(of: ".json", with: "")
    var found: ModuleRegistry?
    if let model = PublishedModel.all.first(where: { $0.name == stem }) {
      found = try build(model)
    } else {
      for model in PublishedModel.all where found == nil { found = try? build(model) }
    }
    guard let found else {
      unsupported("shapes/\(name)", "no model class of this version has these keys")
      return
    }
    let ours = found.parameters.reduce(0) { $0 + $1.tensor.count }
    // Some files hold the constant 0, 1, 2, … beside the parameters.
    let theirs = list.filter { !$0.key.hasSuffix("position_ids") }.values
      .reduce(0) { $0 + $1.map(Double.init).reduce(1, *) }
    record(
      "shapes/\(name)", error: abs(Double(ours) - theirs), tolerance: 0,
      note: "\(found.parameters.count) tensors, \(ours) elements")
  }
}
