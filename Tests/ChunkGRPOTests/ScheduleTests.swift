import Foundation
import Testing

@testable import ChunkGRPO

@Suite struct ScheduleTests {
  @Test("the training schedule is GCPO's, bit for bit")
  func trainingMatchesGCPO() throws {
    let schedule = try NoiseSchedule.training(steps: 17, shift: 3)
    #expect(schedule.sigmas == (try Fixture.peers.floats("gcpo.sigmas")))
    #expect(schedule.sigmas == (try Fixture.chunkStep.floats("out.sigmas")))
    #expect(
      schedule.networkTimes(truncated: true)
        == (try Fixture.peers.integers("gcpo.timesteps_int")).map { Float($0) })
    #expect(schedule.networkTimes(truncated: false) == schedule.sigmas.dropLast().map { 1000 * $0 })
    #expect(schedule.steps == 17)
    #expect(schedule.trainableSteps == 16)
  }

  /// Oracle: FNV-1a over the little-endian bytes of torch 2.13.0+cpu's own
  /// `u = torch.linspace(1, 0, T + 1); s * u / (1 + (s - 1) * u)` for the same T and s, 10720 values.
  @Test("training schedules of 320 sizes and shifts hash to torch's")
  func trainingMatchesTorch() throws {
    var hash: UInt64 = 0xCBF2_9CE4_8422_2325
    for steps in 1...64 {
      for shift in [1, 1.15, 2.5, 3, 6] {
        for sigma in try NoiseSchedule.training(steps: steps, shift: shift).sigmas {
          for byte in 0..<4 {
            hash = (hash ^ UInt64(sigma.bitPattern >> (8 * UInt32(byte)) & 255)) &* 0x100_0000_01B3
          }
        }
      }
    }
    #expect(hash == 0x922A_644E_A931_67C9)
  }

  static let flux = """
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
     "use_dynamic_shifting": true, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
     "max_image_seq_len": 4096, "shift_terminal": null, "use_karras_sigmas": false}
    """
  static let qwen = """
    {"shift": 1.0, "use_dynamic_shifting": true, "max_shift": 0.9, "max_image_seq_len": 8192,
     "shift_terminal": 0.02}
    """

  func scheduler(_ json: String) throws -> FlowMatchScheduler {
    try JSONDecoder().decode(FlowMatchScheduler.self, from: Data(json.utf8))
  }

  /// Recorded from diffusers 0.42.1. The shift is one float32 division either way, but numpy's vector
  /// division and exp may round apart from ours by one unit in the last place, 1.2e-7.
  @Test(
    "FLUX, schnell and Qwen schedules are diffusers'",
    arguments: [
      ("flux.n28.seq4096", flux, 28, 4096), ("flux.n28.seq1024", flux, 28, 1024),
      ("flux.n17.seq2025", flux, 17, 2025),
      ("flux.n4.seq24", flux, 4, 24), ("schnell.n4", #"{"shift": 1.0}"#, 4, 4096),
      ("qwen.n20.seq1024", qwen, 20, 1024),
    ])
  func fluxMatchesDiffusers(_ name: String, _ json: String, _ steps: Int, _ tokens: Int) throws {
    let schedule = try scheduler(json).fluxSchedule(steps: steps, imageTokens: tokens)
    let expected = try Fixture.scheduler.floats("\(name).sigmas")
    expectClose(schedule.sigmas.map(Double.init), expected.map(Double.init), relative: 1.3e-7)
    #expect(schedule.sigmas == expected, "not bit for bit")
    if Fixture.scheduler.has("\(name).timesteps") {
      #expect(schedule.networkTimes(truncated: false) == (try Fixture.scheduler.floats("\(name).timesteps")))
    }
  }

  /// Double arithmetic rounded once to float32; 1e-6 is the demand, equality is what we get.
  @Test(
    "SD3 and Z-Image schedules are shifted twice as in diffusers",
    arguments: [("sd3.n10", 10), ("sd3.n28", 28), ("sd3.n40", 40), ("zimage_turbo.n8", 8)])
  func sd3MatchesDiffusers(_ name: String, _ steps: Int) throws {
    let schedule = try scheduler(#"{"shift": 3.0}"#).sd3Schedule(steps: steps)
    let expected = try Fixture.scheduler.floats("\(name).sigmas")
    expectClose(schedule.sigmas.map(Double.init), expected.map(Double.init), relative: 1e-6)
    #expect(schedule.sigmas == expected, "not bit for bit")
  }

  @Test(
    "μ is diffusers' calculate_shift", arguments: [(4096, 1.15), (1024, 0.63), (2025, 0.7994401041666666)])
  func dynamicShift(_ tokens: Int, _ mu: Double) throws {
    expectClose(try scheduler(Self.flux).dynamicShift(imageTokens: tokens), mu, relative: 1e-15)
  }

  @Test("scheduler_config.json: absent fields take defaults, all fields survive a round trip")
  func schedulerCoding() throws {
    let bare = try scheduler("{}")
    #expect(bare == FlowMatchScheduler())
    #expect(bare.numTrainTimesteps == 1000 && bare.shift == 1 && !bare.useDynamicShifting)
    #expect(bare.shiftTerminal == nil && bare.timeShiftType == .exponential)
    let odd = try scheduler(
      #"{"shift": 2, "shift_terminal": 0.1, "time_shift_type": "linear", "use_beta_sigmas": true}"#)
    #expect(try JSONDecoder().decode(FlowMatchScheduler.self, from: JSONEncoder().encode(odd)) == odd)
    #expect(throws: ScheduleError.unsupportedScheduler(option: "use_beta_sigmas")) {
      try odd.fluxSchedule(steps: 4, imageTokens: 16)
    }
    #expect(throws: ScheduleError.unsupportedScheduler(option: "use_dynamic_shifting")) {
      try scheduler(Self.flux).sd3Schedule(steps: 4)
    }
  }

  @Test("the linear time shift is μ / (μ + 1/t − 1)")
  func linearShift() throws {
    let linear = try scheduler(
      #"{"use_dynamic_shifting": true, "time_shift_type": "linear", "base_shift": 2, "max_shift": 2}"#)
    let sigmas = try linear.fluxSchedule(steps: 4, imageTokens: 64).sigmas
    // closed form, one float32 rounding an operation
    expectClose(sigmas.map(Double.init), [1, 6.0 / 7, 2.0 / 3, 0.4, 0], relative: 3e-7)
  }

  @Test("bad schedules are refused with the way out")
  func refusals() throws {
    #expect(throws: ScheduleError.tooFewSteps(got: 0, atLeast: 1)) {
      try NoiseSchedule.training(steps: 0, shift: 3)
    }
    #expect(throws: ScheduleError.shiftOutOfRange(0)) { try NoiseSchedule.training(steps: 4, shift: 0) }
    #expect(throws: ScheduleError.levelsOutOfOrder(sigma: 0.5, next: 0.5)) {
      try NoiseSchedule(sigmas: [1, 0.5, 0.5, 0])
    }
    #expect(throws: ScheduleError.endsOutOfRange(first: 1, last: 0.25)) {
      try NoiseSchedule(sigmas: [1, 0.25])
    }
    #expect(throws: ScheduleError.self) { try NoiseSchedule(sigmas: [1, .nan, 0]) }
    // levels that coincide in float32
    #expect(throws: ScheduleError.self) { try NoiseSchedule.training(steps: 40, shift: 1e9) }
    #expect(throws: ScheduleError.tooFewSteps(got: 1, atLeast: 2)) {
      try NoiseSchedule.training(steps: 1, shift: 3).trainingSteps(kind: .flowSDE, eta: 0.7)
    }
    #expect(throws: ScheduleError.deterministicStep(kind: .ode, eta: 0, sigma: 1, next: 0.75)) {
      try NoiseSchedule.training(steps: 2, shift: 3).trainingSteps(kind: .ode, eta: 0)
    }
    #expect(
      ScheduleError.tooFewSteps(got: 0, atLeast: 1).description
        == "sampling.steps: expected at least 1, got 0; raise sampling.steps")
  }
}
