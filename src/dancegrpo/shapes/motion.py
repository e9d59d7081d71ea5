"""A rule-based judge of moving-shapes clips: visual quality, motion quality, text alignment, identity.

The four scores are in [0, 1], 1 for a clip drawn as asked, and graded: an improvement shows before all is right. Each
is a product, so that any one failure costs most of it. Visual and motion quality do not look at what the caption
says, save for how many objects there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from dancegrpo.prompts import Prompt
from dancegrpo.shapes.clips import COLORS, DIRECTIONS, FRAMES, SHAPES, SIZE, SPEEDS, ClipScene
from dancegrpo.shapes.tracks import HALF, Seen, Tracks, fit_path, follow, look, turning_point

PASS_MARK = 0.75
"""Score that every axis which can be judged needs for a clip to be right."""
FLOOR = 0.2
"""What one wholly unmet criterion leaves of text alignment and of identity: none hides progress on the others."""
_CHUNK = 32  # clips worked on at once: what fits a processor's cache

_COLOR_NAMES, _COLOR_RGB = list(COLORS), np.asarray(list(COLORS.values()), np.float32)


@dataclass(frozen=True)
class MotionVerdict:
    """Four (B,) float32 in [0, 1], NaN where an axis cannot be judged; they mean nothing where `valid` is False.

    vq: visual quality. mq: motion quality, NaN for stills. ta: text alignment. identity: likeness to the given first
    frame, NaN where none was given. exact: (B,) bool, every axis reaches PASS_MARK. valid: (B,) bool.
    """

    vq: np.ndarray
    mq: np.ndarray
    ta: np.ndarray
    identity: np.ndarray
    exact: np.ndarray
    valid: np.ndarray


def judge_clips(media: np.ndarray, prompts: Sequence[Prompt]) -> MotionVerdict:
    """Judge B clips by the scenes in their prompts' metadata.

    media: (B, 9, 3, 32, 32) float in [0, 1], or (B, 1, 3, 32, 32) for stills. A clip with a non-finite pixel is not
    valid. Raises ValueError where shapes, counts or scenes disagree, KeyError where metadata holds no scene.
    """
    media = np.asarray(media, np.float32)
    if media.ndim != 5 or media.shape[1] not in (1, FRAMES) or media.shape[2:] != (3, SIZE, SIZE):
        raise ValueError(f"media {media.shape} are none of this world: use (B, {FRAMES} or 1, 3, {SIZE}, {SIZE}).")
    if len(media) != len(prompts):
        raise ValueError(f"{len(media)} clips for {len(prompts)} prompts: give one prompt per clip.")
    scenes = [ClipScene.from_metadata(prompt.metadata) for prompt in prompts]
    for scene in scenes:
        if (scene.direction is None) != (media.shape[1] == 1):
            raise ValueError(f"{media.shape[1]} frames for {scene.caption!r}: stills have 1 frame, clips {FRAMES}.")
    valid = np.isfinite(media).all(axis=(1, 2, 3, 4))
    axes = np.zeros((4, len(media)), np.float32)
    for first in range(0, len(media), _CHUNK):
        part = slice(first, first + _CHUNK)
        clean = np.where(valid[part, None, None, None, None], media[part], 0.0).clip(0.0, 1.0)
        axes[:, part] = _judge(clean * 255.0, scenes[part])
    exact = valid & (np.isnan(axes) | (axes >= PASS_MARK)).all(axis=0)
    vq, mq, ta, identity = axes
    return MotionVerdict(vq, mq, ta, identity, np.asarray(exact), valid)


def _judge(pixels: np.ndarray, scenes: Sequence[ClipScene]) -> np.ndarray:
    """The four axes (4, B) of clips (B, F, 3, 32, 32) in [0, 255]."""
    seen = look(pixels)
    axes = np.full((4, len(scenes)), np.nan, np.float32)
    axes[0] = _visual_quality(seen)
    for count in (1, 2):
        where = [i for i, scene in enumerate(scenes) if len(scene.objects) == count]
        if not where:
            continue
        tracks = follow(seen.at(where), count)
        if pixels.shape[1] > 1:
            axes[1, where] = _motion_quality(tracks)
        for j, i in enumerate(where):
            axes[2, i] = _text_alignment(tracks.at(j), scenes[i])
            if scenes[i].start is not None:
                axes[3, i] = _identity(tracks.at(j), scenes[i])
    return axes


def _fall(value: Any, free: float, scale: float) -> np.ndarray:
    """1 up to `free`, then falling by a factor of e per `scale`: never flat where something is left to improve."""
    return np.exp(-np.maximum(value - free, 0.0) / scale)


# ------------------------------------------------------------------------------------------------------------ qualities


def _visual_quality(seen: Seen) -> np.ndarray:
    """(B,): clean shapes of one pure palette colour each on a plain ground, in every frame, and no flicker."""
    fit = np.clip((seen.iou.max(axis=-1) - 0.5) / 0.46, 0.0, 1.0)
    gap = seen.color[..., None, :] - _COLOR_RGB
    tint = _fall(np.sqrt((gap * gap).sum(axis=-1)).min(axis=-1), 8.0, 60.0)
    pure = _fall(seen.spread, 8.0, 40.0)
    weight = np.where(seen.present, seen.area, 0.0)
    total = np.maximum(weight.sum(axis=-1), 1e-6)
    objects = (weight * fit * tint * pure).sum(axis=-1) / total
    frames = objects * _fall(seen.stray, 1.0, 20.0)
    # Without linking: the mean colour of all that is there, which neither motion nor size changes. Where nothing is,
    # the frame has lost its share above.
    color = (weight[..., None] * seen.color).sum(axis=-2) / total[..., None]
    there = np.asarray(weight.any(axis=-1))[..., None]
    known = np.ma.array(color, mask=np.broadcast_to(~there, color.shape))
    middle = np.ma.median(known, axis=1, keepdims=True).filled(0.0)
    change = (np.abs(color - middle) * there).sum(axis=(1, 2)) / np.maximum(there.sum(axis=(1, 2)), 1)
    return frames.mean(axis=1) * _fall(change, 3.0, 30.0)


def _motion_quality(tracks: Tracks) -> np.ndarray:
    """(B,): the right number of rigid objects, each of which moves at constant speed, straight or reflected once."""
    clips, frames, count = tracks.present.shape
    path = tracks.center.astype(float).transpose(0, 2, 1, 3).reshape(-1, frames, 2)
    residual, speed = (found.reshape(clips, count) for found in fit_path(path))
    smooth = _fall(residual, 0.06, 0.8)
    moves = np.clip(speed * (frames - 1) / 5.0, 0.0, 1.0)
    each = smooth * moves * _rigid(tracks)
    objects = (each.mean(axis=1) + each.min(axis=1)) / 2
    return tracks.number.mean(axis=1) ** 2 * objects


def _rigid(tracks: Tracks) -> np.ndarray:
    """(B, K): neither size nor shape changes over the frames in which the object is there."""
    there = tracks.present.astype(float)
    frames = np.maximum(there.sum(axis=1), 1.0)
    middle = (tracks.radius * there).sum(axis=1) / frames
    size = np.abs(tracks.radius / np.maximum(middle, 1e-6)[:, None] - 1.0)
    own = np.take_along_axis(tracks.iou, tracks.shape[:, None, :, None], axis=-1)[..., 0]
    morph = tracks.iou.max(axis=-1) - own
    size, morph = ((value * there).sum(axis=1) / frames for value in (size, morph))
    return _fall(size, 0.015, 0.1) * _fall(morph, 0.005, 0.06)


# ----------------------------------------------------------------------------------------- what was asked for, one clip


def _criteria(*credits: float) -> float:
    """The product of criteria in [0, 1], each of which can cost all but FLOOR."""
    return float(np.prod([FLOOR + (1.0 - FLOOR) * np.clip(credit, 0.0, 1.0) for credit in credits]))


def _text_alignment(track: Tracks, scene: ClipScene) -> float:
    """What the caption says, one criterion per kind of question, for the likeliest roles of the tracks."""
    orders = permutations(range(len(scene.objects)))
    return float(track.number.mean()) * max(_criteria(*_answers(track, scene, order)) for order in orders)


def _answers(track: Tracks, scene: ClipScene, order: Sequence[int]) -> list[float]:
    """Credit per kind of question, in which the objects share; `order` gives each object its track."""
    asked = list(zip(order, scene.objects, strict=True))
    credits: list[Any] = []
    credits.append(np.mean([_color_credit(track, k, entity.color) for k, entity in asked]))
    credits.append(np.mean([_shape_credit(track, k, entity.shape) for k, entity in asked]))
    if scene.size is not None:
        # Halfway between small and large, 5 pixels, is neither.
        above = _radius(track, order[0]) - 5.0
        credits.append(0.5 + (above if scene.size == "large" else -above))
    if scene.direction is not None:
        moving = zip(order, scene.directions, strict=True)
        credits.append(np.mean([_direction_credit(track, k, scene.task, direction) for k, direction in moving]))
    if scene.speed is not None:
        credits.append(_speed_credit(track, scene.speed))
    if scene.task == "cross":
        credits.append(_passing_credit(track, order, scene.directions[0]))
    return [float(credit) for credit in credits]


def _color_credit(track: Tracks, k: int, color: str | None) -> float:
    """Mean over frames; 0 for any other palette colour, which are at least 120 apart."""
    gap = track.color[:, k] - _COLOR_RGB[_COLOR_NAMES.index(color or "")]
    distance = np.sqrt((gap * gap).sum(axis=-1))
    return float((np.clip((110.0 - distance) / 80.0, 0.0, 1.0) * track.present[:, k]).mean())


def _shape_credit(track: Tracks, k: int, shape: str) -> float:
    """Mean over frames: 1 where the shape beats both others clearly, 1/2 on a par, 0 clearly beaten."""
    index = SHAPES.index(shape)
    rival = np.delete(track.iou[:, k], index, axis=-1).max(axis=-1)
    margin = np.clip(0.5 + (track.iou[:, k, index] - rival) / 0.16, 0.0, 1.0)
    return float((margin * track.present[:, k]).mean())


def _radius(track: Tracks, k: int) -> float:
    there = track.present[:, k]
    return float(np.median(track.radius[there, k])) if there.any() else 0.0


def _speed_credit(track: Tracks, speed: str) -> float:
    """1 within 15 % of the class, 0 from the other class's on: they are a factor of 2 apart."""
    _, found = fit_path(track.center.astype(float).transpose(1, 0, 2))
    ratio = abs(np.log2(max(float(found[0]), 1e-3) / SPEEDS[speed]))
    return float((0.9 - ratio) / 0.7)


