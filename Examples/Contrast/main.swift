import ChunkGRPOCommands
import FlowRewards

// The command-line tool with a reward more, e.g.: swift run contrast score a.png --reward contrast
// swift run contrast train Examples/demo.yaml --set aggregate=sum --set "rewards=[{name: contrast}]" --set run.stopReward=null
try RewardFactory.register(RewardKind("contrast") { _, _ in Contrast() })
CommandLineTool.main()
