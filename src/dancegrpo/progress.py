"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dancegrpo.statistics import Summary

BARS = "▁▂▃▄▅▆▇█"
WINDOW = 25
"""Iterations behind the time left and the trend."""
PLAIN_SECONDS = 5.0
"""Least time between two plain lines."""

Metrics = Mapping[str, float | int | None]


class Progress:
    """Shows a run's iterations, `start` of `total` done already; a context manager.

    On a terminal one live block is redrawn in place, elsewhere a line is printed about every 5 s.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        description: str = "",
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.description = total, start, description
        self._console = console or Console()
        self._clock = clock
        self._history: dict[str, list[float]] = {}
        self._latest: Metrics = {}
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._evaluations: list[Summary] = []
        self._last_tick = self._last_line = clock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._last_tick = self._clock()
        if self._console.is_terminal:
            self._live = Live(self._block(), console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._block())
            self._live.stop()
            self._live = None

    def iteration(self, metrics: Metrics) -> None:
        """One more iteration is done; `metrics` is its line of metrics.jsonl."""
        now = self._clock()
        seconds = metrics.get("seconds/total")
        self._seconds.append(seconds if seconds is not None else now - self._last_tick)
        self._last_tick = now
        self.done += 1
        self._latest = metrics
        for judge, value in reward_means(metrics).items():
            self._history.setdefault(judge, []).append(value)
        if self._live is not None:
            self._live.update(self._block())
        elif self.done in (1, self.total) or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            self._print(self._line())

    def evaluation(self, summary: Summary) -> None:
        """A held-out evaluation is done."""
        self._evaluations.append(summary)
        self._last_tick = self._clock()
        if self._live is not None:
            self._live.update(self._block())
        else:
            self._print(f"evaluation after {summary.iteration} iterations: {held_out(self._evaluations)}")

    def message(self, text: str) -> None:
        """A line that stays, above the live block."""
        self._print(text)

    @property
    def seconds_left(self) -> float | None:
        """Median seconds of the last iterations times what is left of them; None before the first."""
        if not self._seconds:
            return None
        return statistics.median(self._seconds) * max(0, self.total - self.done)

    def _print(self, text: str) -> None:
        # Never markup: a prompt or an error with [brackets] is printed as it is.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> str:
        parts = [f"iteration {self.done}/{self.total}"]
        parts += [f"reward {judge} {values[-1]:.4g} {arrow(values)}" for judge, values in self._history.items()]
        parts += [f"{label} {value}" for label, value in health(self._latest).items()]
        if self._seconds:
            parts.append(f"{statistics.median(self._seconds):.2g} s/iteration")
        if self.seconds_left is not None and self.done < self.total:
            parts.append(f"{duration(self.seconds_left)} left")
        return "  ".join(parts)

    def _block(self) -> RenderableType:
        left = self.seconds_left
        header = Table.grid(padding=(0, 1))
        header.add_row(
            Text(self.description, style="bold"),
            ProgressBar(total=max(1, self.total), completed=self.done, width=30),
            Text(f"{self.done}/{self.total}"),
            Text(f"{duration(left)} left" if left is not None and self.done < self.total else "", style="cyan"),
        )
        body = Table.grid(padding=(0, 2))
        for judge, values in self._history.items():
            body.add_row(
                Text(f"reward {judge}", style="dim"),
                Text(f"{values[-1]:.4g} {arrow(values)}  {sparkline(values)}", no_wrap=True),
            )
        if self._evaluations:
            body.add_row(Text("held-out", style="dim"), Text(held_out(self._evaluations)))
        facts = [f"{label} {value}" for label, value in health(self._latest).items()]
        if facts:
            body.add_row(Text("health", style="dim"), Text("  ".join(facts)))
        return Group(header, body)


def reward_means(metrics: Metrics) -> dict[str, float]:
    """The raw mean reward of each judge that has one in this line."""
    return {
        name.removeprefix("reward/").removesuffix("/mean"): value
        for name, value in metrics.items()
        if name.startswith("reward/") and name.endswith("/mean") and value is not None
    }


def health(metrics: Metrics) -> dict[str, str]:
    """The few numbers that say whether an iteration learnt anything, formatted, by label."""
    found: dict[str, str] = {}
    if (fraction := metrics.get("train/clip_fraction")) is not None:
        found["clip"] = f"{fraction:.0%}"
    if (norm := metrics.get("train/grad_norm")) is not None:
        found["grad norm"] = f"{norm:.3g}"
    if (flat := metrics.get("groups/zero_spread")) is not None:
        total = metrics.get("groups/total")
        found["groups without signal"] = f"{flat:g}/{total:g}" if total is not None else f"{flat:g}"
    if skipped := metrics.get("train/skipped_updates"):
        found["skipped updates"] = f"{skipped:g}"
    if alarms := metrics.get("health/alarms"):
        found["alarms"] = f"{alarms:g}"
    if rollbacks := metrics.get("health/rollbacks"):
        found["rollbacks"] = f"{rollbacks:g}"
    return found


def held_out(evaluations: Sequence[Summary]) -> str:
    """The newest evaluation against the first, in one phrase."""
    first, last = evaluations[0], evaluations[-1]
    column = last.pass_column
    if column is not None:
        rate, start = last.passes[column], first.passes.get(column)
        shown = f"pass rate {rate.rate:.1%}"
        return shown if start is None or len(evaluations) == 1 else f"{shown} (from {start.rate:.1%})"
    means = {name: value for name, value in last.means.items() if value is not None}
    return "  ".join(f"{name} {value:.4g}" for name, value in means.items()) or "no valid score"


def trend(values: Sequence[float]) -> float:
    """Change over the last iterations, in standard errors of the difference of the two halves' means; 0 where flat."""
    recent = list(values[-WINDOW:])
    half = len(recent) // 2
    if half < 2:
        return 0.0
    old, new = recent[:half], recent[-half:]
    error = ((statistics.variance(old) + statistics.variance(new)) / half) ** 0.5
    change = statistics.fmean(new) - statistics.fmean(old)
    return change / error if error > 0 else float((change > 0) - (change < 0)) * 9.0


def arrow(values: Sequence[float]) -> str:
    """The trend as a sign: up or down beyond two standard errors, level otherwise."""
    size = trend(values)
    return "↑" if size > 2 else "↓" if size < -2 else "→"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The whole curve in `width` characters: each is the mean of its share of the iterations, from ▁ to █."""
    count = min(width, len(values))
    means = [
        statistics.fmean(values[index * len(values) // count : (index + 1) * len(values) // count])
        for index in range(count)
    ]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in means)


def duration(seconds: float) -> str:
    """59 s, 12:05 (minutes), 3:07:00 (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
