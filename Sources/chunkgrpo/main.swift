import ChunkGRPOCommands

CommandLineTool.main()
