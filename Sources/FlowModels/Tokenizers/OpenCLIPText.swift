import Foundation

/// How open_clip cleans a prompt before the words are split: what ftfy.fix_text does to text of sound
/// encoding, then HTML character references twice.
///
/// Not done: ftfy's repair of text decoded with a wrong encoding, and references that HTML 4 did not have.
///
/// Source: mlfoundations/open_clip v3.3.0 src/open_clip/tokenizer.py (basic_clean); ftfy 6.3.1; Python's
/// html.unescape. All work is on Unicode scalars, as in ``CLIPTokenizer``.
enum OpenCLIPText {
  /// `text` cleaned; whitespace and case are left to the tokenizer.
  static func clean(_ text: String) -> [Unicode.Scalar] {
    unescape(unescape(fix(Array(text.unicodeScalars)), strict: false), strict: false)
  }

  /// ftfy's steps, repeated until nothing changes.
  private static func fix(_ text: [Unicode.Scalar]) -> [Unicode.Scalar] {
    var text = text
    // Text with a "<" may be HTML and is then left alone.
    let unescapes = !text.contains("<")
    while true {
      let before = text
      if unescapes { text = unescape(text, strict: true) }
      text = withoutTerminalEscapes(text.flatMap(standard)).filter { !isStray($0) }
      text = Array(string(text).precomposedStringWithCanonicalMapping.unicodeScalars)
      if text == before { return text }
    }
  }

  private static func string(_ text: [Unicode.Scalar]) -> String {
    var view = String.UnicodeScalarView()
    view.append(contentsOf: text)
    return String(view)
  }

  /// Windows-1252's characters behind U+0080 to U+009F; unassigned ones stay.
  private static let windows = Array(
    "€\u{81}‚ƒ„…†‡ˆ‰Š‹Œ\u{8D}Ž\u{8F}\u{90}‘’“”•–—˜™š›œ\u{9D}žŸ".unicodeScalars)

  /// C1 controls, ligatures, full-width forms and curled quotes by their plain forms.
  private static func standard(_ scalar: Unicode.Scalar) -> [Unicode.Scalar] {
    switch scalar.value {
    case ..<0x80: return [scalar]
    case 0x80...0x9F: return uncurled(windows[Int(scalar.value) - 0x80])
    case 0xFB05: return ["ſ", "t"]
    case 0x132...0x133, 0x1C4...0x1CC, 0x1F1...0x1F3, 0xFB00...0xFB06, 0xFF01...0xFFEF, 0x3000:
      let form = string([scalar]).precomposedStringWithCompatibilityMapping
      return form.unicodeScalars.flatMap(uncurled)
    case 0x149: return ["'", "n"]
    default: return uncurled(scalar)
    }
  }

  private static func uncurled(_ scalar: Unicode.Scalar) -> [Unicode.Scalar] {
    switch scalar.value {
    case 0x2BC, 0x2018...0x201B: ["'"]
    case 0x201C...0x201F: ["\""]
    default: [scalar]
    }
  }

  /// Text without `ESC [ digits letter`, which colours a terminal.
  private static func withoutTerminalEscapes(_ text: [Unicode.Scalar]) -> [Unicode.Scalar] {
    var result: [Unicode.Scalar] = []
    var i = 0
    while i < text.count {
      if text[i] == "\u{1B}", i + 1 < text.count, text[i + 1] == "[" {
        var end = i + 2
        while end < text.count, ("0"..."9").contains(text[end]) || text[end] == ";" { end += 1 }
        if end < text.count, text[end].isASCII, text[end].properties.isAlphabetic {
          i = end + 1
          continue
        }
      }
      result.append(text[i])
      i += 1
    }
    return result
  }

  /// Control characters that text has no use for.
  private static func isStray(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.value {
    case 0...8, 0xB, 0xE...0x1F, 0x7F, 0x206A...0x206F, 0xFEFF, 0xFFF9...0xFFFC: true
    default: false
    }
  }

  // MARK: HTML character references

