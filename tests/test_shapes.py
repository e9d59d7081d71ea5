"""The miniature world: captions and their split, drawings, the judge, the reward."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dancegrpo.errors import ConfigError, ModelError, RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Reward
from dancegrpo.rewards.shapes import ShapesReward
from dancegrpo.shapes import base_path
from dancegrpo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    RELATIONS,
    SHAPES,
    TASKS,
    Entity,
    Scene,
    all_scenes,
    combinations,
    draw,
    prompts,
    sample_scene,
    scenes,
)
from dancegrpo.shapes.verifier import judge, see


def prompt(scene: Scene, number: int = 0) -> Prompt:
    return Prompt(number, scene.caption, metadata=scene.to_metadata())


def picture(scene: Scene, seed: int = 0) -> np.ndarray:
    """(3, 64, 64) float32 in [0, 1]."""
    return draw(scene, np.random.default_rng(seed)).transpose(2, 0, 1).astype(np.float32) / 255


def verdict(drawn: Scene, asked: Scene, seed: int = 0) -> tuple[bool, float]:
    result = judge(picture(drawn, seed)[None], [prompt(asked)])
    return bool(result.exact[0]), float(result.graded[0])


@pytest.fixture(scope="module")
def thousand() -> tuple[list[Prompt], np.ndarray]:
    rng = np.random.default_rng(7)
    chosen = [sample_scene(rng) for _ in range(1000)]
    images = np.stack([draw(scene, rng) for scene in chosen]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return [prompt(scene, i) for i, scene in enumerate(chosen)], images


# ------------------------------------------------------------------------------------------------------------- captions


def test_captions_are_unique_and_short():
    captions = [scene.caption for scene in all_scenes()]
    assert len(set(captions)) == len(captions) == 960
    assert max(len(caption.split()) for caption in captions) <= 14


def test_a_scene_survives_json():
    for scene in all_scenes():
        assert Scene.from_metadata(json.loads(json.dumps(scene.to_metadata()))) == scene


def test_splits_share_no_combination_that_makes_a_caption_held_out():
    trained = frozenset().union(*(combinations(scene) for scene in scenes("train")))
    assert all(combinations(scene) - trained for scene in scenes("heldout"))
    assert {s.caption for s in scenes("train")}.isdisjoint(s.caption for s in scenes("heldout"))


def test_equal_facts_in_other_words_are_held_out_together():
    left = Scene("position", (Entity("circle"), Entity("square")), "left of")
    right = Scene("position", (Entity("square"), Entity("circle")), "right of")
    assert combinations(left) == combinations(right)
    assert {left, right} <= set(scenes("heldout"))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_attribute_value_and_task_occurs_in_each_split(split):
    chosen = scenes(split)
    assert {s.task for s in chosen} == set(TASKS)
    assert {e.shape for s in chosen for e in s.entities} == set(SHAPES)
    assert {e.color for s in chosen for e in s.entities} == {None, *COLORS}
    assert {s.background for s in chosen} == {None, *BACKGROUNDS}
    assert {s.relation for s in chosen} == {None, *RELATIONS}
    assert {len(s.entities) for s in chosen if s.task == "counting"} == set(COUNTS)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_prompts_are_balanced_deterministic_and_uniquely_numbered(split):
    chosen = prompts(split, 1200)
    assert chosen == prompts(split, 1200)
    assert [sum(p.metadata["task"] == task for p in chosen) for task in TASKS] == [200] * len(TASKS)
    assert len({p.id for p in chosen}) == 1200
    assert {p.text for p in chosen} <= {s.caption for s in scenes(split)}


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="train or heldout"):
        prompts("test")


def test_drawings_depend_on_the_generator_alone():
    scene = Scene("colors", (Entity("circle", "red"),))
    assert np.array_equal(picture(scene, 3), picture(scene, 3))
    assert not np.array_equal(picture(scene, 3), picture(scene, 4))


# ------------------------------------------------------------------------------------------------------------ the judge


def test_every_true_drawing_passes_with_full_credit(thousand):
    requests, images = thousand
    result = judge(images, requests)
    assert result.exact.all()
    assert result.valid.all()
    assert (result.graded == 1.0).all()


def test_the_judge_names_what_was_drawn(thousand):
    requests, images = thousand
    for request, sighting in zip(requests, see(images * 255), strict=True):
        scene = Scene.from_metadata(request.metadata)
        assert sorted(o.shape for o in sighting.objects) == sorted(e.shape for e in scene.entities)
        assert {e.color for e in scene.entities} - {None} <= {o.color for o in sighting.objects}
        assert scene.background in (None, sighting.background)


CIRCLE, SQUARE = Entity("circle"), Entity("square")
ERRORS = {
    "wrong shape": (Scene("single_object", (SQUARE,)), Scene("single_object", (CIRCLE,))),
    "wrong color": (Scene("colors", (Entity("circle", "blue"),)), Scene("colors", (Entity("circle", "red"),))),
    "wrong background": (
        Scene("single_object", (CIRCLE,), background="black"),
        Scene("single_object", (CIRCLE,), background="grey"),
    ),
    "too few": (Scene("counting", (CIRCLE,) * 2), Scene("counting", (CIRCLE,) * 3)),
    "too many": (Scene("counting", (CIRCLE,) * 4), Scene("counting", (CIRCLE,) * 3)),
    "wrong shape counted": (Scene("counting", (SQUARE,) * 3), Scene("counting", (CIRCLE,) * 3)),
    "missing object": (Scene("single_object", (CIRCLE,)), Scene("two_objects", (CIRCLE, SQUARE))),
    "extra object": (Scene("two_objects", (CIRCLE, SQUARE)), Scene("single_object", (CIRCLE,))),
    "one of two wrong": (
        Scene("two_objects", (CIRCLE, Entity("triangle"))),
        Scene("two_objects", (CIRCLE, SQUARE)),
    ),
    "opposite position": (
        Scene("position", (CIRCLE, SQUARE), "right of"),
        Scene("position", (CIRCLE, SQUARE), "left of"),
    ),
    "other axis": (Scene("position", (CIRCLE, SQUARE), "above"), Scene("position", (CIRCLE, SQUARE), "left of")),
    "swapped colors": (
        Scene("color_attribution", (Entity("circle", "blue"), Entity("square", "red"))),
        Scene("color_attribution", (Entity("circle", "red"), Entity("square", "blue"))),
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_each_kind_of_error_fails_and_costs_credit(kind):
    drawn, asked = ERRORS[kind]
    for seed in range(20):
        passed, credit = verdict(drawn, asked, seed)
        assert not passed
        assert 0.2 < credit < 1.0  # partly right


@pytest.mark.parametrize("kind", ["blank", "red", "noise"])
def test_a_picture_of_nothing_fails_every_caption(kind):
    media = {
        "blank": np.full((3, 64, 64), 1.0),
        "red": np.stack([np.full((64, 64), c / 255) for c in COLORS["red"]]),
        "noise": np.random.default_rng(0).random((3, 64, 64)),
    }[kind]
    asked = [prompt(scene) for scene in all_scenes()[::12]]
    result = judge(np.broadcast_to(media, (len(asked), 3, 64, 64)), asked)
    assert not result.exact.any()
    assert result.graded.max() < 0.6


def test_an_object_of_two_colors_has_none():
    scene = Scene("colors", (Entity("square", "red"),), background="white")
    image = picture(scene)
    red = (image[0] > 0.8) & (image[1] < 0.3)
    columns = np.flatnonzero(red.any(axis=0))
    red[:, columns[: len(columns) // 2]] = False
    image[:, red] = np.array(COLORS["blue"], np.float32)[:, None] / 255
    assert not judge(image[None], [prompt(scene)]).exact[0]


def test_credit_rises_with_each_correct_criterion():
    asked = Scene("color_attribution", (Entity("circle", "red"), Entity("square", "blue")), background="white")
    wrong_ground = replace(asked, background="black")
    one_color = replace(wrong_ground, entities=(Entity("circle", "red"), Entity("square", "yellow")))
    lone = replace(one_color, entities=(Entity("circle", "red"),))
    credit = [verdict(drawn, asked, seed=1)[1] for drawn in (lone, one_color, wrong_ground, asked)]
    assert credit == sorted(credit)
    assert len(set(credit)) == 4
    assert credit[-1] == 1.0


def test_mild_noise_and_blur_do_not_fool_the_judge(thousand):
    requests, images = thousand
    noisy = images + np.random.default_rng(0).normal(0, 0.03, images.shape).astype(np.float32)
    assert judge(noisy, requests).exact.mean() > 0.99


# ----------------------------------------------------------------------------------------------------------- the reward


def test_the_reward_reports_its_mode_and_always_the_pass(thousand):
    requests, images = thousand
    media = torch.from_numpy(images[:40]).unsqueeze(1)
    shuffled = requests[20:40] + requests[:20]
    graded, exact, mix = (ShapesReward(mode)(media, shuffled) for mode in ("graded", "exact", "mix"))
    assert isinstance(ShapesReward(), Reward)
    assert torch.equal(exact.values, exact.extra["pass"])
    assert torch.equal(graded.extra["pass"], exact.values)
    assert torch.equal(mix.values, (graded.values + exact.values) / 2)
    assert graded.values.dtype == torch.float32
    assert graded.values.shape == (40,)
    assert 0 < graded.values.mean() < 1


def test_a_non_finite_picture_is_masked_and_its_neighbours_are_not(thousand):
    requests, images = thousand
    media = torch.from_numpy(images[:3].copy()).unsqueeze(1)
    media[1, 0, 0, 5, 5] = float("nan")
    scores = ShapesReward("exact")(media, requests[:3])
    assert scores.valid.tolist() == [True, False, True]
    assert scores.values[[0, 2]].tolist() == [1.0, 1.0]
    assert torch.isfinite(scores.values).all()


def test_misuse_of_the_reward_is_named():
    with pytest.raises(ConfigError, match="graded, exact or mix"):
        ShapesReward("best")
    with pytest.raises(RewardError, match="metadata"):
        ShapesReward()(torch.rand(1, 1, 3, 64, 64), [Prompt(0, "a cat")])
    with pytest.raises(RewardError, match="64"):
        ShapesReward()(torch.rand(1, 1, 3, 32, 32), prompts("train", 1))


# ---------------------------------------------------------------------------------------------------------- the package


def test_importing_the_world_loads_no_heavy_library():
    code = "import sys, dancegrpo.shapes; print([m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_pipeline_names_the_known_ones():
    with pytest.raises(ModelError, match="shapes-flux, shapes-sd"):
        base_path("shapes-wan")
