"""Policies against the diffusers pipelines they wrap, and what they promise about weights and conditions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dancegrpo.errors import ConfigError
from dancegrpo.policies import Condition, Policy, load_policy
from dancegrpo.policies.flow import FlowPolicy
from dancegrpo.prompts import Prompt
from dancegrpo.settings import LoraConfig, ModelConfig, RolloutConfig
from tiny import PROMPTS, TINY_SIZE, build_flux, build_sd

STEPS = 5
LORA = LoraConfig(rank=4, alpha=8, target_modules=("to_q", "to_k", "to_v", "to_out.0"))


def policy_of(path: Path, rollout: RolloutConfig | None = None, **model: object) -> Policy:
    config = ModelConfig(path=str(path), height=TINY_SIZE, width=TINY_SIZE, device="cpu", **model)
    return load_policy(config, rollout or RolloutConfig(num_steps=STEPS))


def pipeline_of(path: Path):
    """The pipeline as diffusers alone loads it, its weights copied: unaligned ones round differently."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    return pipeline


def use_ddim(pipeline):
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline


def noise(policy: Policy, batch: int, seed: int = 7) -> Tensor:
    return torch.randn(batch, *policy.latent_shape, generator=torch.Generator().manual_seed(seed))


def prompts(*texts: str, negative: str = "") -> list[Prompt]:
    return [Prompt(i, text, negative) for i, text in enumerate(texts)]


@torch.no_grad()
def deterministic(policy: Policy, condition: Condition, x: Tensor) -> Tensor:
    for i in range(policy.dynamics.num_steps):
        step = torch.full((len(x),), i)
        x = policy.dynamics.transition(x, policy.predict(x, step, condition), step, torch.zeros(len(x))).mean
    return x


@pytest.fixture(scope="module", params=["sd", "flux"])
def family(request, tiny_sd_path: Path, tiny_flux_path: Path) -> Path:
    return tiny_sd_path if request.param == "sd" else tiny_flux_path


# --- Equal to the pipeline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sd_latents_and_pictures_equal_the_pipelines_bit_for_bit(tiny_sd_path: Path, guidance: float) -> None:
    policy = policy_of(tiny_sd_path, guidance_scale=guidance)
    start = noise(policy, 3)
    condition = policy.encode(prompts(PROMPTS[0], negative="blurry"))
    ours = deterministic(policy, condition[[0, 0, 0]], start)
    call = {"negative_prompt": "blurry", "guidance_scale": guidance, "num_inference_steps": STEPS, "latents": start}
    pipeline = use_ddim(pipeline_of(tiny_sd_path))
    for kind, expected in (("latent", ours), ("pt", policy.decode(ours, condition)[:, 0].detach())):
        images = pipeline(
            PROMPTS[0], num_images_per_prompt=3, output_type=kind, height=TINY_SIZE, width=TINY_SIZE, **call
        ).images
        assert torch.equal(images, expected)


@pytest.mark.parametrize(
    ("guidance_embeds", "dynamic_shift", "shift"),
    [(True, True, None), (True, False, None), (False, True, None), (True, False, 3.0)],
)
def test_flux_latents_and_pictures_equal_the_pipelines_bit_for_bit(
    tmp_path: Path, guidance_embeds: bool, dynamic_shift: bool, shift: float | None
) -> None:
    """shift=3.0 in the run's settings is the schedule of a checkpoint whose own static shift is 3."""
    path = build_flux(tmp_path / "m", guidance_embeds=guidance_embeds, dynamic_shift=dynamic_shift)
    policy = policy_of(path, RolloutConfig(num_steps=STEPS, shift=shift), max_sequence_length=48)
    start = noise(policy, 3)
    condition = policy.encode(prompts(PROMPTS[0]))[[0, 0, 0]]
    ours = deterministic(policy, condition, start)
    call = {"guidance_scale": 3.5, "num_inference_steps": STEPS, "latents": start, "max_sequence_length": 48}
    pipeline = pipeline_of(path)
    for kind, expected in (("latent", ours), ("pt", policy.decode(ours, condition)[:, 0].detach())):
        images = pipeline(
            PROMPTS[0], num_images_per_prompt=3, output_type=kind, height=TINY_SIZE, width=TINY_SIZE, **call
        ).images
        assert torch.equal(images, expected)


@pytest.mark.parametrize("unit", [0.0, 0.001, 10.0])
def test_a_flow_family_with_another_unit_of_time_is_refused(unit: float) -> None:
    with pytest.raises(ValueError, match=rf"^Odd\.timestep_unit={unit} must be 1 or 1000\.$"):
        type("Odd", (FlowPolicy,), {"timestep_unit": unit})


