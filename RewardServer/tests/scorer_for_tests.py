"""What a user writes: found by name through the folder that the server was started in."""

import os
import time


def widths(images, prompts):
    return [image.width for image in images]


def from_metadata(images, prompts, metadata):
    return [entry["value"] if entry else None for entry in metadata]


def slow(images, prompts):
    time.sleep(float(os.environ.get("SLOW_SECONDS", "1")))
    return [float(len(prompt)) for prompt in prompts]


def broken(images, prompts):
    raise RuntimeError("no such file weights.bin")


class Scaled:
    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, images, prompts):
        return [self.factor * image.width for image in images]
