"""GenEval's rules with a detector and CLIP from transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np
import torch
from PIL import Image

from ..geneval_rules import CLASSES, COLOURS, BadMetadata, Detection, Rules, clauses, judge
from . import BadScorer, find
from . import device as pick
from .clip import CLIP, PILLOW, unit


class GenEval:
    """Whether an image shows the counts, colours and positions of its prompt's metadata.

    `model` is a Mask2Former folder for COCO instances of transformers, or `module:Class` of a detector of yours: called
    with a list of images it returns a list of ``Detection`` for each, and its `classes` are the names it knows. `clip` is
    the CLIP folder that tells colours. `score` is `correct` (GenEval's), `strict` (exact counts) or `partial` (0 … 1).

    The published GenEval runs mmdet's own Mask2Former weights with these rules: numbers are near it, not equal.
    """

    def __init__(
        self, model: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14", score: str = "correct", device: str = "auto",
        threshold: float = 0.3, counting_threshold: float = 0.9, position_threshold: float = 0.1,
    ):
        if score not in ("correct", "strict", "partial"):
            raise BadScorer(f"geneval score: expected correct, strict or partial, got \"{score}\"")
        self.score = score
        self.rules = Rules(threshold, counting_threshold, position_threshold)
        self.detector = find(model)() if ":" in model else Mask2Former(model, device)
        self.colours = ColourClassifier(CLIP(clip, device))
        self.warm_up = {"include": [{"class": self.detector.classes[0], "count": 1, "color": "red"}]}

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: Sequence[Any]
    ) -> list[float | Exception]:
        scores: list[float | Exception] = []
        known = self.detector.classes
        judged = []
        for entry in metadata:
            try:
                clauses(entry, known)
                judged.append(None)
            except BadMetadata as error:
                judged.append(error)
        wanted = [image for image, error in zip(images, judged) if error is None]
        detections = iter(self.detector(wanted) if wanted else [])
        for image, entry, error in zip(images, metadata, judged):
            if error is not None:
                scores.append(error)
                continue
            verdict = judge(
                next(detections), entry, lambda objects, name: self.colours(image, objects, name), known=known,
                rules=self.rules)
            scores.append(float(getattr(verdict, self.score)))
        return scores


class ColourClassifier:
    """The most likely of GenEval's ten colours, by CLIP on each object's crop with what is not the object painted grey.

    Source: djghosh13/geneval@af4902f evaluation/evaluate_images.py#L81-L125; the zero-shot classifier of a class is the
    mean of three prompts' unit vectors.
    """

    def __init__(self, clip: CLIP):
        self.clip = clip
        self._classifiers: dict[str, torch.Tensor] = {}

    def __call__(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        with torch.inference_mode():
            likeness = self.clip.image_features([crop(image, o) for o in objects]) @ self.classifier(name).T
        return [COLOURS[i] for i in likeness.argmax(1).tolist()]

    def classifier(self, name: str) -> torch.Tensor:
        """Unit vectors of the ten colours, float32 [10, D]."""
        if name not in self._classifiers:
            texts = [text for c in COLOURS for text in (
                f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object")]
            features = self.clip.text_features(texts)
            self._classifiers[name] = unit(features.reshape(len(COLOURS), 3, -1).mean(1))
        return self._classifiers[name]


def crop(image: Image.Image, found: Detection) -> Image.Image:
    """The object's box, at least one pixel of it, on grey #999 where there is a mask."""
    if found.mask is not None:
        blank = Image.new("RGB", image.size, "#999")
        image = Image.composite(image, blank, Image.fromarray(np.asarray(found.mask, dtype=bool)))
    x0, y0, x1, y1 = (round(v) for v in found.box)
    x0, y0 = min(max(x0, 0), image.width - 1), min(max(y0, 0), image.height - 1)
    return image.crop((x0, y0, min(max(x1, x0 + 1), image.width), min(max(y1, y0 + 1), image.height)))


@dataclass
class Instances:
    """Instances of one image, most confident first."""

    scores: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    """Booleans [N, H, W]."""


def instances(class_logits: torch.Tensor, mask_logits: torch.Tensor, limit: int = 100) -> Instances:
    """What Mask2Former's outputs for one image mean: queries [Q, classes + 1] and masks [Q, H, W].

    The `limit` best pairs of query and class; confidence is the class's probability times the mean of the mask's
    probabilities where they exceed ½. Source: open-mmlab/mmdetection v2 MaskFormerFusionHead.instance_postprocess.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    scores, order = probabilities.flatten().topk(min(limit, probabilities.numel()))
    queries, labels = order // probabilities.shape[1], order % probabilities.shape[1]
    logits = mask_logits[queries]
    masks = logits > 0
    inside = masks.float()
    scores = scores * (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    order = scores.argsort(descending=True, stable=True)
    return Instances(scores[order], labels[order], masks[order])


class Mask2Former:
    """COCO instances of a Mask2Former folder of transformers."""

    def __init__(self, model: str, device: str = "auto"):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self.device = pick(device)
        self.processor = AutoImageProcessor.from_pretrained(model, **PILLOW)
        self.model = Mask2FormerForUniversalSegmentation.from_pretrained(model).to(self.device).eval()
        labels = self.model.config.id2label
        # COCO's order with GenEval's names: published folders call some of the classes otherwise.
        self.classes = list(CLASSES) if len(labels) == len(CLASSES) else [labels[i] for i in sorted(labels)]

    def __call__(self, images: list[Image.Image]) -> list[list[Detection]]:
        return [self.detect(image) for image in images]

    @torch.inference_mode()
    def detect(self, image: Image.Image, least: float = 0.05) -> list[Detection]:
        """Objects of at least a confidence that no sensible threshold is below."""
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        output = self.model(pixel_values=pixels)
        # Alone in its batch an image is not padded: to the network's input first, then to the image, as mmdet does.
        masks = output.masks_queries_logits
        for size in (pixels.shape[-2:], image.size[::-1]):
            masks = torch.nn.functional.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        found = instances(output.class_queries_logits[0].float(), masks[0].float())
        detections = []
        for score, label, mask in zip(found.scores.tolist(), found.labels.tolist(), found.masks.cpu().numpy()):
            if score < least or not mask.any():
                continue
            ys, xs = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            box = (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))
            detections.append(Detection(self.classes[label], score, box, mask))
        return detections
