"""A tiny random Qwen2-VL in real layout: configuration, byte-level tokenizer with a chat template, weights."""

from __future__ import annotations

from pathlib import Path

import torch

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
PADS = ["<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(words=()):
    """Qwen2's tokenizer with a vocabulary of bytes, `words` (lower case, merged from the left) and special tokens."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    entries = letters + ["".join(pair) for pair in merges]
    built = Qwen2Tokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=merges, chat_template=CHAT)
    built.add_tokens([*SPECIAL, *PADS], special_tokens=True)
    return built


def config(tokens, vocabulary):
    """About 82 thousand parameters: two layers per tower, 32 channels, patches of 14 pixels."""
    from transformers import Qwen2VLConfig

    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": tokens.convert_tokens_to_ids("<|im_end|>"),
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    names = {"image_token_id": PADS[0], "video_token_id": PADS[1]}
    names |= {"vision_start_token_id": SPECIAL[3], "vision_end_token_id": SPECIAL[4]}
    ids = {key: tokens.convert_tokens_to_ids(name) for key, name in names.items()}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def build(folder: Path, *, words=(), spare_rows: int = 9, seed: int = 0):
    """A Qwen2VLForConditionalGeneration with random weights saved to `folder`, its vocabulary larger than in use."""
    from transformers import Qwen2VLForConditionalGeneration

    tokens = tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config(tokens, len(tokens) + spare_rows)).eval()
        for parameter in model.parameters():
            # Larger than the usual initialisation, so that scores differ by more than rounding.
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return model
