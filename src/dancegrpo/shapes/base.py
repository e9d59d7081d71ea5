"""The two base pipelines, untrained: miniature but real diffusers pipelines with FLUX.1-dev's and SD v1.4's parts.

Each fits in 8 MB. Heavy libraries load inside the functions that need them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from dancegrpo.shapes.scenes import all_scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

TEXT_TOKENS = 16
"""Tokens per caption, padding included; the longest caption has 13 with its special tokens."""
LATENT_CHANNELS = 8
FLOW_SHIFT = 1.5
FLUX_GUIDANCE = 3.5
"""The embedded guidance value to pass; training knows 1 to 4.5."""
_TEXT_WIDTH = 64


def vocabulary() -> list[str]:
    """Every word of every caption, sorted."""
    return sorted({word for scene in all_scenes() for word in scene.caption.split()})


# ----------------------------------------------------------------------------------------------------------- tokenizers


def clip_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's form that knows each word as one token and spells out any other text.

    Built by hand because the library's trainer is not deterministic across processes. All 256 bytes are in the
    vocabulary: CLIP's unknown token is its end token, so an unknown byte would cut a caption short.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges = byte_pair_merges(words)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)


def byte_pair_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Plain byte-pair encoding until every word is one token; ties break alphabetically."""
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in sorted(set(words))]
    merges = []
    while any(len(word) > 1 for word in pieces):
        pairs = Counter(pair for word in pieces for pair in pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(word):
        joined = tuple(word[i : i + 2]) == pair
        merged.append("".join(pair) if joined else word[i])
        i += 2 if joined else 1
    return merged


def t5_tokenizer(words: Iterable[str]) -> T5TokenizerFast:
    """A unigram vocabulary in T5's form: the words, and single characters for everything else."""
    from transformers import T5TokenizerFast

    characters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in sorted(set(words)))]
    pieces += [(piece, -10.0) for piece in ("▁", *characters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


# --------------------------------------------------------------------------------------------------------------- models


def clip_text_model(tokenizer: CLIPTokenizer, positions: int = TEXT_TOKENS) -> CLIPTextModel:
    """Untrained, two causal layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,  # the pooled output is read at this token
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Untrained, two layers, without dropout."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=_TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * _TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def autoencoder() -> AutoencoderKL:
    """f8 with 8 latent channels: (B, 3, 64, 64) in [-1, 1] <-> (B, 8, 8, 8). Shared by both pipelines."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # more would leave each group so few channels that it forgets flat colours
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """shapes-flux: 2x2-packed latents (16 image tokens), embedded guidance, CLIP and T5, static shift 1.5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    words = vocabulary()
    tokenizer, tokenizer_2 = clip_tokenizer(words), t5_tokenizer(words)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 8, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=clip_text_model(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def sd_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """shapes-sd: a cross-attention UNet on 8x8 latents that predicts the noise, with SD v1.4's schedule and DDIM."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(vocabulary())
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, by an old misnomer of diffusers
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip_text_model(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
