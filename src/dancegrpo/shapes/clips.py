"""Captioned clips of moving shapes: what is asked for, how it is drawn, and the split held out from training.

Clips have 9 frames of 32x32 at 8 frames per second, on one plain near-black ground: in a world this small a network
should spend nothing on backgrounds. An object crosses the frame, bounces off one of its edges, or passes another one
that comes the opposite way. The same world gives first frames for image-to-video, and stills for text-to-image.

As in `dancegrpo.shapes.scenes`, held-out captions contain a combination of attributes that no training caption of the
reinforcement learning has, while every single attribute occurs in both splits; base pipelines may see all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dancegrpo.errors import ConfigError
from dancegrpo.prompts import Prompt, PromptList, PromptSource
from dancegrpo.shapes.scenes import COLORS, SHAPES, Entity, Split, coverage, half_extent

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 32
FRAMES = 9
BACKGROUND = (8, 8, 8)
CLIP_TASKS = ("move", "bounce", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit vectors (x, y); y points down."""
WALLS = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
"""Direction in which an object moves at first -> the edge it bounces off."""
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
RADII = {"small": 4.0, "large": 6.0}
"""Pixels; objects of a scene that names no size are small."""
SPEEDS = {"slowly": 0.9, "quickly": 1.8}
"""Pixels per frame."""
CROSSING_SPEED = 1.4
LANES = (9.0, 23.0)
"""Where two objects keep, across their direction: far enough apart never to touch."""

_RADIUS_JITTER = 0.3
_SPEED_JITTER = 0.08
_LANE_JITTER = 0.7
_MARGIN = 0.75  # pixels that a free object keeps from the frame's edge
_TURN = (3.3, 4.7)  # frames, at nominal speed; the jitter of the speed leaves it within about 3 and 5

ClipTask = Literal["move", "bounce", "cross", "single", "pair"]


