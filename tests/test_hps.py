"""HPS-v2.1: against the published implementation's numbers, and strict about its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, load_reward
from dancegrpo.rewards.clip import clean_text, image_features, text_features
from dancegrpo.rewards.hps import HPSReward, hps_pixels
from dancegrpo.rewards.open_clip import (
    VIT_H_14,
    build_clip,
    infer_architecture,
    layout,
    load_open_clip,
    to_transformers,
)
from dancegrpo.settings import RewardConfig

GOLDEN = Path(__file__).parent / "golden" / "hps_open_clip_tiny.safetensors"
TEXTS = ["a red cat", "a cat", "cat red red", "", "a red cat"]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def golden_checkpoint(golden, tmp_path_factory):
    """The published implementation's tiny network, written the way HPS-v2.1 is."""
    state = {key.removeprefix("state_dict."): t for key, t in golden.items() if key.startswith("state_dict.")}
    embedding = torch.zeros(49408, golden["used_token_rows"].shape[1])
    embedding[golden["used_token_ids"]] = golden["used_token_rows"]
    path = tmp_path_factory.mktemp("golden") / "hps.pt"
    torch.save({"epoch": 0, "state_dict": state | {"token_embedding.weight": embedding}}, path)
    return path


def tiny_checkpoint():
    """Random weights in open_clip's layout: 28 px, two layers per tower, vocabulary 12."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "token_embedding.weight": torch.randn(12, 24, generator=generator),
        "positional_embedding": torch.randn(8, 24, generator=generator),
        "text_projection": torch.randn(24, 10, generator=generator),
        "visual.class_embedding": torch.randn(16, generator=generator),
        "visual.positional_embedding": torch.randn(5, 16, generator=generator),
        "visual.conv1.weight": torch.randn(16, 3, 14, 14, generator=generator) / 10,
        "visual.proj": torch.randn(16, 10, generator=generator),
        "logit_scale": torch.tensor(4.6),
    }
    norms = {"ln_final": 24, "visual.ln_pre": 16, "visual.ln_post": 16}
    for tower, width in (("", 24), ("visual.", 16)):
        for i in range(2):
            block = f"{tower}transformer.resblocks.{i}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            linears = {"attn.in_proj_": (3, 1), "attn.out_proj.": (1, 1), "mlp.c_fc.": (4, 1), "mlp.c_proj.": (1, 4)}
            for name, (rows, columns) in linears.items():
                weight = torch.randn(rows * width, columns * width, generator=generator) / (columns * width) ** 0.5
                tensors[f"{block}.{name}weight"] = weight
                tensors[f"{block}.{name}bias"] = torch.randn(rows * width, generator=generator) / 10
    for name, width in norms.items():
        tensors[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) / 10
        tensors[f"{name}.bias"] = torch.randn(width, generator=generator) / 10
    return tensors


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """CLIP's tokenizer with a vocabulary of 12: single letters, and `red` by its merges."""
    from transformers import CLIPTokenizer

    words = ["a</w>", "c", "a", "t</w>", "r", "e", "d</w>", "re", "red</w>", "?", "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {word: i for i, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("hps") / "tiny.pt"
    torch.save({"state_dict": tiny_checkpoint()}, path)
    options = {"weights": str(path), "tokenizer": str(tokenizer), "heads": [2, 3], "batch_size": 3}
    return HPSReward(**options)


def media(size=5, frames=1, height=20, width=33):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, frames, 3, height, width, generator=generator)


def prompts(texts=TEXTS):
    return [Prompt(i, text) for i, text in enumerate(texts)]


# The published numbers


@pytest.mark.parametrize("index", range(5))
def test_pixels_and_score_match_the_published_implementation(index, golden, golden_checkpoint):
    picture = golden[f"image_{index}"].permute(2, 0, 1)[None].float() / 255
    pixels = hps_pixels(picture)
    expected = golden[f"hps_pixels_mean_std_{index}"]
    torch.testing.assert_close(torch.stack([pixels.mean(), pixels.std()]), expected, atol=1e-4, rtol=0)
    model = load_open_clip(golden_checkpoint, heads=(4, 4))
    text = text_features(model, golden["token_ids"][index : index + 1])
    score = (image_features(model, pixels) * text).sum(-1)
    torch.testing.assert_close(score[0], golden[f"hps_score_{index}"], atol=1e-4, rtol=0)


