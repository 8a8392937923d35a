"""GenEval's rules on hand-made detections: what each must give follows from the published rules by hand."""

from __future__ import annotations

import pytest

from chunkgrpo_rewards.geneval_rules import CLASSES, BadMetadata, Detection, judge, objects, relations


def at(name: str, x: float, y: float, size: float = 20, score: float = 0.95) -> Detection:
    return Detection(name, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def colours(by_x: dict[float, str]):
    """The colour of the object whose left edge is there."""
    return lambda found, name: [by_x[d.box[0]] for d in found]


def never(found, name):
    raise AssertionError(f"nobody asked for the colour of {name}")


def scores(detections, metadata, colour=never):
    verdict = judge(detections, metadata, colour)
    return verdict.correct, verdict.strict, verdict.partial


DOGS = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}


def test_there_are_cocos_eighty_classes():
    assert len(CLASSES) == len(set(CLASSES)) == 80 and (CLASSES[0], CLASSES[64], CLASSES[79]) == (
        "person", "computer mouse", "toothbrush")


@pytest.mark.parametrize("n, expected", [
    (0, (False, False, 0.0)), (1, (True, True, 1.0)), (2, (True, False, 0.0)), (5, (True, False, 0.0))])
def test_one_object(n, expected):
    assert scores([at("dog", 30 * i, 10) for i in range(n)], DOGS) == expected


@pytest.mark.parametrize("n, expected", [
    (2, (False, False, 2 / 3)), (3, (True, True, 1.0)), (4, (False, False, 2 / 3)), (9, (False, False, 0.0))])
