"""Prompts as others publish them: HPD, Pick-a-Pic, VidProM and ConsisID, and folders of captioned pictures.

`NAME:SOURCE` reads SOURCE, any file or dataset that `open_prompts` knows, as the set NAME is laid out:

- `hpd` (arXiv:2306.09341): `train.json` and `test.json` are lists of objects with `prompt`; the benchmark's
  `anime.json`, `concept-art.json`, `paintings.json` and `photo.json` are lists of texts, and their folder is one list
  with the style as task.
- `pickapic` (arXiv:2305.01569): `caption` in parquet, a row for each comparison of two pictures.
- `vidprom` (arXiv:2403.06098): `VidProM_unique.csv` with uuid, prompt, time and six probabilities of unsafe content.
- `consisid` (arXiv:2411.17440): a JSON list of objects with `cap` and the clip's `path`.

Prompts that repeat, and empty ones, are left out of all four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dancegrpo.errors import PromptError
from dancegrpo.prompt_images import CHECKED, PICTURES, check_image
from dancegrpo.prompts import PUBLISHED, Fields, Prompt, PromptSource, open_records

STYLES = ("anime", "concept-art", "paintings", "photo")
"""The four lists of the HPS v2 benchmark; scores are reported for each and as their mean."""
COMMON_TEXT = "prompt.txt"


def open_published(name: str, source: str, fields: Fields) -> PromptSource:
    """The prompts of `NAME:SOURCE`; raises PromptError. A column other than the default is kept: copies rename it."""
    default = Fields.column
    fields = replace(fields, unique=True, column=PUBLISHED[name] if fields.column == default else fields.column)
    folder = Path(source).expanduser()
    if name == "hpd" and folder.is_dir():
        return Joined({style: open_records(str(folder / f"{style}.json"), fields) for style in STYLES})
    return open_records(source, fields)


class Joined(PromptSource):
    """Several sources one after the other; a prompt's part is its `task`, for which evaluations give a mean."""

    def __init__(self, parts: dict[str, PromptSource]) -> None:
        self._names, self._parts = list(parts), list(parts.values())
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        prompt = self._parts[number][index - start]
        return replace(prompt, id=index, metadata={"task": self._names[number], **prompt.metadata})


class ImageFolder(PromptSource):
    """A folder of pictures in the order of their names, each with its text in a .txt file of the same stem.

    Pictures without a text of their own share the folder's `prompt.txt`.
    """

    def __init__(self, folder: Path, fields: Fields) -> None:
        self._folder, self._fields = folder, fields
        if not folder.is_dir():
            raise PromptError(f"images:{folder} is not a folder: name one with pictures in it")
        self._names: Sequence[str] = sorted(
            path.name for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file()
        )
        if not self._names:
            raise PromptError(f"images:{folder} holds no pictures: use {', '.join(PICTURES)}")
        for index in range(len(self._names)):
            prompt = self[index]
            if index < CHECKED and isinstance(prompt.image, Path):
                check_image(prompt.image, f"images:{folder}")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        picture = self._folder / self._names[index]
        own = picture.with_suffix(".txt")
        file = own if own.is_file() else self._folder / COMMON_TEXT
        try:
            # A caption may be wrapped: its lines are one text.
            text = " ".join(file.read_text(encoding="utf-8-sig").split())
        except FileNotFoundError as error:
            raise PromptError(
                f"{picture} has no text: write {own.name}, or {COMMON_TEXT} for all, beside it"
            ) from error
        except OSError as error:
            raise PromptError(f"cannot read prompts from {file}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise PromptError(f"{file} is not UTF-8 text: save the file as UTF-8") from error
        if not text:
            raise PromptError(f"{file} is empty: write the text of {picture.name} into it")
        return Prompt(index, text, self._fields.negative, picture)
