"""The scorers. Models of gigabytes cannot be had in tests: each test says what stands in their place."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, png, published
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from chunkgrpo_rewards.geneval_rules import CLASSES, COLOURS, Detection
from chunkgrpo_rewards.scorers import geneval, make
from chunkgrpo_rewards.scorers.clip import CLIP

TINY_CLIP = str(Path(__file__).resolve().parents[2] / "Tests/Fixtures/parity/clip-tiny-quickgelu")


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return CLIP(TINY_CLIP, device="cpu")


def test_clip_of_a_tiny_folder_is_the_cosine_of_transformers(serve):
    images = [Image.fromarray(noise(i, 40, 60)) for i in range(3)]
    prompts = ["a red dog", "two cats", "a sign that says " + "very " * 200]
    model, processor = CLIPModel.from_pretrained(TINY_CLIP).eval(), AutoProcessor.from_pretrained(TINY_CLIP)
    inputs = processor(
        text=prompts, images=images, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        # transformers' own normalised, scaled similarities; the scale is divided out.
        expected = (model(**inputs).logits_per_image / model.logit_scale.exp()).diag()
    server = serve(make("clip", {"model": TINY_CLIP, "device": "cpu"}))
    body = published(prompts, [png(np.asarray(image)) for image in images])
    # float32 of two orders of multiplication.
    assert server.compute(body).json["rewards"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_hpsv3_adapter_against_a_fake_module_of_the_interface_of_hpsv3_1_0_0(monkeypatch, tmp_path, serve):
    made, gradients = [], []

    class HPSv3RewardInferencer:
        def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
            made.append((config_path, checkpoint_path, device, differentiable))

        def reward(self, image_paths, prompts):
            gradients.append(torch.is_grad_enabled())
            mu = torch.tensor([image.width + len(prompt) for image, prompt in zip(image_paths, prompts)])
            return torch.stack([mu.float(), torch.full((len(prompts),), 99.0)], 1)

    fake = types.ModuleType("hpsv3")
    fake.HPSv3RewardInferencer = HPSv3RewardInferencer
    monkeypatch.setitem(sys.modules, "hpsv3", fake)
    monkeypatch.delitem(sys.modules, "chunkgrpo_rewards.scorers.hpsv3", raising=False)
    weights = tmp_path / "HPSv3.safetensors"
    weights.touch()
    server = serve(make("hpsv3", {"model": str(weights), "device": "cpu"}))
    answer = server.compute(published(["ab", "c"], [png(noise(0, 4, 10)), png(noise(0, 4, 20))]))
    assert answer.json == {"rewards": [12.0, 21.0]}
    assert made == [(None, str(weights), "cpu", False)] and gradients == [False]
    with pytest.raises(Exception, match="no file /no/such: put HPSv3.safetensors of MizzenAI/HPSv3 there"):
        make("hpsv3", {"model": "/no/such", "device": "cpu"})


def test_imagereward_adapter_against_a_fake_module_of_the_interface_of_image_reward_1_5(monkeypatch, serve):
    loaded, gradients = [], []

    class Model:
        def score(self, prompt, image):
            assert isinstance(prompt, str) and isinstance(image, Image.Image)
            gradients.append(torch.is_grad_enabled())
            return image.width - len(prompt)

    def load(name="ImageReward-v1.0", device="cuda", download_root=None, med_config=None):
        loaded.append((name, device, download_root, med_config))
        return Model()

    fake = types.ModuleType("ImageReward")
    fake.load = load
    monkeypatch.setitem(sys.modules, "ImageReward", fake)
    monkeypatch.delitem(sys.modules, "chunkgrpo_rewards.scorers.imagereward", raising=False)
    server = serve(make("imagereward", {"device": "cpu"}))
    answer = server.compute(published(["ab", "c"], [png(noise(0, 4, 10)), png(noise(0, 4, 20))]))
    assert answer.json == {"rewards": [8.0, 19.0]}
    assert loaded == [("ImageReward-v1.0", "cpu", None, None)] and gradients == [False, False]


def test_crop_is_the_box_with_grey_outside_the_mask():
    pixels = noise(3, 10, 12)
    mask = np.zeros((10, 12), dtype=bool)
    mask[2:5, 3:9] = True
    mask[2, 3] = False
    cut = np.asarray(geneval.crop(Image.fromarray(pixels), Detection("dog", 1, (3.0, 2.0, 9.0, 5.0), mask)))
    expected = pixels[2:5, 3:9].copy()
    expected[0, 0] = 0x99
    np.testing.assert_array_equal(cut, expected)
    # Without a mask the box alone; outside the image or without area, one pixel.
    assert geneval.crop(Image.fromarray(pixels), Detection("dog", 1, (-3, 2, 99, 5))).size == (12, 3)
    assert geneval.crop(Image.fromarray(pixels), Detection("dog", 1, (11.7, 2, 11.9, 2.2))).size == (1, 1)


def test_colour_classifier_is_the_zero_shot_classifier_computed_with_transformers(clip):
    image = Image.fromarray(noise(5, 60, 80))
    found = [Detection("dog", 1, (0, 0, 40, 60)), Detection("dog", 1, (40, 10, 80, 50))]
    model, processor = clip.model, clip.processor
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    with torch.no_grad():
        expected = []
        for colour in COLOURS:
            texts = [f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog", f"a photo of a {colour} object"]
            tokens = processor.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
            rows = unit(model(**tokens, pixel_values=torch.zeros(1, 3, 28, 28)).text_embeds)
            expected.append(unit(rows.mean(0)))
        expected = torch.stack(expected)
        crops = [image.crop((0, 0, 40, 60)), image.crop((40, 10, 80, 50))]
        pixels = processor.image_processor(images=crops, return_tensors="pt")["pixel_values"]
        embedded = unit(model(input_ids=tokens["input_ids"][:1], pixel_values=pixels).image_embeds)
    colours = geneval.ColourClassifier(clip)
    # float32 of one forward pass in another batch.
    torch.testing.assert_close(colours.classifier("dog"), expected, rtol=0, atol=2e-6)
    assert colours(image, found, "dog") == [COLOURS[i] for i in (embedded @ expected.T).argmax(1).tolist()]


def test_instances_of_hand_made_logits():
    # Query 0 is surely class 1, query 1 is class 0 or nothing with odds of 1; the last column is "nothing".
    classes = torch.tensor([[-50.0, 50.0, -50.0], [50.0, -50.0, 50.0]])
    masks = torch.full((2, 4, 6), -20.0)
    masks[0, 1:3, 2:5] = np.log(3)  # probability ¾
    masks[1, 0, 0] = 40
    found = geneval.instances(classes, masks, limit=2)
    assert found.labels.tolist() == [1, 0]
    # 1·¾ and ½·1; 1e-6 in the denominator is published too.
    assert found.scores.tolist() == pytest.approx([0.75, 0.5], abs=1e-5)
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    expected[0, 1:3, 2:5] = True
    expected[1, 0, 0] = True
    assert torch.equal(found.masks, expected)


def tiny_mask2former(folder: Path) -> str:
    """A Mask2Former folder with COCO's number of classes and random weights."""
    from transformers import (
        Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil, SwinConfig)

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12,
        num_labels=len(CLASSES))
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def test_mask2former_of_a_tiny_random_folder_gives_what_transformers_gives(tmp_path):
    detector = geneval.Mask2Former(tiny_mask2former(tmp_path), device="cpu")
    assert detector.classes == list(CLASSES)
    image = Image.fromarray(noise(1, 384, 384))
    found = detector.detect(image, least=0)
    inputs = detector.processor(images=image, return_tensors="pt")
    with torch.no_grad():
        output = detector.model(**inputs)
    # transformers scales masks to 384 × 384 at once and we by way of the network's input, so that edges may differ.
    theirs = detector.processor.post_process_instance_segmentation(
        output, threshold=0, target_sizes=[(384, 384)], return_binary_maps=True)[0]
    expected = sorted(
        ((s["score"], CLASSES[s["label_id"]]) for s in theirs["segments_info"]), reverse=True)
    assert found and len(expected) >= 3
    got = sorted(((d.score, d.name) for d in found), reverse=True)
    assert [name for _, name in got[:3]] == [name for _, name in expected[:3]]
    assert [score for score, _ in got[:3]] == pytest.approx([score for score, _ in expected[:3]], rel=0.02)
    for d in found:
        ys, xs = np.where(d.mask)
        assert d.mask.shape == (384, 384) and d.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


