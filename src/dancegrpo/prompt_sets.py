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

from dancegrpo.errors import PromptError
from dancegrpo.prompt_images import CHECKED, PICTURES, check_image
from dancegrpo.prompts import PAIRED, PUBLISHED, Fields, MissingColumnError, Prompt, PromptSource, open_records

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


def open_pairs(name: str, source: str, fields: Fields) -> PromptSource:
    """The prompts of `NAME:SOURCE`, each with two pictures, or clips, of which the first is preferred: its `pair`.

    - `preferences`: records with the text in `prompt`, or else in `text` or `prompts.column`, and with `chosen` and
      `rejected`: paths, as images have them, or the bytes of pictures.
    - `pickapic-pairs` (arXiv:2305.01569, `yuvalkirstain/pickapic_v2`): `caption`, the bytes `jpg_0` and `jpg_1`, and
      `label_0` and `label_1`, of which 1 is preferred to 0. Ties (0.5 each, or no label) and empty captions are left
      out; a caption comes as often as it was judged.

    Raises PromptError.
    """
    if source.partition(":")[0] == "images":
        raise PromptError(f"{name}:{source} has one picture for a text: name a file of records, or hf:DATASET")
    fields, named = replace(fields, pair=PAIRED[name]), fields.column != Fields.column
    published = "prompt" if name == "preferences" else PUBLISHED["pickapic"]
    try:
        return open_records(source, fields if named else replace(fields, column=published))
    except MissingColumnError as error:
        if named or name != "preferences":
            raise
        try:
            return open_records(source, fields)
        except MissingColumnError:
            raise error from None


class Joined(PromptSource):
    """Several sources one after the other; a prompt's part is its `task`, for which evaluations give a mean.

    What an earlier part asks for is left out of the later ones, as `prompts.unique` does within a source.
    """

    def __init__(self, parts: dict[str, PromptSource]) -> None:
        self._names, self._parts = list(parts), list(parts.values())
        first: dict[tuple[str, ...], tuple[int, int]] = {}
        for number, part in enumerate(self._parts):
            for place, prompt in enumerate(part):
                first.setdefault((prompt.text.strip(), *prompt.request()[1:]), (number, place))
        self._places = list(first.values())

    def __len__(self) -> int:
        return len(self._places)

    @property
    def first_without_image(self) -> str | None:
        """See `PromptSource`."""
        return next(filter(None, (part.first_without_image for part in self._parts)), None)

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        number, place = self._places[index]
        prompt = self._parts[number][place]
        return replace(prompt, id=index, metadata={"task": self._names[number], **prompt.metadata})


class ImageFolder(PromptSource):
    """A folder of pictures in the order of their names, each with its text in a .txt file of the same stem.

    Pictures without a text of their own share the folder's `prompt.txt`. `unique` leaves out those whose text is empty;
    `at_most` is refused, for there is nothing to compare.
    """

    def __init__(self, folder: Path, fields: Fields) -> None:
        self._folder, self._fields = folder, fields
        if fields.at_most:
            raise PromptError(f"images:{folder} has no fields to compare: take prompts.at_most out")
        if not folder.is_dir():
            raise PromptError(f"images:{folder} is not a folder: name one with pictures in it")
        self._names: Sequence[str] = sorted(
            path.name for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file()
        )
        if not self._names:
            raise PromptError(f"images:{folder} holds no pictures: use {', '.join(PICTURES)}")
        if fields.unique:
            self._names = [name for name in self._names if self._text(folder / name)]
            if not self._names:
                raise PromptError(f"images:{folder} holds no prompts: write at least one")
        for index in range(len(self._names)):
            prompt = self[index]
            if index < CHECKED and isinstance(prompt.image, Path):
                check_image(prompt.image, f"images:{folder}")

    def __len__(self) -> int:
        return len(self._names)

    @property
    def first_without_image(self) -> None:
        """See `PromptSource`."""
        return

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        picture = self._folder / self._names[index]
        text = self._text(picture)
        if not text:
            raise PromptError(f"{self._text_file(picture)} is empty: write the text of {picture.name} into it")
        return Prompt(index, text, self._fields.negative, picture)

    def _text_file(self, picture: Path) -> Path:
        own = picture.with_suffix(".txt")
        return own if own.is_file() else self._folder / COMMON_TEXT

    def _text(self, picture: Path) -> str:
        file = self._text_file(picture)
        try:
            # A caption may be wrapped: its lines are one text.
            return " ".join(file.read_text(encoding="utf-8-sig").split())
        except FileNotFoundError as error:
            own = picture.with_suffix(".txt").name
            raise PromptError(f"{picture} has no text: write {own}, or {COMMON_TEXT} for all, beside it") from error
        except OSError as error:
            raise PromptError(f"cannot read prompts from {file}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise PromptError(f"{file} is not UTF-8 text: save the file as UTF-8") from error
