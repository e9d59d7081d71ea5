"""`Policy.latents`: media back to latents, against the autoencoder alone and diffusers' own preparation of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dancegrpo.errors import ConfigError
from dancegrpo.media import to_image
from dancegrpo.policies import Policy, load_policy
from dancegrpo.prompts import Prompt
from dancegrpo.settings import ModelConfig, RolloutConfig
from tiny import TINY_SIZE, build_flux, build_sd
from tiny_hunyuan import IMAGE_TEMPLATE, SIZE, TEMPLATE, build_hunyuan, build_hunyuan_i2v, build_skyreels
from tiny_pictures import build_qwen_image, build_sd3, build_sdxl
from tiny_wan import build_wan
from toy import ToyPolicy

PICTURES = {
    "sd": build_sd,
    "sdxl": build_sdxl,
    "flux": build_flux,
    "sd3": build_sd3,
    "qwen": build_qwen_image,
}
CLIPS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "wan": (build_wan, {}),
    "wan-i2v": (build_wan, {"image": True}),
    "wan-5b-i2v": (build_wan, {"image": True, "expand_timesteps": True}),
    "hunyuan": (build_hunyuan, {}),
    "hunyuan-replace": (build_hunyuan_i2v, {"kind": "token_replace"}),
    "hunyuan-concat": (build_hunyuan_i2v, {"kind": "latent_concat"}),
    "skyreels": (build_skyreels, {}),
}
KINDS = [*PICTURES, *CLIPS]
FIRST_GIVEN = ("wan-5b-i2v", "hunyuan-replace")
"""Their first latent frame is the prompt's image."""


def settings(kind: str) -> dict[str, Any]:
    if kind in PICTURES:
        rows = 2 if kind == "qwen" else 1
        return {"height": TINY_SIZE * 2, "width": TINY_SIZE * rows, "guidance_scale": 1.0}
    sizes = {"height": 2 * SIZE, "width": SIZE, "num_frames": 9, "guidance_scale": 1.0, "max_sequence_length": 64}
    if "hunyuan" in kind or kind == "skyreels":
        i2v = kind in ("hunyuan-replace", "hunyuan-concat")
        sizes["prompt_template"] = IMAGE_TEMPLATE if i2v else TEMPLATE
    return sizes


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Policy]:
    """A kind, and settings -> its policy, loaded once: for tests that change nothing of it."""
    root = tmp_path_factory.mktemp("latents")

    @cache
    def folder(kind: str) -> Path:
        build, options = (PICTURES[kind], {}) if kind in PICTURES else CLIPS[kind]
        return build(root / kind, **options)

    @cache
    def load(kind: str, **more: Any) -> Policy:
        model = ModelConfig(path=str(folder(kind)), device="cpu", **settings(kind) | more)
        return load_policy(model, RolloutConfig(num_steps=3))

    return load


