/// Insertions, deletions and replacements that turn `a` into `b` (Levenshtein).
package func editDistance<C: Collection>(_ a: C, _ b: C) -> Int where C.Element: Equatable {
  var row = Array(0...b.count)
  for (i, x) in a.enumerated() {
    var diagonal = row[0]
    row[0] = i + 1
    for (j, y) in b.enumerated() {
      let replaced = diagonal + (x == y ? 0 : 1)
      diagonal = row[j + 1]
      row[j + 1] = min(replaced, row[j] + 1, diagonal + 1)
    }
  }
  return row[row.count - 1]
}
