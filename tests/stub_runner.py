"""Stands in for training in tests of studies: leaves a run folder with made-up numbers, in no time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from dancegrpo.config import dump_config
from dancegrpo.media import save_image
from dancegrpo.studies.plan import Job

Score = Callable[[Job, str], float | None]
"""A job's final held-out mean of a column."""


class StubRunner:
    """Writes what a run leaves. score: a column's mean at the end; at the start it is 0.25.

    fails: by a job's title, the line it ends with. cut: the jobs that are left unfinished, as if killed.
    """

    def __init__(self, score: Score, columns: tuple[str, ...] = ("shapes",)) -> None:
        self.score, self.columns = score, columns
        self.titles: list[str] = []
        self.keys: list[str] = []
        self.fails: dict[str, str] = {}
        self.cut: set[str] = set()
        self.stopped = 0
        self._lock = threading.Lock()

    def __call__(self, job: Job, folder: Path, log: Path, threads: int) -> int:
        with self._lock:
            self.titles.append(job.title)
            self.keys.append(job.key)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("loading\n")
        if job.title in self.fails:
            log.write_text(f"loading\n{self.fails[job.title]}\n\n")
            return 2
        self._write(job, folder)
        return 0

    def stop(self) -> None:
        self.stopped += 1

    def _write(self, job: Job, folder: Path) -> None:
        (folder / "evaluations").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(job.config))
        status = "stopped" if job.title in self.cut else "finished"
        machine = {"device": "cpu", "cpu_threads": 1, "platform": "Linux"}
        versions = {"dancegrpo": "0.1.0", "torch": "2", "diffusers": "0"}
        info = {"status": status, "seconds": 4.0, "machine": machine, **versions}
        (folder / "run.json").write_text(json.dumps(info))
        judges = [name for name, reward in job.config.rewards.items() if reward.weight]
        rows = [self._metrics(job, judges, i) for i in range(job.config.iterations)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        every, last = job.config.evaluation.every, job.config.iterations
        for iteration in sorted({0, last, *(range(every, last, every) if every else ())}):
            record = self._evaluation(job, iteration)
            (folder / "evaluations" / f"{iteration:06}.json").write_text(json.dumps(record))
        if job.seed == 0:
            for iteration in (0, job.config.iterations):
                for number in range(3):
                    picture = torch.full((3, 16, 16), 0.3 * number)
                    save_image(picture, folder / "samples" / f"{iteration:06}" / f"{number}.png")
            prompts = [{"text": f"prompt {number}"} for number in range(3)]
            (folder / "samples" / "prompts.json").write_text(json.dumps(prompts))

    def _metrics(self, job: Job, judges: list[str], i: int) -> dict[str, float]:
        level = self.score(job, self.columns[0]) or 0.0
        rewards = {f"reward/{name}/mean": 0.25 + (level - 0.25) * (i + 1) / job.config.iterations for name in judges}
        per_iteration = job.config.prompts.per_iteration * job.config.rollout.group_size
        return {"iteration": i, **rewards, "samples/total": per_iteration, "memory/peak_mb": 500.0 + i}

    def _evaluation(self, job: Job, iteration: int) -> dict[str, object]:
        start = dict.fromkeys(self.columns, 0.25)
        means = start if iteration == 0 else {name: self.score(job, name) for name in self.columns}
        columns = {name: [None] * 4 if mean is None else [mean - 0.1, mean + 0.1] * 2 for name, mean in means.items()}
        return {"iteration": iteration, "columns": columns, "valid": {}, "tasks": [None] * 4}
