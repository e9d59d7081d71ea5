import json

import pytest
import torch
from safetensors import SafetensorError

from dancegrpo.checkpoint import Checkpoint, load_latest, save, truncate_metrics
from dancegrpo.errors import CheckpointError
from dancegrpo.files import write_atomically, write_json


def checkpoint(iteration: int) -> Checkpoint:
    tensors = {"weights": {"a.b": torch.full((3,), float(iteration))}, "step": {"a.b": torch.tensor(2.0)}}
    return Checkpoint(iteration, tensors, {"num_updates": iteration, "algorithm": {}})


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, checkpoint(3), keep=2)
    loaded = load_latest(tmp_path, pytest.fail)
    assert (loaded.iteration, loaded.state) == (3, {"num_updates": 3, "algorithm": {}})
    assert torch.equal(loaded.tensors["weights"]["a.b"], torch.full((3,), 3.0))
    assert loaded.tensors["step"]["a.b"].shape == ()


def test_only_the_newest_are_kept(tmp_path):
    for iteration in (1, 5, 10):
        save(tmp_path, checkpoint(iteration), keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000005", "000010"]


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
    (tmp_path / "checkpoints" / ".000001.partial").mkdir(parents=True)
    assert load_latest(tmp_path, pytest.fail) is None
    save(tmp_path, checkpoint(1), keep=2)
    assert load_latest(tmp_path, pytest.fail).iteration == 1


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
