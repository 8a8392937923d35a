import Foundation

/// Plain data as Python's pickles hold it.
indirect enum PickleValue: Sendable {
  case none
  case bool(Bool)
  case int(Int64)
  case float(Double)
  case string(String)
  case bytes(Data)
  case list([PickleValue])
  case tuple([PickleValue])
  case dictionary([(PickleValue, PickleValue)])

  /// The value of a string key; of the last where there are several.
  subscript(key: String) -> PickleValue? {
    guard case .dictionary(let pairs) = self else { return nil }
    return pairs.last { if case .string(key) = $0.0 { true } else { false } }?.1
  }
  /// The elements of a list or tuple.
  var items: [PickleValue]? {
    switch self {
    case .list(let items), .tuple(let items): items
    default: nil
    }
  }
}

extension PickleValue: Decodable {
  /// What Python's `json.loads` would make of the same text; keys in alphabetical order.
  init(from decoder: any Decoder) throws {
    let container = try decoder.singleValueContainer()
    if container.decodeNil() {
      self = .none
    } else if let value = try? container.decode(Bool.self) {
      self = .bool(value)
    } else if let value = try? container.decode(Int64.self) {
      self = .int(value)
    } else if let value = try? container.decode(Double.self) {
      self = .float(value)
    } else if let value = try? container.decode(String.self) {
      self = .string(value)
    } else if let value = try? container.decode([PickleValue].self) {
      self = .list(value)
    } else {
      let value = try container.decode([String: PickleValue].self)
      self = .dictionary(value.sorted { $0.key < $1.key }.map { (.string($0.key), $0.value) })
    }
  }
}

/// Writes pickles of protocol 3, the oldest with bytes: every Python 3 reads it.
///
/// Source of the opcodes, here and below: python/cpython@v3.11.7 Lib/pickle.py and Lib/pickletools.py.
struct PickleWriter {
  private var data = Data([0x80, 3])  // PROTO

  static func write(_ value: PickleValue) -> Data {
    var writer = PickleWriter()
    writer.append(value)
    writer.data.append(UInt8(ascii: "."))  // STOP
    return writer.data
  }

  private mutating func append(_ value: PickleValue) {
    switch value {
    case .none: op("N")
    case .bool(let value): data.append(value ? 0x88 : 0x89)  // NEWTRUE, NEWFALSE
    case .int(let value):
      if let small = Int32(exactly: value) {
        op("J")  // BININT
        little(UInt32(bitPattern: small))
      } else {
        data.append(contentsOf: [0x8A, 8])  // LONG1
        little(UInt64(bitPattern: value))
      }
    case .float(let value):
      op("G")  // BINFLOAT
      withUnsafeBytes(of: value.bitPattern.bigEndian) { data.append(contentsOf: $0) }
    case .string(let text):
      op("X")  // BINUNICODE
      length(text.utf8.count)
      data.append(contentsOf: text.utf8)
    case .bytes(let bytes):
      op("B")  // BINBYTES
      length(bytes.count)
      data.append(bytes)
    case .list(let items):
      op("]")  // EMPTY_LIST
      op("(")  // MARK
      for item in items { append(item) }
      op("e")  // APPENDS
    case .tuple(let items):
      op("(")
      for item in items { append(item) }
      op("t")  // TUPLE
    case .dictionary(let pairs):
      op("}")  // EMPTY_DICT
      op("(")
      for (key, value) in pairs {
        append(key)
        append(value)
      }
      op("u")  // SETITEMS
    }
  }

  private mutating func op(_ code: Unicode.Scalar) { data.append(UInt8(ascii: code)) }
  private mutating func little<I: FixedWidthInteger>(_ value: I) {
    withUnsafeBytes(of: value.littleEndian) { data.append(contentsOf: $0) }
  }
  private mutating func length(_ count: Int) {
    precondition(count <= UInt32.max, "4 GiB in one item of a request")
    little(UInt32(count))
  }
}