  /// References replaced by their characters.
  ///
  /// - Parameter strict: as ftfy: a reference ends in a semicolon, and Latin names in capitals mean capital
  ///   letters. Otherwise as html.unescape, where HTML's oldest names need no semicolon, even before other
  ///   letters.
  static func unescape(_ text: [Unicode.Scalar], strict: Bool) -> [Unicode.Scalar] {
    var result: [Unicode.Scalar] = []
    var i = 0
    while i < text.count {
      if text[i] == "&", let (characters, length) = reference(text[(i + 1)...], strict) {
        result += characters
        i += 1 + length
      } else {
        result.append(text[i])
        i += 1
      }
    }
    return result
  }

  /// The characters of the reference after an ampersand, and how many scalars it takes; nil where there is
  /// none.
  private static func reference(
    _ text: ArraySlice<Unicode.Scalar>, _ strict: Bool
  ) -> ([Unicode.Scalar], Int)? {
    if text.first == "#" { return numeric(text.dropFirst(), strict) }
    let body = text.prefix(32).prefix { !"\t\n\u{C} <&#;".unicodeScalars.contains($0) }
    let name = string(Array(body))
    let closed = text.dropFirst(body.count).first == ";"
    if closed, let character = names[name] { return ([character], body.count + 1) }
    if strict {
      guard closed, name == name.uppercased(), let character = names[name.lowercased()] else { return nil }
      return (Array(character.properties.uppercaseMapping.unicodeScalars), body.count + 1)
    }
    for length in stride(from: body.count, through: 2, by: -1) {
      let start = string(Array(body.prefix(length)))
      if let character = names[start], character.value < 0x100 { return ([character], length) }
    }
    return nil
  }

  private static func numeric(
    _ text: ArraySlice<Unicode.Scalar>, _ strict: Bool
  ) -> ([Unicode.Scalar], Int)? {
    let hexadecimal = text.first == "x" || text.first == "X"
    let digits = text.dropFirst(hexadecimal ? 1 : 0).prefix {
      $0.isASCII && (hexadecimal ? $0.properties.isASCIIHexDigit : ("0"..."9").contains($0))
    }
    guard !digits.isEmpty else { return nil }
    var length = 1 + (hexadecimal ? 1 : 0) + digits.count
    let closed = text.dropFirst(length - 1).first == ";"
    if closed { length += 1 }
    let value = UInt32(string(Array(digits)), radix: hexadecimal ? 16 : 10) ?? .max
    let characters = characters(value)
    if strict, !closed || characters.contains(";") { return nil }
    return (characters, length)
  }

  /// What a numeric reference means: HTML reads Windows-1252 where Unicode has C1 controls.
  private static func characters(_ value: UInt32) -> [Unicode.Scalar] {
    switch value {
    case 0: return ["\u{FFFD}"]
    case 0x80...0x9F: return [windows[Int(value) - 0x80]]
    case 1...8, 0xB, 0xE...0x1F, 0x7F, 0xFDD0...0xFDEF: return []
    default:
      guard let scalar = Unicode.Scalar(value) else { return ["\u{FFFD}"] }
      return value & 0xFFFE == 0xFFFE ? [] : [scalar]
    }
  }

  /// HTML 4's names.
  private static let names: [String: Unicode.Scalar] = {
    let pairs = table.split(separator: " ").map { entry in
      let parts = entry.split(separator: ":")
      return (String(parts[0]), Unicode.Scalar(UInt32(parts[1], radix: 16)!)!)
    }
    return Dictionary(uniqueKeysWithValues: pairs)
  }()

