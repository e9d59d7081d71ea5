"""GenEval's decision rule: against the published implementation's answers, and what must hold for any objects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.rewards.geneval_rule import COLORS, RELATIONS, Detection, judge, read_task, relations

CASES = json.loads((Path(__file__).parent / "golden" / "geneval_rule.json").read_text())


def found_in(detections):
    """Objects by class as the rule takes them, and a classifier that knows the color of each."""
    objects, colors = {}, {}
    for name, given_objects in detections.items():
        objects[name] = [Detection(tuple(one["box"]), one["score"]) for one in given_objects]
        colors |= {id(mine): one["color"] for mine, one in zip(objects[name], given_objects, strict=True)}
    return objects, lambda name, chosen: [colors[id(one)] for one in chosen]


def decide(include, detections, exclude=()):
    task = read_task({"tag": "any", "include": include, "exclude": list(exclude)})
    return judge(task, *found_in(detections))


def thing(color="red", box=(0.0, 0.0, 10.0, 10.0), score=0.9):
    return {"box": list(box), "score": score, "color": color}


# The published answers


def test_all_golden_cases_agree_exactly():
    told = [judge(read_task(case["metadata"]), *found_in(case["detections"])).correct for case in CASES]
    assert told == [case["correct"] for case in CASES]


# What holds for any objects

CLASSES = ("bench", "cup", "dog")
edge = st.integers(0, 40).map(float)
boxes = st.tuples(edge, edge, edge, edge).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1::2]))
)
things = st.builds(thing, st.sampled_from(COLORS[:3]), boxes)
detections = st.dictionaries(st.sampled_from(CLASSES), st.lists(things, min_size=1, max_size=4))
clauses = st.builds(
    lambda name, count, color: {"class": name, "count": count} | ({"color": color} if color else {}),
    st.sampled_from(CLASSES),
    st.integers(1, 3),
    st.sampled_from((None, *COLORS[:3])),
)


@st.composite
def includes(draw):
    include = draw(st.lists(clauses, min_size=1, max_size=3))
    for index in range(1, len(include)):
        if draw(st.booleans()):
            include[index]["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, index - 1))]
    return include


excludes = st.lists(st.builds(lambda n, c: {"class": n, "count": c}, st.sampled_from(CLASSES), st.integers(1, 4)))


@settings(deadline=None, max_examples=120)
@given(includes(), detections, excludes)
def test_the_credit_is_a_share_and_full_exactly_where_the_picture_is_correct(include, objects, exclude):
    verdict = decide(include, objects, exclude)
    assert 0 <= verdict.credit <= 1
    assert (verdict.credit == 1) == verdict.correct


@settings(deadline=None, max_examples=60)
@given(includes(), detections, excludes, st.integers(1, 4))
def test_asking_more_never_makes_a_picture_correct(include, objects, exclude, count):
    if not decide(include, objects, exclude).correct:
        assert not decide(include, objects, [*exclude, {"class": "dog", "count": count}]).correct
        assert not decide([*include, {"class": "cup", "count": count}], objects, exclude).correct


@settings(deadline=None, max_examples=80)
@given(boxes, boxes, st.integers(-50, 50))
def test_relations_mirror_and_do_not_move_with_the_picture(box, other, shift):
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    told = relations(box, other)
    assert relations(other, box) == {opposite[name] for name in told}
    assert relations([x + shift for x in box], [x + shift for x in other]) == told


@settings(deadline=None, max_examples=60)
@given(boxes, boxes)
def test_turning_the_picture_swaps_columns_and_rows(box, other):
    turned = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}

    def swap(b):
        return (b[1], b[0], b[3], b[2])

    assert relations(swap(box), swap(other)) == {turned[name] for name in relations(box, other)}


# Positions, by hand


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        # 10 x 10 boxes: slack 2 per axis. Offset (10, 0): 8/10 to the right.
        ((10, 0, 20, 10), {"right of"}),
        # Offset (-10, -10): 8 / 14.14 = 0.57 on both axes.
        ((-10, -10, 0, 0), {"left of", "above"}),
        # Offset (3, 4): (1, 2) / 5, both below a half.
        ((3, 4, 13, 14), set()),
        # Offset (0, 4): 2 / 4 is not above a half.
        ((0, 4, 10, 14), set()),
        ((0, 5, 10, 15), {"below"}),
        # Offset 2 is all slack.
        ((2, 0, 12, 10), set()),
        ((0, 0, 10, 10), set()),
    ],
)
def test_relations_by_hand(box, expected):
    assert relations(box, (0, 0, 10, 10)) == expected


def test_a_position_needs_its_target_to_have_met_its_own_requirement():
    include = [{"class": "cup", "count": 1, "color": "blue"}, {"class": "dog", "count": 1, "position": ["right of", 0]}]
    dog = thing(box=(30.0, 0.0, 40.0, 10.0))
    assert decide(include, {"cup": [thing("blue")], "dog": [dog]}).correct
    verdict = decide(include, {"cup": [thing("red")], "dog": [dog]})
    # Of two counts, a color and a position, only the counts are met.
    assert (verdict.correct, verdict.credit) == (False, 0.5)


# Colors and counts, by hand


def test_only_the_most_certain_objects_are_asked_for_their_color():
    include = [{"class": "cup", "count": 1, "color": "blue"}]
    assert decide(include, {"cup": [thing("blue"), thing("red")]}).correct
    assert not decide(include, {"cup": [thing("red"), thing("blue")]}).correct


def test_colors_are_not_asked_for_where_objects_are_too_few():
    def never(name, chosen):
        raise AssertionError("asked")

    task = read_task({"tag": "colors", "include": [{"class": "cup", "count": 2, "color": "blue"}]})
    assert not judge(task, {"cup": [Detection((0, 0, 1, 1), 0.9)]}, never).correct


@pytest.mark.parametrize(("number", "credit"), [(0, 0), (1, 0.5), (2, 1), (3, 0.5), (4, 0), (9, 0)])
def test_counting_credits_one_too_many_like_one_too_few(number, credit):
    include, exclude = [{"class": "cup", "count": 2}], [{"class": "cup", "count": 3}]
    verdict = decide(include, {"cup": [thing()] * number}, exclude)
    assert (verdict.correct, verdict.credit) == (number == 2, credit)


def test_more_objects_than_asked_for_are_no_fault_without_a_limit():
    verdict = decide([{"class": "cup", "count": 2}], {"cup": [thing()] * 5, "dog": [thing()]})
    assert (verdict.correct, verdict.credit) == (True, 1)


def test_an_unwanted_class_is_a_requirement_of_its_own():
    verdict = decide(
        [{"class": "cup", "count": 1}], {"cup": [thing()], "dog": [thing()]}, [{"class": "dog", "count": 1}]
    )
    assert (verdict.correct, verdict.credit) == (False, 0.5)


# Metadata


def test_null_fields_count_as_absent():
    include = [{"class": "cup", "count": 1, "color": None, "position": None}]
    task = read_task({"tag": "single_object", "include": include, "exclude": None})
    assert task == read_task({"tag": "single_object", "include": [{"class": "cup", "count": 1}]})


CUP = {"class": "cup", "count": 1}


@pytest.mark.parametrize(
    ("metadata", "cause"),
    [
        ({}, "no GenEval metadata"),
        ({"tag": "colors"}, "no GenEval metadata"),
        ({"include": [CUP]}, "no GenEval metadata"),
        ({"tag": "colors", "include": []}, "include nothing"),
        ({"tag": "colors", "include": "cup"}, "include holds 'cup', not a mapping"),
        ({"tag": "colors", "include": [{"class": "cup"}]}, "class='cup', count=None"),
        ({"tag": "colors", "include": [{"class": "cup", "count": 0}]}, "count=0"),
        ({"tag": "colors", "include": [{"class": "cup", "count": True}]}, "count=True"),
        ({"tag": "colors", "include": [CUP], "exclude": [{"class": 3, "count": 1}]}, "exclude asks for class=3"),
        ({"tag": "colors", "include": [CUP | {"color": "mauve"}]}, "'mauve' is not one of the ten colors"),
        ({"tag": "position", "include": [CUP | {"position": ["above", 0]}]}, r"position=\['above', 0\] of include 0"),
        ({"tag": "position", "include": [CUP, CUP | {"position": ["near", 0]}]}, "of include 1"),
        ({"tag": "position", "include": [CUP, CUP | {"position": "above"}]}, "of include 1"),
    ],
)
def test_metadata_that_ask_for_nothing_that_can_be_judged_say_why(metadata, cause):
    with pytest.raises(ValueError, match=cause) as caught:
        read_task(metadata)
    assert "\n" not in str(caught.value)