@dataclass(frozen=True)
class Start:
    """Where the only object of a first frame is: its centre and its radius, in pixels."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class ClipScene:
    """What a caption asks for.

    objects: one or two, colours given. direction: of the first object, before it bounces; None for stills. size,
    speed: of a single object, None where there are two. start: the object in the given first frame (image-to-video).
    """

    task: ClipTask
    objects: tuple[Entity, ...]
    direction: str | None = None
    size: str | None = None
    speed: str | None = None
    start: Start | None = None

    @property
    def caption(self) -> str:
        """The prompt: at most 11 words."""
        first = self.objects[0]
        if self.task == "pair":
            return f"{first.text} and {self.objects[1].text}"
        if self.task == "cross":
            assert self.direction is not None
            other = f"{self.objects[1].text} moving {OPPOSITE[self.direction]}"
            return f"{first.text} moving {self.direction} passes {other}"
        subject = f"a {self.size} {first.color} {first.shape}"
        return f"{subject} {self._motion}" if self.direction is not None else subject

    @property
    def _motion(self) -> str:
        assert self.direction is not None
        if self.task == "bounce":
            return f"bounces off the {WALLS[self.direction]} {self.speed}"
        return f"moves {self.direction} {self.speed}"

    @property
    def directions(self) -> tuple[str, ...]:
        """Of each object, at first; empty for stills."""
        if self.direction is None:
            return ()
        return (self.direction, OPPOSITE[self.direction])[: len(self.objects)]

    @property
    def nominal_speed(self) -> float:
        """Pixels per frame, before the jitter; 0 for stills."""
        if self.direction is None:
            return 0.0
        return SPEEDS[self.speed] if self.speed else CROSSING_SPEED

    @property
    def nominal_radius(self) -> float:
        """Pixels, before the jitter."""
        return RADII[self.size or "small"]

    def to_metadata(self) -> dict[str, Any]:
        """JSON-able form, carried by `Prompt.metadata`; `from_metadata` is its inverse."""
        return asdict(self) | {"objects": [{"shape": e.shape, "color": e.color} for e in self.objects]}

    @staticmethod
    def from_metadata(metadata: Mapping[str, Any]) -> ClipScene:
        """Raises KeyError where the metadata is not that of a prompt of this world."""
        objects = tuple(Entity(e["shape"], e["color"]) for e in metadata["objects"])
        start = metadata["start"]
        return ClipScene(
            metadata["task"],
            objects,
            metadata["direction"],
            metadata["size"],
            metadata["speed"],
            Start(start["x"], start["y"], start["radius"]) if start is not None else None,
        )


# ---------------------------------------------------------------------------------------------------- captions, splits


def _pairs() -> Iterator[tuple[Entity, Entity]]:
    entities = [Entity(shape, color) for shape, color in product(SHAPES, COLORS)]
    return ((a, b) for a, b in product(entities, entities) if a.color != b.color)


@cache
def all_clip_scenes() -> tuple[ClipScene, ...]:
    """Every clip that has a caption of its own: 1,116."""
    single = product(("move", "bounce"), SHAPES, COLORS, DIRECTIONS, RADII, SPEEDS)
    ones = [ClipScene(t, (Entity(s, c),), d, size, speed) for t, s, c, d, size, speed in single]  # type: ignore[arg-type]
    return (*ones, *(ClipScene("cross", pair, d) for pair in _pairs() for d in ("right", "down")))


@cache
def all_still_scenes() -> tuple[ClipScene, ...]:
    """Every still that has a caption of its own: 306."""
    ones = [ClipScene("single", (Entity(s, c),), size=size) for s, c, size in product(SHAPES, COLORS, RADII)]
    return (*ones, *(ClipScene("pair", pair) for pair in _pairs()))


def clip_combinations(scene: ClipScene) -> frozenset[tuple[str, ...]]:
    """The combinations a caption binds: (shape, colour, motion) in clips, (shape, colour) in stills.

    An object that passes another one to the right moves right: equal facts are one.
    """
    if scene.direction is None:
        return frozenset((e.shape, e.color or "") for e in scene.objects)
    turn = " and back" if scene.task == "bounce" else ""
    moving = zip(scene.objects, scene.directions, strict=True)
    return frozenset((e.shape, e.color or "", direction + turn) for e, direction in moving)


def _held_out(combination: tuple[str, ...]) -> bool:
    shape, color = SHAPES.index(combination[0]), list(COLORS).index(combination[1])
    if len(combination) == 2:
        return color % 3 == shape or combination in {("square", "red"), ("triangle", "yellow")}
    direction, _, back = combination[2].partition(" ")
    # Every colour and every shape meets each residue equally often: 5 of 12 motions are never trained with it.
    return (4 * shape + 2 * color + 3 * list(DIRECTIONS).index(direction) + 6 * bool(back)) % 12 < 5


@cache
def clip_scenes(split: Split) -> tuple[ClipScene, ...]:
    """The distinct clips of a split. Raises ConfigError for an unknown one."""
    return _of_split(all_clip_scenes(), split)


@cache
def still_scenes(split: Split) -> tuple[ClipScene, ...]:
    """The distinct stills of a split. Raises ConfigError for an unknown one."""
    return _of_split(all_still_scenes(), split)


def _of_split(scenes: Sequence[ClipScene], split: Split) -> tuple[ClipScene, ...]:
    if split not in ("train", "heldout"):
        raise ConfigError(f"split {split!r} does not exist: use train or heldout.")
    return tuple(s for s in scenes if any(map(_held_out, clip_combinations(s))) == (split == "heldout"))


# -------------------------------------------------------------------------------------------------------------- prompts


def clip_prompts(split: Split, n: int | None = None, negative: str = "") -> PromptSource:
    """Text-to-video prompts, ids 0 to n - 1; `metadata` holds the scene. n: None = each caption once.

    Every caption comes once, in a fixed shuffled order, before any comes again.
    """
    return _as_prompts(_shuffled(clip_scenes(split), n), negative)


def still_prompts(split: Split, n: int | None = None, negative: str = "") -> PromptSource:
    """Text-to-image prompts, as `clip_prompts`."""
    return _as_prompts(_shuffled(still_scenes(split), n), negative)


def _as_prompts(scenes: Sequence[ClipScene], negative: str) -> PromptSource:
    return PromptList([Prompt(i, s.caption, metadata=s.to_metadata()) for i, s in enumerate(scenes)], negative)


def _shuffled(scenes: Sequence[ClipScene], n: int | None) -> list[ClipScene]:
    rng, order = np.random.default_rng(0), list[ClipScene]()
    while len(order) < (len(scenes) if n is None else n):
        order += [scenes[i] for i in rng.permutation(len(scenes))]
    return order[:n]


STARTS = 3
"""First frames per scene in a split's image-to-video prompts: 1,008 to train on, 720 held out."""


