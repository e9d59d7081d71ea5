"""Prompts from tables: Parquet files and datasets of the Hugging Face hub. Both need the extra `hf`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dancegrpo.errors import PromptError
from dancegrpo.prompts import Fields, Prompt, PromptSource


class ParquetFile(PromptSource):
    """A Parquet file. Its text is unpacked once into a nameless temporary file, which is mapped into memory."""

    def __init__(self, path: Path, fields: Fields) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            _missing_extra(f"reading {path}", "pyarrow", error)
        self._path, self._fields = path, fields
        try:
            with pq.ParquetFile(path) as file, tempfile.NamedTemporaryFile(suffix=".arrow") as spool:
                self._ends = self._unpack(file, spool.name)
                self._batches = pa.ipc.open_file(pa.memory_map(spool.name))
        except (pa.ArrowException, OSError) as error:
            raise PromptError(f"cannot read prompts from {path}: {_first_line(error)}") from error
        if not len(self):
            raise PromptError(f"{path} holds no prompts: write at least one")

    def _unpack(self, file: Any, target: str) -> np.ndarray:
        """Checks every record while copying it, a thousand at a time; the number of rows up to each batch's end."""
        import pyarrow as pa

        # Pictures in bytes are no use to a prompt; pandas' categories cannot be written batch by batch.
        schema = pa.schema(
            [
                pa.field(column.name, column.type.value_type if pa.types.is_dictionary(column.type) else column.type)
                for column in file.schema_arrow
                if _plain(column.type)
            ]
        )
        ends, rows = [], 0
        with pa.OSFile(target, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in file.iter_batches(1024, columns=schema.names):
                batch = batch.cast(schema)
                for row, record in enumerate(batch.to_pylist(), rows):
                    self._prompt(row, record)
                writer.write_batch(batch)
                rows += batch.num_rows
                ends.append(rows)
        return np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        record = self._batches.get_batch(number).slice(index - start, 1).to_pylist()[0]
        return self._prompt(index, record)

    def _prompt(self, index: int, record: Mapping[str, Any]) -> Prompt:
        return self._fields.prompt(index, _present(record, self._fields.column), f"{self._path} row {index + 1}")


class HubDataset(PromptSource):
    """A dataset of the Hugging Face hub (or a folder in its layout), mapped from the `datasets` cache."""

    def __init__(self, name: str, split: str, fields: Fields) -> None:
        try:
            import datasets
        except ImportError as error:
            _missing_extra(f"reading hf:{name}", "datasets", error)
        self._name, self._fields = f"hf:{name}:{split}", fields
        try:
            rows = datasets.load_dataset(name, split=split)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise PromptError(f"cannot load {self._name}: {_first_line(error)}") from error
        media = (datasets.Image, datasets.Audio, datasets.Video)
        self._rows = rows.select_columns([key for key, kind in rows.features.items() if not isinstance(kind, media)])
        if not len(self._rows):
            raise PromptError(f"{self._name} holds no prompts: name another split")
        first = 0
        for batch in self._rows.iter(1024):
            records = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
            for index, record in enumerate(records, first):
                self._prompt(index, record)
            first += len(records)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        return self._prompt(index, self._rows[index])

    def _prompt(self, index: int, record: Mapping[str, Any]) -> Prompt:
        return self._fields.prompt(index, _present(record, self._fields.column), f"{self._name} row {index + 1}")


def _plain(kind: Any) -> bool:
    """Whether an Arrow type holds no bytes, nested ones included (the hub stores pictures as a struct of them)."""
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return False
    return all(_plain(kind.field(i).type) for i in range(kind.num_fields))


def _present(record: Mapping[str, Any], column: str) -> dict[str, Any]:
    """A table's record without its nulls, the text's own apart."""
    return {key: value for key, value in record.items() if value is not None or key == column}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _missing_extra(what: str, package: str, error: ImportError) -> NoReturn:
    raise PromptError(f"{what} needs {package}: pip install 'dancegrpo[hf]'") from error
