"""The demo's data set is sound, and its measure judges queries by the rows that they return."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest
from arctic_plugins_demo.execution import accuracy, execute, extract_sql, is_correct
from arctic_plugins_demo.sql_domains import Split
from arctic_plugins_demo.text_to_sql import TEMPLATES, Example, generate, write_jsonl

from arctic_plugins.testing import run_python

SETUP = """
CREATE TABLE pets(id int, name text, kind text, weight real);
INSERT INTO pets VALUES (1, 'Rex', 'dog', 9.5), (2, 'Tom', 'cat', 4.0), (3, 'Ace', 'dog', 12.25);
"""
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"


def example(sql: str) -> Example:
    return Example(
        template="any", schema="pets(id int, name text, kind text, weight real)", question="?", sql=sql, setup=SETUP
    )


def tables(examples: list[Example]) -> set[str]:
    return {name for row in examples for name in re.findall(r"^(\w+)\(", row.schema, re.MULTILINE)}


@pytest.fixture(scope="module")
def train() -> list[Example]:
    return generate(600, seed=3, split="train")


@pytest.fixture(scope="module")
def held_out() -> list[Example]:
    return generate(120, seed=3, split="test")


def test_the_same_seed_gives_the_same_rows(train: list[Example]) -> None:
    assert generate(120, seed=3, split="train") == train[:120]
    assert generate(120, seed=4, split="train") != train[:120]


def test_the_hash_seed_of_the_process_does_not_matter(held_out: list[Example]) -> None:
    code = "from arctic_plugins_demo.text_to_sql import *; print(generate(24, seed=3, split='test'))"
    made = run_python("-c", code, environment={"PYTHONHASHSEED": "7"})
    assert made.stdout.strip() == str(held_out[:24])


def test_the_splits_share_no_table_and_no_filter_value(train: list[Example], held_out: list[Example]) -> None:
    assert len(tables(train)) >= 20
    assert len(tables(held_out)) >= 10
    assert not tables(train) & tables(held_out)
    assert not set(re.findall(r"'(.*?)'", " ".join(row.setup for row in train))) & set(
        re.findall(r"'(.*?)'", " ".join(row.setup for row in held_out))
    )


def test_the_templates_are_all_there_and_balanced(train: list[Example], held_out: list[Example]) -> None:
    for examples in (train, held_out):
        counts = [sum(row.template == template for row in examples) for template in TEMPLATES]
        assert counts == [len(examples) // len(TEMPLATES)] * len(TEMPLATES)
    queries = " ".join(row.sql for row in held_out)
    assert all(
        word in queries for word in (" JOIN ", " GROUP BY ", " ORDER BY ", " LIMIT ", "COUNT(*)", "AVG(", "DISTINCT")
    )


def test_every_query_runs_on_its_schema_and_returns_rows(train: list[Example], held_out: list[Example]) -> None:
    for row in train + held_out:
        assert execute(row.sql, row.setup)
        assert all(line in row.setup for line in row.schema.splitlines())
        assert is_correct(row.sql, row)


def test_a_filter_cannot_be_left_out(held_out: list[Example]) -> None:
    for row in held_out:
        unfiltered = re.sub(r" WHERE .*| LIMIT .*|DISTINCT ", "", row.sql)
        assert unfiltered == row.sql or not is_correct(unfiltered, row)


def test_no_question_on_a_schema_comes_twice(train: list[Example]) -> None:
    assert len({(row.schema, row.question) for row in train}) == len(train)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_questions_leave_no_gap(split: Split) -> None:
    for row in generate(60, seed=0, split=split):
        assert not re.search(r"[{}_]|\ba [aeiou]", row.question)
        assert row.question[-1] in ".?"


def test_more_rows_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arctic_plugins_demo.text_to_sql._ATTEMPTS", 0)
    with pytest.raises(ValueError, match="where_text ran out at row 0"):
        generate(1, seed=0, split="train")


def test_the_prompt_is_what_the_alpaca_record_makes(tmp_path: Path, held_out: list[Example]) -> None:
    write_jsonl(held_out[:5], tmp_path / "rows.jsonl")
    records = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records == [row.to_alpaca() for row in held_out[:5]]
    for row, record in zip(held_out[:5], records, strict=True):
        assert row.prompt == record["instruction"] + "\n\n" + record["input"]
        assert row.question in row.prompt
        assert row.schema in row.prompt
        assert record["output"] == row.sql


@pytest.mark.parametrize(
    ("reference", "predicted"),
    [
        ("SELECT COUNT(*) FROM pets", "select  count( * )\nfrom PETS;"),
        ("SELECT name FROM pets WHERE kind = 'dog'", 'SELECT p.Name FROM pets AS p WHERE p.kind = "dog" ORDER BY name'),
        ("SELECT name FROM pets ORDER BY weight DESC", "SELECT name FROM pets ORDER BY -weight"),
        ("SELECT AVG(weight) FROM pets", "SELECT SUM(weight) / 3 + 1e-9 FROM pets"),
        (
            "SELECT kind, COUNT(*) FROM pets GROUP BY kind",
            "SELECT kind, COUNT(id) * 1.0 FROM pets GROUP BY 1 ORDER BY 2 DESC",
        ),
        ("SELECT NULL, 1 UNION ALL SELECT 'x', 2", "SELECT 'x', 2.0 UNION ALL SELECT NULL, 1"),
    ],
)
def test_other_words_for_the_same_rows_are_right(reference: str, predicted: str) -> None:
    assert is_correct(predicted, example(reference))


@pytest.mark.parametrize(
    ("reference", "predicted"),
    [
        ("SELECT name FROM pets WHERE kind = 'dog'", "SELECT name FROM pets"),
        ("SELECT name FROM pets WHERE kind = 'dog'", "SELECT name FROM pets WHERE kind = 'fish'"),
        ("SELECT name FROM pets ORDER BY weight DESC", "SELECT name FROM pets ORDER BY weight ASC"),
        ("SELECT name FROM pets", "SELECT name, kind FROM pets"),
        ("SELECT name FROM pets WHERE id = 9", "SELECT name, kind FROM pets WHERE id = 9"),
        ("SELECT name FROM pets", "SELECT DISTINCT kind FROM pets"),
        ("SELECT kind FROM pets", "SELECT kind FROM pets UNION ALL SELECT 'cat' LIMIT 4"),
        ("SELECT COUNT(*) FROM pets", "SELECT '3'"),
        ("SELECT AVG(weight) FROM pets", "SELECT AVG(weight) + 0.001 FROM pets"),
        ("SELECT AVG(weight) FROM pets", "SELECT NULL"),
        ("SELECT COUNT(*) FROM pets", "SELECT COUNT(*) FROM cats"),
        ("SELECT COUNT(*) FROM pets", "There are three."),
        ("SELECT COUNT(*) FROM pets", ""),
        ("SELECT COUNT(*) FROM pets", "SELECT 3 \x00"),
        ("SELECT COUNT(*) FROM pets", "SELECT '\ud800'"),
        ("SELECT COUNT(*) FROM pets", "SELECT ?"),
        ("SELECT COUNT(*) FROM pets", "SELECT " + "(" * 5000),
    ],
)
def test_other_rows_and_bad_sql_are_wrong(reference: str, predicted: str) -> None:
    assert not is_correct(predicted, example(reference))


def test_a_broken_reference_is_not_blamed_on_the_prediction() -> None:
    with pytest.raises(sqlite3.Error):
        is_correct("SELECT 1", example("SELECT nothing FROM nowhere"))


@pytest.mark.parametrize("columns", ["i", "COUNT(*)", "zeroblob(9000)"])
def test_an_endless_query_is_cut_off(columns: str) -> None:
    started = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        execute(ENDLESS.format(columns), SETUP, max_steps=20_000)
    assert not is_correct(ENDLESS.format(columns), example("SELECT COUNT(*) FROM pets"))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM pets",
        "INSERT INTO pets VALUES (4, 'Bo', 'dog', 1.0) RETURNING id",
        "UPDATE pets SET kind = 'cat'",
        "DROP TABLE pets",
        "CREATE TABLE more(id int)",
        "ATTACH '{path}' AS other",
        "VACUUM INTO '{path}'",
        "PRAGMA query_only",
        "SELECT * FROM pragma_database_list",
        "BEGIN",
        "SELECT zeroblob(1000000000)",
        "SELECT 1; DROP TABLE pets",
        "-- nothing",
    ],
)
def test_all_but_one_reading_query_is_refused(sql: str, tmp_path: Path) -> None:
    with pytest.raises(sqlite3.Error):
        execute(sql.format(path=tmp_path / "made.db"), SETUP, max_steps=1000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prediction", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("  SELECT 1 ;\n", "SELECT 1"),
        ("SELECT 1; SELECT 2;", "SELECT 1"),
        ("SELECT ';' || \";\" ; more", "SELECT ';' || \";\""),
        ("SELECT 'it''s; fine'", "SELECT 'it''s; fine'"),
        ("SELECT 'open; end", "SELECT 'open"),
        ("```sql\nSELECT 1;\n```\nThis counts.", "SELECT 1"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("```SELECT 1```", "SELECT 1"),
        ("Here it is:\n```sql\nSELECT 1", "SELECT 1"),
        ("SELECT 1\n\nThis query returns one.", "SELECT 1"),
        ("SELECT 1\n\nFROM pets;", "SELECT 1\n\nFROM pets"),
        ("", ""),
    ],
)
def test_the_first_statement_is_extracted(prediction: str, sql: str) -> None:
    assert extract_sql(prediction) == sql


def test_accuracy_is_counted_by_template() -> None:
    count = replace(example("SELECT COUNT(*) FROM pets"), template="count")
    names = replace(example("SELECT name FROM pets"), template="names")
    predictions = ["SELECT COUNT(*) FROM pets", "SELECT 1", "SELECT name FROM pets"]
    assert accuracy(predictions, [count, count, names]) == {"count": (1, 2), "names": (1, 1)}
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        accuracy(predictions[:2], [count, count, names])


def test_the_module_does_not_need_torch() -> None:
    path = Path(__file__).parents[1] / "arctic_plugins_demo/text_to_sql.py"
    assert not re.search(
        r"import (torch|transformers|peft)|from (torch|transformers|peft)", path.read_text(encoding="utf-8")
    )