class FirstFramePrompts(PromptSource):
    """Image-to-video prompts: the caption says what moves and how, the image shows what exactly, and where it is."""

    def __init__(self, split: Split, n: int | None = None, negative: str = "") -> None:
        moving = [s for s in clip_scenes(split) if s.task != "cross"]
        self._scenes = _shuffled(moving, STARTS * len(moving) if n is None else n)
        self._stream, self._negative = int(split == "heldout"), negative

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Prompt:
        """Place the object and draw the picture, from the index alone."""
        self.check_index(index)
        scene = place(self._scenes[index], np.random.default_rng((self._stream, index)))
        return Prompt(index, scene.caption, self._negative, first_frame(scene), scene.to_metadata())


def i2v_prompts(split: Split, n: int | None = None, negative: str = "") -> PromptSource:
    """Image-to-video prompts, ids 0 to n - 1; None = each scene with three first frames.

    The splits differ in (shape, colour, motion), as those of `clip_prompts`; two objects never occur.
    """
    return FirstFramePrompts(split, n, negative)


def sample_clip(rng: np.random.Generator, split: Split | None = None, image: bool = False) -> ClipScene:
    """A clip for base training: tasks in equal shares, then uniform over the captions of a split (None = of both).

    image: one for image-to-video, with its first frame placed (`place`); never a crossing.
    """
    pools = _by_task(split)
    pool = pools[rng.integers(len(pools) - image)]
    scene = pool[rng.integers(len(pool))]
    return place(scene, rng) if image else scene


def sample_still(rng: np.random.Generator, split: Split | None = None) -> ClipScene:
    """A still for base training: uniform over the captions of a split (None = of both)."""
    pool = still_scenes(split) if split else all_still_scenes()
    return pool[rng.integers(len(pool))]


@cache
def _by_task(split: Split | None) -> tuple[tuple[ClipScene, ...], ...]:
    pool = clip_scenes(split) if split else all_clip_scenes()
    return tuple(tuple(s for s in pool if s.task == task) for task in CLIP_TASKS)


# -------------------------------------------------------------------------------------------------------------- drawing


def place(scene: ClipScene, rng: np.random.Generator) -> ClipScene:
    """The scene of one object with a first frame of its own: the image-to-video form of a `move` or `bounce`."""
    path, radii = _move(scene, rng)
    x, y = path[0, 0]
    return replace(scene, start=Start(round(float(x), 3), round(float(y), 3), round(radii[0], 3)))


def clip_path(scene: ClipScene, rng: np.random.Generator) -> np.ndarray:
    """The exact path that `draw_clip` draws from an equal `rng`: (F, objects, 2) float64 centres (x, y) in pixels."""
    return _move(scene, rng)[0]


def draw_clip(scene: ClipScene, rng: np.random.Generator) -> np.ndarray:
    """One clip (9, 32, 32, 3), or still (1, 32, 32, 3), uint8 sRGB; what the scene leaves open comes from `rng`."""
    return render(scene, *_move(scene, rng))


def draw_clips(scenes: Sequence[ClipScene], rng: np.random.Generator) -> np.ndarray:
    """B clips, (B, 9, 32, 32, 3) uint8."""
    clips = np.empty((len(scenes), FRAMES, SIZE, SIZE, 3), np.uint8)
    for clip, scene in zip(clips, scenes, strict=True):
        clip[:] = draw_clip(scene, rng)
    return clips


def first_frame(scene: ClipScene) -> Image:
    """The given first frame of a placed scene as a PIL image, 32x32 RGB."""
    from PIL import Image

    assert scene.start is not None
    start = scene.start
    return Image.fromarray(render(scene, np.array([[[start.x, start.y]]]), (start.radius,))[0])


