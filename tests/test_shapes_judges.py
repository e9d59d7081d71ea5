"""The learned judges of the shapes world: losses and tastes, how they are saved, and what the shipped ones know."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import ndimage

from dancegrpo.errors import ModelError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import load_reward
from dancegrpo.rewards.clip import CLIP_MEAN, CLIP_STD, text_features
from dancegrpo.rewards.clip_score import ClipScoreReward
from dancegrpo.rewards.compose import OverFrames
from dancegrpo.rewards.hps import SHIPPED_HEADS, HPSReward
from dancegrpo.rewards.open_clip import to_transformers
from dancegrpo.rewards.pickscore import PickScoreReward
from dancegrpo.settings import RewardConfig
from dancegrpo.shapes import JUDGES, judge_path
from dancegrpo.shapes.base import clip_tokenizer, vocabulary
from dancegrpo.shapes.judge_build import Settings, build, main, save_open_clip, save_transformers, to_open_clip
from dancegrpo.shapes.judges import (
    HEADS,
    MEAN,
    STD,
    Student,
    clip,
    contrastive_loss,
    distinct_rows,
    draw_pool,
    draw_wrong,
    mistaken,
    preference_loss,
)
from dancegrpo.shapes.looks import LOOKS, LUMA, blur, vivid
from dancegrpo.shapes.scenes import Scene, draw, prompts
from dancegrpo.shapes.verifier import judge

OPTIONS = {
    "shapes-clip": ("clip", {"model": "shapes-clip"}),
    "shapes-hps": ("hps", {"weights": "shapes-hps"}),
    "shapes-pickscore": ("pickscore", {"model": "shapes-pickscore"}),
}
CLASSES = {"shapes-clip": ClipScoreReward, "shapes-hps": HPSReward, "shapes-pickscore": PickScoreReward}


@pytest.fixture(scope="module")
def judges():
    """Each as a recipe asks for it."""
    return {name: load_reward(name, RewardConfig(judge=kind, options=o)) for name, (kind, o) in OPTIONS.items()}


@pytest.fixture(scope="module")
def drawn():
    """240 held-out prompts with fresh drawings (N, 1, 3, 64, 64), and drawings that fail them."""
    asked, rng = prompts("heldout", 240), np.random.default_rng(77)
    scenes = [Scene.from_metadata(prompt.metadata) for prompt in asked]
    return asked, as_media([draw(scene, rng) for scene in scenes]), draw_wrong(scenes, rng)[:, None].float() / 255


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(vocabulary())
    return Student(clip(len(tokenizer)).eval(), tokenizer)


def as_media(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1)[:, None].float() / 255


def network(reward):
    """The judge inside what shows it the frames of clips."""
    return reward.reward if isinstance(reward, OverFrames) else reward


def some_pictures(size: int = 6) -> torch.Tensor:
    return torch.rand(size, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------------- the shipped


@pytest.mark.parametrize("name", JUDGES)
def test_a_shipped_name_goes_through_the_class_of_the_published_judge(judges, name):
    assert type(network(judges[name])) is CLASSES[name]
    assert judges[name].differentiable


@pytest.mark.parametrize("name", JUDGES)
def test_a_shipped_judge_is_small_and_in_half_precision(name):
    folder = judge_path(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_700_000
    tensors = load_file(next(folder.glob("*.safetensors")))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.parametrize("name", JUDGES)
def test_a_drawing_reaches_the_network_pixel_by_pixel(judges, name):
    pictures = some_pictures()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(network(judges[name]).pixels(pictures) * std + mean, pictures, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", JUDGES)
def test_the_gradient_is_the_slope_down_to_the_pixels(judges, drawn, name):
    asked, media, _ = drawn
    pictures = media[:3].clone().requires_grad_()
    gradient = torch.autograd.grad(judges[name](pictures, asked[:3]).values.sum(), pictures)[0]
    steepest = gradient.norm().item()
    assert steepest > 0.01
    # Along itself, where rounding matters least; a trained network is too curved for long steps.
    step = 0.01 * gradient / steepest
    with torch.no_grad():
        ahead, behind = (judges[name](p, asked[:3]).values.sum().item() for p in (pictures + step, pictures - step))
    assert (ahead - behind) / 0.02 == pytest.approx(steepest, rel=0.01)


def test_shapes_clip_finds_the_caption_among_sixteen(judges, drawn):
    asked, media, _ = drawn
    model, rng = network(judges["shapes-clip"]), np.random.default_rng(5)
    texts = sorted({prompt.text for prompt in asked})
    right = 0
    for prompt, picture in zip(asked[:120], media, strict=False):
        others = [text for text in rng.permutation(texts) if text != prompt.text][:15]
        choices = [Prompt(i, text) for i, text in enumerate([prompt.text, *others])]
        right += int(model(picture.expand(16, 1, 3, 64, 64), choices).values.argmax() == 0)
    assert right >= 0.8 * 120


@pytest.mark.parametrize("name", JUDGES)
def test_a_drawing_that_fits_scores_above_one_that_does_not(judges, drawn, name):
    asked, right, wrong = drawn
    better = judges[name](right, asked).values > judges[name](wrong, asked).values
    assert better.float().mean() >= 0.9


@pytest.mark.parametrize(("name", "look"), [("shapes-hps", "polished"), ("shapes-pickscore", "pristine")])
def test_a_preference_judge_has_its_taste(judges, drawn, name, look):
    asked, media, _ = drawn
    better, worse = LOOKS[look](media[:, 0], torch.Generator().manual_seed(6))
    scores = [judges[name](pictures[:, None], asked).values for pictures in (better, worse)]
    assert (scores[0] > scores[1]).float().mean() >= 0.9


@pytest.mark.parametrize("name", JUDGES)
def test_scores_in_a_group_are_spread(judges, name):
    """Drawings of other scenes for one caption: what a group of an untrained generator looks like."""
    rng = np.random.default_rng(8)
    media = as_media([draw(Scene.from_metadata(prompt.metadata), rng) for prompt in prompts("train", 12)])
    assert judges[name](media, [prompts("train", 1)[0]] * 12).values.std() > 0.02


def test_the_held_out_judge_shares_no_weights_with_the_others():
    clip_tensors, pick = (load_file(judge_path(n) / "model.safetensors") for n in ("shapes-clip", "shapes-pickscore"))
    flat = [t["vision_model.embeddings.patch_embedding.weight"].float().flatten() for t in (clip_tensors, pick)]
    assert abs(torch.corrcoef(torch.stack(flat))[0, 1]) < 0.1


def test_an_unknown_judge_is_refused():
    with pytest.raises(ModelError, match="unknown built-in judge 'shapes-none': choose one of shapes-clip"):
        judge_path("shapes-none")


def test_a_judge_missing_from_the_installation_is_told(monkeypatch):
    monkeypatch.setattr("dancegrpo.shapes.JUDGES", (*JUDGES, "shapes-lost"))
    with pytest.raises(ModelError, match=r"shapes-lost holds no judge: reinstall, or run `python -m .*judge_build"):
        judge_path("shapes-lost")


# -------------------------------------------------------------------------------------------------------------- losses


def test_the_contrastive_loss_of_features_that_match_or_are_orthogonal():
    features, scale = torch.eye(5, 8), torch.tensor(3.0)
    expected = math.log(math.exp(3) + 4) - 3
    assert contrastive_loss(features, features, scale).item() == pytest.approx(expected, abs=1e-6)


def test_the_preference_loss_is_the_softmax_over_both_pictures():
    better, worse, text = torch.nn.functional.normalize(torch.randn(3, 7, 4), dim=-1)
    logits = 9.0 * torch.stack([(better * text).sum(-1), (worse * text).sum(-1)], dim=1)
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(7, dtype=torch.long))
    torch.testing.assert_close(preference_loss(better, worse, text, torch.tensor(9.0)), expected)


# ---------------------------------------------------------------------------------------------------------------- data


def test_a_pool_is_a_function_of_its_seed_and_its_wrong_drawings_fail():
    one, again, other = draw_pool(40, 3), draw_pool(40, 3), draw_pool(40, 4)
    assert one.texts == again.texts != other.texts
    assert torch.equal(one.right, again.right)
    assert torch.equal(one.wrong, again.wrong)


def test_wrong_drawings_fail(drawn):
    asked, right, wrong = drawn
    assert judge(right.numpy(), asked).exact.all()
    assert not judge(wrong.numpy(), asked).exact.any()


def test_mistakes_are_of_every_kind():
    scene = Scene.from_metadata(next(p.metadata for p in prompts("heldout") if p.metadata["relation"]))
    rng = np.random.default_rng(0)
    found = [mistaken(scene, rng) for _ in range(200)]
    assert {len(s.entities) for s in found} >= {1, 2}
    assert {s.relation for s in found} >= {"left of", "right of", "above", "below"}
    assert len({s.task for s in found}) > 2


def test_no_text_twice_in_a_batch():
    pool = draw_pool(120, 0)
    rows = distinct_rows(pool, 100, torch.Generator().manual_seed(0))
    texts = [pool.texts[i] for i in rows.tolist()]
    assert len(set(texts)) == len(texts) > 60


# --------------------------------------------------------------------------------------------------------------- looks


def test_vivid_scales_chroma_and_keeps_the_hue():
    pictures = 0.4 + 0.2 * some_pictures()
    strong = vivid(pictures, torch.full((6, 1, 1, 1), 1.44))
    weights = torch.tensor(LUMA).view(3, 1, 1)
    luma, strong_luma = ((p * weights).sum(1, keepdim=True) for p in (pictures, strong))
    torch.testing.assert_close(strong - strong_luma, 1.44 * (pictures - luma), atol=1e-5, rtol=0)
    torch.testing.assert_close(strong_luma - 0.5, 1.2 * (luma - 0.5), atol=1e-5, rtol=0)


def test_blur_is_a_gaussian_of_each_picture_s_own_width():
    pictures, sigma = some_pictures(2), torch.tensor([0.7, 1.6]).view(2, 1, 1, 1)
    expected = [
        ndimage.gaussian_filter(p.numpy(), (0, s, s), mode="nearest", radius=(0, 4, 4))
        for p, s in zip(pictures, (0.7, 1.6), strict=True)
    ]
    torch.testing.assert_close(blur(pictures, sigma), torch.from_numpy(np.stack(expected)), atol=1e-5, rtol=0)


def total_variation(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.diff(dim=-1).abs().mean((1, 2, 3))


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_makes_pictures_of_every_one_and_stays_in_range(look, drawn):
    pictures = drawn[1][:60, 0]
    better, worse = LOOKS[look](pictures, torch.Generator().manual_seed(1))
    assert better.shape == worse.shape == pictures.shape
    assert 0 <= min(better.min(), worse.min()) <= max(better.max(), worse.max()) <= 1
    assert ((better - worse).abs().amax((1, 2, 3)) > 0.02).all()


def test_the_polished_have_more_contrast_than_the_others(drawn):
    better, worse = LOOKS["polished"](drawn[1][:, 0], torch.Generator().manual_seed(1))
    assert (total_variation(better) >= total_variation(worse)).float().mean() > 0.95


def test_pristine_pictures_are_as_they_were_drawn(drawn):
    better, worse = LOOKS["pristine"](drawn[1][:60, 0], torch.Generator().manual_seed(1))
    assert torch.equal(better, drawn[1][:60, 0])


# --------------------------------------------------------------------------------------------------------------- saving


def test_the_build_and_the_loaders_agree_on_constants():
    assert HEADS == SHIPPED_HEADS
    assert (MEAN, STD) == (CLIP_MEAN, CLIP_STD)


def test_open_clip_s_names_are_the_inverse_of_transformers(student):
    tensors = {k: v for k, v in student.model.state_dict().items() if not k.endswith("position_ids")}
    again = to_transformers(to_open_clip(tensors))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_what_is_saved_scores_as_the_student_did(student, drawn, tmp_path):
    asked, media, _ = drawn
    student.model.half().float()
    folders = {"clip": save_transformers, "open_clip": save_open_clip}
    for name, save in folders.items():
        (tmp_path / name).mkdir()
        student.tokenizer.save_pretrained(tmp_path / name)
        save(student, tmp_path / name)
    weights, tokenizer = tmp_path / "open_clip" / "open_clip_model.safetensors", tmp_path / "open_clip"
    with torch.no_grad():
        expected = (student.see(media[:20, 0]) * student.read([p.text for p in asked[:20]])).sum(-1)
    for loaded in (
        ClipScoreReward(tmp_path / "clip"),
        PickScoreReward(tmp_path / "clip", tmp_path / "clip"),
        HPSReward(weights, tokenizer, heads=HEADS),
        ClipScoreReward(tmp_path / "open_clip", tokenizer),
    ):
        torch.testing.assert_close(loaded(media[:20], asked[:20]).values, expected, atol=1e-5, rtol=0)


def test_a_tiny_build_writes_folders_that_load(tmp_path):
    tiny = {"drawings": 40, "batch": 16, "steps": 2, "preference_batch": 8, "preference_steps": 2, "prompts": 18}
    build(Settings(tmp_path, ("shapes-clip", "shapes-hps"), **tiny))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["shapes-clip", "shapes-hps"]
    assert "| own caption highest among 16" in (tmp_path / "shapes-clip" / "README.md").read_text()
    folder = tmp_path / "shapes-hps"
    learned = HPSReward(folder / "open_clip_model.safetensors", folder, heads=HEADS)
    first = ClipScoreReward(tmp_path / "shapes-clip")
    ids = first.tokenize(["a red circle"])
    assert text_features(first.model, ids).shape == (1, 64)
    assert not torch.equal(text_features(first.model, ids), text_features(learned.model, ids))


def test_too_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--out", "x", "--steps", "0"])
    assert stopped.value.code == 2
    assert "--steps=0 is too few: use 1 or more" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "file: File exists; name another folder" in error
