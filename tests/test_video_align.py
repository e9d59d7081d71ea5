"""VideoAlign: patches against transformers' own, both checkpoint layouts against peft's, and strictness by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_qwen
from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, load_reward
from dancegrpo.rewards.qwen2_vl import evenly_spaced_frames, fitted_size, resize_frames, to_patches
from dancegrpo.rewards.video_align import VideoAlignReward, read_template
from dancegrpo.rewards.video_align_weights import LoRA
from dancegrpo.settings import RewardConfig

TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
TEMPLATE = "\nLook: <|VQ_reward|>\nMove: <|MQ_reward|>\nRead {text_prompt}: <|TA_reward|>\n"
TEMPLATE_FILE = f'''import os
OTHER = "Rate {{text_prompt}}"
NAMES = {{"VQ": ["a", "b"]}}
PATH = os.sep
SPECIAL = """{TEMPLATE}"""
raise SystemExit("this file was run")
'''
TEXTS = ["a red cat", "a", "two dogs run over a green hill", "", "a red cat"]
FULL = {"clip_fps": 4, "sample_fps": 2, "min_pixels": 784, "max_pixels": 4704, "batch_size": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_qwen.build(folder)
    return folder


def published(base, outputs=1):
    """The reward model as peft wraps it in training: Qwen2-VL cut to its tokens, a head, random LoRA r 4, alpha 6."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(TOKENS, special_tokens=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Qwen2VLForConditionalGeneration.from_pretrained(base).eval()
        model.resize_token_embeddings(len(tokenizer))
        model.rm_head = torch.nn.Linear(32, outputs, bias=False)
        targets = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "language_model" in n]
        wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets)).eval()
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.2
    return tokenizer, wrapped


def old_name(name):
    """Names as transformers 4.45 had them, in which the checkpoint was published."""
    return name.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual.")


def write_config(folder, base, outputs=1, **inference):
    config = {
        "data_config": {"fps": 2, "num_frames": None, "max_frame_pixels": 200704, "sample_type": "uniform"},
        "model_config": {"model_name_or_path": str(base), "output_dim": outputs, "use_special_tokens": True},
        "peft_lora_config": {
            "lora_enable": True,
            "vision_lora": False,
            "lora_r": 4,
            "lora_alpha": 6,
            "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens"],
        },
        "inference_config": inference,
    }
    folder.mkdir(exist_ok=True)
    (folder / "model_config.json").write_text(json.dumps(config))
    (folder / "prompt_template.py").write_text(TEMPLATE_FILE)


def full_tensors(wrapped):
    return {old_name(name): tensor.clone() for name, tensor in wrapped.state_dict().items()}


@pytest.fixture(scope="module")
def trained(base):
    return published(base)


@pytest.fixture(scope="module")
def full(base, trained, tmp_path_factory):
    """The published layout: model_config.json, and model.pth in the latest of the checkpoint folders."""
    folder = tmp_path_factory.mktemp("full")
    write_config(folder, base)
    for step in ("checkpoint-9", "checkpoint-10"):
        (folder / step).mkdir()
    torch.save(full_tensors(trained[1]), folder / "checkpoint-10" / "model.pth")
    return folder


@pytest.fixture(scope="module")
def adapter(base, trained, tmp_path_factory):
    """The adapter layout: LoRA as peft saves it, the embedding and the head in non_lora_state_dict.pth."""
    folder = tmp_path_factory.mktemp("adapter")
    write_config(folder, base)
    tensors = full_tensors(trained[1])
    lora = {name.replace("default.", ""): t.contiguous() for name, t in tensors.items() if "lora_" in name}
    save_file(lora, folder / "adapter_model.safetensors")
    others = ["base_model.model.model.embed_tokens.weight", "base_model.model.rm_head.weight"]
    torch.save({name: tensors[name] for name in others}, folder / "non_lora_state_dict.pth")
    described = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    described["target_modules"] += ["gate_proj", "up_proj", "down_proj"]
    described["target_modules"] = "model.layers.*(" + "|".join(described["target_modules"]) + ")"
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def judge(full):
    return VideoAlignReward(model=str(full), **FULL)