def render(scene: ClipScene, path: np.ndarray, radii: Sequence[float]) -> np.ndarray:
    """Draw a scene's objects along any path. path: (F, objects, 2) centres (x, y). Returns (F, 32, 32, 3) uint8."""
    y, x = (axis.astype(np.float32)[None] for axis in np.ogrid[0.5:SIZE:1.0, 0.5:SIZE:1.0])
    frames = np.empty((len(path), SIZE, SIZE, 3), np.float32)
    frames[:] = BACKGROUND
    centres = path.astype(np.float32)[..., None, None]  # (F, objects, 2, 1, 1)
    for i, (entity, radius) in enumerate(zip(scene.objects, radii, strict=True)):
        half = half_extent(entity.shape, radius)
        share = coverage(entity.shape, y - centres[:, i, 1], x - centres[:, i, 0], half)[..., None]
        frames += share * (np.asarray(COLORS[entity.color or ""], np.float32) - frames)
    return np.rint(frames).astype(np.uint8)


def _move(scene: ClipScene, rng: np.random.Generator) -> tuple[np.ndarray, tuple[float, ...]]:
    """Path (F, objects, 2) and radius of each object."""
    radii = tuple(
        scene.start.radius if scene.start else scene.nominal_radius + rng.uniform(-_RADIUS_JITTER, _RADIUS_JITTER)
        for _ in scene.objects
    )
    halves = [np.array(half_extent(e.shape, r)) for e, r in zip(scene.objects, radii, strict=True)]
    speed = scene.nominal_speed * (1 + rng.uniform(-_SPEED_JITTER, _SPEED_JITTER))
    if len(scene.objects) == 2:
        return _in_lanes(scene, halves, speed, rng), radii
    return _alone(scene, halves[0], speed, rng)[:, None], radii


def _alone(scene: ClipScene, half: np.ndarray, speed: float, rng: np.random.Generator) -> np.ndarray:
    """Path (F, 2) of one object that stays inside the frame, or (1, 2) where nothing moves."""
    low, high = half + _MARGIN, SIZE - half - _MARGIN
    if scene.direction is None:
        return rng.uniform(low, high)[None]
    along = np.array(DIRECTIONS[scene.direction], float)
    axis, time = int(np.argmax(np.abs(along))), np.arange(FRAMES)
    if scene.task == "bounce":
        wall = SIZE - half[axis] if along.sum() > 0 else half[axis]
        nominal = scene.nominal_speed * rng.uniform(*_TURN)  # distance from the wall at first
        start = rng.uniform(low, high)
        start[axis] = wall - along[axis] * nominal
        start = np.array([scene.start.x, scene.start.y]) if scene.start else start
        distance = abs(start[axis] - wall)
        path = np.repeat(start[None], FRAMES, axis=0)
        # Reflection between the frames, too: the way to the wall, then the same speed back.
        path[:, axis] = wall - along[axis] * np.abs(distance - speed * time)
        return path
    # The fastest its speed class allows must fit, so that a given start never tells the exact speed.
    travel = scene.nominal_speed * (1 + _SPEED_JITTER) * (FRAMES - 1) * along
    start = rng.uniform(low - np.minimum(travel, 0), high - np.maximum(travel, 0))
    start = np.array([scene.start.x, scene.start.y]) if scene.start else start
    return start + speed * time[:, None] * along


def _in_lanes(scene: ClipScene, halves: Sequence[np.ndarray], speed: float, rng: np.random.Generator) -> np.ndarray:
    """Path (F, 2, 2) of two objects that pass each other halfway, or (1, 2, 2) of two at rest."""
    vertical = scene.direction == "down" if scene.direction else bool(rng.integers(2))
    axis = int(vertical)
    lanes = np.array(LANES)[rng.permutation(2)] + rng.uniform(-_LANE_JITTER, _LANE_JITTER, 2)
    time = np.arange(FRAMES) if scene.direction else np.zeros(1)
    path = np.empty((len(time), 2, 2))
    for i, half in enumerate(halves):
        path[:, i, 1 - axis] = lanes[i]
        if scene.direction is None:
            path[:, i, axis] = rng.uniform(half[axis] + _MARGIN, SIZE - half[axis] - _MARGIN)
        else:
            sign = 1 if i == 0 else -1  # crossings are told of the object that goes right or down
            path[:, i, axis] = SIZE / 2 + rng.uniform(-2, 2) + sign * speed * (time - (FRAMES - 1) / 2)
    return path
