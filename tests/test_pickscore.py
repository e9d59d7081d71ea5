"""PickScore: the published folder's layout, the raw cosine, and upstream's scaled one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dancegrpo.errors import RewardError
from dancegrpo.rewards import load_reward
from dancegrpo.rewards.pickscore import PickScoreReward
from dancegrpo.settings import RewardConfig
from tiny_clip import (
    PROCESSOR,
    TEXTS,
    assert_batches_agree,
    assert_bytes_and_floats_agree,
    assert_gradient_is_the_slope,
    clip_model,
    media,
    prompts,
    save_tokenizer,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint and, apart from it, the processor; exact GELU as in laion's ViT-H."""
    model, processor = tmp_path_factory.mktemp("pickscore"), tmp_path_factory.mktemp("laion")
    clip_model("gelu").save_pretrained(model)
    save_tokenizer(processor)
    (processor / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return {"model": str(model), "processor": str(processor)}


@pytest.fixture(scope="module")
def judge(folders):
    return PickScoreReward(**folders)


def test_the_score_is_the_raw_cosine(judge, folders):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folders["model"])
    picture = media(1, height=28, width=28)
    mean, std = (torch.tensor(PROCESSOR[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    ids = torch.tensor([[10, 0, 8, 1, 2, 3, 11]])  # start, a, red, c a t, end
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=(picture[:, 0] - mean) / std)
    expected = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(judge(picture, prompts(["a red cat"])).values, expected, atol=1e-5, rtol=0)


def test_scaled_multiplies_by_the_logit_scale_even_in_half_precision(judge, folders):
    raw = judge(media(), prompts()).values
    scaled = PickScoreReward(**folders, scaled=True)(media(), prompts())
    torch.testing.assert_close(scaled.values, raw * torch.tensor(2.6592).exp(), rtol=1e-5, atol=0, equal_nan=True)
    assert scaled.valid.tolist() == [True, True, True, False, True]
    assert PickScoreReward(**folders, scaled=True, dtype="bfloat16").scale == pytest.approx(14.2848, rel=1e-4)


def test_batches_bytes_and_gradients_agree(judge):
    assert_batches_agree(judge)
    assert_bytes_and_floats_agree(judge)
    assert_gradient_is_the_slope(judge)


def test_a_recipe_names_it(folders):
    reward = load_reward("people", RewardConfig(judge="pickscore", options=folders | {"batch_size": 2}))
    assert reward(media(size=2), prompts(TEXTS[:2])).valid.all()


def test_a_folder_with_a_missing_tensor_is_refused_by_name(folders, tmp_path):
    tensors = load_file(f"{folders['model']}/model.safetensors")
    del tensors["text_model.final_layer_norm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = clip_model("gelu").config
    config.architectures = ["CLIPModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"text_model.final_layer_norm.bias is missing"):
        PickScoreReward(model=str(tmp_path), processor=folders["processor"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processor": "nowhere"}, "processor='nowhere' of the pickscore judge"),
        ({"model": "nowhere"}, "model='nowhere' of the pickscore judge"),
        ({"batch_size": 0}, "batch_size=0 of the pickscore judge"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message, folders):
    with pytest.raises(RewardError, match=message) as refused:
        PickScoreReward(**folders | options)
    assert "\n" not in str(refused.value)
