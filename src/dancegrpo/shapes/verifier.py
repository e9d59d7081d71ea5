"""A rule-based judge of drawings, on pixels alone: which objects are there, and are they what the caption asked for?

Everything that stands out from the border's colour is foreground; its connected components are the objects. A
component's colour is the nearest palette colour of its median, its shape the best of three templates fitted to its
bounding box. `exact` wants all and only the required objects; `graded` is the share of the criteria that hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from dancegrpo.prompts import Prompt
from dancegrpo.shapes.scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZE, Entity, Scene, coverage

FOREGROUND_DISTANCE = 80.0
"""RGB distance (0-255 per channel) from the background at which a pixel counts as part of an object."""
COLOR_DISTANCE = 70.0
"""Largest RGB distance from a palette colour that still is that colour."""
PURITY = 0.5
"""Share of an object's pixels that must have its colour (an antialiased rim has not)."""
MIN_AREA = 40
"""Smaller components, in pixels, are specks: the smallest object drawn has about 140."""
SHAPE_IOU = 0.6
"""Overlap with its template that a shape needs, besides beating the other templates; drawn ones have 0.89 or more."""
ALIGNMENT = 0.5
"""Cosine between the offset of two objects and the relation's axis, as in GenEval: within 60 degrees."""
_MAX_OBJECTS = 6

_COLOR_NAMES, _COLOR_RGB = list(COLORS), np.asarray(list(COLORS.values()), np.float32)
_BACKGROUND_NAMES, _BACKGROUND_RGB = list(BACKGROUNDS), np.asarray(list(BACKGROUNDS.values()), np.float32)


@dataclass(frozen=True)
class Found:
    """One object seen. `iou` holds the overlap with each of SHAPES, `distance` the RGB distance to each of COLORS."""

    x: float
    y: float
    area: int
    iou: tuple[float, ...]
    distance: tuple[float, ...]
    purity: float

    @property
    def shape(self) -> str | None:
        """The best template's name, None where none fits."""
        best = int(np.argmax(self.iou))
        return SHAPES[best] if self.iou[best] >= SHAPE_IOU else None

    @property
    def color(self) -> str | None:
        """The nearest palette colour's name, None where it is far or the object has several."""
        best = int(np.argmin(self.distance))
        return _COLOR_NAMES[best] if self.distance[best] <= COLOR_DISTANCE and self.purity >= PURITY else None


@dataclass(frozen=True)
class Sighting:
    """All that is seen in one picture: objects by falling area, and the background's name or None."""

    objects: tuple[Found, ...]
    background: str | None


@dataclass(frozen=True)
class Verdict:
    """exact: (B,) bool, the drawing is right. graded: (B,) float32 in [0, 1]. Both mean nothing where not valid."""

    exact: np.ndarray
    graded: np.ndarray
    valid: np.ndarray


def judge(media: np.ndarray, prompts: Sequence[Prompt]) -> Verdict:
    """Compare B pictures with the scenes in their prompts' metadata.

    media: (B, 3, 64, 64) or (B, 1, 3, 64, 64) float in [0, 1]. A picture with a non-finite pixel is not valid.
    Raises ValueError where shapes or counts disagree, KeyError where a prompt's metadata holds no scene.
    """
    media = np.asarray(media, np.float32)
    pixels = media[:, 0] if media.ndim == 5 and media.shape[1] == 1 else media
    if pixels.shape != (len(prompts), 3, SIZE, SIZE):
        raise ValueError(f"media {media.shape} for {len(prompts)} prompts: use (B, 1, 3, {SIZE}, {SIZE}).")
    valid = np.isfinite(pixels).all(axis=(1, 2, 3))
    exact, graded = np.zeros(len(prompts), bool), np.zeros(len(prompts), np.float32)
    clean = np.where(valid[:, None, None, None], pixels, 0.0).clip(0.0, 1.0)
    for i, sighting in enumerate(see(clean * 255.0)):
        if valid[i]:
            exact[i], graded[i] = _compare(sighting, Scene.from_metadata(prompts[i].metadata))
    return Verdict(exact, graded, valid)


# --------------------------------------------------------------------------------------------------------------- seeing


def see(pixels: np.ndarray) -> list[Sighting]:
    """Find background and objects. pixels: (B, 3, 64, 64) float in [0, 255]."""
    border = np.concatenate(
        [pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, 1:-1, 0], pixels[:, :, 1:-1, -1]], axis=2
    )  # (B, 3, 252)
    ground = np.median(border, axis=2)  # (B, 3)
    steady = (_distance(border, ground[:, :, None]) <= FOREGROUND_DISTANCE).mean(axis=1) >= PURITY
    foreground = _distance(pixels, ground[:, :, None, None]) > FOREGROUND_DISTANCE

    # One labelling for the whole batch: pictures are layers that the structuring element does not connect.
    structure = np.zeros((3, 3, 3), bool)
    structure[1] = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(foreground, structure)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    boxes = ndimage.find_objects(labels)
    by_picture: list[list[int]] = [[] for _ in pixels]
    for label in np.flatnonzero(areas[1:] >= MIN_AREA) + 1:
        by_picture[boxes[label - 1][0].start].append(int(label))

    sightings = []
    for i, found in enumerate(by_picture):
        largest = sorted(found, key=lambda label: -areas[label])
        # Past a handful of objects the drawing is wrong whatever they are; only their number still counts.
        objects = [_examine(pixels[i], labels[i], label, boxes[label - 1]) for label in largest[:_MAX_OBJECTS]]
        objects += [_SPECK] * (len(found) - len(objects))
        sightings.append(Sighting(tuple(objects), _name_background(ground[i]) if steady[i] else None))
    return sightings


