"""Losses on the forward process train the conditional branch alone, in every family with classifier-free guidance."""

from __future__ import annotations

import pytest
import torch

from dancegrpo.policies import load_policy
from dancegrpo.prompts import Prompt
from dancegrpo.settings import ModelConfig, RolloutConfig
from tiny import TINY_SIZE, build_flux, build_sd
from tiny_hunyuan import SIZE, TEMPLATE, build_hunyuan
from tiny_pictures import build_qwen_image, build_sd3, build_sdxl
from tiny_wan import build_wan

CLIP = {"height": SIZE, "width": SIZE, "num_frames": 5, "max_sequence_length": 64}
PICTURE = {"height": TINY_SIZE, "width": TINY_SIZE}
GUIDED = {
    "sd": (build_sd, PICTURE, "guidance_scale"),
    "sdxl": (build_sdxl, PICTURE, "guidance_scale"),
    "sd3": (build_sd3, PICTURE, "guidance_scale"),
    "qwen": (build_qwen_image, PICTURE, "true_cfg_scale"),
    "wan": (build_wan, CLIP, "guidance_scale"),
    "hunyuan": (build_hunyuan, CLIP | {"prompt_template": TEMPLATE, "guidance_scale": 1.0}, "true_cfg_scale"),
}


@pytest.mark.parametrize("kind", GUIDED)
def test_it_is_the_prediction_without_guidance(tmp_path, kind):
    build, settings, scale = GUIDED[kind]
    folder = build(tmp_path / kind)
    model = ModelConfig(path=str(folder), device="cpu", **settings | {scale: 4.0})
    guided, plain = (load_policy(m, RolloutConfig(num_steps=3)) for m in (model, model.model_copy(update={scale: 1.0})))
    prompts = [Prompt(0, "a circle", "blurred"), Prompt(1, "two squares", "grey")]
    x_t = torch.randn(2, *guided.latent_shape, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([0, 1])
    assert (guided.guided, plain.guided) == (True, False)
    with torch.no_grad():
        told, own = guided.encode(prompts), plain.encode(prompts)
        expected = plain.predict(x_t, step, own)
        torch.testing.assert_close(guided.predict_unguided(x_t, step, told), expected, atol=1e-5, rtol=1e-5)
        assert (guided.predict(x_t, step, told) - expected).abs().max() > 1e-3
    assert guided.guided


def test_without_guidance_it_is_predict(tmp_path):
    policy = load_policy(ModelConfig(path=str(build_flux(tmp_path / "flux")), device="cpu", **PICTURE), RolloutConfig())
    x_t, step = torch.randn(1, *policy.latent_shape), torch.tensor([3])
    with torch.no_grad():
        told = policy.encode([Prompt(0, "a circle")])
        assert torch.equal(policy.predict_unguided(x_t, step, told), policy.predict(x_t, step, told))