def test_the_published_architecture_is_vit_h_14_with_nothing_left_over():
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in layout(VIT_H_14).items()}
    converted = to_transformers(tensors)
    assert len(converted) == 910
    build_clip(VIT_H_14).load_state_dict(converted, strict=True, assign=True)
    assert infer_architecture(tensors, heads=(16, 16)) == VIT_H_14


# Preprocessing


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"), [(30, 60, (56, 168), (0, 224)), (7, 1, (0, 224), (96, 128))]
)
def test_a_picture_is_fitted_and_centred_on_black(height, width, rows, columns):
    pixels = hps_pixels(torch.ones(1, 3, height, width))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = torch.zeros(3, 224, 224)
    expected[:, slice(*rows), slice(*columns)] = 1
    torch.testing.assert_close(pixels[0], (expected - mean) / std)


def test_a_picture_of_the_right_size_is_not_resampled():
    picture = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    torch.testing.assert_close(hps_pixels(picture) * std + mean, picture)


def test_text_is_mended_unescaped_and_its_whitespace_single():
    assert clean_text("  a \n cat &amp;amp; schÃ¶n&#33; ") == "a cat & schön!"


def test_tokens_are_start_words_end_cut_to_the_context(judge):
    start, end = 10, 11
    ids = judge.tokenize(["A  red\ncat", "red " * 20])
    assert ids[0].tolist() == [start, 0, 8, 1, 2, 3, end, end]
    assert ids[1].tolist() == [start, 8, 8, 8, 8, 8, 8, end]


# The judge


def test_a_batch_scores_as_one_at_a_time_in_any_order(judge):
    pictures, texts = media(), prompts()
    batch = judge(pictures, texts).values
    single = torch.cat([judge(pictures[i : i + 1], texts[i : i + 1]).values for i in range(5)])
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = judge(pictures[order], [texts[i] for i in order]).values
    assert batch[judge(pictures, texts).valid].std() > 0.01
    torch.testing.assert_close(batch, single, atol=1e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(batch[order], shuffled, atol=1e-5, rtol=0, equal_nan=True)


def test_an_empty_prompt_has_no_score(judge):
    scores = judge(media(), prompts())
    assert scores.valid.tolist() == [True, True, True, False, True]
    assert scores.causes == {"the prompt is empty": 1}


def test_bytes_and_their_floats_score_the_same(judge):
    pictures = (media() * 255).round().to(torch.uint8)
    judges = Judges({"hps": judge})
    of_bytes, of_floats = (judges.score(m, prompts())["hps"].values for m in (pictures, pictures.float() / 255))
    torch.testing.assert_close(of_bytes, of_floats, atol=0, rtol=0, equal_nan=True)


def test_a_clip_is_refused_unless_frames_are_chosen(judge):
    with pytest.raises(RewardError, match="clips of 4 frames"):
        judge(media(size=2, frames=4), prompts(TEXTS[:2]))


def test_gradients_are_those_of_the_score(judge):
    assert judge.differentiable
    pictures, texts = media(size=2).double().requires_grad_(), prompts(TEXTS[:2])
    values = judge(pictures, texts).values
    values.sum().backward()
    direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (judge(pictures + h * direction, texts).values.sum() for h in (1e-2, -1e-2))
    slope = ((ahead - behind) / 2e-2).item()
    assert abs(slope) > 1e-3
    assert (pictures.grad * direction).sum().item() == pytest.approx(slope, rel=2e-2)
    assert all(parameter.grad is None for parameter in judge.model.parameters())


def test_half_precision_stays_near_and_still_answers_in_float32(judge, tokenizer, tmp_path):
    save_file(tiny_checkpoint(), tmp_path / "tiny.safetensors")
    options = {"weights": str(tmp_path / "tiny.safetensors"), "tokenizer": str(tokenizer), "heads": [2, 3]}
    half = HPSReward(**options, dtype="bfloat16", device="cpu")
    assert half.to("meta").device == torch.device("cpu")  # pinned by the recipe
    values = half(media(), prompts()).values
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, judge(media(), prompts()).values, atol=0.05, rtol=0, equal_nan=True)


