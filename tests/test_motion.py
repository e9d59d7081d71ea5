"""The judge of moving shapes: true clips score 1, and each constructed failure costs the axes it belongs to."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage

from dancegrpo.errors import ConfigError, RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Reward
from dancegrpo.rewards.motion import MotionReward
from dancegrpo.shapes.clips import (
    CLIP_TASKS,
    COLORS,
    FRAMES,
    OPPOSITE,
    SHAPES,
    SIZE,
    ClipScene,
    clip_path,
    draw_clip,
    render,
    sample_clip,
    sample_still,
)
from dancegrpo.shapes.motion import MotionVerdict, judge_clips
from dancegrpo.shapes.scenes import Entity
from dancegrpo.shapes.tracks import fit_path, follow, look

Drawing = Callable[[ClipScene, np.ndarray, np.random.Generator], np.ndarray]
SINGLE = ("move", "bounce")


def as_media(clips: Sequence[np.ndarray]) -> np.ndarray:
    """(B, F, 3, 32, 32) float32 in [0, 1]."""
    return np.stack(clips).transpose(0, 1, 4, 2, 3).astype(np.float32) / 255


def prompt(scene: ClipScene, number: int = 0) -> Prompt:
    return Prompt(number, scene.caption, metadata=scene.to_metadata())


def drawn(
    draw: Drawing, *, image: bool = False, tasks: Sequence[str] = CLIP_TASKS, count: int = 24
) -> tuple[np.ndarray, list[Prompt]]:
    """Clips that `draw` makes of random scenes and their paths, and the prompts that asked for those scenes."""
    rng, clips, prompts = np.random.default_rng(11), [], []
    while len(clips) < count:
        scene = sample_clip(rng, image=image)
        if scene.task in tasks:
            path = clip_path(scene, np.random.default_rng(len(clips)))
            clips.append(draw(scene, path, rng))
            prompts.append(prompt(scene, len(prompts)))
    return as_media(clips), prompts


def verdict(draw: Drawing, **options) -> MotionVerdict:
    return judge_clips(*drawn(draw, **options))


def redraw(scene: ClipScene, path: np.ndarray) -> np.ndarray:
    radius = scene.start.radius if scene.start else scene.nominal_radius
    return render(scene, path, [radius] * len(scene.objects))


def true(scene, path, rng):
    return redraw(scene, path)


def other_objects(scene: ClipScene, change: Callable[[Entity], Entity]) -> ClipScene:
    return replace(scene, objects=tuple(map(change, scene.objects)))


def next_color(entity: Entity) -> Entity:
    names = list(COLORS)
    return replace(entity, color=names[(names.index(entity.color) + 1) % len(names)])


def next_shape(entity: Entity) -> Entity:
    return replace(entity, shape=SHAPES[(SHAPES.index(entity.shape) + 1) % len(SHAPES)])


# ---------------------------------------------------------------------------------------------------------- true clips


@pytest.mark.parametrize("image", [False, True])
def test_true_clips_are_right_on_every_axis(image):
    rng = np.random.default_rng(5)
    scenes = [sample_clip(rng, image=image) for _ in range(150)]
    result = judge_clips(as_media([draw_clip(s, rng) for s in scenes]), [prompt(s) for s in scenes])
    for axis in (result.vq, result.mq, result.ta, *([result.identity] if image else [])):
        assert axis.dtype == np.float32
        assert axis.mean() >= 0.97
        assert axis.min() >= 0.93
    assert result.exact.all()
    assert result.valid.all()
    assert np.isnan(result.identity).all() == (not image)


def test_true_stills_are_right_and_have_no_motion():
    rng = np.random.default_rng(5)
    scenes = [sample_still(rng) for _ in range(100)]
    stills, prompts = as_media([draw_clip(s, rng) for s in scenes]), [prompt(s) for s in scenes]
    result = judge_clips(stills, prompts)
    assert min(result.vq.min(), result.ta.min()) >= 0.93
    assert result.exact.all()
    assert np.isnan(result.mq).all()
    crossed = judge_clips(stills[::-1], prompts)
    assert crossed.ta.mean() < 0.3
    assert crossed.exact.mean() < 0.05


def test_places_are_found_to_a_tenth_of_a_pixel():
    rng = np.random.default_rng(2)
    for i in range(30):
        scene = sample_clip(rng, image=True)
        clip = as_media([draw_clip(scene, np.random.default_rng(i))]) * 255
        found = follow(look(clip), 1)
        np.testing.assert_allclose(found.center[0], clip_path(scene, np.random.default_rng(i)), atol=0.1)
        np.testing.assert_allclose(found.radius, scene.start.radius, atol=0.1)


def test_a_fitted_path_is_straight_or_reflected_once():
    time = np.arange(FRAMES)
    straight = np.stack([3 + 0.6 * time, 20 - 0.8 * time], axis=1)
    reflected = np.stack([28 - 1.5 * np.abs(time - 3.7), np.full(FRAMES, 9.0)], axis=1)
    stop = np.stack([4 + 2.0 * np.minimum(time, 4), np.full(FRAMES, 9.0)], axis=1)
    residual, speed = fit_path(np.stack([straight, reflected, stop]))
    np.testing.assert_allclose(residual[:2], 0.0, atol=1e-6)
    np.testing.assert_allclose(speed[:2], [1.0, 1.5], rtol=1e-6)
    assert residual[2] > 0.5


# ------------------------------------------------------------------------------------------------- constructed failures


def frozen(scene, path, rng):
    return redraw(scene, np.repeat(path[:1], FRAMES, axis=0))


def jumping(scene, path, rng):
    path = path.copy()
    path[4] += np.where(path[4] < SIZE / 2, 7.0, -7.0)
    return redraw(scene, path)


def teleporting(scene, path, rng):
    path = path.copy()
    path[5:] += np.where(path[4] < SIZE / 2, 6.0, -6.0)
    return redraw(scene, path)


def morphing(scene, path, rng):
    clip = redraw(scene, path)
    clip[5:] = redraw(other_objects(scene, next_shape), path)[5:]
    return clip


def growing(scene, path, rng):
    radii = np.linspace(3.8, 6.0, FRAMES)
    return np.concatenate([render(scene, path[t : t + 1], [r] * len(scene.objects)) for t, r in enumerate(radii)])


def vanishing(scene, path, rng):
    clip = redraw(scene, path)
    clip[3:6] = 8
    return clip


def backwards(scene, path, rng):
    return redraw(scene, path[::-1])


def flickering(scene, path, rng):
    strength = np.where(np.arange(FRAMES) % 2, 0.65, 1.0)[:, None, None, None]
    return np.rint(8 + (redraw(scene, path) - 8.0) * strength)


def blurred(scene, path, rng):
    return ndimage.gaussian_filter(redraw(scene, path).astype(float), (0, 1.2, 1.2, 0))


def speckled(scene, path, rng):
    return np.where(rng.random((FRAMES, SIZE, SIZE, 1)) < 0.02, 180, redraw(scene, path))


def recolored(scene, path, rng):
    return redraw(other_objects(scene, next_color), path)


def reshaped(scene, path, rng):
    return redraw(other_objects(scene, next_shape), path)


def asked(**change):
    """Draws another scene than the caption's: `change` maps a field to its new value by the old one."""

    def draw(scene, path, rng):
        other = replace(scene, **{name: mapping[getattr(scene, name)] for name, mapping in change.items()})
        return draw_clip(other, rng)

    return draw


