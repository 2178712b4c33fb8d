"""A small text-to-SQL dataset generated from templates.

Each row is a question on a schema of one or two tables, with its reference query and the script that creates and fills
those tables, so that a predicted query is judged by the rows that it returns, not by its text. The training and test
splits share no tables, no label values, and no columns except `id` and `name`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from arctic_plugins_demo.execution import execute, is_correct
from arctic_plugins_demo.sql_domains import DOMAINS, LABELS, Domain, Split, Value

TASK = "Write one SQLite query that answers the question."

_CHILD_ROWS = 12
_PARENT_ROWS = 4
_ATTEMPTS = 500


@dataclass(frozen=True)
class Example:
    """One question with its schema, its reference query and the database that both refer to."""

    template: str
    schema: str
    question: str
    sql: str
    setup: str

    @property
    def prompt(self) -> str:
        """The user's message, identical to the one that the record from `to_alpaca` yields."""
        return f"{TASK} {self.question}\n\n{self.schema}"

    def to_alpaca(self) -> dict[str, str]:
        """Return the row as an instruction, its input and its output."""
        return {"instruction": f"{TASK} {self.question}", "input": self.schema, "output": self.sql}


@dataclass(frozen=True)
class _Table:
    """One filled table."""

    name: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Value, ...], ...]

    def schema(self) -> str:
        return f"{self.name}({', '.join(f'{column} {kind}' for column, kind in self.columns)})"

    def script(self) -> str:
        values = ", ".join(f"({', '.join(_literal(value) for value in row)})" for row in self.rows)
        return f"CREATE TABLE {self.schema()};\nINSERT INTO {self.name} VALUES {values};"

    def values(self, column: str) -> list[Value]:
        index = [name for name, _ in self.columns].index(column)
        return [row[index] for row in self.rows]


@dataclass(frozen=True)
class _Scene:
    """A filled domain, with the columns that its question uses."""

    child: _Table
    parent: _Table
    label: str
    text: str
    number: str
    link: str
    parent_label: str
    parent_text: str

    @property
    def owner(self) -> str:
        """The word for one row of the parent table."""
        return _words(self.link.removesuffix("_id"))

    @property
    def join(self) -> str:
        return f"{self.child.name} JOIN {self.parent.name} ON {self.child.name}.{self.link} = {self.parent.name}.id"

    def fill(self, phrase: str, **more: Value) -> str:
        """Return the phrase with the scene's names filled in."""
        names = {
            "table": self.child.name,
            "label": self.label,
            "text": self.text,
            "number": self.number,
            "owner": self.owner,
            "parent_label": self.parent_label,
            "parent_text": self.parent_text,
        }
        an_owner = f"{'an' if self.owner[0] in 'aeiou' else 'a'} {self.owner}"
        return phrase.format(**{key: _words(name) for key, name in names.items()}, an_owner=an_owner, **more)


@dataclass(frozen=True)
class _Draft:
    """A question and its query; `control` is a near miss that must not return the same rows."""

    question: str
    sql: str
    control: str | None = None


def _words(name: str) -> str:
    return name.replace("_", " ")


def _literal(value: Value) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


# --- The scenes ------------------------------------------------------------------------------------------------


def _mixed(rng: random.Random, domains: Sequence[Domain]) -> Domain:
    """Mix the table, columns and parent of several domains, so that names must be read from the schema."""
    texts = [item for domain in domains for item in domain.texts.items()]
    numbers = [item for domain in domains for item in domain.numbers.items()]
    return replace(
        rng.choice(domains),
        table=rng.choice(domains).table,
        texts=dict(rng.sample(texts, 2)),
        numbers=dict(rng.sample(numbers, 2)),
    )


def _shuffled_table(rng: random.Random, name: str, columns: dict[str, tuple[str, Sequence[Value]]]) -> _Table:
    """Return the table with these columns (name -> type and values), `id` first and the others in random order."""
    order = ["id", *rng.sample([column for column in columns if column != "id"], len(columns) - 1)]
    rows = tuple(zip(*(columns[column][1] for column in order), strict=True))
    return _Table(name, tuple((column, columns[column][0]) for column in order), rows)


def _scatter(rng: random.Random, values: Sequence[Value], count: int, *, different: int = 3) -> list[Value]:
    """Return `count` draws from `different` of the values, each of which occurs at least once."""
    kept = rng.sample(values, different)
    drawn = [*kept, *rng.choices(kept, k=count - len(kept))]
    rng.shuffle(drawn)
    return drawn


