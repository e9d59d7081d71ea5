"""Frozen networks that lie in the host's memory and are lent to the device while they work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def lent(networks: Iterable[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Within it, the networks' parameters and buffers are copies on `device`; after it, the very tensors from before.

    The networks are frozen, so nothing has to come back: the copies are dropped. What autograd recorded within keeps
    the copies it needs until its backward pass, which may therefore run afterwards.
    """
    held: list[tuple[MutableMapping[str, Any], str, Tensor]] = []
    copies: dict[int, Tensor] = {}  # by the original: tied weights stay one tensor
    try:
        for network in networks:
            for table, name, tensor in list(_tensors(network)):
                if id(tensor) not in copies:
                    copies[id(tensor)] = _copy(tensor, device)
                held.append((table, name, tensor))
                table[name] = copies[id(tensor)]
        yield
    finally:
        for table, name, tensor in reversed(held):
            table[name] = tensor


def _tensors(network: torch.nn.Module) -> Iterator[tuple[MutableMapping[str, Any], str, Tensor]]:
    """Every parameter and buffer with the table and the name under which its module finds it."""
    for module in network.modules():
        # Not `tensor.data = ...`: autograd holds the parameter itself, and would find other data at its backward pass.
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield table, name, tensor


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    copy = tensor.detach().to(device)
    return torch.nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else copy
