"""HPSv3, from the package of its authors."""

from __future__ import annotations

import os
from typing import Any

# First: where it is missing, nobody waits for torch to learn that.
from hpsv3 import HPSv3RewardInferencer  # isort: skip
import torch
from PIL import Image

from . import device as pick


class HPSv3:
    """The mean μ of HPSv3's two outputs for an image and its prompt.

    Source: hpsv3 1.0.0, hpsv3/inference.py: `HPSv3RewardInferencer.reward(images, prompts)` is [B, 2], μ and σ.

    `model` is HPSv3.safetensors, `config` the package's YAML file; empty takes what the package downloads.
    """

    def __init__(self, model: str = "", config: str = "", device: str = "auto"):
        if model and not os.path.isfile(model):
            raise FileNotFoundError(f"no file {model}: put HPSv3.safetensors of MizzenAI/HPSv3 there")
        self.inferencer = HPSv3RewardInferencer(
            config_path=config or None, checkpoint_path=model or None, device=pick(device))

    def __call__(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> list[float]:
        # The package leaves gradients on: without this a batch keeps all its activations.
        with torch.no_grad():
            return self.inferencer.reward(images, prompts)[:, 0].float().tolist()
