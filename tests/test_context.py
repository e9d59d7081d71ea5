"""Context parallelism: a sample computed by two processes together is the one that a process computes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo.distributed import World
from dancegrpo.errors import ConfigError
from dancegrpo.policies import load_policy
from dancegrpo.rewards import FunctionReward, Judges
from dancegrpo.settings import ModelConfig, RolloutConfig
from test_distributed import COMMON, launch
from tiny import build_flux
from tiny_hunyuan import IMAGE_TEMPLATE, TEMPLATE, build_hunyuan, build_hunyuan_i2v, build_skyreels
from tiny_pictures import build_qwen_image
from tiny_wan import build_wan

CLIP: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9}
# An odd number of text tokens: what is lacking is filled up.
TEXT = CLIP | {"max_sequence_length": 41, "prompt_template": TEMPLATE.model_dump()}
FLUX: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": 40}

# ------------------------------------------------------------------------------------------- forward and backward pass


def models(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings of a model by name: every family that can be split, and what goes through a denoiser beside it."""
    flux, wan = (build(folder / name) for name, build in (("flux", build_flux), ("wan", build_wan)))
    hunyuan, skyreels = build_hunyuan(folder / "hunyuan"), build_skyreels(folder / "skyreels")
    replaced, concatenated = (build_hunyuan_i2v(folder / kind, kind) for kind in ("token_replace", "latent_concat"))
    wan_i2v = build_wan(folder / "wan-i2v", image=True, expand_timesteps=True)
    qwen = build_qwen_image(folder / "qwen")
    i2v = TEXT | {"prompt_template": IMAGE_TEMPLATE.model_dump()}
    kinds = {
        "flux": (flux, FLUX),
        "flux-lora": (flux, FLUX | {"lora": {"rank": 4, "alpha": 8}, "gradient_checkpointing": True}),
        "flux-bf16": (flux, FLUX | {"dtype": "bfloat16"}),
        "hunyuan": (hunyuan, TEXT | {"gradient_checkpointing": True}),
        "hunyuan-bf16": (hunyuan, TEXT | {"dtype": "bfloat16"}),
        "hunyuan-replace": (replaced, i2v),
        "hunyuan-concat": (concatenated, i2v),
        "skyreels": (skyreels, TEXT | {"true_cfg_scale": 3.0}),
        "qwen": (qwen, {"height": 32, "width": 32, "true_cfg_scale": 3.0}),
        "qwen-bf16": (qwen, {"height": 32, "width": 32, "dtype": "bfloat16"}),
        "wan": (wan, CLIP | {"max_sequence_length": 41}),
        "wan-i2v": (wan_i2v, CLIP | {"max_sequence_length": 41}),
    }
    return {name: settings | {"path": str(path)} for name, (path, settings) in kinds.items()}


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> layout -> what differs between whole and split, relative to the largest value."""
    folder = tmp_path_factory.mktemp("passes")
    launch(folder, "passes", models(folder), worker="context_worker.py")
    return json.loads((folder / "passes.told.json").read_text())


NAMES = ["flux", "flux-lora", "hunyuan", "hunyuan-replace", "hunyuan-concat", "skyreels", "qwen", "wan", "wan-i2v"]


@pytest.mark.parametrize("layout", ["context", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_predictions_and_gradients_are_those_of_the_whole_network(passes, name: str, layout: str) -> None:
    """Prompts of different length in the batch; with weights whole and sharded."""
    found = passes[name][layout]
    assert found["prediction"] <= 1e-6
    assert found["gradient"] <= 1e-6


@pytest.mark.parametrize("layout", ["context", "both"])
@pytest.mark.parametrize("name", ["flux-bf16", "hunyuan-bf16", "qwen-bf16"])
def test_in_bfloat16_they_are_to_its_rounding(passes, name: str, layout: str) -> None:
    """Queries, keys and values reach the attention in different types, of which its backward pass wants one."""
    found = passes[name][layout]
    assert found["prediction"] <= 2e-2
    assert found["gradient"] <= 4e-2


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_has_a_part_of_the_gradient_alone(passes, name: str) -> None:
    """So the sequences were split, and sums over the ranks are due."""
    assert passes[name]["context"]["own"] > 1e-2


# ------------------------------------------------------------------------------------------------------------ whole run

LAYOUTS = {"context": {"context": 2}, "both": {"fsdp": 2, "context": 2}}


def runs(folder: Path) -> list[tuple[str, str, list[str]]]:
    """(name, recipe, overrides): batches of the rollout and of training mix prompts of different length."""
    mixed = [*COMMON, "rollout.batch_size=6"]
    clips = ["model={height: 32, width: 32, num_frames: 5, max_sequence_length: 63}"]
    clips += [f"model.prompt_template={json.dumps(TEMPLATE.model_dump())}"]
    hunyuan, skyreels = (
        f"model.path={build(folder / name)}"
        for name, build in (("hunyuan", build_hunyuan), ("skyreels", build_skyreels))
    )
    return [
        ("flux", "shapes-flux", [*mixed, "advantage.keep=2", "algorithm.kl_weight=0.1"]),
        ("lora", "shapes-flux", [*mixed, "model.lora={rank: 4, alpha: 8}", "ema.decay=null"]),
        ("dpok", "shapes-flux", [*mixed, "algorithm.name=dpok"]),
        ("hunyuan", "shapes-video", [*mixed, *clips, hunyuan, "rewards.motion_quality=null"]),
        ("skyreels", "shapes-i2v", [*mixed, *clips, skyreels, "rewards.identity=null", "model.true_cfg_scale=1.5"]),
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict]]:
    """Layout -> run -> what came of it."""
    folder = tmp_path_factory.mktemp("runs")
    cases, found = runs(folder), {}
    for layout, parallel in {"one": {}, **LAYOUTS}.items():
        launch(folder, layout, {"parallel": parallel, "cases": cases})
        files = {name: folder / f"{layout}.{name}.pt" for name, _, _ in cases}
        found[layout] = {name: torch.load(file, weights_only=True) for name, file in files.items()}
    return found


RUNS = ["flux", "lora", "dpok", "hunyuan", "skyreels"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RUNS)
def test_the_first_iteration_is_the_same(results, name: str, layout: str) -> None:
    """Rewards and advantages within 1e-5; which samples are masked and picked, exactly."""
    one, two = (results[at][name]["metrics"][0] for at in ("one", layout))
    assert one.keys() == two.keys()
    assert one["reward/bright/masked"] > 0
    for key, value in one.items():
        if key.startswith(("groups/", "samples/", "pairs/")) or key.endswith("/masked"):
            assert two[key] == value, key
        elif key.startswith(("reward/", "advantage/")):
            assert two[key] == (None if value is None else pytest.approx(value, abs=1e-5)), key
        else:
            assert two[key] == (None if value is None else pytest.approx(value, abs=1e-5, rel=1e-3)), key


def apart(one: dict, two: dict) -> float:
    """How far the weights of two runs are from each other, in units of how far the first's have moved."""
    change = one["metrics"][-1]["train/weight_change"]
    norm = sum(float(w.double().square().sum()) for w in one["weights"].values()) ** 0.5
    gap = sum(float((w - two["weights"][n]).double().square().sum()) for n, w in one["weights"].items()) ** 0.5
    return gap / (change * norm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RUNS)