# Strictness


@pytest.mark.parametrize("key", sorted(tiny_checkpoint()))
def test_a_missing_tensor_is_refused_by_name(key, tmp_path):
    tensors = tiny_checkpoint()
    del tensors[key]
    assert_refused(tensors, key, tmp_path)


@pytest.mark.parametrize("key", ["visual.transformer.resblocks.2.ln_1.weight", "logit_bias", "module.ln_final.bias"])
def test_an_extra_tensor_is_refused_by_name(key, tmp_path):
    assert_refused(tiny_checkpoint() | {key: torch.zeros(16)}, key, tmp_path)


@pytest.mark.parametrize("key", sorted(tiny_checkpoint()))
def test_a_misshapen_tensor_is_refused_by_name(key, tmp_path):
    tensors = tiny_checkpoint()
    tensors[key] = torch.zeros([*tensors[key].shape[:-1], 2 * (tensors[key].shape or [1])[-1] + 1])
    assert_refused(tensors, key, tmp_path)


def assert_refused(tensors, key, folder):
    torch.save({"state_dict": tensors}, folder / "bad.pt")
    with pytest.raises(RewardError) as refused:
        load_open_clip(folder / "bad.pt", heads=(2, 3))
    assert key in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 half a file", "cannot be read"),
        ({"state_dict": [1, 2]}, "hold no tensors by name"),
        (torch.zeros(3), "hold no tensors by name"),
        ({"state_dict": {"linear.weight": torch.zeros(2, 2)}}, "do not fit: logit_scale is missing; .* more"),
        ({"state_dict": tiny_checkpoint()}, r"class_embedding is \(16,\)|more"),
        (Path("a pickled object"), "cannot be read"),
    ],
)
def test_a_file_that_is_no_hps_checkpoint_is_refused(content, message, tmp_path):
    path = tmp_path / "bad.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(RewardError, match=message) as refused:
        load_open_clip(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("heads", [(3, 3), (2, 0), (2,), 2])
def test_heads_that_do_not_divide_the_width_are_refused(heads, tmp_path):
    torch.save(tiny_checkpoint(), tmp_path / "tiny.pt")
    with pytest.raises(RewardError, match="check heads"):
        load_open_clip(tmp_path / "tiny.pt", heads)


def test_without_a_path_the_published_file_is_asked_for(golden_checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *file: asked.append(file) or golden_checkpoint)
    with pytest.raises(RewardError, match="tokenizer='no-such-folder'"):
        HPSReward(heads=(4, 4), tokenizer="no-such-folder")
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")]


def test_weights_that_cannot_be_fetched_are_an_error_with_a_way_out(monkeypatch):
    def offline(*file):
        raise ConnectionError("no route to host\ntry again")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(RewardError, match=r"ConnectionError: no route to host .*give its path as the option `weights`"):
        HPSReward()


def test_a_tokenizer_of_another_vocabulary_is_refused(golden_checkpoint, tokenizer, tmp_path):
    def load(folder):
        options = {"weights": str(golden_checkpoint), "heads": [4, 4], "tokenizer": str(folder)}
        return load_reward("hps", RewardConfig(judge="hps", options=options))

    with pytest.raises(RewardError, match="ends texts with id 11, the network with 49407"):
        load(tokenizer)
    with pytest.raises(RewardError, match="neither a folder nor a hub id"):
        load(tmp_path / "nothing")
    with pytest.raises(RewardError, match="tokenizer"):
        load(tmp_path)
