"""A frozen base in 8 bits: what is stored, what the products and gradients are, what a run learns on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.config import load_config
from dancegrpo.errors import ConfigError
from dancegrpo.policies import load_policy
from dancegrpo.policies.quantize import Int8Linear, quantize
from dancegrpo.prompts import Prompt
from dancegrpo.settings import LoraConfig, ModelConfig, RolloutConfig


def layer(seed: int = 0, *, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(12, 7, bias=bias).requires_grad_(False)


def model(path: Path, **options: Any) -> ModelConfig:
    size = {"height": 16, "width": 16, "max_sequence_length": 16, "device": "cpu"}
    return ModelConfig(path=str(path), lora=LoraConfig(rank=2, alpha=4), **size, **options)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_no_weight_is_off_by_more_than_half_a_step(seed: int, size: float) -> None:
    plain = layer(seed)
    plain.weight.mul_(size)
    stored = Int8Linear.of(plain)
    step = plain.weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((stored.widened(torch.float32) - plain.weight).abs() <= step * (0.5 + 1e-5)).all())


def test_a_row_of_zeros_stays_zero() -> None:
    plain = layer()
    plain.weight[3] = 0.0
    assert not Int8Linear.of(plain).widened(torch.float32)[3].any()


@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_widened_weight(bias: bool) -> None:
    stored = Int8Linear.of(layer(bias=bias))
    x = torch.randn(5, 3, 12, requires_grad=True)
    expected = torch.nn.functional.linear(x, stored.widened(torch.float32), stored.bias)
    out = stored(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    told, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(told, wanted, rtol=1e-6, atol=1e-6)


def test_a_weight_takes_a_byte_and_autograd_keeps_no_more() -> None:
    stored, kept = Int8Linear.of(layer()), []
    assert (stored.weight.nbytes, stored.scale.nbytes) == (12 * 7, 4 * 7)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
        stored(torch.randn(5, 12, requires_grad=True))
    assert sum(kept) == 12 * 7 + 4 * 7


def test_under_autocast_the_products_are_bfloat16() -> None:
    stored, x = Int8Linear.of(layer()), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert stored(x).dtype == torch.bfloat16


def test_layers_outside_the_blocks_stay_as_they_are() -> None:
    blocks = torch.nn.ModuleList([torch.nn.Sequential(layer(1), torch.nn.GELU()) for _ in range(2)])
    network = torch.nn.ModuleDict({"embed": layer(2), "blocks": blocks})
    assert quantize([network]) == 2
    assert type(network["embed"]) is torch.nn.Linear
    assert quantize([network]) == 0  # none is left


def test_adapters_learn_on_it_as_on_the_widened_base(tiny_flux_path: Path) -> None:
    rollout = RolloutConfig(num_steps=3)
    stored: Any = load_policy(model(tiny_flux_path, quantize="int8"), rollout, seed=1)
    widened: Any = load_policy(model(tiny_flux_path), rollout, seed=1)
    quantized = {n: part for n, part in stored.module.named_modules() if isinstance(part, Int8Linear)}
    assert len(quantized) > 10
    for name, part in quantized.items():
        widened.module.get_submodule(name).weight.data.copy_(part.widened(torch.float32))
    torch.manual_seed(0)
    x, step = torch.randn(2, *stored.latent_shape), torch.tensor([0, 1])
    condition = stored.encode([Prompt(0, "a red circle")])[[0, 0]]
    gradients = []
    for policy in (stored, widened):
        for name, weight in policy.trainable().items():
            if "lora_B" in name:
                weight.data.fill_(0.01)  # at their start of 0, the other half would have no gradient
        policy.predict(x, step, condition).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in policy.trainable().items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)


def test_encoders_are_stored_like_it_and_conditions_keep_apart(tiny_flux_path: Path) -> None:
    rollout = RolloutConfig(num_steps=3)
    stored: Any = load_policy(model(tiny_flux_path, quantize="int8"), rollout)
    plain: Any = load_policy(model(tiny_flux_path), rollout)
    assert any(isinstance(part, Int8Linear) for part in stored.pipeline.text_encoder_2.modules())
    assert not any(isinstance(part, Int8Linear) for part in stored.pipeline.vae.modules())
    assert stored.condition_id != plain.condition_id


def test_a_run_trains_the_adapters_alone(tiny_flux_path: Path, tmp_path: Path) -> None:
    from dancegrpo.rewards import FunctionReward
    from dancegrpo.trainer import Trainer

    settings = model(tiny_flux_path, quantize="int8").model_dump()
    small = ["rollout.group_size=2", "prompts.per_iteration=1", "evaluation.num_prompts=0", "prompts.cache_mb=0"]
    small += ["rollout.num_steps=3", "rollout.noise_level=0.5", "rollout.timesteps.fraction=0.5", f"output={tmp_path}"]
    config = load_config(load_config("shapes-flux").model_dump() | {"model": settings}, small)
    bright = FunctionReward(lambda images, prompts: images.flatten(1).mean(1))
    trainer: Any = Trainer(config, {"shapes": bright})
    base = {name: weight.clone() for name, weight in trainer.policy.module.state_dict().items()}
    metrics = trainer.iterate(0)
    assert (metrics["train/updates"], metrics["train/ratio_first"]) == (1, 1.0)
    moved = {n for n, weight in trainer.policy.module.state_dict().items() if not torch.equal(weight, base[n])}
    assert moved
    assert all(".lora_" in name for name in moved)


def test_all_weights_in_8_bits_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match=r"model\.quantize=int8 freezes the weights: set lora, or quantize to null"):
        load_config("shapes-flux", ["model.quantize=int8"])


def test_it_is_not_sharded() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.fsdp=2 shards no model\.quantize=int8: use one"):
        load_config("shapes-flux", ["model.quantize=int8", "model.lora={rank: 4}", "parallel.fsdp=2"])
