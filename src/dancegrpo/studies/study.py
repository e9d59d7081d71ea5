"""A study as data: which arms are trained, what is measured of them, and what is claimed about the outcome."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, JsonValue, PrivateAttr, ValidationError, model_validator

from dancegrpo.errors import ConfigError
from dancegrpo.recipes.messages import explain
from dancegrpo.settings import Fraction, Frozen, PositiveFloat

FOLDER = Path(__file__).parent
"""The shipped studies."""

Name = Annotated[str, Field(pattern=r"^[\w-]+$")]
"""Of an arm or a condition: it becomes part of a file's name."""
Text = Annotated[str, Field(min_length=1)]


class Arm(Frozen):
    """One of the things compared."""

    label: Text
    recipe: str | None = None
    """None = the condition's, else the study's."""
    settings: tuple[str, ...] = ()
    """Dotted overrides, over the study's and the condition's."""
    base: bool = False
    """Not trained: measured before the first iteration of the study's first other arm."""
    tune: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted setting -> its candidates; every combination is tried on a seed of its own (`tuning_length`)."""

    @model_validator(mode="after")
    def _check(self) -> Arm:
        if self.base and (self.recipe or self.settings or self.tune):
            raise ValueError("base=true arms are not trained: take their recipe, settings and tune out")
        return self


class Condition(Frozen):
    """A circumstance in which all arms are compared."""

    label: Text
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    """Dotted overrides, over the study's and under the arm's."""
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    """As the study's `published`, for this condition."""


class Claim(Frozen):
    """A sentence of the paper that the study's numbers can support or not.

    Either `higher` and `lower` name arms, or `as_good` names one and another that it falls at most `within` short of.
    """

    text: Text
    column: str
    condition: str | None = None
    """None = it is asked of every condition."""
    higher: str | None = None
    lower: str | None = None
    as_good: tuple[str, str] | None = None
    within: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> Claim:
        ordered, close = (self.higher, self.lower), (self.as_good, self.within)
        if not (all(ordered) and close == (None, None)) and not (all(close) and ordered == (None, None)):
            raise ValueError(f"text={self.text!r} must name either higher and lower, or as_good and within")
        return self

    @property
    def arms(self) -> tuple[str, str]:
        """The two that are compared; the first minus the second is the difference."""
        return self.as_good or (str(self.higher), str(self.lower))


class Study(Frozen):
    """A comparison of arms on the same held-out prompts, over seeds."""

    name: Name
    title: Text
    question: Text
    paper: Text
    """What the paper found."""
    recipe: Text
    settings: tuple[str, ...] = ()
    columns: Annotated[dict[str, str], Field(min_length=1)]
    """Held-out column -> its label."""
    main: str
    """The column that ranks the arms, and the candidates of tuning."""
    neutral: tuple[str, ...] = ()
    """Columns of which neither more nor less is better."""
    tuning_length: Fraction = 0.5
    """Share of an arm's iterations that each candidate of tuning gets."""
    curve: str | None = None
    """The training metric that is drawn; None = the mean reward of the first judge trained on."""
    conditions: dict[Name, Condition] = Field(default_factory=dict)
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    claims: tuple[Claim, ...] = ()
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    """The paper's own numbers: arm -> column -> value; in a study with conditions they stand with each."""
    _source: str = PrivateAttr("")

    @model_validator(mode="after")
    def _check(self) -> Study:
        if not self.trained:
            raise ValueError("arms are all base arms: give one that is trained")
        self._known("main", [self.main], self.columns)
        self._known("neutral", self.neutral, self.columns)
        for told in map(self.published_in, self.places):
            self._known("published", told, self.arms)
            self._known("published", [column for row in told.values() for column in row], self.columns)
        self._known("claims", [claim.column for claim in self.claims], self.columns)
        self._known("claims", [arm for claim in self.claims for arm in claim.arms], self.arms)
        self._known("claims", [claim.condition for claim in self.claims if claim.condition], self.conditions)
        return self

    def _known(self, field: str, names: Sequence[str] | Mapping[str, Any], known: Mapping[str, Any]) -> None:
        for name in names:
            if name not in known:
                raise ValueError(f"{field} names {name!r}, which the study does not have: use one of {list(known)}")

    @property
    def source(self) -> str:
        """What `dancegrpo reproduce` is given for it: its name, or the path it was loaded from."""
        return self._source or self.name

    @property
    def base(self) -> str | None:
        """The first arm that is not trained, if any."""
        return next((name for name, arm in self.arms.items() if arm.base), None)

    def published_in(self, condition: str | None) -> dict[str, dict[str, float]]:
        """The paper's own numbers for a condition."""
        return self.conditions[condition].published if condition else self.published

    @property
    def trained(self) -> list[str]:
        """The arms that are trained."""
        return [name for name, arm in self.arms.items() if not arm.base]

    @property
    def places(self) -> list[str | None]:
        """The conditions, or a single None."""
        return list(self.conditions) or [None]


def study_names() -> list[str]:
    """The shipped studies, in the order in which `all` runs them."""
    names = {file.stem for file in FOLDER.glob("*.yaml")}
    first = [name for name in ("table2", "figure5", "table5", "figure10", "timesteps", "noise") if name in names]
    return first + sorted(names.difference(first))


def load_study(name: str) -> Study:
    """A shipped study, or a YAML file (`.yaml`) of one. Raises ConfigError, one line."""
    names = study_names()
    file = FOLDER / f"{name}.yaml" if name in names else Path(name).expanduser()
    if name not in names and file.suffix == ".yaml" and not file.is_file():
        raise ConfigError(f"study {name}: no such file; give a study's YAML file, or {', '.join(names)}, all")
    if name not in names and file.suffix != ".yaml":
        near = difflib.get_close_matches(name, names, 1, 0.3)
        nearest = f"the nearest is {near[0]}; " if near else ""
        raise ConfigError(f"unknown study {name!r}: {nearest}use {', '.join(names)}, all, or a YAML file")
    try:
        # As recipes are read: 1e-4 is a number.
        data = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"study {file} cannot be read: {reason}; write it as the shipped ones") from error
    if not isinstance(data, dict):
        raise ConfigError(f"study {file} is not a mapping: write it as the shipped ones, `title: ...` first")
    named: dict[str, Any] = {"name": file.stem, **{str(key): value for key, value in data.items()}}
    try:
        study = Study.model_validate(named)
    except ValidationError as error:
        raise ConfigError(f"study {name}: {explain(error, Study, named)}") from error
    study._source = name
    return study
