"""Captioned 64x64 drawings on the six GenEval tasks, and the split between training and held-out captions.

A caption states only what its task is about; what it leaves open (sizes, places, often colours and the background)
is drawn at random. Some captions name the background, which multiplies them without a new skill.

Held-out captions contain at least one *combination* of attributes (a shape with a colour, a count, a background, or
another shape in a relation) that no reinforcement-learning caption contains; every single attribute occurs in both
splits. The base pipelines were trained on captions of both splits: what is held out is held out from reinforcement
learning, so a rise there shows that it taught the skill rather than the prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from typing import Any, Literal, TypeVar

import numpy as np

from dancegrpo.errors import ConfigError
from dancegrpo.prompts import Prompt

SIZE = 64
TASKS = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
SHAPES = ("circle", "square", "triangle")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 170, 70),
    "blue": (45, 80, 225),
    "yellow": (245, 215, 40),
    "pink": (235, 70, 200),
    "cyan": (50, 200, 220),
}
"""sRGB of the object colours; the nearest two are 120 apart in Euclidean distance."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": (248, 248, 248), "grey": (128, 128, 128), "black": (8, 8, 8)}
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Direction (x, y) from the second object to the first; y points down."""

Split = Literal["train", "heldout"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Entity:
    """One object a caption asks for; `color` None = any colour."""

    shape: str
    color: str | None = None

    @property
    def text(self) -> str:
        """ "a red circle", or "a circle" for any colour."""
        return f"a {self.color} {self.shape}" if self.color else f"a {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption asks for. `relation` places the first of two entities; `background` None = any of the three."""

    task: str
    entities: tuple[Entity, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def caption(self) -> str:
        """The prompt: at most 12 words."""
        text = f" {self.relation or 'and'} ".join(group_text(entity, count) for entity, count in groups(self))
        return f"{text} on a {self.background} background" if self.background else text

    def to_metadata(self) -> dict[str, Any]:
        """JSON-able form, carried by `Prompt.metadata`; `from_metadata` is its inverse."""
        return {
            "task": self.task,
            "entities": [{"shape": e.shape, "color": e.color} for e in self.entities],
            "relation": self.relation,
            "background": self.background,
        }

    @staticmethod
    def from_metadata(metadata: Mapping[str, Any]) -> Scene:
        """Raises KeyError where the metadata is not that of a shapes prompt."""
        entities = tuple(Entity(e["shape"], e["color"]) for e in metadata["entities"])
        return Scene(metadata["task"], entities, metadata.get("relation"), metadata.get("background"))


def groups(scene: Scene) -> list[tuple[Entity, int]]:
    """The different objects of a scene in their order, each with how many of it there are."""
    return list(Counter(scene.entities).items())


def group_text(entity: Entity, count: int) -> str:
    """ "a red circle", or "two red circles"."""
    return entity.text if count == 1 else f"{COUNTS[count]} {entity.text.removeprefix('a ')}s"


# ---------------------------------------------------------------------------------------------------- captions, splits


def _cores() -> Iterator[Scene]:
    pairs = list(permutations(SHAPES, 2))
    for shape in SHAPES:
        yield Scene("single_object", (Entity(shape),))
        yield from (Scene("counting", (Entity(shape),) * count) for count in COUNTS)
        yield from (Scene("colors", (Entity(shape, color),)) for color in COLORS)
    for a, b in pairs:
        yield Scene("two_objects", (Entity(a), Entity(b)))
        yield from (Scene("position", (Entity(a), Entity(b)), relation) for relation in RELATIONS)
        for color_a, color_b in permutations(COLORS, 2):
            yield Scene("color_attribution", (Entity(a, color_a), Entity(b, color_b)))


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene that has a caption, without and with each background; captions are unique."""
    return tuple(replace(core, background=bg) for core in _cores() for bg in (None, *BACKGROUNDS))


def combinations(scene: Scene) -> frozenset[tuple[str, ...]]:
    """The attribute combinations a caption binds. Equal facts are one: "a left of b" is "b right of a"."""
    found: set[tuple[str, ...]] = set()
    for entity in scene.entities:
        if scene.background:
            found.add(("background", entity.shape, scene.background))
        if entity.color:
            found.add(("color", entity.shape, entity.color))
    for shape, count in Counter(entity.shape for entity in scene.entities).items():
        if count > 1:
            found.add(("count", shape, COUNTS[count]))
    if scene.relation:
        first, second = (e.shape for e in scene.entities)
        mirrored = {"right of": "left of", "below": "above"}
        if scene.relation in mirrored:
            first, second = second, first
        found.add(("relation", first, mirrored.get(scene.relation, scene.relation), second))
    return frozenset(found)


# A Latin square: the i-th shape never meets, in training, the i-th of each three values of another attribute.
HELD_OUT: frozenset[tuple[str, ...]] = frozenset(
    [
        *(("background", shape, bg) for shape, bg in zip(SHAPES, BACKGROUNDS, strict=True)),
        *(("count", shape, count) for shape, count in zip(SHAPES, COUNTS.values(), strict=True)),
        *(("color", SHAPES[i % len(SHAPES)], color) for i, color in enumerate(COLORS)),
        ("relation", "circle", "left of", "square"),
        ("relation", "square", "above", "triangle"),
        ("relation", "triangle", "left of", "circle"),
    ]
)


@cache
def scenes(split: Split) -> tuple[Scene, ...]:
    """The distinct scenes of a split; `len` of it says how many captions differ."""
    if split not in ("train", "heldout"):
        raise ConfigError(f"split {split!r} does not exist: use train or heldout.")
    return tuple(s for s in all_scenes() if bool(combinations(s) & HELD_OUT) == (split == "heldout"))


def prompts(split: Split, n: int = 1200) -> list[Prompt]:
    """`n` prompts with the six tasks in turn, so that any prefix is balanced; the same list at every call.

    Within a task every caption comes once, in a fixed shuffled order, before any comes again (with another id, so
    with other noise). Ids are positions in the list, held-out ones from 1,000,000. `metadata` holds the scene.
    """
    pools = [[s for s in scenes(split) if s.task == task] for task in TASKS]
    rng = np.random.default_rng(int(split == "heldout"))
    first_id = 1_000_000 if split == "heldout" else 0
    return [
        Prompt(id=first_id + i, text=scene.caption, metadata=scene.to_metadata())
        for i, scene in enumerate(deal(pools, n, rng))
    ]


def deal(pools: Sequence[Sequence[Item]], n: int, rng: np.random.Generator) -> Iterator[Item]:
    """`n` items from the pools in turn; of a pool each comes once, in shuffled order, before any comes again."""
    queues: list[list[Item]] = [[] for _ in pools]
    for i in range(n):
        pool, queue = pools[i % len(pools)], queues[i % len(pools)]
        if not queue:
            queue.extend(pool[j] for j in rng.permutation(len(pool)))
        yield queue.pop()


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene for base training: tasks in equal shares, then uniform over all captions of both splits."""
    pool = _by_task()[rng.integers(len(TASKS))]
    return pool[rng.integers(len(pool))]


@cache
def _by_task() -> tuple[tuple[Scene, ...], ...]:
    return tuple(tuple(s for s in all_scenes() if s.task == task) for task in TASKS)


# -------------------------------------------------------------------------------------------------------------- drawing

# Places on a lattice as wide as the autoencoder's cells, few sizes: a world that is learnt in minutes.
_LATTICE = 8
_RADII = {1: (12.0, 15.0), 2: (10.0, 12.0), 3: (8.0,), 4: (8.0,)}
_MARGIN, _GAP = 2.0, 3.0
_ALIGNED = 0.85  # of a related pair's distance, the share that lies along the relation's axis


def half_extent(shape: str, radius: float) -> tuple[float, float]:
    """Half width and half height in pixels; radii are scaled so that the three shapes look equally large."""
    scale = {"circle": (1.0, 1.0), "square": (0.9, 0.9), "triangle": (1.15, 1.0)}[shape]
    return scale[0] * radius, scale[1] * radius


def coverage(shape: str, y: np.ndarray, x: np.ndarray, half: tuple[float, float]) -> np.ndarray:
    """Antialiased share of each pixel that a shape centred at the origin covers, from its signed distance."""
    width, height = half
    if shape == "circle":
        distance = np.hypot(x / width, y / height) * min(half) - min(half)
    elif shape == "square":
        distance = np.maximum(np.abs(x) - width, np.abs(y) - height)
    else:
        slant = np.hypot(2 * height, width)
        distance = np.maximum(y - height, (2 * height * np.abs(x) - width * (y + height)) / slant)
    return np.clip(0.5 - distance, 0.0, 1.0)


def _place(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, tuple[float, float]]]:
    """Rejection sampling of (x, y, half extent) per entity: inside the frame, apart, and related as asked."""
    radii = _RADII[len(scene.entities)]
    while True:
        placed: list[tuple[float, float, tuple[float, float]]] = []
        for entity in scene.entities:
            half = half_extent(entity.shape, radii[rng.integers(len(radii))])
            first = [int(np.ceil((_MARGIN + h) / _LATTICE)) for h in half]
            x, y = (_LATTICE * int(rng.integers(i, SIZE // _LATTICE - i + 1)) for i in first)
            placed.append((float(x), float(y), half))
        if _apart(placed) and _related(placed, scene.relation):
            return placed


def _apart(placed: list[tuple[float, float, tuple[float, float]]]) -> bool:
    return all(
        abs(xa - xb) > wa + wb + _GAP or abs(ya - yb) > ha + hb + _GAP
        for i, (xa, ya, (wa, ha)) in enumerate(placed)
        for xb, yb, (wb, hb) in placed[:i]
    )


def _related(placed: list[tuple[float, float, tuple[float, float]]], relation: str | None) -> bool:
    if relation is None:
        return True
    (xa, ya, _), (xb, yb, _) = placed
    dx, dy = RELATIONS[relation]
    return (xa - xb) * dx + (ya - yb) * dy > _ALIGNED * float(np.hypot(xa - xb, ya - yb))


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One drawing of a scene, (64, 64, 3) uint8; whatever the caption leaves open comes from `rng`."""
    background = scene.background or list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[background]
    y, x = np.ogrid[0.5:SIZE:1.0, 0.5:SIZE:1.0]
    for entity, (cx, cy, half) in zip(scene.entities, _place(scene, rng), strict=True):
        color = entity.color or list(COLORS)[rng.integers(len(COLORS))]
        share = coverage(entity.shape, y - cy, x - cx, half)[..., None]
        image += share * (np.asarray(COLORS[color], np.float32) - image)
    return np.rint(image).astype(np.uint8)