_SPECK = Found(0.0, 0.0, 0, (0.0,) * len(SHAPES), (1e3,) * len(COLORS), 0.0)


def _distance(pixels: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Euclidean distance over the channel axis 1."""
    difference = pixels - color
    return np.sqrt(np.einsum("bc...,bc...->b...", difference, difference))


def _name_background(color: np.ndarray) -> str | None:
    distance = np.linalg.norm(_BACKGROUND_RGB - color, axis=1)
    best = int(distance.argmin())
    return _BACKGROUND_NAMES[best] if distance[best] <= COLOR_DISTANCE else None


def _examine(picture: np.ndarray, labels: np.ndarray, label: int, box: tuple[slice, ...]) -> Found:
    rows, columns = box[1], box[2]
    mask = labels[rows, columns] == label
    area = int(mask.sum())
    colors = picture[:, rows, columns][:, mask]  # (3, area)
    median = np.sort(colors, axis=1)[:, area // 2]  # a sort of 3 short rows is faster than np.median
    distance = np.sqrt(((_COLOR_RGB - median) ** 2).sum(axis=1))
    difference = colors - _COLOR_RGB[int(distance.argmin())][:, None]
    purity = ((difference * difference).sum(axis=0) <= COLOR_DISTANCE**2).mean()

    templates, sizes = _templates(*mask.shape)
    overlap = templates @ mask.ravel().astype(np.float32)
    iou = overlap / (sizes + area - overlap)
    return Found(
        x=(columns.start + columns.stop) / 2,
        y=(rows.start + rows.stop) / 2,
        area=area,
        iou=tuple(iou.tolist()),
        distance=tuple(distance.tolist()),
        purity=float(purity),
    )


@lru_cache(maxsize=4096)
def _templates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The three shapes stretched to a box: masks (3, height * width) float32, and their areas (3,)."""
    y, x = np.ogrid[0.5:height:1.0, 0.5:width:1.0]
    half = (width / 2, height / 2)
    masks = np.stack([coverage(shape, y - half[1], x - half[0], half) >= 0.5 for shape in SHAPES])
    flat = masks.reshape(len(SHAPES), -1).astype(np.float32)
    return flat, flat.sum(axis=1)


# ------------------------------------------------------------------------------------------------------------ comparing


def _compare(sighting: Sighting, scene: Scene) -> tuple[bool, float]:
    """(exact, graded). Criteria of equal weight: each required object, the number, the background, the relation."""
    objects, wanted = sighting.objects, scene.entities
    number = max(0.0, 1.0 - abs(len(objects) - len(wanted)) / len(wanted))
    background = sighting.background is not None and scene.background in (None, sighting.background)
    matched = _match(objects, scene)
    credits = [_credit(found, entity) for found, entity in zip(matched, wanted, strict=True)]
    # The objects share one vote per kind of question, or four circles would drown their number.
    criteria = [float(np.mean(credits)), number, float(background)]
    right = len(objects) == len(wanted) and background and all(map(_is, matched, wanted))
    if scene.relation:
        cosine = _alignment(matched, scene.relation)
        # A position without the objects it relates is worth nothing.
        criteria.append(min(credits) * float(np.clip((cosine + 1) / (ALIGNMENT + 1), 0.0, 1.0)))
        right = right and cosine > ALIGNMENT
    return bool(right), float(np.mean(criteria))


def _match(objects: Sequence[Found], scene: Scene) -> list[Found | None]:
    """The found objects that stand for the required ones at the highest total credit; None where there is none."""
    wanted = scene.entities
    pool: list[Found | None] = [*objects[:_MAX_OBJECTS], *[None] * max(0, len(wanted) - len(objects))]
    if len(set(wanted)) == 1:  # identical requirements: the best ones, in any order
        return sorted(pool, key=lambda found: -_credit(found, wanted[0]))[: len(wanted)]
    table = [[_credit(found, entity) for found in pool] for entity in wanted]
    best = max(permutations(range(len(pool)), len(wanted)), key=lambda p: sum(table[i][j] for i, j in enumerate(p)))
    return [pool[j] for j in best]


def _is(found: Found | None, entity: Entity) -> bool:
    """Exactly the required object. A colour left open still has to be one of the palette's."""
    return (
        found is not None
        and found.shape == entity.shape
        and found.color is not None
        and entity.color in (None, found.color)
    )


def _credit(found: Found | None, entity: Entity) -> float:
    """Graded likeness of one object in [0, 1]: mean over shape and colour, each 1 inside the exact rule's tolerance."""
    if found is None:
        return 0.0
    shape = SHAPES.index(entity.shape)
    rival = max(iou for i, iou in enumerate(found.iou) if i != shape)
    # 1 where the shape beats its rivals and fits its template; falls smoothly with both.
    likeness = float(np.clip(1.0 + 3.0 * min(found.iou[shape] - rival, found.iou[shape] - SHAPE_IOU, 0.0), 0.0, 1.0))
    near = min(found.distance) if entity.color is None else found.distance[_COLOR_NAMES.index(entity.color)]
    tint = float(np.clip(1.0 - (near - COLOR_DISTANCE) / (2 * COLOR_DISTANCE), 0.0, 1.0))
    return (likeness + tint * min(1.0, found.purity / PURITY)) / 2


def _alignment(matched: Sequence[Found | None], relation: str) -> float:
    """Cosine in [-1, 1] between the second-to-first offset and the relation; -1 where an object is missing."""
    first, second = matched
    if first is None or second is None:
        return -1.0
    dx, dy = RELATIONS[relation]
    offset = (first.x - second.x, first.y - second.y)
    return float((offset[0] * dx + offset[1] * dy) / max(np.hypot(*offset), 1e-6))
