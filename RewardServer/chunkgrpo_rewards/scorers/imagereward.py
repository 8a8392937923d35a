"""ImageReward, from the package of its authors."""

from __future__ import annotations

from typing import Any

import ImageReward as package
import torch
from PIL import Image

from . import device as pick


class ImageReward:
    """ImageReward-v1.0: about −2.3 … 2, mean 0 and deviation 1 over the authors' data.

    Source: image-reward 1.5, ImageReward/utils.py `load` and ImageReward/ImageReward.py `score(prompt, image)`.

    `model` is a name of the package or an ImageReward.pt, `config` its med_config.json; empty takes what the package
    downloads.
    """

    def __init__(self, model: str = "ImageReward-v1.0", config: str = "", device: str = "auto"):
        self.model = package.load(model, device=pick(device), med_config=config or None)

    def __call__(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> list[float]:
        # One by one, as the package itself does for lists. It leaves gradients on.
        with torch.no_grad():
            return [float(self.model.score(prompt, image)) for prompt, image in zip(prompts, images)]
