"""Builds run folders as training leaves them, for tests of what reads such folders."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dancegrpo.background import BackgroundWriter
from dancegrpo.config import RunConfig
from dancegrpo.media import grid, save_image
from dancegrpo.samples import write_samples
from dancegrpo.settings import ModelConfig, PromptsConfig, RewardConfig, UpdateConfig

TASKS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
COLORS = {"red": (0.85, 0.15, 0.15), "green": (0.15, 0.65, 0.3), "blue": (0.15, 0.35, 0.85), "yellow": (0.95, 0.8, 0.2)}


@dataclass(frozen=True)
class FakeRun:
    """What kind of run to leave behind. evaluations and pictures: iterations done at each."""

    iterations: int = 120
    evaluations: tuple[int, ...] = (0, 40, 80, 120)
    pictures: tuple[int, ...] = (0, 40, 80, 120)
    status: str = "finished"
    name: str = "shapes-flux"
    prompt: str | None = None
    """Replaces the first prompt's text."""
    held_out: int = 600
    prompts_drawn: int = 12
    picture_size: int = 64
    frames: int = 1
    """More than 1: the samples are clips, in which what is drawn slides to the right."""
    gain: float = 0.2
    updates_per_rollout: int = 4
    masked: bool = False
    """The second judge fails on some samples, and on all of them in some iterations."""

    def write(self, root: Path) -> Path:
        """Write the folder under `root` and return it."""
        folder = root / f"{self.name}-seed0".replace("/", "_")
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config().model_dump(mode="json"), sort_keys=False))
        (folder / "run.json").write_text(json.dumps(self.info()))
        generator = np.random.default_rng(0)
        lines = [json.dumps(self.metrics(i, generator)) for i in range(self.iterations)]
        (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        for iteration in self.evaluations:
            target = folder / "evaluations" / f"{iteration:06}.json"
            target.parent.mkdir(exist_ok=True)
            target.write_text(json.dumps(self.evaluation(iteration)))
        self.write_pictures(folder / "samples")
        return folder

    def config(self) -> RunConfig:
        """The resolved configuration."""
        return RunConfig(
            name=self.name,
            description="A small flow model learns to draw what it is asked for.",
            iterations=max(120, self.iterations),
            model=ModelConfig(path="shapes-flux", height=64, width=64, num_frames=self.frames),
            prompts=PromptsConfig(train="shapes:train", evaluation="shapes:test", per_iteration=8),
            rewards={"shapes": RewardConfig(judge="shapes"), "hps": RewardConfig(judge="hps", weight=0.0)},
            update=UpdateConfig(updates_per_rollout=self.updates_per_rollout),
        )

    def info(self) -> dict[str, Any]:
        """run.json."""
        return {
            "started": "2025-03-01T09:30:12+00:00",
            "status": self.status,
            "dancegrpo": "0.1.0",
            "torch": "2.10.0",
            "diffusers": "0.36.0",
            "machine": {"cpu_threads": 2, "device": "cpu"},
            "seconds": 2.45 * self.iterations + 33,
            "derived": {"samples_per_iteration": 96, "pairs_per_update": 216, "micro_batches_per_update": 27},
        }

    def metrics(self, i: int, generator: np.random.Generator) -> dict[str, Any]:
        """One line of metrics.jsonl; on-policy runs have a ratio of exactly 1."""
        learnt = 1 - math.exp(-i / 50)
        noise = lambda scale: float(generator.normal(0, scale))  # noqa: E731
        masked = 7 if self.masked and i % 3 == 0 else 0
        dead = self.masked and i % 10 == 4
        off_policy = self.updates_per_rollout > 1
        deviation = abs(2e-4 + noise(4e-5)) if off_policy else 0.0
        shapes, hps = 0.55 + 0.2 * learnt + noise(0.02), 0.26 + 0.01 * learnt + noise(0.002)
        seconds = {
            name: value * (1 + abs(noise(0.05)))
            for name, value in (("encode", 0.02), ("rollout", 0.9), ("decode", 0.12), ("reward", 0.05), ("update", 1.3))
        }
        return {
            "iteration": i,
            "reward/shapes/mean": shapes,
            "reward/shapes/std": 0.24 - 0.05 * learnt,
            "reward/shapes/group_std": 0.19 - 0.05 * learnt + noise(0.005),
            "reward/shapes/normalized_mean": noise(1e-8),
            "reward/shapes/normalized_std": 0.93 - 0.1 * learnt + noise(0.02),
            "reward/shapes/masked": 0,
            "reward/shapes/pass": 0.4 + 0.2 * learnt + noise(0.03),
            "reward/hps/masked": 96 if dead else masked,
            "reward/hps/mean": None if dead else hps,
            "reward/hps/std": None if dead else 0.02,
            "reward/hps/group_std": None if dead else 0.015 + noise(0.001),
            "reward/hps/normalized_mean": None if dead else noise(1e-8),
            "reward/hps/normalized_std": None if dead else 0.97 + noise(0.01),
            "advantage/mean": noise(1e-8),
            "advantage/std": 0.93 + noise(0.02),
            "advantage/abs_max": 2.8 + noise(0.2),
            "groups/total": 8,
            "groups/zero_spread": int(generator.binomial(8, 0.1 + 0.15 * learnt)),
            "samples/total": 96,
            "samples/masked": 96 if dead else masked,
            "samples/selected": 96,
            "pairs/trained": 860,
            "pairs/skipped_zero_advantage": 9,
            "train/loss": noise(1e-5),
            "train/ratio_mean": 1.0 + (noise(1e-5) if off_policy else 0.0),
            "train/ratio_first": 1.0,
            "train/ratio_max_deviation": deviation,
            "train/clip_fraction": min(1.0, abs(0.3 + noise(0.05))) if off_policy else 0.0,
            "train/kl": None,
            "train/grad_norm": 0.4 + abs(noise(0.2)) + (1.5 if i == 37 else 0.0),
            "train/skipped_updates": 0,
            "train/learning_rate": 1e-4,
            "train/weight_change": 0.012 * math.sqrt(i + 1) / 11,
            "train/replay_difference": 2e-7 + abs(noise(1e-7)),
            **{f"seconds/{name}": value for name, value in seconds.items()},
            "seconds/total": sum(seconds.values()) + 0.04,
            "memory/peak_mb": 1410.0 if i else 1320.0,
        }

    def evaluation(self, iteration: int) -> dict[str, Any]:
        """evaluations/N.json: each prompt has a difficulty of its own, so rows pair up."""
        generator, n = np.random.default_rng(1), self.held_out
        ease, noise = generator.normal(size=n), generator.normal(size=n)
        tasks = [TASKS[i % 6] for i in range(n)]
        level = np.array([0.9, 0.0, -0.5, 0.3, -0.3, -0.8])[np.arange(n) % 6]
        learnt = (1 - math.exp(-iteration / 50)) / (1 - math.exp(-120 / 50))
        score = level + ease + 0.35 * noise - 0.3 + 2.9 * self.gain * learnt
        valid = generator.random(n) > 0.03 if self.masked else np.ones(n, bool)
        texts = [f"{task}: held-out prompt {i}" for i, task in enumerate(tasks)]
        hps = 0.26 + 0.01 * ease + 0.006 * learnt
        return {
            "iteration": iteration,
            "weights": "current",
            "seconds": 8.2,
            "prompt_ids": list(range(n)),
            "texts": [self.prompt or texts[0], *texts[1:]] if n else [],
            "tasks": tasks,
            "columns": {
                "shapes": (1 / (1 + np.exp(-score))).tolist(),
                "shapes/pass": (score > 0).astype(int).tolist(),
                "hps": [value if ok else None for value, ok in zip(hps.tolist(), valid.tolist(), strict=True)],
            },
            "valid": {"shapes": [True] * n, "hps": valid.tolist()},
        }

    def write_pictures(self, folder: Path) -> None:
        """samples/: drawings that get more saturated and rounder as training goes on."""
        names = list(COLORS)
        where = ("above", "left of")
        texts = [
            f"a {names[k % 4]} circle {where[k % 2]} a {names[(k + 1) % 4]} square" for k in range(self.prompts_drawn)
        ]
        texts[0] = self.prompt or texts[0]
        for iteration in self.pictures:
            drawn = [self.draw(k, iteration / 120) for k in range(self.prompts_drawn)]
            if self.frames > 1:
                clips = (torch.stack([p.roll(2 * f, dims=2) for f in range(self.frames)]) for p in drawn)
                with BackgroundWriter() as writer:
                    write_samples(clips, folder / f"{iteration:06}", fps=8, writer=writer)
                continue
            for k, picture in enumerate(drawn):
                save_image(picture, folder / f"{iteration:06}" / f"{k}.png")
            save_image(grid(drawn, columns=4), folder / f"{iteration:06}" / "grid.png")
        if self.pictures:
            prompts = [{"text": text, "task": TASKS[k % 6]} for k, text in enumerate(texts)]
            (folder / "prompts.json").write_text(json.dumps(prompts))

    def draw(self, k: int, learnt: float) -> torch.Tensor:
        """One drawing, (3, H, W) in [0, 1]."""
        size = self.picture_size
        generator = torch.Generator().manual_seed(k)
        y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
        names = list(COLORS)
        circle, square = (torch.tensor(COLORS[names[(k + j) % 4]])[:, None, None] for j in (0, 1))
        wobble = (1 - learnt) * 0.12 * torch.sin(7 * torch.atan2(y - 0.3, x - 0.3))
        picture = torch.full((3, size, size), 0.96) + 0.02 * torch.randn(3, size, size, generator=generator)
        picture = torch.where(((x - 0.3) ** 2 + (y - 0.3) ** 2).sqrt() < 0.2 + wobble, circle, picture)
        inside = ((x - 0.68).abs() < 0.18) & ((y - 0.68).abs() < 0.18) & (torch.tensor(learnt > 0.2) | (x + y < 1.4))
        return torch.where(inside, square, picture).clamp(0, 1)
