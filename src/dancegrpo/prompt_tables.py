"""Prompts from tables: Parquet files and datasets of the Hugging Face hub. Both need the extra `hf`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dancegrpo.errors import PromptError
from dancegrpo.prompt_images import CHECKED, check_image
from dancegrpo.prompts import Fields, Prompt, PromptSource, Selection

_BATCH = 1024
"""Rows that are looked at together."""


class ParquetFile(PromptSource):
    """A Parquet file. Its text is unpacked once into a nameless temporary file, which is mapped into memory.

    Images that lie in it as bytes stay there, and are read with their row group when a prompt is asked for.
    """

    def __init__(self, path: Path, fields: Fields) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            _missing_extra(f"reading {path}", "pyarrow", error)
        self._path, self._fields = path, fields
        try:
            self._file = pq.ParquetFile(path)
            self._groups = np.cumsum(
                [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
            )
            plain = [column.name for column in self._file.schema_arrow if _plain(column.type)]
            _require_text(str(path), fields, self._file.schema_arrow.names, plain)
            self._embedded = [c.name for c in self._file.schema_arrow if c.name in fields.media and not _plain(c.type)]
            selection = Selection(fields, () if fields.unique else self._embedded)
            with tempfile.NamedTemporaryFile(suffix=".arrow") as spool:
                self._ends = self._unpack(spool.name, selection)
                self._batches = pa.ipc.open_file(pa.memory_map(spool.name))
            self._rows, self._imageless = selection.positions(str(path)), selection.first_without_image
            self.ties = selection.ties
            if self._embedded:
                self._check_images()
        except (pa.ArrowException, OSError) as error:
            raise PromptError(f"cannot read prompts from {path}: {_first_line(error)}") from error

    def _unpack(self, target: str, selection: Selection) -> np.ndarray:
        """Copies what is no picture, batch by batch; returns the number of rows up to each batch's end."""
        import pyarrow as pa

        # Pandas' categories cannot be written batch by batch.
        schema = pa.schema(
            [
                pa.field(column.name, column.type.value_type if pa.types.is_dictionary(column.type) else column.type)
                for column in self._file.schema_arrow
                if _plain(column.type)
            ]
        )
        pictures = self._embedded if self._fields.unique else []
        ends, rows = [], 0
        with pa.OSFile(target, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            size = 64 if pictures else _BATCH
            for batch in self._file.iter_batches(size, columns=[*schema.names, *pictures]):
                for row, record in enumerate(batch.to_pylist(), rows):
                    selection.offer(row, _present(record, self._fields), f"{self._path} row {row + 1}")
                writer.write_batch(batch.select(schema.names).cast(schema))
                rows += batch.num_rows
                ends.append(rows)
        return np.array(ends, dtype=np.int64)

    def _check_images(self) -> None:
        """Reads the first images' headers, in one pass: each alone would read its whole row group."""
        wanted, rows = set(self._rows[:CHECKED].tolist()), 0
        for batch in self._file.iter_batches(64, columns=self._embedded):
            for row, values in enumerate(batch.to_pylist(), rows):
                if row in wanted:
                    self._check_row(row, values)
            rows += batch.num_rows
            if rows > max(wanted):
                return

    def _check_row(self, row: int, values: Mapping[str, Any]) -> None:
        fields, where = self._fields, f"{self._path} row {row + 1}"
        if (
            fields.image is not None
            and fields.image in values
            and (image := fields.find(where)(values[fields.image])) is not None
        ):
            check_image(image, where)
        if fields.pair is not None:
            left = [name for name in fields.pair.sides if name not in values]
            fields.pair.check(values, fields.find(where), where, header=True, unread=left)

    @property
    def first_without_image(self) -> str | None:
        """See `PromptSource`. Of images that lie in the file, only what may hold a null is read, and only now."""
        if self._fields.image not in self._embedded:
            return self._imageless
        row = _first_lacking(self._doubtful(), self._rows)
        return None if row is None else f"{self._path} row {row + 1}"

    def _doubtful(self) -> Iterator[tuple[int, Any]]:
        """The image column, batch by batch with its first row, of the row groups whose statistics count nulls."""
        name = self._fields.image
        for group, end in enumerate(self._groups.tolist()):
            held = self._file.metadata.row_group(group)
            leaves = [held.column(i) for i in range(held.num_columns)]
            counts = [leaf.statistics for leaf in leaves if leaf.path_in_schema.partition(".")[0] == name]
            if any(count is not None and count.has_null_count and count.null_count == 0 for count in counts):
                continue  # in no row all of the parts are missing
            row = end - held.num_rows
            for batch in self._file.iter_batches(64, row_groups=[group], columns=[name]):
                yield row, batch.column(0)
                row += batch.num_rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        return self._fields.prompt(index, self._record(index), self._where(index))

    def _where(self, index: int) -> str:
        return f"{self._path} row {int(self._rows[index]) + 1}"

    def _record(self, index: int) -> dict[str, Any]:
        row = int(self._rows[index])
        number, offset = _place(self._ends, row)
        record = self._batches.get_batch(number).slice(offset, 1).to_pylist()[0]
        if self._embedded:
            group, offset = _place(self._groups, row)
            pictures = self._file.read_row_group(group, columns=self._embedded)
            record |= pictures.slice(offset, 1).to_pylist()[0]
        return _present(record, self._fields)


class HubDataset(PromptSource):
    """A dataset of the Hugging Face hub (or a folder in its layout), mapped from the `datasets` cache."""

    def __init__(self, name: str, split: str, fields: Fields) -> None:
        try:
            import datasets
        except ImportError as error:
            _missing_extra(f"reading hf:{name}", "datasets", error)
        self._name, self._fields = f"hf:{name}:{split}", fields
        try:
            with _no_progress_bars():
                rows = datasets.load_dataset(name, split=split)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise PromptError(f"cannot load {self._name}: {_first_line(error)}") from error
        plain = [column.name for column in rows.features.arrow_schema if _plain(column.type)]
        _require_text(self._name, fields, rows.column_names, plain)
        self._embedded = [name for name in fields.media if name in rows.features and name not in plain]
        for name in self._embedded:
            if isinstance(rows.features[name], datasets.Image):
                # Undecoded: the bytes or the path, of which only what is asked for is opened.
                rows = rows.cast_column(name, datasets.Image(decode=False))
        pictures = self._embedded
        self._table = rows.select_columns([*plain, *pictures])
        scanned = self._table if fields.unique else rows.select_columns(plain)
        selection, first = Selection(fields, () if fields.unique else pictures), 0
        for batch in scanned.iter(64 if pictures and fields.unique else _BATCH):
            records = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
            for row, record in enumerate(records, first):
                selection.offer(row, _present(record, fields), f"{self._name} row {row + 1}")
            first += len(records)
        self._rows, self._imageless = selection.positions(self._name), selection.first_without_image
        self.ties = selection.ties
        for index in range(min(CHECKED, len(self)) if pictures else 0):
            fields.prompt(index, self._record(index), self._where(index), opening=True)

    @property
    def first_without_image(self) -> str | None:
        """See `PromptSource`. Of images that lie in the dataset, only whether they are null is read, and only now."""
        if self._fields.image not in self._embedded:
            return self._imageless
        tables = self._table.select_columns([self._fields.image]).with_format("arrow").iter(_BATCH)
        parts = ((number * _BATCH, table.column(0)) for number, table in enumerate(tables))
        row = _first_lacking(parts, self._rows)
        return None if row is None else f"{self._name} row {row + 1}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        return self._fields.prompt(index, self._record(index), self._where(index))

    def _where(self, index: int) -> str:
        return f"{self._name} row {int(self._rows[index]) + 1}"

    def _record(self, index: int) -> dict[str, Any]:
        return _present(self._table[int(self._rows[index])], self._fields)


def _place(ends: np.ndarray, row: int) -> tuple[int, int]:
    """ends: rows up to the end of each part -> (the part that holds the row, its number within it)."""
    part = int(np.searchsorted(ends, row, side="right"))
    return part, row - (int(ends[part - 1]) if part else 0)


def _plain(kind: Any) -> bool:
    """Whether an Arrow type holds no bytes, nested ones included (the hub stores pictures as a struct of them)."""
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return False
    return all(_plain(kind.field(i).type) for i in range(kind.num_fields))


def _first_lacking(parts: Iterable[tuple[int, Any]], rows: np.ndarray) -> int | None:
    """The first of `rows` without an image. parts: of the column of images, in Arrow's form, with their first row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for start, column in parts:
        lacking = np.asarray(column.is_null())
        if pa.types.is_struct(column.type):
            names = range(column.type.num_fields)
            lacking = np.logical_and.reduce([np.asarray(pc.struct_field(column, [i]).is_null()) for i in names])
        found = np.intersect1d((start + np.flatnonzero(lacking)).astype(rows.dtype), rows)
        if len(found):
            return int(found[0])
    return None


def _require_text(name: str, fields: Fields, columns: Iterable[str], plain: Iterable[str]) -> None:
    """Raises PromptError where no column that can hold text is the one of the prompts, or a pair's are not there."""
    fields.require([other for other in columns if other != fields.column or other in plain], name)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps the bars of `datasets` off the standard error, where a command has one line."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _present(record: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """A table's record without its nulls, those apart that are worth a message of their own."""
    return {key: value for key, value in record.items() if value is not None or key in fields.kept}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _missing_extra(what: str, package: str, error: ImportError) -> NoReturn:
    raise PromptError(f"{what} needs {package}: pip install 'dancegrpo[hf]'") from error
