"""Objects of moving-shapes clips, found in pixels and followed through time; paths fitted to where they were.

Everything that stands out from the ground is foreground; its connected components are the objects. Rims are
antialiased, so light measures how much of a pixel an object covers: places are known to a few hundredths of a pixel,
and a shape is the template that overlaps best. Objects are linked from frame to frame at the least total distance.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import Any, Self

import numpy as np
from scipy import ndimage

from dancegrpo.shapes.clips import BACKGROUND, FRAMES, SHAPES, SIZE, coverage, half_extent

FOREGROUND_DISTANCE = 60.0
"""RGB distance (0-255 per channel) from the ground at which a pixel counts as part of an object."""
MIN_AREA = 12
"""Smaller components, in pixels, are specks; the smallest object drawn has 31."""
STRAY_DISTANCE = 16.0
"""RGB distance from the ground that goes unseen outside the objects."""
_MAX_OBJECTS = 4

HALF = np.array([half_extent(shape, 1.0) for shape in SHAPES], np.float32)
"""Half width and half height of each shape (shapes, 2), of radius 1."""
_UNIT_AREA = np.array([np.pi, 4.0, 2.0], np.float32) * HALF.prod(axis=1)
_CENTROID = np.array([0.0, 0.0, 1 / 3], np.float32)  # below the middle of its box, by half its height
_GROUND = np.asarray(BACKGROUND, np.float32)


@dataclass(frozen=True)
class Rows:
    """Arrays that share their leading axis."""

    def at(self, index: Any) -> Self:
        """The same of some clips, or of one."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})


# --------------------------------------------------------------------------------------------------------------- seeing


@dataclass(frozen=True)
class Seen(Rows):
    """Up to M objects per frame by falling area, and how many there are.

    present: (B, F, M) bool. place: (..., 2) centroid (x, y). area: in pixels. color: (..., 3) RGB. spread: mean RGB
    distance of its pixels from that one colour. iou: (..., shapes), overlap with each template. count: (B, F).
    stray: (B, F), light outside all objects, in pixels of full brightness.
    """

    present: np.ndarray
    place: np.ndarray
    area: np.ndarray
    color: np.ndarray
    spread: np.ndarray
    iou: np.ndarray
    count: np.ndarray
    stray: np.ndarray


def look(pixels: np.ndarray) -> Seen:
    """Find the objects of clips (B, F, 3, 32, 32) float in [0, 255]."""
    lead, pixels = pixels.shape[:2], pixels.reshape(-1, 3, SIZE, SIZE)
    difference = pixels - _GROUND[:, None, None]
    light = np.sqrt(np.einsum("ncyx,ncyx->nyx", difference, difference))
    owner, frame, rank, count = _components(light)
    # The rims' faint pixels belong to the object beside them.
    reach = np.where(owner > 0, owner, ndimage.maximum_filter(owner, (1, 3, 3)))
    stray = (np.maximum(light - STRAY_DISTANCE, 0.0) * (reach == 0)).sum(axis=(1, 2)) / 100.0

    shape = (len(pixels), _MAX_OBJECTS)
    table = [np.zeros(shape + tail, np.float32) for tail in ((), (2,), (), (3,), (), (len(SHAPES),))]
    if len(frame):
        mask = reach[frame] == np.arange(1, len(frame) + 1, dtype=reach.dtype)[:, None, None]
        for column, found in zip(table, _examine(difference[frame], light[frame] * mask, mask), strict=True):
            column[frame, rank] = found
    columns = [column.reshape(lead + column.shape[1:]) for column in (*table, count, stray)]
    return Seen(columns[0] > 0, *columns[1:])


