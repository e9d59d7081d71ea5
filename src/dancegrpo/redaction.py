"""Secrets out of texts: whatever is shown, logged or written of another program's words goes through `redact`.

A secret has no place in a run's settings either (`secret_in`): settings name the environment variable that holds it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

HIDDEN = "***"
"""Stands where a secret stood."""
SHORTEST = 8
"""Characters: shorter values are words that texts hold for other reasons."""

_ENVIRONMENT = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_OPTION = re.compile(
    r"(?:^|[_-])(?:(?:api|access|secret|private)[_-]?key|(?:^|auth|api|access|bearer|hf|hub|secret)[_-]?token|secret|"
    r"password|passwd|credentials?|authorization)$",
    re.IGNORECASE,
)
_KNOWN = r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})"
_USER = r"(?<=://)[^/\s@'\"]+@"
_WRITTEN = (
    (re.compile(_USER), f"{HIDDEN}@"),
    (re.compile(r"([?&](?:[\w-]*key|[\w-]*token|signature|sig|password)=)[^&\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?)[^'\",}]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\bBearer [\w.~+/=-]{8,}"), f"Bearer {HIDDEN}"),
    (re.compile(_KNOWN), HIDDEN),
)
"""What is a secret by the way it is written: users in addresses, queries, headers, the forms of well-known keys."""

_remembered: set[str] = set()


def remember(secret: str) -> str:
    """From now on `redact` takes this value out, wherever it came from; returns it."""
    if len(secret) >= SHORTEST:
        _remembered.add(secret)
    return secret


def redact(text: str) -> str:
    """The text without secrets: values of environment variables named like one, remembered ones, and what looks so."""
    named = (value.strip() for name, value in os.environ.items() if _ENVIRONMENT.search(name))
    for secret in sorted({*named, *_remembered}, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, HIDDEN)
    for pattern, shown in _WRITTEN:
        text = pattern.sub(shown, text)
    return text


def secret_in(settings: object, at: str = "") -> str | None:
    """The dotted key of the first secret that plain settings hold, by its name or its form; None without any."""
    return next((key for key, name, value in _texts(settings, at) if _is_secret(name, value)), None)


def _is_secret(name: str, value: str) -> bool:
    return bool(value and _OPTION.search(name)) or bool(re.search(f"{_USER}|{_KNOWN}", value))


def _texts(value: object, at: str, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, its last name, text) of every text within."""
    if isinstance(value, str):
        yield at, name, value
    elif isinstance(value, Mapping):
        for key, held in value.items():
            yield from _texts(held, f"{at}.{key}" if at else str(key), str(key))
    elif isinstance(value, Sequence):
        for index, held in enumerate(value):
            yield from _texts(held, f"{at}.{index}", name)