def _scene(rng: random.Random, domain: Domain, labels: tuple[str, ...], *, linked: bool) -> _Scene:
    """Return the domain with new rows; an unlinked child table lacks the column that refers to its parent."""
    names = rng.sample(labels, _CHILD_ROWS + _PARENT_ROWS)
    child: dict[str, tuple[str, Sequence[Value]]] = {
        "id": ("int", range(1, _CHILD_ROWS + 1)),
        domain.label: ("text", names[:_CHILD_ROWS]),
    }
    child |= {column: ("text", _scatter(rng, values, _CHILD_ROWS)) for column, values in domain.texts.items()}
    child |= {
        column: ("int", rng.sample(range(low, high + 1), _CHILD_ROWS)) for column, (low, high) in domain.numbers.items()
    }
    if linked:
        child[domain.link] = ("int", _scatter(rng, range(1, _PARENT_ROWS + 1), _CHILD_ROWS, different=_PARENT_ROWS))
    parent: dict[str, tuple[str, Sequence[Value]]] = {
        "id": ("int", range(1, _PARENT_ROWS + 1)),
        domain.parent_label: ("text", names[_CHILD_ROWS:]),
    }
    parent |= {column: ("text", _scatter(rng, values, _PARENT_ROWS)) for column, values in domain.parent_texts.items()}
    return _Scene(
        child=_shuffled_table(rng, domain.table, child),
        parent=_shuffled_table(rng, domain.parent, parent),
        label=domain.label,
        text=rng.choice(list(domain.texts)),
        number=rng.choice(list(domain.numbers)),
        link=domain.link,
        parent_label=domain.parent_label,
        parent_text=rng.choice([*domain.parent_texts, domain.parent_label]),
    )


# --- The templates ---------------------------------------------------------------------------------------------

_AGGREGATES: dict[str, tuple[str, ...]] = {
    "AVG": ("average", "mean"),
    "SUM": ("total", "summed"),
    "MAX": ("highest", "maximum"),
    "MIN": ("lowest", "minimum"),
}
_COMPARISONS: dict[str, tuple[str, ...]] = {
    ">": ("above", "greater than", "more than"),
    "<": ("below", "less than", "under"),
}
_DIRECTIONS: dict[str, tuple[str, str]] = {"DESC": ("highest", "descending"), "ASC": ("lowest", "ascending")}