def _components(light: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(N, 32, 32) labels 1..C of the kept components, their frame (C,) and rank (C,), and how many there are (N,)."""
    # One labelling for all frames, as layers that the structuring element does not connect.
    structure = np.zeros((3, 3, 3), bool)
    structure[1] = ndimage.generate_binary_structure(2, 1)
    labels, number = ndimage.label(light > FOREGROUND_DISTANCE, structure)
    inside = np.flatnonzero(labels)
    frame_of, area_of = np.zeros(number + 1, np.int64), np.bincount(labels.ravel(), minlength=number + 1)
    frame_of[labels.ravel()[inside]] = inside // (SIZE * SIZE)
    large = np.flatnonzero(area_of[1:] >= MIN_AREA) + 1
    count = np.bincount(frame_of[large], minlength=len(light))
    large = large[np.lexsort((-area_of[large], frame_of[large]))]
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    rank = np.arange(len(large)) - first[frame_of[large]]
    kept = large[rank < _MAX_OBJECTS]
    renamed = np.zeros(number + 1, np.int32)
    renamed[kept] = np.arange(1, len(kept) + 1)
    return renamed[labels], frame_of[kept], rank[rank < _MAX_OBJECTS], count


def _examine(difference: np.ndarray, light: np.ndarray, mask: np.ndarray) -> tuple[Any, ...]:
    """present, place, area, color, spread, iou of C objects; difference: (C, 3, 32, 32) from the ground."""
    # The brightest pixels are those an object covers whole: an antialiased rim says nothing of its colour.
    weight = (light / light.max(axis=(1, 2), keepdims=True)) ** 8
    tint = np.einsum("nyx,ncyx->nc", weight, difference) / weight.sum(axis=(1, 2))[:, None]
    brightness = np.sqrt((tint * tint).sum(axis=1))[:, None, None]
    share = np.minimum(light / brightness, 1.0)
    area = share.sum(axis=(1, 2))
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    x, y = share.sum(axis=1) @ axis / area, share.sum(axis=2) @ axis / area
    rest = difference - share[:, None] * tint[:, :, None, None]
    spread = (np.sqrt(np.einsum("ncyx,ncyx->nyx", rest, rest)) * mask).sum(axis=(1, 2)) / area
    iou = np.stack([_overlap(share, i, x, y, area) for i in range(len(SHAPES))], axis=1)
    return 1.0, np.stack([x, y], axis=1), area, tint + _GROUND, spread, iou


def _overlap(share: np.ndarray, shape: int, x: np.ndarray, y: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Soft intersection over union (C,) of objects and the template of equal area and centroid."""
    radius = np.sqrt(area / _UNIT_AREA[shape])[:, None, None]
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    dx = axis[None, None, :] - x[:, None, None]
    dy = axis[None, :, None] - y[:, None, None] + _CENTROID[shape] * HALF[shape, 1] * radius
    if SHAPES[shape] == "circle":
        template = np.clip(0.5 + radius - np.sqrt(dx * dx + dy * dy), 0.0, 1.0)
    else:
        template = coverage(SHAPES[shape], dy, dx, (HALF[shape, 0] * radius, HALF[shape, 1] * radius))
    both = np.minimum(share, template).sum(axis=(1, 2))
    return both / (area + template.sum(axis=(1, 2)) - both)


# --------------------------------------------------------------------------------------------------------------- tracks


@dataclass(frozen=True)
class Tracks(Rows):
    """K objects followed through a clip; columns as in `Seen`, where M is K.

    shape: (B, K) index of the template that fits the whole clip best. radius: (B, F, K) of that shape, in pixels.
    center: (B, F, K, 2), the middle of its box; where an object is missing, where it was last seen. number: (B, F) in
    [0, 1], 1 where the frame has exactly K objects.
    """

    present: np.ndarray
    center: np.ndarray
    radius: np.ndarray
    color: np.ndarray
    iou: np.ndarray
    shape: np.ndarray
    number: np.ndarray


def follow(seen: Seen, count: int) -> Tracks:
    """Link `count` objects from frame to frame at the least total distance, starting from the largest ones."""
    clips, frames = seen.count.shape
    rows, choices = np.arange(clips), np.array(list(permutations(range(_MAX_OBJECTS), count)))
    chosen = np.zeros((clips, frames, count), np.int64)
    place, last = np.zeros((clips, frames, count, 2), np.float32), np.full((clips, count, 2), np.nan, np.float32)
    for f in range(frames):
        step = seen.place[:, f][:, choices] - last[:, None]  # (B, choices, K, 2)
        distance = np.nan_to_num(np.sqrt((step * step).sum(axis=-1)))  # from nowhere, any place is as near
        distance = np.where(seen.present[:, f][:, choices], distance, 10.0 * SIZE)
        chosen[:, f] = choices[distance.sum(axis=-1).argmin(axis=1)]
        here = seen.present[rows[:, None], f, chosen[:, f]]
        last = np.where(here[..., None], seen.place[rows[:, None], f, chosen[:, f]], last)
        place[:, f] = last
    index = rows[:, None, None], np.arange(frames)[None, :, None], chosen
    present, area, iou = seen.present[index], seen.area[index], seen.iou[index]
    shape = iou.sum(axis=1).argmax(axis=-1)
    radius = np.sqrt(area / _UNIT_AREA[shape][:, None])
    center = np.nan_to_num(place, nan=SIZE / 2)
    center[..., 1] -= (_CENTROID * HALF[:, 1])[shape][:, None] * radius
    number = np.minimum(seen.count, count) / np.maximum(seen.count, count)
    return Tracks(present, center, radius, seen.color[index], iou, shape, number)


# --------------------------------------------------------------------------------------------------- paths through time

_TIME = np.arange(FRAMES, dtype=float)
_TURNS = np.arange(1.5, FRAMES - 2.49, 0.05)
"""Frames at which a path may turn: between the second and the last but one."""
_BASES = np.stack([np.stack([np.ones(FRAMES), run], axis=1) for run in (_TIME, *np.abs(_TIME - _TURNS[:, None]))])
_FITS = np.linalg.pinv(_BASES)  # (1 + turns, 2, F): the line, then each reflection; rows are offset and slope


def fit_path(path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square residual (N,) in pixels from the best path of constant speed, and that speed (N,) per frame.

    path: (N, F, 2). A path is a straight line, or one that is reflected once in x or in y.
    """
    rest, slope = _least_squares(path.transpose(1, 0, 2).reshape(FRAMES, -1))
    rest, slope = (found.reshape(-1, len(path), 2) for found in (rest, slope))
    turn = 1 + rest[1:].argmin(axis=0)[None]
    bounce, turned = (np.take_along_axis(found, turn, axis=0)[0] for found in (rest, slope))
    # Straight, or reflected in x, or in y.
    errors = np.stack([rest[0].sum(axis=1), bounce[:, 0] + rest[0, :, 1], rest[0, :, 0] + bounce[:, 1]])
    speeds = np.hypot([slope[0, :, 0], turned[:, 0], slope[0, :, 0]], [slope[0, :, 1], slope[0, :, 1], turned[:, 1]])
    best, rows = errors.argmin(axis=0), np.arange(len(path))
    return np.sqrt(errors[best, rows] / FRAMES), speeds[best, rows]


def turning_point(path: np.ndarray) -> float:
    """Where a path (F,) along one axis, reflected once, turns; the turn may fall between two frames."""
    rest, _ = _least_squares(path[:, None])
    return float(_FITS[1 + rest[1:, 0].argmin(), 0] @ path)


def _least_squares(paths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared residual and slope, (1 + turns, N) each, of paths (F, N) along one axis."""
    coefficients = _FITS @ paths  # (1 + turns, 2, N)
    residual = paths - _BASES @ coefficients
    return (residual * residual).sum(axis=1), coefficients[:, 1]
