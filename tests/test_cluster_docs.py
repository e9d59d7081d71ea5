"""The examples of docs/cluster.md: their YAML parses, and their commands are ones that the command line knows."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from dancegrpo.config import load_config

PAGE = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text(encoding="utf-8")
MANIFESTS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for line in PAGE.replace("\\\n", " ").splitlines() if "-m dancegrpo train" in line]


def trained_by(manifest: dict) -> list[str]:
    """The arguments of its container."""
    if manifest["kind"] == "TrainJob":
        return manifest["spec"]["trainer"]["args"]
    pods = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    return pods["containers"][0]["args"]


def check(arguments: list[str]) -> None:
    """What follows `-m dancegrpo train`: a shipped recipe, settings that it has, known options."""
    recipe, *rest = arguments[arguments.index("train") + 1 :]
    options = [word for word in rest if word.startswith("--")]
    assert set(options) <= {"--out", "--resume"}
    values = {rest[rest.index(option) + 1] for option in options}
    load_config(recipe, [word for word in rest if "=" in word and word not in values])


def test_the_page_has_both_kinds_of_kubernetes_jobs():
    assert [manifest["kind"] for manifest in MANIFESTS] == ["TrainingRuntime", "TrainJob", "PyTorchJob"]
    runtime, job, _ = MANIFESTS
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}


@pytest.mark.parametrize("manifest", MANIFESTS[1:], ids=lambda manifest: manifest["kind"])
def test_jobs_run_commands_that_exist(manifest):
    check(trained_by(manifest))


def test_commands_are_ones_that_exist():
    assert len(COMMANDS) >= 5
    for line in COMMANDS:
        check(shlex.split(line.split("# ")[0]))


def test_the_slurm_script_is_bash():
    (script,) = SCRIPTS
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    options = [line.split()[1].split("=")[0] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes", "--requeue", "--signal"} <= set(options)
