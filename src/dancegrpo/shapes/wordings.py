"""Many training prompts: more scenes from the same attributes, and more ways of asking for each.

`shapes:train` has 279 captions. Here colours are asked of one or both of two objects, of counted ones and of objects
of the same shape, counts stand beside other objects, three different shapes are asked for, and every scene is told in
several ways: objects in any order, relations from either side, the background first, no articles. The words are those
of the captions, so that the base pipelines' tokenizers know each; no scene holds a combination that is held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations as choose
from itertools import pairwise, permutations, product

import numpy as np

from dancegrpo.prompts import Prompt
from dancegrpo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    HELD_OUT,
    SHAPES,
    TASKS,
    Entity,
    Scene,
    all_scenes,
    combinations,
    deal,
    group_text,
    groups,
)

FIRST_ID = 2_000_000
PER_TASK = 3400
"""Prompts of each task: of a task with fewer texts each comes several times, of one with more a part of them."""
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""The relation of the second object to the first."""
TINTS = (None, *COLORS)


def many_prompts() -> list[Prompt]:
    """20,400 training prompts, 10,142 different texts among them; the same list at every call.

    As in `scenes.prompts` the six tasks come in turn, so that any prefix is balanced, and within a task no text comes
    again before every one has come. Ids from 2,000,000. `metadata` holds the scene.
    """
    asked: dict[str, Scene] = {}
    for scene in many_scenes():
        for text in wordings(scene):
            asked.setdefault(text, scene)
    pools = [[text for text, scene in asked.items() if scene.task == task] for task in TASKS]
    told = {scene: scene.to_metadata() for scene in many_scenes()}
    texts = deal(pools, PER_TASK * len(TASKS), np.random.default_rng(2))
    return [Prompt(FIRST_ID + i, text, metadata=told[asked[text]]) for i, text in enumerate(texts)]


@cache
def every_scene() -> tuple[Scene, ...]:
    """Every scene, held-out ones too: those of both splits, and those composed here, on each background and on any."""
    # Three objects and a background would take more tokens than the text encoders read.
    grounds = ((core, (None, *BACKGROUNDS) if len(groups(core)) < 3 else (None,)) for core in _composed())
    composed = (replace(core, background=ground) for core, choice in grounds for ground in choice)
    return tuple(dict.fromkeys([*all_scenes(), *composed]))


@cache
def many_scenes() -> tuple[Scene, ...]:
    """Every scene of `many_prompts`: none holds a combination that is held out."""
    return tuple(scene for scene in every_scene() if not combinations(scene) & HELD_OUT)


def _composed() -> Iterator[Scene]:
    """Scenes in one order of their objects, held-out ones too; `wordings` brings the other orders."""
    for a, b in choose(SHAPES, 2):
        yield from (
            scene for tints in product(TINTS, repeat=2) for scene in _pairs(Entity(a, tints[0]), Entity(b, tints[1]))
        )
    # Two of one shape need two colours to be told apart.
    for shape, (one, other) in product(SHAPES, choose(COLORS, 2)):
        yield from _pairs(Entity(shape, one), Entity(shape, other))
    for trio_tints in product(TINTS, repeat=len(SHAPES)):
        trio = tuple(map(Entity, SHAPES, trio_tints))
        yield Scene(_task(trio), trio)
    for shape, count in product(SHAPES, COUNTS):
        yield from (Scene("counting", (Entity(shape, tint),) * count) for tint in COLORS)
    yield from _counted_beside_others()


def _pairs(first: Entity, second: Entity) -> Iterator[Scene]:
    yield Scene(_task((first, second)), (first, second))
    for order in ((first, second), (second, first)):
        yield from (Scene("position", order, relation) for relation in ("left of", "above"))


def _task(entities: Sequence[Entity]) -> str:
    """By how many colours are asked for: about the objects, about a colour, or about whose is which."""
    return ("two_objects", "colors", "color_attribution")[min(2, sum(entity.color is not None for entity in entities))]


def _counted_beside_others() -> Iterator[Scene]:
    """Two or three of one shape beside one of another, and two beside two."""
    apart = [(shapes, counts) for shapes in permutations(SHAPES, 2) for counts in ((2, 1), (3, 1))]
    apart += [(shapes, (2, 2)) for shapes in choose(SHAPES, 2)]
    for (shapes, counts), tints in product(apart, product(TINTS, repeat=2)):
        kinds = zip(shapes, tints, counts, strict=True)
        yield Scene("counting", tuple(Entity(shape, tint) for shape, tint, count in kinds for _ in range(count)))


def wordings(scene: Scene) -> tuple[str, ...]:
    """The texts that ask for a scene, its caption first; at most 12 words each."""
    texts = []
    for articles in (True, False):
        for objects in _objects(scene, articles):
            if scene.background is None:
                texts.append(objects)
                continue
            ground = f"on a {scene.background} background" if articles else f"on {scene.background} background"
            for place in (ground, f"on {scene.background}"):
                texts += [f"{objects} {place}", f"{place} {objects}"]
    return tuple(dict.fromkeys(texts))


def _objects(scene: Scene, articles: bool) -> Iterator[str]:
    """What a scene shows but for its background, in each order."""
    for order in permutations(groups(scene)):
        told = [group_text(entity, count) for entity, count in order]
        if not articles:
            told = [text.removeprefix("a ") for text in told]
        if scene.relation:
            mirrored = order[0][0] != scene.entities[0]
            yield f" {MIRRORED[scene.relation] if mirrored else scene.relation} ".join(told)
        elif articles or not any(a.color and not b.color for (a, _), (b, _) in pairwise(order)):
            # "blue circle and square" could ask for a blue square.
            yield " and ".join(told)
