"""JPEG size: what Pillow would write, in kilobytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dancegrpo.errors import RewardError
from dancegrpo.rewards import load_reward
from dancegrpo.rewards.jpeg import JpegReward
from dancegrpo.settings import RewardConfig
from tiny_clip import assert_batches_agree, assert_bytes_and_floats_agree, media, prompts


def test_the_score_is_minus_the_size_of_the_file(tmp_path):
    pictures = media(3)
    expected = []
    for i, picture in enumerate(pictures[:, 0]):
        array = np.rint(picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.jpg", quality=95)
        expected.append(-(tmp_path / f"{i}.jpg").stat().st_size / 1000)
    assert JpegReward()(pictures, prompts(["a"] * 3)).values.tolist() == pytest.approx(expected)


def test_noise_compresses_worse_than_grey():
    pictures = torch.cat([media(1), torch.full((1, 1, 3, 40, 33), 0.5)])
    noise, grey = JpegReward()(pictures, prompts(["a", "a"])).values
    assert noise < grey < 0


def test_incompressible_flips_the_sign():
    options = {"incompressible": True}
    flipped = load_reward("size", RewardConfig(judge="jpeg", options=options))(media(), prompts()).values
    assert torch.equal(flipped, -JpegReward()(media(), prompts()).values)


def test_lower_quality_is_smaller():
    assert (JpegReward(quality=20)(media(), prompts()).values > JpegReward()(media(), prompts()).values).all()


def test_batches_and_bytes_agree():
    assert_batches_agree(JpegReward())
    assert_bytes_and_floats_agree(JpegReward())


def test_no_gradient_flows_and_the_media_stay():
    pictures = media().requires_grad_()
    before = pictures.detach().clone()
    assert not JpegReward()(pictures, prompts()).values.requires_grad
    assert torch.equal(pictures, before)


def test_a_clip_is_scored_by_its_frames():
    clips = media(2, frames=3)
    judge = load_reward("size", RewardConfig(judge="jpeg"))
    frames = JpegReward()(clips.flatten(0, 1)[:, None], prompts(["a"] * 6)).values
    torch.testing.assert_close(judge(clips, prompts(["a", "a"])).values, frames.view(2, 3).mean(1))


@pytest.mark.parametrize("quality", [0, 96, 50.5])
def test_a_quality_out_of_range_is_refused(quality):
    with pytest.raises(RewardError, match=f"quality={quality} of the jpeg judge is out of range"):
        JpegReward(quality=quality)
