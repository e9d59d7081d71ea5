"""Studies as data, and the runner: what is run, in which order, what is kept, and what happens when it is cut short."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from dancegrpo import cli
from dancegrpo.config import load_config
from dancegrpo.errors import CheckpointError, ConfigError
from dancegrpo.studies import Study, load_study, reproduce, study_names
from dancegrpo.studies.checks import diverged
from dancegrpo.studies.pace import Pace
from dancegrpo.studies.plan import TUNING_SEED, Plan, config_key
from dancegrpo.studies.results import read_results
from stub_runner import StubRunner

TINY = ["iterations=4", "evaluation.num_prompts=2", "evaluation.samples=2"]
RATE = "optimizer.learning_rate"


def study(name: str = "tiny", **changes: object) -> Study:
    """Two arms and a base on shapes-flux."""
    data = {
        "name": name,
        "title": "Tiny",
        "question": "Which?",
        "paper": "Nothing.",
        "recipe": "shapes-flux",
        "settings": TINY,
        "columns": {"shapes": "reward"},
        "main": "shapes",
        "arms": {
            "base": {"label": "Base", "base": True},
            "a": {"label": "A", "settings": [f"{RATE}=0.001"]},
            "b": {"label": "B", "settings": [f"{RATE}=0.002"]},
        },
    }
    return Study.model_validate(data | changes)


def tuned(values: tuple[float, ...] = (0.001, 0.002, 0.004)) -> Study:
    arms = {"a": {"label": "A", "tune": {RATE: list(values)}}, "b": {"label": "B"}}
    return study(arms=arms)


def flat(job: object, column: str) -> float:
    return 0.5


def run(studies: Study | list[Study], out: Path, runner: StubRunner, **options: object):
    chosen = studies if isinstance(studies, list) else [studies]
    said: list[str] = []
    options = {"seeds": 2, "workers": 1, "say": said.append} | options
    outcome = reproduce(chosen, out=out, runner=runner, **options)
    return outcome, said


@pytest.mark.parametrize("name", study_names())
def test_every_shipped_study_resolves(name):
    shipped = load_study(name)
    plan = Plan(shipped)
    for arm in shipped.trained:
        for place in shipped.places:
            job = plan.job(arm, place, 0, {})
            judges = job.config.rewards
            for column in shipped.columns:
                assert column.split("/")[0] in judges, f"{arm} does not measure {column}"


def test_the_key_forgets_what_does_not_touch_the_computation():
    plain = load_config("shapes-flux")
    other = load_config("shapes-flux", ["name=x", "description=y", "output=z", "threads=3", "checkpoint.every=7"])
    assert config_key(plain) == config_key(other)
    assert config_key(plain) != config_key(load_config("shapes-flux", ["seed=1"]))
    assert config_key(plain) != config_key(load_config("shapes-flux", [f"{RATE}=0.5"]))


def test_the_key_knows_of_a_guard_that_interferes():
    config = load_config("shapes-flux", ["health.watch=none"])
    watched = load_config("shapes-flux", ["health.watch=alarms"])
    guarded = load_config("shapes-flux", ["health.watch=rollback"])
    assert config_key(config) == config_key(watched) != config_key(guarded)


def test_runs_go_seed_by_seed(tmp_path):
    runner = StubRunner(flat)
    run(study(), tmp_path, runner)
    assert runner.titles == ["tiny a seed 0", "tiny b seed 0", "tiny a seed 1", "tiny b seed 1"]


def test_studies_share_a_run(tmp_path):
    first, second = study("one"), study("two", arms={"x": {"label": "X", "settings": [f"{RATE}=0.001"]}})
    runner = StubRunner(flat)
    run([first, second], tmp_path, runner)
    assert len(runner.keys) == len(set(runner.keys)) == 4  # a and b by two seeds; x is a
    shared = read_results(tmp_path, second)["two/x.seed0.json"]
    assert (shared.arm, shared.key) == ("x", read_results(tmp_path, first)["one/a.seed0.json"].key)


def test_a_result_of_another_study_is_taken_over_without_its_run(tmp_path):
    run(study("one"), tmp_path / "runs", StubRunner(flat), results=tmp_path / "kept")
    second = study("two", arms={"x": {"label": "X", "settings": [f"{RATE}=0.001"]}})
    runner = StubRunner(flat)
    run([study("one"), second], tmp_path / "elsewhere", runner, results=tmp_path / "kept")
    assert runner.titles == []
    assert "two/x.seed1.json" in read_results(tmp_path / "kept", second)


def test_what_is_finished_is_not_run_again(tmp_path):
    run(study(), tmp_path, StubRunner(flat), seeds=1)
    runner = StubRunner(flat)
    run(study(), tmp_path, runner)
    assert runner.titles == ["tiny a seed 1", "tiny b seed 1"]


def test_a_run_that_ended_while_nobody_looked_is_kept(tmp_path):
    job = Plan(study()).job("a", None, 0, {})
    StubRunner(flat)(job, tmp_path / "runs" / job.key, tmp_path / "logs" / "x.log", 1)
    runner = StubRunner(flat)
    run(study(), tmp_path, runner, seeds=1)
    assert runner.titles == ["tiny b seed 0"]
    assert "tiny/a.seed0.json" in read_results(tmp_path, study())


def test_results_alone_are_enough(tmp_path):
    run(study(), tmp_path / "runs", StubRunner(flat), results=tmp_path / "kept")
    runner = StubRunner(flat)
    run(study(), tmp_path / "nowhere", runner, results=tmp_path / "kept")
    assert runner.titles == []


def test_rerun_ignores_the_results(tmp_path):
    run(study(), tmp_path / "runs", StubRunner(flat), results=tmp_path / "kept")
    runner = StubRunner(flat)
    run(study(), tmp_path / "nowhere", runner, results=tmp_path / "kept", rerun=True)
    assert len(runner.titles) == 4


def test_other_settings_make_a_result_stale(tmp_path):
    run(study(), tmp_path, StubRunner(flat), seeds=1)
    runner = StubRunner(flat)
    run(study(settings=[*TINY, "rollout.noise_level=0.5"]), tmp_path, runner, seeds=1)
    assert runner.titles == ["tiny a seed 0", "tiny b seed 0"]


def test_a_run_that_is_cut_is_taken_up_next_time(tmp_path):
    runner = StubRunner(flat)
    runner.cut = {"tiny a seed 0"}
    outcome, _ = run(study(), tmp_path, runner, seeds=1)
    assert outcome.exit_code == 1
    assert "before its last iteration" in outcome.failures[0]
    again = StubRunner(flat)
    assert run(study(), tmp_path, again, seeds=1)[0].exit_code == 0
    assert again.titles == ["tiny a seed 0"]


def test_a_failure_is_told_and_the_others_go_on(tmp_path):
    runner = StubRunner(flat)
    runner.fails = {"tiny a seed 0": "dancegrpo: the judge fell asleep"}
    outcome, said = run(study(), tmp_path, runner)
    assert len(runner.titles) == 4
    assert (outcome.exit_code, len(outcome.failures)) == (1, 1)
    assert "tiny a seed 0: dancegrpo: the judge fell asleep" in outcome.failures[0]
    assert any("the judge fell asleep" in line for line in said)
    again = StubRunner(flat)
    run(study(), tmp_path, again)
    assert again.titles == ["tiny a seed 0"]


def test_a_finished_run_counts_whatever_its_exit_code(tmp_path):
    class Complains(StubRunner):
        def __call__(self, job, folder, log, threads):
            return super().__call__(job, folder, log, threads) or 1

    outcome, _ = run(study(), tmp_path, Complains(flat), seeds=1)
    assert outcome.exit_code == 0
    assert len(read_results(tmp_path, study())) == 2


def test_each_run_has_the_commit_it_started_with(tmp_path, monkeypatch):
    told = iter(["c1", "c2"])
    monkeypatch.setattr(sys.modules["dancegrpo.studies.reproduce"], "commit", lambda: next(told))
    run(study(), tmp_path, StubRunner(flat), seeds=1)
    assert {file: result.commit for file, result in read_results(tmp_path, study()).items()} == {
        "tiny/a.seed0.json": "c1",
        "tiny/b.seed0.json": "c2",
    }


def test_the_time_left_has_a_part_for_the_start():
    pace = Pace()
    assert pace.seconds("a", 10) == 0
    pace.add("a", 10, 50.0)
    assert pace.seconds("a", 20) == pytest.approx(100)
    assert pace.seconds("b", 20) == pytest.approx(100)
    pace.add("a", 20, 80.0)  # 20 s + 3 s an iteration
    assert pace.seconds("a", 40) == pytest.approx(140)
    pace.add("b", 10, 50.0)
    pace.add("b", 20, 120.0)  # a straight line would start below 0
    assert pace.seconds("b", 30) == pytest.approx(30 * 170 / 30)


def test_progress_counts_runs(tmp_path):
    _, said = run(study(), tmp_path, StubRunner(flat))
    assert said[0].startswith("0 of 4 runs done")
    assert [line.split()[0] for line in said[1:]] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert "left" in said[1]
    assert "left" not in said[4]


def by_rate(best: float):
    return lambda job, column: 0.9 - abs(job.config.optimizer.learning_rate - best)


def test_tuning_comes_first_and_its_choice_is_used(tmp_path):
    runner = StubRunner(by_rate(0.002))
    run(tuned(), tmp_path, runner)
    assert runner.titles[:3] == [f"tiny a tuning {RATE}={rate}" for rate in (0.001, 0.002, 0.004)]
    results = read_results(tmp_path, tuned())
    for seed in (0, 1):
        assert results[f"tiny/a.seed{seed}.json"].tuned == {RATE: 0.002}
        assert results[f"tiny/a.seed{seed}.json"].settings[RATE] == 0.002
    assert results["tiny/b.seed0.json"].tuned == {}


def test_tuning_is_half_as_long_on_another_seed_and_other_prompts():
    job = Plan(tuned()).candidates("a")[0]
    assert (job.config.iterations, job.config.seed, job.config.evaluation.seed) == (2, TUNING_SEED, 4321)
    assert Plan(tuned()).job("a", None, 0, {}).config.evaluation.seed != 4321


def test_the_tuning_seed_cannot_be_studied(tmp_path):
    with pytest.raises(ConfigError, match=r"^--seeds 1001: use 1 to 1000; seed 1000 is kept for tuning$"):
        run(study(), tmp_path, StubRunner(flat), seeds=1001)


@pytest.mark.parametrize("kind", ["error", "nan"])
def test_a_candidate_without_a_score_counts_as_worst(tmp_path, kind):
    score = by_rate(0.004)
    runner = StubRunner(lambda job, column: None if kind == "nan" and "0.004" in job.title else score(job, column))
    if kind == "error":
        runner.fails = {f"tiny a tuning {RATE}=0.004": "NaN"}
    outcome, _ = run(tuned(), tmp_path, runner, seeds=1)
    assert outcome.exit_code == 0
    assert read_results(tmp_path, tuned())["tiny/a.seed0.json"].tuned == {RATE: 0.002}
    again = StubRunner(score)
    run(tuned(), tmp_path, again, seeds=1)
    assert again.titles == []


def test_a_candidate_that_failed_by_accident_is_tried_again_once_per_call(tmp_path):
    title = f"tiny a tuning {RATE}=0.004"
    for attempt in range(2):
        runner = StubRunner(by_rate(0.004))
        runner.fails = {title: "OSError: no space left on device"}
        assert run(tuned(), tmp_path, runner, seeds=1)[0].exit_code == 0
        assert runner.titles.count(title) == 1, attempt
        assert read_results(tmp_path, tuned())["tiny/a.seed0.json"].tuned == {RATE: 0.002}
    mended = StubRunner(by_rate(0.004))
    run(tuned(), tmp_path, mended, seeds=1)
    assert mended.titles == [title, "tiny a seed 0"]
    assert read_results(tmp_path, tuned())["tiny/a.seed0.json"].tuned == {RATE: 0.004}


@pytest.mark.parametrize(
    ("error", "final"),
    [
        ("loss is not finite", True),
        ("ValueError: non-finite gradient", True),
        ("samples are NaN", True),
        ("the judge fell asleep", False),
        ("no information on nanometres", False),
    ],
)
def test_divergence_is_told_from_accidents(error, final):
    assert diverged(error) is final


def test_an_arm_without_any_scored_candidate_fails_alone(tmp_path):
    runner = StubRunner(lambda job, column: None if job.candidate else 0.5)
    outcome, _ = run(tuned(), tmp_path, runner, seeds=1)
    assert runner.titles[3:] == ["tiny b seed 0"]
    assert outcome.failures == ["study tiny, arm a: no candidate of tuning has a score in shapes"]


def test_tuning_in_the_first_condition_serves_all(tmp_path):
    places = {"many": {"label": "Many"}, "few": {"label": "Few", "settings": ["prompts.per_iteration=2"]}}
    runner = StubRunner(by_rate(0.004))
    chosen = tuned().model_copy(update={"conditions": study(conditions=places).conditions})
    run(chosen, tmp_path, runner, seeds=1)
    assert [title for title in runner.titles if "tuning" in title and "few" in title] == []
    results = read_results(tmp_path, chosen)
    assert results["tiny/a.few.seed0.json"].tuned == results["tiny/a.many.seed0.json"].tuned == {RATE: 0.004}
    assert results["tiny/a.few.seed0.json"].settings["prompts.per_iteration"] == 2


def test_a_signal_stops_and_says_so(tmp_path):
    class Interrupted(StubRunner):
        def __call__(self, job, folder, log, threads):
            os.kill(os.getpid(), signal.SIGTERM)
            return 0  # as a run that was asked to stop and saved

    runner = Interrupted(flat)
    outcome, _ = run(study(), tmp_path, runner)
    assert outcome.exit_code == 143
    assert outcome.failures == []
    again = StubRunner(flat)
    run(study(), tmp_path, again)
    assert len(again.titles) == 4


def test_no_number_is_lost_in_the_result(tmp_path):
    run(study(), tmp_path, StubRunner(flat), seeds=1)
    result = read_results(tmp_path, study())["tiny/a.seed0.json"]
    last = result.evaluations[-1].columns["shapes"]
    assert result.column("shapes", start=True) == pytest.approx(0.25)
    assert last.mean == pytest.approx(0.5)
    assert last.error == pytest.approx((4 / 3 * 0.01) ** 0.5 / 2)  # four values 0.1 from their mean
    assert last.n == 4
    assert result.samples == [256, 512, 768, 1024]
    assert result.curves == {"reward/shapes/mean": pytest.approx([0.3125, 0.375, 0.4375, 0.5])}
    assert result.peak_memory_mb == 503
    assert (tmp_path / "tiny" / "a.seed0.webp").is_file()
    assert (tmp_path / "tiny" / "a.seed0.start.webp").is_file()
    assert not (tmp_path / "tiny" / "b.seed0.start.webp").exists()


def test_foreign_data_is_refused_in_one_line(tmp_path):
    run(study(), tmp_path, StubRunner(flat), seeds=1)
    (tmp_path / "tiny" / "other.json").write_text('{"median_gain": 0.1}')
    with pytest.raises(CheckpointError, match=r"other\.json is not a study's result: move it away") as error:
        run(study(), tmp_path, StubRunner(flat), seeds=1)
    assert "\n" not in str(error.value)


def test_a_result_of_an_arm_that_is_no_more_is_refused(tmp_path):
    run(study(), tmp_path, StubRunner(flat), seeds=1)
    with pytest.raises(CheckpointError, match="arm b, which study tiny does not have"):
        run(study(arms={"a": {"label": "A"}}), tmp_path, StubRunner(flat), seeds=1)


BAD = {
    "column of a claim": ({"claims": [{"text": "x", "column": "y", "higher": "a", "lower": "b"}]}, "claims names 'y'"),
    "arm of a claim": (
        {"claims": [{"text": "x", "column": "shapes", "higher": "c", "lower": "b"}]},
        "claims names 'c'",
    ),
    "half a claim": ({"claims": [{"text": "x", "column": "shapes", "higher": "a"}]}, "higher and lower, or as_good"),
    "main": ({"main": "hps"}, "main names 'hps'"),
    "only a base": ({"arms": {"base": {"label": "B", "base": True}}}, "give one that is trained"),
    "unknown field": ({"colums": {}}, "colums"),
    "name of an arm": ({"arms": {"../a": {"label": "A"}}}, "arms"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_study_is_told_in_one_line(tmp_path, mistake):
    changes, told = BAD[mistake]
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(study().model_dump(mode="json", exclude={"name"}) | changes))
    with pytest.raises(ConfigError) as error:
        load_study(str(file))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_do_not_fit_name_the_arm(tmp_path):
    arms = {"a": {"label": "A", "settings": ["rollout.gruop_size=3"]}}
    with pytest.raises(ConfigError, match=r"^study tiny, arm a: .*gruop_size"):
        run(study(arms=arms), tmp_path, StubRunner(flat))


UNMEASURED = {
    "judge": (
        {"settings": ["rewards.x={judge: hpss}"]},
        "arm a: judge 'hpss' of rewards.x is unknown (did you mean 'hps'?)",
    ),
    "path": ({"settings": ["rewards.x={judge: 'no_such:f'}"]}, "judge 'no_such:f' of rewards.x cannot be imported"),
    "column": ({"columns": {"shapes": "s", "hps/pass": "h"}}, "columns names 'hps/pass', but no judge is called hps"),
    "curve": ({"curve": "reward/hps/mean"}, "curve is 'reward/hps/mean', but no judge is called hps"),
}


@pytest.mark.parametrize("mistake", UNMEASURED)
def test_what_could_never_be_measured_is_refused_before_anything_runs(tmp_path, mistake):
    changes, told = UNMEASURED[mistake]
    runner = StubRunner(flat)
    with pytest.raises(ConfigError) as error:
        run(study(**changes), tmp_path, runner)
    assert told in str(error.value)
    assert str(error.value).startswith("study tiny, arm a: ")
    assert "\n" not in str(error.value)
    assert runner.titles == []


def command(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dancegrpo", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tabel2"], "unknown study 'tabel2': the nearest is table2"),
        (["absent.yaml"], "study absent.yaml: no such file"),
        (["table2", "--markdown"], "holds no results of study table2: run it first"),
        (["all", "--markdown"], "holds no results of study table2: run it first"),
        (["table2", "--seeds", 0], "--seeds 0: use 1 to 1000"),
        (["table2", "--workers", 0], "--workers 0: use 1 or more"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, capsys, tmp_path, words, told):
    code, _, err = command(monkeypatch, capsys, "reproduce", *words, "--out", tmp_path)
    assert code == 2
    assert told in err
    assert len(err.strip().splitlines()) == 1


def test_one_real_run_from_the_command_line(monkeypatch, capsys, tmp_path):
    tiny = ["iterations=1", "prompts.per_iteration=1", "rollout.group_size=2", "rollout.num_steps=4"]
    few = ["evaluation.num_prompts=2", "evaluation.samples=2", "update.micro_batch_size=8"]
    arms = {"base": {"label": "Base", "base": True}, "a": {"label": "A"}}
    real = study(settings=[*tiny, *few], arms=arms)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(real.model_dump(mode="json", exclude={"name"})))
    words = ["reproduce", file, "--seeds", 1, "--workers", 1, "--out", tmp_path / "out", "--json"]
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 0, err
    assert Path(json.loads(out)["pages"][0]) == tmp_path / "out" / "tiny.html"
    page = (tmp_path / "out" / "tiny.html").read_text(encoding="utf-8")
    assert f"dancegrpo reproduce {file} --seeds 1 --results {tmp_path / 'out'}" in page
    result = read_results(tmp_path / "out", real)["tiny/a.seed0.json"]
    run_dir = tmp_path / "out" / "runs" / result.key
    record = json.loads((run_dir / "evaluations" / "000001.json").read_text())
    assert result.column("shapes") == pytest.approx(sum(record["columns"]["shapes"]) / 2)
    assert result.samples == [2]
    assert load_config(run_dir / "config.yaml").threads == len(os.sched_getaffinity(0))  # all of them for one worker
