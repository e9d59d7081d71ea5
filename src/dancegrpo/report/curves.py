"""The curves of a report: which metrics, in which words, as plain data that the page draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dancegrpo.report.folder import Record, RunFolder
from dancegrpo.report.heldout import HeldOut
from dancegrpo.statistics import is_pass_column

MOST_POINTS = 1500
"""Points drawn per curve; longer runs are thinned evenly."""
PHASES = ("encode", "rollout", "decode", "reward", "update")
MISSING = "\N{EN DASH}"
Values = list[float | None]
Unit = Literal["number", "percent", "seconds", "megabytes", "ratio"]


@dataclass(frozen=True)
class Series:
    """One line of a chart; low and high bound its band.

    x: where its values lie, ascending, when that is not where the chart's others do. color: of the palette, when its
    place in the chart does not give it.
    """

    name: str
    values: Values
    low: Values | None = None
    high: Values | None = None
    x: list[int] | None = None
    color: int | None = None


@dataclass(frozen=True)
class Chart:
    """One drawing. x: iterations, or all places where a series has a value. axis: how the tooltip calls x.
    reference: a dashed line with its label."""

    title: str
    about: str
    x: list[int]
    series: list[Series]
    unit: Unit = "number"
    kind: Literal["line", "stack"] = "line"
    axis: str = "iteration"
    from_zero: bool = False
    smoothed: bool = True
    """Whether a running mean is drawn; not for what never jitters."""
    reference: tuple[float, str] | None = None

    @property
    def label(self) -> str:
        """The chart in words, for those who do not see it."""
        parts = []
        for series in self.series:
            present = [value for value in series.values if value is not None]
            name = f"{series.name}: " if series.name else ""
            parts.append(
                f"{name}{show(present[0], self.unit)} at first, {show(present[-1], self.unit)} at last, "
                f"between {show(min(present), self.unit)} and {show(max(present), self.unit)}"
            )
        return f"{self.title}. {'; '.join(parts)}."

    def legend(self) -> list[tuple[str, str]]:
        """Each series and its last value."""
        last = [next((v for v in reversed(series.values) if v is not None), None) for series in self.series]
        return [(series.name, show(value, self.unit)) for series, value in zip(self.series, last, strict=True)]

    def data(self) -> Record:
        """The chart as JSON-ready data, numbers cut to nine digits."""
        record = asdict(self)
        del record["title"], record["about"]
        for series in record["series"]:
            for name in ("values", "low", "high"):
                series[name] = series[name] and [value and float(f"{value:.9g}") for value in series[name]]
            for name in ("x", "color"):
                if series[name] is None:
                    del series[name]
        return record


def show(value: float | None, unit: Unit = "number") -> str:
    """A number for people."""
    if value is None:
        return MISSING
    match unit:
        case "percent":
            return f"{value:.1%}" if abs(value) >= 0.1 or value == 0 else f"{value:.2%}"
        case "seconds":
            return f"{value:.3g} s"
        case "megabytes":
            return f"{value:,.0f} MB"
        case "ratio":
            return f"{value:.6f}"
    return f"{value:.4g}"


class Curves:
    """Builds charts from a run's metrics; a chart whose metrics are all missing is not built."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        stride = -(-len(run.metrics) // MOST_POINTS) or 1
        # Counted from the end, so that the newest iteration is always drawn.
        self.records: list[Record] = run.metrics[::-1][::stride][::-1]
        self.x = [record["iteration"] for record in self.records]

    def values(self, key: str) -> Values:
        """One metric over the drawn iterations."""
        return [record.get(key) for record in self.records]

    def line(self, title: str, about: str, series: dict[str, Any], **options: Any) -> list[Chart]:
        """A chart of those series that have values, given as a metric's name or as values; none where none has."""
        found = {name: self.values(given) if isinstance(given, str) else given for name, given in series.items()}
        lines = [Series(name, values) for name, values in found.items() if has_values(values)]
        return [Chart(title, about, self.x, lines, **options)] if lines else []

    def share(self, part: str, whole: str) -> Values:
        """One metric divided by another."""
        pairs = zip(self.values(part), self.values(whole), strict=True)
        return [a / b if a is not None and b else None for a, b in pairs]


def has_values(values: Sequence[float | None]) -> bool:
    """Whether there is anything to draw."""
    return any(value is not None for value in values)