/// Why bytes are no pickle of plain data.
enum PickleError: Error, Equatable, CustomStringConvertible {
  /// An opcode that plain data does not need, and that may run code.
  case refused(opcode: String, offset: Int)
  /// Bytes that no pickler writes, or more than is read.
  case malformed(reason: String, offset: Int)

  var description: String {
    switch self {
    case .refused(let opcode, let offset):
      "the pickle uses \(opcode) at byte \(offset), which plain numbers and texts do not need and which may run code: "
        + "refused; let the server answer with Python floats (x.tolist())"
    case .malformed(let reason, let offset): "not a pickle that can be read: \(reason) at byte \(offset)"
    }
  }
}

/// Reads pickles of plain data, protocols 2 to 5, and nothing else: no opcode here imports, calls or builds anything.
///
/// Objects are entries of a table and refer to each other by number, so that neither cycles nor deep nesting can exhaust
/// the stack or leak; only what the result needs is unfolded, within limits.
struct PickleReader {
  struct Limits: Sendable {
    /// Nesting of the result.
    var depth = 64
    /// Objects in the pickle, and values in the result: shared ones count each time.
    var count = 1 << 20
  }

  private enum Node {
    case none
    case bool(Bool)
    case int(Int64)
    case float(Double)
    case string(String)
    case bytes(Data)
    case list([Int32])
    case tuple([Int32])
    /// Keys and values in turn.
    case dictionary([Int32])
  }

  private let bytes: [UInt8]
  private let limits: Limits
  private var position = 0
  /// Where the opcode in hand begins.
  private var opcodeStart = 0
  private var nodes: [Node] = []
  private var stack: [Int32] = []
  /// Heights of the stack at the marks.
  private var marks: [Int] = []
  private var memo: [UInt32: Int32] = [:]
  private var unfolded = 0

  private init(_ data: Data, _ limits: Limits) { (bytes, self.limits) = (Array(data), limits) }

  /// The object that `data` holds.
  static func read(_ data: Data, limits: Limits = Limits()) throws(PickleError) -> PickleValue {
    var reader = PickleReader(data, limits)
    return try reader.run()
  }

