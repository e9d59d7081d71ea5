"""When to skip an update, go back, or stop: decisions alone; the loop acts on them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dancegrpo.health.alarms import Alarm
from dancegrpo.health.history import WINDOW
from dancegrpo.settings import HealthConfig

WARM_UP = 8
"""Accepted gradient norms before one can be called a spike."""
REMEMBERED = 20
"""Accepted gradient norms behind the running median."""
FATAL = ("collapse",)
"""Alarms after which a run goes back."""


@dataclass(frozen=True)
class Decision:
    """What to do after an iteration. until: the newest state that may be gone back to, in iterations done.

    reason: one sentence; the run's verdict where it stops.
    """

    action: Literal["go on", "roll back", "stop"]
    until: int = 0
    reason: str = ""


class Guard:
    """Skips updates whose gradient spikes; asks for a rollback after several, or a collapse; in the end for a stop.

    `rate` is what the learning rate is to be multiplied with; it never rises. Does nothing but with
    `health.watch=rollback`, except that an update whose gradient is not finite is never allowed.
    """

    def __init__(self, config: HealthConfig) -> None:
        self.config, self.active = config, config.watch == "rollback"
        self.rate, self.rollbacks, self.skipped = 1.0, 0, 0
        """skipped: updates in a row."""
        self._norms: deque[float] = deque(maxlen=REMEMBERED)
        self._since: int | None = None  # the iteration, from the last decision on, in which skipping began
        self._largest = 0.0
        self._iteration = 0
        self._returned = 0  # iterations done at the last rollback: what was loaded then is good

    def allow(self, norm: float) -> bool:
        """Whether to make the update whose gradient, before clipping, has this norm. False = leave the weights."""
        if math.isfinite(norm) and not (self.active and self._spikes(norm)):
            self._norms.append(norm)
            self.skipped = 0
            return True
        self.skipped += 1
        if self.skipped == 1:
            self._since, self._largest = self._iteration, 0.0
        self._largest = max(self._largest, norm) if math.isfinite(norm) else math.inf
        return False

    def after(self, iteration: int, alarms: Sequence[Alarm]) -> Decision:
        """What to do after iteration `iteration` (from 0), which raised these alarms.

        "roll back": load the newest checkpoint of at most `until` iterations done (the starting weights where there is
        none) with its optimizer's state, delete newer ones, save what was loaded as the checkpoint of now, multiply the
        configured learning rate with `rate`, and go on with the next iteration, so that new samples are drawn. "stop":
        end the run, say `reason`.
        """
        self._iteration = iteration + 1
        reason, until = self._trouble(iteration, alarms)
        if not self.active or not reason:
            return Decision("go on")
        self.skipped, self._since, until = 0, None, max(until, self._returned)
        if self.rollbacks >= self.config.max_rollbacks:
            told = f"after {self.rollbacks} rollbacks, with the learning rate at {self.rate:.3g} of what was asked for"
            return Decision("stop", until, f"stopped {told}: {reason}")
        self.rollbacks, self._returned = self.rollbacks + 1, iteration + 1
        self.rate *= self.config.factor
        self._norms.clear()  # the state gone back to may have others
        told = f"the learning rate is now {self.rate:.3g} of what was asked for ({self.rollbacks} of at most "
        return Decision("roll back", until, f"{reason}; {told}{self.config.max_rollbacks} rollbacks)")

    def refuge(self, done: int) -> int:
        """The newest state, in iterations done, that would still count as good if a collapse showed after `done`."""
        return max(0, done - 2 * WINDOW, self._returned)

    def metrics(self) -> dict[str, float]:
        """For the iteration's line; the monitor reads the rollbacks there."""
        return {"health/rollbacks": self.rollbacks, "health/rate": self.rate}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the decisions that follow are those that would have followed without a stop."""
        return {
            "rate": self.rate,
            "rollbacks": self.rollbacks,
            "skipped": self.skipped,
            "norms": list(self._norms),
            "since": self._since,
            "largest": self._largest if math.isfinite(self._largest) else None,
            "iteration": self._iteration,
            "returned": self._returned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`. After a rollback do not: what was decided since stays decided."""
        self.rate, self.rollbacks, self.skipped = state["rate"], state["rollbacks"], state["skipped"]
        self._norms = deque(state["norms"], maxlen=REMEMBERED)
        self._since, self._iteration, self._returned = state["since"], state["iteration"], state["returned"]
        self._largest = math.inf if state["largest"] is None else state["largest"]

    def _spikes(self, norm: float) -> bool:
        if len(self._norms) < WARM_UP:
            return False
        usual = statistics.median(self._norms)
        return usual > 0 and norm > self.config.spike * usual

    def _trouble(self, iteration: int, alarms: Sequence[Alarm]) -> tuple[str, int]:
        """The reason to go back, "" = none, and how far at least."""
        fatal = next((alarm for alarm in alarms if alarm.name in FATAL), None)
        if fatal is not None:
            # It shows in the mean of a window: what broke the weights happened before it, or early in it.
            return f"{fatal.name}: {fatal.text}", self.refuge(iteration + 1)
        if self.skipped < self.config.max_skips:
            return "", 0
        size = f"up to {self._largest:.3g}" if math.isfinite(self._largest) else "not finite"
        begun = iteration if self._since is None else self._since
        return f"{self.skipped} updates in a row were skipped, their gradient norms {size}", begun
