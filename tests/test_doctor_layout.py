"""`dancegrpo doctor` on several GPUs: what lies on one of them, what is sent, and what a layout must be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dancegrpo.config import load_config
from dancegrpo.distributed import World
from dancegrpo.doctor import Plan, diagnose
from dancegrpo.doctor.advice import advise, total
from dancegrpo.doctor.architectures import architecture
from dancegrpo.doctor.layout import Layout, gradient_bytes, layout_of, repeated_blocks, shard_bytes, sharded
from dancegrpo.doctor.predict import Predictor
from dancegrpo.doctor.scaling import others, summed
from dancegrpo.doctor.text import as_table
from dancegrpo.errors import ConfigError

TINY = [
    "prompts.per_iteration=2",
    "prompts.cache_mb=0",
    "rollout.group_size=4",
    "rollout.batch_size=2",
    "update.micro_batch_size=2",
    "evaluation.num_prompts=0",
]


@pytest.fixture(scope="module")
def flux() -> Predictor:
    return Predictor(architecture(load_config("shapes-flux").model), torch.device("cuda"))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10, 4))


class Network(torch.nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.nn.Linear(4, 3, bias=False)
        self.blocks = torch.nn.ModuleList([Block() for _ in range(5)])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 30), st.integers(1, 16))
def test_the_largest_share_is_that_of_the_ranks(samples: int, batch: int, gpus: int) -> None:
    shares = [World(rank=rank, size=gpus).rows(samples, batch) for rank in range(gpus)]
    largest = max(-(-len(share.rows) // batch) for share in shares) * batch
    assert Layout(gpus).samples(samples, batch) == min(samples, largest)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 8))
def test_a_shard_is_the_first_chunk(rows: int, columns: int, ranks: int) -> None:
    weight = torch.zeros(rows, columns)
    assert shard_bytes(weight, ranks) == weight.chunk(ranks)[0].nbytes


def test_sharded_blocks_are_gathered_two_at_a_time_and_the_rest_is_whole() -> None:
    told = sharded([Network()], 4)
    assert told.own == 5 * 3 * 4 * 4 + 1 * 4 * 4  # ceil(10 / 4) rows of a block, ceil(3 / 4) of the rest
    assert told.gathered == 2 * 10 * 4 * 4 + 3 * 4 * 4
    assert told.whole == (5 * 10 + 3) * 4 * 4


def test_weights_are_gathered_in_the_runs_dtype_and_kept_in_their_own() -> None:
    full, half = sharded([Network()], 4), sharded([Network()], 4, torch.bfloat16)
    assert (half.own, half.gathered, half.whole) == (full.own, full.gathered // 2, full.whole // 2)


def test_gradients_of_several_micro_batches_are_added_up_whole() -> None:
    network = Network()
    parameters, whole = list(network.parameters()), (5 * 10 + 3) * 4 * 4
    own = sharded([network], 4).own
    assert gradient_bytes(parameters, [network], 1, 3) == whole
    assert gradient_bytes(parameters, [network], 4, 3) == own + whole
    assert gradient_bytes(parameters, [network], 4, 1) == own + 2 * 10 * 4 * 4


def test_weights_and_their_state_are_divided_activations_are_not(flux: Predictor) -> None:
    config = load_config("shapes-flux", TINY)
    flux.gpus = 4
    copies = flux(config)
    shards = flux(load_config(config, ["parallel.fsdp=4"]))
    for name in ("transformer", "optimizer", "averages"):
        assert copies.resident[name] / 4 <= shards.resident[name] <= copies.resident[name] / 4 * 1.05
    assert shards.resident["text_encoder_2"] == copies.resident["text_encoder_2"]
    assert {n: w.made for n, w in shards.work.items()} == {n: w.made for n, w in copies.work.items()}
    assert shards.peak["update"] < copies.peak["update"]


def test_each_gpu_draws_and_learns_from_its_share(flux: Predictor) -> None:
    config = load_config("shapes-flux", TINY)
    flux.gpus = 1
    alone = flux(config)
    flux.gpus = 4
    told = flux(config)
    assert told.work["rollout"].times == alone.work["rollout"].times / 4
    assert told.work["update"].times == alone.work["update"].times / 4
    latents = 2 * 8 * 2 * (16 * 32) * 4  # before and after; samples; trained steps; elements; bytes
    last = 8 * (16 * 32) * 4
    assert alone.work["update"].held - told.work["update"].held == 0.75 * (latents + last)
    assert told.checkpoint_bytes == alone.checkpoint_bytes


def test_traffic_is_that_of_the_collectives(flux: Predictor) -> None:
    config = load_config("shapes-flux", [*TINY, "parallel.fsdp=4"])
    flux.gpus = 4
    told, layer = flux(config), load_config("shapes-flux").model
    weights = 4 * told.parameters["transformer"]
    forwards, micro_batches = 1 * 6, 2  # a batch of 2 samples in 6 steps; 2 samples x 2 steps, two at a time
    assert told.traffic["weights"] == pytest.approx(0.75 * weights * (forwards + 2 * micro_batches), rel=1e-6)
    assert told.traffic["gradients"] == pytest.approx(0.75 * weights, rel=1e-6)
    assert told.traffic["sequences"] == 0
    assert told.traffic["scores"] == 0.75 * 8 * (5 + 2 * 8)
    assert layer.lora is None


def test_gradients_summed_after_each_micro_batch_are_never_whole(flux: Predictor) -> None:
    config = load_config("shapes-flux", [*TINY, "parallel.fsdp=4"])
    flux.gpus = 4
    once, each = flux(config), flux(load_config(config, ["parallel.reduce=each"]))
    whole = 4 * once.parameters["transformer"]
    (_, policy), *_ = flux._policies.values()
    largest = max(sum(p.nbytes for p in block.parameters()) for block in repeated_blocks(policy.module))
    assert once.peak["update"] - each.peak["update"] == whole - 2 * largest  # two blocks at a time
    assert each.traffic["gradients"] == 2 * once.traffic["gradients"]


@pytest.mark.parametrize(("gpus", "fsdp", "times"), [(1, 1, 0.0), (8, 1, 1.75), (8, 8, 0.875), (16, 8, 1.0)])
def test_sums_of_gradients_are_rings(gpus: int, fsdp: int, times: float) -> None:
    # 16 over 8: 7/8 in the reduce-scatter; between two copies of an eighth, half of it twice.
    assert summed(gpus, fsdp) == pytest.approx(times)


def test_of_what_is_gathered_a_gpu_lacks_the_others_part() -> None:
    assert [others(n) for n in (1, 2, 4)] == [0.0, 0.5, 0.75]


def test_more_gpus_than_one_are_no_worse_for_the_advice(flux: Predictor) -> None:
    config = load_config("shapes-flux", [*TINY, "model.gradient_checkpointing=true", "rollout.store=host"])
    config = load_config(config, ["model.offload=true", "update.micro_batch_size=1"])
    flux.gpus = 4
    steps = advise(config, flux, total(flux(config)) - 1, rounds=1)
    assert [step.setting for step in steps] == ["parallel.fsdp=2"]


def test_one_gpu_is_predicted_and_all_are_paid() -> None:
    plan = Plan(memory=1, gpus=4, tflops=1, network=10, price_per_hour=3.6)
    found = diagnose("shapes-flux", [*TINY, "parallel.fsdp=2", "iterations=10"], plan)
    assert found.gpus == 4
    assert found.communication_seconds == pytest.approx(sum(found.traffic.values()) / 10e9)
    assert found.run_seconds is not None
    assert found.cost == pytest.approx(found.run_seconds / 1000 * 4)
    assert "into each of 4 GPUs in an iteration: weights" in as_table(found)


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (3, r"^--gpus 3 is no multiple of what parallel\.fsdp=2 needs: use 2$"),
        (8, r"^8 samples in batches of rollout\.batch_size=2 are too few for 8 ranks: lower it to 1"),
    ],
)
def test_layouts_that_cannot_be_are_one_line(gpus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout_of(load_config("shapes-flux", [*TINY, "parallel.fsdp=2"]), gpus)


def test_as_few_gpus_as_the_recipe_needs() -> None:
    assert layout_of(load_config("shapes-flux", [*TINY, "parallel.fsdp=4"])) == Layout(4, 4)