  private mutating func run() throws(PickleError) -> PickleValue {
    guard bytes.first == 0x80 else { throw malformed("no PROTO") }
    while true {
      opcodeStart = position
      let code = try byte()
      switch code {
      case 0x80:  // PROTO
        let version = try byte()
        guard opcodeStart == 0, 2...5 ~= version else { throw malformed("PROTO \(version)") }
      case 0x95:  // FRAME
        let length: UInt64 = try little()
        guard length <= UInt64(bytes.count - position) else {
          throw malformed("a frame longer than the pickle")
        }
      case UInt8(ascii: "N"): try push(.none)  // NONE
      case 0x88: try push(.bool(true))  // NEWTRUE
      case 0x89: try push(.bool(false))  // NEWFALSE
      case UInt8(ascii: "J"):  // BININT
        let value: Int32 = try little()
        try push(.int(Int64(value)))
      case UInt8(ascii: "K"): try push(.int(Int64(try byte())))  // BININT1
      case UInt8(ascii: "M"):  // BININT2
        let value: UInt16 = try little()
        try push(.int(Int64(value)))
      case 0x8A: try push(.int(try long(Int(try byte()))))  // LONG1
      case UInt8(ascii: "G"):  // BINFLOAT
        let bits: UInt64 = try little()
        try push(.float(Double(bitPattern: bits.byteSwapped)))
      case 0x8C: try push(.string(try text(Int(try byte()))))  // SHORT_BINUNICODE
      case UInt8(ascii: "X"):  // BINUNICODE
        let length: UInt32 = try little()
        try push(.string(try text(Int(length))))
      case UInt8(ascii: "C"): try push(.bytes(Data(try take(Int(try byte())))))  // SHORT_BINBYTES
      case UInt8(ascii: "B"):  // BINBYTES
        let length: UInt32 = try little()
        try push(.bytes(Data(try take(Int(length)))))
      case UInt8(ascii: "]"): try push(.list([]))  // EMPTY_LIST
      case UInt8(ascii: "}"): try push(.dictionary([]))  // EMPTY_DICT
      case UInt8(ascii: ")"): try push(.tuple([]))  // EMPTY_TUPLE
      case UInt8(ascii: "("): marks.append(stack.count)  // MARK
      case UInt8(ascii: "t"): try push(.tuple(try popToMark()))  // TUPLE
      case 0x85, 0x86, 0x87: try push(.tuple(try pop(Int(code) - 0x84)))  // TUPLE1, TUPLE2, TUPLE3
      case UInt8(ascii: "a"): try extendList(try pop(1))  // APPEND
      case UInt8(ascii: "e"): try extendList(try popToMark())  // APPENDS
      case UInt8(ascii: "s"): try extendDictionary(try pop(2))  // SETITEM
      case UInt8(ascii: "u"): try extendDictionary(try popToMark())  // SETITEMS
      case 0x94: memo[UInt32(memo.count)] = try top()  // MEMOIZE
      case UInt8(ascii: "q"): memo[UInt32(try byte())] = try top()  // BINPUT
      case UInt8(ascii: "r"):  // LONG_BINPUT
        let index: UInt32 = try little()
        memo[index] = try top()
      case UInt8(ascii: "h"): try recall(UInt32(try byte()))  // BINGET
      case UInt8(ascii: "j"): try recall(try little())  // LONG_BINGET
      case UInt8(ascii: "."):  // STOP
        guard stack.count == 1, marks.isEmpty else { throw malformed("STOP with \(stack.count) objects") }
        guard position == bytes.count else { throw malformed("\(bytes.count - position) bytes after STOP") }
        return try unfold(stack[0], depth: 0)
      default:
        throw .refused(
          opcode: Self.otherOpcodes[code] ?? "opcode 0x" + String(code, radix: 16), offset: opcodeStart)
      }
    }
  }

  private func malformed(_ reason: String) -> PickleError { .malformed(reason: reason, offset: opcodeStart) }

  private mutating func take(_ count: Int) throws(PickleError) -> ArraySlice<UInt8> {
    guard count <= bytes.count - position else { throw malformed("it ends too early") }
    defer { position += count }
    return bytes[position..<position + count]
  }
  private mutating func byte() throws(PickleError) -> UInt8 { try take(1).first! }
  private mutating func little<I: FixedWidthInteger>() throws(PickleError) -> I {
    try take(I.bitWidth / 8).reversed().reduce(0) { $0 << 8 | I(truncatingIfNeeded: $1) }
  }
  /// A two's complement number of `count` bytes.
  private mutating func long(_ count: Int) throws(PickleError) -> Int64 {
    guard count <= 8 else { throw malformed("an integer of \(count) bytes") }
    let part = try take(count)
    let start: Int64 = part.last.map { $0 >= 0x80 } == true ? -1 : 0
    return part.reversed().reduce(start) { $0 << 8 | Int64($1) }
  }
  private mutating func text(_ count: Int) throws(PickleError) -> String {
    guard let text = String(validating: try take(count), as: UTF8.self) else {
      throw malformed("text that is not UTF-8")
    }
    return text
  }

