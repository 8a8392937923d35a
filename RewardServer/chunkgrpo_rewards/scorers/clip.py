"""Cosine of image and prompt under a CLIP model, and what GenEval needs of CLIP."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from . import device as pick

# Models were trained on images that Pillow scaled: numbers must not depend on whether torchvision happens to be there.
PILLOW = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}


class CLIP:
    """Cosine similarity under a `CLIPModel` folder of transformers, with the folder's own preprocessing.

    Prompts are cut at the model's length, 77 tokens for the published ones.
    """

    def __init__(self, model: str = "openai/clip-vit-large-patch14", device: str = "auto", dtype: str = "float32"):
        self.device = pick(device)
        self.model = CLIPModel.from_pretrained(model).to(self.device, getattr(torch, dtype)).eval()
        self.processor = AutoProcessor.from_pretrained(model, **PILLOW)

    def __call__(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> list[float]:
        with torch.inference_mode():
            return (self.image_features(images) * self.text_features(prompts)).sum(-1).tolist()

    def image_features(self, images: list[Image.Image]) -> torch.Tensor:
        """Unit vectors, float32 [B, D]."""
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device, self.model.dtype)
        return unit(self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output))

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """Unit vectors, float32 [B, D]."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(self.device)
        return unit(self.model.text_projection(self.model.text_model(**tokens).pooler_output))


def unit(features: torch.Tensor) -> torch.Tensor:
    """Each row over its length, float32."""
    return torch.nn.functional.normalize(features.float(), dim=-1)
