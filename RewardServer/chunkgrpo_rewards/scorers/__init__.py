"""Scorers by name. Nothing is imported before it is asked for: each model has requirements of its own."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any, Callable, Sequence

from PIL import Image

from ..batching import Scorer

NAMES = {
    "clip": "CLIP",
    "colourfulness": "Colourfulness",
    "geneval": "GenEval",
    "hpsv3": "HPSv3",
    "imagereward": "ImageReward",
}
"""Modules of this package and their scorers."""


class BadScorer(Exception):
    """A scorer that cannot be made as asked."""


def make(name: str, options: dict[str, str]) -> Scorer:
    """The scorer of a name above, or of `module:function` or `module:Class`; options go to its constructor."""
    if name in NAMES:
        try:
            module = importlib.import_module(f"{__name__}.{name}")
            return _construct(name, getattr(module, NAMES[name]), options)
        except ImportError as error:
            raise BadScorer(
                f"{name} needs a package that is not here ({error}): pip install 'chunkgrpo-rewards[{name}]'"
            ) from error
        except OSError as error:  # how transformers says that a folder or a download is missing
            raise BadScorer(f"{name}: {error}") from error
    target = find(name)
    if inspect.isclass(target):
        return adapt(_construct(name, target, options))
    if options:
        raise BadScorer(f"{name}: a function takes no options ({', '.join(options)}); write a class for that")
    return adapt(target)


def find(name: str) -> Any:
    """The function or class `module:attribute`, also from the folder that the server was started in."""
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise BadScorer(f"no scorer \"{name}\"; known: {', '.join(NAMES)}, or module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise BadScorer(f"{name}: cannot import {module_name}: {error}") from error
    target = getattr(module, attribute, None)
    if not callable(target):
        has = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise BadScorer(f"{name}: {module_name} has no function or class {attribute}; it has {has or 'none'}")
    return target


def adapt(function: Callable[..., Sequence[Any]]) -> Scorer:
    """Calls `function` with metadata only if it has such a parameter."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.name == "metadata" or p.kind is p.VAR_KEYWORD for p in parameters):
        return function

    def without_metadata(images: list[Image.Image], prompts: list[str], metadata: Any = None) -> Sequence[Any]:
        return function(images, prompts)

    return without_metadata


def _construct(name: str, kind: type, options: dict[str, str]) -> Any:
    """`kind(**options)`, each option of the type of the parameter's default."""
    known = {p.name: p for p in inspect.signature(kind).parameters.values()}
    arguments: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            raise BadScorer(f"{name} has no option {key}; it has {', '.join(known) or 'none'}")
        convert = {int: int, float: float}.get(type(known[key].default), str)
        try:
            arguments[key] = convert(text)
        except ValueError:
            raise BadScorer(f"{name} {key}: expected a number, got \"{text}\"") from None
    missing = [key for key, p in known.items() if p.default is p.empty and key not in arguments
               and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing:
        raise BadScorer(f"{name} needs {', '.join(missing)}: pass --option {missing[0]}=…")
    return kind(**arguments)


def device(name: str) -> str:
    """`auto`: the GPU if there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
