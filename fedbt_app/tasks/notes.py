"""What was found while data was read, told to the people of the site."""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Notes:
    """Short sentences: file names, kinds and counts; never what stands in a cell.

    Attributes
    ----------
    dropped : rows without text
    """

    lines: list[str] = field(default_factory=list)
    dropped: int = 0

    def add(self, line: str) -> None:
        """Add a sentence, once."""
        if line not in self.lines:
            self.lines.append(line)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)


def note_renamed(notes: Notes, count: int) -> None:
    """Tell how many labels `label-map` made others: a wrong name in it would change none."""
    if count:
        notes.add(f"label-map: {count} labels are written otherwise")