def _direction_credit(track: Tracks, k: int, task: str, direction: str) -> float:
    """1 for the motion asked for, about 0 across it, for none at all and for the opposite one."""
    path = track.center[:, k].astype(float)
    if task != "bounce":
        return _progress(path, direction) / 0.9
    way = max(_progress(path, direction, turn) for turn in range(2, FRAMES - 2))
    return way / 0.75 * float(_fall(_wall_gap(track, k, direction), 0.75, 3.0))


def _progress(path: np.ndarray, direction: str, turn: int = FRAMES) -> float:
    """Share of the way that leads in a direction, from step `turn` on in the opposite one; in [-1, 1]."""
    step = np.diff(path, axis=0)
    ahead = step @ np.array(DIRECTIONS[direction], float)
    ahead[turn:] *= -1
    # Half a pixel is what trembling on the spot may cover.
    return float(ahead.sum() / (np.hypot(*step.T).sum() + 0.5))


def _wall_gap(track: Tracks, k: int, direction: str) -> float:
    """Pixels between the wall and the object where it turns."""
    axis = int(DIRECTIONS[direction][0] == 0)
    ahead = DIRECTIONS[direction][axis] * (track.center[:, k, axis].astype(float) - SIZE / 2)
    half = float(HALF[track.shape[k], axis]) * _radius(track, k)
    return abs(SIZE / 2 - half - turning_point(ahead))


def _passing_credit(track: Tracks, order: Sequence[int], direction: str) -> float:
    """1 where the first object is clearly behind the second one at first, and clearly ahead of it at last."""
    ahead = (track.center[:, order[0]] - track.center[:, order[1]]) @ np.array(DIRECTIONS[direction], float)
    before, after = np.clip((-ahead[0], ahead[-1]), 0.0, 2.0) / 2.0
    return float((before + after) / 2)


def _identity(track: Tracks, scene: ClipScene) -> float:
    """The given object in every frame: its colour, shape and size, and its place in the first one."""
    entity, start = scene.objects[0], scene.start
    assert start is not None
    change = np.abs(np.log2(np.maximum(track.radius[:, 0], 1e-3) / start.radius))
    size = (_fall(change, 0.03, 0.25) * track.present[:, 0]).mean()
    away = np.hypot(*(track.center[0, 0] - np.array([start.x, start.y])))
    place = _fall(away, 0.2, 2.0) * track.present[0, 0]
    color, shape = _color_credit(track, 0, entity.color), _shape_credit(track, 0, entity.shape)
    return float(track.number.mean()) * _criteria(color, shape, float(size), float(place))
