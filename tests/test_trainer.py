"""The loop end to end on a tiny random FLUX pipeline, and its resume to the last bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dancegrpo import load_config, train
from dancegrpo.errors import CheckpointError, ConfigError, RewardError
from dancegrpo.rewards import FunctionReward
from dancegrpo.run_folder import RunFolder
from dancegrpo.run_settings import resumed_config
from dancegrpo.trainer import Trainer
from toy import ToyPolicy

TIMED = ("seconds/", "memory/")


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def settings(tiny_flux_path, tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"a drawing of {n} dots\n" for n in range(7)))
    (tmp_path / "held.txt").write_text("one dot\ntwo dots\nthree dots\n")
    return {
        "name": "tiny",
        "iterations": 4,
        "threads": 1,
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_flux_path), "height": 32, "width": 32, "max_sequence_length": 16},
        "prompts": {"train": str(tmp_path / "train.txt"), "evaluation": str(tmp_path / "held.txt"), "per_iteration": 2},
        "rollout": {"group_size": 4, "num_steps": 4, "noise_level": 0.7, "shift": 1.5},
        "rewards": {"bright": {"judge": "test_trainer:brightness"}},
        "optimizer": {"learning_rate": 1e-3},
        "update": {"updates_per_rollout": 2},
        "ema": {"decay": 0.9},
        "evaluation": {"num_prompts": 3, "samples": 2, "every": 2},
        "checkpoint": {"every": 1, "keep": 2},
        "tracking": {"backend": "none"},
    }


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").iterdir())
    return load_file(newest / "weights.safetensors") | {
        f"ema.{n}": t for n, t in load_file(newest / "ema.safetensors").items()
    }


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    left, right = final_weights(a), final_weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_leaves_everything_in_its_folder(settings):
    run = train(load_config(settings)).run_dir
    assert [row["iteration"] for row in metrics(run)] == [0, 1, 2, 3]
    assert load_config(run / "config.yaml") == load_config(settings)
    assert sorted(p.name for p in (run / "evaluations").iterdir()) == ["000000.json", "000002.json", "000004.json"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["000001", "000003", "000004"]
    assert (run / "samples" / "000004" / "grid.png").is_file()
    assert "<html" in (run / "report.html").read_text()
    assert RunFolder(run).info()["status"] == "finished"


def test_every_rollouts_first_ratio_is_exactly_one(settings):
    rows = metrics(train(load_config(settings)).run_dir)
    assert [row["train/ratio_first"] for row in rows] == [1.0] * 4
    assert all(row["train/replay_difference"] <= 1e-6 for row in rows)


def test_the_same_seed_repeats_and_another_does_not(settings):
    a, b = (train(load_config(settings)).run_dir for _ in range(2))
    c = train(load_config(settings, ["seed=1"])).run_dir
    assert_same_run(a, b)
    assert metrics(a) != metrics(c)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(settings, kept, tmp_path):
    whole = train(load_config(settings)).run_dir
    part = train(load_config(settings, [f"iterations={kept}"]), out=tmp_path / "part").run_dir
    # What a kill leaves beyond the last checkpoint: lines of iterations that were not saved, the last one half-written.
    with (part / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": kept, "reward/bright/mean": 9.0}) + '\n{"iterat')
    train(resume=part, overrides=["iterations=4"])
    assert_same_run(whole, part)


def test_sigterm_finishes_the_iteration_and_saves(settings, tmp_path):
    stopping = {"calls": 0}

    def judge(images, prompts):
        stopping["calls"] += 1
        if stopping["calls"] == 3:  # before training once, then in the second iteration
            os.kill(os.getpid(), signal.SIGTERM)
        return images.mean(dim=(1, 2, 3))

    settings["evaluation"]["every"] = 0
    result = train(load_config(settings), rewards={"bright": judge}, out=tmp_path / "run")
    assert result.iterations == 2
    assert RunFolder(result.run_dir).info()["status"] == "stopped"
    assert max((result.run_dir / "checkpoints").iterdir()).name == "000002"


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(("best", "left"), [(True, ["000002", "000004"]), (False, ["000004"])])
def test_the_best_by_its_held_out_score_is_kept(settings, monkeypatch, best, left):
    from dancegrpo import evaluate
    from dancegrpo.inference import load_trained

    scores = iter([0.1, 0.5, 0.9, 0.3, 0.8])  # before the run, then after each iteration
    measured = evaluate.evaluate

    def scored(*args, **kwargs):
        record = measured(*args, **kwargs)
        return record | {"columns": {"bright": [next(scores)] * 3}}

    monkeypatch.setattr(evaluate, "evaluate", scored)
    settings["evaluation"]["every"] = 1
    settings["checkpoint"] = {"every": 0, "keep": 1, "best": best}
    settings["health"] = {"watch": "alarms"}  # which keeps none to go back to
    run = train(load_config(settings)).run_dir
    assert kept(run) == left
    assert load_trained(str(run)).iteration == 4
    assert load_trained(str(run), checkpoint="best").iteration == (2 if best else 4)
    with pytest.raises(CheckpointError, match="has no checkpoint of iteration 3: choose among"):
        load_trained(str(run), checkpoint="3")
    with pytest.raises(ConfigError, match="'newest': use best, latest, or after how many iterations"):
        load_trained(str(run), checkpoint="newest")


def full_after(monkeypatch, saves: set[int]) -> None:
    """A disk that is full at these iterations."""
    from dancegrpo.saver import Saver

    write = Saver._write

    def refuse(self, folder, held):
        if int(folder.name.split(".")[1]) in saves:
            raise OSError(28, "No space left on device")
        return write(self, folder, held)

    monkeypatch.setattr(Saver, "_write", refuse)


def test_a_full_disk_in_between_is_told_and_the_run_goes_on(settings, monkeypatch, capsys):
    full_after(monkeypatch, {2, 3})
    run = train(load_config(settings, ["checkpoint.keep=9"])).run_dir
    assert kept(run) == ["000001", "000004"]
    told = " ".join(capsys.readouterr().err.split())
    for iteration in ("000002", "000003"):
        assert f"checkpoints/{iteration}: No space left on device; free space on its disk: the run goes on" in told


def test_a_full_disk_at_the_end_is_one_line_and_a_resume_makes_it_up(settings, monkeypatch):
    settings["iterations"] = 3
    with monkeypatch.context() as patch:
        full_after(patch, {3})
        with pytest.raises(CheckpointError, match=r"000003: No space left on device; .* then go on with --resume"):
            train(load_config(settings), out=Path(settings["output"]) / "full")
    run = Path(settings["output"]) / "full"
    assert kept(run) == ["000001", "000002"]
    train(resume=run)
    assert_same_run(train(load_config(settings)).run_dir, run)


def test_resuming_with_other_settings_names_them(settings):
    run = train(load_config(settings, ["iterations=1"])).run_dir
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate \(0\.001 -> 0\.002\)"):
        train(resume=run, overrides=["optimizer.learning_rate=2e-3"])


def test_a_folder_that_is_in_use_is_refused(settings, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("precious")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        train(load_config(settings), out=tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.doc"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        train(resume=tmp_path)


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="no recipe given"):
        train()


def test_a_users_function_is_the_judge_and_its_failures_are_masked(settings, tmp_path):
    def moody(images, prompts):
        return [None if index % 4 == 0 else float(image.mean()) for index, image in enumerate(images)]

    row = metrics(train(load_config(settings, ["iterations=1"]), rewards={"moody": moody}).run_dir)[0]
    assert row["samples/masked"] == row["reward/moody/masked"] == 2
    assert row["samples/selected"] == 6


def test_a_judge_that_always_fails_stops_the_run_with_its_cause(settings):
    def broken(images, prompts):
        raise ValueError("out of tokens")

    with pytest.raises(RewardError, match="out of tokens"):
        train(load_config(settings), rewards={"broken": broken})


def test_learning_moves_the_reward(settings):
    longer = ["iterations=12", "rollout.group_size=16", "optimizer.learning_rate=3e-3", "evaluation.num_prompts=0"]
    rows = metrics(train(load_config(settings, longer), rewards={"bright": brightness}).run_dir)
    rewards = [row["reward/bright/mean"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 2 * rows[0]["reward/bright/group_std"]


def test_a_negative_prompt_that_would_do_nothing_is_refused(settings):
    settings["prompts"]["negative"] = "blurry"
    with pytest.raises(ConfigError, match=r"prompts\.negative='blurry' would do nothing"):
        train(load_config(settings))


class TrueGuided(ToyPolicy):
    """Guided by `true_cfg_scale`, as Qwen-Image is."""

    settings = ("true_cfg_scale",)


class TwoNetworks(ToyPolicy):
    """Steps 0 and 1 go to one network, the others to another."""

    def bucket(self, step: torch.Tensor) -> torch.Tensor:
        return (step > 1).long()


def test_an_idle_negative_prompt_names_the_scale_that_guides(settings, monkeypatch):
    monkeypatch.setattr("dancegrpo.trainer.load_policy", lambda *_, **__: TrueGuided())
    settings["prompts"]["negative"] = "blurry"
    with pytest.raises(ConfigError, match=r"at model\.true_cfg_scale=1 uses no classifier-free guidance"):
        Trainer(load_config(settings), {})


def micro_batches(monkeypatch, settings, policy, **timesteps) -> tuple[int, str]:
    """Of 4 samples and a micro-batch of 3: as derived, and as the plan says."""
    monkeypatch.setattr("dancegrpo.trainer.load_policy", lambda *_, **__: policy(num_steps=6))
    settings["rollout"] |= {"num_steps": 6, "timesteps": timesteps}
    settings["update"] = {"updates_per_rollout": 2, "micro_batch_size": 3}
    trainer = Trainer(load_config(settings), {"bright": FunctionReward(brightness, "bright")})
    return trainer.plan.derived()["micro_batches_per_update"], trainer.plan.text().split("pairs in ")[1].split(";")[0]


def test_micro_batches_are_counted_bucket_by_bucket(settings, monkeypatch):
    one = micro_batches(monkeypatch, settings, ToyPolicy, select="list", steps=[0, 1, 2])
    assert one == (4, "4 micro-batches")  # 12 pairs
    two = micro_batches(monkeypatch, settings, TwoNetworks, select="list", steps=[0, 1, 2])
    assert two == (5, "5 micro-batches")  # 8 pairs of one network in 3, 4 of the other in 2


def test_where_samples_draw_their_steps_micro_batches_are_bounded(settings, monkeypatch):
    drawn = {"select": "random", "fraction": 0.6}
    assert micro_batches(monkeypatch, settings, ToyPolicy, **drawn) == (4, "4 micro-batches")
    assert micro_batches(monkeypatch, settings, TwoNetworks, **drawn) == (4, "at least 4 micro-batches")


def test_a_resumed_run_may_ask_its_service_elsewhere_but_not_another_judge(tmp_path):
    def recipe(**options):
        return load_config("shapes-flux", [f"rewards.far={{judge: service, options: {options}}}"])

    class Started:
        path = tmp_path

        def config(self):
            return recipe(urls=["http://127.0.0.1:1"], retries=1, batch_size=8)

    moved = recipe(urls=["http://127.0.0.1:2"], retries=9, batch_size=8)
    assert resumed_config(Started(), moved, (), None) == moved
    with pytest.raises(CheckpointError, match=r"rewards\.far\.options\.batch_size \(8 -> 4\)"):
        resumed_config(Started(), recipe(urls=["http://127.0.0.1:2"], retries=9, batch_size=4), (), None)


def test_a_request_to_stop_during_an_evaluation_loses_no_iteration(settings, monkeypatch):
    settings["evaluation"]["every"] = 1
    settings["checkpoint"] = {"every": 10, "best": False}  # else every evaluation has a checkpoint
    from dancegrpo import evaluate

    measured = evaluate.evaluate
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # before the run, after its first iteration, after its second
            os.kill(os.getpid(), signal.SIGTERM)
        return measured(*args, **kwargs)

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    result = train(load_config(settings))
    assert result.iterations == 2
    assert train(resume=result.run_dir).iterations == 4
    assert [row["iteration"] for row in metrics(result.run_dir)] == [0, 1, 2, 3]


def test_an_evaluation_that_its_judge_missed_is_made_up_by_a_resume(settings, monkeypatch):
    settings["evaluation"] |= {"every": 0}
    down = []
    monkeypatch.setattr(
        "test_trainer.brightness", lambda images, prompts: [None] * len(images) if down else images.mean((1, 2, 3))
    )
    stop_after = Trainer.iterate

    def iterate(self, iteration):
        row = stop_after(self, iteration)
        if iteration == 3:
            down.append(1)
        return row

    monkeypatch.setattr(Trainer, "iterate", iterate)
    result = train(load_config(settings))
    folder = RunFolder.open(result.run_dir)
    assert folder.evaluation_file(0).is_file()
    assert not folder.evaluation_file(4).is_file()
    down.clear()
    train(resume=result.run_dir)
    assert folder.evaluation_file(4).is_file()


def test_a_run_that_another_process_trains_is_left_alone(settings):
    run = train(load_config(settings)).run_dir
    held = "import sys; from pathlib import Path; from dancegrpo.run_folder import RunFolder\n"
    held += "with RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True)\n    sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process trains in"):
            train(resume=run, overrides=["iterations=5"])
        other.kill()
    assert train(resume=run, overrides=["iterations=5"]).iterations == 5
