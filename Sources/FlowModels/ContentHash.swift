import Foundation

/// A 128-bit hash of bytes, fast enough for weight files: two chains of multiply and rotate over 8-byte words.
///
/// It tells contents apart; it is no protection against intent.
struct ContentHash {
  private var a: UInt64 = 0x9E37_79B9_7F4A_7C15
  private var b: UInt64 = 0xC2B2_AE3D_27D4_EB4F

  /// Adds `bytes` and their number.
  mutating func combine(_ bytes: UnsafeRawBufferPointer) {
    func mix(_ word: UInt64) {
      a = (a ^ word) &* 0xFF51_AFD7_ED55_8CCD
      a = a << 29 | a >> 35
      b = (b &+ word) &* 0xC4CE_B9FE_1A85_EC53
      b ^= b >> 31
    }
    let words = bytes.count / 8
    for i in 0..<words { mix(bytes.loadUnaligned(fromByteOffset: 8 * i, as: UInt64.self)) }
    var tail: UInt64 = 0
    for byte in bytes[(8 * words)...] { tail = tail << 8 | UInt64(byte) }
    mix(tail)
    mix(UInt64(bytes.count))
  }
  /// Adds UTF-8 text.
  mutating func combine(_ text: String) { Data(text.utf8).withUnsafeBytes { combine($0) } }

  /// 32 hexadecimal digits.
  var hex: String {
    [a ^ b >> 32, b ^ a >> 29].map { word in
      let text = String(word, radix: 16)
      return String(repeating: "0", count: 16 - text.count) + text
    }.joined()
  }
}
