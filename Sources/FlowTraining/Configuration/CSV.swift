/// Comma-separated values as RFC 4180 has them: fields may be quoted, then hold commas, line breaks and doubled quotes.
enum CSV {
  /// A row and the line where it begins, counted from 1.
  struct Row: Equatable {
    var fields: [String]
    let line: Int
  }
  /// What is no such table, and where.
  struct Malformed: Error, Equatable {
    let line: Int
    let reason: String
  }

  /// Rows of `text`; lines without any character are none.
  static func rows(_ text: Substring) throws(Malformed) -> [Row] {
    enum State { case start, plain, quoted, closed }
    var rows: [Row] = []
    var (state, line) = (State.start, 1)
    var row = Row(fields: [], line: 1)
    var field = ""
    func endField() {
      row.fields.append(field)
      (field, state) = ("", .start)
    }
    func endRow(next: Int) {
      if !(row.fields.isEmpty && state == .start) {
        endField()
        rows.append(row)
      }
      row = Row(fields: [], line: next)
    }
    for character in text {
      let isBreak = character == "\n" || character == "\r\n" || character == "\r"
      if isBreak { line += 1 }
      switch (state, character) {
      case (.quoted, "\""): state = .closed
      case (.quoted, _): field.append(character)
      case (.closed, "\""):
        field.append(character)
        state = .quoted
      case (_, ","): endField()
      case _ where isBreak: endRow(next: line)
      case (.start, "\""): state = .quoted
      case (.closed, _):
        throw Malformed(
          line: row.line, reason: "\"\(character)\" after a closing quote; double quotes inside a field")
      case (_, "\""):
        throw Malformed(
          line: row.line,
          reason:
            "a quote in a field that does not begin with one; write \"a \"\"word\"\"\" with the whole field quoted"
        )
      default:
        field.append(character)
        state = .plain
      }
    }
    if state == .quoted { throw Malformed(line: row.line, reason: "a quoted field is not closed") }
    endRow(next: line)
    return rows
  }
}