def test_counting_excludes_one_more(n, expected):
    metadata = {
        "tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}
    assert scores([at("dog", 30 * i, 10) for i in range(n)], metadata) == pytest.approx(expected)


def test_thresholds_are_exceeded_not_reached():
    at_threshold = [at("dog", 0, 0, score=0.3), at("dog", 50, 0, score=0.9)]
    assert [d.score for d in objects(at_threshold, "single_object")["dog"]] == [0.9]
    assert objects(at_threshold, "counting") == {}
    above = [at("dog", 0, 0, score=0.300001), at("cat", 50, 0, score=0.900001)]
    assert set(objects(above, "")) == {"dog", "cat"} and set(objects(above, "counting")) == {"cat"}


def test_sixteen_of_a_class_are_looked_at_the_most_confident_first():
    found = objects([at("dog", i, 0, score=0.4 + i / 100) for i in range(20)], "")["dog"]
    assert len(found) == 16 and [d.box[0] for d in found] == [i - 10 for i in range(19, 3, -1)]


def test_two_objects_both_or_not():
    metadata = {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
    assert scores([at("dog", 0, 0), at("cat", 50, 0)], metadata) == (True, True, 1.0)
    assert scores([at("dog", 0, 0), at("bird", 50, 0)], metadata) == (False, False, 0.5)


def test_colour_of_the_most_confident_object_counts():
    metadata = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    assert scores([at("dog", 10, 0)], metadata, colours({0: "red"})) == (True, True, 1.0)
    assert scores([at("dog", 10, 0)], metadata, colours({0: "blue"})) == (False, False, 0.5)
    two = [at("dog", 10, 0, score=0.5), at("dog", 60, 0, score=0.9)]
    # The blue one is surer. Strict and partial stop at the count and ask for no colour.
    assert scores(two, metadata, colours({0: "red", 50: "blue"})) == (False, False, 0.0)
    assert scores(two, metadata, colours({0: "blue", 50: "red"})) == (True, False, 0.0)
    assert scores([], metadata) == (False, False, 0.0)


def test_colours_of_several_objects():
    metadata = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
    two = [at("dog", 10, 0), at("dog", 60, 0)]
    assert scores(two, metadata, colours({0: "red", 50: "red"})) == (True, True, 1.0)
    assert scores(two, metadata, colours({0: "red", 50: "blue"})) == (False, False, (1 + 0.5) / 2)


def test_two_objects_with_colours():
    metadata = {"tag": "color_attr", "include": [
        {"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "black"}]}
    both = [at("dog", 10, 0), at("cat", 60, 0)]
    assert scores(both, metadata, colours({0: "red", 50: "black"})) == (True, True, 1.0)
    # Swapped colours are wrong, though all of them are there.
    assert scores(both, metadata, colours({0: "black", 50: "red"})) == (False, False, 0.5)


@pytest.mark.parametrize("x, y, expected", [
    (0, 50, {"left of"}), (100, 50, {"right of"}), (50, 0, {"above"}), (50, 100, {"below"}),
    (0, 0, {"left of", "above"}), (100, 100, {"right of", "below"}),
    # 20 by 20 each: (20 + 20)·0.1 = 4 pixels are taken off each offset.
    (50, 50, set()), (53.9, 50, set()), (46, 54, set()),
    # (4.5 − 4)/4.5 = 0.11 and (8 − 4)/8 = 0.5: not more than half. (8.1 − 4)/8.1 = 0.506.
    (54.5, 50, set()), (58, 50, set()), (58.1, 50, {"right of"}),
    (42, 50, set()), (41.9, 50, {"left of"}), (50, 41.9, {"above"}), (50, 42, set()), (50, 58.1, {"below"}),
    # dx = 26/√(30² + 60²) = 0.39, dy = 56/67.1 = 0.83.
    (80, 110, {"below"}),
])
def test_relative_position(x, y, expected):
    assert relations(at("dog", x, y), at("cat", 50, 50)) == expected


@pytest.mark.parametrize("dog_x, expected", [(100, (True, True, 1.0)), (0, (False, False, 2 / 3))])
def test_position_clause_and_relation_mean_the_same(dog_x, expected):
    found = [at("cat", 50, 50), at("dog", dog_x, 50)]
    genevals = {"tag": "position", "include": [
        {"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}
    # chunkgrpo's form: where the first is, seen from the second; a count of 1 may be left out.
    ours = {"include": [{"class": "cat"}, {"class": "dog"}], "relation": "left of"}
    assert scores(found, genevals) == scores(found, ours) == pytest.approx(expected)
    assert "position" not in ours["include"][1]  # the caller's object is as it was


def test_a_position_without_its_target_is_wrong():
    metadata = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}
    verdict = judge([at("dog", 100, 50)], metadata, never)
    assert (verdict.correct, verdict.strict, verdict.partial) == (False, False, pytest.approx(1 / 3))
    assert verdict.reasons == (
        "expected cat>=1, found 0", "no target for dog to be right of", "expected cat==1, found 0")


@pytest.mark.parametrize("metadata, reason", [
    (None, "no metadata with an include list"), ({}, "no metadata with an include list"),
    ({"include": ["dog"]}, "include[0]: expected an object with a class"),
    ({"include": [{"class": "unicorn"}]}, 'include[0]: the detector knows no "unicorn"'),
    ({"include": [{"class": "dog", "count": 0}]}, "include[0]: expected a count ≥ 1, got 0"),
    ({"include": [{"class": "dog", "color": "mauve"}]}, 'include[0]: color "mauve" is not one of red, orange'),
    ({"include": [{"class": "dog", "position": ["above", 0]}]}, "include[0]: expected a position such as"),
    ({"include": [{"class": "dog"}, {"class": "cat", "position": ["near", 0]}]}, "include[1]: expected a position"),
    ({"include": [{"class": "dog"}], "relation": "above"}, 'relation "above": expected one of left of'),
    ({"include": [{"class": "dog"}], "exclude": [{"class": "elf"}]}, 'exclude[0]: the detector knows no "elf"'),
])
def test_metadata_that_no_image_can_be_judged_by(metadata, reason):
    with pytest.raises(BadMetadata) as error:
        judge([], metadata, never)
    assert reason in str(error.value)
