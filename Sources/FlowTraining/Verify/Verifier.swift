import ChunkGRPO
import FlowModels
import FlowRewards
import Foundation
import Torch
import TorchNN

/// Recomputes a folder of reference data with this build.
///
/// A folder holds `io/<name>.safetensors` (inputs `in.*`, outputs `out.*`), `io/<name>.json` saying which model folder
/// and settings they need, and those model folders. No expected value is read before ours is computed.
public struct Verifier {
  /// One comparison.
  public struct Row: Encodable, Sendable {
    /// Outcome of a comparison.
    public enum Status: String, Encodable, Sendable { case pass, fail, unsupported }
    /// File and quantity.
    public let id: String
    /// Relative 2-norm of the difference, or as the tolerance says; null where nothing was computed.
    public let error: Double?
    /// Largest error that passes.
    public let tolerance: Double?
    /// The outcome.
    public let status: Status
    /// Why it failed or is unsupported.
    public let note: String?

    enum CodingKeys: String, CodingKey { case id, error, tolerance, status, note }
    /// Absent numbers are written as null, so that every row has the same keys; infinity, too, is no JSON number.
    public func encode(to encoder: any Encoder) throws {
      var container = encoder.container(keyedBy: CodingKeys.self)
      try container.encode(id, forKey: .id)
      try container.encode(error.flatMap { $0.isFinite ? $0 : nil }, forKey: .error)
      try container.encode(tolerance, forKey: .tolerance)
      try container.encode(status, forKey: .status)
      try container.encodeIfPresent(note, forKey: .note)
    }
  }
  /// The table and its totals.
  public struct Report: Encodable, Sendable {
    /// In order of file name.
    public let rows: [Row]
    /// Numbers of rows by status.
    public let passed, failed, unsupported: Int
  }

  /// The environment variable that names a folder with the published vocabularies, `clip` and `t5`.
  public static let vocabulariesVariable = "CHUNKGRPO_VOCABULARIES"

  let folder: URL
  let io: URL
  /// Where vocabularies are that the folder does not bring along.
  let vocabularies: URL?
  private(set) var rows: [Row] = []
  private var pipelines: [String: any ImagePipeline] = [:]

  /// Checks everything known in `folder`.
  ///
  /// - Parameter environment: where ``vocabulariesVariable`` is looked up.
  /// - Returns: nil if the folder holds nothing this build knows.
  public static func run(
    _ folder: URL, environment: [String: String] = ProcessInfo.processInfo.environment
  ) throws -> Report? {
    var isFolder: ObjCBool = false
    guard FileManager.default.fileExists(atPath: folder.path, isDirectory: &isFolder), isFolder.boolValue
    else {
      throw RunError("\(folder.path): no such folder")
    }
    let named = environment[vocabulariesVariable].flatMap { $0.isEmpty ? nil : URL(filePath: $0) }
    var verifier = Verifier(folder: folder, io: folder.appending(path: "io"), vocabularies: named)
    try verifier.runAll()
    guard !verifier.rows.isEmpty else { return nil }
    func count(_ status: Row.Status) -> Int { verifier.rows.filter { $0.status == status }.count }
    return Report(
      rows: verifier.rows, passed: count(.pass), failed: count(.fail), unsupported: count(.unsupported))
  }

  private mutating func runAll() throws {
    let names = ((try? FileManager.default.contentsOfDirectory(atPath: io.path)) ?? [])
      .filter { $0.hasSuffix(".safetensors") }.map { String($0.dropLast(12)) }.sorted()
    for name in names {
      do {
        try check(name)
      } catch {
        rows.append(Row(id: name, error: nil, tolerance: nil, status: .fail, note: "\(error)"))
      }
    }
    for (file, check) in [
      ("io/flux_text_prompts.json", Self.tokens), ("io/tokens_real_vocab.json", Self.realTokens),
      ("verifier.safetensors", Self.scenes),
    ] where FileManager.default.fileExists(atPath: folder.appending(path: file).path) {
      do {
        try check(&self)
      } catch {
        rows.append(Row(id: file, error: nil, tolerance: nil, status: .fail, note: "\(error)"))
      }
    }
    for file
      in ((try? FileManager.default.contentsOfDirectory(atPath: folder.appending(path: "shapes").path)) ?? [])
      .sorted()
    where file.hasSuffix(".json.gz") || file.hasSuffix(".json") {
      do {
        try shapes(file)
      } catch {
        rows.append(Row(id: "shapes/\(file)", error: nil, tolerance: nil, status: .fail, note: "\(error)"))
      }
    }
  }

