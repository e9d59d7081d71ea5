import json
import threading

import pytest
import torch
from safetensors import SafetensorError

from dancegrpo import saver as saving
from dancegrpo.checkpoint import (
    Checkpoint,
    Keep,
    drop_after,
    iterations,
    load,
    load_latest,
    path_of,
    prune,
    remove_leftovers,
    truncate_metrics,
)
from dancegrpo.config import load_config
from dancegrpo.errors import CheckpointError
from dancegrpo.evaluate import best_iteration
from dancegrpo.files import write_atomically, write_json
from dancegrpo.run_folder import RunFolder
from dancegrpo.saver import Saver


def checkpoint(iteration: int) -> Checkpoint:
    tensors = {"weights": {"a.b": torch.full((3,), float(iteration))}, "step": {"a.b": torch.tensor(2.0)}}
    return Checkpoint(iteration, tensors, {"num_updates": iteration, "algorithm": {}})


def save(run_dir, saved: Checkpoint, keep: int = 2, best: int | None = None):
    """Starts a save and waits for it."""
    saver = Saver()
    saver.begin(run_dir, saved, Keep(keep, best))
    saver.wait()
    assert saver.failure is None
    return path_of(run_dir, saved.iteration)


def names(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, checkpoint(3), keep=2)
    loaded = load_latest(tmp_path, pytest.fail)
    assert (loaded.iteration, loaded.state) == (3, {"num_updates": 3, "algorithm": {}})
    assert torch.equal(loaded.tensors["weights"]["a.b"].read(), torch.full((3,), 3.0))
    assert loaded.tensors["step"]["a.b"].shape == ()
    assert loaded.tensors["step"]["a.b"].read().equal(torch.tensor(2.0))


def test_only_the_newest_are_kept(tmp_path):
    for iteration in (1, 5, 10):
        save(tmp_path, checkpoint(iteration), keep=2)
    assert names(tmp_path) == ["000005", "000010"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path, checkpoint(1), keep=2)
    newest = save(tmp_path, checkpoint(2), keep=2)
    file = newest / ("manifest.json" if damage == "manifest" else "weights.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(data if damage == "flip" else data[:-20])
    warnings = []
    assert load_latest(tmp_path, warnings.append).iteration == 1
    assert "000002 is damaged" in warnings[0]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (OSError(28, "No space left on device"), CheckpointError),
        (SafetensorError("No space left on device"), CheckpointError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_save_that_fails_half_way_leaves_the_earlier_one_alone(tmp_path, raised, seen):
    def explode(partial):
        partial.mkdir()
        (partial / "half").write_text("x")
        raise raised

    save(tmp_path, checkpoint(1), keep=2)
    with pytest.raises(seen):
        write_atomically(tmp_path / "checkpoints" / "000002", explode)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000001"]


def test_a_full_disk_is_one_line(tmp_path):
    def explode(partial):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: No space left on device; free space"):
        write_atomically(tmp_path / "metrics.jsonl", explode)


def test_only_damaged_checkpoints_are_no_reason_to_start_over(tmp_path):
    (save(tmp_path, checkpoint(1), keep=2) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="every checkpoint in"):
        load_latest(tmp_path, [].append)


def test_nothing_is_there_before_the_first_save(tmp_path):
    assert load_latest(tmp_path, pytest.fail) is None


def test_a_leftover_partial_folder_is_ignored_and_replaced(tmp_path):
    (tmp_path / "checkpoints" / ".000001.partial" / "weights.safetensors").mkdir(parents=True)
    assert load_latest(tmp_path, pytest.fail) is None
    save(tmp_path, checkpoint(1), keep=2)
    assert load_latest(tmp_path, pytest.fail).iteration == 1
    (tmp_path / "checkpoints" / ".000002.partial").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["000001"]


# --- Contents -------------------------------------------------------------------------------------------------------


def test_the_bytes_of_every_type_and_shape_come_back(tmp_path):
    tensors = {
        "bf16": torch.randn(3, 5).to(torch.bfloat16),
        "int": torch.arange(7),
        "bool": torch.tensor([True, False]),
        "double": torch.randn(2, 3, 4, dtype=torch.float64),
        "turned": torch.randn(4, 6).T,
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 3),
    }
    save(tmp_path, Checkpoint(1, {"weights": tensors, "exp_avg": {}}, {}))
    loaded = load_latest(tmp_path, pytest.fail).tensors
    assert loaded["exp_avg"] == {}
    for name, tensor in tensors.items():
        found = loaded["weights"][name].read()
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)


