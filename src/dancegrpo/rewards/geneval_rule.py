"""GenEval's decision rule (arXiv:2310.11513): do the objects found in a picture meet what the prompt asks for?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""What a `color` requirement may name, in the classifier's order."""
RELATIONS = ("left of", "right of", "above", "below")
"""What a `position` requirement may name; y grows downwards."""
COUNTING = "counting"
"""The task whose objects must be found with more certainty."""
_TOUCHING = 1e-3


@dataclass(frozen=True)
class Requirement:
    """At least `count` objects of a class; all of `color`, all in `relation` to those of requirement `target`.

    count: at least 1. target: index of an earlier requirement; None = no position is asked for.
    """

    name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int | None = None


@dataclass(frozen=True)
class Task:
    """What a prompt asks for. limits: by class, the count of objects that is already too many."""

    tag: str
    requirements: tuple[Requirement, ...]
    limits: tuple[tuple[str, int], ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The classes whose objects matter."""
        return frozenset([r.name for r in self.requirements] + [name for name, _ in self.limits])


@dataclass(frozen=True, eq=False)
class Detection:
    """One object. box: x0, y0, x1, y1 in pixels, ends excluded. score: in [0, 1]. mask: (H, W) bool where known."""

    box: tuple[float, float, float, float]
    score: float
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Verdict:
    """correct: the published 0/1. credit: mean credit of the requirements in [0, 1]; 1 exactly where correct."""

    correct: bool
    credit: float


ClassifyColors = Callable[[str, Sequence[Detection]], Sequence[str]]
"""(class, its objects) -> the color of each."""


def read_task(metadata: Mapping[str, Any]) -> Task:
    """The task in a prompt's metadata: `tag`, `include` and perhaps `exclude`, as in `evaluation_metadata.jsonl`.

    Fields that are null count as absent (tables have them). Raises ValueError, one line, where there is no such task.
    """
    tag, include = metadata.get("tag"), metadata.get("include")
    if not isinstance(tag, str) or include is None:
        raise ValueError("the prompt has no GenEval metadata (tag, include)")
    clauses = _clauses(include, "include")
    if not clauses:
        raise ValueError("the prompt's GenEval metadata include nothing")
    requirements = tuple(_requirement(index, clause) for index, clause in enumerate(clauses))
    limits = tuple(_named_count(clause, "exclude") for clause in _clauses(metadata.get("exclude") or [], "exclude"))
    return Task(tag, requirements, limits)


def judge(task: Task, found: Mapping[str, Sequence[Detection]], classify: ClassifyColors) -> Verdict:
    """The published rule and, beside it, a graded credit.

    found: by class, the objects that count, most certain first. classify: asked only about the objects that a color is
    required of. Of each class only the `count` most certain objects are looked at for color and position; more objects
    than asked for are no fault, unless a limit says so. A relation must hold between all pairs, and its target must
    have met its own requirement.
    Credit: the mean over what is asked: each count (the share that is there; one object too many costs as much as one
    missing, where there is a limit), each color (the share that has it), each position (0 or 1), and each limit of a
    class that is not asked for (0 or 1). A color or position counts 0 where its objects are too few.
    """
    correct = all(len(found.get(name, ())) < limit for name, limit in task.limits)
    asked = {requirement.name for requirement in task.requirements}
    credits = [float(len(found.get(name, ())) < limit) for name, limit in task.limits if name not in asked]
    groups: list[Sequence[Detection] | None] = []
    for requirement in task.requirements:
        objects = found.get(requirement.name, ())
        chosen = objects[: requirement.count]
        met = len(chosen) == requirement.count
        credits.append(_count_credit(len(objects), requirement, task))
        if requirement.color is not None:
            right = list(classify(requirement.name, chosen)).count(requirement.color) if met else 0
            met = met and right == requirement.count
            credits.append(right / requirement.count)
        if requirement.target is not None:
            met = met and _related(chosen, groups[requirement.target], requirement.relation)
            credits.append(float(met))
        groups.append(chosen if met else None)
        correct = correct and met
    return Verdict(correct, sum(credits) / len(credits))


def relations(box: Sequence[float], other: Sequence[float]) -> frozenset[str]:
    """Where a box (x0, y0, x1, y1) lies relative to another: none, one, or two of `RELATIONS`.

    The offset of the centres, shortened per axis by a tenth of both boxes' sizes (not below 0), over the length of the
    full offset; a direction counts from 0.5.
    """
    first, second = np.asarray(box, dtype=np.float64), np.asarray(other, dtype=np.float64)
    offset = (first[:2] + first[2:]) / 2 - (second[:2] + second[2:]) / 2
    slack = 0.1 * (np.abs(first[2:] - first[:2]) + np.abs(second[2:] - second[:2]))
    shortened = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if (np.abs(shortened) < _TOUCHING).all():
        return frozenset()
    x, y = shortened / np.linalg.norm(offset)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return frozenset(name for name, true in zip(RELATIONS, holds, strict=True) if true)


def _related(chosen: Sequence[Detection], target: Sequence[Detection] | None, relation: str | None) -> bool:
    if target is None:
        return False
    return all(relation in relations(one.box, other.box) for one in chosen for other in target)


def _count_credit(number: int, requirement: Requirement, task: Task) -> float:
    credit = min(number / requirement.count, 1.0)
    for name, limit in task.limits:
        if name == requirement.name and number >= limit:
            most = max(limit - 1, 1)
            credit = min(credit, max(0.0, 1 - (number - (limit - 1)) / most))
    return credit


def _clauses(value: Any, field: str) -> list[Mapping[str, Any]]:
    clauses = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
    for clause in clauses:
        if not isinstance(clause, Mapping):
            raise ValueError(f"the prompt's GenEval metadata are broken: {field} holds {clause!r:.40}, not a mapping")
    return clauses


def _named_count(clause: Mapping[str, Any], field: str) -> tuple[str, int]:
    name, count = clause.get("class"), clause.get("count")
    if not isinstance(name, str) or isinstance(count, bool) or not isinstance(count, int) or count < 1:
        asked = f"class={name!r:.40}, count={count!r:.40}"
        raise ValueError(f"the prompt's GenEval metadata are broken: {field} asks for {asked}")
    return name, count


def _requirement(index: int, clause: Mapping[str, Any]) -> Requirement:
    name, count = _named_count(clause, "include")
    color, position = clause.get("color"), clause.get("position")
    if color is not None and color not in COLORS:
        raise ValueError(f"the prompt's GenEval metadata are broken: {color!r:.40} is not one of the ten colors")
    if position is None:
        return Requirement(name, count, color)
    relation, target = position if isinstance(position, (list, tuple)) and len(position) == 2 else (None, None)
    if relation not in RELATIONS or type(target) is not int or not 0 <= target < index:
        raise ValueError(f"the prompt's GenEval metadata are broken: position={position!r:.40} of include {index}")
    return Requirement(name, count, color, relation, target)
