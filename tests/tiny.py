"""Tiny random pipelines in real diffusers layout: a real folder for every test that needs a model, built in a second.

Pictures are TINY_SIZE pixels square; weights are random but the same in every process.
"""

from __future__ import annotations

from pathlib import Path

import torch

TINY_SIZE = 16
PROMPTS = ("a red circle", "two blue squares above a green triangle", "a photo")


def _clip_tokenizer():
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5_tokenizer():
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=pieces + [(chr(code), -3.0) for code in range(33, 127)], extra_ids=0)


def _clip_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _vae(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=TINY_SIZE,
        **options,
    )


def _sd_scheduler(name: str, prediction_type: str):
    import diffusers

    # Stable Diffusion 1.4's own values.
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    shared = noise | {"steps_offset": 1, "set_alpha_to_one": False, "prediction_type": prediction_type}
    if name == "PNDMScheduler":
        return diffusers.PNDMScheduler(skip_prk_steps=True, **shared)
    return diffusers.DDIMScheduler(clip_sample=False, **shared)


def build_sd(
    folder: Path, *, prediction_type: str = "epsilon", scheduler: str = "PNDMScheduler", seed: int = 0
) -> Path:
    """A StableDiffusionPipeline with random weights, saved to `folder`; its scheduler is the one SD 1.4 ships."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = _clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=TINY_SIZE // 2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
        )
        pipeline = StableDiffusionPipeline(
            vae=_vae(scaling_factor=0.18215),
            text_encoder=_clip_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=_sd_scheduler(scheduler, prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def build_flux(folder: Path, *, guidance_embeds: bool = True, dynamic_shift: bool = True, seed: int = 0) -> Path:
    """A FluxPipeline with random weights, saved to `folder`; dev's schedule by resolution, or a static shift of 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        text = T5Config(vocab_size=len(t5), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        shift = (
            {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15} if dynamic_shift else {"shift": 3.0}
        )
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**shift),
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=_clip_encoder(clip),
            tokenizer=clip,
            text_encoder_2=T5EncoderModel(text),
            tokenizer_2=t5,
            transformer=transformer,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)
