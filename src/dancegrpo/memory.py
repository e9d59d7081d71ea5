"""Bytes of live tensors, counted exactly: what an iteration needs, on any device and without its allocator."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Within it, counts the bytes of the tensors alive, and their peak.

    A storage counts once, however many views it has, from the first operation that meets it until it is freed: also
    what only autograd holds. Kernels' scratch space and what an allocator rounds up to are not counted. Operations of
    other threads are not seen, the backward pass excepted.

    >>> with TensorBytes(held=model.parameters()) as told:
    ...     model(x).sum().backward()
    >>> told.peak
    """

    peak: int
    """Most bytes alive at once since the last `restart`."""
    live: int
    """Bytes alive now."""

    def __init__(self, held: Iterable[Tensor] = (), device: torch.device | str | None = None) -> None:
        """held: tensors that count from the start, met or not. device: counts what lies there; None = everything."""
        super().__init__()
        self._type = None if device is None else torch.device(device).type
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.live = self.peak = 0
        for tensor in held:
            self._meet(tensor)

    def restart(self) -> int:
        """The peak until now; from here on it is counted anew."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation and counts what it read and made."""
        kwargs = kwargs or {}
        self._meet_all((args, kwargs))  # before: an operation may free its inputs
        out = func(*args, **kwargs)
        self._meet_all(out)
        return out

    def _meet_all(self, tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._meet(leaf)

    def _meet(self, tensor: Tensor) -> None:
        if self._type is not None and tensor.device.type != self._type:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or not size:
            return

        def freed(_: object) -> None:
            del self._storages[key]
            self.live -= size

        # torch keeps a storage's Python object for as long as anything, autograd included, holds its memory.
        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
