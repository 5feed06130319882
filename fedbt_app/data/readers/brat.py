"""BRAT: a folder of .txt files, each with an .ann file of the same name beside it."""

from collections.abc import Iterator
from pathlib import Path

from fedbt_app.data.readers.documents import Documents
from fedbt_app.data.readers.opened import PACKED, text
from fedbt_app.data.readers.spans import Span, placed
from fedbt_app.data.readers.table import Table, Wanted, table_of
from fedbt_app.data.readers.text_files import Texts
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Row
from fedbt_app.tasks.notes import Notes


def read_brat(path: Path, wanted: Wanted) -> Table:
    """Read each text with its spans (T lines; relations, events and notes are not read)."""
    notes = Notes()
    documents = Documents(wanted, notes, path.name)
    texts = Texts(path)
    table = table_of(_rows(texts, documents), wanted, notes)
    documents.tell()
    notes.add(f"{path.name}: BRAT, {texts.encodings()}, {table.rows} texts")
    return table


def _rows(texts: Texts, documents: Documents) -> Iterator[Row]:
    annotations = [_beside(file) for file in texts.files]
    if missing := annotations.count(None):
        raise FedBTError(
            f"{missing} of {len(annotations)} .txt files have no .ann file beside them: add one, "
            "empty where there is nothing to tag"
        )
    for number, file in zip(texts, filter(None, annotations), strict=True):
        spans = _spans(file, number, documents)
        content = texts.read(number, newline="")
        unix = content.replace("\r\n", "\n")
        # some tools count the line end of Windows as one character, some as two
        best = unix if placed(content, spans) is None else content
        try:
            yield documents.row(best, spans)
        except FedBTError as error:
            raise FedBTError(f"text {number}, in the order of the file names: {error}") from None


def _beside(file: Path) -> Path | None:
    stem = file.name
    for ending in PACKED:
        stem = stem.removesuffix(ending)
    plain = file.with_name(stem).with_suffix(".ann")
    packed = (plain.with_name(plain.name + ending) for ending in PACKED)
    return next((place for place in (plain, *packed) if place.is_file()), None)


def _spans(file: Path, number: int, documents: Documents) -> list[Span]:
    spans: list[Span] = []
    with text(file) as stream:
        for line_number, line in enumerate(stream, start=1):
            if not line.startswith("T"):
                continue
            try:
                spans += _of_line(line, documents)
            except ValueError:
                raise FedBTError(
                    f"line {line_number} of the .ann file of text {number}, in the order of the "
                    "file names, is not `T1 TAB type start end TAB text`: mend it"
                ) from None
    return spans


def _of_line(line: str, documents: Documents) -> list[Span]:
    _, where, mention = line.rstrip("\r\n").split("\t", 2)
    kind, _, places = where.partition(" ")
    pieces = [tuple(map(int, piece.split())) for piece in places.split(";")]
    documents.pieces(len(pieces))
    return [Span(start, end, kind, mention if len(pieces) == 1 else None) for start, end in pieces]
