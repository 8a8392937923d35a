import CCairo

extension Image {
  /// The picture with `factor` × `factor` pixels for each, interpolated bilinearly.
  ///
  /// - Throws: ``PictureError/invalid(_:)`` when ``pixels`` does not match the size or a side would exceed 32767.
  public func enlarged(_ factor: Int) throws(PictureError) -> Image {
    precondition(factor > 0, "Image: factor \(factor), need at least 1")
    try validate()
    if factor == 1 { return self }
    let canvas = try Canvas(width: width * factor, height: height * factor, scale: Double(factor))
    try Canvas(self).withSurface { surface in
      cairo_set_source_surface(canvas.context, surface, 0, 0)
      cairo_pattern_set_filter(cairo_get_source(canvas.context), CAIRO_FILTER_BILINEAR)
      // Else the edges fade into the canvas.
      cairo_pattern_set_extend(cairo_get_source(canvas.context), CAIRO_EXTEND_PAD)
      cairo_paint(canvas.context)
    }
    return try canvas.image()
  }
}