  private static let table = """
    quot:22 amp:26 lt:3c gt:3e nbsp:a0 iexcl:a1 cent:a2 pound:a3 curren:a4 yen:a5 brvbar:a6 sect:a7 \
    uml:a8 copy:a9 ordf:aa laquo:ab not:ac shy:ad reg:ae macr:af deg:b0 plusmn:b1 sup2:b2 sup3:b3 \
    acute:b4 micro:b5 para:b6 middot:b7 cedil:b8 sup1:b9 ordm:ba raquo:bb frac14:bc frac12:bd frac34:be \
    iquest:bf Agrave:c0 Aacute:c1 Acirc:c2 Atilde:c3 Auml:c4 Aring:c5 AElig:c6 Ccedil:c7 Egrave:c8 \
    Eacute:c9 Ecirc:ca Euml:cb Igrave:cc Iacute:cd Icirc:ce Iuml:cf ETH:d0 Ntilde:d1 Ograve:d2 Oacute:d3 \
    Ocirc:d4 Otilde:d5 Ouml:d6 times:d7 Oslash:d8 Ugrave:d9 Uacute:da Ucirc:db Uuml:dc Yacute:dd \
    THORN:de szlig:df agrave:e0 aacute:e1 acirc:e2 atilde:e3 auml:e4 aring:e5 aelig:e6 ccedil:e7 \
    egrave:e8 eacute:e9 ecirc:ea euml:eb igrave:ec iacute:ed icirc:ee iuml:ef eth:f0 ntilde:f1 ograve:f2 \
    oacute:f3 ocirc:f4 otilde:f5 ouml:f6 divide:f7 oslash:f8 ugrave:f9 uacute:fa ucirc:fb uuml:fc \
    yacute:fd thorn:fe yuml:ff OElig:152 oelig:153 Scaron:160 scaron:161 Yuml:178 fnof:192 circ:2c6 \
    tilde:2dc Alpha:391 Beta:392 Gamma:393 Delta:394 Epsilon:395 Zeta:396 Eta:397 Theta:398 Iota:399 \
    Kappa:39a Lambda:39b Mu:39c Nu:39d Xi:39e Omicron:39f Pi:3a0 Rho:3a1 Sigma:3a3 Tau:3a4 Upsilon:3a5 \
    Phi:3a6 Chi:3a7 Psi:3a8 Omega:3a9 alpha:3b1 beta:3b2 gamma:3b3 delta:3b4 epsilon:3b5 zeta:3b6 \
    eta:3b7 theta:3b8 iota:3b9 kappa:3ba lambda:3bb mu:3bc nu:3bd xi:3be omicron:3bf pi:3c0 rho:3c1 \
    sigmaf:3c2 sigma:3c3 tau:3c4 upsilon:3c5 phi:3c6 chi:3c7 psi:3c8 omega:3c9 thetasym:3d1 upsih:3d2 \
    piv:3d6 ensp:2002 emsp:2003 thinsp:2009 zwnj:200c zwj:200d lrm:200e rlm:200f ndash:2013 mdash:2014 \
    lsquo:2018 rsquo:2019 sbquo:201a ldquo:201c rdquo:201d bdquo:201e dagger:2020 Dagger:2021 bull:2022 \
    hellip:2026 permil:2030 prime:2032 Prime:2033 lsaquo:2039 rsaquo:203a oline:203e frasl:2044 \
    euro:20ac image:2111 weierp:2118 real:211c trade:2122 alefsym:2135 larr:2190 uarr:2191 rarr:2192 \
    darr:2193 harr:2194 crarr:21b5 lArr:21d0 uArr:21d1 rArr:21d2 dArr:21d3 hArr:21d4 forall:2200 \
    part:2202 exist:2203 empty:2205 nabla:2207 isin:2208 notin:2209 ni:220b prod:220f sum:2211 \
    minus:2212 lowast:2217 radic:221a prop:221d infin:221e ang:2220 and:2227 or:2228 cap:2229 cup:222a \
    int:222b there4:2234 sim:223c cong:2245 asymp:2248 ne:2260 equiv:2261 le:2264 ge:2265 sub:2282 \
    sup:2283 nsub:2284 sube:2286 supe:2287 oplus:2295 otimes:2297 perp:22a5 sdot:22c5 lceil:2308 \
    rceil:2309 lfloor:230a rfloor:230b loz:25ca spades:2660 clubs:2663 hearts:2665 diams:2666 lang:27e8 \
    rang:27e9 AMP:26 COPY:a9 GT:3e LT:3c QUOT:22 REG:ae
    """
}
