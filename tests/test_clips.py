"""Moving shapes: captions and their splits, drawings, prompts with and without a first frame."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dancegrpo.errors import ConfigError, PromptError
from dancegrpo.prompts import open_prompts
from dancegrpo.shapes.clips import (
    BACKGROUND,
    CLIP_TASKS,
    COLORS,
    DIRECTIONS,
    FRAMES,
    LANES,
    RADII,
    SHAPES,
    SIZE,
    SPEEDS,
    ClipScene,
    all_clip_scenes,
    all_still_scenes,
    clip_combinations,
    clip_path,
    clip_scenes,
    draw_clip,
    draw_clips,
    i2v_prompts,
    sample_clip,
    sample_still,
    still_scenes,
)
from dancegrpo.shapes.scenes import Entity

SPLITS = [("shapes-video", 516, 600), ("shapes-i2v", 1008, 720), ("shapes-t2i", 102, 204)]


def scene_of(prompt) -> ClipScene:
    return ClipScene.from_metadata(json.loads(json.dumps(prompt.metadata)))


def sampled(count: int, seed: int = 0, image: bool = False) -> list[ClipScene]:
    rng = np.random.default_rng(seed)
    return [sample_clip(rng, image=image) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- captions


def test_captions_are_unique_and_short():
    captions = [scene.caption for scene in (*all_clip_scenes(), *all_still_scenes())]
    assert len(set(captions)) == len(captions) == 1116 + 306
    assert max(len(caption.split()) for caption in captions) == 11


def test_captions_read_as_specified():
    red, blue = Entity("circle", "red"), Entity("square", "blue")
    assert ClipScene("move", (red,), "up", "small", "slowly").caption == "a small red circle moves up slowly"
    bounce = ClipScene("bounce", (blue,), "up", "large", "quickly")
    assert bounce.caption == "a large blue square bounces off the top quickly"
    cross = ClipScene("cross", (red, blue), "down")
    assert cross.caption == "a red circle moving down passes a blue square moving up"
    assert ClipScene("single", (red,), size="small").caption == "a small red circle"
    assert ClipScene("pair", (red, blue)).caption == "a red circle and a blue square"


@pytest.mark.parametrize("image", [False, True])
def test_a_scene_survives_json(image):
    for scene in sampled(50, image=image):
        assert ClipScene.from_metadata(json.loads(json.dumps(scene.to_metadata()))) == scene


def test_a_first_frame_leaves_the_caption_as_it_is():
    for scene in sampled(50, image=True):
        assert scene.caption == replace(scene, start=None).caption


# --------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("scenes", [clip_scenes, still_scenes])
def test_each_held_out_caption_has_a_combination_never_trained_on(scenes):
    trained = frozenset().union(*map(clip_combinations, scenes("train")))
    assert all(clip_combinations(scene) - trained for scene in scenes("heldout"))


def test_first_frames_are_held_out_by_the_same_combinations():
    trained, held_out = (
        frozenset().union(*(clip_combinations(scene_of(p)) for p in i2v_prompts(split, 150)))
        for split in ("train", "heldout")
    )
    assert trained.isdisjoint(held_out)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_attribute_occurs_in_each_split(split):
    chosen = clip_scenes(split)
    assert {s.task for s in chosen} == set(CLIP_TASKS)
    assert {(s.task, s.direction) for s in chosen if s.size} == {(t, d) for t in ("move", "bounce") for d in DIRECTIONS}
    assert {s.direction for s in chosen if s.task == "cross"} == {"right", "down"}
    assert {s.size for s in chosen} == {None, *RADII}
    assert {s.speed for s in chosen} == {None, *SPEEDS}
    for scenes in (chosen, still_scenes(split)):
        assert {e.shape for s in scenes for e in s.objects} == set(SHAPES)
        assert {e.color for s in scenes for e in s.objects} == set(COLORS)


@pytest.mark.parametrize(("kind", "train", "heldout"), SPLITS)
def test_prompts_are_as_many_as_promised_and_numbered(kind, train, heldout):
    for split, count in (("train", train), ("heldout", heldout)):
        prompts = open_prompts(f"{kind}:{split}", negative="blur")
        assert len(prompts) == count
        assert [prompts[i].id for i in (0, 1, count - 1)] == [0, 1, count - 1]
        assert {prompts[i].negative for i in (0, count - 1)} == {"blur"}


@pytest.mark.parametrize("kind", [kind for kind, *_ in SPLITS])
def test_prompts_are_the_same_at_every_opening_and_carry_their_scene(kind):
    once, again = open_prompts(f"{kind}:heldout"), open_prompts(f"{kind}:heldout")
    for i in (0, 7, 100):
        assert (once[i].text, once[i].metadata) == (again[i].text, again[i].metadata)
        assert scene_of(once[i]).caption == once[i].text
        assert once[i].metadata["task"] == scene_of(once[i]).task


@pytest.mark.parametrize("kind", [kind for kind, *_ in SPLITS])
def test_an_unknown_split_is_refused(kind):
    with pytest.raises(PromptError, match=f"use {kind}:train or {kind}:heldout"):
        open_prompts(f"{kind}:test")
    with pytest.raises(ConfigError, match="train or heldout"):
        clip_scenes("test")


# --------------------------------------------------------------------------------------------------------- first frames


def test_a_first_frame_is_the_first_of_the_clip_it_belongs_to():
    prompts = i2v_prompts("train")
    for i in range(0, 1000, 50):
        scene, image = scene_of(prompts[i]), prompts[i].image
        assert isinstance(image, Image.Image)
        assert image.size == (SIZE, SIZE)
        clip = draw_clip(scene, np.random.default_rng(i))
        assert np.array_equal(np.asarray(image), clip[0])


def test_every_first_frame_is_another_one():
    # The last ones repeat the scenes of the first ones, from other places.
    prompts = i2v_prompts("heldout")
    chosen = [prompts[i].image.tobytes() for i in (*range(60), *range(660, 720))]
    assert len(set(chosen)) == len(chosen)


def test_asking_out_of_order_gives_the_same_first_frame():
    forward = [prompt.image.tobytes() for prompt in i2v_prompts("train", 5)]
    prompts = i2v_prompts("train", 5)
    assert [prompts[i].image.tobytes() for i in (4, 3, 2, 1, 0)] == forward[::-1]
    with pytest.raises(IndexError):
        prompts[5]


# ------------------------------------------------------------------------------------------------------------- drawings


def test_drawings_depend_on_the_generator_alone():
    scene = sampled(1)[0]
    clips = [draw_clip(scene, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert clips[0].shape == (FRAMES, SIZE, SIZE, 3)
    assert clips[0].dtype == np.uint8
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])


def test_many_clips_are_the_single_ones_in_turn():
    scenes, rng = sampled(4), np.random.default_rng(1)
    expected = [draw_clip(scene, rng) for scene in scenes]
    assert np.array_equal(draw_clips(scenes, np.random.default_rng(1)), np.stack(expected))


@pytest.mark.parametrize("image", [False, True])
def test_the_light_of_each_object_is_where_the_path_says(image):
    for i, scene in enumerate(sampled(60, image=image)):
        if len(scene.objects) == 2 or scene.objects[0].shape == "triangle":
            continue  # the centroid of a triangle is not the middle of its box
        path = clip_path(scene, np.random.default_rng(i))[:, 0]
        light = (draw_clip(scene, np.random.default_rng(i)).astype(float) - BACKGROUND).sum(axis=-1)
        axis, total = np.arange(SIZE) + 0.5, light.sum(axis=(1, 2))
        centroid = np.stack([light.sum(axis=1) @ axis / total, light.sum(axis=2) @ axis / total], axis=1)
        np.testing.assert_allclose(centroid, path, atol=0.05)


def test_a_move_is_straight_at_the_speed_of_its_class_and_stays_inside():
    for i, scene in enumerate(s for s in sampled(150) if s.task == "move"):
        path = clip_path(scene, np.random.default_rng(i))[:, 0]
        step = np.diff(path, axis=0)
        np.testing.assert_allclose(step, np.broadcast_to(step[0], step.shape), atol=1e-9)
        speed = step[0] @ DIRECTIONS[scene.direction]
        assert speed == pytest.approx(np.hypot(*step[0]))
        assert abs(speed / SPEEDS[scene.speed] - 1) <= 0.08
        assert ((path > 3) & (path < SIZE - 3)).all()


@pytest.mark.parametrize("image", [False, True])
def test_a_bounce_touches_its_wall_halfway_and_comes_back_as_fast(image):
    bounces = [s for s in sampled(150, image=image) if s.task == "bounce" and s.objects[0].shape == "circle"]
    for i, scene in enumerate(bounces):
        axis, sign = int(scene.direction in ("up", "down")), sum(DIRECTIONS[scene.direction])
        path = clip_path(scene, np.random.default_rng(i))[:, 0]
        assert np.ptp(path[:, 1 - axis]) == 0
        gap = SIZE / 2 - sign * (path[:, axis] - SIZE / 2)  # from the centre to the wall
        speed = np.abs(np.diff(gap)).max()
        turn = 4 - (gap[-1] - gap[0]) / (2 * speed)
        radius = gap[0] - speed * turn  # what is left of the gap where it turns
        np.testing.assert_allclose(gap, radius + speed * np.abs(np.arange(FRAMES) - turn), atol=1e-9)
        assert abs(radius - RADII[scene.size]) <= 0.3
        assert scene.start is None or radius == pytest.approx(scene.start.radius, abs=1e-6)
        assert 2.9 < turn < 5.2
        assert abs(speed / SPEEDS[scene.speed] - 1) <= 0.08


def test_crossing_objects_keep_their_lanes_and_pass():
    for i, scene in enumerate(s for s in sampled(150) if s.task == "cross"):
        axis = int(scene.direction == "down")
        path = clip_path(scene, np.random.default_rng(i))
        lanes = np.sort(path[0, :, 1 - axis])
        assert np.ptp(path[:, :, 1 - axis], axis=0).max() == 0
        assert np.abs(lanes - LANES).max() <= 0.7
        ahead = path[:, 0, axis] - path[:, 1, axis]
        assert ahead[0] < 0 < ahead[-1]
        assert scene.objects[0].color != scene.objects[1].color


def test_stills_are_one_frame_with_every_object_inside():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = sample_still(rng)
        still = draw_clip(scene, rng)
        assert still.shape == (1, SIZE, SIZE, 3)
        for entity in scene.objects:
            assert (still[0] == COLORS[entity.color]).all(axis=-1).sum() > 10
