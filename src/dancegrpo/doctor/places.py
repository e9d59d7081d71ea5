"""Where everything lies: what is resident, what is lent while it works, what waits in the host's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dancegrpo.algorithms import ReFL
from dancegrpo.config import RunConfig
from dancegrpo.doctor.judges import JudgeNetwork
from dancegrpo.doctor.layout import gradient_bytes, shard_bytes, sharded
from dancegrpo.doctor.passes import Work
from dancegrpo.doctor.phases import Iteration

PHASES = ("load", "encode", "rollout", "decode", "score", "update", "save")
"""In the order of a run."""
_SAMPLING = ("rollout", "decode", "score", "update")
"""While the weights that were gathered first stay whole, and the transitions of a rollout wait."""


def assembled(
    config: RunConfig, device: torch.device, iteration: Iteration, judges: list[JudgeNetwork], work: dict[str, Work]
) -> tuple[dict[str, int], dict[str, int], dict[str, Work], dict[str, int], dict[str, int], int]:
    """The fields of a `Prediction`, in their order, of one GPU."""
    policy, apart = iteration.policy, device.type != "cpu"
    networks = policy._networks()
    sizes = {name: _bytes([*part.parameters(), *part.buffers()]) for name, part in networks.items()}
    lent = {n: s for n, s in sizes.items() if n not in policy.modules} if config.model.offload and apart else {}
    told = _resident(iteration, judges, {name: size for name, size in sizes.items() if name not in lent})
    always = sum(told.values())
    lent_to = {phase: sum(lent.get(name, 0) for name in names) for phase, names in _users(iteration).items()}
    hosted = iteration.transition_bytes if config.rollout.store == "host" and apart else 0
    peak = {"load": _loading(iteration, told, sizes), "save": always}
    for phase, needed in work.items():
        peak[phase] = always + lent_to.get(phase, 0) + needed.held + needed.made
        if phase in _SAMPLING and needed.times:
            peak[phase] += _shared(iteration, phase, needed) - hosted
    saved = _checkpoint(iteration)
    staged = -(-saved // iteration.layout.gpus)  # each GPU copies and writes its part of a checkpoint
    loaded = sum(_as_published(part, policy.dtype) for part in networks.values())
    host = _host(iteration, loaded, sum(lent.values()), hosted, staged) if apart else {}
    if not apart:
        peak["save"] += staged
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in networks.items()}
    return {phase: peak[phase] for phase in PHASES}, host, work, told, counts, saved


def _resident(iteration: Iteration, judges: list[JudgeNetwork], sizes: Mapping[str, int]) -> dict[str, int]:
    """What lies on a GPU the whole time, by name; shards of what is sharded."""
    policy, updater, fsdp = iteration.policy, iteration.updater, iteration.layout.fsdp
    own = {name: sharded([module], fsdp).own if fsdp > 1 else sizes[name] for name, module in policy.modules.items()}
    references = policy._references.values()
    reference = sharded(references, fsdp).own if fsdp > 1 else _bytes(t for r in references for t in r.parameters())
    moments = [tensor for state in updater.optimizer.state.values() for tensor in state.values()]
    old = (getattr(iteration.algorithm, "old", None) or {}).values()
    judged = sum(judge.parameter_bytes for judge in judges)
    judged += _bytes(t for judge in judges if judge.network for t in judge.network.parameters())
    return {
        **sizes,
        **own,
        "reference": reference,
        "optimizer": _shards(moments, fsdp),
        "averages": _shards([*(updater.ema or {}).values(), *updater._landmarks.values(), *old], fsdp),
        "judges": judged,
    }


def _loading(iteration: Iteration, told: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Denoisers come to the device whole, and are sharded there."""
    policy = iteration.policy
    whole = {name: sizes[name] for name in policy.modules}
    references = _bytes(t for network in policy._references.values() for t in network.parameters())
    held = {**told, **whole, "reference": references, "optimizer": 0}
    return sum(held.values())


def _shared(iteration: Iteration, phase: str, needed: Work) -> int:
    """What a phase needs beside its own tensors: gradients in the update, and of sharded weights what is gathered."""
    policy, fsdp = iteration.policy, iteration.layout.fsdp
    networks = [*policy.modules.values(), *policy._references.values()]
    parallel, lying = iteration.config.parallel, sharded(networks, fsdp, policy.dtype)
    resharded = {"rollout": parallel.reshard_rollout, "update": parallel.reshard_update}.get(phase, True)
    gathered = lying.gathered if resharded else lying.whole
    if phase != "update":
        return gathered
    trained = iteration.updater.parameters.values()
    whole = needed.micro_batches if parallel.reduce == "once" else 1
    return gathered + gradient_bytes(trained, policy.modules.values(), fsdp, whole)


def _checkpoint(iteration: Iteration) -> int:
    updater = iteration.updater
    kinds = [updater.parameters.values(), (updater.ema or {}).values()]
    moments = [tensor for state in updater.optimizer.state.values() for tensor in state.values()]
    return sum(_bytes(kind) for kind in kinds) + _bytes(moments)


def _host(iteration: Iteration, loaded: int, lent: int, hosted: int, staged: int) -> dict[str, int]:
    """By phase, beside an accelerator. Weights are read whole, then moved; buffers of a save stay after the first."""
    starts = iteration.total * 4 * torch.Size(iteration.policy.latent_shape).numel()
    extra = {"rollout": hosted + starts, "decode": hosted + starts, "score": hosted + starts, "update": hosted}
    return {phase: max(loaded, lent) if phase == "load" else lent + staged + extra.get(phase, 0) for phase in PHASES}


def _as_published(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a network as it is read, before its layers are stored in 8 bits."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}.values()
    return sum(t.numel() * dtype.itemsize if t.dtype == torch.int8 else t.nbytes for t in tensors)


def _users(iteration: Iteration) -> dict[str, list[str]]:
    """The parts that a phase wakes where they are offloaded."""
    policy = iteration.policy
    encoders = [*policy.encoders, *(["vae"] if policy.takes_image else [])]
    learning = ["vae"] if isinstance(iteration.algorithm, ReFL) or iteration.config.offline else []
    return {"encode": encoders, "decode": ["vae"], "update": learning}


def _shards(tensors: Iterable[Tensor], ranks: int) -> int:
    held = list(tensors)
    return _bytes(held) if ranks == 1 else sum(shard_bytes(tensor, ranks) for tensor in held)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
