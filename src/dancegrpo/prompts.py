"""Prompts: what a run is asked to draw, where it is read from, and in which order groups are formed.

Files are read once, for validation and an index of 8 bytes per prompt; a prompt is then fetched from the disk when it
is asked for. A million prompts cost no memory.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from dancegrpo.errors import PromptError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prompt:
    """One request to the generator. Groups are known by integer ids, never by text.

    image: the reference of image-to-video: a file, or a PIL picture.
    """

    id: int
    text: str
    negative: str = ""
    image: Path | Image | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def request(self) -> tuple[str, str, str]:
        """All that encoding depends on: the text, the negative one and a sha256 of the image ("" without one).

        Raises PromptError where the image's file cannot be read.
        """
        return self.text, self.negative, "" if self.image is None else self._image_digest(self.image)

    def _image_digest(self, image: Path | Image) -> str:
        if isinstance(image, Path):
            try:
                return hashlib.sha256(image.read_bytes()).hexdigest()
            except OSError as error:
                raise PromptError(f"image {image} cannot be read ({error.strerror}): put it back") from error
        return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()


class PromptSource(ABC):
    """A fixed, indexable list of prompts; the prompt at index i has id i."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Prompt:
        """The prompt at 0 <= index < len; IndexError elsewhere. Raises PromptError when the file has changed."""

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def check_index(self, index: int) -> None:
        """Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")


@dataclass(frozen=True)
class Fields:
    """How a record becomes a prompt: `column` holds the text; `negative`, `image` and `metadata` are known by name.

    negative: for records that bring none of their own. folder: what relative image paths start from.
    """

    column: str
    negative: str
    folder: Path

    def prompt(self, index: int, record: Mapping[str, Any], where: str) -> Prompt:
        """Fields of other names join the metadata, where `metadata` itself comes first. PromptError names `where`.

        A record in GenEval's form (`tag` and `include`) gets its tag as `task` too.
        """
        if self.column not in record:
            raise PromptError(f"{where} {self.missing(record)}")
        text, negative = record[self.column], record.get("negative")
        if text is not None and not isinstance(text, str):
            raise PromptError(f"{where}: {self.column}={text!r} is not text: put the prompt in quotes")
        if not text or not text.strip():
            raise PromptError(f"{where} has an empty {self.column!r}: write a prompt or delete the record")
        if negative is not None and not isinstance(negative, str):
            raise PromptError(f"{where}: negative={negative!r} is not text: put it in quotes")
        others = {k: v for k, v in record.items() if k not in (self.column, "negative", "image", "metadata")}
        metadata = {**others, **self._metadata(record.get("metadata"), where)}
        if "task" not in metadata and "include" in metadata and isinstance(metadata.get("tag"), str):
            # GenEval's records call it `tag`; evaluations give a rate for each `task`.
            metadata["task"] = metadata["tag"]
        own = self.negative if negative is None else negative
        return Prompt(index, text, own, self._image(record.get("image"), where), metadata)

    def missing(self, names: Iterable[str]) -> str:
        """What is said of a record, or a table, that lacks the column."""
        return (
            f"has no field {self.column!r} (it has {', '.join(names) or 'none'}): set prompts.column to the right one"
        )

    def _image(self, value: Any, where: str) -> Path | None:
        if value is None or value == "":
            return None
        path = self.folder / value if isinstance(value, str) else None
        if path is None or not path.is_file():
            raise PromptError(
                f"{where}: image {value!r} is not a file: give a path, relative ones start at {self.folder}"
            )
        return path

    @staticmethod
    def _metadata(value: Any, where: str) -> Mapping[str, Any]:
        if isinstance(value, str) and value:
            # A table's cell holds only text.
            try:
                value = json.loads(value)
            except ValueError as error:
                raise PromptError(f"{where}: metadata {value[:40]!r} is not JSON: {error}") from error
        if value and not isinstance(value, Mapping):
            raise PromptError(f"{where}: metadata {value!r} must be a mapping")
        return value or {}


class _Lines:
    """The lines of a UTF-8 file as text, counting the bytes and lines that were handed out."""

    def __init__(self, file: BinaryIO, name: str, position: int = 0) -> None:
        self.file, self.name, self.position, self.number = file, name, position, 0
        file.seek(position)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self.file.readline()
        if not raw:
            raise StopIteration
        first = self.position == 0
        self.position += len(raw)
        self.number += 1
        try:
            # Spreadsheets put a byte order mark before the first character.
            return raw.decode("utf-8-sig" if first else "utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"{self.name} line {self.number} is not UTF-8 text: save the file as UTF-8") from error


Record = tuple[int, Mapping[str, Any]]
"""The line a record starts at, and its fields."""


class TextFile(PromptSource):
    """One prompt per line; blank lines are skipped. The base of the other line-based formats."""

    def __init__(self, path: Path, fields: Fields) -> None:
        self._path, self._fields, self._starts = path, fields, array("Q")
        try:
            with path.open("rb") as file:
                self._version = _version(file)
                self._scan(_Lines(file, str(path)))
        except OSError as error:
            raise PromptError(f"cannot read prompts from {path}: {error.strerror or error}") from error
        if not self._starts:
            raise PromptError(f"{path} holds no prompts: write at least one")

    def _scan(self, lines: _Lines) -> None:
        self._read_header(lines)
        start = lines.position
        for line, record in self._records(lines):
            self._fields.prompt(len(self._starts), record, f"{self._path} line {line}")
            self._starts.append(start)
            start = lines.position

    def _read_header(self, lines: _Lines) -> None:
        """Formats with a header take it off the lines here."""

    def _records(self, lines: _Lines) -> Iterator[Record]:
        """The records from where `lines` stands; takes no line beyond a record before handing that record out."""
        for line in lines:
            if text := line.strip():
                yield lines.number, {self._fields.column: text}

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        try:
            with self._path.open("rb") as file:
                if _version(file) != self._version:
                    raise PromptError(f"{self._path} has changed since it was opened: start again, or put it back")
                _, record = next(self._records(_Lines(file, str(self._path), self._starts[index])))
        except OSError as error:
            raise PromptError(f"cannot read prompts from {self._path}: {error.strerror or error}") from error
        return self._fields.prompt(index, record, f"{self._path} prompt {index}")


class JsonlFile(TextFile):
    """One JSON object per line; blank lines are skipped."""

    def _records(self, lines: _Lines) -> Iterator[Record]:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise PromptError(f"{self._path} line {lines.number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise PromptError(
                    f"{self._path} line {lines.number} is not a JSON object: write {{{self._fields.column!r}: ...}}"
                )
            yield lines.number, record


class CsvFile(TextFile):
    """Comma-separated with a header; cells in quotes may hold line breaks. An empty cell is a field that is absent."""

    _header: Sequence[str] = ()

    def _read_header(self, lines: _Lines) -> None:
        line, row = next(self._rows(lines), (1, []))
        self._header = [name.strip() for name in row]
        if row and self._fields.column not in self._header:
            raise PromptError(f"{self._path} line {line} {self._fields.missing(self._header)}")

    def _rows(self, lines: _Lines) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(lines, strict=True)
        while True:
            line = lines.number + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise PromptError(f"{self._path} line {line} is not CSV: {error}") from error
            if row:
                yield line, row

    def _records(self, lines: _Lines) -> Iterator[Record]:
        for line, row in self._rows(lines):
            if len(row) > (columns := len(self._header)):
                found = f"has {len(row)} cells for {columns} columns"
                raise PromptError(f"{self._path} line {line} {found}: put quotes around cells with commas")
            cells = dict(zip(self._header, row, strict=False))
            yield line, {name: cell for name, cell in cells.items() if cell or name == self._fields.column}


class PromptList(PromptSource):
    """Prompts that are in memory already."""

    def __init__(self, prompts: Sequence[Prompt], negative: str = "") -> None:
        self._prompts = [replace(p, id=i, negative=p.negative or negative) for i, p in enumerate(prompts)]

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        return self._prompts[index]


FILES = {".txt": TextFile, ".jsonl": JsonlFile, ".csv": CsvFile}


def open_prompts(source: str, *, column: str = "text", negative: str = "") -> PromptSource:
    """The prompts of `shapes:train`, a .txt/.jsonl/.csv/.parquet file or `hf:DATASET[:SPLIT]`.

    The shapes world has captions of drawings (`shapes`), of clips (`shapes-video`) and of their stills (`shapes-t2i`),
    and first frames to set in motion (`shapes-i2v`), each as `:train` and `:heldout`.
    column: the field that holds the text (not in .txt). negative: for prompts that bring no negative one of their own.
    Every record is checked now; raises PromptError, one line with file and line, for the first one that is unusable.
    """
    kind, colon, rest = source.partition(":")
    if colon and kind in ("shapes", "shapes-video", "shapes-i2v", "shapes-t2i"):
        return _shapes(kind, rest, negative)
    if colon and kind == "hf":
        from dancegrpo.prompt_tables import HubDataset

        # The first colon ends the name: a split may have its own, as in train[:100].
        name, _, split = rest.partition(":")
        return HubDataset(name, split or "train", Fields(column, negative, Path()))
    path = Path(source).expanduser()
    suffix, fields = path.suffix.lower(), Fields(column, negative, path.parent)
    if suffix not in (*FILES, ".parquet"):
        forms = f"a {', '.join(FILES)} or .parquet file, hf:DATASET[:SPLIT] or shapes:train"
        raise PromptError(f"prompts {source!r} are of no known form: use {forms}")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise PromptError(f"prompt file {path} {what}: name a {suffix} file")
    if suffix == ".parquet":
        from dancegrpo.prompt_tables import ParquetFile

        return ParquetFile(path, fields)
    return FILES[suffix](path, fields)


def _shapes(kind: str, split: str, negative: str) -> PromptSource:
    if split != "train" and split != "heldout":
        raise PromptError(f"{kind}:{split} does not exist: use {kind}:train or {kind}:heldout")
    if kind == "shapes":
        from dancegrpo.shapes.scenes import prompts

        return PromptList(prompts(split), negative)
    from dancegrpo.shapes.clips import clip_prompts, i2v_prompts, still_prompts

    forms = {"shapes-video": clip_prompts, "shapes-i2v": i2v_prompts, "shapes-t2i": still_prompts}
    return forms[kind](split, negative=negative)


class GroupSampler:
    """Which prompts form the groups of each iteration: shuffled epochs, as a pure function of (seed, iteration).

    Nothing is remembered between iterations but one permutation (4 bytes per prompt), so a resumed run, or one on
    another number of devices, draws the same prompts.
    """

    def __init__(self, source_length: int, per_iteration: int, seed: int) -> None:
        if source_length < 1 or per_iteration < 1:
            raise ValueError(f"{per_iteration} groups from {source_length} prompts: both must be at least 1")
        self._length, self._per_iteration, self._seed = source_length, per_iteration, seed
        self._cached: tuple[int, np.ndarray] | None = None

    def indices(self, iteration: int) -> list[int]:
        """The prompt of each group of an iteration, counted from 0; every epoch visits every prompt exactly once."""
        if iteration < 0:
            raise ValueError(f"iteration={iteration} must be at least 0")
        first = iteration * self._per_iteration
        places = (divmod(place, self._length) for place in range(first, first + self._per_iteration))
        return [int(self._permutation(epoch)[offset]) for epoch, offset in places]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            # numpy promises a bit generator's raw stream for ever, but not what its `permutation` makes of it.
            keys = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=(epoch,))).random_raw(self._length)
            self._cached = epoch, np.argsort(keys, kind="stable").astype(np.uint32)
        return self._cached[1]


def _version(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
