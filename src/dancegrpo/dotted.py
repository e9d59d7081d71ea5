"""A user's own code by its dotted path: `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dancegrpo.errors import DanceError
from dancegrpo.redaction import redact


def import_dotted(path: str, what: str, error: type[DanceError]) -> Any:
    """The attribute that `package.module:name` means, looked up in the current folder too.

    what: how messages call it (`judge 'mine:f'`). error: what is raised, one line, for a path that leads nowhere or a
    module that fails.
    """
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        # Last, so that a user's file next to the recipe is found but can never hide an installed module.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as cause:
        raise error(f"{what} cannot be imported: {first_line(cause)}.") from cause
    target = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            hint = nearest(part, vars(target)) if hasattr(target, "__dict__") else ""
            raise error(f"{what}: {module_name} has no {part!r}{hint}; write package.module:name.")
        target = getattr(target, part)
    return target


def first_line(error: Exception) -> str:
    """An exception as one short line: its type, the first line it says, and where it was raised."""
    lines = redact(str(error)).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{f': {lines[0][:300]}' if lines else ''}{where}"


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
