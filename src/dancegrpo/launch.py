"""How the processes of a run find each other, and what outlives a restart by torchrun: texts in its own store."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

from dancegrpo.errors import RankError

SCOPE = "dancegrpo"
_ANSWER = timedelta(seconds=30)
"""For one look into the store."""
_PAUSE = 0.1


@dataclass(frozen=True)
class Launch:
    """One start of all processes, by torchrun or by hand.

    token: names this start; after a restart it is another one. store: for this start's process group. client: a
    connection of its own, so that no thread waits behind what another one waits for. lasting: whether the store is the
    launcher's, and outlives the processes.
    """

    rank: int
    size: int
    token: str
    store: dist.Store
    client: dist.Store
    lasting: bool

    @classmethod
    def join(cls, timeout: float) -> Launch:
        """Waits for all processes, `timeout` seconds at most. Raises RankError where one does not come.

        torchrun keeps one store for all its restarts: without a name of its own, a process that is started again finds
        the addresses of those that died, and tries to connect to them.
        """
        from torch.distributed.rendezvous import rendezvous

        given, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(address, port, is_master=False, timeout=_ANSWER)
        token = agreed_token(client, rank, size, timeout)
        lasting = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, size, token, dist.PrefixStore(f"{SCOPE}/{token}", given), client, lasting)

    def key(self, name: str) -> str:
        """A name that holds for this start alone."""
        return f"{SCOPE}/{self.token}/{name}"

    def recall(self, name: str) -> str | None:
        """What an earlier start of the same launch remembered; None where there was none, or nothing lasts."""
        return read(self.client, f"{SCOPE}/lasting/{name}") if self.lasting else None

    def remember(self, name: str, text: str) -> None:
        """Keeps a text for the next start, where the store lasts."""
        if self.lasting:
            self.client.set(f"{SCOPE}/lasting/{name}", text)

    def all_reach(self, place: str, seconds: float) -> bool:
        """Whether every process calls this with the same `place` within so many seconds. No collective."""
        keys, deadline = [self.key(f"{place}/{rank}") for rank in range(self.size)], time.monotonic() + seconds
        try:
            self.client.set(keys[self.rank], "1")
            while not self.client.check(keys):
                if time.monotonic() > deadline:
                    return False
                time.sleep(_PAUSE)
        except dist.DistError:  # the store is gone, and with it whoever kept it
            return False
        return True


def read(store: dist.Store, key: str) -> str | None:
    """A text of the store, None where there is none; never waits for one."""
    return store.get(key).decode() if store.check([key]) else None


def agreed_token(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A name for this start that all its processes know, though the store may hold what earlier ones left.

    Every process shows up under a word that nobody used before; the first answers each such word with its own, and is
    done when all have said that they heard it. Raises RankError after `timeout` seconds.
    """
    own, deadline = uuid4().hex, time.monotonic() + timeout
    if rank:
        store.set(f"{SCOPE}/hello/{rank}", own)
        while (token := read(store, f"{SCOPE}/answer/{own}")) is None:
            _wait(deadline, "the first process", timeout)
        store.set(f"{SCOPE}/{token}/in/{rank}", "1")
        return token
    missing, answered = set(range(1, size)), set()
    while missing:
        for other in sorted(missing):
            word = read(store, f"{SCOPE}/hello/{other}")
            if word is not None and word not in answered:
                store.set(f"{SCOPE}/answer/{word}", own)
                answered.add(word)
            if store.check([f"{SCOPE}/{own}/in/{other}"]):
                missing.discard(other)
        if missing:
            _wait(deadline, f"rank {min(missing)} of {size}", timeout)
    return own


def _wait(deadline: float, whom: str, timeout: float) -> None:
    if time.monotonic() > deadline:
        raise RankError(f"{whom} did not start within {timeout:.0f} s: look at its log, and start all again")
    time.sleep(_PAUSE)
