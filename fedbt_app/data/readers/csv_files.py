"""Tables of text: CSV and TSV, whatever delimiter and encoding a spreadsheet chose."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from fedbt_app.data.readers.opened import shown_encoding, text
from fedbt_app.data.readers.table import Table, Wanted, check_unique, table_of
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.notes import Notes

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
SAMPLE = 1 << 16  # characters that decide on the delimiter
_SEP = re.compile(r'"?sep=(.)"?\s*')  # how Excel is told the delimiter

csv.field_size_limit(2**31 - 1)  # a document may be longer than the module's 128 KiB


def read_csv(path: Path, wanted: Wanted) -> Table:
    """Read a table record by record."""
    notes = Notes()
    delimiter = _delimiter(path, wanted)
    records = _records(path, delimiter)
    _, header = next(records, (0, []))
    names = [name.strip() for name in header]
    check_unique(names, wanted)
    table = table_of(
        (dict(zip(names, record, strict=True)) for record in _whole(records, len(names))),
        wanted,
        notes,
    )
    table.width = len(names)
    if not table.rows:
        table.columns = {name: [] for name in names if name in wanted.columns}
    notes.add(
        f"{path.name}: CSV, {shown_encoding(path)}, delimiter {DELIMITERS.get(delimiter, 'own')}, "
        f"{table.rows} rows"
    )
    return table


def _delimiter(path: Path, wanted: Wanted) -> str:
    """Choose the delimiter by which the header has most of the wanted columns; among equals the one
    by which most records are as wide as the header; then the first.
    """
    with text(path, newline="") as stream:
        first = stream.readline()
        sample = first + stream.read(SAMPLE)
    if found := _SEP.fullmatch(first):
        return found[1]

    def fits(delimiter: str) -> tuple[int, float]:
        lines = io.StringIO(sample, newline="")
        records = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        header, *others = records or [[]]
        wide = sum(len(row) == len(header) for row in others[:-1])  # the last may be cut
        known = wanted.columns & {name.strip() for name in header}
        return len(known), wide / max(1, len(others) - 1)

    return max(DELIMITERS, key=fits)


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the records that are not empty, each with the number of its first line."""
    with text(path, newline="") as stream:
        skipped = 0
        if _SEP.fullmatch(stream.readline()):
            skipped = 1
        else:
            stream.seek(0)
        # strict: a quote in the wrong place would swallow the rows up to the next one
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        line = 1 + skipped
        while True:
            try:
                record = next(reader, None)
            except csv.Error:
                raise FedBTError(
                    f"the record that begins on line {line} has a stray quote, or one that is not "
                    "closed: put quotes around the field and double those inside it"
                ) from None
            if record is None:
                return
            if any(cell.strip() for cell in record):
                yield line, record
            line = reader.line_num + skipped + 1


def _whole(records: Iterator[tuple[int, list[str]]], width: int) -> Iterator[list[str]]:
    for line, record in records:
        while len(record) > width and not record[-1]:
            record.pop()  # spreadsheets end lines with empty cells
        if len(record) != width:
            raise FedBTError(
                f"line {line} has {len(record)} fields, the header {width}: "
                "put quotes around fields that hold the delimiter, and fill the others"
            )
        yield record
