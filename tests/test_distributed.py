"""The same run on one process and on two: what is drawn, judged, learnt and measured does not depend on ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo.distributed import World
from dancegrpo.errors import ConfigError
from tiny_hunyuan import SIZE, TEMPLATE, build_hunyuan
from tiny_wan import build_wan

COMMON = [
    "iterations=3",
    "prompts.per_iteration=3",
    "prompts.cache_mb=0",
    "rollout.group_size=4",
    "rollout.batch_size=4",
    "update.micro_batch_size=4",
    "update.updates_per_rollout=2",
    "threads=1",
    "evaluation.num_prompts=8",
    "rewards.shapes=null",
    "rewards.bright={judge: python:brightness}",
]
LAYOUTS = {"data": {}, "fsdp": {"fsdp": 2}}
CASES: dict[str, tuple[str, list[str]]] = {
    "flux": ("shapes-flux", []),
    "sd": ("shapes-sd", ["advantage.keep=2"]),
    "lora": ("shapes-flux", ["model.lora={rank: 4, alpha: 8}", "ema.decay=null", "algorithm.kl_weight=0.1"]),
    "ddpo": ("shapes-flux", ["algorithm.name=ddpo"]),
    "dpok": ("shapes-flux", ["algorithm.name=dpok"]),
    "dpo": ("shapes-flux", ["algorithm.name=dpo", "update.updates_per_rollout=1"]),
    "nft": ("shapes-flux", ["algorithm.name=nft"]),
    "each": ("shapes-flux", ["parallel.reduce=each"]),
}


def launch(
    folder: Path, layout: str, asked: dict[str, Any], *, processes: int = 2, worker: str = "distributed_worker.py"
) -> None:
    """Runs a worker of this folder on two processes of torchrun, or more; `one`: by itself."""
    file = folder / f"{layout}.json"
    file.write_text(json.dumps(asked))
    starter = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    program = str(Path(__file__).parent / worker)
    command = [sys.executable, *([] if layout == "one" else starter), program, str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict]]:
    """Layout -> case -> what came of it."""
    folder = tmp_path_factory.mktemp("ranks")
    hunyuan = [
        f"model.path={build_hunyuan(folder / 'hunyuan')}",
        f"model={{height: {SIZE}, width: {SIZE}, num_frames: 5, max_sequence_length: 64}}",
        f"model.prompt_template={json.dumps(TEMPLATE.model_dump())}",
        "rewards.motion_quality=null",
    ]
    wan = [  # two networks, of which a pair of ranks must ask the same at a time
        f"model.path={build_wan(folder / 'wan', networks=('transformer', 'transformer_2'), boundary_ratio=0.7)}",
        f"model={{height: {SIZE}, width: {SIZE}, num_frames: 5, max_sequence_length: 12, prompt_template: null}}",
        "rollout.num_steps=4",
        "rollout.timesteps={select: random, fraction: 0.34, steps: []}",
        "rewards.motion_quality=null",
    ]
    known = CASES | {"hunyuan": ("shapes-video", hunyuan), "wan": ("shapes-video", wan)}
    cases = [(name, recipe, [*COMMON, *more]) for name, (recipe, more) in known.items()]
    found: dict[str, dict[str, dict]] = {}
    for layout, parallel in {"one": {}, **LAYOUTS}.items():
        launch(folder, layout, {"parallel": parallel, "cases": cases})
        files = folder.glob(f"{layout}.*.pt")
        found[layout] = {file.name.split(".")[1]: torch.load(file, weights_only=True) for file in files}
    return found


NAMES = [*CASES, "hunyuan", "wan"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_first_iteration_is_the_same(results, name: str, layout: str) -> None:
    """Prompts, noise, rewards, advantages: exactly; what is learnt of them, to rounding."""
    one, two = (results[at][name]["metrics"][0] for at in ("one", layout))
    assert one.keys() == two.keys()
    exact = [key for key in one if key.startswith(("reward/", "advantage/", "groups/", "samples/", "pairs/"))]
    assert {key: one[key] for key in exact} == {key: two[key] for key in exact}
    assert one["reward/bright/masked"] > 0
    for key in one.keys() - set(exact):
        assert two[key] == (None if one[key] is None else pytest.approx(one[key], abs=1e-6, rel=1e-4)), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_after_three_iterations_agree_within_a_thousandth_of_the_update(
    results, name: str, layout: str
) -> None:
    one, two = results["one"][name], results[layout][name]
    change = one["metrics"][-1]["train/weight_change"]
    norms = [sum(float(w.double().square().sum()) for w in told["weights"].values()) for told in (one, two)]
    gap = sum(float((w - two["weights"][n]).double().square().sum()) for n, w in one["weights"].items())
    assert gap**0.5 <= 1e-3 * change * norms[0] ** 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_held_out_scores_come_back_in_the_prompts_order(results, name: str, layout: str) -> None:
    one, two = results["one"][name]["columns"], results[layout][name]["columns"]
    for column, values in one.items():
        assert two[column] == [None if v is None else pytest.approx(v, abs=1e-3) for v in values]


def test_weights_that_stay_gathered_and_bfloat16_change_rounding_alone(tmp_path: Path) -> None:
    """Neither setting of resharding touches a result; in bfloat16 the masters stay float32."""
    short = [*COMMON, "iterations=1", "evaluation.num_prompts=0"]
    # So narrow that old log-probs are recomputed between the two updates, by passes without a gradient.
    recomputed = [*short, "update.micro_batch_size=3", "algorithm.clip_range=1e-6"]
    cases = [("kept", "shapes-flux", recomputed), ("half", "shapes-flux", [*short, "model.dtype=bfloat16"])]
    kept = {"fsdp": 2, "reshard_rollout": False, "reshard_update": False}
    found = {}
    for layout, parallel in {"one": {}, "fsdp": kept}.items():
        launch(tmp_path, layout, {"parallel": parallel, "cases": cases})
        found[layout] = {c: torch.load(tmp_path / f"{layout}.{c}.pt", weights_only=True) for c in ("kept", "half")}
    for case, most in (("kept", 1e-3), ("half", 0.2)):  # Adam moves by signs: those of the smallest gradients round
        one, two = (found[layout][case] for layout in ("one", "fsdp"))
        assert {weight.dtype for weight in two["weights"].values()} == {torch.float32}
        change = one["metrics"][-1]["train/weight_change"]
        norm = sum(float(weight.double().square().sum()) for weight in one["weights"].values())
        gap = sum(float((w - two["weights"][n]).double().square().sum()) for n, w in one["weights"].items())
        assert (gap / norm) ** 0.5 <= most * change


def test_shares_are_whole_batches_and_cover_every_row_once() -> None:
    for total, size, ranks in [(12, 4, 2), (13, 4, 3), (7, 2, 4), (5, 8, 1)]:
        worlds = [World(rank=rank, size=ranks) for rank in range(ranks)]
        rows = [row for world in worlds for row in world.rows(total, size).rows]
        assert rows == list(range(total))
        for rank, world in enumerate(worlds):
            assert (world.owners(total, size)[world.rows(total, size).slice] == rank).all()
            assert all(int(batch[0]) % size == 0 for batch in world.rows(total, size).batches())


def test_ranks_that_forward_together_go_through_equally_many_batches() -> None:
    shares = [World(rank=rank, size=3, fsdp=3).rows(13, 2) for rank in range(3)]
    assert len({len(list(share.batches())) + share.spare for share in shares}) == 1


def test_a_layout_that_does_not_divide_the_processes_is_refused(monkeypatch) -> None:
    from dancegrpo.distributed import started
    from dancegrpo.settings import ParallelConfig

    monkeypatch.setenv("WORLD_SIZE", "3")
    told = r"parallel.fsdp=2 does not divide the 3 processes"
    with pytest.raises(ConfigError, match=told), started(ParallelConfig(fsdp=2)):
        pass
