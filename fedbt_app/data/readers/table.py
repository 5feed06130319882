"""What a reader is asked for, and what it returns."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Columns, Row
from fedbt_app.tasks.notes import Notes

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Wanted:
    """What a run reads of a file.

    Attributes
    ----------
    columns : names that the settings give; no other column is kept
    text, label, tokens, tags : what the settings call these
    words : whether the task reads tagged words
    """

    columns: frozenset[str]
    text: str = "text"
    label: str = "label"
    tokens: str = "tokens"
    tags: str = "ner_tags"
    words: bool = False


@dataclass
class Table:
    """The wanted columns of one split.

    Attributes
    ----------
    columns : those of the wanted that are there
    width : how many columns the file has; their names may be cells and are not kept
    rows : how many rows
    label_counts : how often each label stands in them, once they are checked
    """

    columns: Columns
    width: int
    rows: int
    notes: Notes = field(default_factory=Notes)
    label_counts: Counter[str] = field(default_factory=Counter)


def table_of(rows: Iterable[Row], wanted: Wanted, notes: Notes) -> Table:
    """Take rows one by one and keep the wanted columns; a row without a column has None there."""
    columns: Columns = {}
    names: set[str] = set()
    count = 0
    for row in rows:
        names.update(row)
        for name, value in row.items():
            if name in wanted.columns:
                if name not in columns:
                    columns[name] = [None] * count  # for the rows before
                columns[name].append(value)
        count += 1
        for values in columns.values():
            if len(values) < count:
                values.append(None)
    return Table(columns, len(names), count, notes)


def from_columns(columns: Columns, wanted: Wanted, notes: Notes) -> Table:
    """Keep the wanted ones of whole columns."""
    rows = length(columns)
    kept = {name: values for name, values in columns.items() if name in wanted.columns}
    return Table(kept, len(columns), rows, notes)


def length(columns: Mapping[str, Sequence[Any]]) -> int:
    """Return the number of rows."""
    return len(next(iter(columns.values()))) if columns else 0


def joined(tables: Iterable[Table]) -> Table:
    """Return the rows of several files as one table."""
    first, *others = tables
    for number, other in enumerate(others, start=2):
        if other.columns.keys() != first.columns.keys():
            raise FedBTError(
                f"file {number} of a split in several files has other columns than the first: "
                "write the same columns into each"
            )
        for name, values in first.columns.items():
            values += other.columns[name]
        first.rows += other.rows
        for note in other.notes:
            first.notes.add(note)
    return first


def check_unique(names: Iterable[str], wanted: Wanted) -> None:
    """Refuse a wanted column that stands twice: which of both is meant cannot be known."""
    seen = set()
    for name in names:
        if name in seen and name in wanted.columns:
            raise FedBTError(f"column {name!r} stands twice: rename or remove one")
        seen.add(name)


def mend_surrogates(table: Table, name: str) -> None:
    """Replace halves of a character (a cut emoji), which no tokenizer takes, by U+FFFD."""
    mended = 0

    def mend(value: Any) -> Any:
        nonlocal mended
        if isinstance(value, list):
            return [mend(item) for item in value]
        if not isinstance(value, str) or value.isascii():
            return value
        made, count = _SURROGATE.subn("\ufffd", value)
        mended += count
        return made

    for column, values in table.columns.items():
        table.columns[column] = [mend(value) for value in values]
    if mended:
        table.notes.add(f"{name}: {mended} halves of a character (lone surrogates) became U+FFFD")
