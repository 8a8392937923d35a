import ArgumentParser
import FlowTraining
import Foundation

/// The command-line tool, for executables that add to it: ``RewardFactory/register(_:)`` first, then ``main()``.
public enum CommandLineTool {
  /// Runs the command that the process was started with, and ends the process.
  public static func main() { ChunkGRPOCommand.main() }
}

/// One file a command.
struct ChunkGRPOCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "chunkgrpo",
    abstract:
      "Post-trains flow-matching text-to-image models with Chunk-GRPO: sample by step, optimise by chunk.",
    discussion: "Start with `make demo`, or: chunkgrpo train Examples/demo.yaml --set output=runs/mine",
    version: "0.1.0",
    subcommands: [
      Train.self, Pretrain.self, Sample.self, Evaluate.self, Score.self, Encode.self, Inspect.self,
      Export.self,
      Merge.self, Convert.self, Chunks.self, Noise.self, Verify.self, StudyCommand.self, Demo.self,
      Bench.self,
    ])

  static func main() {
    do {
      var command = try parseAsRoot()
      try command.run()
    } catch let interrupted as Interrupted {
      Terminal.error("\(interrupted)")
      Foundation.exit(interrupted.exitCode)
    } catch  where isOwn(error) {
      Terminal.error("error: \(error)")
      Foundation.exit(1)
    } catch {
      exit(withError: error)
    }
  }

  /// Whether the error is ours, with a whole message, rather than the parser's.
  private static func isOwn(_ error: any Error) -> Bool {
    if error is CleanExit || error is ExitCode || error is ValidationError { return false }
    let name = String(reflecting: type(of: error))
    return !name.hasPrefix("ArgumentParser.")
  }
}