def test_v_prediction_follows_the_pipeline(tmp_path: Path) -> None:
    path = build_sd(tmp_path / "m", prediction_type="v_prediction", scheduler="DDIMScheduler")
    policy = policy_of(path, guidance_scale=3.0)
    start = noise(policy, 2)
    ours = deterministic(policy, policy.encode(prompts(PROMPTS[0]))[[0, 0]], start)
    call = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "latents": start, "output_type": "latent"}
    expected = pipeline_of(path)(PROMPTS[0], num_images_per_prompt=2, height=TINY_SIZE, width=TINY_SIZE, **call).images
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_pictures_that_are_not_square_equal_the_pipelines(tiny_flux_path: Path) -> None:
    config = ModelConfig(path=str(tiny_flux_path), height=16, width=24, max_sequence_length=48, device="cpu")
    policy = load_policy(config, RolloutConfig(num_steps=3))
    start = noise(policy, 1)
    condition = policy.encode(prompts(PROMPTS[0]))
    ours = policy.decode(deterministic(policy, condition, start), condition).detach()
    call = {"height": 16, "width": 24, "num_inference_steps": 3, "latents": start, "output_type": "pt"}
    expected = pipeline_of(tiny_flux_path)(PROMPTS[0], max_sequence_length=48, **call).images
    assert ours.shape == (1, 1, 3, 16, 24)
    assert torch.equal(ours[:, 0], expected)


def test_half_precision_networks_give_float32_latents_near_full_precision(family: Path) -> None:
    full, half = policy_of(family), policy_of(family, dtype="bfloat16")
    start = noise(full, 2)
    expected = deterministic(full, full.encode(prompts(*PROMPTS[:2])), start)
    latents = deterministic(half, half.encode(prompts(*PROMPTS[:2])), start)
    assert latents.dtype == torch.float32
    assert half.decode(latents, half.encode(prompts(*PROMPTS[:2]))).dtype == torch.float32
    assert (latents - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_float16_decodes_in_float32(family: Path) -> None:
    assert policy_of(family, dtype="float16").pipeline.vae.dtype == torch.float32


# --- Conditions and batches -----------------------------------------------------------------------------------------


def test_groups_of_several_prompts_in_one_batch_equal_one_by_one(family: Path) -> None:
    policy = policy_of(family)
    condition = policy.encode(prompts(*PROMPTS))
    rows, step = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 3, 1, 4, 2, 0])
    x = noise(policy, 6)
    with torch.no_grad():
        together = policy.predict(x, step, condition[rows])
        alone = [policy.predict(x[i : i + 1], step[i : i + 1], condition[rows[i : i + 1]]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_prompts_condition_does_not_depend_on_the_others(family: Path) -> None:
    policy = policy_of(family)
    together = policy.encode(prompts(PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2]))
    assert len(together) == 4
    for row, text in enumerate((PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2])):
        alone = policy.encode(prompts(text))
        assert all(torch.equal(tensor[row], alone.tensors[name][0]) for name, tensor in together.tensors.items())


def test_two_loads_predict_the_same_to_the_last_bit(family: Path) -> None:
    first, second = policy_of(family), policy_of(family)
    x, step = noise(first, 2), torch.tensor([0, 1])
    with torch.no_grad():
        a = first.predict(x, step, first.encode(prompts(*PROMPTS[:2])))
        b = second.predict(x, step, second.encode(prompts(*PROMPTS[:2])))
    assert torch.equal(a, b)


def test_guidance_sends_gradient_through_both_branches(tiny_sd_path: Path) -> None:
    policy = policy_of(tiny_sd_path, guidance_scale=4.0)
    condition = policy.encode(prompts(PROMPTS[0], negative="blurry"))
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in condition.tensors.items()}
    policy.predict(noise(policy, 1), torch.tensor([1]), Condition(tensors)).square().mean().backward()
    assert len(tensors) == 2
    assert all(tensor.grad.abs().max() > 0 for tensor in tensors.values())


def test_condition_id_changes_with_the_settings_and_with_the_text_encoder(family: Path, tmp_path: Path) -> None:
    base = policy_of(family)
    build = build_sd if "sd" in family.name else build_flux
    other = policy_of(build(tmp_path / "m", seed=1))
    ids = {base.condition_id, policy_of(family, dtype="bfloat16").condition_id, other.condition_id}
    assert len(ids) == 3
    assert base.condition_id == policy_of(family).condition_id


# --- Weights --------------------------------------------------------------------------------------------------------


def loss_of(policy: Policy) -> Tensor:
    condition = policy.encode(prompts(*PROMPTS[:2]))
    return policy.predict(noise(policy, 2), torch.tensor([0, 2]), condition).square().mean()


def perturb(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradients_reach_every_trainable_weight(family: Path, lora: LoraConfig | None) -> None:
    policy = policy_of(family, lora=lora)
    perturb(policy)  # an adapter starts with B = 0, which hides A
    loss_of(policy).backward()
    weights = policy.trainable()
    assert weights
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in weights.values())


