"""What is refused before anything of a study runs, and which failures of a run are for good."""

from __future__ import annotations

import re

from dancegrpo.errors import ConfigError
from dancegrpo.studies.plan import Job
from dancegrpo.studies.study import Study

DIVERGED = re.compile(r"non-?finite|not finite|diverged|\bnan\b|\binf(inity)?\b", re.IGNORECASE)
"""In the last line of a log: the settings are to blame, and the same run would end the same way."""


def diverged(error: str) -> bool:
    """Whether a run's last line names divergence."""
    return DIVERGED.search(error) is not None


def check_measured(study: Study, job: Job) -> None:
    """Raises ConfigError, one line, where a run asks a judge that does not exist, or has no judge of a column.

    `main` and `neutral` are among the columns. The extra part of a column (`JUDGE/EXTRA`) shows once it was measured.
    """
    from dancegrpo.dotted import import_dotted, nearest
    from dancegrpo.rewards.catalog import CATALOG

    place = f" ({job.condition})" if job.condition else ""
    who = f"study {study.name}, arm {job.arm}{place}"
    judges = job.config.rewards
    for name, reward in judges.items():
        if ":" in reward.judge:
            import_dotted(reward.judge, f"{who}: judge {reward.judge!r} of rewards.{name}", ConfigError)
        elif reward.judge not in CATALOG:
            hint = nearest(reward.judge, CATALOG)
            known = f"{', '.join(CATALOG)}, or package.module:function"
            raise ConfigError(f"{who}: judge {reward.judge!r} of rewards.{name} is unknown{hint}: use {known}")
    asked = {f"columns names {column!r}": column.split("/")[0] for column in study.columns}
    if study.curve and study.curve.startswith("reward/"):
        asked[f"curve is {study.curve!r}"] = study.curve.split("/")[1]
    for told, judge in asked.items():
        if judge not in judges:
            raise ConfigError(f"{who}: {told}, but no judge is called {judge}: use one of {', '.join(judges)}")
