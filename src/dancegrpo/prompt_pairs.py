"""Two pictures, or clips, for one text, of which one is preferred: where a record holds them and which it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dancegrpo.errors import PromptError
from dancegrpo.prompt_images import Reference, check_image, held

Find = Callable[[Any], Reference | None]


@dataclass(frozen=True)
class PairFields:
    """The fields of a record that hold its two sides.

    labels: the fields that say which side is preferred, 1 for it and 0 for the other; equal, or empty, ones are a tie,
    which makes no pair. None = the first side is the preferred one.
    """

    sides: tuple[str, str] = ("chosen", "rejected")
    labels: tuple[str, str] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.sides + (self.labels or ())

    def require(self, names: Collection[str], where: str) -> None:
        """names: the fields of a record, or a table. Raises PromptError where one of these is not among them."""
        lacking = next((name for name in self.names if name not in names), None)
        if lacking is not None:
            had = ", ".join(names) or "none"
            raise PromptError(f"{where} has no field {lacking!r} (it has {had}): a pair needs {', '.join(self.names)}")

    def tie(self, record: Mapping[str, Any], where: str) -> bool:
        """Whether neither side is preferred. PromptError, which starts with `where`, for labels that cannot be."""
        if self.labels is None:
            return False
        first, second = (_label(record.get(name), name, where) for name in self.labels)
        return first is None or second is None or first == second

    def references(self, record: Mapping[str, Any], find: Find, where: str) -> tuple[Reference, Reference]:
        """Where the preferred side lies, and where the other does.

        find: a field's value -> its picture. Raises PromptError, which starts with `where`, for a side that is missing
        and for two equal ones.
        """
        first, second = self._find(record, find, where, ())
        turned = self.labels is not None and float(record[self.labels[1]]) > float(record[self.labels[0]])
        return (second, first) if turned else (first, second)

    def check(
        self, record: Mapping[str, Any], find: Find, where: str, *, header: bool, unread: Collection[str] = ()
    ) -> None:
        """Raises PromptError as `references` does, but for sides in `unread`. header: pictures are opened, too."""
        found = self._find(record, find, where, unread)
        for image in found if header else ():
            check_image(image, where)

    def _find(self, record: Mapping[str, Any], find: Find, where: str, unread: Collection[str]) -> list[Reference]:
        found: list[Reference] = []
        for name in self.sides:
            if name not in unread:
                if (image := find(record.get(name))) is None:
                    raise PromptError(f"{where} has nothing in {name!r}: a pair needs both sides")
                found.append(image)
        if len(found) == 2 and found[0] == found[1]:
            shown = "the same bytes" if isinstance(found[0], bytes) else str(found[0])
            raise PromptError(f"{where}: {' and '.join(self.sides)} are both {shown}: a pair needs two pictures")
        return found

    def held(self, record: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the fields hold, for telling one record from another."""
        return tuple(held(record.get(name)) for name in self.names)


CHOSEN = PairFields()
"""`preferences:`, the layout of records of one's own."""
PICK_A_PIC = PairFields(("jpg_0", "jpg_1"), ("label_0", "label_1"))
"""`pickapic-pairs:`, Pick-a-Pic's (arXiv:2305.01569) comparisons of two pictures."""


def _label(value: Any, name: str, where: str) -> float | None:
    """1, 0 or .5; None for an empty one."""
    try:
        number = None if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if number is None or math.isnan(number):
        return None
    if number not in (0.0, 0.5, 1.0):
        raise PromptError(f"{where}: {name}={value!r} is no label: use 1 for the preferred side, 0, or 0.5 for a tie")
    return number
