"""What a study's page says: means over seeds, verdicts, curves, and that it is safe and whole."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dancegrpo.report.curves import MISSING
from dancegrpo.studies import Study, markdown_table, reproduce, write_page
from dancegrpo.studies.decisions import as_good_sign, order_sign, t_interval
from dancegrpo.studies.pages import command_of, render, summary_line
from dancegrpo.studies.summary import Evidence, cell_of, cell_text, points
from stub_runner import StubRunner
from test_studies import RATE, TINY, study, tuned

CLAIMS = [
    {"text": "A is above B.", "column": "shapes", "higher": "a", "lower": "b"},
    {"text": "B is above A.", "column": "shapes", "higher": "b", "lower": "a"},
    {"text": "B is as good as A.", "column": "shapes", "as_good": ["b", "a"], "within": 0.05},
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
        ([0.1, -0.01, 0.1], "undecided"),  # mean 0.063, half width 0.158
        ([0.02, 0.04, 0.03, 0.01], "holds"),  # mean 0.025, half width 3.18 * 0.0065 = 0.0205
        ([0.02, 0.04, 0.03, -0.01], "undecided"),  # mean 0.02, half width 3.18 * 0.0108 = 0.034
        ([0.1] * 20 + [-0.01], "holds"),  # one seed of the other sign among many
        ([0.10, 0.11], "undecided"),  # two seeds decide nothing
        ([0.0, 0.0, 0.0], "undecided"),
        ([0.4], "undecided"),
        ([], "undecided"),
    ],
)
def test_the_sign_of_an_order(differences, sign):
    assert order_sign(differences) == sign


def test_the_interval_is_that_of_the_t_test():
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(0).normal(0.1, 0.05, 5)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert t_interval(values[:2]) is None


@pytest.mark.parametrize(
    ("differences", "sign"),
    [
        ([0.01, -0.01, 0.0], "holds"),  # mean 0, half width 0.025
        ([0.2, 0.21, 0.19], "holds"),  # better is as good
        ([-0.2, -0.21, -0.19], "does not hold"),
        ([-0.06, 0.0, -0.03], "undecided"),  # mean -0.03, half width 0.075
        ([0.0, 0.0], "undecided"),
    ],
)
def test_the_sign_of_being_as_good(differences, sign):
    assert as_good_sign(differences, 0.05) == sign


def test_verdicts_of_a_study(finished):
    chosen, out = finished
    verdicts = Evidence(chosen, out).verdicts()
    assert [verdict.sign for verdict in verdicts] == ["holds", "does not hold", "does not hold", "holds"]
    expected = [FINAL["a", seed] - FINAL["b", seed] for seed in range(3)]
    assert verdicts[0].differences == pytest.approx(expected, abs=1e-6)
    # 4.303 * 0.030 / sqrt(3) = 0.0745
    assert "+0.200 ± 0.030 over 3 seeds (95% interval +0.125 to +0.275); above 0 in 3 of 3" in verdicts[0].detail
    assert "at most 0.05 short is as good" in verdicts[2].detail
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
        ("shapes", [0.5, 0.5], "0.5"),
        ("shapes", [0.1 + 0.2, 0.3, 0.3], "0.3"),  # equal but for rounding
    ],
)
def test_numbers_are_cut_where_the_deviation_is(column, values, text):
    assert cell_text(column, cell_of(values)) == text


def test_the_page_is_made_from_results_alone(finished, tmp_path):
    chosen, out = finished
    shutil.copytree(out / "tiny", tmp_path / "tiny")
    again = write_page(chosen, tmp_path).read_text(encoding="utf-8")
    assert again.replace(str(tmp_path), str(out)) == (out / "tiny.html").read_text(encoding="utf-8")
    assert "data:image/webp;base64," in again


def test_the_page_has_its_parts(finished):
    chosen, out = finished
    page = render(chosen, out)
    for part in ("Held-out results", "What the paper found", "What we found", "Where they differ", "Training curves"):
        assert f">{part}</h2>" in page
    assert "dancegrpo reproduce tiny --seeds 3" in page
    assert "“B is above A” does not hold here" in page
    assert ">Not decided</h2>" not in page
    assert page.count("data:image/webp") == 3  # the base, a and b


def test_what_is_not_decided_stands_apart_from_what_does_not_hold(finished, tmp_path):
    _, out = finished
    shutil.copytree(out / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "a.seed2.json").unlink()
    page = render(study(claims=CLAIMS[:2]), tmp_path)
    differ, open_ = (
        page.split(f">{part}</h2>")[1].split("</section>")[0] for part in ("Where they differ", "Not decided")
    )
    assert "B is above A" not in differ
    assert "“B is above A”" in open_


def test_the_headline_ranks_the_arms_by_the_main_column(finished):
    chosen, out = finished
    rows = Evidence(chosen, out).ranking(None)
    assert [row.arm for row in rows] == ["a", "b", "base"]
    assert [row.gain for row in rows] == [pytest.approx(0.37, abs=1e-6), pytest.approx(0.17, abs=1e-6), None]
    head = render(chosen, out).split('id="verdict"')[1].split("</section>")[0]
    assert re.findall(r"<li>(\w+) <b>", head) == ["A", "B", "Base"]
    assert "+0.37 over Base" in head
    assert "2 of 4 claims hold here, 2 do not" in head


def test_equal_bases_show_the_error_over_prompts(finished):
    chosen, out = finished
    # The stub's four values lie 0.1 from their mean: sqrt(4 / 3 * 0.01) / 2.
    assert "0.25 <small>(± 0.058 over prompts)</small>" in render(chosen, out)
    assert "± 0<" not in render(chosen, out)


def test_where_all_arms_tie_none_is_the_best(tmp_path):
    table = made(tmp_path, study(), lambda job, column: 0.25).table(None)
    assert not any(cells["shapes"].best for cells in table.values())


def test_the_papers_pass_rates_are_percentages_too(tmp_path):
    columns = {"shapes": "reward", "shapes/pass": "rate"}
    chosen = study(columns=columns, published={"a": {"shapes/pass": 0.421}})
    made(tmp_path, chosen, columns=("shapes", "shapes/pass"))
    assert "paper 42.1%" in render(chosen, tmp_path)
    assert "| 42.1% |" in markdown_table(chosen, tmp_path)


def test_the_command_names_file_and_folder_where_they_are_not_the_defaults(finished):
    chosen, _ = finished
    assert command_of(chosen, Path("reproduce"), 3) == "dancegrpo reproduce tiny --seeds 3"
    assert command_of(chosen, Path("my results"), 3) == "dancegrpo reproduce tiny --seeds 3 --results 'my results'"


def test_runs_of_several_commits_are_told(finished, tmp_path):
    chosen, out = finished
    assert "not all made by the same code" not in render(chosen, out)
    shutil.copytree(out / "tiny", tmp_path / "tiny")
    file = tmp_path / "tiny" / "a.seed0.json"
    file.write_text(re.sub(r'"commit": [^\n]*,\n', '"commit": "abc, def",\n', file.read_text()))
    page = render(chosen, tmp_path)
    assert "not all made by the same code: they span 3 commits (" in page


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
    page = render(tuned(), tmp_path)
    assert '<b class="up">chosen</b>' in page
    assert "best at the edge of the grid" not in page


@pytest.mark.parametrize(("best", "edge"), [(0.001, True), (0.002, False), (0.004, True)])
def test_a_choice_at_the_edge_of_the_grid_is_told(tmp_path, best, edge):
    evidence = made(
        tmp_path, tuned(), lambda job, column: 0.9 - abs(job.config.optimizer.learning_rate - best), seeds=1
    )
    (chosen,) = (one for one in evidence.tried() if one.chosen)
    assert chosen.edge is edge
    assert ("best at the edge of the grid" in render(tuned(), tmp_path)) is edge


def test_the_page_says_what_tuning_saw(tmp_path):
    places = {"many": {"label": "Many"}, "few": {"label": "Few", "settings": ["prompts.per_iteration=2"]}}
    chosen = tuned().model_copy(update={"conditions": study(conditions=places).conditions})
    made(tmp_path, chosen, lambda job, column: 0.5, seeds=1)
    page = render(chosen, tmp_path)
    assert "with 50% of the iterations on seed 1000" in page
    assert re.search(r"another draw of the held-out prompts, [0-2] of whose 2 are among the study's own\.", page)
    assert "Tuned on “Many” alone" in page


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


def without_evaluations(out: Path, arm: str, seed: int, keep) -> None:
    """Takes evaluations out of a kept result, as where a judge could score too few pictures."""
    file = next(file for file in (out / "tiny").glob("*.json") if file.name == f"{arm}.seed{seed}.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    result["evaluations"] = [one for one in result["evaluations"] if keep(one["iteration"])]
    file.write_text(json.dumps(result), encoding="utf-8")


def test_an_earlier_evaluation_never_stands_for_the_last(tmp_path):
    made(tmp_path, study())
    without_evaluations(tmp_path, "a", 1, keep=lambda iteration: iteration == 0)
    evidence = Evidence(study(), tmp_path)
    assert evidence.values("a", None, "shapes") == {0: 0.61, 2: 0.62}
    assert "a, seed 1, has no held-out score after its last iteration" in render(study(), tmp_path)


def test_a_held_out_curve_pairs_seeds_by_iteration(tmp_path):
    chosen = study(settings=[*TINY, "evaluation.every=1"])
    made(tmp_path, chosen)
    without_evaluations(tmp_path, "a", 1, keep=lambda iteration: iteration != 1)
    held_out, _ = Evidence(chosen, tmp_path).charts()
    first = next(series for series in held_out.series if series.name == "A")
    known = dict(zip(held_out.x, first.values, strict=True))
    ends = [FINAL["a", seed] for seed in range(3)]
    assert known[0] == pytest.approx(0.25, abs=1e-6)
    assert known[held_out.x[-1]] == pytest.approx(np.mean(ends), abs=1e-6)


def test_the_markdown_table_has_the_papers_numbers_beside_ours(tmp_path):
    made(tmp_path, study(published={"a": {"shapes": 0.365}}))
    assert markdown_table(study(published={"a": {"shapes": 0.365}}), tmp_path).splitlines() == [
        "| | reward, paper | ours |",
        "|---|---|---|",
        f"| Base | {MISSING} | 0.25 |",
        "| A | 0.365 | **0.620 ± 0.010** |",
        f"| B | {MISSING} | 0.420 ± 0.026 |",
    ]


def test_a_bar_in_a_label_does_not_break_the_markdown_table(tmp_path):
    arms = {"a": {"label": "A | B"}}
    made(tmp_path, study(arms=arms))
    assert "| A \\| B | 0.620 ± 0.010 |" in markdown_table(study(arms=arms), tmp_path)


def test_the_index_links_the_pages(tmp_path):
    made(tmp_path, study("one"))
    made(tmp_path, study("two"))
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'href="(\w+\.html)"', index) == ["one.html", "two.html"]
