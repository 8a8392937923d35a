// swift-tools-version: 6.1
import PackageDescription

// `make` builds lib/libctorch.so and lib/pkgconfig/ctorch.pc before any Swift is compiled and points
// PKG_CONFIG_PATH at the latter; warnings become errors in CI through -Xswiftc -warnings-as-errors.
let settings: [SwiftSetting] = [
  .swiftLanguageMode(.v6),
  .enableUpcomingFeature("ExistentialAny"),
]

let argumentParser = Target.Dependency.product(
  name: "ArgumentParser", package: "swift-argument-parser")
let yams = Target.Dependency.product(name: "Yams", package: "Yams")

let package = Package(
  name: "chunkgrpo",
  products: [
    .executable(name: "chunkgrpo", targets: ["CLI"]),
    .library(name: "ChunkGRPO", targets: ["ChunkGRPO"]),
    .library(name: "Torch", targets: ["Torch", "TorchNN"]),
    .library(name: "FlowModels", targets: ["FlowModels"]),
    .library(name: "FlowRewards", targets: ["FlowRewards"]),
    .library(name: "FlowTraining", targets: ["FlowTraining"]),
    .library(name: "ChunkGRPOCommands", targets: ["ChunkGRPOCommands"]),
  ],
  dependencies: [
    .package(url: "https://github.com/apple/swift-argument-parser", from: "1.5.0"),
    .package(url: "https://github.com/jpsim/Yams", from: "6.0.0"),
  ],
  targets: [
    .systemLibrary(name: "CTorch", pkgConfig: "ctorch"),
    .systemLibrary(name: "CCairo", pkgConfig: "cairo", providers: [.apt(["libcairo2-dev"])]),
    .systemLibrary(name: "CCurl", pkgConfig: "libcurl", providers: [.apt(["libcurl4-openssl-dev"])]),
    .systemLibrary(
      name: "CTurboJPEG", pkgConfig: "libturbojpeg", providers: [.apt(["libturbojpeg0-dev"])]),
    .systemLibrary(name: "CZlib", pkgConfig: "zlib", providers: [.apt(["zlib1g-dev"])]),

    .target(name: "ChunkGRPO"),
    .target(name: "Torch", dependencies: ["CTorch"]),
    .target(name: "TorchNN", dependencies: ["Torch"]),
    .target(name: "Pictures", dependencies: ["CCairo", "CTurboJPEG"]),
    .target(name: "FlowModels", dependencies: ["ChunkGRPO", "Torch", "TorchNN"]),
    .target(
      name: "FlowRewards",
      dependencies: ["CCurl", "ChunkGRPO", "FlowModels", "Pictures", "Torch", "TorchNN"]),
    .target(
      name: "FlowTraining",
      dependencies: [
        "ChunkGRPO", "CZlib", "FlowModels", "FlowRewards", "Pictures", "Torch", "TorchNN", yams,
      ]),
    .target(name: "ChunkGRPOCommands", dependencies: ["FlowTraining", "Pictures", argumentParser]),
    .executableTarget(name: "CLI", dependencies: ["ChunkGRPOCommands"], path: "Sources/chunkgrpo"),
    // `make bench` builds it.
    .executableTarget(
      name: "bench-runner", dependencies: ["FlowTraining", "Pictures"], path: "Benchmarks/Runner"),
    // Pictures of one run's curves; `swift run curves RUN NAME`.
    .executableTarget(name: "curves", dependencies: ["FlowTraining", "Pictures"], path: "Examples/Curves"),
    // The command-line tool with a reward of one's own; `swift run contrast`.
    .executableTarget(
      name: "contrast", dependencies: ["ChunkGRPOCommands", "FlowRewards", "Torch"], path: "Examples/Contrast"
    ),
    // A flow model that is not an image model; `swift run density`.
    .executableTarget(
      name: "density", dependencies: ["ChunkGRPO", "FlowModels", "FlowTraining", "Torch", "TorchNN"],
      path: "Examples/Density"),

    // What tests compare with diffusers and PEFT.
    .target(name: "Peers", dependencies: ["FlowModels", "Torch"], path: "Tests/Peers"),
    .testTarget(name: "ChunkGRPOTests", dependencies: ["ChunkGRPO"]),
    .testTarget(name: "TorchTests", dependencies: ["Torch", "TorchNN"]),
    .testTarget(name: "PicturesTests", dependencies: ["Pictures"]),
    .testTarget(name: "FlowModelsTests", dependencies: ["FlowModels", "Peers"]),
    .testTarget(
      name: "FlowRewardsTests", dependencies: ["FlowRewards", "Pictures"], exclude: ["reward_server.py"]),
    .testTarget(
      name: "FlowTrainingTests", dependencies: ["FlowTraining", "Peers", "curves", "density", yams]),
    .testTarget(name: "CLITests", dependencies: ["contrast"], exclude: ["Snapshots"]),
  ]
)

for target in package.targets where target.type != .system {
  target.swiftSettings = settings
}
