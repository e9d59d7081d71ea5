"""What people voted: how it is scored, and the file that keeps it."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.rewards.encoding import to_bytes

Mode = Literal["rank", "thumbs"]
MODES: tuple[Mode, ...] = ("rank", "thumbs")
Vote = int | None
"""Ranks: the place, 0 = best, equal numbers = a tie. Thumbs: 1 = up, 0 = down. None = no vote."""

_log = logging.getLogger(__name__)


def fingerprint(sample: Tensor | np.ndarray) -> str:
    """What identifies a sample: SHA-256, in hex, of what a person sees of it.

    sample: (F, 3, H, W), uint8 or float in [0, 1], or (F, H, W, 3) uint8 as an array. Hashed are the text `F,H,W,` and
    the pixels as bytes in the order frame, row, column, channel.
    """
    frames = to_bytes(sample) if isinstance(sample, Tensor) else np.ascontiguousarray(sample)
    digest = hashlib.sha256(",".join(map(str, frames.shape[:3])).encode() + b",")
    digest.update(frames.tobytes())
    return digest.hexdigest()


def group_key(mode: Mode, prompt: str, samples: Sequence[str]) -> str:
    """What identifies a question: SHA-256, in hex, of the mode, the prompt and the sorted fingerprints, as JSON."""
    asked = json.dumps([mode, prompt, sorted(samples)], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(asked.encode()).hexdigest()


def scores_of(mode: Mode, votes: Sequence[Vote]) -> list[float | None]:
    """Votes of one group as scores in [0, 1]; None where there is none.

    thumbs: the vote. rank: of n ranked samples the best gets 1, the r-th (from 0) (n-1-r)/(n-1), the last 0; those who
    share a place share the mean of the places they take up. A lone ranked sample is compared with nothing: no score.
    """
    if mode == "thumbs":
        return [None if vote is None else float(vote) for vote in votes]
    places = sorted(vote for vote in votes if vote is not None)
    last = len(places) - 1
    if last < 1:
        return [None] * len(votes)
    # The places an equal value takes up: from its first to its last index in the sorted list.
    rank = {place: places.index(place) + (places.count(place) - 1) / 2 for place in places}
    return [None if vote is None else (last - rank[vote]) / last for vote in votes]


def check_votes(mode: Mode, votes: Any, count: int) -> list[Vote]:
    """`votes` as they should be for `count` samples. Raises ValueError, one line, for anything else."""
    if not isinstance(votes, list) or len(votes) != count:
        raise ValueError(f"votes must be a list of {count}")
    highest = 1 if mode == "thumbs" else count - 1
    if not all(vote is None or (type(vote) is int and 0 <= vote <= highest) for vote in votes):
        raise ValueError(f"a vote must be null or a whole number from 0 to {highest}")
    given, least = sum(vote is not None for vote in votes), 1 if mode == "thumbs" else 2
    if given < min(least, count):
        raise ValueError(f"{given} of {count} samples have a vote: give at least {least}")
    return votes


@dataclass(frozen=True)
class Ballot:
    """One group's answer: the samples by fingerprint and their votes in that order; skipped: nobody wants to judge."""

    mode: Mode
    prompt: str
    samples: tuple[str, ...]
    votes: tuple[Vote, ...]
    skipped: bool = False

    @property
    def key(self) -> str:
        """The group's `group_key`."""
        return group_key(self.mode, self.prompt, self.samples)

    def votes_for(self, samples: Sequence[str]) -> list[Vote]:
        """The votes in another order of the same samples; of equal samples the first here is the first there."""
        held: dict[str, list[Vote]] = defaultdict(list)
        for sample, vote in zip(self.samples, self.votes, strict=True):
            held[sample].append(vote)
        return [held[sample].pop(0) for sample in samples]

    @staticmethod
    def read(record: Any) -> Ballot:
        """A line of the file. Raises ValueError, one line, for anything else."""
        if not isinstance(record, dict) or record.get("mode") not in MODES:
            raise ValueError(
                f"a ballot is an object with mode, prompt, media and votes, mode one of {', '.join(MODES)}"
            )
        prompt, samples, skipped = record.get("prompt"), record.get("media"), record.get("skipped", False)
        if not isinstance(prompt, str) or type(skipped) is not bool:
            raise ValueError("prompt must be a text, skipped true or false")
        if not isinstance(samples, list) or not samples or not all(isinstance(sample, str) for sample in samples):
            raise ValueError("media must be a list of fingerprints")
        votes = [None] * len(samples) if skipped else check_votes(record["mode"], record.get("votes"), len(samples))
        ballot = Ballot(record["mode"], prompt, tuple(samples), tuple(votes), skipped)
        if record.get("group", ballot.key) != ballot.key:
            raise ValueError("group is not the key of its mode, prompt and media")
        return ballot

    def record(self) -> Mapping[str, Any]:
        """As a line of the file."""
        return {
            "group": self.key,
            "mode": self.mode,
            "prompt": self.prompt,
            "media": list(self.samples),
            "votes": list(self.votes),
            "skipped": self.skipped,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }


_BEGINNING = b'{"group"'
"""How each line that `Votes.add` writes begins."""


class Votes:
    """Every ballot of a JSON-lines file by its group, the latest of each; new ones are on the disk when `add` returns.

    Raises RewardError for a file that cannot be read or written, or a line that is no ballot. The half line that a
    crash may leave at the end is dropped.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        self.ballots: dict[str, Ballot] = {}
        self._lock = threading.Lock()
        try:
            if writable:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            content = path.read_bytes()
            whole = self._load(content)
            if writable and whole < len(content):
                os.truncate(path, whole)
            if writable and content[:whole] and not content[:whole].endswith(b"\n"):
                self._append(b"\n")
        except OSError as error:
            remedy = "name a file with votes" if not writable else "name a file that can be written"
            raise RewardError(f"votes={str(path)!r} cannot be opened: {error.strerror or error}; {remedy}.") from error

    def get(self, key: str) -> Ballot | None:
        """The latest ballot of a group."""
        return self.ballots.get(key)

    def add(self, ballot: Ballot) -> None:
        """Keep a ballot; it replaces an earlier one of its group. Raises OSError when the disk refuses."""
        line = json.dumps(ballot.record()).encode() + b"\n"
        with self._lock:
            self._append(line)
            self.ballots[ballot.key] = ballot

    def _append(self, line: bytes) -> None:
        # One write to a file opened for appending: two runs may share it, and no line is torn but by a crash.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(handle).st_size
            if os.write(handle, line) < len(line):
                os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        finally:
            os.close(handle)

    def _load(self, content: bytes) -> int:
        """Read all lines; returns how many bytes of the file are whole lines."""
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            torn = number == len(lines) and not line.endswith(b"\n")
            try:
                ballot = Ballot.read(json.loads(line))
            except (ValueError, RecursionError) as error:
                # Only what `add` may have begun: anything else is somebody's, and stays as it is.
                if torn and isinstance(error, json.JSONDecodeError) and _BEGINNING.startswith(line[: len(_BEGINNING)]):
                    _log.warning("%s ends in half a line, which is dropped", self.path)
                    return len(content) - len(line)
                remedy = "mend or delete the line"
                raise RewardError(f"votes {str(self.path)!r} line {number} is no ballot: {error}; {remedy}.") from error
            self.ballots[ballot.key] = ballot
        return len(content)