def test_weights_after_three_iterations_agree_within_a_hundredth_of_the_update(results, name: str, layout: str) -> None:
    assert apart(results["one"][name], results[layout][name]) <= 0.01


@pytest.mark.slow
def test_four_processes_with_two_uneven_shares_agree_with_one(tmp_path: Path) -> None:
    """Three batches on two pairs of processes, weights sharded over all four: masks, picks and skipped groups never
    leave them with different numbers of passes."""
    chosen = [(name, recipe, [*more, "rollout.batch_size=4"]) for name, recipe, more in runs(tmp_path)[::3]]
    for layout, parallel in {"one": {}, "four": {"fsdp": 4, "context": 2}}.items():
        launch(tmp_path, layout, {"parallel": parallel, "cases": chosen}, processes=4)
    for name, _, _ in chosen:
        one, four = (torch.load(tmp_path / f"{at}.{name}.pt", weights_only=True) for at in ("one", "four"))
        assert apart(one, four) <= 0.01
        assert four["asked"] == one["asked"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RUNS)
def test_judges_are_asked_about_each_sample_once(results, name: str, layout: str) -> None:
    """Both processes draw it; a judge may cost money."""
    assert results[layout][name]["asked"] == results["one"][name]["asked"] > 0


# --------------------------------------------------------------------------------------------------------------- shares


