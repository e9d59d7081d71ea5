"""A checkpoint saved by any number of processes is the same one to any other: torchrun on the CPU, gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_worker import found, network, save, tensors
from dancegrpo.distributed import ALONE

CHAIN = [(2, "one", "sharded"), (1, "sharded", "copies"), (2, "copies", "again")]
"""What two processes do: ranks that shard, the checkpoint loaded, where it is saved again."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("ranks")
    expected = tensors()
    assert network(ALONE).state_dict().keys() == expected["weights"].keys()
    assert save(run / "one", expected, ALONE).failure is None
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    worker = str(Path(__file__).parent / "checkpoint_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*starter, worker, str(run), json.dumps(CHAIN)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.mark.parametrize("layout", ["one", "sharded", "copies", "again"])
def test_one_process_reads_what_any_layout_saved(folder: Path, layout: str) -> None:
    """Two processes read it too: each link of the chain compares what it loads before it saves."""
    found(folder / layout, ALONE)


@pytest.mark.parametrize("layout", ["sharded", "copies", "again"])
def test_ranks_share_the_bytes_and_write_none_twice(folder: Path, layout: str) -> None:
    files = list((folder / layout / "checkpoints" / "000001").glob("*.safetensors"))
    sizes = dict.fromkeys(("00001", "00002"), 0)
    for file in files:
        sizes[file.stem.split("-")[1]] += sum(tensor.nbytes for tensor in load_file(file).values())
    whole = sum(tensor.nbytes for held in tensors().values() for tensor in held.values())
    assert sum(sizes.values()) == whole
    assert min(sizes.values()) > 0.3 * whole


def test_the_state_is_that_of_one_process(folder: Path) -> None:
    manifests = [
        json.loads((folder / layout / "checkpoints" / "000001" / "manifest.json").read_text())
        for layout in ("one", "sharded", "copies", "again")
    ]
    assert all(told["state"] == {"iteration": 1} for told in manifests)
    assert torch.tensor([len(told["sha256"]) for told in manifests]).tolist() == [3, 6, 6, 6]
