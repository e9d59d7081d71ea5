"""What a study's page says: means over seeds, verdicts, curves, and that it is safe and whole."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dancegrpo.report.curves import MISSING
from dancegrpo.studies import Study, markdown_table, reproduce, write_page
from dancegrpo.studies.pages import render, summary_line
from dancegrpo.studies.summary import Evidence, cell_of, cell_text, near_sign, order_sign, points
from stub_runner import StubRunner
from test_studies import RATE, TINY, study, tuned

CLAIMS = [
    {"text": "A is above B.", "column": "shapes", "higher": "a", "lower": "b"},
    {"text": "B is above A.", "column": "shapes", "higher": "b", "lower": "a"},
    {"text": "A is near B.", "column": "shapes", "near": ["a", "b"], "within": 0.05},
    {"text": "A is above the base.", "column": "shapes", "higher": "a", "lower": "base"},
]
FINAL = {("a", 0): 0.61, ("a", 1): 0.63, ("a", 2): 0.62, ("b", 0): 0.41, ("b", 1): 0.40, ("b", 2): 0.45}


def score(job, column):
    return FINAL[job.arm, job.seed]


def made(out: Path, chosen: Study, scores=score, columns=("shapes",), seeds: int = 3) -> Evidence:
    reproduce([chosen], out=out, runner=StubRunner(scores, columns), seeds=seeds, workers=1, say=lambda line: None)
    return Evidence(chosen, out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    chosen, out = study(claims=CLAIMS), tmp_path_factory.mktemp("study")
    made(out, chosen)
    return chosen, out


def test_mean_and_deviation_over_seeds(finished):
    chosen, out = finished
    table = Evidence(chosen, out).table(None)
    for arm in ("a", "b"):
        values = [FINAL[arm, seed] for seed in range(3)]
        cell = table[arm]["shapes"]
        assert cell.mean == pytest.approx(np.mean(values), abs=1e-6)
        assert cell.std == pytest.approx(np.std(values, ddof=1), abs=1e-6)
        assert cell.n == 3
    assert [table[arm]["shapes"].best for arm in ("base", "a", "b")] == [False, True, False]


def test_a_base_arm_is_the_start_of_the_first_trained_one(finished):
    chosen, out = finished
    assert Evidence(chosen, out).values("base", None, "shapes") == pytest.approx({0: 0.25, 1: 0.25, 2: 0.25})


def test_one_seed_has_no_deviation():
    cell = cell_of([0.5])
    assert (cell.mean, cell.std, cell.n) == (0.5, None, 1)
    assert cell_of([]) is None


def test_a_column_without_a_better_side_has_no_best(tmp_path):
    table = made(tmp_path, study(neutral=["shapes"])).table(None)
    assert not any(cells["shapes"].best for cells in table.values())


@pytest.mark.parametrize(
    ("differences", "sign"),
    [
        ([0.1, 0.12, 0.11], "holds"),
        ([-0.1, -0.12, -0.11], "does not hold"),
        ([0.1, -0.01, 0.1], "undecided"),  # the seeds disagree
        ([0.001, 0.5], "undecided"),  # mean 0.2505, standard error 0.2495
        ([0.0, 0.0, 0.0], "undecided"),
        ([0.4], "undecided"),
        ([], "undecided"),
    ],
)
def test_the_sign_of_an_order(differences, sign):
    assert order_sign(differences) == sign


@pytest.mark.parametrize(
    ("differences", "sign"),
    [
        ([0.01, -0.01, 0.0], "holds"),  # mean 0, twice the standard error 0.0115
        ([0.2, 0.21, 0.19], "does not hold"),
        ([0.06, 0.0, 0.03], "undecided"),  # mean 0.03, twice the standard error 0.035
        ([0.0], "undecided"),
    ],
)
def test_the_sign_of_a_nearness(differences, sign):
    assert near_sign(differences, 0.05) == sign


def test_verdicts_of_a_study(finished):
    chosen, out = finished
    verdicts = Evidence(chosen, out).verdicts()
    assert [verdict.sign for verdict in verdicts] == ["holds", "does not hold", "does not hold", "holds"]
    expected = [FINAL["a", seed] - FINAL["b", seed] for seed in range(3)]
    assert verdicts[0].differences == pytest.approx(expected, abs=1e-6)
    assert "+0.200 ± 0.030 over 3 seeds; above 0 in 3 of 3" in verdicts[0].detail
    assert "within 0.05 in 0 of 3" in verdicts[2].detail
    assert summary_line(verdicts) == "2 of 4 claims hold here, 2 do not"


def test_a_claim_is_asked_in_its_condition_alone(tmp_path):
    places = {"many": {"label": "Many"}, "few": {"label": "Few", "settings": ["prompts.per_iteration=2"]}}
    claims = [CLAIMS[0] | {"condition": "few"}, CLAIMS[3]]
    verdicts = made(tmp_path, study(conditions=places, claims=claims), seeds=2).verdicts()
    asked = [(verdict.claim.text, verdict.condition) for verdict in verdicts]
    assert asked == [("A is above B.", "few"), ("A is above the base.", "many"), ("A is above the base.", "few")]


def test_curves_are_means_over_equal_shares_of_the_iterations(tmp_path):
    evidence = made(tmp_path, study(settings=["iterations=100", *TINY[1:]]), seeds=2)
    runs = list(evidence.of("a", None).values())
    x, rows = points(runs, "reward/shapes/mean")
    raw = np.array([run.curves["reward/shapes/mean"] for run in runs])
    edges = [i * 100 // 40 for i in range(41)]
    for share, (start, stop) in enumerate(pairwise(edges)):
        assert x[share] == pytest.approx(np.mean([256 * (i + 1) for i in range(start, stop)]), abs=0.5)
        assert [row[share] for row in rows] == pytest.approx(raw[:, start:stop].mean(axis=1))


def test_bands_are_one_deviation_of_the_seeds(finished):
    chosen, out = finished
    (chart,) = Evidence(chosen, out).charts()
    ends = np.array([FINAL["a", seed] for seed in range(3)])
    first = next(series for series in chart.series if series.name == "A")
    assert chart.x == [256, 512, 768, 1024]
    assert first.values[-1] == pytest.approx(ends.mean(), abs=1e-5)
    assert first.high[-1] - first.low[-1] == pytest.approx(2 * ends.std(ddof=1), abs=1e-5)


def test_held_out_scores_measured_on_the_way_are_a_curve(tmp_path):
    evidence = made(tmp_path, study(settings=[*TINY, "evaluation.every=2"]))
    held_out, _ = evidence.charts()
    first = next(series for series in held_out.series if series.name == "A")
    assert held_out.x == [0, 512, 1024]
    ends = [FINAL["a", seed] for seed in range(3)]
    assert first.values == pytest.approx([0.25, np.mean(ends), np.mean(ends)], abs=1e-6)


def test_arms_of_different_length_share_the_axis(tmp_path):
    arms = {"a": {"label": "A"}, "b": {"label": "B", "settings": ["iterations=8", f"{RATE}=0.002"]}}
    (chart,) = made(tmp_path, study(arms=arms)).charts()
    short, long = chart.series
    assert chart.x == [256 * (i + 1) for i in range(8)]
    assert [value is None for value in short.values] == [False] * 4 + [True] * 4
    assert None not in long.values


@pytest.mark.parametrize(
    ("column", "values", "text"),
    [
        ("shapes", [0.4, 0.42, 0.44], "0.420 ± 0.020"),
        ("shapes/pass", [0.4, 0.42, 0.44], "42.0% ± 2.0"),
        ("mq", [120.0, 140.0], "130 ± 14"),
        ("shapes", [0.5], "0.5"),
        ("shapes", [0.5, 0.5], "0.5 ± 0"),
    ],
)
def test_numbers_are_cut_where_the_deviation_is(column, values, text):
    assert cell_text(column, cell_of(values)) == text


def test_the_page_is_made_from_results_alone(finished, tmp_path):
    chosen, out = finished
    shutil.copytree(out / "tiny", tmp_path / "tiny")
    again = write_page(chosen, tmp_path).read_text(encoding="utf-8")
    assert again == (out / "tiny.html").read_text(encoding="utf-8")
    assert "data:image/webp;base64," in again


def test_the_page_has_its_parts(finished):
    chosen, out = finished
    page = render(chosen, out)
    for part in ("Held-out results", "What the paper found", "What we found", "Where they differ", "Training curves"):
        assert f">{part}</h2>" in page
    assert "dancegrpo reproduce tiny --seeds 3" in page
    assert "“B is above A” does not hold here" in page
    assert page.count("data:image/webp") == 3  # the base, a and b


def test_only_the_script_of_the_page_may_run(finished):
    chosen, out = finished
    page = render(chosen, out)
    told = re.search(r"script-src 'sha256-([^']+)'", page).group(1)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == told
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


HOSTILE = "</script><img src=//example.invalid onerror=alert(1)>"


def test_hostile_names_are_only_text(tmp_path):
    arms = {"base": {"label": HOSTILE, "base": True}, "a": {"label": f"A {HOSTILE}"}, "b": {"label": "B"}}
    claims = [CLAIMS[0] | {"text": HOSTILE}]
    fields = {"title": HOSTILE, "question": HOSTILE, "paper": HOSTILE, "columns": {"shapes": HOSTILE}}
    made(tmp_path, study(arms=arms, claims=claims, **fields))
    page = (tmp_path / "tiny.html").read_text(encoding="utf-8")
    assert "<img src=//example" not in page
    assert "&lt;img src=//example" in page
    assert page.count("<script") == 2


def test_the_choice_of_tuning_is_shown(tmp_path):
    made(tmp_path, tuned(), lambda job, column: 0.9 - abs(job.config.optimizer.learning_rate - 0.002))
    evidence = Evidence(tuned(), tmp_path)
    assert [(one.candidate, one.chosen) for one in evidence.tried()] == [
        (f"{RATE} = 0.001", False),
        (f"{RATE} = 0.002", True),
        (f"{RATE} = 0.004", False),
    ]
    assert '<b class="up">chosen</b>' in render(tuned(), tmp_path)


def test_stale_results_are_left_out_and_named(finished, tmp_path):
    chosen, out = finished
    shutil.copytree(out / "tiny", tmp_path / "tiny")
    evidence = Evidence(study(settings=[*TINY, "rollout.noise_level=0.5"]), tmp_path)
    assert len(evidence.stale) == 6
    assert evidence.runs == []


def test_a_failed_seed_is_named_on_the_page(tmp_path):
    runner = StubRunner(score)
    runner.fails = {"tiny a seed 1": "dancegrpo: samples are NaN"}
    reproduce([study()], out=tmp_path, runner=runner, workers=1, say=lambda line: None)
    page = (tmp_path / "tiny.html").read_text(encoding="utf-8")
    assert "seed 1, ended in an error: dancegrpo: samples are NaN" in page
    assert Evidence(study(), tmp_path).table(None)["a"]["shapes"].n == 2


def test_the_markdown_table_has_the_papers_numbers_beside_ours(tmp_path):
    made(tmp_path, study(published={"a": {"shapes": 0.365}}))
    assert markdown_table(study(published={"a": {"shapes": 0.365}}), tmp_path).splitlines() == [
        "| | reward, paper | ours |",
        "|---|---|---|",
        f"| Base | {MISSING} | 0.25 ± 0 |",
        "| A | 0.365 | **0.620 ± 0.010** |",
        f"| B | {MISSING} | 0.420 ± 0.026 |",
    ]


def test_a_bar_in_a_label_does_not_break_the_markdown_table(tmp_path):
    arms = {"a": {"label": "A | B"}}
    made(tmp_path, study(arms=arms))
    assert "| A \\| B | **0.620 ± 0.010** |" in markdown_table(study(arms=arms), tmp_path)


def test_the_index_links_the_pages(tmp_path):
    made(tmp_path, study("one"))
    made(tmp_path, study("two"))
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'href="(\w+\.html)"', index) == ["one.html", "two.html"]
