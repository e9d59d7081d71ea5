"""Qwen-Image against diffusers' own pipeline: text of different length, norm-keeping guidance, its schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dancegrpo.config import load_config
from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies import Condition, load_policy
from dancegrpo.settings import LoraConfig, ModelConfig, RolloutConfig
from test_policies import LORA, STEPS, noise, pipeline_of, policy_of, prompts
from test_replay import differences
from tiny import PROMPTS
from tiny_pictures import (
    build_qwen_image,
    by_diffusers,
    exported,
    one_by_one,
    refused,
    rolled_out,
    sampled,
    without_gradient,
)

NEGATIVE = "blurry and dark"
GUIDED = {"true_cfg_scale": 4.0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen_image(tmp_path_factory.mktemp("models") / "tiny-qwen-image")


# --- Equal to the pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (4.0, ""), (4.0, NEGATIVE)])
def test_latents_and_pictures_equal_the_pipelines_bit_for_bit(path: Path, guidance: float, negative: str) -> None:
    policy = policy_of(path, true_cfg_scale=guidance)
    start = noise(policy, 3)
    # Encoded beside a longer prompt: what fills up the shorter one is not seen.
    condition = policy.encode(prompts(PROMPTS[0], PROMPTS[1], negative=negative))[[0, 0, 0]]
    assert not condition.tensors["encoder_hidden_states_mask"].all()
    call = {"negative_prompt": negative, "true_cfg_scale": guidance, "num_inference_steps": STEPS}
    theirs = by_diffusers(pipeline_of(path), start, prompt=PROMPTS[0], num_images_per_prompt=3, **call)
    ours = sampled(policy, condition, start)
    assert all(torch.equal(ours[kind], theirs[kind]) for kind in ("latent", "pt"))


def test_a_static_schedule_and_one_without_a_terminal_value_equal_the_pipelines(path: Path, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    for model, shift in ((build_qwen_image(tmp_path / "m", shift_terminal=None), None), (path, 3.0)):
        policy, pipeline = policy_of(model, RolloutConfig(num_steps=STEPS, shift=shift)), pipeline_of(model)
        if shift is not None:
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        start = noise(policy, 1)
        ours = sampled(policy, policy.encode(prompts(PROMPTS[0])), start)
        theirs = by_diffusers(pipeline, start, prompt=PROMPTS[0], num_inference_steps=STEPS)
        assert torch.equal(ours["latent"], theirs["latent"])


def test_the_own_schedule_ends_at_its_terminal_value(path: Path) -> None:
    torch.testing.assert_close(policy_of(path).dynamics.sigmas[-2:], torch.tensor([0.02, 0.0]))


def test_several_prompts_of_different_length_equal_the_pipelines_own_batch(path: Path) -> None:
    """To rounding from the texts (the pipeline encodes them together), bit for bit from the same embeddings."""
    policy = policy_of(path, **GUIDED)
    start, pipeline = noise(policy, 3), pipeline_of(path)
    told = prompts(*PROMPTS)
    negatives = ["", NEGATIVE, "dark"]
    told = [type(prompt)(prompt.id, prompt.text, negative) for prompt, negative in zip(told, negatives, strict=True)]
    condition = policy.encode(told)
    assert not condition.tensors["encoder_hidden_states_mask"].all(1)[[0, 2]].any()
    ours = sampled(policy, condition, start)
    call = {"num_inference_steps": STEPS, **GUIDED}
    from_texts = by_diffusers(pipeline, start, prompt=list(PROMPTS), negative_prompt=negatives, **call)
    names = {"encoder_hidden_states": "prompt_embeds", "encoder_hidden_states_mask": "prompt_embeds_mask"}
    names |= {f"negative_{ours}": f"negative_{theirs}" for ours, theirs in names.items()}
    embeds = {names[name]: tensor for name, tensor in condition.tensors.items()}
    from_embeds = by_diffusers(pipeline, start, **embeds, **call)
    for kind in ("latent", "pt"):
        torch.testing.assert_close(ours[kind], from_texts[kind], atol=1e-5, rtol=1e-5)
        assert torch.equal(ours[kind], from_embeds[kind])


def test_pictures_that_are_not_square_equal_the_pipelines(path: Path) -> None:
    policy = load_policy(ModelConfig(path=str(path), height=16, width=24, device="cpu"), RolloutConfig(num_steps=3))
    start = noise(policy, 1)
    ours = sampled(policy, policy.encode(prompts(PROMPTS[0])), start)["pt"]
    call = {"height": 16, "width": 24, "num_inference_steps": 3, "prompt": PROMPTS[0]}
    assert ours.shape == (1, 3, 16, 24)
    assert torch.equal(ours, by_diffusers(pipeline_of(path), start, **call)["pt"])


def test_guidance_keeps_the_norm_of_the_conditional_velocity(path: Path) -> None:
    policy = policy_of(path, **GUIDED)
    condition, x, step = policy.encode(prompts(*PROMPTS, negative=NEGATIVE)), noise(policy, 3), torch.tensor([0, 2, 4])
    alone = policy_of(path)
    with torch.no_grad():
        guided = policy.predict(x, step, condition)
        positive = alone.predict(x, step, alone.encode(prompts(*PROMPTS)))
    torch.testing.assert_close(guided.norm(dim=-1), positive.norm(dim=-1))
    assert (guided - positive).abs().max() > 1e-3


def test_the_policys_own_pipeline_call_draws_the_same(path: Path) -> None:
    policy = policy_of(path, RolloutConfig(num_steps=STEPS, shift=3.0), **GUIDED)
    start, told = noise(policy, 1), prompts(PROMPTS[0], negative=NEGATIVE)
    theirs = policy.run_pipeline(told, start, policy.pipeline_scheduler())
    assert torch.equal(sampled(policy, policy.encode(told), start)["pt"], theirs[:, 0])


def test_half_precision_networks_give_float32_latents_near_full_precision(path: Path) -> None:
    full, half = (policy_of(path, dtype=dtype, **GUIDED) for dtype in ("float32", "bfloat16"))
    start, told = noise(full, 2), prompts(*PROMPTS[:2])
    expected, found = (sampled(policy, policy.encode(told), start) for policy in (full, half))
    assert found["latent"].dtype == found["pt"].dtype == torch.float32
    assert (found["latent"] - expected["latent"]).square().mean().sqrt() < 0.05 * expected["latent"].std()


# --- Batches, replay, weights ---------------------------------------------------------------------------------------


def test_groups_of_prompts_of_different_length_in_one_batch_equal_one_by_one(path: Path) -> None:
    policy = policy_of(path, **GUIDED)
    condition = policy.encode(prompts(*PROMPTS, negative=NEGATIVE))
    torch.testing.assert_close(*one_by_one(policy, condition, [0, 0, 1, 1, 2, 2]), atol=1e-5, rtol=1e-5)


def test_what_fills_up_a_shorter_prompt_is_never_read(path: Path) -> None:
    policy = policy_of(path)
    condition, x, step = policy.encode(prompts(*PROMPTS)), noise(policy, 3), torch.tensor([0, 2, 4])
    text, mask = condition.tensors["encoder_hidden_states"], condition.tensors["encoder_hidden_states_mask"]
    filled = torch.where(mask[..., None], text, torch.tensor(9.0))
    with torch.no_grad():
        expected = policy.predict(x, step, condition)
        found = policy.predict(
            x, step, Condition({"encoder_hidden_states": filled, "encoder_hidden_states_mask": mask})
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("model", [{}, {"true_cfg_scale": 1.5}])
def test_the_training_forward_replays_a_rollout(path: Path, model: dict) -> None:
    rolled = rolled_out(path, model)
    assert differences(rolled, 8).max() == 0
    assert differences(rolled, 3).max() <= 1e-6
    assert differences(rolled, 8, shift=1).median() > 1e-3


def test_a_rollout_in_batches_of_mixed_lengths_is_replayed(path: Path) -> None:
    assert differences(rolled_out(path, {}, batch_size=5), 8).max() <= 1e-6


def test_gradients_reach_every_weight_that_the_picture_depends_on(path: Path) -> None:
    """The text's side of the last block ends nowhere: Qwen-Image reads the picture's tokens alone."""
    lost = without_gradient(policy_of(path, **GUIDED))
    ends = ("add_q_proj", "norm_added_q", "to_add_out", "txt_mlp", "txt_mod")
    assert lost
    assert all(name.startswith("transformer_blocks.1.") and any(end in name for end in ends) for name in lost)


def test_gradients_reach_every_adapter(path: Path) -> None:
    assert not without_gradient(policy_of(path, lora=LORA))


@pytest.mark.parametrize("lora", [None, LORA])
def test_exports_make_the_same_pictures_in_diffusers(path: Path, tmp_path: Path, lora: LoraConfig | None) -> None:
    policy = policy_of(path, RolloutConfig(num_steps=3), lora=lora, **GUIDED)
    ours = exported(policy, tmp_path / "out")
    call = {"prompt": PROMPTS[0], "negative_prompt": "", "num_inference_steps": 3, "num_images_per_prompt": 2, **GUIDED}
    pipeline = pipeline_of(path)
    before = by_diffusers(pipeline, noise(policy, 2), **call)["pt"]
    if lora is None:
        pipeline = pipeline_of(tmp_path / "out")
    else:
        pipeline.load_lora_weights(tmp_path / "out")
    theirs = by_diffusers(pipeline, noise(policy, 2), **call)["pt"]
    torch.testing.assert_close(theirs, ours, atol=1e-6 if lora else 0, rtol=0)
    assert (before - ours).abs().max() > 1e-3


def test_a_long_prompt_is_cut_as_the_pipeline_cuts_it(path: Path) -> None:
    policy = policy_of(path, max_sequence_length=20)
    condition, start = policy.encode(prompts(PROMPTS[1])), noise(policy, 1)
    assert condition.tensors["encoder_hidden_states"].shape[1] == 20
    call = {"prompt": PROMPTS[1], "max_sequence_length": 20, "num_inference_steps": STEPS}
    assert torch.equal(sampled(policy, condition, start)["pt"], by_diffusers(pipeline_of(path), start, **call)["pt"])


def test_condition_id_changes_with_the_settings(path: Path) -> None:
    settings = ({}, GUIDED, {"max_sequence_length": 20}, {"dtype": "bfloat16"})
    assert len({policy_of(path, **model).condition_id for model in settings}) == 4
    assert policy_of(path).condition_id == policy_of(path).condition_id


# --- What it cannot run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rollout", "message"),
    [
        ({"height": 18}, {}, "multiples of 4"),
        ({"max_sequence_length": 1025}, {}, "max_sequence_length=1025"),
        ({"num_frames": 5}, {}, "num_frames=5"),
        ({}, {"sde": "ddim"}, "rollout.sde=ddim"),
    ],
)
def test_settings_it_cannot_run(path: Path, model: dict, rollout: dict, message: str) -> None:
    assert message in refused(path, ConfigError, model, rollout)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"channels": 32}, "takes more than latents"),
        ({"guidance_embeds": True}, "distilled"),
        ({"joint_attention_dim": 48}, "the text encoder of"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, weights: dict, message: str) -> None:
    assert message in refused(build_qwen_image(tmp_path / "m", **weights), ModelError)


def test_the_recipe_has_the_published_numbers() -> None:
    c = load_config("qwen-image-hps")
    assert (c.model.path, c.model.height, c.model.width, c.model.true_cfg_scale) == ("Qwen/Qwen-Image", 720, 720, 1.0)
    assert (c.rollout.num_steps, c.rollout.shift, c.rollout.noise_level) == (20, 3.0, 0.3)
    assert (c.prompts.per_iteration, c.rollout.group_size, c.update.updates_per_rollout) == (8 * 2, 12, 2)
    assert (c.optimizer.learning_rate, c.optimizer.max_grad_norm) == (1e-5, 1.0)
    assert (c.rollout.timesteps.fraction, c.iterations, c.model.lora) == (0.6, 300, None)
