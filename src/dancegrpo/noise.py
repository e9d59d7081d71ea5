"""Noise is a function, not a state: every random tensor comes from a generator keyed by what it is for.

The same run therefore draws the same noise in any batch size, on any number of devices, resumed or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def key(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit generator seed from (seed, purpose, indices); unrelated for any two different tuples."""
    text = "/".join((str(seed), purpose, *map(str, indices)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator keyed by (seed, purpose, indices)."""
    return torch.Generator().manual_seed(key(seed, purpose, *indices))


def normal(shape: Sequence[int], seed: int, purpose: str, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Standard normal noise, one keyed draw per row: (len(rows), *shape) float32 on the CPU.

    A row's noise depends on its own key alone, never on the rows beside it.
    """
    out = torch.empty(len(rows), *shape)
    random = torch.Generator()
    for slot, indices in zip(out, rows, strict=True):
        random.manual_seed(key(seed, purpose, *indices))
        slot.normal_(generator=random)
    return out
