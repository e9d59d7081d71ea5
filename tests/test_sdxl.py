"""Stable Diffusion XL against diffusers' own pipeline: two text encoders, pooled embeddings, picture sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dancegrpo.config import load_config
from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies import load_policy
from dancegrpo.settings import LoraConfig, ModelConfig, RolloutConfig
from test_policies import LORA, STEPS, deterministic, noise, pipeline_of, policy_of, prompts, use_ddim
from test_replay import differences
from tiny import PROMPTS, TINY_SIZE
from tiny_pictures import (
    build_sdxl,
    by_diffusers,
    exported,
    one_by_one,
    refused,
    rolled_out,
    sampled,
    without_gradient,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


# --- Equal to the pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (5.0, None), (5.0, "blurry")])
def test_latents_and_pictures_equal_the_pipelines_bit_for_bit(
    path: Path, guidance: float, negative: str | None
) -> None:
    """Without a negative prompt both guide by zeros: `force_zeros_for_empty_prompt`."""
    policy = policy_of(path, guidance_scale=guidance)
    start = noise(policy, 3)
    ours = sampled(policy, policy.encode(prompts(PROMPTS[0], negative=negative or ""))[[0, 0, 0]], start)
    call = {"negative_prompt": negative, "guidance_scale": guidance, "num_inference_steps": STEPS}
    theirs = by_diffusers(use_ddim(pipeline_of(path)), start, prompt=PROMPTS[0], num_images_per_prompt=3, **call)
    assert all(torch.equal(ours[kind], theirs[kind]) for kind in ("latent", "pt"))


def test_an_empty_negative_prompt_is_encoded_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    path = build_sdxl(tmp_path / "m", force_zeros=False)
    policy = policy_of(path, guidance_scale=5.0)
    start = noise(policy, 2)
    condition = policy.encode(prompts(PROMPTS[0]))[[0, 0]]
    assert condition.tensors["negative_encoder_hidden_states"].abs().max() > 0
    call = {"guidance_scale": 5.0, "num_inference_steps": STEPS, "num_images_per_prompt": 2}
    theirs = by_diffusers(use_ddim(pipeline_of(path)), start, prompt=PROMPTS[0], **call)
    assert torch.equal(sampled(policy, condition, start)["pt"], theirs["pt"])


def test_several_prompts_equal_the_pipelines_own_batch(path: Path) -> None:
    """To rounding from the texts (the pipeline encodes them together), bit for bit from the same embeddings."""
    policy = policy_of(path, guidance_scale=5.0)
    start, pipeline = noise(policy, 3), use_ddim(pipeline_of(path))
    condition = policy.encode(prompts(*PROMPTS, negative="blurry"))
    ours = sampled(policy, condition, start)
    call = {"guidance_scale": 5.0, "num_inference_steps": STEPS}
    from_texts = by_diffusers(pipeline, start, prompt=list(PROMPTS), negative_prompt=["blurry"] * 3, **call)
    names = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
    names |= {f"negative_{ours}": f"negative_{theirs}" for ours, theirs in names.items()}
    embeds = {names[name]: tensor for name, tensor in condition.tensors.items()}
    from_embeds = by_diffusers(pipeline, start, **embeds, **call)
    for kind in ("latent", "pt"):
        torch.testing.assert_close(ours[kind], from_texts[kind], atol=1e-5, rtol=1e-5)
        assert torch.equal(ours[kind], from_embeds[kind])


def test_pictures_that_are_not_square_are_told_their_size(path: Path) -> None:
    config = ModelConfig(path=str(path), height=16, width=24, guidance_scale=5.0, device="cpu")
    policy = load_policy(config, RolloutConfig(num_steps=3))
    start = noise(policy, 1)
    ours = sampled(policy, policy.encode(prompts(PROMPTS[0])), start)["pt"]
    call = {"height": 16, "width": 24, "guidance_scale": 5.0, "num_inference_steps": 3}
    assert ours.shape == (1, 3, 16, 24)
    assert torch.equal(ours, by_diffusers(use_ddim(pipeline_of(path)), start, prompt=PROMPTS[0], **call)["pt"])


def test_v_prediction_follows_the_pipeline(tmp_path: Path) -> None:
    path = build_sdxl(tmp_path / "m", prediction_type="v_prediction")
    policy = policy_of(path, guidance_scale=3.0)
    start = noise(policy, 2)
    ours = deterministic(policy, policy.encode(prompts(PROMPTS[0]))[[0, 0]], start)
    call = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "num_images_per_prompt": 2}
    expected = by_diffusers(use_ddim(pipeline_of(path)), start, prompt=PROMPTS[0], **call)["latent"]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_policys_own_pipeline_call_draws_the_same(path: Path) -> None:
    policy = policy_of(path, guidance_scale=5.0)
    start, told = noise(policy, 1), prompts(PROMPTS[0])
    theirs = policy.run_pipeline(told, start, policy.pipeline_scheduler())
    assert torch.equal(sampled(policy, policy.encode(told), start)["pt"], theirs[:, 0])


def test_half_precision_networks_give_float32_latents_near_full_precision(path: Path) -> None:
    full, half = (policy_of(path, guidance_scale=3.0, dtype=dtype) for dtype in ("float32", "bfloat16"))
    start, told = noise(full, 2), prompts(*PROMPTS[:2])
    expected, found = (sampled(policy, policy.encode(told), start) for policy in (full, half))
    assert found["latent"].dtype == found["pt"].dtype == torch.float32
    assert (found["latent"] - expected["latent"]).square().mean().sqrt() < 0.05 * expected["latent"].std()


# --- Batches, replay, weights ---------------------------------------------------------------------------------------


def test_groups_of_several_prompts_in_one_batch_equal_one_by_one(path: Path) -> None:
    policy = policy_of(path, guidance_scale=5.0)
    condition = policy.encode(prompts(*PROMPTS, negative="blurry"))
    torch.testing.assert_close(*one_by_one(policy, condition, [0, 0, 1, 1, 2, 2]), atol=1e-5, rtol=1e-5)


def test_the_training_forward_replays_a_rollout(path: Path) -> None:
    rolled = rolled_out(path, {"guidance_scale": 1.5})
    assert differences(rolled, 8).max() == 0
    assert differences(rolled, 3).max() <= 1e-6
    assert differences(rolled, 8, shift=1).median() > 1e-3


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradients_reach_every_trainable_weight(path: Path, lora: LoraConfig | None) -> None:
    assert not without_gradient(policy_of(path, lora=lora, guidance_scale=3.0))


@pytest.mark.parametrize("lora", [None, LORA])
def test_exports_make_the_same_pictures_in_diffusers(path: Path, tmp_path: Path, lora: LoraConfig | None) -> None:
    policy = policy_of(path, RolloutConfig(num_steps=3), lora=lora, guidance_scale=4.0)
    ours = exported(policy, tmp_path / "out")
    call = {"prompt": PROMPTS[0], "guidance_scale": 4.0, "num_inference_steps": 3, "num_images_per_prompt": 2}
    pipeline = use_ddim(pipeline_of(path))
    before = by_diffusers(pipeline, noise(policy, 2), **call)["pt"]
    if lora is None:
        pipeline = use_ddim(pipeline_of(tmp_path / "out"))
    else:
        pipeline.load_lora_weights(tmp_path / "out")
    theirs = by_diffusers(pipeline, noise(policy, 2), **call)["pt"]
    torch.testing.assert_close(theirs, ours, atol=1e-6 if lora else 0, rtol=0)
    assert (before - ours).abs().max() > 1e-3


def test_the_conditions_of_another_rule_for_empty_negatives_are_others(path: Path, tmp_path: Path) -> None:
    other = shutil.copytree(path, tmp_path / "m")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    assert policy_of(other).condition_id != policy_of(path).condition_id == policy_of(path).condition_id


# --- What it cannot run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rollout", "message"),
    [
        ({"height": 17}, {}, "multiples of 2"),
        ({"max_sequence_length": 64}, {}, "max_sequence_length=64"),
        ({"true_cfg_scale": 4.0}, {}, "true_cfg_scale=4.0"),
        ({}, {"shift": 3.0}, "rollout.shift=3.0"),
        ({}, {"sde": "dance"}, "rollout.sde=dance"),
    ],
)
def test_settings_it_cannot_run(path: Path, model: dict, rollout: dict, message: str) -> None:
    assert message in refused(path, ConfigError, model, rollout)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cross_attention_dim": 48}, "the pair of text encoders of"),
        ({"size_numbers": 5}, "the pooled text encoder of"),
        ({"scheduler": "EDMEulerScheduler"}, "preconditioned"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, weights: dict, message: str) -> None:
    assert message in refused(build_sdxl(tmp_path / "m", **weights), ModelError)


def test_a_refiner_is_not_supported(path: Path, tmp_path: Path) -> None:
    refiner = shutil.copytree(path, tmp_path / "m")
    index = json.loads((refiner / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    (refiner / "model_index.json").write_text(json.dumps(index))
    assert "StableDiffusionXLImg2ImgPipeline" in refused(refiner, ModelError)


def test_the_recipe_says_that_it_is_ours() -> None:
    config = load_config("sdxl-hps")
    assert config.description.startswith("Ours: ")
    assert (config.model.height, config.rollout.sde, config.update.updates_per_rollout) == (1024, "ddim", 1)
    assert TINY_SIZE < config.model.width == config.model.height
