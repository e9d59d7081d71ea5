import json
import subprocess
import sys
from pathlib import Path

import pytest

from dancegrpo import cli


@pytest.fixture
def recipe(tiny_flux_path, tmp_path):
    (tmp_path / "train.txt").write_text("one dot\ntwo dots\nthree dots\n")
    settings = {
        "name": "tiny",
        "iterations": 2,
        "threads": 1,
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_flux_path), "height": 32, "width": 32, "max_sequence_length": 16},
        "prompts": {
            "train": str(tmp_path / "train.txt"),
            "evaluation": str(tmp_path / "train.txt"),
            "per_iteration": 2,
        },
        "rollout": {"group_size": 4, "num_steps": 4, "noise_level": 0.7, "shift": 1.5},
        "rewards": {"bright": {"judge": "test_trainer:brightness"}},
        "evaluation": {"num_prompts": 3, "samples": 2},
        "tracking": {"backend": "none"},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(settings))
    return path


def call(monkeypatch, capsys, *words):
    """(exit code, standard output, standard error) of one command."""
    monkeypatch.setattr(sys, "argv", ["dancegrpo", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_train_sample_eval_report_export(monkeypatch, capsys, recipe, tmp_path):
    code, out, _ = call(monkeypatch, capsys, "train", recipe, "seed=3", "--json")
    told = json.loads(out)
    run = told["run_dir"]
    assert (code, told["iterations"], run) == (0, 2, str(tmp_path / "runs" / "tiny-seed3"))

    code, out, _ = call(
        monkeypatch, capsys, "sample", run, "--prompt", "one dot", "--count", 3, "--out", tmp_path / "p", "--json"
    )
    assert (code, len(json.loads(out)["files"])) == (0, 3)
    assert len(list((tmp_path / "p").glob("*.png"))) == 3

    code, out, _ = call(monkeypatch, capsys, "eval", run, "--json")
    measured = json.loads(out)
    record = json.loads((tmp_path / "runs" / "tiny-seed3" / "evaluations" / "000002.json").read_text())
    assert code == 0
    assert measured["means"]["bright"] == pytest.approx(sum(record["columns"]["bright"]) / 3, abs=1e-6)

    assert call(monkeypatch, capsys, "report", run)[0] == 0
    code, out, _ = call(monkeypatch, capsys, "export", run, "--out", tmp_path / "pipeline")
    assert (code, out.strip()) == (0, str(tmp_path / "pipeline"))
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    start = json.loads((tmp_path / "runs" / "tiny-seed3" / "evaluations" / "000000.json").read_text())
    before, after = (sum(held["columns"]["bright"]) / 3 for held in (start, record))
    assert f"| bright | {before:.4f} | {after:.4f} |" in (tmp_path / "pipeline" / "README.md").read_text()


def test_eval_compares_only_with_a_start_measured_alike(monkeypatch, capsys, recipe):
    run = json.loads(call(monkeypatch, capsys, "train", recipe, "--json")[1])["run_dir"]
    for override, compared in (("evaluation.batch_size=2", True), ("model.guidance_scale=1.25", False)):
        code, out, _ = call(monkeypatch, capsys, "eval", run, override, "--json")
        assert code == 0
        assert ("gain" in json.loads(out)) == compared


def test_eval_refuses_another_network_than_the_runs(monkeypatch, capsys, recipe):
    run = json.loads(call(monkeypatch, capsys, "train", recipe, "--json")[1])["run_dir"]
    code, _, err = call(monkeypatch, capsys, "eval", run, "model.lora={rank: 4}")
    assert code == 2
    assert "do not fit this model" in err
    assert len(err.strip().splitlines()) == 1


def test_an_export_names_only_the_judges_that_were_trained_on(monkeypatch, capsys, recipe, tmp_path):
    held_out = "rewards.size={judge: jpeg, weight: 0}"
    run = json.loads(call(monkeypatch, capsys, "train", recipe, held_out, "--json")[1])["run_dir"]
    assert call(monkeypatch, capsys, "export", run, "--out", tmp_path / "out")[0] == 0
    (told,) = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if "Trained on" in line]
    assert "bright" in told
    assert "jpeg" not in told


def test_resume_takes_the_run_folder_alone(monkeypatch, capsys, recipe):
    run = json.loads(call(monkeypatch, capsys, "train", recipe, "--json")[1])["run_dir"]
    code, out, _ = call(monkeypatch, capsys, "train", "--resume", run, "iterations=3", "--json")
    assert (code, json.loads(out)["iterations"]) == (0, 3)


def test_recipes_lists_and_shows(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "recipes")
    assert code == 0
    assert all(
        name in out for name in ("shapes-flux", "shapes-sd", "sd14-hps", "flux-hps", "flux-hps-8gpu", "flux-hps-lora")
    )
    assert "learning_rate: 0.0003" in call(monkeypatch, capsys, "recipes", "flux-hps-lora")[1]


MISTAKES = {
    "misspelt key": (["rollout.gruop_size=4"], "rollout.group_size"),
    "wrong type": (["rollout.group_size=many"], "rollout.group_size"),
    "group of one": (["rollout.group_size=1"], "group_size=1"),
    "batch that does not divide": (["update.updates_per_rollout=3"], "updates_per_rollout=3"),
    "no such prompts": (["prompts.train=/no/such.txt"], "/no/such.txt"),
    "no such model": (["model.path=/no/such/model"], "/no/such/model"),
    "no such judge": (["rewards.bright.judge=shapez"], "shapes"),
    "not an override": (["iterations"], "iterations"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys, recipe, tmp_path, mistake):
    words, named = MISTAKES[mistake]
    code, out, err = call(monkeypatch, capsys, "train", recipe, *words)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("dancegrpo: ")
    assert named in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "shapes-fluxx"], "shapes-flux"),
        (["train"], "no recipe given"),
        (["train", "--resume", "/no/such/run"], "not a run folder"),
        (["report", "/no/such/run"], "not a run folder"),
        (["export", "/no/such/run", "--out", "/tmp/never"], "/no/such/run"),
        (["sample", "/no/such/run"], "/no/such/run"),
    ],
)
def test_a_wrong_name_is_one_line_and_exit_code_2(monkeypatch, capsys, words, named):
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert named in err


def test_an_unwritable_output_folder_is_one_line(monkeypatch, capsys, recipe, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(monkeypatch, capsys, "train", recipe, f"output={tmp_path / 'file' / 'runs'}")
    assert code == 2
    assert "choose another with --out" in err


@pytest.mark.parametrize("command", ["train", "sample", "eval", "report", "recipes", "export"])
def test_help_shows_an_example(monkeypatch, capsys, command):
    code, out, _ = call(monkeypatch, capsys, command, "--help")
    assert code == 0
    assert "Example" in out


def test_importing_stays_light():
    heavy = ("torch", "diffusers", "transformers", "scipy")
    script = f"import sys, dancegrpo.cli, dancegrpo; print([m for m in {heavy} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_an_error_that_cannot_be_told_still_has_its_exit_code():
    """The log may lie on the very disk that is full."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("wb") as nowhere:
        done = subprocess.run([sys.executable, "-m", "dancegrpo", "recipes", "nosuch"], stdout=nowhere, stderr=nowhere)
    assert done.returncode == 2
