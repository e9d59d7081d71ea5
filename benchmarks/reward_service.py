"""Whether a reward service loses or changes scores under load: `python benchmarks/reward_service.py --seconds 60`.

Eight clients ask one served judge at once, each with requests of changing sizes, for the given time. The judge is a
small random convolutional network whose score depends on every pixel and on the prompt, run by `serve` in a process of
its own. Each answer is compared with the score of the same sample in this process, first with samples of several
requests packed into one batch, then with each request scored on its own, where the bits must be equal.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, Scores
from dancegrpo.rewards.service import ServiceReward, serve
from dancegrpo.settings import RewardConfig

SIDE, POOL, BATCH = 64, 256, 8
"""Pixels, distinct samples, and the judge's batch size."""


class Network:
    """A random network as a judge: the score of a sample tells it from every other one."""

    name, differentiable = "network", False
    batch_size: int | None = BATCH

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(
                torch.nn.Conv2d(3, 16, 5, 2), torch.nn.GELU(), torch.nn.Conv2d(16, 32, 5, 2), torch.nn.GELU()
            ).eval()
            self.head = torch.nn.Linear(32 * 13 * 13, 1)

    @torch.no_grad()
    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        features = self.layers(media[:, 0].float()).flatten(1)
        values = self.head(features)[:, 0] + torch.tensor([float(prompt.text) / POOL for prompt in prompts])
        return Scores(values, torch.ones_like(values, dtype=torch.bool))

    def to(self, device: Any) -> Network:
        return self


@dataclass
class Tally:
    """What one client saw."""

    requests: int = 0
    samples: int = 0
    lost: int = 0
    inexact: int = 0
    largest: float = 0.0
    seconds: list[float] = field(default_factory=list)


def run_server(queue: SimpleQueue[str], threads: int, packed: bool) -> None:
    torch.set_num_threads(threads)
    config = RewardConfig(judge="reward_service:Network")
    serve("network", config, port=0, device="cpu", batch_across_requests=packed, on_ready=queue.put)


def ask(url: str, number: int, seconds: float, media: Tensor, expected: dict[int, Tensor]) -> Tally:
    """One client's requests until the time is up. expected: (POOL,) scores by request size, in this process."""
    tally, generator = Tally(), torch.Generator().manual_seed(number)
    with ServiceReward(url, batch_size=BATCH) as client:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            size = int(torch.randint(1, BATCH + 1, (), generator=generator))
            first = int(torch.randint(POOL // size, (), generator=generator)) * size
            start = time.perf_counter()
            told = client(media[first : first + size], prompts(first, size))
            tally.seconds.append(time.perf_counter() - start)
            wanted = expected[size][first : first + size]
            tally.requests += 1
            tally.samples += size
            tally.lost += int((~told.valid).sum())
            tally.inexact += int((told.values[told.valid] != wanted[told.valid]).sum())
            if told.valid.any():
                tally.largest = max(tally.largest, float((told.values - wanted)[told.valid].abs().max()))
    return tally


def prompts(first: int, size: int) -> list[Prompt]:
    return [Prompt(i, str(i)) for i in range(first, first + size)]


def in_process(media: Tensor) -> dict[int, Tensor]:
    """Every sample's score, by the size of the request it stands in."""
    judges = Judges({"network": Network()})
    scores = {}
    for size in range(1, BATCH + 1):
        starts = range(0, POOL // size * size, size)
        scores[size] = torch.cat(
            [judges.score(media[i : i + size], prompts(i, size))["network"].values for i in starts]
        )
    return scores


def measure(packed: bool, clients: int, seconds: float, media: Tensor, expected: dict[int, Tensor]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    queue: SimpleQueue[str] = context.SimpleQueue()
    process = context.Process(target=run_server, args=(queue, torch.get_num_threads(), packed), daemon=True)
    process.start()
    watcher = threading.Thread(target=lambda: (process.join(), queue.put("")), daemon=True)
    watcher.start()
    url = queue.get()
    if not url:
        sys.exit("the server did not start")
    try:
        with ThreadPoolExecutor(clients) as pool:
            tallies = list(pool.map(lambda number: ask(url, number, seconds, media, expected), range(clients)))
    finally:
        process.terminate()
        process.join(60)
    times = [second for tally in tallies for second in tally.seconds]
    return {
        "batching": "across requests" if packed else "off",
        "requests": sum(tally.requests for tally in tallies),
        "samples": sum(tally.samples for tally in tallies),
        "samples_per_second": sum(tally.samples for tally in tallies) / seconds,
        "median_ms": 1000 * statistics.median(times),
        "p99_ms": 1000 * statistics.quantiles(times, n=100)[98],
        "lost": sum(tally.lost for tally in tallies),
        "inexact": sum(tally.inexact for tally in tallies),
        "largest_difference": max(tally.largest for tally in tallies),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0, help="with each kind of batching")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.clients < 1 or args.seconds <= 0:
        parser.error("use at least one client and a time above 0")
    # The server imports this file by name, from where it lies.
    sys.path.append(str(Path(__file__).parent))
    torch.set_num_threads(1)
    media = torch.rand(POOL, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    expected = in_process(media)
    rows = [measure(packed, args.clients, args.seconds, media, expected) for packed in (True, False)]
    passed = all(row["lost"] == 0 and row["largest_difference"] <= 1e-5 for row in rows)
    passed = passed and rows[1]["inexact"] == 0
    if args.json:
        print(json.dumps({"clients": args.clients, "seconds": args.seconds, "passed": passed, "rows": rows}, indent=1))
    else:
        report(rows, args.clients, args.seconds, passed)
    sys.exit(not passed)


def report(rows: list[dict[str, Any]], clients: int, seconds: float, passed: bool) -> None:
    print(f"{clients} clients, {seconds:g} s each way, pictures of {SIDE} x {SIDE} as float32")
    names = ("batching", "requests", "samples", "samples/s", "median ms", "p99 ms", "lost", "inexact", "largest diff")
    print(" | ".join(f"{name:>15}" for name in names))
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        print(" | ".join(f"{cell:>15}" for cell in cells))
    print("passed" if passed else "FAILED")


if __name__ == "__main__":
    main()