  private mutating func push(_ node: Node) throws(PickleError) {
    guard nodes.count < limits.count else { throw malformed("more than \(limits.count) objects") }
    stack.append(Int32(nodes.count))
    nodes.append(node)
  }
  /// Objects above the last mark are all there is to take.
  private var floor: Int { marks.last ?? 0 }
  private func top() throws(PickleError) -> Int32 {
    guard stack.count > floor else { throw malformed("nothing on the stack") }
    return stack[stack.count - 1]
  }
  private mutating func pop(_ count: Int) throws(PickleError) -> [Int32] {
    guard stack.count - floor >= count else { throw malformed("too little on the stack") }
    defer { stack.removeLast(count) }
    return Array(stack.suffix(count))
  }
  private mutating func popToMark() throws(PickleError) -> [Int32] {
    guard let mark = marks.popLast() else { throw malformed("no mark") }
    defer { stack.removeSubrange(mark...) }
    return Array(stack[mark...])
  }
  private mutating func recall(_ index: UInt32) throws(PickleError) {
    guard let node = memo[index] else { throw malformed("nothing memoized as \(index)") }
    guard stack.count < limits.count else { throw malformed("more than \(limits.count) objects") }
    stack.append(node)
  }
  private mutating func extendList(_ items: [Int32]) throws(PickleError) {
    let list = Int(try top())
    guard case .list(var all) = nodes[list] else { throw malformed("appending to what is no list") }
    nodes[list] = .none  // so that the array is not shared while it grows
    all += items
    nodes[list] = .list(all)
  }
  private mutating func extendDictionary(_ items: [Int32]) throws(PickleError) {
    let dictionary = Int(try top())
    guard case .dictionary(var all) = nodes[dictionary], items.count.isMultiple(of: 2) else {
      throw malformed("keys and values for what is no dictionary, or a key too many")
    }
    nodes[dictionary] = .none
    all += items
    nodes[dictionary] = .dictionary(all)
  }

  private mutating func unfold(_ index: Int32, depth: Int) throws(PickleError) -> PickleValue {
    unfolded += 1
    guard unfolded <= limits.count else { throw malformed("more than \(limits.count) values") }
    guard depth <= limits.depth else { throw malformed("nested more than \(limits.depth) deep") }
    func all(_ items: [Int32], _ reader: inout PickleReader) throws(PickleError) -> [PickleValue] {
      var values: [PickleValue] = []
      for item in items { values.append(try reader.unfold(item, depth: depth + 1)) }
      return values
    }
    switch nodes[Int(index)] {
    case .none: return .none
    case .bool(let value): return .bool(value)
    case .int(let value): return .int(value)
    case .float(let value): return .float(value)
    case .string(let value): return .string(value)
    case .bytes(let value): return .bytes(value)
    case .list(let items): return .list(try all(items, &self))
    case .tuple(let items): return .tuple(try all(items, &self))
    case .dictionary(let items):
      let values = try all(items, &self)
      return .dictionary(
        stride(from: 0, to: values.count, by: 2).map { (values[$0], values[$0 + 1]) })
    }
  }

  /// Names of the opcodes that are refused.
  private static let otherOpcodes: [UInt8: String] = {
    var names: [UInt8: String] = [
      0x81: "NEWOBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x8B: "LONG4", 0x8D: "BINUNICODE8",
      0x8E: "BINBYTES8", 0x8F: "EMPTY_SET", 0x90: "ADDITEMS", 0x91: "FROZENSET", 0x92: "NEWOBJ_EX",
      0x93: "STACK_GLOBAL", 0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
    ]
    let letters: [(Unicode.Scalar, String)] = [
      ("0", "POP"), ("1", "POP_MARK"), ("2", "DUP"), ("F", "FLOAT"), ("I", "INT"), ("L", "LONG"),
      ("P", "PERSID"), ("Q", "BINPERSID"), ("R", "REDUCE"), ("S", "STRING"), ("T", "BINSTRING"),
      ("U", "SHORT_BINSTRING"), ("V", "UNICODE"), ("b", "BUILD"), ("c", "GLOBAL"), ("d", "DICT"),
      ("g", "GET"), ("i", "INST"), ("l", "LIST"), ("o", "OBJ"), ("p", "PUT"),
    ]
    for (letter, name) in letters { names[UInt8(ascii: letter)] = name }
    return names
  }()
}
