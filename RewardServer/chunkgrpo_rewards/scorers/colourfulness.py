"""Hasler and Süsstrunk's colourfulness: a real reward without weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


class Colourfulness:
    """√(σ²_rg + σ²_yb) + 0.3·√(μ²_rg + μ²_yb) on pixels in 0 … 1, rg = R − G, yb = (R + G)/2 − B, population σ.

    Source: Hasler & Süsstrunk, Measuring colourfulness in natural images, SPIE 5007 (2003), the metric that needs no
    CIELab. The same numbers as chunkgrpo's own reward `colourfulness`.
    """

    def __call__(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> list[float]:
        return [self.score(image) for image in images]

    @staticmethod
    def score(image: Image.Image) -> float:
        """The colourfulness of one RGB image."""
        red, green, blue = np.moveaxis(np.asarray(image, dtype=np.float64) / 255, -1, 0)
        rg, yb = red - green, (red + green) / 2 - blue
        return float(np.sqrt(rg.var() + yb.var()) + 0.3 * np.hypot(rg.mean(), yb.mean()))
