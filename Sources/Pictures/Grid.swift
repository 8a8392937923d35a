import Foundation

/// Pictures in rows with labels, column headers and captions, on white.
///
/// Text is set in DejaVu Sans; scripts that it lacks (Chinese, Japanese, emoji) show as boxes.
public struct Grid: Sendable, Equatable {
  /// One place of the grid.
  public struct Cell: Sendable, Equatable {
    /// The picture; `nil` leaves the place empty.
    public var image: Image?
    /// One line under the picture, such as its score; shortened to the cell's width.
    public var caption: String

    /// A picture with a caption.
    public init(_ image: Image?, caption: String = "") { (self.image, self.caption) = (image, caption) }
  }

  /// Pictures side by side, described by one label.
  public struct Row: Sendable, Equatable {
    /// Text left of the pictures, such as their prompt; wrapped, and shortened to the row's height.
    public var label: String
    /// From the left; rows may differ in length.
    public var cells: [Cell]

    /// A row of cells.
    public init(_ label: String = "", cells: [Cell]) { (self.label, self.cells) = (label, cells) }
  }

  /// One line above everything; empty for none.
  public var title: String
  /// Texts above the columns, from the left; may be empty or shorter than the rows.
  public var columns: [String]
  /// From the top.
  public var rows: [Row]
  /// Each pixel of a picture becomes `scale`×`scale` pixels, without smoothing.
  public var scale: Int
  /// Width of the label column, which is left out when no row has a label.
  public var labelWidth: Int

  /// A grid to render.
  public init(title: String = "", columns: [String] = [], rows: [Row], scale: Int = 1, labelWidth: Int = 180)
  {
    (self.title, self.columns, self.rows) = (title, columns, rows)
    (self.scale, self.labelWidth) = (scale, labelWidth)
  }

  /// Draws the grid.
  ///
  /// - Throws: ``PictureError/invalid(_:)`` for a grid without pictures, a scale below 1, a negative label
  ///   width, or a result over 32767 pixels on a side.
  public func render() throws(PictureError) -> Image {
    let layout = try Layout(self)
    let canvas = try Canvas(width: layout.width, height: layout.height)
    let cellWidth = Double(layout.cellWidth)
    if !title.isEmpty {
      canvas.font(size: 15, bold: true)
      let text = canvas.fitted(title, width: Double(layout.width - 2 * Layout.margin))
      canvas.text(text, x: Double(Layout.margin), y: Double(Layout.margin + 15), .ink)
    }
    canvas.font(size: 12, bold: true)
    for (column, header) in columns.prefix(layout.columns).enumerated() {
      let origin = layout.origin(row: 0, column: column)
      canvas.text(
        canvas.fitted(header, width: cellWidth), x: Double(origin.x) + cellWidth / 2, y: Double(origin.y - 8),
        .ink, anchor: .middle)
    }
    canvas.font(size: 12)
    for (row, content) in rows.enumerated() {
      let lineHeight = 16.0,
        middle = Double(layout.origin(row: row, column: 0).y) + Double(layout.cellHeight) / 2
      let lines = canvas.wrapped(
        content.label, width: Double(labelWidth), lines: max(1, layout.cellHeight / Int(lineHeight)))
      for (index, line) in lines.enumerated() {
        let offset = (Double(index) - Double(lines.count - 1) / 2) * lineHeight
        canvas.text(line, x: Double(Layout.margin), y: middle + offset + 4, .ink)
      }
    }
    canvas.font(size: 11)
    for (row, content) in rows.enumerated() {
      for (column, cell) in content.cells.enumerated() where !cell.caption.isEmpty {
        let origin = layout.origin(row: row, column: column)
        canvas.text(
          canvas.fitted(cell.caption, width: cellWidth), x: Double(origin.x) + cellWidth / 2,
          y: Double(origin.y + layout.cellHeight + 13), .muted, anchor: .middle)
      }
    }
    // Pictures are copied after the text is drawn: their pixels stay exactly what they were.
    var image = try canvas.image()
    for (row, content) in rows.enumerated() {
      for (column, cell) in content.cells.enumerated() {
        guard let picture = cell.image else { continue }
        let origin = layout.origin(row: row, column: column)
        image.place(
          picture, x: origin.x + (layout.cellWidth - picture.width * scale) / 2,
          y: origin.y + (layout.cellHeight - picture.height * scale) / 2, scale: scale)
      }
    }
    return image
  }

  /// Draws the grid and writes it; whole or not at all.
  ///
  /// - Throws: ``PictureError`` as ``render()`` does, or when the file cannot be written.
  public func write(png file: URL) throws(PictureError) { try render().write(png: file) }

  /// Where everything goes, in pixels; cells are as large as the largest picture, smaller ones are centred.
  struct Layout {
    static let margin = 16, gap = 8
    let columns, cellWidth, cellHeight, width, height: Int
    private let left, top, rowHeight: Int

    init(_ grid: Grid) throws(PictureError) {
      guard grid.scale >= 1, grid.labelWidth >= 0 else {
        throw .invalid("Grid: scale \(grid.scale) and labelWidth \(grid.labelWidth), need at least 1 and 0")
      }
      let images = grid.rows.flatMap(\.cells).compactMap(\.image)
      for image in images { try image.validate() }
      guard let widest = images.map(\.width).max(), let tallest = images.map(\.height).max() else {
        throw .invalid("Grid: none of the \(grid.rows.count) rows has a picture")
      }
      // Checked before multiplying: both factors come from the caller.
      guard max(widest, tallest, grid.scale, grid.labelWidth) <= 32767 else {
        throw .invalid("Grid: pictures, scale and labelWidth must be at most 32767")
      }
      let hasLabels = grid.rows.contains { !$0.label.isEmpty }
      let hasCaptions = grid.rows.flatMap(\.cells).contains { !$0.caption.isEmpty }
      columns = grid.rows.map(\.cells.count).max() ?? 0
      (cellWidth, cellHeight) = (widest * grid.scale, tallest * grid.scale)
      left = Self.margin + (hasLabels ? grid.labelWidth + 2 * Self.gap : 0)
      top = Self.margin + (grid.title.isEmpty ? 0 : 30) + (grid.columns.isEmpty ? 0 : 22)
      rowHeight = cellHeight + (hasCaptions ? 18 : 0) + Self.gap
      width = left + columns * (cellWidth + Self.gap) - Self.gap + Self.margin
      height = top + grid.rows.count * rowHeight - Self.gap + Self.margin
    }

    /// Top-left corner of a cell's picture area.
    func origin(row: Int, column: Int) -> (x: Int, y: Int) {
      (left + column * (cellWidth + Self.gap), top + row * rowHeight)
    }
  }
}
