"""`shapes:many`: many different texts, none held out, each readable by the shipped tokenizers and rightly judged."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from dancegrpo.errors import PromptError
from dancegrpo.prompts import Prompt, open_prompts
from dancegrpo.shapes import base_path
from dancegrpo.shapes.base import TEXT_TOKENS
from dancegrpo.shapes.scenes import BACKGROUNDS, COLORS, HELD_OUT, TASKS, Entity, Scene, combinations, draw, scenes
from dancegrpo.shapes.scenes import prompts as split_prompts
from dancegrpo.shapes.verifier import judge
from dancegrpo.shapes.wordings import MIRRORED, many_prompts, many_scenes, wordings

DIGESTS = {
    "train": "ef72a1ad46c9be8e0aaa02e471c6c9be7b5d08a12d9da4aa3bff2ad46463f9fc",
    "heldout": "f49718717c6a4e393642f23b056d1369304ebb1e8ae0806edf66cc9a369ba2e2",
}
"""Of the two splits as they were before there were wordings."""


@pytest.fixture(scope="module")
def many() -> list[Prompt]:
    return many_prompts()


def digest(prompts: list[Prompt]) -> str:
    told = json.dumps([[p.id, p.text, p.negative, dict(p.metadata)] for p in prompts])
    return hashlib.sha256(told.encode()).hexdigest()


def passes(drawn: list[Scene], asked: list[Scene]) -> np.ndarray:
    """(N,) bool: the verifier's word on a drawing of the one for the caption of the other."""
    rng = np.random.default_rng(3)
    media = np.stack([draw(scene, rng) for scene in drawn]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return judge(media, [Prompt(i, s.caption, metadata=s.to_metadata()) for i, s in enumerate(asked)]).exact


def some(count: int, seed: int = 0) -> list[Scene]:
    """Of the scenes that `shapes:train` has not."""
    pool = [scene for scene in many_scenes() if scene not in set(scenes("train"))]
    return [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))[:count]]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_splits_are_what_they_were(split):
    assert digest(split_prompts(split)) == DIGESTS[split]


def test_there_are_as_many_texts_as_promised(many):
    assert len(many) == 20_400
    assert len({prompt.text for prompt in many}) == 10_142
    assert [prompt.id for prompt in many] == list(range(2_000_000, 2_020_400))


def test_no_scene_holds_a_held_out_combination_and_no_text_is_held_out(many):
    assert not [p for p in many if combinations(Scene.from_metadata(p.metadata)) & HELD_OUT]
    assert {p.text for p in many}.isdisjoint(scene.caption for scene in scenes("heldout"))


def test_two_of_a_shape_in_two_colours_count_as_two():
    pair = Scene("color_attribution", (Entity("circle", "green"), Entity("circle", "blue")))
    assert ("count", "circle", "two") in combinations(pair) & HELD_OUT
    assert pair not in many_scenes()


def test_a_text_has_one_meaning(many):
    facts = {}
    for prompt in many:
        assert facts.setdefault(prompt.text, prompt.metadata) == prompt.metadata


@pytest.mark.parametrize("length", [6, 600, 20_400])
def test_every_prefix_is_balanced(many, length):
    told = [prompt.metadata["task"] for prompt in many[:length]]
    assert [told.count(task) for task in TASKS] == [length // 6] * 6


def test_no_text_comes_again_before_its_task_has_said_all(many):
    single = [p.text for p in many if p.metadata["task"] == "single_object"]
    assert len(set(single[:54])) == len(set(single)) == 54
    position = [p.text for p in many if p.metadata["task"] == "position"]
    assert len(set(position)) == len(position)


@pytest.mark.parametrize(
    ("base", "part"), [("shapes-flux", "tokenizer"), ("shapes-flux", "tokenizer_2"), ("shapes-sd", "tokenizer")]
)
def test_the_shipped_tokenizers_read_every_text_word_by_word(many, base, part):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_path(base) / part)
    texts = sorted({prompt.text for prompt in many})
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        words = [i for i in ids if i not in tokenizer.all_special_ids]
        assert len(ids) <= TEXT_TOKENS
        assert len(words) == len(text.split())
        assert tokenizer.decode(words).split() == text.split()


def test_drawings_of_the_new_scenes_pass():
    chosen = some(400)
    assert passes(chosen, chosen).all()


def test_a_missing_object_fails():
    asked = [scene for scene in some(300) if not scene.relation]
    assert not passes([replace(s, entities=s.entities[1:]) for s in asked], asked).any()


def test_a_wrong_colour_fails():
    asked = [scene for scene in some(300) if scene.entities[-1].color]
    colors = list(COLORS)

    def repainted(scene: Scene) -> Scene:
        last = scene.entities[-1]
        other = colors[(colors.index(last.color) + 1) % len(colors)]
        return replace(scene, entities=(*scene.entities[:-1], Entity(last.shape, other)))

    assert not passes([repainted(scene) for scene in asked], asked).any()


def test_the_opposite_relation_fails():
    asked = [scene for scene in some(300) if scene.relation]
    assert not passes([replace(s, relation=MIRRORED[s.relation]) for s in asked], asked).any()


def test_another_background_fails():
    asked = [scene for scene in some(300) if scene.background]
    names = list(BACKGROUNDS)
    drawn = [replace(s, background=names[(names.index(s.background) + 1) % 3]) for s in asked]
    assert not passes(drawn, asked).any()


def test_the_wordings_of_a_relation():
    scene = Scene("position", (Entity("circle", "blue"), Entity("triangle")), "above", "grey")
    sides = ("a blue circle above a triangle", "a triangle below a blue circle")
    bare = ("blue circle above triangle", "triangle below blue circle")
    expected = {f"{side} {on}" for side in sides for on in ("on a grey background", "on grey")}
    expected |= {f"{on} {side}" for side in sides for on in ("on a grey background", "on grey")}
    expected |= {f"{side} {on}" for side in bare for on in ("on grey background", "on grey")}
    expected |= {f"{on} {side}" for side in bare for on in ("on grey background", "on grey")}
    assert set(wordings(scene)) == expected
    assert wordings(scene)[0] == scene.caption


def test_a_colour_without_an_article_never_spreads_to_the_next_object():
    scene = Scene("colors", (Entity("circle", "blue"), Entity("square")))
    assert set(wordings(scene)) == {
        "a blue circle and a square",
        "a square and a blue circle",
        "square and blue circle",
    }


def test_the_source_is_the_same_list_numbered_from_zero_and_cheap(many):
    started = time.process_time()
    source = open_prompts("shapes:many", negative="n")
    assert time.process_time() - started < 1.0  # 0.1 s on an idle core
    assert [p.text for p in source] == [p.text for p in many]
    assert (source[0].id, source[7].metadata, source[7].negative) == (0, many[7].metadata, "n")


def test_it_is_the_drawings_that_have_many():
    with pytest.raises(PromptError, match=r"shapes-video:many does not exist: use shapes-video:train or .*:heldout$"):
        open_prompts("shapes-video:many")
    with pytest.raises(PromptError, match=r"use shapes:train or shapes:heldout, or shapes:many to train on$"):
        open_prompts("shapes:lots")
