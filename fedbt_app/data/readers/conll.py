"""CoNLL: a word a line with its tag in the last of 2 to 4 columns; a blank line ends a sentence."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedbt_app.data.readers.opened import shown_encoding, text
from fedbt_app.data.readers.table import Table, Wanted, table_of
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Row
from fedbt_app.tasks.notes import Notes

MOST_COLUMNS = 4
WORD_HEADS = frozenset(("token", "tokens", "word", "words"))
TAG_HEADS = frozenset(("tag", "tags", "label", "labels", "ner", "ner_tag", "ner_tags"))


@dataclass
class _Layout:
    """What a first look at the file tells: a word may be `#`, which also begins a comment."""

    columns: int = 0
    tags: set[str] = field(default_factory=set)
    has_header: bool = False

    def is_comment(self, fields: list[str]) -> bool:
        """Say whether a line that begins with # is a comment, not the word # with a known tag."""
        return not (len(fields) == self.columns and fields[-1] in self.tags)


def read_conll(path: Path, wanted: Wanted) -> Table:
    """Read sentence by sentence."""
    notes = Notes()
    layout = _layout(path)
    table = table_of(_sentences(path, layout, wanted), wanted, notes)
    notes.add(
        f"{path.name}: CoNLL of {layout.columns} columns, {shown_encoding(path)}, "
        f"{table.rows} sentences"
    )
    if layout.has_header:
        notes.add(f"{path.name}: the first line names the columns and is no word")
    return table


def _fields(line: str) -> list[str]:
    """Split a line at its tabs, else at its blanks: with tabs, a word may hold blanks."""
    line = line.strip("\r\n").rstrip(" \t")
    return line.split("\t") if "\t" in line else re.split(" +", line)


def _layout(path: Path) -> _Layout:
    layout = _Layout()
    with text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip() or line.startswith(("#", "-DOCSTART-")):
                continue
            fields = _fields(line)
            if not layout.columns:
                layout.columns = _checked_width(len(fields), number)
                heads = [name.strip().lower() for name in fields]
                layout.has_header = heads[0] in WORD_HEADS and heads[-1] in TAG_HEADS
            layout.tags.add(fields[-1])
    return layout


def _checked_width(columns: int, number: int) -> int:
    if not 2 <= columns <= MOST_COLUMNS:
        raise FedBTError(
            f"line {number} has {columns} columns: write a word a line, the tag in the last of 2 to "
            f"{MOST_COLUMNS} columns, and a blank line between sentences"
        )
    return columns


def _sentences(path: Path, layout: _Layout, wanted: Wanted) -> Iterator[Row]:
    words: list[str] = []
    tags: list[str] = []
    header = layout.has_header
    with text(path) as stream:
        for number, line in enumerate(stream, start=1):
            fields = _fields(line)
            if not line.strip() or line.startswith("-DOCSTART-"):
                if words:
                    yield _row(words, tags, wanted)
                words, tags = [], []
            elif line.startswith("#") and layout.is_comment(fields):
                continue
            elif header:
                header = False
            elif len(fields) != layout.columns or not fields[0].strip():
                raise FedBTError(
                    f"line {number} has not a word and {layout.columns - 1} more columns, as the "
                    "first has: mend it"
                )
            else:
                words.append(fields[0])
                tags.append(fields[-1])
    if words:
        yield _row(words, tags, wanted)


def _row(words: list[str], tags: list[str], wanted: Wanted) -> Row:
    if wanted.words:
        return {wanted.tokens: words, wanted.tags: tags}
    return {wanted.text: " ".join(words)}