def media(size=5, frames=8, height=56, width=84):
    return torch.rand(size, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def prompts(texts=TEXTS):
    return [Prompt(i, text) for i, text in enumerate(texts)]


# Frames


@pytest.mark.parametrize(("height", "width"), [(56, 84), (57, 101), (300, 40), (28, 28), (720, 1280)])
def test_patches_are_those_of_transformers_image_processor(height, width):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from dancegrpo.rewards.clip import normalize_pixels

    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(60, 190, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8))
    picture = np.array(smooth.resize((width, height)))
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 20000})
    expected = processor(Image.fromarray(picture), return_tensors="pt")
    clip = (torch.from_numpy(picture).permute(2, 0, 1).float() / 255)[None, None]
    size = fitted_size(height, width, 3136, 20000)
    patches, grid = to_patches(normalize_pixels(resize_frames(clip, *size)))
    assert grid.tolist() == expected["image_grid_thw"].tolist()
    # PIL rounds resized pictures to 8 bits, and its passes too: two levels of 255, over the smallest deviation.
    tolerance = 1e-5 if size == (height, width) else 2 / 255 / 0.26
    torch.testing.assert_close(patches, expected["pixel_values"], atol=tolerance, rtol=0)


def test_patches_of_a_clip_are_those_of_its_frames_in_pairs():
    clip = media(size=2, frames=3)
    patches, grid = to_patches(clip)
    assert grid.tolist() == [[2, 4, 6], [2, 4, 6]]
    pairs = patches.view(2, 2, 24, 3, 2, 14, 14)
    still = [to_patches(clip[:, [i]])[0].view(2, 24, 3, 2, 14, 14)[:, :, :, 0] for i in range(3)]
    torch.testing.assert_close(pairs[:, 0, :, :, 0], still[0])
    torch.testing.assert_close(pairs[:, 0, :, :, 1], still[1])
    torch.testing.assert_close(pairs[:, 1, :, :, 0], still[2])
    torch.testing.assert_close(pairs[:, 1, :, :, 1], still[2])  # an odd clip ends on its last frame twice


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_sizes_are_transformers_own(height, width):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(height, width) > 200 * min(height, width):
        with pytest.raises(RewardError, match="too thin"):
            fitted_size(height, width, 100352, 200704)
    # Below 14 pixels theirs rounds a side to nothing.
    elif min(height, width) >= 15:
        assert fitted_size(height, width, 100352, 200704) == smart_resize(height, width, 28, 100352, 200704)


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    [
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # 5.06 s at 2 per second
        (16, 16, [0, 5, 10, 15]),  # a second would be 2 frames; 4 are shown
        (3, 8, [0, 2]),
        (2, 8, [0, 1]),
        (8, 1, [0, 1, 2, 3, 4, 5, 6, 7]),  # never more than there are
    ],
)
def test_frames_are_evenly_spaced_at_two_a_second(total, fps, expected):
    assert evenly_spaced_frames(total, fps, 2).tolist() == expected


def test_a_picture_is_no_clip(judge):
    with pytest.raises(RewardError, match="1 frame"):
        judge(media(frames=1), prompts())


# Scores