def test_a_part_of_a_tensor_is_read_alone(tmp_path):
    whole = torch.arange(60).reshape(5, 4, 3)
    save(tmp_path, Checkpoint(1, {"weights": {"w": whole}}, {}))
    stored = load_latest(tmp_path, pytest.fail).tensors["weights"]["w"]
    assert torch.equal(stored.read([1, 2, 0], [3, 2, 2]), whole[1:4, 2:4, 0:2])
    assert stored.read([5, 0, 0], [0, 4, 3]).shape == (0, 4, 3)


def test_checkpoints_of_the_layout_without_a_number_load(tmp_path):
    manifest = save(tmp_path, checkpoint(1)) / "manifest.json"
    told = json.loads(manifest.read_text())
    assert told.pop("format") == 2
    manifest.write_text(json.dumps(told))
    assert load_latest(tmp_path, pytest.fail).iteration == 1


def test_a_later_layout_is_refused_in_one_line(tmp_path):
    manifest = save(tmp_path, checkpoint(1)) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(CheckpointError, match="is of format 3, this version reads up to 2: install the version"):
        load_latest(tmp_path, pytest.fail)


def test_only_the_kinds_that_are_wanted_are_read(tmp_path):
    (save(tmp_path, checkpoint(1)) / "step.safetensors").unlink()
    assert load(tmp_path, 1, kinds=("weights",)).tensors.keys() == {"weights"}
    with pytest.raises(CheckpointError, match=r"000001 is damaged .*: choose among 1"):
        load(tmp_path, 1)


def test_a_checkpoint_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint of iteration 7: let the run reach one first"):
        load(tmp_path, 7)
    save(tmp_path, checkpoint(1))
    save(tmp_path, checkpoint(4))
    with pytest.raises(CheckpointError, match="has no checkpoint of iteration 7: choose among 1, 4"):
        load(tmp_path, 7)


# --- While the run goes on ------------------------------------------------------------------------------------------


@pytest.fixture
def held_up(monkeypatch):
    """Writing waits for `.set()`."""
    go = threading.Event()
    digest = saving.digest
    monkeypatch.setattr(saving, "digest", lambda path: go.wait(30) and digest(path))
    yield go
    go.set()


def test_what_is_saved_is_what_was_there_when_the_save_began(tmp_path, held_up):
    weight, state, saver = torch.zeros(4), {"seen": [1]}, Saver()
    saver.begin(tmp_path, Checkpoint(1, {"weights": {"w": weight}}, state), Keep(2))
    weight += 1
    state["seen"].append(2)
    assert saver.poll() == []
    assert (saver.saved, iterations(tmp_path)) == (None, [])
    held_up.set()
    saver.wait()
    loaded = load_latest(tmp_path, pytest.fail)
    assert (saver.saved, loaded.state) == (1, {"seen": [1]})
    assert torch.equal(loaded.tensors["weights"]["w"].read(), torch.zeros(4))


def test_the_memory_of_one_save_serves_the_next(tmp_path):
    weight, saver = torch.zeros(4), Saver()
    for iteration in (1, 2):
        weight.fill_(iteration)
        saver.begin(tmp_path, Checkpoint(iteration, {"weights": {"w": weight}}, {}), Keep(2))
        buffers = list(saver._buffers.values())
    saver.wait()
    assert [buffer.tolist() for buffer in buffers] == [[2.0] * 4]
    for iteration in (1, 2):
        assert load(tmp_path, iteration).tensors["weights"]["w"].read().tolist() == [iteration] * 4


def test_an_iteration_is_saved_once(tmp_path):
    saver = Saver()
    for state in ({"first": True}, {"first": False}):
        saver.begin(tmp_path, Checkpoint(1, {"weights": {}}, state), Keep(2))
    saver.wait()
    assert load_latest(tmp_path, pytest.fail).state == {"first": True}


@pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_costs_no_earlier_checkpoint_and_the_next_save_is_tried(tmp_path, monkeypatch, raised):
    saver = Saver()
    saver.begin(tmp_path, checkpoint(1), Keep(1))
    saver.wait()

    def full(path):
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(saving, "sync", full)
        saver.begin(tmp_path, checkpoint(2), Keep(1))
        saver.wait()
    told = [str(failure) for failure in saver.poll()]
    assert told == [f"cannot write {path_of(tmp_path, 2)}: No space left on device; free space on its disk"]
    assert (saver.poll(), names(tmp_path)) == ([], ["000001"])
    saver.begin(tmp_path, checkpoint(3), Keep(1))
    saver.wait()
    assert (saver.failure, names(tmp_path)) == (None, ["000003"])


def test_a_folder_that_cannot_be_made_is_a_failed_save(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    saver = Saver()
    saver.begin(tmp_path, checkpoint(1), Keep(1))
    assert "cannot write" in str(saver.failure)


# --- The best -------------------------------------------------------------------------------------------------------


def test_the_best_is_kept_until_another_is(tmp_path):
    for iteration in (1, 2, 3, 4):
        save(tmp_path, checkpoint(iteration), keep=1, best=1)
    assert names(tmp_path) == ["000001", "000004"]
    save(tmp_path, checkpoint(5), keep=1, best=4)
    assert names(tmp_path) == ["000004", "000005"]


def test_the_best_is_that_of_the_column_the_report_shows(tmp_path):
    """The trained judge's verdicts, where there are any; the earlier of equals; what was not measured has no part."""
    run, config = RunFolder(tmp_path), load_config("shapes-flux")
    (tmp_path / "evaluations").mkdir()
    for iteration, verdicts, score in [(0, [1, 1], 9), (10, [0, 1], 1), (20, [1, 1], 0), (40, [1, 1], 5)]:
        columns = {"other": [score, score], "shapes/pass": verdicts}
        record = {"iteration": iteration, "columns": columns, "valid": {"shapes": [True] * 2}, "tasks": [None] * 2}
        write_json(run.evaluation_file(iteration), record)
    assert best_iteration(run, config, [10, 20, 30, 40]) == 20
    assert best_iteration(run, config, [10, 30]) == 10
    assert best_iteration(run, config, [30]) is None


def test_a_best_that_the_run_went_back_behind_is_exported_but_not_gone_on_from(tmp_path):
    for iteration in (1, 2, 3):
        save(tmp_path, checkpoint(iteration), keep=9)
    drop_after(tmp_path, 1, best=2)
    assert names(tmp_path) == ["000001", "000002-abandoned"]
    assert load_latest(tmp_path, pytest.fail).iteration == 1
    assert load(tmp_path, 2).iteration == 2
    save(tmp_path, checkpoint(4), keep=9, best=2)
    assert names(tmp_path) == ["000001", "000002-abandoned", "000004"]
    save(tmp_path, checkpoint(5), keep=9, best=4)
    assert names(tmp_path) == ["000001", "000004", "000005"]


def test_a_damaged_newer_one_does_not_count_as_kept(tmp_path):
    for iteration in (1, 2, 3):
        save(tmp_path, checkpoint(iteration), keep=9)
    prune(tmp_path, 2, Keep(1))
    assert names(tmp_path) == ["000002", "000003"]


@pytest.mark.parametrize(("every", "newest"), [(1, 1), (1, 2), (5, 2), (10, 2), (12, 1), (30, 2)])
def test_there_always_is_a_state_to_go_back_to_once_one_is_old_enough(every, newest):
    """A collapse shows 12 iterations late: what is kept reaches back further, at any moment, and not much further."""
    saved: list[int] = []
    for done in range(1, 400):
        first = [iteration for iteration in range(every, done, every) if iteration <= done - 12]
        if first:
            good = [iteration for iteration in saved if iteration <= done - 12]
            assert good
            assert good[-1] >= done - 12 - 2 * max(12, (newest + 1) * every)
        if done % every == 0:
            saved = sorted(Keep(newest, refuge=done - 12).among([*saved, done]))
            assert done in saved
            assert len(saved) <= newest + 2


def test_metrics_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"iteration": i}) + "\n" for i in range(5)) + '{"iteration": 5, "rew')
    assert [row["iteration"] for row in truncate_metrics(file, 3)] == [0, 1, 2]
    assert len(file.read_text().splitlines()) == 3


def test_json_replaces_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert len(list(tmp_path.iterdir())) == 1
