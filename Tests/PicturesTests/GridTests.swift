import Testing

@testable import Pictures

@Suite("Grid")
struct GridTests {
  /// Expected by hand from: margin 16, gap 8, label column + 16, title 30, headers 22, captions 18.
  @Test("size follows from the parts that are there")
  func size() throws {
    let picture = pattern(width: 10, height: 6)
    var grid = Grid(rows: [.init(cells: [.init(picture), .init(picture)]), .init(cells: [.init(picture)])])
    func size() throws -> [Int] {
      let image = try grid.render()
      return [image.width, image.height]
    }
    #expect(try size() == [16 + 10 + 8 + 10 + 16, 16 + 6 + 8 + 6 + 16])
    grid.scale = 3
    #expect(try size() == [16 + 30 + 8 + 30 + 16, 16 + 18 + 8 + 18 + 16])
    grid.rows[1].cells[0].caption = "0.5"
    #expect(try size() == [100, 16 + 18 + 18 + 8 + 18 + 18 + 16])
    grid.columns = ["before"]
    grid.title = "samples"
    #expect(try size() == [100, 112 + 22 + 30])
    grid.rows[0].label = "a cat"
    grid.labelWidth = 50
    #expect(try size() == [100 + 50 + 16, 164])
  }

  @Test("each pixel becomes scale × scale pixels at its place, smaller pictures are centred, gaps stay white")
  func placement() throws {
    let large = pattern(width: 8, height: 6), small = pattern(width: 4, height: 2, seed: 3)
    let image = try Grid(rows: [.init(cells: [.init(large), .init(nil), .init(small)])], scale: 2).render()
    // Columns of 16 + 8 from x = 16; the small picture sits (16 − 8)/2 = 4 right of, (12 − 4)/2 = 4 below its corner.
    var expected = Image(width: 16 + 3 * 16 + 2 * 8 + 16, height: 16 + 12 + 16)
    for (picture, left, top) in [(large, 16, 16), (small, 16 + 48 + 4, 20)] {
      for y in 0..<(2 * picture.height) {
        for x in 0..<(2 * picture.width) {
          let to = 3 * ((top + y) * expected.width + left + x)
          expected.pixels.replaceSubrange(to..<(to + 3), with: picture[x / 2, y / 2])
        }
      }
    }
    #expect(image == expected)
  }

  @Test("texts of any length stay in their place: pictures untouched, margins white")
  func texts() throws {
    let long = String(repeating: "many words and 日本語 🙂 \u{0}\n", count: 60)
    let picture = pattern(width: 40, height: 40)
    let cells = (0..<3).map { Grid.Cell(picture, caption: $0 == 1 ? long : "0.123456789") }
    let grid = Grid(
      title: long, columns: [long, "b", long, "too many"],
      rows: [.init(long, cells: cells), .init(String(repeating: "x", count: 500), cells: cells)], scale: 1)
    let image = try grid.render(), layout = try Grid.Layout(grid)
    let corner = layout.origin(row: 0, column: 0)
    var labels = 0, headers = 0
    for y in 0..<image.height {
      for x in 0..<image.width {
        let edge = x < 8 || x >= image.width - 8 || y < 8 || y >= image.height - 8
        if edge { #expect(image[x, y] == [255, 255, 255]) }
        guard image[x, y][0] < 128 else { continue }
        if x < corner.x { labels += 1 }
        if y < corner.y { headers += 1 }
      }
    }
    #expect(labels > 500 && headers > 500)  // texts are there: some words of at least 20 dark pixels a letter
    for row in 0..<2 {
      for column in 0..<3 {
        let origin = layout.origin(row: row, column: column)
        for y in 0..<40 {
          for x in 0..<40 { #expect(image[origin.x + x, origin.y + y] == picture[x, y]) }
        }
        // Nothing reaches into the gap to the right, beside the picture and its caption.
        for y in 0..<58 {
          for x in 41..<47 { #expect(image[origin.x + x, origin.y + y] == [255, 255, 255]) }
        }
      }
    }
  }

  @Test("grids that cannot be drawn are refused by name")
  func invalid() {
    let picture = Image(width: 4, height: 4), row = Grid.Row(cells: [.init(picture)])
    var broken = picture
    broken.pixels = []
    let grids = [
      (Grid(rows: []), "none of the 0 rows"),
      (Grid(rows: [.init("a", cells: [.init(nil)])]), "none of the 1"),
      (Grid(rows: [row], scale: 0), "scale 0"), (Grid(rows: [row], labelWidth: -1), "labelWidth -1"),
      (Grid(rows: [row], scale: .max), "at most 32767"), (Grid(rows: [row], scale: 9000), "1 to 32767"),
      (Grid(rows: [.init(cells: [.init(broken)])]), "0 bytes"),
    ]
    for (grid, reason) in grids {
      let error = #expect(throws: PictureError.self) { try grid.render() }
      #expect(error?.description.contains(reason) == true, "\(String(describing: error))")
    }
  }
}
