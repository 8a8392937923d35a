"""What a request must look like, and the images in it.

Source of the published form: X-GenGroup/Flow-Factory@a0b2bc5 src/flow_factory/rewards/my_reward_remote.py#L61-L82.
`metadata` is an extension: the JSON object of each prompt, or null.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Limits:
    """What one request may hold at most."""

    images: int = 64
    body: int = 256 << 20
    """Bytes."""
    pixels: int = 16 << 20
    """Of one image: a small file can unpack to gigabytes."""


class Refused(Exception):
    """A request that is answered with `status` and the reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass
class Sample:
    """One image to score."""

    image: Image.Image
    prompt: str
    metadata: dict[str, Any] | None = None


@dataclass
class Request:
    """A request of the right form whose images are not decoded yet."""

    prompts: list[str]
    images: list[str]
    metadata: list[dict[str, Any] | None]

    def samples(self, limits: Limits) -> list[Sample]:
        """Decodes the images."""
        return [
            Sample(decode(image, f"image[{i}]", limits), prompt, metadata)
            for i, (image, prompt, metadata) in enumerate(zip(self.images, self.prompts, self.metadata))
        ]


def parse(body: bytes, limits: Limits) -> Request:
    """Reads a request; raises Refused with the key, what was expected and what was there."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Refused(400, f"the body: expected an object, got {_kind(fields)}")
    for key in ("video", "condition_images", "condition_videos"):
        if fields.get(key):
            raise Refused(400, f"{key}: expected null, since this server scores images, got {_kind(fields[key])}")
    prompts = _list(fields, "prompt", str, "strings")
    images = _list(fields, "image", str, "base64 strings")
    if len(images) > limits.images:
        raise Refused(413, f"{len(images)} images in one request, at most {limits.images}: send fewer at a time")
    if len(prompts) != len(images):
        raise Refused(400, f"{len(prompts)} prompts but {len(images)} images: send one prompt an image")
    if not images:
        raise Refused(400, "image: expected at least one, got an empty list")
    metadata: list[dict[str, Any] | None] = [None] * len(images)
    if fields.get("metadata") is not None:
        metadata = _list(fields, "metadata", (dict, type(None)), "objects or nulls")
        if len(metadata) != len(images):
            raise Refused(400, f"metadata: expected {len(images)} entries, one an image, got {len(metadata)}")
    return Request(prompts, images, metadata)


def decode(text: str, where: str, limits: Limits) -> Image.Image:
    """The RGB image of a base64 PNG or JPEG with 8 bits a channel; transparency is dropped."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, f"{where}: not base64") from None
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            # The size is in the header: nothing is unpacked before it is known.
            if image.width * image.height > limits.pixels:
                raise Refused(
                    400, f"{where}: {image.width} × {image.height} pixels, at most {limits.pixels} pixels an image")
            if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
                raise Refused(400, f"{where}: pixels of mode {image.mode}, expected 8 bits a channel, grey or RGB")
            return image.convert("RGB")
    except Refused:
        raise
    except Image.DecompressionBombError:
        raise Refused(400, f"{where}: too many pixels, at most {limits.pixels} pixels an image") from None
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error …
        raise Refused(400, f"{where}: {len(data)} bytes that are no PNG or JPEG that can be decoded") from None


def _list(fields: dict[str, Any], key: str, types: Any, what: str) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list):
        raise Refused(400, f"{key}: expected a list of {what}, got {_kind(value)}")
    for i, entry in enumerate(value):
        if not isinstance(entry, types):
            raise Refused(400, f"{key}[{i}]: expected one of a list of {what}, got {_kind(entry)}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}.get(type(value), "a number")
