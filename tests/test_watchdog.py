"""Ranks that look after each other, on a store in memory and a clock in the test's hand; torchrun for real, slowly."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from dancegrpo.errors import RankError
from dancegrpo.launch import Launch, agreed_token
from dancegrpo.watchdog import BEAT, LOST, Place, Watchdog, _born, lost_connection


class Rank:
    """One rank's place and watchdog; `clock.now` is the time of all of them."""

    def __init__(self, rank: int, size: int, store: dist.Store, clock, folder: Path, timeout: float = 100.0) -> None:
        self.place, self.lines = Place(), []
        launch = Launch(rank, size, "token", store, store, lasting=True)
        self.dog = Watchdog(launch, self.place, timeout, end=self.lines.append, clock=clock)
        self.dog.folder = folder


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ranks(tmp_path):
    """Two ranks that have seen each other once."""
    clock, store = Clock(), dist.HashStore()
    pair = [Rank(rank, 2, store, clock, tmp_path) for rank in range(2)]
    for _ in range(2):
        for rank in pair:
            rank.dog.look()
    return clock, pair


def pass_time(clock, looking, seconds: float) -> None:
    for _ in range(round(seconds / BEAT)):
        clock.now += BEAT
        for rank in looking:
            rank.dog.look()


def test_ranks_that_beat_leave_each_other_alone(ranks):
    clock, pair = ranks
    pass_time(clock, pair, 10 * LOST)
    assert [rank.lines for rank in pair] == [[], []]


def test_a_silent_rank_is_named_with_its_phase_and_stack(ranks, tmp_path, capsys):
    clock, (first, second) = ranks
    second.place.begin("start", 7)
    with second.place.within("reward"):
        second.dog.look()
    pass_time(clock, [first], LOST)
    assert first.lines == []
    pass_time(clock, [first], 2 * BEAT)
    told = (
        "rank 1 of 2 has been silent for 35 s, last seen in reward of iteration 7: all ranks end, go on with --resume"
    )
    assert first.lines == [f"{told} {tmp_path}"]
    stack = (tmp_path / "stacks-rank1.txt").read_text()
    assert "in test_a_silent_rank_is_named_with_its_phase_and_stack" in stack
    assert stack.splitlines()[-1].strip() in capsys.readouterr().err


def test_a_stopped_process_of_this_machine_is_ended(ranks):
    clock, (first, second) = ranks
    process = subprocess.Popen(["sleep", "1000"])
    process.send_signal(signal.SIGSTOP)
    key = second.dog.launch.key("beat/1")
    beat = json.loads(second.dog.launch.client.get(key)) | {"pid": process.pid, "born": _born(process.pid)}
    second.dog.launch.client.set(key, json.dumps(beat))
    pass_time(clock, [first], LOST)
    assert process.poll() is None
    pass_time(clock, [first], 2 * BEAT)
    assert process.wait(10) == -signal.SIGKILL


def test_a_rank_that_was_stopped_itself_blames_nobody(ranks):
    clock, (first, second) = ranks
    clock.now += 1000  # all were stopped, and go on
    first.dog.look()
    second.dog.look()
    pass_time(clock, [first, second], 2 * LOST)
    assert first.lines == second.lines == []


def test_a_process_that_is_gone_is_noticed_at_once(ranks):
    clock, (first, second) = ranks
    process = subprocess.Popen(["true"])
    process.wait()
    key = second.dog.launch.key("beat/1")
    beat = json.loads(second.dog.launch.client.get(key))
    second.dog.launch.client.set(key, json.dumps(beat | {"pid": process.pid}))
    pass_time(clock, [first], BEAT)
    assert first.lines[0].startswith("rank 1 of 2 is gone, last seen in load: all ranks end")


def test_a_rank_that_said_goodbye_is_not_missed(ranks):
    clock, (first, second) = ranks
    second.dog.stop()
    pass_time(clock, [first], 3 * LOST)
    assert first.lines == []


def test_a_rank_that_keeps_others_waiting_shows_its_stack(ranks, tmp_path, monkeypatch):
    clock, (first, second) = ranks
    monkeypatch.setattr(time, "monotonic", clock)  # what places are told by
    first.place.begin("rollout", 3)
    second.place.begin("reward", 3)
    with first.place.meeting():
        pass_time(clock, [first, second], 100)
        assert first.lines == second.lines == []
        pass_time(clock, [first, second], 4 * BEAT)
    file = tmp_path / "stacks-rank1.txt"
    expected = "rank 1 of 2 hangs in reward of iteration 3 (110 s), and others may wait for 100 s (parallel.timeout); "
    expected += f"its stack is in {file}"
    assert second.lines[0].startswith(expected)
    assert first.lines[0].startswith(expected)
    assert "test_a_rank_that_keeps_others_waiting_shows_its_stack" in file.read_text()