  private mutating func check(_ name: String) throws {
    let data = try SafetensorsFile(io.appending(path: "\(name).safetensors"))
    switch name {
    case "flux_transformer": try fluxTransformer(data)
    case "flux_text": try fluxText(data)
    case "flux_pack": try fluxPack(data)
    case "flux_lora": try fluxLoRA(data)
    case "vae": try vae(data)
    case "scheduler": try scheduler(data)
    case "peer_logprob": try peerLogProb(data)
    case "gcpo_chunk_step", "gcpo_grpo_step": try gcpoStep(name, data)
    case "sd3_transformer": try sd3Transformer(data)
    case _ where name.hasSuffix("pipeline"): try imagePipeline(name, data)
    default:
      guard let model = clipFolder(name) else {
        return unsupported(name, "this version does not know what it holds")
      }
      try clip(name, data, model)
    }
  }

  // MARK: helpers

  func settings(_ name: String) throws -> [String: Any] {
    let file = io.appending(path: "\(name).json")
    guard let data = try? Data(contentsOf: file),
      let object = try? JSONSerialization.jsonObject(with: data) as? [String: Any]
    else { throw RunError("\(file.path): missing or not a JSON object") }
    return object
  }

  /// The model folder that `io/<name>.json` names, or the folder itself.
  func modelFolder(_ name: String) throws -> URL {
    if let named = try settings(name)["model"] as? String {
      let url = folder.appending(path: named)
      if FileManager.default.fileExists(atPath: url.appending(path: "model_index.json").path) { return url }
    }
    return folder
  }

  mutating func pipeline(_ name: String, textLength: Int? = nil) throws -> any ImagePipeline {
    let url = try modelFolder(name)
    let key = "\(url.path) \(textLength ?? 0)"
    if let loaded = pipelines[key] { return loaded }
    var options = PipelineOptions()
    options.textLength = textLength
    let loaded = try ImagePipelines.load(url, options)
    pipelines[key] = loaded
    return loaded
  }

  mutating func unsupported(_ id: String, _ note: String) {
    rows.append(Row(id: id, error: nil, tolerance: nil, status: .unsupported, note: note))
  }

  mutating func record(_ id: String, error: Double, tolerance: Double, note: String? = nil) {
    rows.append(
      Row(id: id, error: error, tolerance: tolerance, status: error <= tolerance ? .pass : .fail, note: note))
  }

  /// Relative 2-norm of the difference to entry `key`, read only now.
  mutating func compare(
    _ id: String, _ ours: Tensor, _ data: SafetensorsFile, _ key: String, tolerance: Double = 2e-5
  ) throws {
    let expected = try data.require(key)
    guard ours.shape == expected.shape else {
      rows.append(
        Row(
          id: id, error: nil, tolerance: tolerance, status: .fail,
          note: "shape \(ours.shape), expected \(expected.shape)"))
      return
    }
    record(id, error: try Self.relative(ours, expected), tolerance: tolerance)
  }

  /// The larger error; NaN is worse than any number, which `max` would hide.
  static func worse(_ a: Double, _ b: Double) -> Double { b > a || b.isNaN ? b : a }

  static func relative(_ ours: Tensor, _ expected: Tensor) throws -> Double {
    let a = try ours.detach().to(.float64)
    let b = try expected.to(.float64)
    let norm = try b.square().sum().item().squareRoot()
    let difference = try (a - b).square().sum().item().squareRoot()
    return norm == 0 ? difference : difference / norm
  }

  static func relative(_ ours: [Float], _ expected: Tensor) throws -> Double {
    try relative(try Tensor(ours, shape: expected.shape), expected)
  }
}
