"""Prompts from files, read where they lie: text, JSON lines, comma-separated tables and JSON lists."""

from __future__ import annotations

import csv
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dancegrpo.errors import PromptError
from dancegrpo.prompts import Fields, MereText, Prompt, PromptSource, Selection

Record = tuple[int, Mapping[str, Any]]
"""The line a record starts at, and its fields."""


class RecordFile(PromptSource):
    """A file of records: scanned once for an index of the bytes they start at, then read record by record."""

    def __init__(self, path: Path, fields: Fields) -> None:
        self._path, self._fields = path, fields
        selection = Selection(fields)
        try:
            with path.open("rb") as file:
                self._version = _version(file)
                for start, place, record in self._scan(file):
                    selection.offer(start, record, f"{path} {place}")
        except OSError as error:
            raise PromptError(f"cannot read prompts from {path}: {error.strerror or error}") from error
        self._starts, self._imageless = selection.positions(str(path)), selection.first_without_image
        self.ties = selection.ties

    @property
    def first_without_image(self) -> str | None:
        """See `PromptSource`."""
        return self._imageless

    @abstractmethod
    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        """Every record with the byte it starts at and a name for its place."""

    @abstractmethod
    def _record_at(self, file: BinaryIO, start: int) -> Mapping[str, Any]:
        """The record that starts at a byte."""

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        try:
            with self._path.open("rb") as file:
                if _version(file) != self._version:
                    raise PromptError(f"{self._path} has changed since it was opened: start again, or put it back")
                record = self._record_at(file, int(self._starts[index]))
        except OSError as error:
            raise PromptError(f"cannot read prompts from {self._path}: {error.strerror or error}") from error
        return self._fields.prompt(index, record, f"{self._path} prompt {index}")


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


class TextFile(RecordFile):
    """One prompt per line; blank lines are skipped. The base of the other line-based formats."""

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        lines = _Lines(file, str(self._path))
        self._read_header(lines)
        start = lines.position
        for line, record in self._records(lines):
            yield start, f"line {line}", record
            start = lines.position

    def _record_at(self, file: BinaryIO, start: int) -> Mapping[str, Any]:
        return next(self._records(_Lines(file, str(self._path), start)))[1]

    def _read_header(self, lines: _Lines) -> None:
        """Formats with a header take it off the lines here."""

    def _records(self, lines: _Lines) -> Iterator[Record]:
        """The records from where `lines` stands; takes no line beyond a record before handing that record out."""
        for line in lines:
            if text := line.strip():
                yield lines.number, MereText({self._fields.column: text})


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
    """Comma-separated with a header; cells in quotes may hold line breaks. An empty cell is a field that is absent.

    A column without a name is left out: pandas writes its index as one.
    """

    _header: Sequence[str] = ()

    def _read_header(self, lines: _Lines) -> None:
        line, row = next(self._rows(lines), (1, []))
        self._header = [name.strip() for name in row]
        if row:
            self._fields.require(list(filter(None, self._header)), f"{self._path} line {line}")

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
        kept = self._fields.kept
        for line, row in self._rows(lines):
            if len(row) > (columns := len(self._header)):
                found = f"has {len(row)} cells for {columns} columns"
                raise PromptError(f"{self._path} line {line} {found}: put quotes around cells with commas")
            cells = dict(zip(self._header, row, strict=False))
            yield line, {name: cell for name, cell in cells.items() if name and (cell or name in kept)}


class JsonFile(RecordFile):
    """One JSON list, of texts or of objects, as large as it likes."""

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        for number, (start, raw) in enumerate(_Entries(file, str(self._path)), 1):
            place = f"entry {number}"
            yield start, place, self._record(raw, place)

    def _record_at(self, file: BinaryIO, start: int) -> Mapping[str, Any]:
        return self._record(_Entries(file, str(self._path), start).take("its entry"), f"at byte {start}")

    def _record(self, raw: bytes, place: str) -> Mapping[str, Any]:
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{self._path} {place} is not JSON in UTF-8: {error}") from error
        if isinstance(record, str):
            return MereText({self._fields.column: record})
        if not isinstance(record, dict):
            raise PromptError(f"{self._path} {place} is neither a text nor an object: write a list of one of them")
        return record


class _Entries:
    """The entries of a JSON list with the byte each starts at, without ever holding the whole list.

    The window is read as Latin-1, one character per byte: JSON's own signs are ASCII, so that an entry's end is found
    as well, and its place counts bytes.
    """

    _CHUNK, _LARGEST = 1 << 16, 1 << 24
    _SPACE = re.compile(r"[ \t\r\n]*")

    def __init__(self, file: BinaryIO, name: str, position: int = 0) -> None:
        """position: of an entry, where not 0."""
        self._file, self._name = file, name
        self._window, self._at, self._base = "", 0, position
        self._decoder = json.JSONDecoder()
        file.seek(position)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        if self._peek() == "\xef" and self._window.startswith("\xef\xbb\xbf", self._at):  # a byte order mark
            self._at += 3
        if self._peek() != "[":
            raise PromptError(f"{self._name} is no JSON list: write [...], or call one object per line .jsonl")
        self._at += 1
        number, sign = 0, self._peek()
        while sign != "]":
            number += 1
            yield self._base + self._at, self.take(f"entry {number}")
            sign = self._peek()
            if sign == ",":
                self._at += 1
                self._peek()
            elif sign != "]":
                found = repr(sign) if sign else "the end of the file"
                raise PromptError(f"{self._name} has {found} after entry {number}, not a comma or ]: mend the list")
        self._at += 1
        if self._peek():
            raise PromptError(f"{self._name} goes on after its list's ]: one list per file")

    def take(self, place: str) -> bytes:
        """The bytes of the entry that starts here."""
        while True:
            try:
                _, end = self._decoder.raw_decode(self._window, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._window) - self._at > self._LARGEST or not self._more():
                    raise PromptError(f"{self._name} {place} is not JSON: {_reason(error)}") from error
                continue
            if end < len(self._window) or not self._more():  # else a number might go on
                raw = self._window[self._at : end].encode("latin-1")
                self._at = end
                return raw

    def _peek(self) -> str:
        """The next sign that is no white space; "" at the file's end."""
        while True:
            found = self._SPACE.match(self._window, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Drops what was taken from the window and reads on, twice as much each time an entry does not fit."""
        chunk = self._file.read(max(self._CHUNK, len(self._window) - self._at))
        self._base += self._at
        self._window, self._at = self._window[self._at :] + chunk.decode("latin-1"), 0
        return bool(chunk)


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__


FILES: dict[str, type[RecordFile]] = {".txt": TextFile, ".jsonl": JsonlFile, ".csv": CsvFile, ".json": JsonFile}


def _version(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