def test_whoever_waits_for_one_that_loads_waits_for_a_download(ranks, monkeypatch):
    clock, (first, second) = ranks
    monkeypatch.setattr(time, "monotonic", clock)
    first.place.begin("rollout", 0)
    assert second.place.phase == "load"
    with first.place.meeting():
        pass_time(clock, [first, second], 1000)
    assert first.lines == second.lines == []


def test_slow_is_not_hanging_where_nobody_waits(ranks, monkeypatch):
    clock, pair = ranks
    monkeypatch.setattr(time, "monotonic", clock)
    for _ in range(60):
        pair[0].place.move()  # a forward pass
        pass_time(clock, pair, BEAT)
    assert [rank.lines for rank in pair] == [[], []]


def test_ranks_that_all_stand_still_all_show_their_stacks(ranks, tmp_path, monkeypatch):
    clock, pair = ranks
    monkeypatch.setattr(time, "monotonic", clock)
    for rank in pair:
        rank.place.begin("update", 2)
    pass_time(clock, pair, 100 + 4 * BEAT)
    assert all("hangs in update of iteration 2" in rank.lines[0] for rank in pair)


def test_loading_may_take_any_time(ranks, monkeypatch):
    clock, pair = ranks
    monkeypatch.setattr(time, "monotonic", clock)
    pass_time(clock, pair, 1000)
    assert [rank.lines for rank in pair] == [[], []]


def test_an_error_of_one_rank_ends_the_others_a_beat_later(ranks):
    clock, (first, second) = ranks
    second.dog.fail(ValueError("no such\nfile"))
    first.dog.look()
    assert first.lines == []  # it may have met the same error, and be about to say so
    pass_time(clock, [first], BEAT)
    assert first.lines[0].startswith("rank 1 of 2 ended: ValueError: no such file: all ranks end")


def test_a_rank_on_its_way_out_is_left_alone(ranks):
    clock, (first, second) = ranks
    first.dog.leaving = True
    second.dog.fail(ValueError("x"))
    pass_time(clock, [first], 3 * LOST)
    assert first.lines == []


def test_blame_names_the_rank_behind_a_broken_connection(tmp_path):
    store = dist.HashStore()
    first, second = (Rank(rank, 2, store, time.monotonic, tmp_path) for rank in range(2))
    second.dog.look()
    second.dog.fail(RankError("the judge died"))
    first.dog.start()
    first.dog.leaving = True  # the loop has ended by the same error
    told = first.dog.blame(RuntimeError("gloo: Connection closed by peer"))
    first.dog.stop()
    assert told.startswith("rank 1 of 2 ended: RankError: the judge died: all ranks end, go on with --resume")


def test_which_errors_say_that_a_connection_broke():
    assert lost_connection(RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert lost_connection(dist.DistBackendError("NCCL error"))
    assert not lost_connection(RuntimeError("shapes cannot be multiplied"))
    assert not lost_connection(ValueError("gloo"))


def test_an_error_leaves_the_place_where_it_was():
    place = Place()
    place.begin("start", 4)
    with place.within("rollout"), place.within("decode"):
        pass
    assert str(place) == "start of iteration 4"
    with pytest.raises(ValueError), place.within("rollout"), place.within("decode"):  # noqa: PT011
        raise ValueError
    assert str(place) == "decode of iteration 4"


def test_a_token_is_agreed_on_although_the_store_holds_an_earlier_ones():
    store, found = dist.HashStore(), []

    def start(rank: int) -> None:
        tokens[rank] = agreed_token(store, rank, 3, 20.0)

    for _ in range(3):
        tokens: dict[int, str] = {}
        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(tokens.values())) == 1
        found.append(tokens[0])
    assert len(set(found)) == 3


def test_a_rank_that_never_comes_is_named():
    with pytest.raises(RankError, match="rank 1 of 2 did not start within 0 s"):
        agreed_token(dist.HashStore(), 0, 2, 0.05)


def test_only_a_store_that_lasts_remembers():
    store = dist.HashStore()
    lasting = Launch(0, 2, "a", store, store, lasting=True)
    lasting.remember("run/0", "runs/x")
    assert Launch(0, 2, "b", store, store, lasting=True).recall("run/0") == "runs/x"
    assert lasting.recall("run/1") is None
    assert Launch(0, 2, "b", store, store, lasting=False).recall("run/0") is None


