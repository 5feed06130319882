"""Plain text: a row a line, or a row a file of a folder."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedbt_app.data.readers.opened import bare, shown_encoding, text
from fedbt_app.data.readers.table import Table, Wanted, table_of
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
    texts = Texts(path)
    table = table_of(({"text": texts.read(number)} for number in texts), wanted, notes)
    notes.add(f"{path.name}: folder of texts, {texts.encodings()}, {table.rows} files, a row each")
    return table


class Texts:
    """The .txt files of a folder, by number from 1: their names may be patients' and are not told."""

    def __init__(self, folder: Path) -> None:
        self.files = notes_in(folder)
        self._encodings: Counter[str] = Counter()

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self.files) + 1))

    def read(self, number: int, newline: str | None = None) -> str:
        """Return what stands in a file; `newline` as for `open`."""
        file = self.files[number - 1]
        try:
            with text(file, newline) as stream:
                content = stream.read()
            self._encodings[shown_encoding(file)] += 1
        except (FedBTError, OSError, ValueError, EOFError) as error:
            why = str(error) if isinstance(error, FedBTError) else f"({type(error).__name__})"
            raise FedBTError(
                f"text {number}, in the order of the file names, cannot be read: {why}"
            ) from None
        return content

    def encodings(self) -> str:
        """Return how many files had which encoding, for a note."""
        if len(self._encodings) == 1:
            return next(iter(self._encodings))
        return " and ".join(f"{count} {name}" for name, count in self._encodings.most_common())
