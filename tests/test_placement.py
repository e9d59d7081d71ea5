"""Where judges are: on a device of their own, on some ranks alone. Scores do not depend on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dancegrpo.config import load_config, load_reward_config
from dancegrpo.distributed import ALONE, World
from dancegrpo.errors import CheckpointError, ConfigError, RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards import Judges, Scores, load_placed, load_reward
from dancegrpo.rewards.compose import OnDevice
from dancegrpo.rewards.scoring import runs_elsewhere
from dancegrpo.run_checks import require_judges
from dancegrpo.run_settings import find_judge, resumed_config
from dancegrpo.settings import RewardConfig
from placement_worker import PLACES


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], dict]:
    """(place, batch size, rank) -> what that rank ended up with."""
    folder = tmp_path_factory.mktemp("placed")
    worker = str(Path(__file__).parent / "placement_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", worker, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    files = {tuple(file.name.split(".")[:3]): torch.load(file, weights_only=True) for file in folder.glob("*.pt")}
    return {(place, size, int(rank)): found for (place, size, rank), found in files.items()}


@pytest.mark.parametrize("size", ["None", "2"])
@pytest.mark.parametrize("place", ["main", "second"])
def test_scores_are_the_same_to_the_bit_wherever_the_judge_is(told, place: str, size: str) -> None:
    here = told["all", size, 0]
    assert (
        here["valid"].tolist()
        == {
            "None": [
                True,
                False,
                True,
                True,
                True,
                False,
                False,
                False,
                False,
            ],  # the second rank's failed as one batch
            "2": [True, False, True, True, True, False, False, False, True],
        }[size]
    )
    for rank in (0, 1):
        there = told[place, size, rank]
        for column in ("values", "valid", "count"):
            assert torch.equal(there[column].nan_to_num(7.0), here[column].nan_to_num(7.0)), column
        assert {cause.split(" (")[0]: n for cause, n in there["causes"].items()} == {
            cause.split(" (")[0]: n for cause, n in here["causes"].items()
        }


@pytest.mark.parametrize("size", ["None", "2"])
@pytest.mark.parametrize("place", ["main", "second"])
def test_held_out_scores_are_the_same_where_one_rank_has_a_batch_more(told, place: str, size: str) -> None:
    assert told[place, size, 0]["columns"] == told["all", size, 0]["columns"]
    assert len(told[place, size, 0]["columns"]) == 5


def test_a_judge_is_built_on_its_own_ranks_alone(told) -> None:
    built = {place: [told[place, "2", rank]["built"] for rank in (0, 1)] for place in PLACES}
    assert built == {"all": [1, 1], "main": [1, 0], "second": [0, 1]}


class Where:
    """Says on which device its media were."""

    name, differentiable, batch_size = "where", False, None
    moved = None

    def __call__(self, media, prompts):
        assert media.device.type == self.moved.type
        return Scores(torch.zeros(len(media), device=media.device), torch.ones(len(media), dtype=torch.bool))

    def to(self, device):
        self.moved = torch.device(device)
        return self


def test_a_judge_on_a_device_of_its_own_stays_there_and_media_are_brought_to_it() -> None:
    judge = OnDevice(Where(), torch.device("meta"))
    judges = Judges({"where": judge}).to("cpu")
    assert judge.reward.moved.type == "meta"
    assert runs_elsewhere(judge, torch.device("cpu"))
    with pytest.raises(NotImplementedError):  # "meta" has no values to bring back: it came as far as that
        judge(torch.rand(2, 1, 3, 4, 4), [Prompt(0, "a")] * 2)
    assert judges.rewards["where"] is judge


def test_a_device_changes_no_score() -> None:
    config = RewardConfig(judge="jpeg", device="cpu")
    media, prompts = torch.rand(3, 1, 3, 16, 16), [Prompt(n, "a") for n in range(3)]
    plain = Judges({"j": load_reward("j", RewardConfig(judge="jpeg"))}).score(media, prompts)["j"]
    assert torch.equal(Judges({"j": load_reward("j", config)}).score(media, prompts)["j"].values, plain.values)


@pytest.mark.parametrize("device", ["cuda:63", "toaster", "meta", ""])
def test_a_device_that_is_not_here_is_named_with_those_that_are(device: str) -> None:
    if not device:
        with pytest.raises(ConfigError, match="device='' must have at least 1 character"):
            load_reward_config("jpeg", [f"device={device}"])
        return
    with pytest.raises(RewardError, match=rf"device='{device}' of judge 'j' is not here, this machine has cpu.*: name"):
        load_reward("j", RewardConfig(judge="jpeg", device=device))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"judge": "hps", "device": "cpu", "options": {"device": "cpu"}}, "device=cpu and options.device=cpu say"),
        ({"judge": "hps", "ranks": []}, "ranks=.* must"),
        ({"judge": "hps", "ranks": [-1]}, r"ranks=\[-1\] must"),
        ({"judge": "hps", "ranks": "some"}, "ranks='some' must"),
    ],
)
def test_a_place_that_cannot_be_is_refused(settings: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        load_config("shapes-flux", [f"rewards.far={settings}"])
    assert "\n" not in str(refused.value)


def test_ranks_that_there_are_not_are_refused() -> None:
    config = RewardConfig(judge="jpeg", ranks=[1])
    with pytest.raises(
        RewardError, match=r"ranks=\[1\] of judge 'j' are not all there, the run has a single process, 0"
    ):
        load_placed("j", config, ALONE)
    with pytest.raises(RewardError, match=r"ranks=\[1, 2\] .* the run has 2 processes, 0 to 1: set it to all\."):
        load_placed("j", RewardConfig(judge="jpeg", ranks=[1, 2]), World(size=2))


def test_alone_and_on_all_ranks_the_judge_is_itself() -> None:
    assert type(find_judge("j", RewardConfig(judge="jpeg", ranks="main"), None)).__name__ == "OverFrames"
    assert type(load_placed("j", RewardConfig(judge="jpeg", ranks=[1, 0]), World(size=2))).__name__ == "OverFrames"


def test_a_device_is_not_for_a_judge_that_runs_elsewhere() -> None:
    options = {"url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "?", "preflight": False}
    with pytest.raises(RewardError, match="device=cpu of judge 'v', which runs elsewhere: leave it away"):
        load_reward("v", RewardConfig(judge="vlm", device="cpu", options=options))


def test_refl_asks_its_judges_on_every_rank() -> None:
    config = load_config("sd14-refl", ["rewards.imagereward.ranks=main", "prompts.train=shapes:train"])
    with pytest.raises(ConfigError, match=r"rewards\.imagereward\.ranks=main does not go with algorithm\.name=refl"):
        require_judges(config, World())


def test_a_resumed_run_may_have_its_judges_elsewhere(tmp_path: Path) -> None:
    class Started:
        path = tmp_path

        def config(self):
            return load_config("shapes-flux")

    moved = load_config("shapes-flux", ["rewards.shapes.ranks=main", "rewards.shapes.device=cpu"])
    assert resumed_config(Started(), moved, (), None) == moved
    with pytest.raises(CheckpointError, match=r"rewards\.shapes\.threshold"):
        resumed_config(Started(), load_config("shapes-flux", ["rewards.shapes.threshold=0.5"]), (), None)
