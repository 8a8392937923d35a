import Foundation
import Testing
import Torch

@testable import TorchNN

// The counter is process-wide and other suites make tensors at the same time: each test here counts in a
// process of its own. Needs the exit tests of Swift 6.2.
#if compiler(>=6.2)
  /// Oracle: the number of live tensors before a scope is the number after it.
  @Suite("Lifetime: every tensor is freed when the last reference goes")
  struct LifetimeTests {
    @Test("operations, several results and lists")
    func operations() async {
      await #expect(processExitsWith: .success) {
        try expectBalanced {
          let a = try Tensor([1.0, 2, 3, 4, 5, 6], shape: [2, 3])
          let parts = try a.chunk(3, 1) + a.split([1, 2], 1)
          let minimum = try a.minimum(along: 1)
          let joined = try Tensor.cat(parts, 1).softmax(-1) + minimum.values.sum()
          _ = try joined.rfft2(4, 4).irfft2(4, 4).doubles()
          #expect(TorchRuntime.liveTensors >= 8, "the counter counts")
        }
      }
    }

    @Test("refused operations")
    func errors() async {
      await #expect(processExitsWith: .success) {
        try expectBalanced {
          for c in TensorTests.refused {
            let a = try Tensor.zeros([2, 3])
            let b = try Tensor.zeros([4, 5], dtype: .float64)
            #expect(throws: TorchError.self) { try c.body(a, b) }
          }
        }
      }
    }

    @Test("autograd: graph, gradients, modes left by an error")
    func autograd() async {
      await #expect(processExitsWith: .success) {
        try expectBalanced {
          let w = try Grid(noise: 3, 3, seed: 1).leaf(.float32)
          for _ in 0..<3 {
            let loss = try w.matmul(w).silu().mean()
            try loss.backward()
          }
          _ = try w.grad()
          #expect(throws: TorchError.self) {
            try withAutocast(.bfloat16) { try withoutGrad { try w.matmul(try w.reshape(9)) } }
          }
        }
      }
    }

    @Test("files, checkpoints, groups, adapters and the optimizer")
    func modules() async {
      await #expect(processExitsWith: .success) {
        try expectBalanced {
          let folder = try TemporaryFolder()
          let checkpoint = try folder.checkpoint([
            "a.weight": Grid(noise: 2, 3, seed: 1).tensor(.float32),
            "b.weight": Grid(noise: 4, 3, seed: 2).tensor(),
          ])
          let registry = ModuleRegistry()
          let a = try Linear(3, 2, bias: false, checkpoint.root / "a", registry)
          let b = try Linear(3, 4, bias: false, checkpoint.root / "b", registry)
          let group = registry.group([a, b])
          try registry.place(.float32, .cpu)
          let leaves = [
            try Grid(noise: 1, 3, seed: 3).leaf(.float32), try Grid(noise: 2, 1, seed: 4).leaf(.float32),
          ]
          a.adapter = LoRA(down: leaves[0], up: leaves[1], scale: 2)
          let optimizer = try AdamW(["down": leaves[0], "up": leaves[1]], .init())
          try group(try Grid(noise: 5, 3, seed: 5).tensor(.float32)).sum().backward()
          _ = try optimizer.clipGradients(maxNorm: 1)
          try optimizer.step()
        }
      }
    }

    @Test("checkpointed bodies: graphs used and unused, errors in either run")
    func checkpointing() async {
      await #expect(processExitsWith: .success) {
        struct Broken: Error {}
        try expectBalanced {
          let w = try Grid(noise: 3, 3, seed: 1).leaf(.float32)
          let x = try Grid(noise: 2, 3, seed: 2).tensor(.float32)
          for useGraph in [true, false] {
            let y = try checkpointed([x]) { [try $0[0].linear(w).silu(), w] }
            if useGraph { try y[0].sum().backward() }
          }
          #expect(throws: Broken.self) {
            _ = try checkpointed([x, w]) { t in
              _ = try t[0].linear(t[1])
              throw Broken()
            }
          }
          _ = try? checkpointed([x]) { t in [Tensor](repeating: t[0], count: 17) }
          final class Runs: @unchecked Sendable { var count = 0 }
          let runs = Runs()
          let late = try checkpointed([x]) { t in
            runs.count += 1
            let y = try t[0].linear(w)
            if runs.count > 1 { throw Broken() }
            return [y]
          }
          #expect(throws: TorchError.self) { try late[0].sum().backward() }
          _ = try withoutGrad { try checkpointed([x]) { [try $0[0].linear(w)] } }
          let q = try w.detach().quantisedRows(.int8)
          let leaf = try x.clone()
          try leaf.setRequiresGrad(true)
          try leaf.quantisedLinear(q.codes, q.scales).sum().backward()
        }
      }
    }

    #if os(Linux)
      // 64 MB a layer against its input of 64 KB. Half a layer is left for what else the process does
      // meanwhile.
      @Test("peak memory: what was held at a time since the reset; checkpointed layers are not held")
      func peakMemory() async {
        await #expect(processExitsWith: .success) {
          let layer = 64 << 20
          let wide = try Tensor.full([1024, 16], 0.01)
          let x = try Grid(noise: 16, 1024, seed: 1).tensor(.float32)
          /// Peak above the start of four layers of 64 MB each.
          func peak(_ keep: Bool) throws -> Int {
            try x.setRequiresGrad(true)
            try TorchRuntime.resetPeakMemory()
            let start = try TorchRuntime.residentMemory()
            var y = x
            for _ in 0..<4 {
              let body: ([Tensor]) throws -> [Tensor] = { t in
                [try (t[0].unsqueeze(2).expand(16, 1024, 1024).exp()).mean([2])]
              }
              y = keep ? try body([y])[0] : try checkpointed([y], body)[0]
            }
            try y.sum().backward()
            return try TorchRuntime.peakMemory() - start
          }
          _ = try wide.square().sum().item()
          let (recomputed, kept) = (try peak(false), try peak(true))
          #expect(kept > 4 * layer - layer / 2, "\(kept)")
          #expect(recomputed < 3 * layer + layer / 2, "\(recomputed)")
          try TorchRuntime.resetPeakMemory()
          #expect(try TorchRuntime.peakMemory() - TorchRuntime.residentMemory() < layer / 2)
          #expect(throws: TorchError.self) { _ = try TorchRuntime.peakMemory(.cuda(7)) }
        }
      }
    #endif

    @Test("the number of threads is what was set")
    func threads() async {
      await #expect(processExitsWith: .success) {
        try TorchRuntime.setThreads(2)
        #expect(TorchRuntime.threads == 2)
        #expect(throws: TorchError.self) { try TorchRuntime.setThreads(0) }
      }
    }
  }

  private func expectBalanced(_ scope: () throws -> Void) throws {
    let before = TorchRuntime.liveTensors
    try scope()
    #expect(TorchRuntime.liveTensors == before)
  }
#endif