# ------------------------------------------------------------------------------------------------------------ torchrun

WORKER = Path(__file__).parent / "faults_worker.py"


def launch(folder: Path, recipe: dict, *, restarts: int = 0, **fault: object) -> subprocess.Popen:
    """Two processes that train `recipe` in `folder`/run, one of which meets the fault."""
    file = folder / f"{len(list(folder.iterdir()))}.json"
    text = folder / "recipe.yaml"
    text.write_text(json.dumps(recipe))
    file.write_text(json.dumps({"recipe": str(text), "out": str(folder / "run"), "fault": fault}))
    starter = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", f"--max-restarts={restarts}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *starter, str(WORKER), str(file)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


@pytest.fixture
def recipe(tiny_flux_path, tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"a drawing of {n} dots\n" for n in range(7)))
    return {
        "name": "tiny",
        "iterations": 4,
        "threads": 1,
        "model": {"path": str(tiny_flux_path), "height": 32, "width": 32, "max_sequence_length": 16},
        "prompts": {"train": str(tmp_path / "train.txt"), "per_iteration": 2},
        "rollout": {"group_size": 4, "num_steps": 4, "noise_level": 0.7, "shift": 1.5, "batch_size": 4},
        "rewards": {"bright": {"judge": "faults_worker:brightness"}},
        "evaluation": {"samples": 0},
        "checkpoint": {"every": 2},
        "tracking": {"backend": "none"},
    }


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 3])
def test_torchrun_starts_a_killed_run_again_and_it_goes_on(recipe, tmp_path, at):
    from test_trainer import metrics

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = launch(tmp_path / "a", recipe)
    assert whole.wait(300) == 0, whole.stderr.read()[-3000:]
    killed = launch(tmp_path / "b", recipe, restarts=2, kind="kill", rank=1, iteration=at, once=str(tmp_path / "met"))
    assert killed.wait(300) == 0, killed.stderr.read()[-3000:]
    assert (tmp_path / "met").is_file()
    assert metrics(tmp_path / "a" / "run") == metrics(tmp_path / "b" / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("kill", "rank 1 of 2 is gone, last seen in"),
        ("stop", "rank 1 of 2 has been silent for"),
        ("hang", "rank 1 of 2 hangs in reward of iteration 1"),
        ("raise", "rank 1 of 2 ended: ValueError: the judge of this rank is broken"),
    ],
)
def test_a_lost_rank_ends_all_within_a_minute_and_is_named(recipe, tmp_path, kind, told):
    patience = 30 if kind == "hang" else 1800
    recipe["parallel"] = {"timeout": patience}
    (tmp_path / "a").mkdir()
    process = launch(tmp_path / "a", recipe, kind=kind, rank=1, iteration=1, once=str(tmp_path / "met"))
    try:
        while not (tmp_path / "met").is_file():
            assert process.poll() is None, process.stderr.read()[-3000:]
            time.sleep(0.1)
        since = time.monotonic()
        _, text = process.communicate(timeout=120)
        assert time.monotonic() - since < 60 + patience * (kind == "hang")
    finally:
        if (tmp_path / "met").is_file():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((tmp_path / "met").read_text()), signal.SIGKILL)
    assert process.returncode != 0
    assert told in text
    if kind in ("stop", "hang"):
        assert "brightness" in (tmp_path / "a" / "run" / "stacks-rank1.txt").read_text()


@pytest.mark.slow
def test_an_error_that_all_ranks_meet_loses_no_iteration(recipe, tmp_path):
    """The judge dies for both: what came before is saved by both, then the run ends; restarts go on from there."""
    from test_trainer import metrics

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = launch(tmp_path / "a", recipe)
    assert whole.wait(300) == 0, whole.stderr.read()[-3000:]
    died = launch(tmp_path / "b", recipe, kind="die", rank=-1, iteration=3, once=str(tmp_path / "met"))
    _, told = died.communicate(timeout=300)
    assert died.returncode != 0
    assert "dead" in told
    assert (tmp_path / "b" / "run" / "checkpoints" / "000003").is_dir()
    again = launch(tmp_path / "b", recipe)  # --resume auto
    assert again.wait(300) == 0, again.stderr.read()[-3000:]
    assert metrics(tmp_path / "a" / "run") == metrics(tmp_path / "b" / "run")
