"""The report says what the run's folder says, in one file, whatever state the folder is in."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dancegrpo.errors import CheckpointError
from dancegrpo.media import read_media
from dancegrpo.report import write_report
from dancegrpo.report.curves import reward_charts
from dancegrpo.report.findings import findings
from dancegrpo.report.folder import read_run
from dancegrpo.report.heldout import read_held_out, verdict
from dancegrpo.report.strips import film_strip
from dancegrpo.statistics import paired_bootstrap
from fake_run import TASKS, FakeRun

PLAIN = FakeRun(iterations=30, held_out=120, evaluations=(0, 30), pictures=())
PICTURED = replace(PLAIN, pictures=(0, 30))


@dataclass
class Page(HTMLParser):
    """A page taken apart: every tag with its attributes, text, and the contents of its scripts."""

    text: str = ""
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._in: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        self.text += " "
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.text += data

    def has(self, *parts: str) -> bool:
        """Whether the text, white space aside, contains all parts."""
        text = " ".join(self.text.split())
        return all(part in text for part in parts)


def page_of(folder: Path) -> Page:
    page = Page()
    page.feed(write_report(folder).read_text(encoding="utf-8"))
    return page


def edit_metrics(folder: Path, change: Any) -> None:
    file = folder / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(change(record) or record) + "\n" for record in records))


def test_the_verdict_is_the_paired_gain_of_first_and_last_evaluation(tmp_path: Path) -> None:
    folder = PLAIN.write(tmp_path)
    before, after = (PLAIN.evaluation(i)["columns"]["shapes/pass"] for i in (0, 30))
    gain = paired_bootstrap(before, after)
    tasks = [[a - b for a, b, i in zip(after, before, range(120), strict=True) if i % 6 == t] for t in range(6)]
    assert page_of(folder).has(
        f"Held-out pass rate rose from {sum(before) / 120:.1%} to {sum(after) / 120:.1%}",
        f"{100 * gain.gain:+.1f} points (95% interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}) on 120 held-out",
        f"Better in {sum(sum(t) > 0 for t in tasks)} of 6 tasks.",
    )


def test_every_task_has_its_rates_and_gain(tmp_path: Path) -> None:
    page = page_of(PLAIN.write(tmp_path))
    before, after = (PLAIN.evaluation(i)["columns"]["shapes/pass"] for i in (0, 30))
    for number, task in enumerate(TASKS):
        first, last = sum(before[number::6]) / 20, sum(after[number::6]) / 20
        row = re.search(rf"{task}\s+n = 20(.*?)(?=n = |Held-out scores)", page.text, re.DOTALL)
        assert row
        for part in (f"{first:.1%}", f"{last:.1%}", f"{100 * (last - first):+.1f}"):
            assert part in row[1]


@pytest.mark.parametrize(
    ("kind", "headline"),
    [
        (replace(PLAIN, gain=-0.2), "Held-out pass rate fell from "),
        (replace(PLAIN, gain=0.0), "Held-out pass rate shows no clear change: "),
        (replace(PLAIN, evaluations=(0,), status="running"), "Held-out pass rate before training: "),
        (replace(PLAIN, evaluations=(10,)), "Held-out pass rate after 10 iterations: "),
        (replace(PLAIN, evaluations=()), "Training reward (shapes) rose from "),
        (replace(PLAIN, iterations=1, evaluations=()), "One iteration: training reward (shapes) 0.5"),
        (replace(PLAIN, iterations=0, evaluations=()), "Nothing trained yet"),
        (replace(PLAIN, masked=True, status="failed"), "Held-out pass rate rose from "),
    ],
)
def test_every_state_of_a_run_has_a_verdict(tmp_path: Path, kind: FakeRun, headline: str) -> None:
    page = page_of(kind.write(tmp_path))
    assert page.has(headline, kind.status)
    assert "None" not in page.text.replace("none", "")
    assert "nan" not in page.text.lower().split()


def test_an_unfinished_run_says_how_far_it_got(tmp_path: Path) -> None:
    assert page_of(replace(PLAIN, status="running").write(tmp_path)).has("Measured after 30 of 120 iterations.")


def test_without_a_pass_column_the_score_is_the_verdict(tmp_path: Path) -> None:
    folder = PLAIN.write(tmp_path)
    for file in (folder / "evaluations").iterdir():
        evaluation = json.loads(file.read_text())
        del evaluation["columns"]["shapes/pass"]
        file.write_text(json.dumps(evaluation))
    assert page_of(folder).has("Held-out score (shapes) rose from ")


def test_evaluations_of_other_prompts_are_not_compared(tmp_path: Path) -> None:
    folder = PLAIN.write(tmp_path)
    file = folder / "evaluations" / "000030.json"
    evaluation = json.loads(file.read_text())
    evaluation["texts"][5] = "another prompt"
    file.write_text(json.dumps(evaluation))
    page = page_of(folder)
    assert page.has("First and last evaluation cannot be paired", "row 5 asked")
    assert not page.has("rose from")


def test_the_file_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = page_of(PICTURED.write(tmp_path))
    loaded = [v for _, attributes in page.tags for name in ("src", "href") if (v := attributes.get(name))]
    assert len(loaded) > 20
    assert all(value.startswith("data:") for value in loaded)
    assert "url(" not in (tmp_path / "shapes-flux-seed0" / "report.html").read_text()


def test_the_policy_lets_this_script_run_and_no_other(tmp_path: Path) -> None:
    page = page_of(PLAIN.write(tmp_path))
    [policy] = [a["content"] or "" for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_hostile_names_and_prompts_stay_text(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)><!--"
    folder = replace(PICTURED, prompt=hostile, name="<b onclick=1>").write(tmp_path)
    edit_metrics(folder, lambda r: {**r, f"reward/{hostile}/mean": 0.5, f"reward/shapes/{hostile.replace('/', '')}": 1})
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, "machine": {hostile: hostile}}))
    page = page_of(folder)
    assert hostile in page.text
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert {a["src"][:10] for tag, a in page.tags if tag == "img" and a["src"]} == {"data:image"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert any(hostile == s["name"] for chart in json.loads(page.scripts[0])["charts"] for s in chart["series"])


def test_curves_hold_the_metrics_values(tmp_path: Path) -> None:
    folder = replace(PLAIN, masked=True).write(tmp_path)
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    charts = json.loads(page_of(folder).scripts[0])["charts"]
    drawn = {s["name"]: s["values"] for chart in charts for s in chart["series"]}
    assert drawn["gradient norm"] == pytest.approx([r["train/grad_norm"] for r in written], rel=1e-8)
    [hps] = [s for chart in charts for s in chart["series"] if s["name"] == "hps" and s["low"]]
    assert [value is None for value in hps["values"]] == [i % 10 == 4 for i in range(30)]


def test_long_runs_are_thinned_and_keep_their_newest_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dancegrpo.report.curves.MOST_POINTS", 11)
    chart = reward_charts(read_run(PLAIN.write(tmp_path)))[0]
    assert chart.x == [2, 5, 8, 11, 14, 17, 20, 23, 26, 29]


def test_a_torn_last_line_is_left_out_and_named(tmp_path: Path) -> None:
    folder = PLAIN.write(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 30, "reward/sha')
    assert read_run(folder).iterations_done == 30
    assert page_of(folder).has("Half-written files", "metrics.jsonl line 31")


def test_iterations_written_again_after_a_resume_count_once(tmp_path: Path) -> None:
    folder = PLAIN.write(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 29, "train/loss": 7.0}) + "\n")
    run = read_run(folder)
    assert [r["iteration"] for r in run.metrics] == list(range(30))
    assert run.metrics[-1]["train/loss"] == 7.0


def test_numbers_that_are_not_finite_become_gaps(tmp_path: Path) -> None:
    folder = PLAIN.write(tmp_path)
    edit_metrics(folder, lambda r: {**r, "train/loss": float("nan")} if r["iteration"] == 3 else None)
    losses = [r["train/loss"] for r in read_run(folder).metrics]
    assert losses[3] is None
    assert json.loads(page_of(folder).scripts[0])


def test_small_pictures_are_embedded_as_they_are(tmp_path: Path) -> None:
    folder = PICTURED.write(tmp_path)
    sources = [a["src"] or "" for tag, a in page_of(folder).tags if tag == "img"]
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    expected = [(folder / "samples" / f"{i:06}" / f"{k}.png").read_bytes() for k in range(12) for i in (0, 30)]
    assert embedded == expected


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    folder = replace(PICTURED, picture_size=600, prompts_drawn=1).write(tmp_path)
    images = [a for tag, a in page_of(folder).tags if tag == "img"]
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in images)
    assert {image["width"] for image in images} == {"600"}
    assert (folder / "report.html").stat().st_size < 2_000_000


def strips_of(folder: Path) -> list[tuple[dict[str, str | None], np.ndarray]]:
    """Every clip in a report: its attributes, and its frames (F, H, W, 3)."""
    found = []
    for tag, attributes in page_of(folder).tags:
        if tag == "img" and "data-frames" in attributes:
            data = base64.b64decode((attributes["src"] or "").removeprefix("data:image/webp;base64,"))
            sheet = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            assert sheet.shape[:2] == (int(attributes["height"] or 0), int(attributes["width"] or 0))
            names = ("frames", "columns", "width", "height", "gap")
            count, columns, width, height, gap = (int(attributes[f"data-{name}"] or 0) for name in names)
            corners = [(i // columns * (height + gap), i % columns * (width + gap)) for i in range(count)]
            frames = np.stack([sheet[top : top + height, left : left + width] for top, left in corners])
            found.append((attributes, frames))
    return found


def test_small_clips_are_embedded_frame_by_frame_without_loss(tmp_path: Path) -> None:
    folder = replace(PICTURED, frames=5, prompts_drawn=3, picture_size=32).write(tmp_path)
    strips = strips_of(folder)
    files = [folder / "samples" / f"{i:06}" / f"{k}.webp" for k in range(3) for i in (0, 30)]
    assert len(strips) == len(files)
    for (attributes, frames), file in zip(strips, files, strict=True):
        assert np.array_equal(frames, read_media(file).permute(0, 2, 3, 1).numpy())
        assert attributes["data-fps"] == "8.0"


def test_long_clips_are_thinned_and_last_as_long(tmp_path: Path) -> None:
    folder = replace(PICTURED, frames=70, prompts_drawn=1, picture_size=8).write(tmp_path)
    for attributes, frames in strips_of(folder):
        assert len(frames) == 24  # every third
        assert float(attributes["data-fps"] or 0) == pytest.approx(8 / 3)


@pytest.mark.parametrize("shape", [(9, 3, 60, 80), (33, 3, 120, 90), (4, 3, 700, 300)])
def test_a_strip_is_bounded_whatever_it_shows(shape: tuple[int, ...]) -> None:
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    strip = film_strip(noise, 40_000)
    assert len(strip.data) <= 40_000
    assert strip.frames == -(-shape[0] // strip.stride)
    assert max(strip.width, strip.height) <= 512
    assert strip.width / strip.height == pytest.approx(shape[3] / shape[2], rel=0.05)


def test_many_clips_share_the_pages_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dancegrpo.report.pictures.BUDGET_BYTES", 12_000)
    kind = replace(PICTURED, pictures=(0, 15, 30), frames=4, prompts_drawn=6, picture_size=32)
    strips = strips_of(kind.write(tmp_path))
    assert len(strips) == 12  # first and last
    assert sum(len(attributes["src"] or "") * 3 / 4 for attributes, _ in strips) < 12_500


def test_a_torn_clip_leaves_the_others(tmp_path: Path) -> None:
    folder = replace(PICTURED, frames=3, prompts_drawn=3, picture_size=32).write(tmp_path)
    file = folder / "samples" / "000030" / "1.webp"
    file.write_bytes(file.read_bytes()[:200])
    assert len(strips_of(folder)) == 5
    assert page_of(folder).has("no clip")


def test_without_a_script_the_page_says_what_it_shows_of_clips(tmp_path: Path) -> None:
    assert page_of(replace(PICTURED, frames=3, prompts_drawn=1).write(tmp_path)).has("side by side, in reading order")
    assert not page_of(replace(PICTURED, name="still", prompts_drawn=1).write(tmp_path)).has("reading order", "in step")


def test_a_torn_picture_leaves_the_others(tmp_path: Path) -> None:
    folder = PICTURED.write(tmp_path)
    file = folder / "samples" / "000030" / "3.png"
    file.write_bytes(file.read_bytes()[:100])
    page = page_of(folder)
    assert [tag for tag, _ in page.tags].count("img") == 23
    assert page.has("no picture")


def test_an_on_policy_run_is_told_that_its_ratio_is_one(tmp_path: Path) -> None:
    page = page_of(replace(PLAIN, updates_per_rollout=1).write(tmp_path))
    assert page.has("the ratio is 1 by design and the clip is inactive")
    other = page_of(replace(PLAIN, name="off").write(tmp_path))
    assert not other.has("by design and the clip is inactive")


@pytest.mark.parametrize(
    ("change", "title"),
    [
        ({"train/ratio_first": 1.003}, "The first ratio is not 1"),
        ({"train/replay_difference": 3e-4}, "Replay is off"),
        ({"groups/zero_spread": 7}, "Most groups carry no signal"),
        ({"train/skipped_updates": 1}, "Updates skipped"),
        ({"samples/masked": 40}, "Masked samples"),
        ({"train/weight_change": 0.0}, "The weights did not move"),
        ({"train/clip_fraction": 0.95}, "Clipping"),
    ],
)
def test_what_is_wrong_is_an_alarm_and_a_sound_run_has_none(
    tmp_path: Path, change: dict[str, float], title: str
) -> None:
    folder = PLAIN.write(tmp_path)

    def alarms() -> list[str]:
        return [finding.title for finding in findings(read_run(folder), None) if finding.level == "alarm"]

    assert alarms() == []
    edit_metrics(folder, lambda record: {**record, **change})
    assert alarms() == [title]


def test_a_measured_judge_that_falls_while_the_trained_one_rises_is_an_alarm(tmp_path: Path) -> None:
    folder = PLAIN.write(tmp_path)
    file = folder / "evaluations" / "000030.json"
    evaluation = json.loads(file.read_text())
    evaluation["columns"]["hps"] = [value - 0.05 for value in evaluation["columns"]["hps"]]
    file.write_text(json.dumps(evaluation))
    run = read_run(folder)
    [alarm] = [f for f in findings(run, read_held_out(run)) if f.level == "alarm"]
    assert alarm.title == "Possible reward hacking"
    assert "hps" in alarm.text


def test_the_wall_time_and_samples_are_the_runs(tmp_path: Path) -> None:
    folder = PLAIN.write(tmp_path)
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    per_sample = sum(r["seconds/total"] for r in written) / (30 * 96)
    # 2.45 s x 30 + 33 s = 106.5 s, as run.json says.
    assert page_of(folder).has("Wall time 1:46", "Samples 2,880", f"Per sample {per_sample:.3g} s", "1,410 MB")


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.yaml"):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = PLAIN.write(tmp_path)
    (folder / "report.html").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        write_report(folder)
    assert not list(folder.glob(".report*"))


def test_verdict_of_a_flat_reward_is_flat(tmp_path: Path) -> None:
    folder = replace(PLAIN, evaluations=()).write(tmp_path)
    edit_metrics(folder, lambda r: {**r, "reward/shapes/mean": 0.5 + 0.01 * (-1) ** r["iteration"]})
    assert verdict(read_run(folder), None).tone == "flat"


def test_pass_verdicts_of_the_rollout_are_a_percentage_and_counts_no_curve(tmp_path: Path) -> None:
    charts = {chart.title: chart for chart in reward_charts(read_run(PLAIN.write(tmp_path)))}
    assert charts["Pass rate in training: shapes"].unit == "percent"
    assert not any("masked" in title for title in charts)
