import ArgumentParser
import FlowTraining
import Foundation

struct Verify: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Recompute reference data with this build, and say what agrees.",
    discussion: """
      FOLDER holds io/*.safetensors with inputs and expected outputs, and the
      model folders they name. Exit code 1 if a row fails, 2 if the folder holds
      nothing this build knows.

      tokens_real_vocab needs the published vocabularies: FOLDER/vocabularies/clip
      (vocab.json, merges.txt) and FOLDER/vocabularies/t5 (spiece.model), or clip
      and t5 in the folder that the variable CHUNKGRPO_VOCABULARIES names.

      Example:
        chunkgrpo verify Models/flux-mini
      """)

  @Argument(help: "The folder.")
  var folder: String
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  func run() throws {
    guard let report = try Verifier.run(URL(filePath: folder)) else {
      Terminal.error(
        "error: \(folder): nothing to verify; expected io/*.safetensors (with io/*.json) or verifier.safetensors"
      )
      throw ExitCode(2)
    }
    if json {
      print(try Terminal.json(report))
    } else {
      let rows = report.rows.map { row in
        [
          row.id, row.error.map { String(format: "%.1e", $0) } ?? "",
          row.tolerance.map { String(format: "%.0e", $0) } ?? "",
          row.status.rawValue, row.status == .pass ? "" : row.note ?? "",
        ]
      }
      print(Terminal.table([["row", "error", "tolerance", "status", ""]] + rows))
      print("\(report.passed) passed, \(report.failed) failed, \(report.unsupported) unsupported")
    }
    if report.failed > 0 { throw ExitCode(1) }
  }
}