def recorded(policy: Policy, count: int = 2) -> Tensor:
    """(count, F, 3, H, W): smooth pictures in motion, as 8 bits hold them."""
    frames, _, height, width = policy.media_shape
    noise = torch.rand(count, 3 * frames, 4, 4, generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")
    return ((smooth * 255).round() / 255).unflatten(1, (frames, 3))


def told(policy: Policy, media: Tensor) -> Any:
    """Conditions; where the model animates an image, that is each clip's first frame."""
    images = [to_image(clip[0]) if policy.takes_image else None for clip in media]
    return policy.encode([Prompt(i, "a circle", "", image) for i, image in enumerate(images)])


def autoencoded(policy: Policy, kind: str, media: Tensor) -> Tensor:
    """The autoencoder's mode, decoded, by diffusers alone."""
    vae, flat = policy.pipeline.vae, kind in PICTURES and kind != "qwen"
    pixels = (media[:, 0] if flat else media.transpose(1, 2)) * 2 - 1
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
        if kind in FIRST_GIVEN:
            mode = torch.cat([vae.encode(pixels[:, :, :1]).latent_dist.mode(), mode[:, :, 1:]], dim=2)
        out = (vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
    shown = out[:, None] if flat else out.transpose(1, 2)
    return shown[:, 4:] if kind == "hunyuan-concat" else shown


@pytest.mark.parametrize("kind", KINDS)
def test_latents_decode_to_what_the_autoencoder_makes_of_the_media(loaded, kind: str) -> None:
    policy = loaded(kind)
    media = recorded(policy)
    condition = told(policy, media)
    latents = policy.latents(media, condition)
    assert latents.shape == (2, *policy.latent_shape)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    with torch.no_grad():
        ours = policy.decode(latents, condition)
    # To scale and scale back rounds the last bits, which these random decoders multiply by about a hundred.
    torch.testing.assert_close(ours, autoencoded(policy, kind, media), atol=1e-5, rtol=0)


class NoNoise:
    """A scheduler that leaves what it is given."""

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Any) -> Tensor:
        return latents

    def scale_noise(self, latents: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        return latents


def by_diffusers(policy: Policy, monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A pipeline of diffusers that starts from media, on the policy's parts: it takes the mode, and adds no noise."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    leave = ("safety_checker", "feature_extractor", "image_encoder")
    parts = {key: part for key, part in policy.pipeline.components.items() if key not in leave}
    if name == "StableDiffusionImg2ImgPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = getattr(diffusers, name)(**parts)
    pipeline.scheduler = NoNoise()
    return pipeline


@pytest.mark.parametrize(
    ("kind", "name"),
    [("sd", "StableDiffusionImg2ImgPipeline"), ("sd3", "StableDiffusion3Img2ImgPipeline")],
)
def test_latents_of_pictures_are_those_that_diffusers_redraws_from(loaded, monkeypatch, kind: str, name: str) -> None:
    policy = loaded(kind)
    media = recorded(policy)
    pipeline = by_diffusers(policy, monkeypatch, name)
    with torch.no_grad():
        theirs = pipeline.prepare_latents(media[:, 0] * 2 - 1, None, 2, 1, torch.float32, "cpu")
    torch.testing.assert_close(policy.latents(media, None), theirs, atol=0, rtol=0)


def test_latents_of_sdxl_are_those_that_diffusers_redraws_from(loaded, monkeypatch) -> None:
    policy = loaded("sdxl")
    media = recorded(policy)
    pipeline = by_diffusers(policy, monkeypatch, "StableDiffusionXLImg2ImgPipeline")
    with torch.no_grad():
        theirs = pipeline.prepare_latents(media[:, 0] * 2 - 1, None, 2, 1, torch.float32, "cpu", add_noise=False)
    torch.testing.assert_close(policy.latents(media, None), theirs, atol=0, rtol=0)


def test_latents_of_flux_are_those_that_kontext_is_shown(loaded, monkeypatch) -> None:
    from diffusers import FluxKontextPipeline

    policy = loaded("flux")
    media, parts = recorded(policy), policy.pipeline.components
    pipeline = FluxKontextPipeline(**{name: part for name, part in parts.items() if part is not None})
    with torch.no_grad():
        size = (2, 4, policy.model.height, policy.model.width)
        theirs = pipeline.prepare_latents(media[:, 0] * 2 - 1, *size, torch.float32, "cpu", None)[1]
    torch.testing.assert_close(policy.latents(media, None), theirs, atol=0, rtol=0)


def test_latents_of_qwen_image_are_those_that_diffusers_redraws_from(loaded, monkeypatch) -> None:
    policy = loaded("qwen")
    media = recorded(policy)
    pipeline = by_diffusers(policy, monkeypatch, "QwenImageImg2ImgPipeline")
    pixels, channels = media.transpose(1, 2) * 2 - 1, policy.latent_shape[1] // 4
    size = (2, channels, policy.model.height, policy.model.width)
    with torch.no_grad():
        theirs = pipeline.prepare_latents(pixels, None, *size, torch.float32, "cpu", None)
    torch.testing.assert_close(policy.latents(media, None), theirs, atol=0, rtol=0)


def test_latents_of_wan_are_those_that_diffusers_refilms_from(loaded) -> None:
    from diffusers import WanVideoToVideoPipeline

    policy = loaded("wan")
    media = recorded(policy)
    parts = {name: getattr(policy.pipeline, name) for name in ("tokenizer", "text_encoder", "transformer", "vae")}
    pipeline = WanVideoToVideoPipeline(**parts, scheduler=policy.pipeline.scheduler)
    pipeline.scheduler = NoNoise()
    video, size = media.transpose(1, 2) * 2 - 1, (2, 4, policy.model.height, policy.model.width)
    with torch.no_grad():
        theirs = pipeline.prepare_latents(video, *size, torch.float32, "cpu")
    torch.testing.assert_close(policy.latents(media, None), theirs, atol=1e-6, rtol=0)


def test_an_offloaded_autoencoder_gives_the_same_latents(loaded, monkeypatch) -> None:
    from dancegrpo.policies import offload

    policy = loaded("flux", offload=True)
    assert policy.pipeline.vae.training is False
    lent: list[str] = []
    copy = offload._copy
    monkeypatch.setattr(offload, "_copy", lambda tensor, device: lent.append("copied") or copy(tensor, device))
    media = recorded(policy)
    assert torch.equal(policy.latents(media, None), loaded("flux").latents(media, None))
    assert len(lent) == len(list(policy.pipeline.vae.parameters())) + len(list(policy.pipeline.vae.buffers()))


def test_media_of_another_size_are_refused(loaded) -> None:
    policy = loaded("flux")
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 8, 8\) are not \(B, 1, 3, 32, 16\)"):
        policy.latents(torch.zeros(1, 1, 3, 8, 8), None)


def test_a_policy_without_a_way_back_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"^ToyPolicy turns no pictures into latents .*algorithm\.dpo\.source=online$"
    ):
        _ = ToyPolicy().media_shape
    with pytest.raises(ConfigError, match="ToyPolicy turns no pictures into latents"):
        ToyPolicy().latents(torch.zeros(1, 1, 3, 2, 2), None)


def test_a_pipeline_of_ones_own_without_a_way_back_says_so(loaded, monkeypatch) -> None:
    policy = loaded("flux")
    monkeypatch.delattr(type(policy), "latents")
    with pytest.raises(ConfigError, match="FluxPolicy turns no pictures into latents"):
        _ = policy.media_shape
