"""Tiny HunyuanVideo pipelines, saved in diffusers' own layout: clips of SIZE pixels square, 8x smaller in latents."""

from __future__ import annotations

from pathlib import Path

import torch

from dancegrpo.settings import PromptTemplate
from tiny import _clip_encoder, _clip_tokenizer

SIZE = 32
CHANNELS = 4
"""Of the autoencoder's latents."""
TEXT_TOKENS = 64
TEMPLATE = PromptTemplate(template="Describe: {}<|eot_id|>", crop_start=11)
"""Of the pipelines that read text alone; a token is a character, and one begins the sequence."""
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_IMAGE_TEMPLATE = (
    _HEADER.format("s") + "<image>\nd:<|eot_id|>\n\n" + _HEADER.format("u") + "{}<|eot_id|>" + _HEADER.format("a")
)
IMAGE_TEMPLATE = PromptTemplate(
    template=_IMAGE_TEMPLATE, crop_start=18, image_emb_start=6, image_emb_end=10, image_emb_len=4
)
"""Of HunyuanVideo's image-to-video: bos, header (5 tokens), then the image, which becomes 4 tokens."""


def _llama_tokenizer():
    """Characters and Llama 3's marks; begins every text with a token of its own and pads on the right."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<unk>", "<bos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
    words = marks + ["\n"] + [chr(code) for code in range(32, 127)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backend.add_special_tokens(marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", padding_side="right"
    )


def _llama_config(tokenizer, hidden_size: int):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
    )


def _llava(tokenizer):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_llama_config(tokenizer, 16),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaForConditionalGeneration(config)


def _video_vae():
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )


def _transformer(in_channels: int, guidance_embeds: bool, image_condition_type: str | None):
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=guidance_embeds,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=image_condition_type,
    )


def _save(name: str, folder: Path, *, in_channels: int, guidance_embeds: bool, kind: str | None = None, text: int = 16):
    import diffusers
    from transformers import LlamaModel

    clip, llama, parts = _clip_tokenizer(), _llama_tokenizer(), {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "HunyuanVideoImageToVideoPipeline":
            from transformers import CLIPImageProcessor

            parts["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
            parts["text_encoder"] = _llava(llama)
        else:
            parts["text_encoder"] = LlamaModel(_llama_config(llama, text))
        pipeline = getattr(diffusers, name)(
            tokenizer=llama,
            text_encoder_2=_clip_encoder(clip),
            tokenizer_2=clip,
            transformer=_transformer(in_channels, guidance_embeds, kind),
            vae=_video_vae(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            **parts,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def build_hunyuan(
    folder: Path, *, guidance_embeds: bool = True, in_channels: int = CHANNELS, text_width: int = 16
) -> Path:
    """A HunyuanVideoPipeline with random weights, saved to `folder`; the transformer reads text of width 16."""
    return _save(
        "HunyuanVideoPipeline", folder, in_channels=in_channels, guidance_embeds=guidance_embeds, text=text_width
    )


def build_hunyuan_i2v(folder: Path, kind: str, *, guidance_embeds: bool = False) -> Path:
    """A HunyuanVideoImageToVideoPipeline of either `image_condition_type`, saved to `folder`."""
    channels = 2 * CHANNELS + 1 if kind == "latent_concat" else CHANNELS
    name = "HunyuanVideoImageToVideoPipeline"
    return _save(name, folder, in_channels=channels, guidance_embeds=guidance_embeds, kind=kind)


def build_skyreels(folder: Path, *, guidance_embeds: bool = True, in_channels: int = 2 * CHANNELS) -> Path:
    """A HunyuanSkyreelsImageToVideoPipeline, saved to `folder`."""
    name = "HunyuanSkyreelsImageToVideoPipeline"
    return _save(name, folder, in_channels=in_channels, guidance_embeds=guidance_embeds)
