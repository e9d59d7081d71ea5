"""Stable Diffusion 3 against diffusers' own pipeline: its schedule, three text encoders, two-branch guidance."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from dancegrpo.config import load_config
from dancegrpo.errors import ConfigError, ModelError
from dancegrpo.policies import ModelCard
from dancegrpo.settings import LoraConfig, RolloutConfig
from test_policies import LORA, STEPS, noise, pipeline_of, policy_of, prompts
from test_replay import differences
from tiny import PROMPTS, TINY_SIZE
from tiny_pictures import (
    build_sd3,
    by_diffusers,
    exported,
    one_by_one,
    refused,
    rolled_out,
    sampled,
    without_gradient,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

TOKENS = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sd3(tmp_path_factory.mktemp("models") / "tiny-sd3")


# --- Equal to the pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "guidance", "negative"),
    [("static", 1.0, ""), ("static", 4.5, ""), ("static", 4.5, "blurry"), ("dynamic", 4.5, ""), ("no T5", 4.5, "dark")],
)
def test_latents_and_pictures_equal_the_pipelines_bit_for_bit(
    path: Path, tmp_path: Path, kind: str, guidance: float, negative: str
) -> None:
    if kind != "static":
        path = build_sd3(tmp_path / "m", t5=kind == "dynamic", dynamic_shift=kind == "dynamic")
    policy = policy_of(path, guidance_scale=guidance, max_sequence_length=TOKENS)
    start = noise(policy, 3)
    ours = sampled(policy, policy.encode(prompts(PROMPTS[0], negative=negative))[[0, 0, 0]], start)
    call = {"negative_prompt": negative, "guidance_scale": guidance, "max_sequence_length": TOKENS}
    call |= {"prompt": PROMPTS[0], "num_images_per_prompt": 3, "num_inference_steps": STEPS}
    theirs = by_diffusers(pipeline_of(path) if kind != "no T5" else _pipeline_without_t5(path), start, **call)
    assert all(torch.equal(ours[kind], theirs[kind]) for kind in ("latent", "pt"))


def _pipeline_without_t5(path: Path) -> StableDiffusion3Pipeline:
    """diffusers alone must be told of the missing part; its weights are copied as in `pipeline_of`."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    return pipeline


def test_several_prompts_equal_the_pipelines_own_batch(path: Path) -> None:
    """To rounding from the texts (the pipeline encodes them together), bit for bit from the same embeddings."""
    policy = policy_of(path, guidance_scale=4.5, max_sequence_length=TOKENS)
    start, pipeline = noise(policy, 3), pipeline_of(path)
    condition = policy.encode(prompts(*PROMPTS, negative="blurry"))
    ours = sampled(policy, condition, start)
    call = {"guidance_scale": 4.5, "num_inference_steps": STEPS, "max_sequence_length": TOKENS}
    from_texts = by_diffusers(pipeline, start, prompt=list(PROMPTS), negative_prompt=["blurry"] * 3, **call)
    names = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    names |= {f"negative_{ours}": f"negative_{theirs}" for ours, theirs in names.items()}
    embeds = {names[name]: tensor for name, tensor in condition.tensors.items()}
    from_embeds = by_diffusers(pipeline, start, **embeds, **call)
    for kind in ("latent", "pt"):
        torch.testing.assert_close(ours[kind], from_texts[kind], atol=1e-5, rtol=1e-5)
        assert torch.equal(ours[kind], from_embeds[kind])


def test_the_own_schedule_shifts_its_smallest_sigma_twice(path: Path) -> None:
    sigmas = policy_of(path, RolloutConfig(num_steps=4)).dynamics.sigmas
    torch.testing.assert_close(sigmas, torch.tensor([1, 0.858, 0.602, 0.009, 0]), atol=5e-4, rtol=0)


def test_the_cards_example_draws_what_a_run_with_a_shift_drew(path: Path, tmp_path: Path) -> None:
    """Executed as it stands, but for where the weights lie and what noise and kind of output it has."""
    shifted = RolloutConfig(num_steps=7, shift=2.5)
    policy = policy_of(path, shifted, guidance_scale=4.5, max_sequence_length=TOKENS)
    policy.export(tmp_path / "out", ModelCard("tiny/base", "my-recipe", 120, ("hps",)))
    example = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    call = next(node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call) and _name(node) == "pipe")
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)" in example
    from diffusers import FlowMatchEulerDiscreteScheduler

    start, pipeline = noise(policy, 1), pipeline_of(tmp_path / "out")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    ours = sampled(policy, policy.encode(prompts("a prompt")), start)
    assert torch.equal(by_diffusers(pipeline, start, **arguments)["pt"], ours["pt"])
    assert not torch.equal(by_diffusers(pipeline, start, **arguments | {"sigmas": None})["pt"], ours["pt"])


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