class Detector:
    """A detector that a user might plug in: red pixels are a dog, blue ones a cat."""

    classes = ["dog", "cat"]

    def __call__(self, images):
        answers = []
        for image in images:
            pixels = np.asarray(image)
            found = []
            for name, channel in (("dog", 0), ("cat", 2)):
                mask = (pixels[..., channel] > 200) & (pixels[..., 1] < 50)
                if mask.any():
                    ys, xs = np.where(mask)
                    box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
                    found.append(Detection(name, 0.99, box, mask))
            answers.append(found)
        return answers


def test_geneval_with_a_detector_of_ones_own_over_http(monkeypatch, serve):
    monkeypatch.setitem(sys.modules, "detector_of_the_test", sys.modules[__name__])
    scorer = make("geneval", {
        "model": "detector_of_the_test:Detector", "clip": TINY_CLIP, "device": "cpu", "score": "partial"})
    left, right = np.full((2, 40, 60, 3), 128, dtype=np.uint8)
    left[10:30, 5:20], left[10:30, 40:55] = (255, 0, 0), (0, 0, 255)  # dog, then cat
    right[10:30, 40:55], right[10:30, 5:20] = (255, 0, 0), (0, 0, 255)
    scene = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}], "relation": "left of"}
    body = published(["a dog left of a cat"] * 4, [png(left), png(right), png(left), png(left)])
    server = serve(scorer)
    answer = server.compute(body | {"metadata": [scene, scene, None, {"include": [{"class": "horse"}]}]})
    assert answer.json["rewards"] == [1.0, pytest.approx(2 / 3), None, None]
    assert answer.json["errors"] == [
        None, None, "the prompt has no metadata with an include list to judge the image by",
        'include[0]: the detector knows no "horse"']


def test_geneval_of_tiny_random_folders_warms_up_and_scores(tmp_path):
    scorer = make("geneval", {"model": tiny_mask2former(tmp_path), "clip": TINY_CLIP, "device": "cpu"})
    from chunkgrpo_rewards.cli import warm_up

    warm_up(scorer)
    # Random weights find nothing: an empty image is a score of 0, not a failure.
    assert scorer([Image.fromarray(noise(0, 50, 70))], ["a dog"], [{"include": [{"class": "dog"}]}]) == [0.0]


def test_importing_the_package_imports_no_model_library():
    code = "import sys, chunkgrpo_rewards.cli; print(sorted({'torch', 'transformers', 'hpsv3'} & set(sys.modules)))"
    import subprocess

    folder = Path(importlib.import_module("chunkgrpo_rewards").__file__).parents[1]
    printed = subprocess.run([sys.executable, "-c", code], cwd=folder, text=True, capture_output=True, check=True)
    assert printed.stdout == "[]\n"
