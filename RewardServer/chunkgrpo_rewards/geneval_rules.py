"""GenEval's verdict on an image as a pure function of detections.

Source: djghosh13/geneval@af4902f evaluation/evaluate_images.py, with its default options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Sequence

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(","))
"""GenEval's names of COCO's 80 classes, in COCO's order."""


@dataclass(frozen=True)
class Detection:
    """One object: its class, the detector's confidence, corners (x0, y0, x1, y1) in pixels, and perhaps a mask."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Any = None
    """Booleans [H, W] of the image's size, or None."""


@dataclass(frozen=True)
class Rules:
    """GenEval's numbers."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    """In place of `threshold` for prompts with the tag `counting`."""
    position_threshold: float = 0.1
    max_objects: int = 16
    """Of one class."""


@dataclass(frozen=True)
class Verdict:
    """What became of an image's clauses."""

    correct: bool
    """GenEval's own: at least the counts of `include`, less than those of `exclude`."""
    strict: bool
    """Exactly the counts of `include`, the reward of yifan123/reward-server@92ac29f reward_server/gen_eval.py."""
    partial: float
    """Mean over the clauses of `include`, 0 … 1. As in that server, but a count that is missed by more than itself is
    worth 0, not less, and a position that is wrong is worth 0, where the server adds a further 1."""
    reasons: tuple[str, ...]
    """Why it is not correct, or not strict."""


class BadMetadata(ValueError):
    """Metadata that no image can be judged by."""


Colours = Callable[[Sequence[Detection], str], Sequence[str]]
"""The colour of each of these objects of a class."""


def clauses(metadata: Any, known: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`include` and `exclude` with counts, checked; chunkgrpo's `relation` becomes a position of the second class."""
    if not isinstance(metadata, dict) or not metadata.get("include"):
        raise BadMetadata("the prompt has no metadata with an include list to judge the image by")
    parts: list[list[dict[str, Any]]] = []
    for key in ("include", "exclude"):
        parts.append([])
        for i, entry in enumerate(metadata.get(key) or []):
            where = f"{key}[{i}]"
            if not isinstance(entry, dict) or not isinstance(entry.get("class"), str):
                raise BadMetadata(f"{where}: expected an object with a class")
            if entry["class"] not in known:
                raise BadMetadata(f"{where}: the detector knows no \"{entry['class']}\"")
            count = entry.get("count", 1)
            if not isinstance(count, int) or count < 1:
                raise BadMetadata(f"{where}: expected a count ≥ 1, got {count}")
            if entry.get("color") is not None and entry["color"] not in COLOURS:
                raise BadMetadata(f"{where}: color \"{entry['color']}\" is not one of {', '.join(COLOURS)}")
            if entry.get("position") is not None:
                position = entry["position"]
                if not (isinstance(position, (list, tuple)) and len(position) == 2 and position[0] in RELATIONS
                        and isinstance(position[1], int) and 0 <= position[1] < i):
                    raise BadMetadata(f"{where}: expected a position such as [\"left of\", 0], got {position}")
            parts[-1].append({**entry, "count": count})
    include, exclude = parts
    if (relation := metadata.get("relation")) is not None:
        if relation not in RELATIONS or len(include) != 2:
            raise BadMetadata(f"relation \"{relation}\": expected one of {', '.join(RELATIONS)} and two classes")
        # "The first is left of the second" is "the second is right of the first".
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        include[1]["position"] = [opposite[relation], 0]
    return include, exclude


def relations(a: Detection, b: Detection, threshold: float = 0.1) -> set[str]:
    """Where a lies seen from b, y downwards; none where the centres are closer than `threshold` of both sizes.

    A direction holds if it has more than half of the distance, so that two may hold at once.
    """
    offset, reduced = [], []
    for axis in (0, 1):
        (a0, a1), (b0, b1) = a.box[axis::2], b.box[axis::2]
        d = (a0 + a1) / 2 - (b0 + b1) / 2
        offset.append(d)
        reduced.append(math.copysign(max(abs(d) - threshold * (abs(a1 - a0) + abs(b1 - b0)), 0), d))
    if max(map(abs, reduced)) < 1e-3:
        return set()
    dx, dy = (r / math.hypot(*offset) for r in reduced)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, yes in holds.items() if yes}


def objects(detections: Sequence[Detection], tag: str, rules: Rules = Rules()) -> dict[str, list[Detection]]:
    """Confident detections by class, the most confident first."""
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold and len(found.get(detection.name, [])) < rules.max_objects:
            found.setdefault(detection.name, []).append(detection)
    return found


def judge(
    detections: Sequence[Detection], metadata: Any, colours: Colours, *, known: Sequence[str] = CLASSES,
    rules: Rules = Rules(),
) -> Verdict:
    """Judges one image. `colours` is asked only for objects that a coloured clause is about."""
    include, exclude = clauses(metadata, known)
    found = objects(detections, str(metadata.get("tag", "")), rules)
    correct, correct_reasons, _ = _check(include, found, colours, rules, exact=False)
    strict, strict_reasons, parts = _check(include, found, colours, rules, exact=True)
    for clause in exclude:
        n = len(found.get(clause["class"], []))
        if n >= clause["count"]:
            correct = False
            correct_reasons.append(f"expected {clause['class']}<{clause['count']}, found {n}")
    reasons = dict.fromkeys(correct_reasons + strict_reasons)
    return Verdict(correct, strict, sum(parts) / len(parts), tuple(reasons))


def _check(
    include: list[dict[str, Any]], found: dict[str, list[Detection]], colours: Colours, rules: Rules, exact: bool
) -> tuple[bool, list[str], list[float]]:
    correct, reasons, parts = True, [], []
    groups: list[list[Detection] | None] = []

    def closeness(n: int, wanted: int) -> float:
        return max(0.0, 1 - abs(wanted - n) / wanted)

    for clause in include:
        name, count = clause["class"], clause["count"]
        colour, position = clause.get("color"), clause.get("position")
        group = found.get(name, [])
        wrong: list[str] = []
        parts.append(closeness(len(group), count))
        if len(group) != count if exact else len(group) < count:
            wrong.append(f"expected {name}{'==' if exact else '>='}{count}, found {len(group)}")
            if colour is not None or position is not None:
                parts.append(0.0)
        else:
            # Of more than enough, the most confident are looked at.
            group = group[:count]
            if colour is not None:
                n = list(colours(group, name)).count(colour)
                parts.append(closeness(n, count))
                if n < count:
                    wrong.append(f"expected {colour} {name}>={count}, found {n} {colour}")
            if position is not None and not wrong:
                relation, target = position[0], groups[position[1]]
                holds = target is not None and all(
                    relation in relations(a, b, rules.position_threshold) for a in group for b in target)
                parts.append(float(holds))
                if target is None:
                    wrong.append(f"no target for {name} to be {relation}")
                elif not holds:
                    wrong.append(f"expected {name} {relation} {include[position[1]]['class']}")
        groups.append(None if wrong else group)
        reasons += wrong
        correct = correct and not wrong
    return correct, reasons, parts
