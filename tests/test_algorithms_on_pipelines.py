"""Each algorithm end to end on the shipped miniature pipelines."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from dancegrpo import load_config, train
from dancegrpo.rewards import Scores

NAMES = ("grpo", "ddpo", "dpok", "refl", "dpo", "nft")
LORA = {"grpo": "shapes-sd", "ddpo": "shapes-flux", "dpok": "shapes-sd", "refl": "shapes-flux", "dpo": "shapes-flux"}
LORA |= {"nft": "shapes-sd"}
"""Each algorithm trains adapters on one of the two, all weights on the other."""


class Redness:
    """How much redder than the other colours a picture is on average; gradients flow."""

    name, differentiable, batch_size = "red", True, None

    def __call__(self, media, prompts):
        red, green, blue = media.mean((1, 3, 4)).unbind(1)
        values = red - (green + blue) / 2
        return Scores(values, torch.ones_like(values, dtype=torch.bool))

    def to(self, device):
        return self


@pytest.mark.parametrize("recipe", ["shapes-flux", "shapes-sd"])
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_to_a_report(recipe, name, tmp_path):
    overrides = [
        f"algorithm.name={name}",
        "iterations=1",
        "threads=1",
        "prompts={per_iteration: 2, cache_mb: 0}",
        "rollout={group_size: 4, num_steps: 5}",
        "evaluation={num_prompts: 0, samples: 2}",
        "optimizer.learning_rate=1e-3",
        "checkpoint.every=0",
        "tracking.backend=none",
        f"output={tmp_path}",
    ]
    overrides += ["model.lora={rank: 2, alpha: 2}"] if LORA[name] == recipe else []
    result = train(load_config(recipe, overrides), rewards={"red": Redness()})
    (row,) = (json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines())
    assert all(math.isfinite(value) for value in row.values() if value is not None)
    assert row["train/updates"] == 1
    assert row["train/grad_norm"] > 0
    assert row["train/weight_change"] > 0
    assert row["reward/red/masked"] == 0
    assert row["reward/red/std"] > 0
    weights = load_file(result.run_dir / "checkpoints" / "000001" / "weights.safetensors")
    assert all("lora" in key for key in weights) == (LORA[name] == recipe)
    assert "<html" in result.report.read_text()
