import Foundation
import Testing

@testable import ChunkGRPO

/// Expected values: scipy 1.17.1, numpy 2.4.6: stats.t.cdf, 2·stats.t.sf, stats.t.ppf, stats.ttest_1samp with
/// its confidence_interval, stats.t.interval(0.95, 4, mean, stats.sem) and special.betainc, printed with
/// repr.
@Suite struct StatisticsTests {
  /// 1e-10 relative: what reports need many times over; log-gamma of 250 costs three digits of the sixteen.
  @Test(
    "Student's t distribution is scipy's",
    arguments: [
      (1, 0.1, 0.5317255174305535, 0.936548965138893), (1, 1.0, 0.75, 0.5000000000000001),
      (1, 2.5, 0.8788810584091566, 0.24223788318168682), (1, 7.0, 0.9548327646991335, 0.0903344706017331),
      (2, 0.1, 0.53526728079293, 0.9294654384141402), (2, 1.0, 0.7886751345948129, 0.4226497308103742),
      (2, 2.5, 0.9351941398892446, 0.12961172022151082), (2, 7.0, 0.9900980294098034, 0.01980394118039314),
      (3.5, 0.1, 0.5370977901565539, 0.9258044196868921), (3.5, 1.0, 0.8093313732182774, 0.3813372535634453),
      (3.5, 2.5, 0.962152678095255, 0.07569464380949002),
      (3.5, 7.0, 0.9982235819000979, 0.0035528361998042636),
      (10, 0.1, 0.5388396407177959, 0.9223207185644082), (10, 1.0, 0.8295534338489701, 0.34089313230206),
      (10, 2.5, 0.9842765778816955, 0.03144684423660882),
      (10, 7.0, 0.9999814220385915, 3.715592281685689e-05),
      (49, 0.1, 0.5396238237074483, 0.9207523525851034), (49, 1.0, 0.8388882970246623, 0.32222340595067545),
      (49, 2.5, 0.9920921055764099, 0.01581578884718008),
      (49, 7.0, 0.9999999966831348, 6.633730440219506e-09),
      (99, 0.1, 0.5397267246312089, 0.9205465507375823), (99, 1.0, 0.8401257629303494, 0.3197484741393014),
      (99, 2.5, 0.9929687015394255, 0.014062596921149069),
      (99, 7.0, 0.9999999998452193, 3.095615654299904e-10),
      (500, 0.1, 0.5398077962315619, 0.9203844075368762), (500, 1.0, 0.8411028963696958, 0.3177942072606085),
      (500, 2.5, 0.9936307122495581, 0.012738575500883852),
      (500, 7.0, 0.9999999999958611, 8.27790941014583e-12),
    ])
  func distribution(_ degrees: Double, _ t: Double, _ cdf: Double, _ tail: Double) {
    let student = StudentT(degrees: degrees)
    expectClose(student.cdf(t), cdf, relative: 1e-10)
    expectClose(student.cdf(-t), tail / 2, relative: 1e-10)
    expectClose(student.twoSidedTail(t), tail, relative: 1e-10)
    expectClose(student.quantile(student.cdf(-t)), -t, relative: 1e-10)
  }

  @Test(
    "Student's t quantiles are scipy's",
    arguments: [
      (1, 0.9, 3.0776835371752544), (1, 0.975, 12.706204736174694), (1, 0.9995, 636.6192487687897),
      (2, 0.9, 1.8856180831641272), (2, 0.975, 4.302652729749462), (2, 0.9995, 31.599054576445365),
      (5, 0.9, 1.4758840488244815), (5, 0.975, 2.5705818356363146), (5, 0.9995, 6.868826625881276),
      (30, 0.9, 1.3104150253913955), (30, 0.975, 2.0422724563012378), (30, 0.9995, 3.6459586350420627),
      (99, 0.9, 1.2901614420344854), (99, 0.975, 1.9842169515864174), (99, 0.9995, 3.391528833363685),
      (1000, 0.9, 1.2823987214609247), (1000, 0.975, 1.9623390808264083), (1000, 0.9995, 3.300282648423944),
    ])
  func quantiles(_ degrees: Double, _ probability: Double, _ t: Double) {
    let student = StudentT(degrees: degrees)
    expectClose(student.quantile(probability), t, relative: 1e-10)
    expectClose(student.quantile(1 - probability), -t, relative: 1e-10)
  }

  @Test("limits of the distribution")
  func limits() {
    #expect(StudentT(degrees: 3).cdf(0) == 0.5)
    #expect(StudentT(degrees: 3).quantile(0.5) == 0)
    #expect(StudentT(degrees: 3).twoSidedTail(.infinity) == 0)
    #expect(StudentT(degrees: 3).twoSidedTail(1e200) == 0)
  }

  @Test(
    "the incomplete beta function is scipy's on both sides of its switch",
    arguments: [
      (0.5, 0.5, 0.2, 0.2951672353008665), (3, 7, 0.4, 0.768212992), (50, 0.5, 0.99, 0.3173043978741973),
      (0.5, 250, 0.003, 0.7794445220726095),
    ])
  func beta(_ a: Double, _ b: Double, _ x: Double, _ expected: Double) {
    expectClose(incompleteBeta(x, 1 - x, a, b), expected, relative: 1e-10)
  }

  @Test("summaries have scipy's interval")
  func summary() throws {
    let summary = try Summary([13.2, 14.1, 12.7, 15.0, 13.9])
    expectClose(summary.mean, 13.78, relative: 1e-15)
    expectClose(summary.standardDeviation, 0.8814760348415608, relative: 1e-13)
    let interval = try #require(summary.ci95)
    expectClose(interval.low, 12.685502942257829, relative: 1e-10)
    expectClose(interval.high, 14.874497057742174, relative: 1e-10)
    expectClose(interval.halfWidth, (14.874497057742174 - 12.685502942257829) / 2, relative: 1e-10)
    let single = try Summary([4])
    #expect(single.mean == 4 && single.ci95 == nil && single.n == 1)
    #expect(try JSONDecoder().decode(Summary.self, from: JSONEncoder().encode(summary)) == summary)
  }

  @Test("the paired test is scipy's one-sample test of the differences")
  func paired() throws {
    let test = try PairedTest(differences: [0.31, -0.12, 0.44, 0.05, 0.27, -0.03, 0.61, 0.18])
    expectClose(test.difference, 0.21375, relative: 1e-14)
    expectClose(try #require(test.t), 2.4699740806549024, relative: 1e-10)
    expectClose(test.p, 0.0428346121475361, relative: 1e-10)
    expectClose(test.ci95.low, 0.009116907800124419, absolute: 1e-11)
    expectClose(test.ci95.high, 0.4183830921998756, relative: 1e-10)
    #expect(test.n == 8)
    let (same, shifted) = (
      try PairedTest(differences: [0, 0, 0]), try PairedTest(differences: [0.1, 0.1, 0.1])
    )
    #expect(same.t == nil && same.p == 1)
    #expect(shifted.t == nil && shifted.p == 0)
  }

  @Test("too few or broken values are refused")
  func refusals() {
    #expect(throws: StatisticsError.tooFewValues(got: 0, atLeast: 1)) { try Summary([]) }
    #expect(throws: StatisticsError.tooFewValues(got: 1, atLeast: 2)) { try PairedTest(differences: [1]) }
    #expect(throws: StatisticsError.notFinite(index: 1, value: .infinity)) { try Summary([1, .infinity]) }
    #expect(
      StatisticsError.tooFewValues(got: 1, atLeast: 2).description
        == "statistics: expected 2 values or more, got 1; use more prompts")
  }
}