def test_ranks_that_split_sequences_have_one_share_of_the_samples() -> None:
    worlds = [World(rank=rank, size=8, fsdp=8, context=2) for rank in range(8)]
    for first, second in zip(worlds[::2], worlds[1::2], strict=True):
        assert first.rows(13, 2) == second.rows(13, 2)
        assert (first.leads, second.leads) == (True, False)
    assert [row for world in worlds[::2] for row in world.rows(13, 2).rows] == list(range(13))
    for world in worlds:
        assert (world.owners(13, 2)[world.rows(13, 2).slice] == world.share).all()


def test_a_panel_that_asks_nobody_keeps_its_names_and_weights() -> None:
    def refuse(images: torch.Tensor, prompts: list[str]) -> list[float]:
        raise AssertionError

    panel = Judges({"a": FunctionReward(refuse), "b": FunctionReward(refuse)}, {"a": 1.0, "b": 0.0})
    silent = panel.unasked(but_trained=False)
    assert silent.weights == panel.weights
    told = silent.score(torch.zeros(1, 1, 3, 4, 4), [None])
    assert [scores.valid.tolist() for scores in told.values()] == [[True], [True]]
    assert panel.unasked(but_trained=True).rewards["a"] is panel.rewards["a"]


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(message: str, degree: int, path: Path, **model: Any) -> None:
    policy = load_policy(ModelConfig(path=str(path), **model), RolloutConfig(num_steps=4))
    with pytest.raises(ConfigError, match=message) as caught:
        policy.shard(World(rank=0, size=degree, context=degree))
    assert "\n" not in str(caught.value)


def test_a_family_whose_sequences_cannot_be_split_is_refused(tiny_sd_path: Path) -> None:
    told = (
        r"parallel.context=2: no sequences of StableDiffusionPipeline's UNet2DConditionModel can be split, set it to 1"
    )
    refused(told, 2, tiny_sd_path, height=16, width=16)


def test_heads_that_do_not_divide_are_refused(tiny_flux_path: Path) -> None:
    refused("parallel.context=4 does not divide the 2 attention heads .* use one of 2", 4, tiny_flux_path, **FLUX)


def test_a_size_that_does_not_divide_is_refused_with_one_that_does(tmp_path: Path, tiny_flux_path: Path) -> None:
    told = r"does not divide the 9 tokens of 12 x 12 pixels: use model.height=8"
    refused(told, 2, tiny_flux_path, height=12, width=12, max_sequence_length=40)
    told = r"does not divide the 27 tokens of 48 x 48 pixels and 9 frames: use model.height=32"
    refused(told, 2, build_wan(tmp_path / "wan"), height=48, width=48, num_frames=9)


def test_text_that_does_not_divide_is_refused_where_it_has_no_mask(tiny_flux_path: Path) -> None:
    told = "parallel.context=2 does not divide model.max_sequence_length=41: use 40"
    refused(told, 2, tiny_flux_path, **(FLUX | {"max_sequence_length": 41}))


def test_a_degree_that_does_not_divide_the_processes_is_refused(monkeypatch) -> None:
    from dancegrpo.distributed import started
    from dancegrpo.settings import ParallelConfig

    monkeypatch.setenv("WORLD_SIZE", "3")
    told = r"parallel.context=2 does not divide the 3 processes launched: start with torchrun --nproc-per-node=2"
    with pytest.raises(ConfigError, match=told), started(ParallelConfig(context=2)):
        pass