# what is drawn, for which scenes; the axes it must cost, each with the most that may be left on average; and the axes
# that must not notice, all of which stay above 0.9 on average
FAILURES = {
    "frozen": (frozen, {}, {"mq": 0.05, "ta": 0.2}, ("vq",)),
    "jumping": (jumping, {"tasks": SINGLE}, {"mq": 0.2}, ("vq",)),
    "teleporting": (teleporting, {"tasks": SINGLE}, {"mq": 0.2}, ("vq",)),
    "morphing": (morphing, {"image": True}, {"mq": 0.3, "identity": 0.7}, ("vq",)),
    "growing": (growing, {"image": True}, {"mq": 0.5, "identity": 0.8}, ("vq",)),
    "vanishing": (vanishing, {}, {"vq": 0.7, "mq": 0.35, "ta": 0.7}, ()),
    "backwards": (backwards, {"tasks": ("move", "cross")}, {"ta": 0.2}, ("vq", "mq")),
    "other wall": (asked(direction=OPPOSITE), {"tasks": ("bounce",)}, {"ta": 0.25}, ("vq", "mq")),
    "no bounce": (asked(task={"bounce": "move"}), {"tasks": ("bounce",)}, {"ta": 0.4}, ("vq", "mq")),
    "a bounce": (asked(task={"move": "bounce"}), {"tasks": ("move",)}, {"ta": 0.4}, ("vq", "mq")),
    "other speed": (
        asked(speed={"slowly": "quickly", "quickly": "slowly"}),
        {"tasks": SINGLE},
        {"ta": 0.25},
        ("vq", "mq"),
    ),
    "other size": (asked(size={"small": "large", "large": "small"}), {"tasks": SINGLE}, {"ta": 0.25}, ("vq", "mq")),
    "flickering": (flickering, {}, {"vq": 0.25}, ("mq",)),
    "blurred": (blurred, {}, {"vq": 0.6}, ("mq",)),
    "speckled": (speckled, {}, {"vq": 0.1}, ()),
    "recolored": (recolored, {}, {"ta": 0.25}, ("vq", "mq")),
    "recolored first frame": (recolored, {"image": True}, {"identity": 0.25, "ta": 0.25}, ("vq", "mq")),
    "reshaped": (reshaped, {}, {"ta": 0.25}, ("vq", "mq")),
    "reshaped first frame": (reshaped, {"image": True}, {"identity": 0.25, "ta": 0.25}, ("vq", "mq")),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_each_failure_costs_its_own_axes(kind):
    draw, options, costs, unmoved = FAILURES[kind]
    result = verdict(draw, **options)
    for axis, most in costs.items():
        assert getattr(result, axis).mean() < most, axis
    for axis in unmoved:
        assert getattr(result, axis).mean() > 0.9, axis
    assert not result.exact.any()


def test_a_frozen_clip_has_no_motion_quality_even_if_it_trembles():
    assert verdict(frozen).mq.max() < 0.01
    trembling = verdict(
        lambda scene, path, rng: redraw(scene, np.repeat(path[:1], FRAMES, 0) + rng.normal(0, 0.2, (FRAMES, 1, 2)))
    )
    assert trembling.mq.max() < 0.2


def test_an_object_too_many_costs_motion_and_text():
    def with_a_guest(scene, path, rng):
        guest = replace(scene, objects=(*scene.objects, Entity("circle", "red")), task="cross")
        corner = np.where(path[:, :1].mean(axis=0) < SIZE / 2, SIZE - 4.0, 4.0)
        return redraw(guest, np.concatenate([path, np.broadcast_to(corner, (FRAMES, 1, 2))], axis=1))

    result = verdict(with_a_guest, tasks=("move",))
    assert result.mq.max() < 0.4
    assert result.ta.max() < 0.6


@pytest.mark.parametrize("fill", ["black", "noise"])
def test_a_clip_of_nothing_scores_nothing(fill):
    def nothing(scene, path, rng):
        shape = (FRAMES, SIZE, SIZE, 3)
        return np.zeros(shape) if fill == "black" else 255 * rng.random(shape)

    result = verdict(nothing)
    assert max(result.vq.max(), result.mq.max(), result.ta.max()) < 0.15


# --------------------------------------------------------------------------------------------------------------- grades


def means(axis: str, draws: Sequence[Drawing], **options) -> list[float]:
    return [float(getattr(verdict(draw, **options), axis).mean()) for draw in draws]


def falls(values: Sequence[float]) -> bool:
    return all(a > b + 0.01 for a, b in pairwise(values))


def test_more_wobble_means_less_motion_quality():
    def wobble(size: float) -> Drawing:
        return lambda scene, path, rng: redraw(scene, path + rng.normal(0, size, path.shape))

    assert falls(means("mq", [wobble(size) for size in (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)]))


def test_more_noise_or_blur_means_less_visual_quality():
    def noise(size: float) -> Drawing:
        return lambda s, path, rng: (redraw(s, path) + rng.normal(0, size, (FRAMES, SIZE, SIZE, 3))).clip(0, 255)

    def blur(size: float) -> Drawing:
        return lambda s, path, rng: ndimage.gaussian_filter(redraw(s, path).astype(float), (0, size, size, 0))

    assert falls(means("vq", [noise(size) for size in (0, 4, 8, 12)], count=12))
    assert falls(means("vq", [blur(size) for size in (0.01, 0.5, 0.8, 1.2)], count=12))


def test_a_direction_nearer_the_one_asked_for_fits_the_text_better():
    def turned(angle: float) -> Drawing:
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        return lambda scene, path, rng: redraw(scene, SIZE / 2 + (path - path.mean(axis=0)) @ turn)

    values = means("ta", [turned(np.deg2rad(angle)) for angle in (0, 35, 55, 75, 90)], tasks=("move",))
    assert falls(values)


def test_each_frame_with_the_right_color_counts_for_identity():
    def until(frame: int) -> Drawing:
        return lambda scene, path, rng: np.concatenate(
            [true(scene, path, rng)[:frame], recolored(scene, path, rng)[frame:]]
        )

    assert falls(means("identity", [until(frame) for frame in (9, 7, 4, 1)], image=True))


def test_another_place_in_the_first_frame_costs_identity():
    def shifted(pixels: float) -> Drawing:
        return lambda scene, path, rng: redraw(scene, path + np.where(path[:1] < SIZE / 2, pixels, -pixels))

    assert falls(means("identity", [shifted(pixels) for pixels in (0.0, 0.5, 1.5, 4.0)], image=True))


# ----------------------------------------------------------------------------------------------------------- invariance


def test_a_verdict_depends_on_neither_batch_nor_order():
    media, prompts = drawn(lambda s, path, rng: redraw(s, path + rng.normal(0, 0.4, path.shape)), count=40)
    whole = judge_clips(media, prompts)
    order = np.random.default_rng(0).permutation(40)
    shuffled = judge_clips(media[order], [prompts[i] for i in order])
    alone = [judge_clips(media[i : i + 1], prompts[i : i + 1]) for i in range(0, 40, 8)]
    for axis in ("vq", "mq", "ta"):
        np.testing.assert_allclose(getattr(shuffled, axis), getattr(whole, axis)[order], rtol=1e-5)
        np.testing.assert_allclose([getattr(v, axis)[0] for v in alone], getattr(whole, axis)[::8], rtol=1e-5)


def test_quality_does_not_look_at_the_caption():
    media, prompts = drawn(true, tasks=SINGLE)
    told, untold = judge_clips(media, prompts), judge_clips(media, prompts[::-1])
    assert np.array_equal(told.vq, untold.vq)
    assert np.array_equal(told.mq, untold.mq)


# ----------------------------------------------------------------------------------------------------------- the reward


def test_the_reward_reports_its_axis_and_the_others_beside_it():
    media, prompts = drawn(recolored, image=True, count=6)
    clips = torch.from_numpy(media)
    result = judge_clips(media, prompts)
    scores = {axis: MotionReward(axis)(clips, prompts) for axis in ("vq", "mq", "ta", "id", "overall")}
    assert isinstance(MotionReward(), Reward)
    assert scores["mq"].values.tolist() == result.mq.tolist()
    assert scores["id"].values.tolist() == result.identity.tolist()
    expected = (result.vq + result.mq + result.ta + result.identity) / 4
    torch.testing.assert_close(scores["overall"].values, torch.from_numpy(expected))
    assert set(scores["mq"].extra) == {"vq", "ta", "id", "overall"}
    assert scores["mq"].extra["ta"].tolist() == result.ta.tolist()
    assert scores["overall"].extra["pass"].tolist() == [0.0] * 6


def test_an_axis_that_cannot_be_judged_is_masked_never_a_number():
    rng = np.random.default_rng(0)
    still = sample_still(rng)
    media, prompts = torch.from_numpy(as_media([draw_clip(still, rng)])), [prompt(still)]
    motion, overall = MotionReward("mq")(media, prompts), MotionReward()(media, prompts)
    assert motion.valid.tolist() == [False]
    assert motion.causes == {"a still does not move": 1}
    assert overall.valid.tolist() == [True]
    assert set(overall.extra) == {"vq", "ta", "pass"}
    clips, asked_for = drawn(true, count=2)
    identity = MotionReward("id")(torch.from_numpy(clips), asked_for)
    assert identity.valid.tolist() == [False, False]
    assert identity.values.isnan().all()


def test_a_non_finite_clip_is_masked_and_its_neighbours_are_not():
    media, prompts = drawn(true, count=3)
    media[1, 4, 0, 5, 5] = np.nan
    scores = MotionReward()(torch.from_numpy(media), prompts)
    assert scores.valid.tolist() == [True, False, True]
    assert (scores.values[[0, 2]] > 0.97).all()


def test_misuse_of_the_reward_is_named():
    media, prompts = drawn(true, count=1)
    clip = torch.from_numpy(media)
    with pytest.raises(ConfigError, match="use vq, mq, ta, id or overall"):
        MotionReward("quality")
    with pytest.raises(RewardError, match="shapes-video"):
        MotionReward()(clip, [Prompt(0, "a cat")])
    with pytest.raises(RewardError, match="32"):
        MotionReward()(torch.rand(1, FRAMES, 3, 64, 64), prompts)
    with pytest.raises(RewardError, match="stills have 1 frame"):
        MotionReward()(clip[:, :1], prompts)
    with pytest.raises(RewardError, match="one prompt per clip"):
        MotionReward()(clip, prompts * 2)