@pytest.mark.parametrize("shift", [None, 3.0])
def test_the_policys_own_pipeline_call_draws_the_same(path: Path, shift: float | None) -> None:
    rollout = RolloutConfig(num_steps=STEPS, shift=shift)
    policy = policy_of(path, rollout, guidance_scale=4.5, max_sequence_length=TOKENS)
    start, told = noise(policy, 1), prompts(PROMPTS[0], negative="blurry")
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
    policy = policy_of(path, guidance_scale=4.5, max_sequence_length=TOKENS)
    condition = policy.encode(prompts(*PROMPTS, negative="blurry"))
    torch.testing.assert_close(*one_by_one(policy, condition, [0, 0, 1, 1, 2, 2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_training_forward_replays_a_rollout(path: Path, guidance: float) -> None:
    rolled = rolled_out(path, {"guidance_scale": guidance, "max_sequence_length": TOKENS})
    assert differences(rolled, 8).max() == 0
    assert differences(rolled, 3).max() <= 1e-6
    assert differences(rolled, 8, shift=1).median() > 1e-3


def test_gradients_reach_every_weight_that_the_picture_depends_on(path: Path) -> None:
    """In the last block no token of the text asks for anything: Stable Diffusion 3 reads the picture's alone."""
    lost = without_gradient(policy_of(path, guidance_scale=3.0, max_sequence_length=TOKENS))
    asks = [
        f"transformer_blocks.1.attn.{name}" for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
    ]
    assert lost == set(asks)


def test_gradients_reach_every_adapter(path: Path) -> None:
    assert not without_gradient(policy_of(path, lora=LORA, guidance_scale=3.0, max_sequence_length=TOKENS))


@pytest.mark.parametrize("lora", [None, LORA])
def test_exports_make_the_same_pictures_in_diffusers(path: Path, tmp_path: Path, lora: LoraConfig | None) -> None:
    told = {"guidance_scale": 4.0, "max_sequence_length": TOKENS}
    policy = policy_of(path, RolloutConfig(num_steps=3), lora=lora, **told)
    ours = exported(policy, tmp_path / "out")
    call = {"prompt": PROMPTS[0], "num_inference_steps": 3, "num_images_per_prompt": 2} | told
    pipeline = pipeline_of(path)
    before = by_diffusers(pipeline, noise(policy, 2), **call)["pt"]
    if lora is None:
        pipeline = pipeline_of(tmp_path / "out")
    else:
        pipeline.load_lora_weights(tmp_path / "out")
    theirs = by_diffusers(pipeline, noise(policy, 2), **call)["pt"]
    torch.testing.assert_close(theirs, ours, atol=1e-6 if lora else 0, rtol=0)
    assert (before - ours).abs().max() > 1e-3


def test_the_card_of_an_export_without_t5_loads_it(tmp_path: Path) -> None:
    """diffusers does not take these parts to be optional."""
    from diffusers import DiffusionPipeline

    policy = policy_of(build_sd3(tmp_path / "m", t5=False), max_sequence_length=TOKENS)
    exported(policy, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("path/to/this/folder", text_encoder_3=None, tokenizer_3=None)' in card
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", text_encoder_3=None, tokenizer_3=None)
    assert loaded.tokenizer_3 is None


def test_condition_id_changes_with_the_settings(path: Path, tmp_path: Path) -> None:
    settings = ({}, {"guidance_scale": 1.0}, {"max_sequence_length": TOKENS}, {"dtype": "bfloat16"})
    ids = [policy_of(path, **model).condition_id for model in settings]
    ids.append(policy_of(build_sd3(tmp_path / "m", t5=False)).condition_id)
    assert len(set(ids)) == 5
    assert policy_of(path).condition_id == ids[0]


# --- What it cannot run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rollout", "message"),
    [
        ({"height": 18}, {}, "multiples of 4"),
        ({"width": 36}, {}, "model size 36x16 is over this pipeline's bound: use at most 32"),
        ({"max_sequence_length": 513}, {}, "max_sequence_length=513"),
        ({"true_cfg_scale": 4.0}, {}, "true_cfg_scale=4.0"),
        ({}, {"sde": "ddim"}, "rollout.sde=ddim"),
    ],
)
def test_settings_it_cannot_run(path: Path, model: dict, rollout: dict, message: str) -> None:
    assert message in refused(path, ConfigError, model, rollout)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"channels": 8}, "takes more than latents"),
        ({"pooled": 48}, "the pair of CLIP encoders of"),
        ({"joint_attention_dim": 24, "t5": False}, "gives 32 channels, its transformer reads 24"),
        ({"t5_width": 24}, "the third text encoder of"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, weights: dict, message: str) -> None:
    assert message in refused(build_sd3(tmp_path / "m", **weights), ModelError)


def test_the_recipe_says_that_it_is_ours() -> None:
    config = load_config("sd3-hps")
    assert config.description.startswith("Ours: ")
    assert (config.rollout.num_steps, config.rollout.shift, config.update.updates_per_rollout) == (16, 3.0, 1)
    assert TINY_SIZE < config.model.width == config.model.height
