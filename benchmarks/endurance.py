"""Whether a run survives what a week brings, in an hour: `python benchmarks/endurance.py --minutes 60`.

A small `shapes-flux` run with its judge behind `dancegrpo serve-reward` is disturbed at seeded random moments: the
trainer is killed (also inside a save), asked to stop, or finds its disk full; the judge's server is killed or stopped
for a while. Whatever ends the trainer, it is started again by the same command, `--resume auto`. Then the same number
of iterations is trained undisturbed, and metrics (all but timing and memory) and weights are compared bit for bit. A
full disk is a limit on the size of files (RLIMIT_FSIZE), which needs no rights.

Prints what happened and one line with the verdict; exits with 1 where anything differs or ended in an unexpected way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SETTINGS = [
    "prompts.per_iteration=2",
    "rollout.group_size=4",
    "rollout.batch_size=8",
    "update.micro_batch_size=8",
    "evaluation={num_prompts: 0, samples: 0}",
    "checkpoint={every: 4, keep: 2}",
    "tracking.backend=none",
    "threads=1",
    "rewards.shapes=null",
]
NEVER = 1_000_000
"""Iterations of a run that is to be stopped from outside."""
PATIENCE = 300.0
"""Longest time in seconds for anything that should happen by itself."""
KINDS = ("kill", "kill in a save", "stop request", "full disk", "judge killed", "judge stopped")
EXPECTED = (None, 0, 2, -signal.SIGKILL)
"""Exit codes of the trainer: it went on, stopped when asked, ended with one line, was killed."""


@dataclass
class Event:
    """One disturbance. rows: iterations written when the trainer ended; saved: those in its newest checkpoint."""

    second: float
    kind: str
    exit: int | None
    rows: int
    saved: int
    told: str

    @property
    def lost(self) -> int:
        """Iterations that had to be repeated."""
        return max(0, self.rows - self.saved) if self.exit is not None else 0


class Child:
    """A `dancegrpo` command in a process of its own; its words go to a file."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "dancegrpo", *arguments]
        with log.open("ab") as out:
            self._start = log.stat().st_size
            self.process = subprocess.Popen(command, stdout=out, stderr=out)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int) -> None:
        if self.alive:
            self.process.send_signal(number)

    def wait(self, seconds: float) -> int | None:
        """The exit code, None where it still runs after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def told(self) -> str:
        """The last line it wrote that is addressed to the user."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode(errors="replace").splitlines()
        named = [line for line in lines if line.startswith(("dancegrpo:", "Traceback"))]
        return named[-1] if named else ""


class Endurance:
    """A run, its judge's server, and what is done to them."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.random = work, random.Random(seed)
        work.mkdir(parents=True, exist_ok=True)
        self.run, self.events, self.began = work / "disturbed", [], time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = {"urls": [f"http://127.0.0.1:{self.port}"], "batch_size": 8, "timeout": 5, "retries": 3, "wait": 120}
        self.judge = "rewards.served=" + json.dumps({"judge": "service", "options": options})
        self.server, self.trainer = self.serve(), self.train(self.run, NEVER)

    def serve(self) -> Child:
        """The judge's server; each request is scored by itself, so that scores repeat to the last bit."""
        arguments = ["serve-reward", "shapes", "options.mode=exact", "--port", str(self.port)]
        return Child(self.work / "server.log", *arguments, "--no-batch-across-requests")

    def train(self, run: Path, iterations: int) -> Child:
        """The one command for a first start and every later one."""
        settings = [*SETTINGS, self.judge, f"iterations={iterations}"]
        return Child(
            self.work / f"{run.name}.log", "train", "shapes-flux", *settings, "--out", str(run), "--resume", "auto"
        )

    def disturb(self, minutes: float) -> None:
        """Event after event, each at a random moment, until the time is up and every kind was there."""
        deadline = time.monotonic() + 60 * minutes
        means = (self.kill, self.kill_in_save, self.stop_request, self.fill_disk, self.kill_judge, self.stop_judge)
        kinds: dict[str, Callable[[], None]] = dict(zip(KINDS, means, strict=True))
        order: list[str] = []
        while time.monotonic() < deadline:
            if not order:
                order = self.random.sample(list(kinds), len(kinds))
            kind = order.pop()
            if self.random.random() < 0.8:  # else while it still starts
                self.progress(self.random.randint(1, 8))
            time.sleep(self.random.uniform(0.0, 1.0))
            if not self.trainer.alive and self.events:  # what came before ended it only now
                self.settle(self.events[-1].kind)
            kinds[kind]()
            self.settle(kind)

    def progress(self, iterations: int) -> None:
        """Waits until the trainer has finished so many more, or ended by itself."""
        wanted, deadline = rows(self.run) + iterations, time.monotonic() + PATIENCE
        while rows(self.run) < wanted and self.trainer.alive and time.monotonic() < deadline:
            time.sleep(0.05)

    def settle(self, kind: str) -> None:
        """Notes how the event ended, and starts again whatever it ended."""
        if not self.server.alive:
            self.server = self.serve()
        code = self.trainer.process.poll()
        event = Event(time.monotonic() - self.began, kind, code, rows(self.run), saved(self.run), self.trainer.told())
        self.events.append(event)
        print(f"{event.second:7.0f} s  {kind:15}  exit {code}  lost {event.lost}  {event.told[:110]}", flush=True)
        if code is not None:
            self.trainer = self.train(self.run, NEVER)

    def kill(self) -> None:
        self.trainer.send(signal.SIGKILL)
        self.trainer.wait(PATIENCE)

    def kill_in_save(self) -> None:
        """Waits for a half-written checkpoint, and kills the trainer in the middle of it."""
        deadline, folder = time.monotonic() + 60, self.run / "checkpoints"
        while time.monotonic() < deadline and self.trainer.alive:
            if folder.is_dir() and any(path.name.startswith(".") for path in folder.iterdir()):
                time.sleep(self.random.uniform(0, 0.02))
                self.kill()
                return
            time.sleep(0.001)

    def stop_request(self) -> None:
        self.progress(1)  # before its first iteration a run has nothing to finish
        self.trainer.send(signal.SIGTERM)
        self.trainer.wait(PATIENCE)

    def fill_disk(self) -> None:
        """No file of the trainer may grow past a few bytes (metrics) or some kilobytes (weights), for a while."""
        self.progress(1)
        size, limit = self.random.choice([2048, 200_000]), resource.RLIMIT_FSIZE
        if self.trainer.alive:
            hard = resource.prlimit(self.trainer.process.pid, limit)[1]
            resource.prlimit(self.trainer.process.pid, limit, (size, hard))
            if self.trainer.wait(self.random.uniform(5, 30)) is None:
                resource.prlimit(self.trainer.process.pid, limit, (hard, hard))

    def kill_judge(self) -> None:
        self.server.send(signal.SIGKILL)
        self.server.wait(PATIENCE)
        self.trainer.wait(self.random.uniform(0, 15))
        self.server = self.serve()

    def stop_judge(self) -> None:
        self.server.send(signal.SIGSTOP)
        self.trainer.wait(self.random.uniform(0, 30))
        self.server.send(signal.SIGCONT)

    def finish(self) -> int:
        """Ends the disturbed run in peace; returns its iterations."""
        self.progress(2)
        if self.trainer.alive:
            self.trainer.send(signal.SIGTERM)
        if self.trainer.wait(PATIENCE) != 0:
            self.trainer = self.train(self.run, NEVER)
            self.progress(2)
            self.trainer.send(signal.SIGTERM)
            self.trainer.wait(PATIENCE)
        return saved(self.run)

    def close(self) -> None:
        for child in (self.trainer, self.server):
            child.send(signal.SIGCONT)
            child.send(signal.SIGKILL)
            child.wait(PATIENCE)