def reward_charts(run: RunFolder) -> list[Chart]:
    """Raw reward of each judge with the spread between samples, then normalised rewards and advantages."""
    curves, judges, charts = Curves(run), run.judges(), []
    for judge in judges:
        charts += _judge_charts(curves, judge)
    charts += curves.line(
        "Spread within groups",
        "Raw standard deviation between samples of one prompt. Where it vanishes, there is nothing left to learn from.",
        {judge: f"reward/{judge}/group_std" for judge in judges},
        from_zero=True,
    )
    charts += curves.line(
        "Normalised reward, mean",
        "Each judge's reward after normalisation within its group, before weights: near 0 by construction.",
        {judge: f"reward/{judge}/normalized_mean" for judge in judges},
    )
    charts += curves.line(
        "Normalised reward, spread",
        "How much each judge pulls: near 1 where groups differ, 0 where a judge sees all samples alike.",
        {judge: f"reward/{judge}/normalized_std" for judge in judges},
        from_zero=True,
    )
    charts += curves.line(
        "Advantage",
        "The weighted sum over judges that training uses: its spread, and its largest size.",
        {"standard deviation": "advantage/std", "largest": "advantage/abs_max"},
        from_zero=True,
    )
    return charts


def _judge_charts(curves: Curves, judge: str) -> list[Chart]:
    stem, charts = f"reward/{judge}/", []
    mean, std = curves.values(stem + "mean"), curves.values(stem + "std")
    if has_values(mean):
        low = [m - s if m is not None and s is not None else None for m, s in zip(mean, std, strict=True)]
        high = [m + s if m is not None and s is not None else None for m, s in zip(mean, std, strict=True)]
        weight = curves.run.weight(judge)
        role = "trained on" if weight else "only measured, never trained on"
        about = f"Mean raw score of each rollout's samples ({role}); the band is one standard deviation of the samples."
        charts.append(Chart(f"Reward: {judge}", about, curves.x, [Series(judge, mean, low, high)]))
    known = {"mean", "std", "group_std", "normalized_mean", "normalized_std", "masked"}
    found = {key.removeprefix(stem) for record in curves.records for key in record if key.startswith(stem)}
    for extra in sorted(name for name in found - known if "/" not in name):
        passes = extra == "pass"
        title = f"Pass rate in training: {judge}" if passes else f"{extra} ({judge})"
        about = "Share of the rollout's samples that pass." if passes else f"{extra}, as the judge {judge} reports it."
        unit: Unit = "percent" if passes else "number"
        charts += curves.line(title, about, {judge: stem + extra}, unit=unit, from_zero=passes)
    return charts


def held_out_charts(held_out: HeldOut | None) -> list[Chart]:
    """Pass rate (with its interval), or else the score, over the run's evaluations; none with a single one."""
    if held_out is None or held_out.column is None or len(held_out.summaries) < 2:
        return []
    column, x = held_out.column, [summary.iteration for summary in held_out.summaries]
    if not is_pass_column(column):
        about, means = "Mean over the held-out prompts.", [summary.means.get(column) for summary in held_out.summaries]
        return [Chart(f"Held-out score: {column}", about, x, [Series(column, means)], axis="after iteration")]
    rates = [summary.passes.get(column) for summary in held_out.summaries]
    series = Series(
        "all prompts",
        [rate.rate if rate else None for rate in rates],
        [rate.low if rate else None for rate in rates],
        [rate.high if rate else None for rate in rates],
    )
    about = "Share of held-out prompts that pass, always from the same starting noise; the band is a 95% interval."
    return [Chart("Held-out pass rate", about, x, [series], unit="percent", axis="after iteration")]


def health_charts(run: RunFolder) -> list[Chart]:
    """Ratio, clipping, gradients, groups without signal, replay, distance from the start."""
    curves = Curves(run)
    line, limit = curves.line, run.setting("optimizer.max_grad_norm")
    on_policy = run.setting("update.updates_per_rollout") == 1
    charts = line(
        "Ratio",
        "Probability of a trained step under the updated weights over that under the rollout's, averaged."
        + (" On-policy: 1 by design." if on_policy else ""),
        {"mean": "train/ratio_mean", "first of the rollout": "train/ratio_first"},
        unit="ratio",
    )
    charts += line(
        "Ratio, largest deviation",
        "The farthest any trained step's ratio went from 1; the dashed line is where clipping starts.",
        {"|ratio - 1|": "train/ratio_max_deviation"},
        from_zero=True,
        reference=reference(run.setting("algorithm.clip_range"), "clip range"),
    )
    charts += line(
        "Clip fraction",
        "Share of trained steps whose ratio was clipped."
        + (" On-policy: the clip is inactive by design." if on_policy else " Near 100% the updates are too large."),
        {"clipped": "train/clip_fraction"},
        unit="percent",
        from_zero=True,
    )
    charts += line(
        "Gradient norm",
        "Before clipping. Spikes above the dashed line were scaled down to it.",
        {"gradient norm": "train/grad_norm"},
        from_zero=True,
        reference=reference(limit, "clipped to this"),
    )
    charts += line(
        "Groups without signal",
        "Share of prompts whose samples all scored the same; they are skipped.",
        {"zero spread": curves.share("groups/zero_spread", "groups/total")},
        unit="percent",
        from_zero=True,
    )
    return charts + _numerics_charts(curves) + _image_charts(curves)


