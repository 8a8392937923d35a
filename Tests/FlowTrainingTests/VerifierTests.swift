import Foundation
import Testing

@testable import FlowTraining

@Test func dump() throws {
  for f in [parity, mini, root.appending(path: "Data")] {
    let s = ContinuousClock.now
    for r in try Verifier.run(f)!.rows { print("ROW|\(f.lastPathComponent)|\(r.id)|\(r.status)|\(r.error ?? -1)|\(r.tolerance ?? -1)|\(r.note ?? "")") }
    print("TIME", ContinuousClock.now - s)
  }
}