def rows(run: Path) -> int:
    """Iterations whose metrics are written."""
    return len(metrics(run))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines, without what depends on the machine's mood."""
    file, told = run / "metrics.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        told.append({key: value for key, value in row.items() if not key.startswith(("seconds/", "memory/"))})
    return told


def saved(run: Path) -> int:
    """Iterations in the newest checkpoint."""
    folder = run / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.is_dir() else 0


def differences(work: Path, left: Path, right: Path) -> list[str]:
    """Where two runs differ: metrics, weights and their moving average as exported."""
    import torch
    from safetensors.torch import load_file

    found = []
    a, b = metrics(left), metrics(right)
    if len(a) != len(b):
        found.append(f"{len(a)} against {len(b)} iterations")
    found += [f"metrics of iteration {x['iteration']}" for x, y in zip(a, b) if x != y][:5]
    for kind in ("--ema", "--no-ema"):
        weights = []
        for run in (left, right):
            target = work / f"export-{run.name}{kind}"
            if Child(work / "export.log", "export", str(run), "--out", str(target), kind).wait(PATIENCE) != 0:
                return [*found, f"{run} could not be exported ({work / 'export.log'})"]
            files = sorted(target.rglob("*.safetensors"))
            weights.append({f"{f.relative_to(target)}:{n}": t for f in files for n, t in load_file(f).items()})
        same = weights[0].keys() == weights[1].keys()
        if not same or not all(torch.equal(t, weights[1][name]) for name, t in weights[0].items()):
            found.append(f"weights ({kind})")
    return found


def summary(events: list[Event]) -> str:
    """Events by kind, what ended and what was lost."""
    lines = [f"{'event':15}  {'times':>5}  {'ended':>5}  {'lost':>4}  {'most':>4}"]
    for kind in KINDS:
        known = [event for event in events if event.kind == kind]
        ended, lost = sum(event.exit is not None for event in known), [event.lost for event in known]
        lines.append(f"{kind:15}  {len(known):5}  {ended:5}  {sum(lost):4}  {max(lost, default=0):4}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--work", type=Path, default=Path("endurance"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if (asked.work / "disturbed").exists():
        sys.exit(f"{asked.work} holds an earlier try: name another folder with --work")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    trial = Endurance(asked.work, asked.seed)
    try:
        trial.disturb(asked.minutes)
        iterations = trial.finish()
        print(f"\n{summary(trial.events)}\nnow {iterations} iterations undisturbed", flush=True)
        reference = trial.train(asked.work / "reference", iterations)
        code = reference.process.wait()
        found = [] if code == 0 else [f"the undisturbed run ended with {code}: {reference.told()}"]
        strange = [e for e in trial.events if e.exit not in EXPECTED or e.told.startswith("Traceback")]
        found += [f"{event.kind} ended with {event.exit}: {event.told}" for event in strange]
        found += differences(asked.work, trial.run, asked.work / "reference")
    finally:
        trial.close()
    told = {
        "seed": asked.seed,
        "iterations": iterations,
        "events": [asdict(e) | {"lost": e.lost} for e in trial.events],
    }
    (asked.work / "events.json").write_text(json.dumps(told | {"differences": found}, indent=1))
    repeated = sum(event.lost for event in trial.events)
    verdict = f"DIFFERENT: {'; '.join(found)}" if found else "equal to the undisturbed run, bit for bit"
    print(f"{len(trial.events)} events, {iterations} iterations, {repeated} repeated: {verdict}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
