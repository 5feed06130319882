"""PubTator: title and abstract lines, then a line an entity; a blank line ends a document."""

import re
from collections.abc import Iterator
from pathlib import Path

from fedbt_app.data.readers.documents import Documents
from fedbt_app.data.readers.opened import shown_encoding, text
from fedbt_app.data.readers.spans import Span
from fedbt_app.data.readers.table import Table, Wanted, table_of
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Row
from fedbt_app.tasks.notes import Notes

TEXT_LINE = re.compile(r"[^|\t]+\|[ta]\|(.*)")


def read_pubtator(path: Path, wanted: Wanted) -> Table:
    """Read each document as a row: title, a line end, abstract."""
    notes = Notes()
    documents = Documents(wanted, notes, path.name)
    table = table_of(_rows(path, documents), wanted, notes)
    documents.tell()
    notes.add(f"{path.name}: PubTator, {shown_encoding(path)}, {table.rows} documents")
    return table


def _rows(path: Path, documents: Documents) -> Iterator[Row]:
    parts: list[str] = []
    spans: list[Span] = []
    with text(path) as stream:
        for number, line in enumerate(_ended(stream), start=1):
            if not line.strip():
                if parts:
                    yield _document(parts, spans, documents, number)
                parts, spans = [], []
            elif match := TEXT_LINE.fullmatch(line):
                parts.append(match[1])
            else:
                spans += _spans(line, number)


def _ended(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line.rstrip("\r\n")
    yield ""  # the last document too


def _document(parts: list[str], spans: list[Span], documents: Documents, number: int) -> Row:
    try:
        return documents.row("\n".join(parts), spans)
    except FedBTError as error:
        raise FedBTError(f"the document that ends on line {number - 1}: {error}") from None


def _spans(line: str, number: int) -> list[Span]:
    """Return the entity of a line; none for a relation, whose second field is no number."""
    fields = line.split("\t")
    if len(fields) >= 3 and not fields[1].isdigit():
        return []
    if len(fields) < 5 or not fields[2].isdigit() or not fields[4].strip():
        raise FedBTError(
            f"line {number} is no line of PubTator: title `id|t|..`, abstract `id|a|..`, or id, start, "
            "end, mention and type with tabs between them"
        )
    return [Span(int(fields[1]), int(fields[2]), fields[4].strip(), fields[3])]
