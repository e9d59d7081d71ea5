"""Tiny random Wan pipelines in diffusers' layout: 32x32 pixels, latents f8 in space and f4 in time."""

from __future__ import annotations

from pathlib import Path

import torch

from tiny import _t5_tokenizer

SIZE, CHANNELS, IMAGE_WIDTH = 32, 4, 16


def _text_encoder(tokenizer):
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config)


def _transformer(*, image_channels: int = 0, clip: bool = False, text_dim: int = 16):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS + image_channels,
        out_channels=CHANNELS,
        text_dim=text_dim,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        image_dim=IMAGE_WIDTH if clip else None,
        added_kv_proj_dim=24 if clip else None,
    )


def _vae():
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.3, 0.2, 0.1, -0.4],
        latents_std=[1.3, 0.8, 1.1, 2.1],
    )


def _clip_parts():
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return {"image_encoder": CLIPVisionModel(config), "image_processor": processor}


def build_wan(
    folder: Path,
    *,
    image: bool = False,
    clip: bool = False,
    networks: tuple[str, ...] = ("transformer",),
    boundary_ratio: float | None = None,
    expand_timesteps: bool = False,
    flow_shift: float = 3.0,
    text_dim: int = 16,
    seed: int = 0,
) -> Path:
    """A WanPipeline, or with `image` a WanImageToVideoPipeline, that ships UniPC as the published checkpoints do.

    clip: the network attends to a CLIP encoder's states of the picture (Wan 2.1). networks: those that it holds.
    expand_timesteps: as Wan 2.2 5B. text_dim: what the networks read, 16 being what the text encoder gives.
    """
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline

    tokenizer = _t5_tokenizer()
    channels = 4 + CHANNELS if image and not expand_timesteps else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {name: _transformer(image_channels=channels, clip=clip, text_dim=text_dim) for name in networks}
        parts |= {"vae": _vae(), "text_encoder": _text_encoder(tokenizer), **(_clip_parts() if clip else {})}
    pipeline = (WanImageToVideoPipeline if image else WanPipeline)(
        tokenizer=tokenizer,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
        **parts,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)