def expected_values(base, wrapped, tokenizer, clip, text, mrope=False):
    """By transformers' model with peft's LoRA: hidden states at the reward tokens, times the head."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 4704})
    frames = [Image.fromarray((f.permute(1, 2, 0) * 255).round().byte().numpy()) for f in clip]
    stills = processor(frames, return_tensors="pt")["pixel_values"].view(len(clip), 24, 3, 2, 14, 14)
    pixels = torch.stack([stills[0::2, :, :, 0], stills[1::2, :, :, 0]], dim=3).flatten(0, 1).flatten(1)
    video = "<|video_pad|>" * (len(clip) // 2 * 6)
    question = TEMPLATE.replace("{text_prompt}", text)
    chat = f"<|im_start|>user\n<|vision_start|>{video}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat, return_tensors="pt")["input_ids"]
    grid = torch.tensor([[len(clip) // 2, 4, 6]])
    kinds = 2 * (ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")).int()
    where = {"mm_token_type_ids": kinds} if mrope else {"position_ids": torch.arange(ids.shape[1])[None]}
    with torch.no_grad():
        model = wrapped.base_model.model
        hidden = model.model(ids, pixel_values_videos=pixels, video_grid_thw=grid, **where).last_hidden_state
        places = [ids[0].tolist().index(i) for i in tokenizer.convert_tokens_to_ids(TOKENS)]
        return model.rm_head(hidden[0, places])


@pytest.mark.parametrize("positions", ["sequential", "mrope"])
def test_scores_are_the_heads_at_the_reward_tokens(positions, base, trained, full):
    judge = VideoAlignReward(model=full, normalized=False, positions=positions, **FULL)
    clips = (media() * 255).round() / 255
    scores = judge(clips, prompts())
    shown = clips[2, [0, 2, 5, 7]]
    expected = expected_values(base, trained[1], trained[0], shown, TEXTS[2], mrope=positions == "mrope")
    found = torch.stack([scores.extra[name][2] for name in ("VQ", "MQ", "TA")])
    torch.testing.assert_close(found, expected[:, 0], atol=2e-5, rtol=0)
    assert found.std() > 1e-3


def test_a_head_of_three_is_read_on_its_diagonal(base, tmp_path):
    tokenizer, wrapped = published(base, outputs=3)
    write_config(tmp_path, base, outputs=3)
    torch.save(full_tensors(wrapped), tmp_path / "model.pth")
    clips = (media() * 255).round() / 255
    scores = VideoAlignReward(model=tmp_path, normalized=False, **FULL)(clips, prompts())
    expected = expected_values(base, wrapped, tokenizer, clips[0, [0, 2, 5, 7]], TEXTS[0]).diagonal()
    found = torch.stack([scores.extra[name][0] for name in ("VQ", "MQ", "TA")])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_an_adapter_scores_as_the_full_checkpoint(judge, adapter):
    told = VideoAlignReward(model=adapter, **FULL)(media(), prompts()).values
    torch.testing.assert_close(told, judge(media(), prompts()).values, atol=1e-5, rtol=0, equal_nan=True)


def test_a_merged_checkpoint_scores_as_the_unmerged(judge, base, tmp_path):
    _, wrapped = published(base)
    merged = wrapped.merge_and_unload()
    tensors = {old_name("model." + name).removeprefix("model."): t for name, t in merged.state_dict().items()}
    assert "visual.merger.ln_q.weight" in tensors
    write_config(tmp_path, base)
    torch.save(tensors, tmp_path / "model.pth")
    told = VideoAlignReward(model=tmp_path, **FULL)(media(), prompts()).values
    torch.testing.assert_close(told, judge(media(), prompts()).values, atol=1e-5, rtol=0, equal_nan=True)


def test_names_of_transformers_5_are_read_too(judge, base, trained, tmp_path):
    write_config(tmp_path, base)
    torch.save(trained[1].state_dict(), tmp_path / "model.pth")
    told = VideoAlignReward(model=tmp_path, **FULL)(media(), prompts()).values
    torch.testing.assert_close(told, judge(media(), prompts()).values, atol=0, rtol=0, equal_nan=True)


def test_the_value_is_the_weighted_sum_of_z_scores(full, judge):
    raw = VideoAlignReward(model=full, normalized=False, **FULL)(media(), prompts())
    z = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
    z = {name: (raw.extra[name] - mean) / std for name, (mean, std) in z.items()}
    scores = judge(media(), prompts())
    for name, expected in z.items():
        torch.testing.assert_close(scores.extra[name], expected, equal_nan=True)
    torch.testing.assert_close(scores.values, z["VQ"] + z["MQ"] + z["TA"], equal_nan=True)
    weighted = VideoAlignReward(model=full, dimensions={"TA": 2, "VQ": -0.5}, **FULL)(media(), prompts())
    torch.testing.assert_close(weighted.values, 2 * z["TA"] - 0.5 * z["VQ"], equal_nan=True)


def test_the_checkpoints_own_calibration_wins(full, base, trained, tmp_path):
    write_config(tmp_path, base, VQ_mean=1.0, VQ_std=4.0)
    torch.save(full_tensors(trained[1]), tmp_path / "model.pth")
    raw = VideoAlignReward(model=full, normalized=False, **FULL)(media(), prompts()).extra
    told = VideoAlignReward(model=tmp_path, **FULL)(media(), prompts()).extra
    torch.testing.assert_close(told["VQ"], (raw["VQ"] - 1) / 4, equal_nan=True)
    torch.testing.assert_close(told["MQ"], (raw["MQ"] - 1.1646) / 1.3811, equal_nan=True)


@pytest.mark.parametrize("positions", ["sequential", "mrope"])
def test_a_batch_scores_as_one_at_a_time_in_any_order(positions, full):
    judge = VideoAlignReward(model=full, positions=positions, **FULL)
    clips, texts = media(), prompts()
    batch = judge(clips, texts).values
    single = torch.cat([judge(clips[i : i + 1], texts[i : i + 1]).values for i in range(5)])
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = judge(clips[order], [texts[i] for i in order]).values
    assert batch[~batch.isnan()].std() > 1e-3
    torch.testing.assert_close(batch, single, atol=1e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(batch[order], shuffled, atol=1e-5, rtol=0, equal_nan=True)


def test_bytes_and_their_floats_score_the_same(judge):
    clips = (media() * 255).round().to(torch.uint8)
    judges = Judges({"videoalign": judge})
    of_bytes, of_floats = (judges.score(m, prompts())["videoalign"].values for m in (clips, clips.float() / 255))
    torch.testing.assert_close(of_bytes, of_floats, atol=0, rtol=0, equal_nan=True)


def test_an_empty_prompt_and_one_with_the_judges_tokens_have_no_score(judge):
    texts = ["a cat", " ", "a cat <|TA_reward|>", "<|im_end|>", "a <|cat|>"]
    clips = media()
    scores = judge(clips, prompts(texts))
    assert scores.valid.tolist() == [True, False, False, False, True]
    assert scores.causes == {"the prompt is empty": 1, "the prompt holds one of the judge's own tokens": 2}
    assert scores.extra["VQ"].isnan().tolist() == [False, True, True, True, False]


def test_media_are_left_as_they_were_and_large_frames_are_reduced(judge):
    clips = media(size=1, height=112, width=168)
    before = clips.clone()
    assert judge.frames(clips).shape == (1, 4, 3, 56, 84)
    judge(clips, prompts(["a"]))
    assert torch.equal(clips, before)


def test_gradients_are_those_of_the_score(judge):
    assert judge.differentiable
    clips, texts = media(size=2).requires_grad_(), prompts(TEXTS[:2])
    judge(clips, texts).values.sum().backward()
    direction = torch.randn(clips.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ahead, behind = (judge(clips + h * direction, texts).values.sum() for h in (3e-3, -3e-3))
    slope = ((ahead - behind) / 6e-3).item()
    assert abs(slope) > 1e-3
    assert (clips.grad * direction).sum().item() == pytest.approx(slope, rel=3e-2)
    assert clips.grad[:, 1].abs().max() == 0  # not one of the frames that are shown


def test_half_precision_stays_near_and_a_recipe_loads_it(judge, full):
    options = {**FULL, "model": str(full), "dtype": "bfloat16", "device": "cpu", "dimensions": ["VQ", "MQ", "TA"]}
    half = load_reward("va", RewardConfig(judge="videoalign", options=options))
    values = half(media(), prompts()).values
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, judge(media(), prompts()).values, atol=0.1, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("lora", "covered"),
    [
        (LoRA(4, 8, targets=("q_proj", "visual.merger.mlp.0")), [True, False, True]),
        (LoRA(4, 8, targets=r"model\.layers\.\d+\.mlp\..*"), [False, True, False]),
        (LoRA(4, 8, exclude=("visual", "mlp")), [True, False, False]),
        (LoRA(4, 8), [True, True, True]),
    ],
)
def test_updated_layers_are_those_the_checkpoint_names(lora, covered):
    layers = ["language_model.layers.3.self_attn.q_proj", "language_model.layers.3.mlp.up_proj", "visual.merger.mlp.0"]
    assert [lora.covers(f"model.{layer}") for layer in layers] == covered


def test_a_rank_stabilized_update_is_scaled_by_the_root_of_its_rank():
    assert LoRA(64, 128).scale == 2
    assert LoRA(64, 128, rank_stabilized=True).scale == 16


# The template


def test_a_template_is_read_and_never_run(tmp_path):
    (tmp_path / "t.py").write_text(TEMPLATE_FILE)
    (tmp_path / "t.txt").write_text(TEMPLATE)
    assert read_template(tmp_path / "t.py") == read_template(tmp_path / "t.txt") == TEMPLATE


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.py", "A = 'no tokens {text_prompt}'", "holds 0 texts"),
        ("t.py", f"A = {TEMPLATE!r}\nB = {TEMPLATE!r}", "holds 2 texts"),
        ("t.py", "A = (", "cannot be read: SyntaxError"),
        ("t.txt", TEMPLATE.replace("{text_prompt}", "{text_prompt.__class__}"), "holds 0 texts"),
        ("t.txt", TEMPLATE + "{other}", "holds 0 texts"),
        ("t.txt", TEMPLATE + TOKENS[0], "holds 0 texts"),
        ("t.txt", TEMPLATE + "{", "holds 0 texts"),
        ("nothing.py", None, "cannot be read: FileNotFoundError"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RewardError, match=message) as refused:
        read_template(tmp_path / name)
    assert "\n" not in str(refused.value)


# Strictness

Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj."
KEYS = [
    "base_model.model.rm_head.weight",
    "base_model.model.visual.merger.mlp.0.weight",
    "base_model.model.model.norm.weight",
    Q_PROJ + "base_layer.weight",
    Q_PROJ + "lora_A.default.weight",
    Q_PROJ + "lora_B.default.weight",
    "base_model.model.model.embed_tokens.weight",
]


def refused_full(tensors, base, folder):
    write_config(folder, base)
    torch.save(tensors, folder / "model.pth")
    with pytest.raises(RewardError) as refused:
        VideoAlignReward(model=folder, **FULL)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_or_misshapen_tensor_is_refused_by_name(key, base, trained, tmp_path):
    tensors = full_tensors(trained[1])
    kept = tensors.pop(key)
    assert f"{key} is missing" in refused_full(tensors, base, tmp_path)
    tensors[key] = torch.zeros(*kept.shape[:-1], kept.shape[-1] + 1)
    assert f"{key} is {tuple(tensors[key].shape)}, not {tuple(kept.shape)}" in refused_full(tensors, base, tmp_path)


@pytest.mark.parametrize(
    "key", ["base_model.model.rm_head.bias", "base_model.model.visual.merger.mlp.0.lora_A.default.weight", "extra"]
)
def test_an_extra_tensor_is_refused_by_name(key, base, trained, tmp_path):
    message = refused_full(full_tensors(trained[1]) | {key: torch.zeros(4, 128)}, base, tmp_path)
    assert f"{key} is extra" in message


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("adapter_model.safetensors", (Q_PROJ + "lora_B.weight", None), "lora_B.weight is missing"),
        ("adapter_model.safetensors", ("x.lora_A.weight", (4, 32)), "x.lora_A.weight is extra"),
        ("non_lora_state_dict.pth", ("base_model.model.rm_head.weight", None), "rm_head.weight is missing"),
        ("non_lora_state_dict.pth", ("base_model.model.rm_head.weight", (1, 31)), r"is \(1, 31\), not \(1, 32\)"),
        ("non_lora_state_dict.pth", ("base_model.model.model.norm.bias", (32,)), "norm.bias is extra"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(file, change, message, adapter, tmp_path):
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / file
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    key, shape = change
    tensors = {name: tensor for name, tensor in tensors.items() if name != key}
    tensors |= {} if shape is None else {key: torch.zeros(shape)}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.raises(RewardError, match=message):
        VideoAlignReward(model=tmp_path, **FULL)


def test_an_adapters_vocabulary_comes_from_the_base_where_it_is_large_enough(base, adapter, tmp_path):
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = torch.load(tmp_path / "non_lora_state_dict.pth")
    words = tensors.pop("base_model.model.model.embed_tokens.weight")
    torch.save(tensors, tmp_path / "non_lora_state_dict.pth")
    # The base has rows to spare, and training did not change them here.
    found = VideoAlignReward(model=tmp_path, **FULL).model.model.language_model.embed_tokens.weight
    torch.testing.assert_close(found, words, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no-such-folder"}, "neither a folder nor a hub id"),
        ({"base": "no-such-folder"}, "neither a folder nor a hub id"),
        ({"dimensions": []}, "cannot be summed"),
        ({"dimensions": ["VQ", "VQ"]}, "cannot be summed"),
        ({"dimensions": {"XQ": 1}}, "list each of VQ, MQ, TA"),
        ({"dimensions": {"VQ": float("nan")}}, "cannot be summed"),
        ({"positions": "absolute"}, "use sequential or mrope"),
        ({"clip_fps": 0}, "clip_fps=0 .* positive"),
        ({"min_pixels": 9999}, "above max_pixels"),
        ({"template": "nothing.py"}, "cannot be read"),
        ({"batch_size": 0}, "no batch"),
    ],
)
def test_options_that_cannot_be_are_refused(change, message, full):
    with pytest.raises(RewardError, match=message) as refused:
        VideoAlignReward(**({"model": full} | FULL | change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model_config", {"use_special_tokens": False}, "another judge"),
        ("model_config", {"output_dim": 4}, "output_dim 1 or 3"),
        ("data_config", {"sample_type": "multi_pts"}, "another judge"),
        ("inference_config", {"TA_std": 0}, "positive deviations"),
        ("inference_config", {"TA_std": "wide"}, "is incomplete"),
        ("peft_lora_config", {"num_lora_modules": 3}, "is not supported"),
        ("model_config", None, "is incomplete"),
        (None, None, "cannot be read"),
    ],
)
def test_settings_of_another_judge_are_refused(section, change, message, base, tmp_path):
    write_config(tmp_path, base)
    path = tmp_path / "model_config.json"
    config = json.loads(path.read_text())
    if section is None:
        path.write_text("{")
    else:
        config[section] = None if change is None else config[section] | change
        path.write_text(json.dumps(config))
    with pytest.raises(RewardError, match=message) as refused:
        VideoAlignReward(model=tmp_path, **FULL)
    assert "\n" not in str(refused.value)


def test_a_folder_without_weights_is_refused(base, tmp_path):
    write_config(tmp_path, base)
    with pytest.raises(RewardError, match=r"neither model.pth nor adapter_model.safetensors"):
        VideoAlignReward(model=tmp_path, **FULL)


def test_without_a_folder_the_published_repository_is_asked_for(monkeypatch):
    asked = []

    def offline(repository, **options):
        asked.append(repository)
        raise ConnectionError("no route to host\ntry again")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(RewardError, match=r"ConnectionError: no route to host .*give a local folder"):
        VideoAlignReward(clip_fps=16)
    assert asked == ["KwaiVGI/VideoReward"]
