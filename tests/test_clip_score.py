"""CLIP score: preprocessing against transformers' own, both checkpoint layouts, and strict about both."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dancegrpo.errors import RewardError
from dancegrpo.rewards import load_reward
from dancegrpo.rewards.clip_score import ClipScoreReward, Preprocessing, load_clip, load_preprocessing
from dancegrpo.rewards.open_clip import VIT_H_14, Architecture, Tower, layout, published_heads
from dancegrpo.settings import RewardConfig
from tiny_clip import (
    PROCESSOR,
    SIDE,
    TEXTS,
    assert_batches_agree,
    assert_bytes_and_floats_agree,
    assert_gradient_is_the_slope,
    clip_model,
    media,
    prompts,
    save_clip,
    save_tokenizer,
)

OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 10,
        "quick_gelu": True,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 14},
        "text_cfg": {"context_length": 8, "vocab_size": 12, "width": 24, "heads": 3, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}
"""open_clip_config.json in the words of apple/DFN5B-CLIP-ViT-H-14-378."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def judge(folder):
    return ClipScoreReward(model=str(folder), batch_size=3)


def open_clip_tensors():
    """The tiny CLIP's weights as open_clip writes them: by hand, with q, k and v joined."""
    state = clip_model().state_dict()
    tensors = {"logit_scale": state["logit_scale"]}
    names = {"text_model": "", "vision_model": "visual."}
    tensors["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    tensors["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    tensors["text_projection"] = state["text_projection.weight"].T.contiguous()
    tensors["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    tensors["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    tensors["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    tensors["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    for kind in ("weight", "bias"):
        tensors[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        tensors[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        tensors[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        for tower, prefix in names.items():
            for i in range(2):
                theirs, own = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
                joined = [state[f"{theirs}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                tensors[f"{own}.attn.in_proj_{kind}"] = torch.cat(joined)
                tensors[f"{own}.attn.out_proj.{kind}"] = state[f"{theirs}.self_attn.out_proj.{kind}"]
                for a, b in {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1"}.items():
                    tensors[f"{own}.{a}.{kind}"] = state[f"{theirs}.{b}.{kind}"]
                tensors[f"{own}.mlp.c_proj.{kind}"] = state[f"{theirs}.mlp.fc2.{kind}"]
    return tensors


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    torch.save(open_clip_tensors(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    save_tokenizer(folder / "tokenizer")
    return folder


# Preprocessing


def smooth_picture(height, width):
    """(3, H, W) uint8 without the noise that would make PIL's rounding between its two passes visible."""
    y, x = np.meshgrid(np.linspace(0, 6, height), np.linspace(0, 5, width), indexing="ij")
    channels = [np.sin(x + y), np.cos(2 * x - y), np.sin(x * y / 3)]
    return torch.from_numpy(((np.stack(channels) + 1) * 127.5).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(28, 28), (56, 56), (61, 94), (97, 40), (20, 31), (28, 45)])
@pytest.mark.parametrize(
    "settings", [{}, {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}, {"size": 35, "resample": 2}]
)
def test_pixels_are_those_of_the_processor(size, settings, tmp_path):
    from transformers import CLIPImageProcessorPil

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | settings))
    picture = smooth_picture(*size)
    expected = CLIPImageProcessorPil.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    pixels = load_preprocessing(str(tmp_path), SIDE)(picture[None].float() / 255)
    assert pixels.shape == expected.shape
    # Two steps of a byte over the smallest std: PIL rounds to bytes after each of its two passes.
    torch.testing.assert_close(pixels, expected.float(), atol=2 / 255 / 0.26, rtol=0)


def test_rounded_corners_are_torchvisions():
    picture = torch.zeros(1, 3, 28, 31)
    picture[..., 2] = 1  # torchvision's crop of 28 from 31 starts at round(1.5) = 2, transformers' at 1
    plain, rounded = (Preprocessing(28, 28, rounded=r, mean=(0,) * 3, std=(1,) * 3)(picture) for r in (False, True))
    assert plain[0, 0, 0].argmax() == 1
    assert rounded[0, 0, 0].argmax() == 0


def test_squash_keeps_what_the_crop_cuts_off(folder):
    picture = torch.zeros(1, 1, 3, 28, 84)
    picture[..., :28] = 1
    crop, squash = (
        load_clip("clip", folder, resize=resize).preprocessing(picture[:, 0]) for resize in ("crop", "squash")
    )
    assert crop.std(dim=(2, 3)).max() < 1e-6
    assert squash.std(dim=(2, 3)).min() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": 24}, "28 px cut to 24, the network reads 28 px"),
        ({"size": {"height": 28, "width": 30}}, "is not square"),
        ({"do_resize": False}, "do_resize is false"),
        ({"do_center_crop": False}, "do_center_crop is false"),
        ({"resample": 0}, "resample 0 is neither"),
        ({"size": None}, "not CLIP's"),
    ],
)
def test_a_preprocessing_that_is_not_clips_is_refused(settings, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | settings))
    with pytest.raises(RewardError, match=message):
        load_preprocessing(str(tmp_path), SIDE)


# The judge


def test_the_score_is_the_raw_cosine_of_transformers_model(judge, folder):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    picture, text = smooth_picture(56, 42), "a red cat"
    tokens = CLIPTokenizer.from_pretrained(folder)([text], return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = CLIPModel.from_pretrained(folder)(**tokens, pixel_values=pixels)
    expected = output.logits_per_image[0, 0] / output.logits_per_image.new_tensor(2.6592).exp()
    score = judge(picture[None, None], prompts([text])).values
    torch.testing.assert_close(score[0], expected, atol=5e-3, rtol=0)


def test_batches_bytes_and_gradients_agree(judge):
    assert_batches_agree(judge)
    assert_bytes_and_floats_agree(judge)
    assert_gradient_is_the_slope(judge)


def test_an_empty_prompt_has_no_score(judge):
    scores = judge(media(), prompts())
    assert scores.valid.tolist() == [True, True, True, False, True]
    assert scores.causes == {"the prompt is empty": 1}


def test_a_recipe_names_it_and_clips_are_scored_by_frames(folder):
    reward = load_reward("fit", RewardConfig(judge="clip", options={"model": str(folder)}))
    assert reward(media(size=2, frames=3), prompts(TEXTS[:2])).valid.all()


# Strictness of transformers' layout


def rewritten(folder, target, changes):
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = {k: v for k, v in (load_file(folder / "model.safetensors") | changes).items() if v is not None}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("logit_scale", None, "logit_scale is missing"),
        ("vision_model.encoder.layers.1.mlp.fc2.bias", None, "fc2.bias is missing"),
        ("vision_model.head.weight", torch.ones(2), "head.weight is extra"),
        ("visual_projection.weight", torch.ones(3, 3), r"visual_projection.weight is \(3, 3\), not \(10, 16\)"),
    ],
)
def test_a_folder_with_a_wrong_tensor_is_refused_by_name(key, value, message, folder, tmp_path):
    with pytest.raises(RewardError, match=message) as refused:
        ClipScoreReward(model=str(rewritten(folder, tmp_path, {key: value})))
    assert "\n" not in str(refused.value)


def test_position_ids_of_older_checkpoints_are_legal(judge, folder, tmp_path):
    ids = {"text_model.embeddings.position_ids": torch.arange(8)[None]}
    ids["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    old = ClipScoreReward(model=str(rewritten(folder, tmp_path, ids)))
    assert torch.equal(old(media(1), prompts(TEXTS[:1])).values, judge(media(1), prompts(TEXTS[:1])).values)


# open_clip's layout


def test_open_clips_layout_scores_as_transformers(open_clip_folder, judge):
    same = {"mean": PROCESSOR["image_mean"], "std": PROCESSOR["image_std"]}
    other = open_clip_folder / "same"
    other.mkdir()
    save_file(open_clip_tensors(), other / "open_clip_model.safetensors")
    (other / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP | {"preprocess_cfg": same}))
    reward = ClipScoreReward(model=str(other), tokenizer=str(open_clip_folder / "tokenizer"))
    pictures = media(height=28, width=28)
    torch.testing.assert_close(
        reward(pictures, prompts()).values, judge(pictures, prompts()).values, atol=1e-5, rtol=0, equal_nan=True
    )


def test_open_clips_configuration_is_followed(open_clip_folder):
    loaded = load_clip("clip", open_clip_folder / "open_clip_pytorch_model.bin")
    expected = Preprocessing(28, 28, True, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", rounded=True)
    assert loaded.preprocessing == expected
    assert loaded.model.config.vision_config.hidden_act == loaded.model.config.text_config.hidden_act == "quick_gelu"
    assert loaded.model.config.vision_config.num_attention_heads == 2
    assert loaded.model.config.text_config.num_attention_heads == 3


def test_a_lone_file_must_be_told_its_activation(open_clip_folder, tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file(open_clip_tensors(), path)
    with pytest.raises(RewardError, match=r"activation of .* is unknown: set quick_gelu"):
        load_clip("clip", path, heads=(2, 3))
    with pytest.raises(RewardError, match=r"widths 16 \(vision\) and 24 \(text\) is no published one: give its heads"):
        load_clip("clip", path, quick_gelu=True)
    acts = [
        load_clip("clip", path, heads=(2, 3), quick_gelu=q).model.config.text_config.hidden_act for q in (True, False)
    ]
    assert acts == ["quick_gelu", "gelu"]


@pytest.mark.parametrize("key", ["visual.ln_post.weight", "transformer.resblocks.1.attn.in_proj_bias"])
def test_a_file_with_a_wrong_tensor_is_refused_by_name(key, tmp_path):
    tensors = open_clip_tensors()
    for wrong in (
        {k: v for k, v in tensors.items() if k != key},
        tensors | {key: torch.ones(5)},
        tensors | {key + "_": torch.ones(2)},
    ):
        torch.save(wrong, tmp_path / "bad.pt")
        with pytest.raises(RewardError, match=key):
            load_clip("clip", tmp_path / "bad.pt", heads=(2, 3), quick_gelu=True)


def test_heads_of_published_widths_are_known():
    vit_l = Architecture(Tower(1024, 4096, 24, 16), Tower(768, 3072, 12, 12), 768, 224, 14, 77, 49408)
    with torch.device("meta"):
        for sizes in (VIT_H_14, vit_l):
            tensors = {name: torch.empty(shape) for name, shape in layout(sizes).items()}
            assert published_heads(tensors) == (sizes.vision.heads, sizes.text.heads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/such/folder"}, "neither a folder nor a hub id"),
        ({"model": "nowhere.pt", "quick_gelu": True}, "do not exist"),
        ({"resize": "longest"}, "resize='longest' of the clip judge is unknown: use crop or squash"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"heads": [2, 3]}, "heads and quick_gelu are for checkpoint files"),
        ({"tokenizer": "nowhere/at/all"}, "tokenizer='nowhere/at/all'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message, folder):
    with pytest.raises(RewardError, match=message) as refused:
        ClipScoreReward(**{"model": str(folder), **options})
    assert "\n" not in str(refused.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(RewardError, match=r"has no config.json or open_clip_config.json: give a complete"):
        ClipScoreReward(model=str(tmp_path))


def test_a_repository_without_transformers_files_is_read_as_open_clips(open_clip_folder, monkeypatch):
    asked = []

    def download(repository, filename):
        asked.append((repository, filename))
        if not (open_clip_folder / filename).is_file():
            raise FileNotFoundError(filename)
        return open_clip_folder / filename

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_clip("clip", "apple/DFN").open_clip
    assert asked[-1] == ("apple/DFN", "open_clip_pytorch_model.bin")
