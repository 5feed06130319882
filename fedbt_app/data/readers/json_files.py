"""JSON lines, and what else is kept in .json files.

| what stands in the file | what is a row |
|---|---|
| one object a line | a line |
| an array of objects | an object |
| an array of pairs: text, object (spaCy) | a pair |
| an object of lists (`{"text": [..], ..}`), or of objects (pandas) | a place in them |
| `columns` and `data` (pandas, split) | an item of `data` |
| an object with one list of objects (BioC, `{"data": [..]}`) | an item of it |
| any other object | the object |
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedbt_app.data.readers.documents import Documents
from fedbt_app.data.readers.opened import shown_encoding, text
from fedbt_app.data.readers.table import Table, Wanted, mend_surrogates, table_of
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Row
from fedbt_app.tasks.notes import Notes


def read_json(path: Path, wanted: Wanted) -> Table:
    """Read JSON lines row by row, other JSON as a whole."""
    notes = Notes()
    rows: Iterable[Row]
    if _is_lines(path):
        kind, rows = "JSON lines", _lines(path)
    else:
        with text(path) as stream:
            kind, rows = _rows_of(_parsed(stream.read()), wanted)
    documents = Documents(wanted, notes, path.name)
    table = table_of(documents.rows(rows), wanted, notes)
    documents.tell()
    mend_surrogates(table, path.name)
    notes.add(f"{path.name}: {kind}, {shown_encoding(path)}, {table.rows} rows")
    return table


def _is_lines(path: Path) -> bool:
    """Say whether the first line is a whole object and not the only line."""
    with text(path) as stream:
        lines = (line for line in stream if line.strip())
        first = next(lines, "")
        try:
            whole = isinstance(_loads(first), dict)
        except ValueError:
            return not first
        return whole and next(lines, None) is not None


def _lines(path: Path) -> Iterator[Row]:
    with text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = _loads(line)
            except _KeyTwice as error:
                raise FedBTError(f"line {number}: {error}") from None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise FedBTError(
                    f"line {number} is no JSON object: write JSON lines, one object a line"
                )
            yield row


class _KeyTwice(ValueError):
    def __init__(self) -> None:
        super().__init__("an object has one key twice: remove one of the two")


def _loads(content: str) -> Any:
    return json.loads(content, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _KeyTwice
    return made


def _parsed(content: str) -> Any:
    try:
        return _loads(content)
    except _KeyTwice as error:
        raise FedBTError(str(error)) from None
    except json.JSONDecodeError as error:
        raise FedBTError(
            f"line {error.lineno} is no JSON object and no part of an array: "
            "write JSON lines, one object a line, or one array of objects"
        ) from None


# One value of the whole file ----------------------------------------------------------------------


def _rows_of(whole: Any, wanted: Wanted) -> tuple[str, Iterable[Row]]:
    if isinstance(whole, list):
        return "JSON array", _items(whole, wanted)
    if not isinstance(whole, dict):
        raise FedBTError("it is no JSON object or array: write JSON lines, one object a line")
    if _is_row(whole, wanted):
        return "one JSON object", [whole]
    if set(whole) >= {"columns", "data"} and isinstance(whole["columns"], list):
        return "JSON of columns", _split(whole["columns"], whole["data"])
    values = list(whole.values())
    lists = [value for value in values if isinstance(value, list)]
    tables = [value for value in lists if value and all(isinstance(row, dict) for row in value)]
    if len(tables) == 1:
        return "JSON array", tables[0]
    if len(tables) > 1 and len(tables) == len(values):
        raise FedBTError("it holds several lists of rows: write each split into a file of its own")
    if values and len(lists) == len(values):
        return "JSON of columns", _columns(whole)
    if values and all(isinstance(value, dict) for value in values):
        return "JSON of columns", _columns(_of_pandas(whole))
    return "one JSON object", [whole]


def _is_row(found: dict[str, Any], wanted: Wanted) -> bool:
    words = found.get(wanted.tokens)
    return (
        isinstance(found.get(wanted.text), str)
        or "passages" in found
        or (isinstance(words, list) and any(isinstance(word, str) for word in words))
    )


def _items(whole: list[Any], wanted: Wanted) -> Iterator[Row]:
    for number, item in enumerate(whole, start=1):
        if isinstance(item, dict):
            yield item
        elif _is_pair(item):
            yield {wanted.text: item[0]} | item[1]
        else:
            raise FedBTError(f"item {number} of the array is no object: write one object a row")


def _is_pair(item: Any) -> bool:
    two = isinstance(item, list) and len(item) == 2
    return two and isinstance(item[0], str) and isinstance(item[1], dict)


def _split(names: list[Any], rows: Any) -> Iterator[Row]:
    for number, row in enumerate(rows if isinstance(rows, list) else [], start=1):
        if not isinstance(row, list) or len(row) != len(names):
            raise FedBTError(f"row {number} of data has not one value for each of columns: mend it")
        yield dict(zip(map(str, names), row, strict=True))


def _of_pandas(whole: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    first = next(iter(whole.values()))
    if any(column.keys() != first.keys() for column in whole.values()):
        raise FedBTError("its columns have not the same rows: write an array of objects")
    return {name: [column[row] for row in first] for name, column in whole.items()}


def _columns(columns: dict[str, list[Any]]) -> Iterator[Row]:
    if len({len(values) for values in columns.values()}) > 1:
        raise FedBTError("its columns differ in length: give each one value a row")
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))
