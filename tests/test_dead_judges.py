"""Judges that die in the middle of a run: nothing is learnt of what they did not score, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dancegrpo import load_config, train
from dancegrpo.errors import DeadJudgeError
from dancegrpo.rewards.chat import Endpoint, ScoreError
from dancegrpo.rewards.service import ServiceReward
from dancegrpo.trainer import Trainer
from test_reward_service import Marks, answering, free_port, running, samples
from toy import ToyPolicy

ALGORITHMS = ["grpo", "ddpo", "dpok", "dpo", "nft"]


class Mortal:
    """The mean of a picture; from the given calls it is dead, in one of the ways in which judges die."""

    name, differentiable, batch_size = "mortal", False, None

    def __init__(self) -> None:
        self.dead: str | None = None

    def __call__(self, media: torch.Tensor, prompts: list[Any]) -> Any:
        from dancegrpo.rewards import Scores

        values = media.flatten(1).mean(1)
        valid = torch.ones(len(values), dtype=torch.bool)
        match self.dead:
            case None:
                return Scores(values, valid)
            case "raises":
                raise ConnectionError("no route to host")
            case "nan":
                return Scores(values * torch.nan, valid)
            case "short":
                return Scores(values[:-1], valid[:-1])
            case "garbage":
                return "<html>502 Bad Gateway</html>"
        raise AssertionError(self.dead)

    def to(self, device: object) -> Mortal:
        return self


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("dancegrpo.trainer.load_policy", lambda *_, **__: ToyPolicy(num_steps=4))
    (tmp_path / "train.txt").write_text("".join(f"{'word ' * n}\n" for n in range(1, 8)))
    return {
        "name": "toy",
        "iterations": 6,
        "threads": 1,
        "output": str(tmp_path / "runs"),
        "model": {"path": "toy", "height": 8, "width": 8},
        "prompts": {"train": str(tmp_path / "train.txt"), "per_iteration": 2, "cache_mb": 0},
        "rollout": {"group_size": 4, "num_steps": 4, "noise_level": 0.5, "shared_noise": False},
        "rewards": {"mortal": {"judge": "test_dead_judges:Mortal"}},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"samples": 0},
        "checkpoint": {"every": 10},
        "tracking": {"backend": "none"},
    }


def told(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if not key.startswith(("seconds/", "memory/"))}


def state(run: Trainer) -> tuple[Any, ...]:
    """All that a checkpoint holds of a run, apart from the time."""
    tensors = run.updater.state_dict() | {"algorithm": run.algorithm.tensors()}
    copied = {kind: {name: t.detach().clone() for name, t in held.items()} for kind, held in tensors.items()}
    return copied, run.updater.num_updates, json.loads(json.dumps(run.algorithm.state_dict()))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_iteration_without_scores_may_be_drawn_again_as_if_it_had_not_been(settings, algorithm: str) -> None:
    """Saved after it failed and loaded elsewhere, the run goes on as one whose judge never died."""
    config = load_config(settings, [f"algorithm.name={algorithm}"])
    expected, judge = Trainer(config, {"mortal": Mortal()}), Mortal()
    rows = [told(expected.iterate(i)) for i in range(3)]
    failing = Trainer(config, {"mortal": judge})
    failing.iterate(0)
    judge.dead = "raises"
    with pytest.raises(DeadJudgeError, match=r"judge 'mortal' scored 0 of 8 samples.*no route to host"):
        failing.iterate(1)
    tensors, updates, plain = state(failing)
    resumed = Trainer(config, {"mortal": Mortal()})
    resumed.updater.load_state_dict(tensors, updates)
    resumed.algorithm.load_state_dict(plain, tensors["algorithm"])
    assert [told(resumed.iterate(i)) for i in (1, 2)] == rows[1:]
    mine, theirs = state(resumed)[0], state(expected)[0]
    for kind, held in theirs.items():
        assert held.keys() == mine[kind].keys()
        assert all(torch.equal(mine[kind][name], tensor) for name, tensor in held.items()), kind


@pytest.mark.parametrize("way", ["raises", "nan", "short", "garbage"])
def test_nothing_is_learnt_of_garbage(settings, way: str) -> None:
    judge = Mortal()
    run = Trainer(load_config(settings), {"mortal": judge})
    run.iterate(0)
    before = state(run)
    judge.dead = way
    with pytest.raises(DeadJudgeError):
        run.iterate(1)
    after = state(run)
    assert before[1:] == after[1:]
    for kind, held in before[0].items():
        assert all(torch.equal(after[0][kind][name], tensor) for name, tensor in held.items()), kind


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
def test_a_run_whose_judge_dies_saves_stops_and_goes_on_to_the_same_end(settings, algorithm: str) -> None:
    """Far from the next checkpoint: what was learnt before is kept, and the rest is as it would have been."""
    config = load_config(settings, [f"algorithm.name={algorithm}"])
    whole = train(config, rewards={"mortal": Mortal()}).run_dir
    judge, iterate = Mortal(), Trainer.iterate

    def dying(self: Trainer, iteration: int) -> dict[str, Any]:
        judge.dead = "raises" if iteration == 3 else None
        return iterate(self, iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "iterate", dying)
        with pytest.raises(DeadJudgeError):
            train(config, rewards={"mortal": judge})
    (broken,) = [folder for folder in whole.parent.iterdir() if folder != whole and (folder / "run.json").is_file()]
    assert json.loads((broken / "run.json").read_text())["status"] == "failed"
    assert [folder.name for folder in (broken / "checkpoints").iterdir()] == ["000003"]
    assert train(resume=broken, rewards={"mortal": Mortal()}).iterations == 6
    lines = [[told(json.loads(line)) for line in (run / "metrics.jsonl").open()] for run in (whole, broken)]
    assert lines[0] == lines[1]
    for file in (whole / "checkpoints" / "000006").glob("*.safetensors"):
        assert file.read_bytes() == (broken / "checkpoints" / "000006" / file.name).read_bytes()


def test_a_judge_that_is_dead_from_the_start_leaves_no_checkpoint(settings) -> None:
    judge = Mortal()
    judge.dead = "raises"
    with pytest.raises(DeadJudgeError):
        train(load_config(settings), rewards={"mortal": judge}, out=Path(settings["output"]) / "dead")
    assert not (Path(settings["output"]) / "dead" / "checkpoints").is_dir()


# ------------------------------------------------------------------------------------------------ services that die


def test_a_service_that_goes_away_in_mid_batch_and_comes_back_costs_no_score() -> None:
    port = free_port()
    with running(Marks(), port=port) as (url, _):
        client = ServiceReward(url, retries=60, backoff=0.05)
        client(*samples((1, 1)))
    media, prompts = samples(*((i, i) for i in range(8)))
    import threading

    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(client(media, prompts)))
    asking.start()
    time.sleep(0.2)
    assert not answers
    with running(Marks(), port=port):
        asking.join(20)
    client.close()
    assert answers[0].values.tolist() == [257 * i for i in range(8)]


def test_a_service_that_hangs_costs_all_tries_once() -> None:
    """Of six requests one after the other, the first makes three tries and the others one each."""
    calls = []

    def hang(body: bytes) -> tuple[int, bytes]:
        calls.append(1)
        time.sleep(0.3)
        return 200, b"{}"

    with answering(hang) as url, ServiceReward(url, retries=2, backoff=0.0, timeout=0.1) as client:
        told = [client(*samples((n, n))) for n in range(4)]
    assert not any(scores.valid.any() for scores in told)
    assert all("no answer within 0.1 s" in str(scores.causes) for scores in told)
    assert len(calls) == 3 + 3


def test_a_service_that_answers_again_gets_all_tries_again() -> None:
    told = [None, b"503", b"503", b"good"]

    def score(body: bytes) -> tuple[int, bytes]:
        word = told.pop(0)
        if word is None:
            time.sleep(0.5)
        return (503 if word == b"503" else 200), b"{}"

    with answering(score) as url, ServiceReward(url, retries=0, backoff=0.0, timeout=0.2) as client:
        assert not client(*samples((1, 1))).valid.any()
        assert client._hangs
        assert "503" in str(client(*samples((1, 1))).causes)
        assert not client._hangs  # it answers, if only that it is busy


def test_an_endpoint_that_hangs_costs_all_tries_once() -> None:
    calls = []

    def hang(body: bytes) -> tuple[int, bytes]:
        calls.append(1)
        time.sleep(0.3)
        return 200, b"{}"

    with answering(hang) as url:
        endpoint = Endpoint(f"{url}/v1", None, timeout=0.1, retries=1, connections=2)
        for _ in range(3):
            with pytest.raises(ScoreError, match="cannot be reached: ReadTimeout"):
                endpoint.post({})
    assert len(calls) == 2 + 2
    with contextlib.suppress(AttributeError):
        endpoint.client.close()
