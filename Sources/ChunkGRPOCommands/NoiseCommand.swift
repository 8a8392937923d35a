import ArgumentParser
import FlowTraining
import Foundation

struct Noise: ParsableCommand {
  static let configuration = CommandConfiguration(
    abstract: "Measure how many images an update needs: the noise scale of a configuration's gradients.",
    discussion: """
      Draws groups with the untrained model, trains nothing, and compares the
      gradients that each group would give alone. With as many images an update as
      the noise scale, signal and noise are equal and two updates point the same
      way by half; with far fewer, training is a random walk.

      Examples:
        chunkgrpo noise Examples/demo.yaml
        chunkgrpo noise my.yaml --groups 128 --set sampling.window=0-1
      """)

  @Argument(help: "The configuration (YAML).")
  var config: String
  @Option(help: "Groups to measure, each of group.size images of one prompt.")
  var groups = 64
  @Flag(help: "Print one JSON object on stdout.")
  var json = false
  @OptionGroup var options: ConfigurationOptions

  func validate() throws {
    guard groups > 2 else { throw ValidationError("--groups: must be at least 3, got \(groups)") }
  }

  func run() throws {
    let configuration = try Configuration.load(file: URL(filePath: config), overrides: options.overrides)
    try configuration.validateSources()
    Interruption.watch()
    let noise = try GradientNoise.measure(configuration, groups: groups) { done, total in
      Terminal.status("\(done)/\(total) gradients")
    }
    Terminal.clearLine()
    print(json ? try Terminal.json(noise) : Self.text(noise))
  }

  static func text(_ noise: GradientNoise) -> String {
    func images(_ value: Double?) -> String { value.map { String(format: "%.0f", $0) } ?? "∞" }
    let rows = noise.rows.map { row in
      [
        row.reward, "\(row.groups)/\(noise.groups)", images(row.images),
        "[\(images(row.imagesLow)), \(images(row.imagesHigh))]", Terminal.fixed(row.cosine, 3),
      ]
    }
    return Terminal.table(
      [["reward", "groups that differ", "images, signal = noise", "95 % interval", "cosine of two updates"]]
        + rows)
      + "\n\nan update has \(noise.imagesOfUpdate) images; ∞: the gradients of different groups have nothing in common"
  }
}