def _pick(rng: random.Random, words: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    """Return an SQL keyword and one of the words for it."""
    keyword = rng.choice(list(words))
    return keyword, rng.choice(words[keyword])


def _select(columns: str, source: str, *clauses: str) -> str:
    return " ".join(("SELECT", columns, "FROM", source, *clauses))


def _text_condition(rng: random.Random, table: _Table, column: str) -> tuple[str, str]:
    """Return an equality with a value that the column contains, in words and in SQL."""
    value = str(rng.choice(table.values(column)))
    return f"{_words(column)} {value}", f"{column} = {_literal(value)}"


def _number_condition(rng: random.Random, scene: _Scene) -> tuple[str, str]:
    """Return a comparison that some of the rows satisfy, in words and in SQL."""
    operator, word = _pick(rng, _COMPARISONS)
    bound = rng.choice(sorted(scene.child.values(scene.number))[2:-2])
    return f"{_words(scene.number)} {word} {bound}", f"{scene.number} {operator} {bound}"


def _where_text(rng: random.Random, scene: _Scene) -> _Draft:
    condition, clause = _text_condition(rng, scene.child, scene.text)
    phrase = rng.choice(
        (
            "Show the {label} of the {table} with {condition}.",
            "Which {table} have {condition}? Give the {label}.",
            "List the {label} of every entry in {table} with {condition}.",
            "What is the {label} of the {table} that have {condition}?",
        )
    )
    sql = _select(scene.label, scene.child.name)
    return _Draft(scene.fill(phrase, condition=condition), f"{sql} WHERE {clause}", sql)


def _where_number(rng: random.Random, scene: _Scene) -> _Draft:
    condition, clause = _number_condition(rng, scene)
    phrase = rng.choice(
        (
            "Show the {label} of the {table} with {condition}.",
            "Which {table} have {condition}? Give the {label}.",
            "List the {label} of every entry in {table} with {condition}.",
            "What is the {label} of the {table} that have {condition}?",
        )
    )
    sql = _select(scene.label, scene.child.name)
    return _Draft(scene.fill(phrase, condition=condition), f"{sql} WHERE {clause}", sql)


def _count(rng: random.Random, scene: _Scene) -> _Draft:
    phrase = rng.choice(
        (
            "How many {table} are there?",
            "Count all the {table}.",
            "What is the number of {table}?",
            "Give the number of all {table}.",
        )
    )
    return _Draft(scene.fill(phrase), _select("COUNT(*)", scene.child.name))


def _count_where(rng: random.Random, scene: _Scene) -> _Draft:
    numeric = rng.random() < 0.5
    condition, clause = _number_condition(rng, scene) if numeric else _text_condition(rng, scene.child, scene.text)
    phrase = rng.choice(
        (
            "How many {table} have {condition}?",
            "Count the {table} with {condition}.",
            "What is the number of {table} with {condition}?",
        )
    )
    sql = _select("COUNT(*)", scene.child.name)
    return _Draft(scene.fill(phrase, condition=condition), f"{sql} WHERE {clause}", sql)


def _aggregate(rng: random.Random, scene: _Scene) -> _Draft:
    function, word = _pick(rng, _AGGREGATES)
    phrase = rng.choice(
        (
            "What is the {word} {number} of the {table}?",
            "Give the {word} {number} of all {table}.",
            "Find the {word} {number} over all the {table}.",
        )
    )
    return _Draft(scene.fill(phrase, word=word), _select(f"{function}({scene.number})", scene.child.name))


def _order(rng: random.Random, scene: _Scene) -> _Draft:
    direction, (extreme, sense) = rng.choice(list(_DIRECTIONS.items()))
    unsorted = _select(scene.label, scene.child.name)
    sql = f"{unsorted} ORDER BY {scene.number} {direction}"
    if rng.random() < 0.4:
        phrase = rng.choice(
            (
                "List the {label} of all {table} in {sense} order of {number}.",
                "Show the {label} of the {table} sorted by {number} in {sense} order.",
            )
        )
        return _Draft(scene.fill(phrase, sense=sense), sql, unsorted)
    limit = rng.randint(2, 6)
    phrase = rng.choice(
        (
            "Show the {label} of the {limit} {table} with the {extreme} {number}.",
            "Which {limit} {table} have the {extreme} {number}? Give the {label}.",
            "List the {label} of the {limit} {table} that have the {extreme} {number}.",
        )
    )
    return _Draft(scene.fill(phrase, limit=limit, extreme=extreme), f"{sql} LIMIT {limit}", sql)


def _group_count(rng: random.Random, scene: _Scene) -> _Draft:
    phrase = rng.choice(
        (
            "How many {table} are there for each {text}?",
            "Count the {table} for each {text}.",
            "Show each {text} with its number of {table}.",
            "For each {text}, give the number of {table}.",
        )
    )
    return _Draft(scene.fill(phrase), _select(f"{scene.text}, COUNT(*)", scene.child.name, f"GROUP BY {scene.text}"))


def _group_aggregate(rng: random.Random, scene: _Scene) -> _Draft:
    function, word = _pick(rng, _AGGREGATES)
    phrase = rng.choice(
        (
            "What is the {word} {number} of the {table} for each {text}?",
            "Show each {text} with its {word} {number} of {table}.",
            "For each {text}, give the {word} {number} of the {table}.",
        )
    )
    sql = _select(f"{scene.text}, {function}({scene.number})", scene.child.name, f"GROUP BY {scene.text}")
    return _Draft(scene.fill(phrase, word=word), sql)


def _distinct(rng: random.Random, scene: _Scene) -> _Draft:
    phrase = rng.choice(
        (
            "What are the different {text} values of the {table}?",
            "List every distinct {text} of the {table}.",
            "Show the unique {text} values in {table}.",
            "Which distinct {text} values do the {table} have?",
        )
    )
    everything = _select(scene.text, scene.child.name)
    return _Draft(scene.fill(phrase), _select(f"DISTINCT {scene.text}", scene.child.name), everything)


def _parent_condition(rng: random.Random, scene: _Scene) -> tuple[str, str]:
    condition, clause = _text_condition(rng, scene.parent, scene.parent_text)
    return condition, f"{scene.parent.name}.{clause}"


def _join_where(rng: random.Random, scene: _Scene) -> _Draft:
    condition, clause = _parent_condition(rng, scene)
    phrase = rng.choice(
        (
            "Show the {label} of the {table} whose {owner} has {condition}.",
            "Which {table} have {an_owner} with {condition}? Give the {label}.",
            "List the {label} of the {table} that belong to {an_owner} with {condition}.",
        )
    )
    sql = _select(f"{scene.child.name}.{scene.label}", scene.join)
    return _Draft(scene.fill(phrase, condition=condition), f"{sql} WHERE {clause}", sql)


def _join_aggregate(rng: random.Random, scene: _Scene) -> _Draft:
    condition, clause = _parent_condition(rng, scene)
    function, word = _pick(rng, _AGGREGATES)
    phrase = rng.choice(
        (
            "What is the {word} {number} of the {table} whose {owner} has {condition}?",
            "Give the {word} {number} of the {table} that have {an_owner} with {condition}.",
            "Find the {word} {number} of the {table} that belong to {an_owner} with {condition}.",
        )
    )
    sql = _select(f"{function}({scene.child.name}.{scene.number})", scene.join)
    return _Draft(scene.fill(phrase, word=word, condition=condition), f"{sql} WHERE {clause}", sql)


def _join_group(rng: random.Random, scene: _Scene) -> _Draft:
    owner_label = f"{scene.parent.name}.{scene.parent_label}"
    if rng.random() < 0.5:
        column = "COUNT(*)"
        phrase = rng.choice(
            (
                "For each {owner}, show the {parent_label} and the number of {table}.",
                "Show the {parent_label} of each {owner} with the number of its {table}.",
                "How many {table} does each {owner} have? Give the {parent_label} and the number.",
            )
        )
        question = scene.fill(phrase)
    else:
        function, word = _pick(rng, _AGGREGATES)
        column = f"{function}({scene.child.name}.{scene.number})"
        phrase = rng.choice(
            (
                "For each {owner}, show the {parent_label} and the {word} {number} of the {table}.",
                "Show the {parent_label} of each {owner} with the {word} {number} of its {table}.",
                (
                    "What {word} {number} do the {table} of each {owner} have? Give the {parent_label} and the {word} "
                    "{number}."
                ),
            )
        )
        question = scene.fill(phrase, word=word)
    return _Draft(question, _select(f"{owner_label}, {column}", scene.join, f"GROUP BY {owner_label}"))


_TEMPLATES: dict[str, Callable[[random.Random, _Scene], _Draft]] = {
    "where_text": _where_text,
    "where_number": _where_number,
    "count": _count,
    "count_where": _count_where,
    "aggregate": _aggregate,
    "order": _order,
    "group_count": _group_count,
    "group_aggregate": _group_aggregate,
    "distinct": _distinct,
    "join_where": _join_where,
    "join_aggregate": _join_aggregate,
    "join_group": _join_group,
}
TEMPLATES: tuple[str, ...] = tuple(_TEMPLATES)


# --- The rows --------------------------------------------------------------------------------------------------


def _example(rng: random.Random, template: str, split: Split) -> Example | None:
    """Return one random example, or None if its query returns nothing or a near miss returns the same rows."""
    linked = template.startswith("join")
    domain = _mixed(rng, DOMAINS[split]) if split == "train" else rng.choice(DOMAINS[split])
    scene = _scene(rng, domain, LABELS[split], linked=linked)
    draft = _TEMPLATES[template](rng, scene)
    tables = [scene.child, scene.parent] if linked else [scene.child]
    example = Example(
        template=template,
        schema="\n".join(table.schema() for table in tables),
        question=draft.question,
        sql=draft.sql,
        setup="\n".join(table.script() for table in tables),
    )
    if not execute(example.sql, example.setup) or (draft.control is not None and is_correct(draft.control, example)):
        return None
    return example


def generate(rows: int, *, seed: int, split: Split) -> list[Example]:
    """Return distinct rows of one split, from each template in turn; the same seed always gives the same rows.

    Raises:
        ValueError: if the split does not have that many distinct rows.
    """
    rng = random.Random(f"{seed}:{split}")  # for reproducible data, not for secrets
    seen: set[tuple[str, str]] = set()
    examples: list[Example] = []
    for row in range(rows):
        template = TEMPLATES[row % len(TEMPLATES)]
        for _ in range(_ATTEMPTS):
            example = _example(rng, template, split)
            if example is not None and (example.schema, example.question) not in seen:
                break
        else:
            raise ValueError(
                f"the {split} split does not have {rows} distinct rows: template {template} ran out at row {row}"
            )
        seen.add((example.schema, example.question))
        examples.append(example)
    return examples


def write_jsonl(examples: Sequence[Example], path: str | Path) -> None:
    """Write the rows as Alpaca records, one JSON object per line."""
    lines = (json.dumps(example.to_alpaca(), ensure_ascii=False) + "\n" for example in examples)
    Path(path).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    import sys

    write_jsonl(generate(1000, seed=0, split="train"), sys.argv[1])
