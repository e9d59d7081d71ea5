"""The bearer token: read from where secrets live, shown nowhere."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import SecretStr

from dancegrpo.errors import RewardError
from dancegrpo.redaction import remember


def read_token(env: str | None = None, file: str | Path | None = None) -> SecretStr | None:
    """The token in the environment variable `env` or in `file` (its surrounding white space is dropped); None = none.

    It comes wrapped, so that neither a repr nor a traceback with local variables shows it.
    Raises RewardError where both are given, where the variable or the file is missing or empty, or where the content
    cannot go into an HTTP header.
    """
    if env and file:
        raise RewardError("a token was named by an environment variable and by a file: name one of them.")
    if env:
        if not os.environ.get(env, "").strip():
            raise RewardError(f"the environment variable {env} is not set: put the reward service's token in it.")
        return checked(os.environ[env].strip(), f"the environment variable {env}")
    if not file:
        return None
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise RewardError(f"the token file {file} cannot be read: {reason}.") from None
    if not text:
        raise RewardError(f"the token file {file} is empty: write the reward service's token into it.")
    return checked(text, f"the token file {file}")


def checked(text: str, where: str) -> SecretStr:
    """`text` as a token. Raises RewardError, without quoting it, where a header cannot carry it."""
    if not all("!" <= letter <= "~" for letter in text):
        raise RewardError(f"{where} holds characters that no token may have: use letters, digits and punctuation.")
    return SecretStr(remember(text))
