"""How weights and sequences are laid out over ranks: FSDP2, Ulysses, and a tensor's way from whole to part and back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dancegrpo.distributed import World


def shard(module: Any, world: World, dtype: torch.dtype = torch.float32) -> None:
    """FSDP2 on a denoiser: its repeated blocks one by one, then what is left.

    dtype: what weights are gathered and computed in; those that the optimizer moves, and the sums of gradients, stay
    float32. Gradients are summed over all ranks, not averaged: the loss of each is already divided by the whole batch's
    count.
    """
    # Some blocks return views; nothing here writes into an output.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = world.mesh if world.size > world.fsdp else world.mesh["fsdp"]
    names = set(getattr(module, "_repeated_blocks", None) or ())
    # Inputs as they are: autocast knows better which of them to widen.
    half = None if dtype is torch.float32 else dtype
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [part for part in module.modules() if type(part).__name__ in names]:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=world.settings.reshard_update)
    fully_shard(module, mesh=mesh, mp_policy=precision)
    for part in sharded(module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def split_sequences(module: Any, plan: Mapping[str, Any], world: World) -> None:
    """Ulysses (arXiv:2309.14509) on a denoiser of diffusers: each rank of a share computes a piece of every sequence,
    and in attention some of the heads for the whole of it.

    plan: what is split and gathered, as in diffusers' `_cp_plan`. Inputs and the output are whole on every rank. The
    backward pass leaves each the gradient of its piece: `World.sum_gradients` and FSDP2 add them up. Before `shard`.
    """
    from diffusers.hooks import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig as Layout

    config = Layout(context_parallel_config=ContextParallelConfig(ulysses_degree=world.context))
    mesh = world.sequence_mesh["ring", "ulysses"]
    # Not `enable_parallelism`: it divides by the number of accelerators, of which a CPU has none.
    config.setup(world.rank, world.size, torch.device(mesh.device_type), mesh=mesh)
    processors: list[Any] = [getattr(part, "processor", None) for part in module.modules()]
    for processor in processors:
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
    _cast_before_attention()
    apply_context_parallel(module, config.context_parallel_config, plan)


def _cast_before_attention() -> None:
    """Makes diffusers' attention over split sequences take queries, keys and values in autocast's type.

    Its forward pass leaves that to autocast, which the backward pass is outside of: there they differ, and it fails.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    known = _AttentionBackendRegistry._backends
    native = known[AttentionBackendName.NATIVE]
    if hasattr(native, "__wrapped__"):
        return

    @wraps(native)
    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        device = query.device.type
        if options.get("_parallel_config") is not None and torch.is_autocast_enabled(device):
            query, key, value = (heads.to(torch.get_autocast_dtype(device)) for heads in (query, key, value))
        return native(query, key, value, **options)

    known[AttentionBackendName.NATIVE] = attention


def sharded(module: Any) -> list[Any]:
    """The parts of a module that FSDP2 manages; none in a single process."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """What of a weight lies on this rank: itself, or its shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A weight put together from all ranks; itself where it is not sharded. Every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class InParts(Protocol):
    """A tensor that lies elsewhere and is read part by part."""

    def read(self, first: Sequence[int] | None = None, length: Sequence[int] | None = None) -> Tensor:
        """A copy of the elements from `first` on, `length` of them, by dimension; by default all."""


def laid_out(tensor: Tensor | InParts, like: Tensor, *, copy: bool = False) -> Tensor:
    """A whole tensor as `like` is laid out: on its device, this rank's shard of it where it is sharded.

    Of a tensor that lies elsewhere no more is read than this rank's shard.
    """
    if isinstance(tensor, DTensor):
        return tensor
    if not isinstance(tensor, Tensor):
        mine = tensor.read(*part(like)).to(like.device)
        if not isinstance(like, DTensor):
            return mine
        layout: Any = {"run_check": False, "shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(mine, like.device_mesh, like.placements, **layout)
    if not isinstance(like, DTensor):
        return tensor.to(like.device, copy=copy)
    # Every rank has read the same tensor: nothing needs to be sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def part(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Where what lies on this rank belongs in the whole tensor: first index and length, by dimension."""
    first, length = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        for number, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):  # cut as `torch.chunk` cuts: the last ones may be short, or empty
                mesh, dimension = tensor.device_mesh, placement.dim
                rows = -(-length[dimension] // mesh.size(number))
                begin = min(rows * mesh.get_local_rank(number), length[dimension])
                first[dimension] += begin
                length[dimension] = min(rows, length[dimension] - begin)
    return first, length


def first_element(weight: Tensor) -> int:
    """Where this rank's shard begins in the whole weight, laid out flat; 0 where it is not sharded."""
    return part(weight)[0][0] * (weight.numel() // max(1, weight.shape[0])) if weight.ndim else 0