def test_full_fine_tuning_trains_the_denoiser_alone(family: Path) -> None:
    policy = policy_of(family, dtype="bfloat16")
    everything = [
        p for part in policy.pipeline.components.values() if hasattr(part, "parameters") for p in part.parameters()
    ]
    assert {id(p) for p in everything if p.requires_grad} == {id(p) for p in policy.trainable().values()}
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}


def test_lora_trains_float32_adapters_on_a_frozen_base(family: Path) -> None:
    policy = policy_of(family, lora=LORA, dtype="bfloat16")
    weights = policy.trainable()
    frozen = [p for name, p in policy.module.named_parameters() if name not in weights]
    assert {p.dtype for p in weights.values()} == {torch.float32}
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert not any(p.requires_grad for p in frozen)


def test_gradient_checkpointing_changes_no_bit_of_the_gradient(family: Path) -> None:
    plain, saving = policy_of(family), policy_of(family, gradient_checkpointing=True)
    for policy in (plain, saving):
        loss_of(policy).backward()
    ours = saving.trainable()
    assert all(torch.equal(weight.grad, ours[name].grad) for name, weight in plain.trainable().items())


@pytest.mark.parametrize("lora", [None, LORA])
def test_reference_is_the_policy_before_training(family: Path, lora: LoraConfig | None) -> None:
    policy = policy_of(family, lora=lora)
    policy.keep_reference()
    before = loss_of(policy).item()
    perturb(policy)
    trained = loss_of(policy)
    with torch.no_grad(), policy.reference():
        assert loss_of(policy).item() == before
    assert loss_of(policy).item() == trained.item() != before
    trained.backward()  # a reference pass between forward and backward leaves the gradient alone
    assert all(weight.grad.abs().max() > 0 for weight in policy.trainable().values())


def test_reference_of_full_fine_tuning_must_be_kept_first(tiny_sd_path: Path) -> None:
    with pytest.raises(RuntimeError, match="keep_reference"), policy_of(tiny_sd_path).reference():
        pass


@pytest.mark.parametrize("lora", [None, LORA])
def test_use_weights_lends_and_gives_back_the_very_tensors(family: Path, lora: LoraConfig | None) -> None:
    policy, donor = policy_of(family, lora=lora), policy_of(family, lora=lora)
    perturb(donor)
    own = {name: (parameter, parameter.data_ptr()) for name, parameter in policy.trainable().items()}
    before = loss_of(policy).item()
    with policy.use_weights({name: weight.detach() for name, weight in donor.trainable().items()}):
        assert loss_of(policy).item() == loss_of(donor).item() != before
    assert loss_of(policy).item() == before
    assert all(policy.trainable()[name] is p and p.data_ptr() == at for name, (p, at) in own.items())


def test_use_weights_refuses_weights_that_do_not_fit(tiny_sd_path: Path) -> None:
    policy = policy_of(tiny_sd_path)
    weights = dict(policy.trainable())
    weights["conv_in.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"conv_in\.bias"), policy.use_weights(weights):
        pass


def test_adapters_start_alike_for_a_seed_whatever_the_global_generator(tiny_sd_path: Path) -> None:
    config = ModelConfig(path=str(tiny_sd_path), height=TINY_SIZE, width=TINY_SIZE, lora=LORA, device="cpu")
    first, again, other = (
        next(iter(load_policy(config, RolloutConfig(), seed=seed).trainable().values())) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- Settings a family cannot run -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rollout", "message"),
    [
        ({"height": 17}, {}, "multiples of 2"),
        ({"max_sequence_length": 64}, {}, "max_sequence_length"),
        ({"device": "cuda:99"}, {}, "cuda:99"),
        ({"lora": {"target_modules": ["query"]}}, {}, "query"),
        ({}, {"shift": 3.0}, "rollout.shift=3.0"),
        ({}, {"sde": "cps"}, "rollout.sde=cps"),
    ],
)
def test_settings_stable_diffusion_cannot_run(tiny_sd_path: Path, model: dict, rollout: dict, message: str) -> None:
    assert_config_error(tiny_sd_path, model, rollout, message)


@pytest.mark.parametrize(
    ("model", "rollout", "message"),
    [
        ({"width": 18}, {}, "multiples of 4"),
        ({"max_sequence_length": 513}, {}, "513"),
        ({}, {"sde": "ddim"}, "rollout.sde=ddim"),
    ],
)
def test_settings_flux_cannot_run(tiny_flux_path: Path, model: dict, rollout: dict, message: str) -> None:
    assert_config_error(tiny_flux_path, model, rollout, message)


def assert_config_error(path: Path, model: dict, rollout: dict, message: str) -> None:
    config = ModelConfig(**{"path": str(path), "height": TINY_SIZE, "width": TINY_SIZE, "device": "cpu"} | model)
    with pytest.raises(ConfigError) as caught:
        load_policy(config, RolloutConfig(**rollout))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
