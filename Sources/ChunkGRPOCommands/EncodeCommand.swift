import ArgumentParser
import FlowModels
import FlowTraining
import Foundation

struct Encode: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Embed prompts ahead of training, which then needs no text encoder.",
    discussion: """
      Writes one file a prompt, named by its content; prompts that are there
      already are skipped, so that an interrupted run goes on where it was.

      Example:
        chunkgrpo encode MODEL --prompts prompts.jsonl -o embeddings
        chunkgrpo train CONFIG.yaml --set prompts.embeddings=embeddings
      """)

  @Argument(help: "A model folder.")
  var model: String
  @Option(help: ArgumentHelp("A file of prompts: one a line, or JSON lines.", valueName: "file"))
  var prompts: String
  @Option(help: "Part of the prompt file.")
  var split = "all"
  @Option(help: ArgumentHelp("T5 tokens (default: the model's own number).", valueName: "tokens"))
  var length: Int?
  @Option(help: "What classifier-free guidance will lead away from, for models that use it.")
  var negative = ""
  @Option(name: .shortAndLong, help: ArgumentHelp("Folder to write.", valueName: "folder"))
  var output: String
  @Flag(help: "Print one JSON object on stdout.")
  var json = false

  func run() throws {
    let texts = try PromptFile(file: URL(filePath: prompts), split: split).prompts.map(\.text)
    let start = Date()
    let encoding = try PromptEmbedding(
      model: URL(filePath: model), output: URL(filePath: output), textLength: length)
    let all = Array(Set(texts)).sorted() + (encoding.takesNegative ? [negative] : [])
    let new = try encoding.run(all) { Terminal.status("encode \($0)/\(all.count)") }
    Terminal.clearLine()
    if let warning = encoding.warning { Terminal.line("warning: \(warning)") }
    let seconds = Date().timeIntervalSince(start)
    if json {
      struct Result: Encodable { let folder: String, prompts: Int, new: Int, seconds: Double }
      print(try Terminal.json(Result(folder: output, prompts: all.count, new: new, seconds: seconds)))
    } else {
      print("\(output): \(all.count) prompts, \(new) new, in \(Terminal.duration(seconds))")
    }
  }
}