def _numerics_charts(curves: Curves) -> list[Chart]:
    line = curves.line
    charts = line(
        "Weight change",
        "Distance of the trained weights from where they started, relative to their size (L2).",
        {"weight change": "train/weight_change"},
        unit="percent",
        smoothed=False,
        from_zero=True,
    )
    charts += line(
        "Replay difference",
        "Largest gap between a step's log-probability in the rollout and in training before any update.",
        {"largest gap": "train/replay_difference"},
        from_zero=True,
    )
    charts += line("KL to the starting policy", "Nats per latent element.", {"KL": "train/kl"}, from_zero=True)
    charts += line(
        "Loss", "The clipped surrogate. Its level says little; it is near 0 by construction.", {"loss": "train/loss"}
    )
    if any(curves.values("samples/masked")):
        charts += line(
            "Masked samples",
            "Share of samples left out because a judge failed on them.",
            {"masked": curves.share("samples/masked", "samples/total")},
            unit="percent",
            from_zero=True,
        )
    return charts


LOOKS = {
    "saturation": ("Saturation", "Mean chroma of the rollout's pictures: 0 is grey."),
    "edge_density": ("Edges", "Share of pixels on an edge."),
    "high_frequency": ("Fine texture", "Share of the brightness's energy above half the finest frequency."),
    "color_entropy": ("Colours", "Entropy of the colours, in bits: 0 is a single one."),
    "grid": (
        "Lattice patterns",
        "Share of the texture's energy in isolated peaks of the spectrum: 0 without a lattice.",
    ),
}
"""Image statistics: title and meaning."""


def _image_charts(curves: Curves) -> list[Chart]:
    """What the rollout's pictures look like; the band is one standard deviation of the samples."""
    charts = []
    for name, (title, about) in LOOKS.items():
        mean, std = curves.values(f"image/{name}"), curves.values(f"image/{name}/std")
        if not has_values(mean):
            continue
        pairs = list(zip(mean, std, strict=True))
        low = [max(0.0, m - s) if m is not None and s is not None else None for m, s in pairs]
        high = [m + s if m is not None and s is not None else None for m, s in pairs]
        about = f"{about} The band is one standard deviation of the samples."
        charts.append(Chart(title, about, curves.x, [Series(title.lower(), mean, low, high)], from_zero=True))
    charts += curves.line(
        "Diversity within groups",
        "How far one prompt's pictures lie apart, compared at 8x8 pixels: 0 where all are the same.",
        {"diversity": "image/diversity"},
        from_zero=True,
    )
    if any(curves.values("image/blank")):
        about = "Share of the rollout's pictures that are of one colour, or not finite."
        charts += curves.line("Blank pictures", about, {"blank": "image/blank"}, unit="percent", from_zero=True)
    return charts


def time_charts(run: RunFolder) -> list[Chart]:
    """Seconds per phase, stacked, and peak memory."""
    curves = Curves(run)
    phases = {phase: curves.values(f"seconds/{phase}") for phase in PHASES}
    phases["other"] = other_seconds(curves.records)
    series = [Series(name, values) for name, values in phases.items() if any(values)]
    charts = []
    if series:
        about = "Where each iteration's time went."
        charts.append(
            Chart("Seconds per iteration", about, curves.x, series, unit="seconds", kind="stack", from_zero=True)
        )
    return charts + curves.line(
        "Peak memory",
        "Of the process, or of the accelerator. It should be flat after the first iteration.",
        {"peak": "memory/peak_mb"},
        unit="megabytes",
        smoothed=False,
        from_zero=True,
    )


def other_seconds(records: Sequence[Record]) -> Values:
    """What the phases leave of each iteration's total; None where there is no total."""
    rest: Values = []
    for record in records:
        total = record.get("seconds/total")
        spent = sum(record.get(f"seconds/{phase}") or 0.0 for phase in PHASES)
        rest.append(None if total is None else max(0.0, total - spent))
    return rest


def reference(value: float | None, label: str) -> tuple[float, str] | None:
    """A dashed line, where the setting it shows is there."""
    return None if value is None else (float(value), label)
