"""Two or more runs on one page: what differs, what is paired, and what is left out and why."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dancegrpo.errors import CheckpointError
from dancegrpo.report.compare import Compared, as_json, as_table, compare_runs, difference
from dancegrpo.report.curves import MISSING
from dancegrpo.report.standings import Cell
from dancegrpo.statistics import PairedGain
from fake_run import TASKS, FakeRun
from test_report import Page, edit_metrics

PLAIN = FakeRun(iterations=30, held_out=60, evaluations=(0, 30), pictures=(), name="plain")
OTHER = replace(PLAIN, name="other", gain=0.5)
DRAWN = replace(PLAIN, pictures=(0, 30), prompts_drawn=3, picture_size=16)


def edit_json(file: Path, change: Any) -> None:
    record = json.loads(file.read_text())
    file.write_text(json.dumps(change(record) or record))


def edit_config(folder: Path, dotted: str, value: Any) -> None:
    """Set one value of a written config.yaml."""
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    *groups, last = dotted.split(".")
    target = config
    for group in groups:
        target = target[group]
    target[last] = value
    file.write_text(yaml.safe_dump(config, sort_keys=False))


def compared(tmp_path: Path, *folders: Path) -> tuple[Compared, Page]:
    result = compare_runs(folders, tmp_path / "compare.html")
    page = Page()
    page.feed(result.page.read_text(encoding="utf-8"))
    return result, page


def cell(result: Compared, column: str, run: int, *, task: str | None = None, table: int = -1) -> Cell:
    [row] = [row for row in result.standings[table].rows if (row.column, row.task) == (column, task)]
    found = row.cells[run]
    assert found is not None
    return found


def test_the_table_of_settings_lists_exactly_the_differing_keys(tmp_path: Path) -> None:
    folders = [replace(PLAIN, name=name).write(tmp_path) for name in "abc"]
    for folder in folders:
        edit_config(folder, "name", "same")
    edit_config(folders[1], "optimizer.learning_rate", 0.5)
    edit_config(folders[2], "rollout.group_size", 16)
    edit_config(folders[2], "rewards.hps.options", {"weights": "w" * 100})
    result, page = compared(tmp_path, *folders)
    default = yaml.safe_load((folders[0] / "config.yaml").read_text())
    rate, size = default["optimizer"]["learning_rate"], default["rollout"]["group_size"]
    assert {row.key: row.values for row in result.settings} == {
        "optimizer.learning_rate": [rate, 0.5, rate],
        "rollout.group_size": [size, size, 16],
        "rewards.hps.options.weights": [None, None, "w" * 100],
    }
    assert page.has("rollout.group_size", "w" * 59)
    assert not page.has("w" * 60)
    assert ("td", "w" * 100) in [(tag, attributes.get("title")) for tag, attributes in page.tags]


def test_a_judge_that_only_some_runs_have_is_one_row(tmp_path: Path) -> None:
    folders = [replace(PLAIN, name=name).write(tmp_path) for name in "abc"]
    for folder in folders:
        edit_config(folder, "name", "same")
    edit_config(folders[2], "rewards.hps.weight", 0.5)
    without = yaml.safe_load((folders[1] / "config.yaml").read_text())["rewards"]
    edit_config(folders[1], "rewards", {"shapes": without["shapes"]})
    result, _ = compared(tmp_path, *folders)
    [row] = result.settings
    assert row.key == "rewards.hps"
    assert [value and value["weight"] for value in row.values] == [0.0, None, 0.5]


def test_the_paired_difference_is_numpys_own(tmp_path: Path) -> None:
    result, page = compared(tmp_path, PLAIN.write(tmp_path), OTHER.write(tmp_path))
    for column in ("shapes", "shapes/pass"):
        a, b = (np.array(kind.evaluation(30)["columns"][column], dtype=float) for kind in (PLAIN, OTHER))
        found = cell(result, column, 1)
        draws = np.random.default_rng(7).integers(0, 60, (20_000, 60))
        low, high = np.quantile((b - a)[draws].mean(axis=1), [0.025, 0.975])
        assert found.gain is not None
        assert found.mean == pytest.approx(b.mean(), abs=1e-12)
        assert found.gain.gain == pytest.approx((b - a).mean(), abs=1e-12)
        # Two bootstraps of the same pairs differ by their own noise alone.
        width = high - low
        assert (found.gain.low, found.gain.high) == pytest.approx((low, high), abs=0.05 * width)
    gain = cell(result, "shapes/pass", 1).gain
    assert gain is not None
    assert page.has(f"{100 * gain.gain:+.1f} points, {100 * gain.low:+.1f} to {100 * gain.high:+.1f}, n = 60")


def test_each_task_of_a_pass_column_has_its_own_difference(tmp_path: Path) -> None:
    result, _ = compared(tmp_path, PLAIN.write(tmp_path), OTHER.write(tmp_path))
    a, b = (np.array(kind.evaluation(30)["columns"]["shapes/pass"], dtype=float) for kind in (PLAIN, OTHER))
    for number, task in enumerate(TASKS):
        found = cell(result, "shapes/pass", 1, task=task)
        assert found.gain is not None
        assert found.gain.gain == pytest.approx((b - a)[number::6].mean(), abs=1e-12)
        assert found.mean == pytest.approx(b[number::6].mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("gain", "low", "high", "told"),
    [
        (0.0419, 0.02483, 0.059712, ("+0.0419", "+0.0248 to +0.0597")),
        (1.2e-5, -0.01, 0.01002, ("+0.0000", "-0.0100 to +0.0100")),
        (12.34, 11.99, 12.7, ("+12.3", "+12.0 to +12.7")),
        (0.0, 0.0, 0.0, ("+0", "+0 to +0")),
    ],
)
def test_an_interval_has_the_digits_of_its_difference(
    gain: float, low: float, high: float, told: tuple[str, str]
) -> None:
    assert difference("hps", PairedGain(1.0, 1.0 + gain, gain, low, high, 60)) == told


def test_looks_are_neither_good_nor_bad(tmp_path: Path) -> None:
    a, b = PLAIN.write(tmp_path), OTHER.write(tmp_path)
    _, page = compared(tmp_path, a, b)
    coloured = [attributes.get("class") for tag, attributes in page.tags if tag == "b"].count("up")
    for folder in (a, b):
        edit_config(folder, "rewards.shapes.judge", "appearance")
    result, page = compared(tmp_path, a, b)
    assert {row.column for row in result.standings[-1].rows if row.neutral} == {"shapes", "shapes/pass"}
    assert coloured > 0
    assert not {"up", "down"} & {attributes.get("class") for tag, attributes in page.tags if tag == "b"}


def test_a_score_that_is_one_of_its_judges_columns_is_shown_once(tmp_path: Path) -> None:
    a, b = PLAIN.write(tmp_path), OTHER.write(tmp_path)

    def graded_by_pass(record: dict[str, Any]) -> None:
        record["columns"]["shapes"] = record["columns"]["shapes/pass"]

    for file in (a / "evaluations").iterdir():
        edit_json(file, graded_by_pass)
    columns = {row.column for row in compared(tmp_path, a, b)[0].standings[-1].rows}
    assert columns == {"shapes", "shapes/pass", "hps"}  # in the other run they differ
    for file in (b / "evaluations").iterdir():
        edit_json(file, graded_by_pass)
    result, page = compared(tmp_path, a, b)
    assert {row.column for row in result.standings[-1].rows} == {"shapes/pass", "hps"}
    assert page.has("Held out: shapes/pass")
    assert "Held out: shapes" not in page.text.replace("Held out: shapes/pass", "")


def test_the_page_says_what_the_intervals_do_not_know(tmp_path: Path) -> None:
    _, page = compared(tmp_path, PLAIN.write(tmp_path), OTHER.write(tmp_path))
    assert page.has("know nothing of what other training seeds would have given", "about 1 in 20 is coloured by chance")
    assert page.has("Name")
    assert not page.has("Recipe")


def test_equal_runs_differ_by_nothing(tmp_path: Path) -> None:
    result, page = compared(tmp_path, PLAIN.write(tmp_path), PLAIN.write(tmp_path / "again"))
    gains = [cells.gain for row in result.standings[0].rows for cells in row.cells[1:] if cells]
    assert len(gains) == 9  # three columns and six tasks
    assert all(gain and (gain.gain, gain.low, gain.high) == (0, 0, 0) for gain in gains)
    assert result.settings == []
    assert page.has("None: the runs have equal settings.")
    assert result.notes == []


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    result, _ = compared(tmp_path, PLAIN.write(tmp_path / "first"), PLAIN.write(tmp_path / "second"))
    assert [track.label for track in result.tracks] == ["first/plain-seed0", "second/plain-seed0"]


def test_the_last_common_evaluation_stands_beside_each_runs_last(tmp_path: Path) -> None:
    longer = replace(OTHER, evaluations=(0, 15, 30))
    shorter = replace(PLAIN, evaluations=(0, 15), iterations=20, status="running")
    result, page = compared(tmp_path, longer.write(tmp_path), shorter.write(tmp_path))
    assert [table.iterations for table in result.standings] == [[15, 15], [30, 15]]
    expected = np.mean(longer.evaluation(15)["columns"]["shapes"])
    assert cell(result, "shapes", 0, table=0).mean == pytest.approx(expected, abs=1e-12)
    assert page.has("20 of 120", "running", "after 30 iterations")


def test_only_shared_prompts_count(tmp_path: Path) -> None:
    a, b = PLAIN.write(tmp_path), OTHER.write(tmp_path)

    def last_40_backwards(record: dict[str, Any]) -> dict[str, Any]:
        rows = range(59, 19, -1)
        lists = {name: [record[name][row] for row in rows] for name in ("prompt_ids", "texts", "tasks")}
        tables = {n: {k: [v[row] for row in rows] for k, v in record[n].items()} for n in ("columns", "valid")}
        return {**record, **lists, **tables}

    for file in (b / "evaluations").iterdir():
        edit_json(file, last_40_backwards)
    result, page = compared(tmp_path, a, b)
    old, new = (np.array(kind.evaluation(30)["columns"]["shapes"])[20:] for kind in (PLAIN, OTHER))
    assert cell(result, "shapes", 0).mean == pytest.approx(old.mean(), abs=1e-12)
    gain = cell(result, "shapes", 1).gain
    assert gain is not None
    assert (gain.n, gain.gain) == (40, pytest.approx((new - old).mean(), abs=1e-12))
    assert page.has("plain-seed0 measured 60 held-out prompts, of which the 40 that all runs share count")


def test_other_prompts_are_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    a, b, c = PLAIN.write(tmp_path), OTHER.write(tmp_path), replace(PLAIN, name="third").write(tmp_path)
    for file in (b / "evaluations").iterdir():
        edit_json(file, lambda record: {**record, "texts": [text + "!" for text in record["texts"]]})
    result, page = compared(tmp_path, a, b, c)
    assert page.has("other-seed0 measured other held-out prompts than plain-seed0, none in common: left out.")
    assert result.standings[-1].iterations == [30, None, 30]
    assert all(row.cells[1] is None for row in result.standings[-1].rows)
    assert page.has("Reward: shapes", "not measured")


def test_another_sampling_keeps_the_means_and_loses_the_pairs(tmp_path: Path) -> None:
    folders = [PLAIN.write(tmp_path), OTHER.write(tmp_path)]
    for folder, steps in zip(folders, (8, 16), strict=True):
        sampling = {"seed": 1234, "steps": steps, "latent_shape": [16, 4, 4]}
        for file in (folder / "evaluations").iterdir():
            edit_json(file, lambda record, sampling=sampling: {**record, "sampling": sampling})
    result, page = compared(tmp_path, *folders)
    assert page.has("other-seed0 was sampled otherwise than plain-seed0 (steps 8 and 16): no paired differences.")
    found = cell(result, "shapes", 1)
    assert found.gain is None
    assert found.mean == pytest.approx(np.mean(OTHER.evaluation(30)["columns"]["shapes"]), abs=1e-12)


@pytest.mark.parametrize(
    ("setting", "value", "paired"),
    [
        ("threshold", 0.5, {"shapes": False, "shapes/pass": True}),
        ("options", {"version": 2}, {"shapes": False, "shapes/pass": False}),
        ("options", {"batch_size": 2}, {"shapes": True, "shapes/pass": True}),
        ("weight", 0.5, {"shapes": True, "shapes/pass": True}),
    ],
)
def test_a_column_is_paired_where_the_judge_is_the_same(
    tmp_path: Path, setting: str, value: Any, paired: dict[str, bool]
) -> None:
    a, b = PLAIN.write(tmp_path), OTHER.write(tmp_path)
    edit_config(b, f"rewards.shapes.{setting}", value)
    result, _ = compared(tmp_path, a, b)
    assert {column: cell(result, column, 1).gain is not None for column in paired} == paired
    assert cell(result, "hps", 1).gain is not None
    assert any("shapes is not the same judge" in note for note in result.notes) is not all(paired.values())


def charts_of(page: Page) -> list[dict[str, Any]]:
    return json.loads(page.scripts[0])["charts"]


def test_rewards_are_drawn_by_iteration_and_at_equal_numbers_of_samples(tmp_path: Path) -> None:
    a, b = PLAIN.write(tmp_path), replace(OTHER, iterations=10).write(tmp_path)
    edit_metrics(b, lambda r: {**r, "samples/total": 48, "reward/shapes/mean": float(r["iteration"])})
    charts = [
        c for c in charts_of(compared(tmp_path, a, b)[1]) if c["series"][-1]["values"] == [float(i) for i in range(10)]
    ]
    by_iteration, by_samples = charts
    assert [series["x"] for series in by_iteration["series"]] == [list(range(30)), list(range(10))]
    assert [series["x"] for series in by_samples["series"]] == [
        [96 * (i + 1) for i in range(30)],
        [48 * (i + 1) for i in range(10)],
    ]
    assert by_samples["x"] == sorted({x for series in by_samples["series"] for x in series["x"]})


def test_a_held_out_curve_lies_at_the_samples_scored_until_then(tmp_path: Path) -> None:
    a, b = (replace(kind, evaluations=(0, 10, 30)).write(tmp_path) for kind in (PLAIN, OTHER))
    edit_metrics(b, lambda r: {**r, "samples/total": 48})
    _, page = compared(tmp_path, a, b)
    placed = [[s["x"] for s in chart["series"]] for chart in charts_of(page) if len(chart["series"][0]["x"]) == 3]
    assert [[0, 10, 30], [0, 10, 30]] in placed
    assert [[0, 960, 2880], [0, 480, 1440]] in placed


def test_a_run_keeps_its_color_where_others_lack_a_metric(tmp_path: Path) -> None:
    a, b = PLAIN.write(tmp_path), OTHER.write(tmp_path)
    edit_metrics(b, lambda r: {**r, "train/kl": 0.1})
    _, page = compared(tmp_path, a, b)
    alone = [chart["series"] for chart in charts_of(page) if len(chart["series"]) == 1]
    assert {(s["name"], s["color"]) for series in alone for s in series} == {("other-seed0", 1)}


def test_pictures_of_the_same_prompts_stand_in_one_row(tmp_path: Path) -> None:
    a, b = DRAWN.write(tmp_path), replace(DRAWN, name="other", pictures=(0, 15)).write(tmp_path)
    result, page = compared(tmp_path, a, b)
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    files = [f / "samples" / n / f"{k}.png" for k in range(3) for f, n in ((a, "000030"), (b, "000015"))]
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert embedded == [file.read_bytes() for file in files]
    assert result.notes == []


def test_clips_are_lined_up_too(tmp_path: Path) -> None:
    kinds = [replace(DRAWN, name=name, frames=3, prompts_drawn=2) for name in ("a", "b")]
    _, page = compared(tmp_path, *(kind.write(tmp_path) for kind in kinds))
    strips = [a for tag, a in page.tags if tag == "img" and a.get("data-frames") == "3"]
    assert len(strips) == 4
    assert page.has("All clips run in step: 3 frames")


@pytest.mark.parametrize(
    ("setting", "value", "note"),
    [
        ("evaluation.seed", 7, "The samples of other-seed0 are left out: evaluation.seed=7, other than plain-seed0."),
        ("model.height", 128, "The samples of other-seed0 are left out: model.height=128, other than plain-seed0."),
    ],
)
def test_pictures_from_other_noise_are_left_out(tmp_path: Path, setting: str, value: int, note: str) -> None:
    a, b = DRAWN.write(tmp_path), replace(DRAWN, name="other").write(tmp_path)
    edit_config(b, setting, value)
    result, page = compared(tmp_path, a, b)
    assert note in result.notes
    assert not any(tag == "img" for tag, _ in page.tags)


def test_only_rows_of_equal_prompts_are_drawn(tmp_path: Path) -> None:
    a, b = DRAWN.write(tmp_path), replace(DRAWN, name="other", prompt="something else").write(tmp_path)
    result, page = compared(tmp_path, a, b)
    assert [tag for tag, _ in page.tags].count("img") == 4
    assert "Pictures of 2 of 3 sample prompts: the others are not the same in all runs." in result.notes


def test_a_run_that_has_only_begun_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    begun = replace(PLAIN, name="begun", iterations=1, evaluations=(), status="running").write(tmp_path)
    (begun / "run.json").write_text('{"status": "runn')
    result, page = compared(tmp_path, begun, OTHER.write(tmp_path))
    assert result.standings[0].iterations == [None, 30]
    assert page.has(
        "begun-seed0 has no held-out evaluation.", "differences are therefore against other-seed0", "unknown"
    )


def test_settings_that_cannot_be_read_are_left_out_and_named(tmp_path: Path) -> None:
    a, b = PLAIN.write(tmp_path), OTHER.write(tmp_path)
    edit_config(b, "optimizer.learning_rate", "fast")
    result, page = compared(tmp_path, a, b)
    assert result.settings == []
    assert page.has("The settings are not compared: those of other-seed0 cannot be read")
    assert not page.has("Settings that differ")
    assert cell(result, "shapes", 1).gain is not None


def test_a_run_that_counted_no_samples_is_named(tmp_path: Path) -> None:
    a, b = PLAIN.write(tmp_path), OTHER.write(tmp_path)
    edit_metrics(b, lambda r: {key: value for key, value in r.items() if key != "samples/total"})
    result, _ = compared(tmp_path, a, b)
    assert "other-seed0 did not count its samples: it is not drawn by samples." in result.notes


def test_hostile_names_and_prompts_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)<img src=x onerror=alert(1)><!--"
    a = replace(DRAWN, name=hostile, prompt=hostile + "</script>").write(tmp_path)
    b = replace(DRAWN, name="b", prompt=hostile + "</script>").write(tmp_path)
    for folder in (a, b):
        edit_metrics(folder, lambda r: {**r, f"reward/{hostile}/mean": 0.5})
        info = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**info, "status": hostile}))
    result, page = compared(tmp_path, a, b)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert {(x["src"] or "")[:10] for tag, x in page.tags if tag == "img"} == {"data:image"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(hostile) > 5
    assert charts_of(page)[0]["series"][0]["name"] == result.tracks[0].label == f"{hostile}-seed0"


def test_the_policy_lets_this_script_run_and_no_other(tmp_path: Path) -> None:
    _, page = compared(tmp_path, PLAIN.write(tmp_path), OTHER.write(tmp_path))
    [policy] = [x["content"] or "" for _, x in page.tags if x.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_the_terminal_and_json_say_what_the_page_says(tmp_path: Path) -> None:
    result, _ = compared(tmp_path, PLAIN.write(tmp_path), OTHER.write(tmp_path))
    told = json.loads(json.dumps(as_json(result), allow_nan=False))
    gain = cell(result, "shapes/pass", 1).gain
    assert gain is not None
    [row] = [r for r in told["held_out"][-1]["rows"] if (r["column"], r["task"]) == ("shapes/pass", None)]
    assert row["runs"]["other-seed0"]["gain"] == gain.gain
    assert "gain" not in row["runs"]["plain-seed0"]
    assert [run["samples"] for run in told["runs"]] == [2880, 2880]
    assert told["settings"] == {}  # names tell runs apart and are in the table of runs
    table = as_table(result)
    assert f"({100 * gain.gain:+.1f} points, {100 * gain.low:+.1f} to {100 * gain.high:+.1f}, n = 60)" in table
    assert table.splitlines()[-1] == f"page: {tmp_path / 'compare.html'}"


def test_runs_with_nothing_in_common_are_refused_by_both_names(tmp_path: Path) -> None:
    a, b = PLAIN.write(tmp_path), replace(OTHER, evaluations=()).write(tmp_path)
    edit_metrics(b, lambda r: {k.replace("/shapes/", "/x/").replace("/hps/", "/y/"): v for k, v in r.items()})
    with pytest.raises(
        CheckpointError, match="cannot compare plain-seed0 with other-seed0: they share neither"
    ) as found:
        compare_runs([a, b], tmp_path / "compare.html")
    assert "plain-seed0 has 60 held-out prompts and the training rewards hps, shapes" in str(found.value)
    assert "other-seed0 has 0 held-out prompts and the training rewards x, y" in str(found.value)
    assert not (tmp_path / "compare.html").exists()


def test_the_same_run_twice_fewer_than_two_and_no_run_are_refused(tmp_path: Path) -> None:
    folder, out = PLAIN.write(tmp_path), tmp_path / "compare.html"
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.yaml").write_text("{")
    for paths, message in (
        ([folder, tmp_path / "link"], r"plain-seed0 and .*link are the same run"),
        ([folder], r"plain-seed0 alone has nothing to be compared with"),
        ([], "nothing alone has nothing"),
        ([folder, tmp_path], r"holds no config\.yaml"),
        ([folder, tmp_path / "torn"], r"torn/config\.yaml is no YAML"),
    ):
        with pytest.raises(CheckpointError, match=message):
            compare_runs(paths, out)
    assert not out.exists()


def test_the_command_prints_the_table_and_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dancegrpo.cli import main

    a, b, out = PLAIN.write(tmp_path), OTHER.write(tmp_path), tmp_path / "new" / "page.html"
    monkeypatch.setattr("sys.argv", ["dancegrpo", "compare", str(a), str(b), "--out", str(out), "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(out)
    assert out.is_file()
    monkeypatch.setattr("sys.argv", ["dancegrpo", "compare", str(a)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def browser() -> Iterator[Any]:
    chromium = pytest.importorskip("chromium")
    if chromium.CHROMIUM is None or chromium.DRIVER is None:
        pytest.skip("Chromium or chromedriver is not installed (apt-get install chromium chromium-driver)")
    driver = chromium.start_chromium(browser="ALL", performance="ALL")
    yield driver
    driver.quit()


def test_in_a_browser_the_page_is_quiet_and_its_curves_are_drawn_by_iteration_or_samples(
    tmp_path: Path, browser: Any
) -> None:
    kinds = [replace(DRAWN, name=name, frames=frames) for name, frames in (("a", 3), ("b", 3))]
    folders = [kind.write(tmp_path) for kind in kinds]
    edit_metrics(folders[1], lambda r: {**r, "samples/total": 50})
    result, _ = compared(tmp_path, *folders)
    browser.get(result.page.as_uri())
    drawn = (
        "return [...document.querySelectorAll('.plot')].map(p => p.offsetWidth ? p.querySelectorAll('path').length : 0)"
    )
    by_iteration = browser.execute_script(drawn)
    browser.find_element("id", "by-samples").click()
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    by_samples = browser.execute_script(drawn)
    assert all((a > 0) is not (b > 0) for a, b in zip(by_iteration, by_samples, strict=True))
    assert any(by_iteration)
    plot = next(p for p in browser.find_elements("css selector", ".by-samples .plot") if p.is_displayed())
    plot.send_keys("\ue010")  # End: 2,880 samples, which the second run never scored
    lines = plot.find_element("class name", "tooltip").text.splitlines()
    assert lines[0] == "samples scored: 2880"
    assert lines[2] == f"b-seed0 {MISSING}"
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
