"""ImageReward: the published layout, mapped onto transformers' BLIP, against a forward pass written out here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dancegrpo.errors import RewardError
from dancegrpo.rewards import load_reward
from dancegrpo.rewards.blip import BLIP_LARGE, ImageRewardNetwork, infer_sizes, layout
from dancegrpo.rewards.image_reward import ImageRewardReward
from dancegrpo.settings import RewardConfig
from tiny_clip import (
    TEXTS,
    assert_batches_agree,
    assert_bytes_and_floats_agree,
    assert_gradient_is_the_slope,
    media,
    prompts,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat"]
VISION, TEXT, PATCH, SIDE, CONTEXT = 16, 12, 8, 24, 40


def linear(name, width, out, g):
    return {
        f"{name}.weight": torch.randn(out, width, generator=g) / width**0.5,
        f"{name}.bias": torch.randn(out, generator=g) / 5,
    }


def norm(name, width, g):
    return {
        f"{name}.weight": 1 + torch.randn(width, generator=g) / 5,
        f"{name}.bias": torch.randn(width, generator=g) / 5,
    }


def checkpoint():
    """Random weights under every name of ImageReward.pt, those that no score uses among them; two layers per tower."""
    g = torch.Generator().manual_seed(0)
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    tensors = {
        f"{v}cls_token": torch.randn(1, 1, VISION, generator=g),
        f"{v}pos_embed": torch.randn(1, 10, VISION, generator=g),
        f"{v}patch_embed.proj.weight": torch.randn(VISION, 3, PATCH, PATCH, generator=g) / 10,
        f"{v}patch_embed.proj.bias": torch.randn(VISION, generator=g),
        **norm(f"{v}norm", VISION, g),
        f"{t}embeddings.position_ids": torch.arange(CONTEXT)[None],
        f"{t}embeddings.word_embeddings.weight": torch.randn(len(WORDS) + 2, TEXT, generator=g),
        f"{t}embeddings.position_embeddings.weight": torch.randn(CONTEXT, TEXT, generator=g),
        **norm(f"{t}embeddings.LayerNorm", TEXT, g),
        **linear("blip.vision_proj", VISION, 6, g),
        **linear("blip.text_proj", TEXT, 6, g),
    }
    for i in range(2):
        block = f"{v}blocks.{i}"
        tensors |= norm(f"{block}.norm1", VISION, g) | norm(f"{block}.norm2", VISION, g)
        tensors |= linear(f"{block}.attn.qkv", VISION, 3 * VISION, g) | linear(f"{block}.attn.proj", VISION, VISION, g)
        tensors |= linear(f"{block}.mlp.fc1", VISION, 4 * VISION, g) | linear(f"{block}.mlp.fc2", 4 * VISION, VISION, g)
        layer = f"{t}encoder.layer.{i}"
        for attention, read in (("attention", TEXT), ("crossattention", VISION)):
            for kind, width in (("query", TEXT), ("key", read), ("value", read)):
                tensors |= linear(f"{layer}.{attention}.self.{kind}", width, TEXT, g)
            tensors |= linear(f"{layer}.{attention}.output.dense", TEXT, TEXT, g)
            tensors |= norm(f"{layer}.{attention}.output.LayerNorm", TEXT, g)
        tensors |= linear(f"{layer}.intermediate.dense", TEXT, 4 * TEXT, g)
        tensors |= linear(f"{layer}.output.dense", 4 * TEXT, TEXT, g) | norm(f"{layer}.output.LayerNorm", TEXT, g)
    for number, (width, out) in {0: (TEXT, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        tensors |= linear(f"mlp.layers.{number}", width, out, g)
    return tensors


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def judge(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("imagereward") / "ImageReward.pt"
    torch.save(checkpoint(), path)
    return ImageRewardReward(weights=str(path), tokenizer=tokenizer, heads=[4, 3], batch_size=3)


# The forward pass, written out


def apply_linear(x, tensors, name):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def apply_norm(x, tensors, name, eps):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def attend(query, key, value, heads):
    """One sequence: (Q, D), (K, D), (K, D) -> (Q, D)."""
    parts = zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True)
    return torch.cat([(q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v for q, k, v in parts], -1)


def see(pixels, tensors):
    """(10, VISION) of one picture (3, SIDE, SIDE), pre-norm ViT with eps 1e-6."""
    v = "blip.visual_encoder."
    patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).reshape(9, -1)
    x = patches @ tensors[f"{v}patch_embed.proj.weight"].reshape(VISION, -1).T + tensors[f"{v}patch_embed.proj.bias"]
    x = torch.cat([tensors[f"{v}cls_token"][0], x]) + tensors[f"{v}pos_embed"][0]
    for i in range(2):
        block = f"{v}blocks.{i}"
        q, k, value = apply_linear(apply_norm(x, tensors, f"{block}.norm1", 1e-6), tensors, f"{block}.attn.qkv").chunk(
            3, -1
        )
        x = x + apply_linear(attend(q, k, value, 4), tensors, f"{block}.attn.proj")
        wide = F.gelu(apply_linear(apply_norm(x, tensors, f"{block}.norm2", 1e-6), tensors, f"{block}.mlp.fc1"))
        x = x + apply_linear(wide, tensors, f"{block}.mlp.fc2")
    return apply_norm(x, tensors, f"{v}norm", 1e-6)


def read(ids, seen, tensors):
    """The first token's (TEXT,) features; post-norm BERT with eps 1e-12, without padding, seeing both ways."""
    t = "blip.text_encoder."
    x = tensors[f"{t}embeddings.word_embeddings.weight"][ids]
    x = x + tensors[f"{t}embeddings.position_embeddings.weight"][: len(ids)]
    x = apply_norm(x, tensors, f"{t}embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"{t}encoder.layer.{i}"
        for attention in ("attention", "crossattention"):
            name, other = f"{layer}.{attention}", x if attention == "attention" else seen
            q, k, v = (
                apply_linear(y, tensors, f"{name}.self.{kind}")
                for y, kind in ((x, "query"), (other, "key"), (other, "value"))
            )
            out = apply_linear(attend(q, k, v, 3), tensors, f"{name}.output.dense")
            x = apply_norm(out + x, tensors, f"{name}.output.LayerNorm", 1e-12)
        wide = F.gelu(apply_linear(x, tensors, f"{layer}.intermediate.dense"))
        x = apply_norm(
            apply_linear(wide, tensors, f"{layer}.output.dense") + x, tensors, f"{layer}.output.LayerNorm", 1e-12
        )
    return x[0]


def test_the_score_is_that_of_the_forward_pass_written_out(judge):
    tensors, pictures = checkpoint(), media(3, height=SIDE, width=SIDE)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    asked = {"a red cat": [2, 5, 6, 7, 3], "A CAT": [2, 5, 7, 3], "dog": [2, 1, 3]}
    expected = []
    for picture, ids in zip(pictures[:, 0], asked.values(), strict=True):
        x = read(ids, see((picture - mean) / std, tensors), tensors)
        for number in (0, 2, 4, 6, 7):
            x = apply_linear(x, tensors, f"mlp.layers.{number}")
        expected.append((x[0] - 0.16717362830052426) / 1.0333394966054072)
    torch.testing.assert_close(judge(pictures, prompts(asked)).values, torch.stack(expected), atol=1e-4, rtol=0)


def test_prompts_are_cut_to_35_tokens(judge):
    pictures = media(2)
    long = judge(pictures, prompts(["cat " * 33 + "red", "cat " * 33 + "a"])).values
    same = judge(pictures[[0, 0]], prompts(["cat " * 33 + "red", "cat " * 33 + "a"])).values
    assert long[0] != long[1]
    assert same[0] == pytest.approx(same[1].item(), abs=1e-5)


def test_the_crop_is_torchvisions(judge):
    # 24 from 27: round(1.5) = 2, so the last column is gone and the two first ones too... 24 columns from the third on.
    picture = media(1, height=24, width=27)
    cut = judge.preprocessing(picture[:, 0])
    assert torch.equal(cut, judge.preprocessing(picture[:, 0, :, :, 2:26]))


def test_batches_bytes_and_gradients_agree(judge):
    assert_batches_agree(judge)
    assert_bytes_and_floats_agree(judge)
    assert_gradient_is_the_slope(judge)


def test_an_empty_prompt_has_no_score(judge):
    scores = judge(media(), prompts())
    assert scores.valid.tolist() == [True, True, True, False, True]
    assert scores.causes == {"the prompt is empty": 1}


def test_the_published_sizes_leave_no_parameter_over():
    network = ImageRewardNetwork(BLIP_LARGE)
    towers = sum(p.numel() for tower in (network.vision, network.text) for p in tower.parameters())
    names = {name: shape for name, shape in layout(BLIP_LARGE).items() if name.startswith("blip.")}
    assert towers == sum(math.prod(shape) for shape in names.values())
    assert len(names) == len(network.vision.state_dict()) + len(network.text.state_dict())
    assert (
        infer_sizes({k: torch.empty(s, device="meta") for k, s in layout(BLIP_LARGE).items()}, (16, 12)) == BLIP_LARGE
    )


# Strictness


def refused(tensors, tokenizer, folder, heads=(4, 3)):
    torch.save(tensors, folder / "bad.pt")
    options = {"weights": str(folder / "bad.pt"), "tokenizer": tokenizer, "heads": heads and list(heads)}
    with pytest.raises(RewardError) as error:
        load_reward("people", RewardConfig(judge="imagereward", options=options))
    assert "\n" not in str(error.value)
    return str(error.value)


UNUSED = {"position_ids", "vision_proj", "text_proj"}
NEEDED = sorted(name for name in checkpoint() if not any(part in name for part in UNUSED))


@pytest.mark.parametrize("key", NEEDED[::5])
def test_a_missing_or_misshapen_tensor_is_refused_by_name(key, tokenizer, tmp_path):
    tensors = checkpoint()
    assert key in refused(tensors | {key: torch.zeros([*tensors[key].shape[:-1], 777])}, tokenizer, tmp_path)
    del tensors[key]
    assert key in refused(tensors, tokenizer, tmp_path)


@pytest.mark.parametrize(
    "key", ["blip.itm_head.weight", "mlp.layers.1.weight", "blip.text_encoder.pooler.dense.weight"]
)
def test_an_extra_tensor_is_refused_by_name(key, tokenizer, tmp_path):
    assert f"{key} is extra" in refused(checkpoint() | {key: torch.zeros(2, 2)}, tokenizer, tmp_path)


def test_tensors_that_no_score_uses_may_be_absent(judge, tokenizer, tmp_path):
    torch.save({k: v for k, v in checkpoint().items() if k in NEEDED}, tmp_path / "lean.pt")
    lean = ImageRewardReward(weights=str(tmp_path / "lean.pt"), tokenizer=tokenizer, heads=[4, 3])
    assert torch.equal(lean(media(2), prompts(TEXTS[:2])).values, judge(media(2), prompts(TEXTS[:2])).values)


def test_a_file_of_another_size_or_kind_is_refused(tokenizer, tmp_path):
    assert "do not fit" in refused(checkpoint(), tokenizer, tmp_path, heads=None)
    assert "check heads" in refused(checkpoint(), tokenizer, tmp_path, heads=(3, 3))
    assert "is not an ImageReward" in refused({"weight": torch.ones(2)}, tokenizer, tmp_path)


def test_a_tokenizer_of_another_vocabulary_is_refused(tokenizer, tmp_path):
    from transformers import BertTokenizer

    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS[:6])}).save_pretrained(tmp_path / "bert")
    assert "has 6 words, the network 10" in refused(checkpoint(), str(tmp_path / "bert"), tmp_path)
    assert "neither a folder nor a hub id" in refused(checkpoint(), "nowhere", tmp_path)


def test_without_a_path_the_published_file_is_asked_for(monkeypatch):
    def offline(*file):
        raise ConnectionError(f"no way to {'/'.join(file)}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(RewardError, match=r"no way to THUDM/ImageReward/ImageReward.pt.*the option `weights`"):
        ImageRewardReward()
