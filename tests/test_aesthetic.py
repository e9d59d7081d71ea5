"""The aesthetic predictors: both published heads on a CLIP's image embedding, in their published layouts."""

from __future__ import annotations

import pytest
import torch

from dancegrpo.errors import RewardError
from dancegrpo.rewards import load_reward
from dancegrpo.rewards.aesthetic import AestheticReward, load_head
from dancegrpo.settings import RewardConfig
from tiny_clip import (
    PROCESSOR,
    assert_batches_agree,
    assert_bytes_and_floats_agree,
    assert_gradient_is_the_slope,
    clip_model,
    media,
    prompts,
    save_clip,
)

WIDTHS = {0: (10, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def mlp_tensors():
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for number, (width, out) in WIDTHS.items():
        tensors[f"layers.{number}.weight"] = torch.randn(out, width, generator=generator) / width**0.5
        tensors[f"layers.{number}.bias"] = torch.randn(out, generator=generator)
    return tensors


def linear_tensors():
    return {"weight": torch.randn(1, 10, generator=torch.Generator().manual_seed(4)), "bias": torch.tensor([5.0])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_clip(tmp_path_factory.mktemp("clip"))
    torch.save(mlp_tensors(), folder / "mlp.pth")
    torch.save(linear_tensors(), folder / "linear.pth")
    return folder


@pytest.fixture(scope="module")
def judge(folder):
    return AestheticReward(head=str(folder / "mlp.pth"), model=str(folder))


def embeddings(pictures):
    """(N, 10) of unit length, by transformers alone."""
    mean, std = (torch.tensor(PROCESSOR[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    with torch.no_grad():
        features = clip_model().get_image_features((pictures[:, 0] - mean) / std).pooler_output
    return features / features.norm(dim=-1, keepdim=True)


def test_the_mlp_head_is_five_linear_layers_without_activation(judge):
    pictures, tensors = media(height=28, width=28), mlp_tensors()
    rating = embeddings(pictures)
    for number in WIDTHS:
        rating = rating @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
    torch.testing.assert_close(judge(pictures, prompts()).values, rating[:, 0], atol=1e-4, rtol=0)


def test_the_linear_head_is_one_layer(folder):
    judge = AestheticReward(head=str(folder / "linear.pth"), model=str(folder))
    pictures = media(height=28, width=28)
    expected = embeddings(pictures) @ linear_tensors()["weight"][0] + 5
    torch.testing.assert_close(judge(pictures, prompts()).values, expected, atol=1e-5, rtol=0)


def test_the_prompt_is_not_read(judge):
    scores = judge(media(), prompts())
    assert scores.valid.all()  # an empty prompt among them
    assert torch.equal(scores.values, judge(media(), prompts(["b"] * 5)).values)


def test_batches_bytes_and_gradients_agree(judge):
    assert_batches_agree(judge)
    assert_bytes_and_floats_agree(judge)
    assert_gradient_is_the_slope(judge)


def test_in_half_precision_the_head_still_computes_in_float32(folder):
    judge = load_reward(
        "beauty",
        RewardConfig(
            judge="aesthetic",
            options={"head": str(folder / "linear.pth"), "model": str(folder), "dtype": "bfloat16"},
        ),
    )
    values = judge(media(), prompts()).values
    assert values.dtype == torch.float32
    # bfloat16 near 5 has steps of 1/32.
    assert ((values * 32).frac().abs() > 1e-3).any()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({k: v for k, v in mlp_tensors().items() if k != "layers.6.bias"}, "layers.6.bias is missing"),
        (mlp_tensors() | {"layers.9.weight": torch.ones(2)}, "layers.9.weight is extra"),
        (
            mlp_tensors() | {"layers.0.weight": torch.ones(1024, 768)},
            r"layers.0.weight is \(1024, 768\), not \(1024, 10\)",
        ),
        (linear_tensors() | {"bias": torch.ones(2)}, r"bias is \(2,\), not \(1,\)"),
        ({"weight": torch.ones(1, 10)}, "bias is missing"),
        ({"head": torch.ones(1, 10)}, "weight is missing; bias is missing; head is extra"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_by_name(tensors, message, tmp_path):
    torch.save(tensors, tmp_path / "head.pth")
    with pytest.raises(RewardError, match=message) as refused:
        load_head(tmp_path / "head.pth", 10)
    assert "\n" not in str(refused.value)


def test_without_a_path_the_published_head_is_asked_for(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *file: asked.append(file) or folder / "mlp.pth")
    AestheticReward(model=str(folder))
    assert asked == [("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")]


def test_a_head_that_cannot_be_fetched_is_an_error_with_a_way_out(folder, monkeypatch):
    def offline(*file):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(RewardError, match="give its path as the option `head`"):
        AestheticReward(model=str(folder))
