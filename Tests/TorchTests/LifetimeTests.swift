import Testing
import Torch
import Glibc

@Suite struct Probe {
  @Test func exits() async {
    await #expect(processExitsWith: .success) {
      let a = try Tensor([1.0])
      #expect(TorchRuntime.liveTensors == 1)
      _ = a
    }
  }
  @Test func env() { 
    #expect(fesetenv(UnsafePointer<fenv_t>(bitPattern: -1)) == 0)
  }
}
