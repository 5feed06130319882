"""Plain text: a row a line, or a row a file of a folder."""

from collections.abc import Iterator
from pathlib import Path

from fedbt_app.data.readers.opened import bare, shown_encoding, text
from fedbt_app.data.readers.table import Row, Table, Wanted, table_of
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.notes import Notes


def read_lines(path: Path, wanted: Wanted) -> Table:
    """Read each line that is not blank as a row with the column `text`."""
    notes = Notes()
    with text(path) as stream:
        table = table_of(({"text": line.strip()} for line in stream if line.strip()), wanted, notes)
    notes.add(f"{path.name}: lines of text, {shown_encoding(path)}, {table.rows} rows")
    return table


def notes_in(folder: Path) -> list[Path]:
    """Return the .txt files of a folder and of those inside it, by name."""
    return sorted(file for file in folder.rglob("*") if bare(file).endswith(".txt"))


def read_folder(path: Path, wanted: Wanted) -> Table:
    """Read each .txt file of a folder as a row with the column `text`."""
    notes = Notes()
    files = notes_in(path)
    table = table_of(_texts(files), wanted, notes)
    notes.add(f"{path.name}: folder of texts, {table.rows} files, a row each")
    return table


def _texts(files: list[Path]) -> Iterator[Row]:
    for number, file in enumerate(files, start=1):
        yield {"text": note_text(file, number)}


def note_text(file: Path, number: int, newline: str | None = None) -> str:
    """Return what stands in a note. Errors give its number: a note's name may be a patient's."""
    try:
        with text(file, newline) as stream:
            return stream.read()
    except (FedBTError, OSError, ValueError, EOFError) as error:
        why = str(error) if isinstance(error, FedBTError) else f"({type(error).__name__})"
        raise FedBTError(
            f"text {number}, in the order of the file names, cannot be read: {why}"
        ) from None
