"""Read the records of data files and datasets, one by one.

Files are read here so that an error can name the bad line: pyarrow's JSON reader, which ``datasets.load_dataset`` uses,
names blocks instead, and infers types (a column of dates becomes timestamps).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DownloadConfig, load_dataset

from arctic_plugins.errors import DataError, one_line, suggest
from arctic_plugins_huggingface.files.check import hub_trouble
from arctic_plugins_huggingface.training.chats import Record
from arctic_plugins_huggingface.training.recipe import DataSource

__all__ = ["read_records"]

_BATCH = 1000


def read_records(source: DataSource, *, streaming: bool = False) -> Iterator[tuple[str, Record | DataError]]:
    """Yield (where, record); ``where`` locates the record in error messages: file and line, or file and record.

    In place of a record that cannot be read, yield the error.
    """
    path = Path(source.path)
    records = _file_records(path) if path.is_file() else _hub_records(source, streaming=streaming)
    empty = True
    for where, record in records:
        empty = False
        yield where, _mapped(record, where, source)
    if empty:
        raise DataError(f"data.path {source.path} is empty", expected="at least one record", fix="correct data.path")


def _mapped(record: Any, where: str, source: DataSource) -> Record | DataError:
    """Return ``record`` with the format's keys."""
    if isinstance(record, DataError):
        return record
    if not isinstance(record, dict):
        return DataError(f"{where} is {type(record).__name__}", expected="an object", fix="correct or remove it")
    for key, column in source.columns.items():
        if column not in record:
            return DataError(
                f"{where} has no column '{column}' (data.columns.{key})", fix=suggest(column, map(str, record))
            )
        record = {**record, key: record[column]}
    return record


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix in (".csv", ".tsv"):
            yield from _csv_records(path)
        elif path.suffix == ".parquet":
            number = 0
            for batch in pq.ParquetFile(path).iter_batches(_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: record {number}", _without_nulls(record)
        else:
            yield from _json_records(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}", fix="save it as UTF-8") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"data.path {path} cannot be read: {one_line(error)}",
            expected="a complete file of the type that its extension indicates",
        ) from error


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(_BATCH).lstrip()
        file.seek(0)
        if start.startswith("["):
            try:
                records = json.load(file)
            except (ValueError, RecursionError) as error:
                line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
                raise DataError(f"{path}{line} is not valid JSON: {error}", fix="correct the line") from error
            yield from ((f"{path}: record {number}", record) for number, record in enumerate(records, 1))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    record = DataError(f"{path}:{number} is not valid JSON: {error}", fix="correct or remove the line")
                yield f"{path}:{number}", record


def _csv_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for record in reader:
                where = f"{path}:{reader.line_num}"
                if None in record or None in record.values():
                    wanted = len(reader.fieldnames or ())
                    yield (
                        where,
                        DataError(
                            f"{where} does not have as many fields as the header, {wanted}", fix="correct the line"
                        ),
                    )
                    continue
                yield where, record
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.reader.line_num} is not valid CSV: {error}", fix="correct the line"
            ) from error


def _hub_records(source: DataSource, *, streaming: bool) -> Iterator[tuple[str, Any]]:
    trouble = hub_trouble()
    how = None if trouble is None else DownloadConfig(local_files_only=True)
    try:
        dataset = load_dataset(  # type: ignore[call-overload]  # no overload for a non-literal `streaming`
            source.path, source.name, split=source.split, streaming=streaming, download_config=how
        )
    except Exception as error:  # datasets raises its own errors and those of the Hub, httpx and the builder
        raise DataError(
            f"data.path {source.path} is not a local file and cannot be loaded as a dataset: "
            f"{trouble or one_line(error)}",
            expected="a file, or the id of an accessible dataset",
            fix="correct data.path, data.name or data.split",
        ) from error
    yield from (
        (f"{source.path}: row {number}", _without_nulls(dict(record))) for number, record in enumerate(dataset, 1)
    )


def _without_nulls(record: Record) -> Record:
    """Remove nulls inside the values of ``record``.

    In Arrow's columns, every call has the arguments, and every tool the parameters, that any other has.
    """

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(inner) for key, inner in value.items() if inner is not None}
        return [cleaned(inner) for inner in value] if isinstance(value, list) else value

    return {key: cleaned(value) for key, value in record.items()}
