"""Which prompts form the groups of each iteration."""

from __future__ import annotations

import numpy as np


class GroupSampler:
    """Which prompts form the groups of each iteration: shuffled epochs, as a pure function of (seed, iteration).

    Nothing is remembered between iterations but one permutation (4 bytes per prompt), so a resumed run, or one on
    another number of devices, draws the same prompts.
    """

    def __init__(self, source_length: int, per_iteration: int, seed: int) -> None:
        if source_length < 1 or per_iteration < 1:
            raise ValueError(f"{per_iteration} groups from {source_length} prompts: both must be at least 1")
        self._length, self._per_iteration, self._seed = source_length, per_iteration, seed
        self._cached: tuple[int, np.ndarray] | None = None

    def indices(self, iteration: int) -> list[int]:
        """The prompt of each group of an iteration, counted from 0; every epoch visits every prompt exactly once."""
        if iteration < 0:
            raise ValueError(f"iteration={iteration} must be at least 0")
        first = iteration * self._per_iteration
        places = (divmod(place, self._length) for place in range(first, first + self._per_iteration))
        return [int(self._permutation(epoch)[offset]) for epoch, offset in places]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            # numpy promises a bit generator's raw stream for ever, but not what its `permutation` makes of it.
            keys = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=(epoch,))).random_raw(self._length)
            self._cached = epoch, np.argsort(keys, kind="stable").astype(np.uint32)
        return self._cached[1]
