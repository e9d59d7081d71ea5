"""Conditions on disk: each prompt is encoded once, in runs to come too, within a bound of bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from dancegrpo.errors import CheckpointError
from dancegrpo.files import write_atomically
from dancegrpo.policies.base import Condition, Policy
from dancegrpo.prompts import Prompt


class ConditionCache:
    """One safetensors file per prompt in `folder`, at most `max_bytes` together; the least recently used go first.

    A file that cannot be read is a miss, a folder that cannot be written a cache that stays as it is: a cache may cost
    time, never a run. Several processes may share a folder: files appear whole or not at all.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """max_bytes: bound of the files' sizes together; a condition larger than it is not kept."""
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._bytes = sum(size for _, size, _ in self._files())

    @staticmethod
    def key(condition_id: str, prompt: Prompt) -> str:
        """sha256 of all that a condition depends on; condition_id: see `Policy.condition_id`."""
        # repr quotes, so no two different tuples give one text.
        return hashlib.sha256(repr((condition_id, *prompt.request())).encode()).hexdigest()

    def get(self, key: str) -> Condition | None:
        """The condition (length 1, on the CPU) stored under `key`, or None."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        file = self._file(key)
        try:
            tensors = load(file.read_bytes())
            os.utime(file)  # the time of last use, which eviction goes by
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError):
            self._remove(file)
            return None
        return Condition(tensors) if tensors else None

    def put(self, key: str, condition: Condition) -> None:
        """Stores a condition, then evicts down to the bound."""
        from safetensors.torch import save

        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in condition.tensors.items()})
        if len(data) > self.max_bytes:
            return
        file = self._file(key)
        try:
            before = file.stat().st_size if file.exists() else 0
            write_atomically(file, lambda partial: partial.write_bytes(data))
        except (OSError, CheckpointError):  # a cache that cannot be written is only slower
            return
        self._bytes += len(data) - before
        if self._bytes > self.max_bytes:
            self._evict()

    def _evict(self) -> None:
        """Removes the least recently used files down to nine tenths of the bound, so that few puts list the folder."""
        files = sorted(self._files())
        self._bytes = sum(size for _, size, _ in files)
        for _, size, file in files:
            if self._bytes <= 0.9 * self.max_bytes:
                break
            self._remove(file)
            self._bytes -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of every file, those left by a killed process included."""
        found = []
        for file in self.folder.glob("*/*"):
            try:
                status = file.stat()
            except OSError:  # another process removed it
                continue
            found.append((status.st_mtime_ns, status.st_size, file))
        return found

    def _file(self, key: str) -> Path:
        # Two levels: a million files in one folder are slow on some file systems.
        return self.folder / key[:2] / f"{key[2:]}.safetensors"

    @staticmethod
    def _remove(file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError:
            return


class CachedEncoder:
    """`policy.encode` through a cache: the same conditions to the last bit, encoding only what is not stored."""

    def __init__(self, policy: Policy, cache: ConditionCache | None) -> None:
        """cache: None = encode everything."""
        self.policy, self.cache = policy, cache

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """P prompts -> a condition of length P on the policy's device."""
        cache = self.cache
        if cache is None:
            return self.policy.encode(prompts)
        keys = [ConditionCache.key(self.policy.condition_id, prompt) for prompt in prompts]
        known = {key: cache.get(key) for key in keys}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if known[key] is None}
        if missing:
            with self.policy.encoding():
                known |= {key: self._encoded(cache, key, prompt) for key, prompt in missing.items()}
        found = [condition.to(self.policy.device) for condition in known.values() if condition is not None]
        rows = {key: row for row, key in enumerate(known)}
        return Condition.cat(found)[[rows[key] for key in keys]]

    def _encoded(self, cache: ConditionCache, key: str, prompt: Prompt) -> Condition:
        condition = self.policy.encode([prompt])
        cache.put(key, condition)
        return condition
