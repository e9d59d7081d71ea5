"""Judges that only some of a run's processes have: samples are sent to them, and scores come back.

Samples travel as they do to a reward service, so a judge sees the same bits wherever it is. Each rank's samples are
scored by themselves, in batches cut as if the judge were on that rank: scores do not depend on where it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dancegrpo.distributed import World
from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Reward, Scores, describe
from dancegrpo.rewards.loading import load_reward
from dancegrpo.rewards.panel import Judges
from dancegrpo.settings import RewardConfig

_UNBOUNDED = 1 << 62
"""Samples at once: these come from the run itself."""


class Placed:
    """One judge for several ranks. All of them make it, and call it equally often (`accompany` without samples).

    reward: None on the ranks that do not have it. ranks: those that do, in rising order; each answers an equal share of
    the others. A rank's samples are asked about all at once, when all are there.
    """

    differentiable = False
    batch_size: int | None = None

    def __init__(self, name: str, reward: Reward | None, ranks: Sequence[int], world: World) -> None:
        self.name, self.world = name, world
        self.panel = None if reward is None else Judges({name: reward})
        self.owners = [ranks[source * len(ranks) // world.size] for source in range(world.size)]
        own = b"yes" if getattr(reward, "in_evaluation", True) else b"no"
        self.in_evaluation = world.ask(self.owners, b"in evaluations?", lambda _: own) == b"yes"
        self.home = torch.device("cpu")

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B samples, on the media's device."""
        from dancegrpo.rewards.service import wire

        told: str | None = None
        try:
            request = wire.pack_request(self.name, media, prompts)
        except Exception as error:  # the other ranks wait for this one
            request, told = b"", str(error) if isinstance(error, wire.WireError) else describe(error)
        answer = self.world.ask(self.owners, request, self._answer)
        if told is None:
            try:
                return wire.read_answer(answer, self.name, self.name, len(media)).to(media.device)
            except wire.WireError as error:
                told = wire.shorten(answer.decode(errors="replace")) or str(error)
        return Scores.failed(len(media), f"the samples could not be handed over: {told}", media.device)

    def accompany(self) -> None:
        """Answers the other ranks, with no samples of its own."""
        self.world.ask(self.owners, b"", self._answer)

    def to(self, device: Any) -> Self:
        """Moves the judge; the samples of other ranks are brought there too."""
        self.home = torch.device(device)
        if self.panel is not None:
            self.panel.to(device)
        return self

    def stop(self) -> None:
        """Tells the judge, where it listens, that nobody waits for it any more."""
        for reward in self.panel.rewards.values() if self.panel else ():
            getattr(reward, "stop", lambda: None)()

    @torch.no_grad()
    def _answer(self, request: bytes) -> bytes:
        """The scores of one rank's samples; in place of them a text, where they cannot be read."""
        from dancegrpo.rewards.service import wire

        if not request or self.panel is None:
            return b""
        try:
            with tempfile.TemporaryDirectory(prefix="dancegrpo-") as folder:
                asked = wire.unpack_request(request, Path(folder), _UNBOUNDED)
                scores = self.panel.score(asked.media.to(self.home), asked.prompts)[self.name]
            return wire.pack_answer(self.name, self.name, scores.to("cpu"))
        except Exception as error:
            return (str(error) if isinstance(error, wire.WireError) else describe(error)).encode(errors="replace")


def load_placed(name: str, config: RewardConfig, world: World) -> Reward:
    """The judge that `config` describes, loaded on the ranks of `config.ranks` alone; every rank must ask.

    Raises RewardError for ranks that there are not, and as `load_reward` does.
    """
    ranks = {"all": range(world.size), "main": [0]}[config.ranks] if isinstance(config.ranks, str) else config.ranks
    chosen = sorted(set(ranks))
    if chosen[-1] >= world.size:
        many = f"{world.size} processes, 0 to {world.size - 1}" if world.size > 1 else "a single process, 0"
        raise RewardError(
            f"ranks={list(ranks)} of judge {name!r} are not all there, the run has {many}: set it to all."
        )
    if len(chosen) == world.size:
        return load_reward(name, config)
    return Placed(name, load_reward(name, config) if world.rank in chosen else None, chosen, world)
