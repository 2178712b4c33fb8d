"""Execution accuracy: a predicted query is run, and its rows are compared with those of the reference query."""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arctic_plugins_demo.text_to_sql import Example

__all__ = ["accuracy", "execute", "extract_sql", "is_correct"]

Row = tuple[object, ...]

_DEFAULT_MAX_STEPS = 100_000
_LONGEST_VALUE = 10_000
_LONGEST_SQL = 10_000


_FENCE = re.compile(r"```[ \t]*(?:\w+[ \t]*\n)?(.*?)(?:```|\Z)", re.DOTALL)
_STATEMENT = re.compile(r"""(?:'(?:[^']|'')*'|"(?:[^"]|"")*"|[^;])*""")
_BLANK_LINE = re.compile(r"\n\s*\n")
_ORDER_BY = re.compile(r"\border\s+by\b", re.IGNORECASE)
_ALLOWED_ACTIONS = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)


def extract_sql(prediction: str) -> str:
    """Return the first statement of a model's answer, without code fences, the semicolon and anything after it."""
    fenced = _FENCE.search(prediction)
    text = (fenced.group(1) if fenced else prediction).strip()
    statement = _STATEMENT.match(text)
    first = statement.group(0) if statement else text
    if first == text:  # without a semicolon, only a blank line can mark the end of the query
        first = _BLANK_LINE.split(text, maxsplit=1)[0]
    return first.strip()


def _authorize(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _ALLOWED_ACTIONS else sqlite3.SQLITE_DENY


def _run(sql: str, setup: str, max_steps: int) -> tuple[int, list[Row]]:
    """Run one SELECT in a fresh database, and return the number of columns and the rows."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.executescript(setup)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, _LONGEST_SQL)
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(lambda: 1, max_steps)
        cursor = connection.execute(sql)
        if cursor.description is None:
            raise sqlite3.ProgrammingError("not a query that returns rows")
        return len(cursor.description), cursor.fetchall()
    except (sqlite3.Warning, ValueError) as error:  # several statements, or text that SQLite does not accept
        raise sqlite3.ProgrammingError(str(error)) from error
    finally:
        connection.close()


def execute(sql: str, setup: str, *, max_steps: int = _DEFAULT_MAX_STEPS) -> list[Row]:
    """Return the rows of one SELECT, run read-only in a fresh in-memory database that `setup` created.

    Raises:
        sqlite3.Error: if the query is invalid, does more than read, or takes more than `max_steps` steps of SQLite's
            virtual machine.
    """
    return _run(sql, setup, max_steps)[1]


def _sort_key(row: Row) -> tuple[object, ...]:
    """Return a key that sorts rows of any types and puts equal numbers next to each other, whatever their type."""
    return tuple((1, round(value, 6), "") if isinstance(value, int | float) else (0, 0, repr(value)) for value in row)


def _same_value(left: object, right: object) -> bool:
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=0.0, abs_tol=1e-6)
    return left == right


def _same_rows(left: list[Row], right: list[Row]) -> bool:
    return len(left) == len(right) and all(
        _same_value(one, other)
        for row, wanted in zip(left, right, strict=True)
        for one, other in zip(row, wanted, strict=True)
    )


def is_correct(predicted: str, example: Example) -> bool:
    """Return whether the prediction returns the reference query's rows, in the same order if that query sets one."""
    width, wanted = _run(example.sql, example.setup, _DEFAULT_MAX_STEPS)
    try:
        predicted_width, rows = _run(extract_sql(predicted), example.setup, _DEFAULT_MAX_STEPS)
    except sqlite3.Error:
        return False
    if predicted_width != width:
        return False
    if not _ORDER_BY.search(example.sql):
        wanted, rows = sorted(wanted, key=_sort_key), sorted(rows, key=_sort_key)
    return _same_rows(rows, wanted)


def accuracy(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, tuple[int, int]]:
    """Return the number of correct predictions for each template: template -> (right, total)."""
    tally: dict[str, tuple[int, int]] = {}
    for prediction, example in zip(predictions, examples, strict=True):
        right, total = tally.get(example.template, (0, 0))
        tally[example.template] = (right + is_correct(prediction, example), total + 1)
    return tally
