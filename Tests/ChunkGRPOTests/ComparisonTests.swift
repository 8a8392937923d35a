import Testing

@testable import ChunkGRPO

/// Expected values: scipy 1.17.1. The noncentral t by integrating Φ(t·u/√ν − δ) against the chi density with
/// scipy.integrate.quad (agreed with scipy.stats.nct to 1e-13), effects by scipy.optimize.brentq on the power so computed.
@Suite struct ComparisonTests {
  /// 1e-10 absolute: what the function promises.
  @Test(
    "the noncentral t distribution is the integral that defines it",
    arguments: [
      (1, 0.5, 0.3, 0.398444778657585), (2, -1.5, 0.7, 0.9786394737374025),
      (2, 3, 4.302652729749462, 0.6126106497993318), (4, 2.5, 2.7764451051977987, 0.5227660644149695),
      (4, 2.5, -2.7764451051977987, 2.718179662215699e-05), (9, 10, 8, 0.14761652832373817),
      (29, 0, 1.2, 0.8800744363676796), (1, 17, 12.706204736174694, 0.18226789407868563),
      (99, -3, -2.5, 0.6909572745431216),
    ])
  func noncentral(_ degrees: Double, _ shift: Double, _ t: Double, _ expected: Double) {
    expectClose(NoncentralT(degrees: degrees, shift: shift).cdf(t), expected, absolute: 1e-10)
  }

  /// 1e-8: an error of 1e-10 in the power moves the effect by at most some tens of times as much at these sizes.
  @Test(
    "power and detectable effect of the paired test",
    arguments: [
      (2, 11.549888435882348, 0.09280915505633598), (3, 3.2640435496995712, 0.17925539377655175),
      (5, 1.6819969659555543, 0.40138991737179536), (10, 0.9960013714554445, 0.8030968566327219),
      (30, 0.5292356151129449, 0.9995636009612033),
    ])
  func power(_ pairs: Int, _ effect: Double, _ powerOfOne: Double) throws {
    expectClose(try PairedPower.detectableEffect(pairs: pairs), effect, relative: 1e-8)
    expectClose(try PairedPower.power(effect: 1, pairs: pairs), powerOfOne, absolute: 1e-10)
    // Without an effect the test errs as often as its level says: the definition of the level.
    expectClose(try PairedPower.power(effect: 0, pairs: pairs), 0.05, absolute: 1e-10)
  }

  @Test("one pair has no power to speak of")
  func onePair() {
    #expect(throws: StatisticsError.tooFewValues(got: 1, atLeast: 2)) {
      try PairedPower.detectableEffect(pairs: 1)
    }
  }

  /// Oracle: by hand. 0.005·4, then max(0.02, 0.01·3), then 0.03·2, and 0.04·1 is below that.
  @Test("Holm's correction, its order kept, never above 1 and never below the one before")
  func holmByHand() {
    expectClose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02], relative: 1e-15)
    #expect(holm([0.9, 0.8]) == [1, 1])
    #expect(holm([0.2]) == [0.2])
    #expect(holm([]) == [])
  }
}
