"""What each process of `test_checkpoint_ranks` does: load a checkpoint in a layout, compare, save it again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dancegrpo.checkpoint import Checkpoint, Keep, load_latest
from dancegrpo.distributed import World, started
from dancegrpo.saver import Saver
from dancegrpo.settings import ParallelConfig
from dancegrpo.sharding import laid_out, local, shard, whole


class Block(nn.Module):
    """Weights that two ranks cannot halve: one row, three rows, a vector of five."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(1, 3))
        self.three = nn.Parameter(torch.zeros(3, 4, 2))
        self.five = nn.Parameter(torch.zeros(5, dtype=torch.float64))


class Network(nn.Module):
    """Two blocks and a weight that belongs to none."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.root = nn.Parameter(torch.zeros(4, 4))


def tensors() -> dict[str, dict[str, torch.Tensor]]:
    """What everybody should find: by kind and name, whole."""
    shapes = {name: (p.shape, p.dtype) for name, p in Network().named_parameters()}
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for number, kind in enumerate(("weights", "exp_avg")):
        seed = torch.Generator().manual_seed(number)
        kinds[kind] = {n: torch.randn(shape, generator=seed, dtype=dtype) for n, (shape, dtype) in shapes.items()}
    return kinds | {"step": {name: torch.tensor(float(i)) for i, name in enumerate(shapes)}}


def network(world: World) -> Network:
    model = Network()
    if world.fsdp > 1:
        shard(model, world)
    return model


def found(run_dir: Path, world: World) -> dict[str, dict[str, torch.Tensor]]:
    """The newest checkpoint's tensors as this layout's weights lie, each as expected to the last bit."""
    parameters = dict(network(world).named_parameters())
    checkpoint = load_latest(run_dir, pytest.fail, world=world)
    assert checkpoint is not None
    held = {}
    for kind, expected in tensors().items():
        alike = {n: p if kind != "step" else torch.zeros(()) for n, p in parameters.items()}
        held[kind] = {name: laid_out(checkpoint.tensors[kind][name], like) for name, like in alike.items()}
        for name, tensor in held[kind].items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(whole(tensor), expected[name]), (kind, name)
            assert torch.equal(local(tensor), local(laid_out(expected[name], alike[name])))
    return held


def save(run_dir: Path, held: dict[str, dict[str, torch.Tensor]], world: World, iteration: int = 1) -> Saver:
    saver = Saver(world)
    saver.begin(run_dir, Checkpoint(iteration, held, {"iteration": iteration}), Keep(3))
    saver.wait()
    return saver


def main() -> None:
    folder, steps = Path(sys.argv[1]), json.loads(sys.argv[2])
    with started(ParallelConfig(fsdp=2)) as both:
        for fsdp, source, target in steps:
            world = replace(both, fsdp=fsdp)
            held = found(folder / source, world)
            assert save(folder / target, held, world).failure is None
        faults(folder / "faults", held, world)


def faults(run_dir: Path, held: dict[str, dict[str, torch.Tensor]], world: World) -> None:
    """A file that one rank alone finds damaged, and a disk that one rank alone finds full: all ranks agree."""
    for iteration in (1, 2):
        save(run_dir, held, world, iteration)
    world.barrier()
    if world.main:
        file = run_dir / "checkpoints" / "000002" / "exp_avg-00002-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    world.barrier()
    told: list[str] = []
    checkpoint = load_latest(run_dir, told.append, world=world)
    assert checkpoint is not None
    assert checkpoint.iteration == 1
    assert len(told) == 1
    assert "000002 is damaged (exp_avg-00002-of-00002.safetensors does not match its hash)" in told[0]
    if not world.main:
        (run_dir / "checkpoints" / ".000003.partial").mkdir()  # of an earlier attempt
    world.barrier()
    saver = Saver(world)
    if not world.main:
        saver._write = full_disk
    saver.begin(run_dir, Checkpoint(3, held, {}), Keep(3))
    saver.wait()
    assert "000003: No space left on device; free space" in str(saver.failure)
    world.barrier()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["000001", "000002"]


def full_disk(*_: object) -> dict[str, str]:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    main()
