"""From a study to runs: the resolved settings of each arm, condition and seed, and the key that runs share."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dancegrpo.config import RunConfig, diff_configs, load_config
from dancegrpo.errors import ConfigError
from dancegrpo.studies.study import Study

TUNING_SEED = 1000
"""Never among the studied seeds."""
TUNING_EVALUATION_SEED = 4321
"""Picks other held-out prompts for tuning than those the study is measured on."""
NOT_IDENTITY = {"name", "description", "output", "threads", "tracking", "checkpoint", "parallel", "health"}
"""Settings that do not touch what a run computes."""


@dataclass(frozen=True)
class Job:
    """One run that a study asks for.

    condition: None in a study without. tuned: the settings that tuning chose. candidate: the settings that are tried,
    in a run that tunes.
    """

    study: str
    arm: str
    condition: str | None
    seed: int
    recipe: str
    config: RunConfig
    tuned: Mapping[str, Any] = field(default_factory=dict)
    candidate: Mapping[str, Any] | None = None

    @cached_property
    def key(self) -> str:
        """What the run computes, as 16 hexadecimal digits."""
        return config_key(self.config)

    @property
    def file(self) -> str:
        """Its result, relative to the folder of results."""
        place = f"{self.arm}.{self.condition}" if self.condition else self.arm
        if self.candidate is None:
            return f"{self.study}/{place}.seed{self.seed}.json"
        tried = ",".join(f"{name.rsplit('.', 1)[-1]}={_word(value)}" for name, value in self.candidate.items())
        return f"{self.study}/tuning/{place}.{tried}.json"

    @property
    def title(self) -> str:
        """How messages call it."""
        words = [self.study, self.arm, *([self.condition] if self.condition else [])]
        if self.candidate is None:
            return " ".join([*words, f"seed {self.seed}"])
        return " ".join([*words, "tuning", *(f"{name}={_word(value)}" for name, value in self.candidate.items())])

    def changes(self) -> dict[str, Any]:
        """The settings that differ from the recipe's, by dotted key."""
        found = diff_configs(load_config(self.recipe), self.config)
        return {
            key: value
            for key, (_, value) in found.items()
            if key.split(".")[0] not in NOT_IDENTITY and key not in ("seed", "evaluation.seed")
        }


def config_key(config: RunConfig) -> str:
    """A hash over the settings that determine what a run computes.

    Over those that are not at their default: a setting that a later version adds leaves the key of older runs as it is.
    """
    data = config.model_dump(mode="json", exclude=NOT_IDENTITY, exclude_defaults=True)
    if config.health.watch == "rollback":  # skips updates and goes back; the others only look on
        data["health"] = config.health.model_dump(mode="json")
    # The seed always tells: a run with the default seed is as much a run of that seed as any other.
    text = json.dumps({**data, "seed": config.seed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Plan:
    """The runs of one study. `tuned` is asked for each arm's choice; None there = not known yet."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._jobs: dict[tuple[Any, ...], Job] = {}

    def candidates(self, arm: str) -> list[Job]:
        """The tuning runs of an arm, in the study's first condition; [] where nothing is tuned."""
        tune = self.study.arms[arm].tune
        if not tune:
            return []
        tried = [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]
        return [self._job(arm, self.study.places[0], TUNING_SEED, {}, candidate) for candidate in tried]

    def job(self, arm: str, condition: str | None, seed: int, tuned: Mapping[str, Any]) -> Job:
        """The run of an arm in a condition, with what tuning chose. Raises ConfigError where the settings don't fit."""
        return self._job(arm, condition, seed, tuned, None)

    def _job(
        self,
        arm: str,
        condition: str | None,
        seed: int,
        tuned: Mapping[str, Any],
        candidate: Mapping[str, Any] | None,
    ) -> Job:
        at = (arm, condition, seed, repr(tuned), repr(candidate))
        if at not in self._jobs:
            self._jobs[at] = self._resolve(arm, condition, seed, tuned, candidate)
        return self._jobs[at]

    def _resolve(
        self,
        arm: str,
        condition: str | None,
        seed: int,
        tuned: Mapping[str, Any],
        candidate: Mapping[str, Any] | None,
    ) -> Job:
        study, chosen = self.study, self.study.arms[arm]
        place = study.conditions[condition] if condition else None
        recipe = chosen.recipe or (place.recipe if place else None) or study.recipe
        # Nothing watches, unless a study asks for it: an algorithm that collapses is to be seen collapsing.
        settings = ["health.watch=none", *study.settings, *(place.settings if place else ()), *chosen.settings]
        settings += [f"{key}={json.dumps(value)}" for key, value in {**tuned, **(candidate or {})}.items()]
        settings += [f"seed={seed}", f"name={study.name}-{arm}", "tracking.backend=none"]
        settings += ["checkpoint.keep=1", "checkpoint.best=false"]
        try:
            config = load_config(recipe, settings)
            if candidate is not None:
                length = max(1, int(config.iterations * study.tuning_length))
                tried = [f"iterations={length}", f"evaluation.seed={TUNING_EVALUATION_SEED}"]
                config = load_config(recipe, [*settings, *tried])
        except ConfigError as error:
            at = f" ({condition})" if condition else ""
            raise ConfigError(f"study {study.name}, arm {arm}{at}: {error}") from error
        return Job(study.name, arm, condition, seed, recipe, config, dict(tuned), candidate)


def _word(value: Any) -> str:
    """A value for a file's name: nothing in it that a file's name cannot hold."""
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isalnum() or letter in "+-._" else "_" for letter in text)
