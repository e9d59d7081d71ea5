"""The two video base pipelines, untrained: miniature pipelines with HunyuanVideo's and SkyReels-I2V's parts.

Each fits in 6 MB: the transformer is stored in half precision and computes in float32. Heavy libraries load inside the
functions that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dancegrpo.shapes.base import TEXT_TOKENS, clip_text_model, clip_tokenizer
from dancegrpo.shapes.clips import all_clip_scenes, all_still_scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoPipeline
    from transformers import LlamaModel, PreTrainedTokenizerFast

LATENT_CHANNELS = 8
FLOW_SHIFT = 2.0
TEMPLATE = {"template": "{}", "crop_start": 0}
"""The miniature language model reads the bare prompt: what to pass as `prompt_template`."""
_TEXT_WIDTH = 64


def vocabulary() -> list[str]:
    """Every word of every caption of clips and stills, sorted."""
    scenes = (*all_clip_scenes(), *all_still_scenes())
    return sorted({word for scene in scenes for word in scene.caption.split()})


def llama_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in Llama 3's form, padded on the right: each word of a caption is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Merges along the prefixes of the words, each with the space before it: a known word always becomes one token.
    prefixes = sorted(
        {f"Ġ{word}"[:end] for word in words for end in range(2, len(word) + 2)}, key=lambda t: (len(t), t)
    )
    merges = [(prefix[:-1], prefix[-1]) for prefix in prefixes]
    tokens = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", *letters, *prefixes]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", vocab["<|begin_of_text|>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|pad|>",
        padding_side="right",
        model_max_length=TEXT_TOKENS,
    )


def llama_model(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    """Untrained, four causal layers; the pipeline reads the states before the last two."""
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=_TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2 * TEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def video_autoencoder() -> AutoencoderKLHunyuanVideo:
    """f4 in space, 4 in time, causal, 8 channels: (B, 3, 9, 32, 32) in [-1, 1] <-> (B, 8, 3, 8, 8)."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # more would leave each group so few channels that it forgets flat colours
        spatial_compression_ratio=4,
        mid_block_add_attention=False,
    )


def video_pipeline(vae: AutoencoderKLHunyuanVideo) -> HunyuanVideoPipeline:
    """shapes-video: 2x2 patches, 48 tokens for a clip of 9 frames, 16 for a still."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    words = vocabulary()
    tokenizer, tokenizer_2 = llama_tokenizer(words), clip_tokenizer(words)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=False,  # two-branch guidance alone: a guidance value would have to be distilled first
        text_embed_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        rope_axes_dim=(8, 8, 8),
    )
    return HunyuanVideoPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        text_encoder=llama_model(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip_text_model(tokenizer_2, positions=77),  # the pipelines pad CLIP's text to 77
        tokenizer_2=tokenizer_2,
    )


def image_to_video_from(base: HunyuanVideoPipeline) -> HunyuanSkyreelsImageToVideoPipeline:
    """shapes-i2v: all of shapes-video, with the first frame's latent in further channels that begin at weight 0."""
    from diffusers import HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoTransformer3DModel

    old = base.transformer
    transformer = HunyuanVideoTransformer3DModel.from_config({**old.config, "in_channels": 2 * LATENT_CHANNELS})
    weights, entry = old.state_dict(), "x_embedder.proj.weight"  # (width, channels, 1, 2, 2)
    weights[entry] = torch.cat([weights[entry], torch.zeros_like(weights[entry])], dim=1)
    transformer.load_state_dict(weights)
    return HunyuanSkyreelsImageToVideoPipeline(**(base.components | {"transformer": transformer}))
