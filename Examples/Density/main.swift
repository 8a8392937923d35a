// swift run density: a few seconds.
let example = try Density(seed: 1)
func rounded(_ x: Double) -> Double { (x * 1000).rounded() / 1000 }
func describe(_ name: String, _ model: Density) throws {
  let seen = Density.Guards(try model.draw(512))
  print(
    "\(name): reward \(rounded(seen.reward)), distance to the nearest Gaussian \(rounded(seen.distance)), "
      + "\(seen.modes) of 8 drawn")
}

print("flow matching: loss \(rounded(try example.pretrain(iterations: 3000, batch: 512)))")
try describe("base", example)
for (i, iteration) in try example.tune(iterations: 30, size: 128, rate: 1e-3).enumerated() where i % 10 == 9 {
  print("iteration \(i + 1): reward \(rounded(iteration.reward)), replay gap \(iteration.replayGap)")
}
try describe("tuned", example)
