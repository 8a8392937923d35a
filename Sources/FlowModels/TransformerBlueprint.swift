import Foundation
import Torch
import TorchNN

/// A transformer's configuration as something that can be built at any depth: what memory a model takes can be
/// learnt from a few of its blocks.
public struct TransformerBlueprint {
  /// Number of blocks of each kind: double and single blocks of FLUX, dual and plain ones of SD3.
  public let blocks: [Int]
  /// Widths of the token embeddings and of the pooled embedding.
  public let textWidth, pooledWidth: Int
  /// How a guidance scale enters.
  public let guidance: GuidanceKind
  private let source: URL
  private let make: (_ blocks: [Int], _ checkpoint: Checkpoint) throws -> any FlowTransformer
  private let latents: (_ grid: TokenGrid) -> [Int]

  /// Reads the configuration of `folder`'s transformer.
  public init(_ folder: ModelFolder) throws {
    source = folder.part("transformer")
    switch folder.pipeline {
    case "FluxPipeline":
      let config = try folder.config(FluxTransformerConfig.self, "transformer")
      blocks = [config.numLayers, config.numSingleLayers]
      (textWidth, pooledWidth) = (config.jointAttentionDim, config.pooledProjectionDim)
      guidance = config.guidanceEmbeds ? .embedded : .none
      latents = { [$0.rows * $0.columns, config.inChannels] }
      make = { blocks, checkpoint in
        var part = config
        (part.numLayers, part.numSingleLayers) = (blocks[0], blocks[1])
        return try FluxTransformer(config: part, checkpoint: checkpoint)
      }
    case "StableDiffusion3Pipeline":
      let config = try folder.config(SD3TransformerConfig.self, "transformer")
      let dual = Set(config.dualAttentionLayers ?? []).count
      blocks = [dual, config.numLayers - dual]
      (textWidth, pooledWidth) = (config.textWidth, config.pooledWidth)
      guidance = .classifierFree
      latents = { [config.channels, config.patch * $0.rows, config.patch * $0.columns] }
      make = { blocks, checkpoint in
        var part = config
        part.numLayers = blocks[0] + blocks[1]
        part.dualAttentionLayers = Array(0..<blocks[0])
        return try SD3Transformer(config: part, checkpoint: checkpoint)
      }
    default: throw ImagePipelines.unsupported(folder)
    }
  }

  /// The layers of the whole model, without values and without memory.
  public func layers() throws -> ModuleRegistry { try make(blocks, Checkpoint(blank: source)).modules }

  /// A model of `blocks`, all zero, on the CPU.
  public func build(_ blocks: [Int], _ options: PipelineOptions) throws -> any FlowTransformer {
    let checkpoint = Checkpoint(blank: source)
    checkpoint.quantise(options.weights, where: isQuantisable)
    let network = try make(blocks, checkpoint)
    network.checkpointing = options.checkpointing
    network.attentionKernel = options.attention
    try network.place(options.dtype, .cpu)
    return network
  }

  /// A model built here as a ``FlowModel``.
  public func flowModel(_ network: any FlowTransformer, grid: TokenGrid) -> any FlowModel {
    if let flux = network as? FluxTransformer { return FluxFlowModel(flux, grid: grid) }
    return SD3FlowModel(network as! SD3Transformer)
  }

  /// Shape of one image's latents.
  public func latentShape(_ grid: TokenGrid) -> [Int] { latents(grid) }
}
