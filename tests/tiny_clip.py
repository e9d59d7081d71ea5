"""A tiny random CLIP in transformers' layout, with its tokenizer and preprocessing: a folder as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from dancegrpo.prompts import Prompt

SIDE = 28
TEXTS = ["a red cat", "a cat", "cat red red", "", "a red cat"]
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": SIDE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIDE,
}
"""preprocessor_config.json in the words of openai/clip-vit-large-patch14."""


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights large enough that pictures and texts score differently."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
            elif "norm" not in name and parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)


def clip_model(hidden_act: str = "quick_gelu"):
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3, "vocab_size": 12}
    text |= {"max_position_embeddings": 8, "bos_token_id": 10, "eos_token_id": 11}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": 14}
    common = {"num_hidden_layers": 2, "hidden_act": hidden_act, "projection_dim": 10}
    model = CLIPModel(CLIPConfig(projection_dim=10, text_config=text | common, vision_config=vision | common))
    randomize(model)
    return model.eval()


def save_tokenizer(folder: Path) -> Path:
    """CLIP's tokenizer with a vocabulary of 12: single letters, and `red` by its merges."""
    from transformers import CLIPTokenizer

    words = ["a</w>", "c", "a", "t</w>", "r", "e", "d</w>", "re", "red</w>", "?", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")]).save_pretrained(folder)
    return folder


def save_clip(folder: Path, **processor) -> Path:
    """The whole folder."""
    clip_model().save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | processor))
    return folder


def media(size: int = 5, frames: int = 1, height: int = 40, width: int = 33) -> torch.Tensor:
    return torch.rand(size, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def prompts(texts=TEXTS) -> list[Prompt]:
    return [Prompt(i, text) for i, text in enumerate(texts)]


def assert_batches_agree(judge, tolerance: float = 1e-5) -> None:
    """A batch scores as one at a time, in any order."""
    pictures, asked = media(), prompts()
    scores = judge(pictures, asked)
    single = torch.cat([judge(pictures[i : i + 1], asked[i : i + 1]).values for i in range(5)])
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = judge(pictures[order], [asked[i] for i in order]).values
    assert scores.values[scores.valid].std() > 1e-4
    torch.testing.assert_close(scores.values, single, atol=tolerance, rtol=0, equal_nan=True)
    torch.testing.assert_close(scores.values[order], shuffled, atol=tolerance, rtol=0, equal_nan=True)


def assert_bytes_and_floats_agree(judge) -> None:
    """uint8 k scores as k / 255."""
    pictures = (media() * 255).round().to(torch.uint8)
    of_bytes, of_floats = (judge(m, prompts()).values for m in (pictures, pictures.float() / 255))
    torch.testing.assert_close(of_bytes, of_floats, atol=0, rtol=0, equal_nan=True)


def assert_gradient_is_the_slope(judge) -> None:
    """The gradient agrees with a finite difference, and no weight gets one."""
    # Around grey: where bicubic overshoots are cut off, a finite difference would meet a corner.
    pictures, asked = (0.3 + 0.4 * media(size=2)).double().requires_grad_(), prompts(TEXTS[:2])
    judge(pictures, asked).values.sum().backward()
    # Along itself, where a wrong gradient is as wrong as anywhere and rounding matters least.
    steepest = pictures.grad.norm().item()
    assert steepest > 1e-3
    with torch.no_grad():
        steps = [pictures + h * pictures.grad / steepest for h in (0.05, -0.05)]
        ahead, behind = (judge(step, asked).values.sum().item() for step in steps)
    assert abs((ahead - behind) / 0.1 - steepest) < 0.02 * steepest
    assert all(parameter.grad is None for parameter in judge.model.parameters())
