"""What a data set holds, counted before anything is trained on it: nothing of a cell is kept.

Texts are compared by their hashes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from fedbt_app.config import RunConfig
from fedbt_app.data.readers import read
from fedbt_app.data.readers.table import Table, length
from fedbt_app.data.sources import checked, local_files, wanted_of
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Columns, in_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUARTERS = (0, 25, 50, 75, 100)
_IDENTIFIER_NAME = re.compile(
    r"id|mrn|ssn|nhs|dob|.*(_id|ident|patient|birth|name|address|phone|e-?mail|insur).*", re.I
)
_MOSTLY = 0.9  # so many values that differ make a column an identifier
_LONGEST_IDENTIFIER = 40  # characters


@dataclass(frozen=True)
class Split:
    """What is in one split.

    Attributes
    ----------
    rows : those with text, which are read
    dropped : those without text
    digests : one a different text
    columns : what is read of it
    notes : how its files were read
    """

    rows: int
    dropped: int
    digests: frozenset[bytes]
    columns: Columns
    notes: tuple[str, ...]

    @property
    def repeated(self) -> int:
        """Rows whose text stands in an earlier row, too."""
        return self.rows - len(self.digests)


def survey(config: RunConfig, table: Table, name: str) -> Split:
    """Check a split and count what is in it.

    Raises
    ------
    FedBTError
        Where the run would refuse it, with the run's own words.
    """
    columns = checked(config, table, name)
    rows = length(columns)
    return Split(
        rows=rows,
        dropped=table.rows - rows,
        digests=frozenset(map(_digest, _texts(config, columns))),
        columns=columns,
        notes=tuple(table.notes),
    )


def _texts(config: RunConfig, columns: Columns) -> list[Any]:
    """Return each row's text: a string, or a list of words."""
    return columns[getattr(config, TASKS[config.task].columns[0])]


def _digest(text: Any) -> bytes:
    """Hash a text so that it is the same with other blanks and as a list of its words."""
    words = text
    if isinstance(text, str):
        words = text.split()
    return blake2b(" ".join(words).encode(), digest_size=16).digest()


def shared_texts(splits: Mapping[str, Split]) -> dict[tuple[str, str], int]:
    """Count the different texts that two splits share, where there are any; train comes first."""
    names = sorted(splits, key=lambda name: name != "train")
    counts = {}
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            both = splits[first].digests & splits[second].digests
            if both:
                counts[first, second] = len(both)
    return counts


def length_quartiles(
    config: RunConfig, tokenizer: "PreTrainedTokenizerFast", split: Split
) -> list[int]:
    """Return the shortest text, the quartiles and the longest, in word pieces with [CLS] and
    [SEP].
    """
    lengths: list[int] = []
    for texts in in_batches(_texts(config, split.columns)):
        words = isinstance(texts[0], list)
        coded = tokenizer(texts, is_split_into_words=words, verbose=False)
        lengths += map(len, coded["input_ids"])
    found = np.percentile(lengths, QUARTERS, method="nearest")
    return [int(number) for number in found]


# Columns that nobody reads ------------------------------------------------------------------------


class _EveryName(frozenset[str]):
    """Holds the names that it has, and any other that it is asked for."""

    def __contains__(self, name: object) -> bool:
        return True


@dataclass(frozen=True)
class Unread:
    """How many columns there are, how many of them a run does not read, and how many columns look
    like identifiers by their names or values.
    """

    columns: int
    unread: int
    identifiers: int


def unread(config: RunConfig) -> Unread | None:
    """Count the columns of a local data set's training files; None without such files.

    Names of columns may be cells: they are not returned. What the task reads is no identifier.
    """
    files = local_files(config.dataset) or {}
    if "train" not in files:
        return None
    wanted = wanted_of(config)
    table = read(files["train"], replace(wanted, columns=_EveryName(wanted.columns)))
    used = {getattr(config, key) for key in TASKS[config.task].columns}
    identifiers = sum(
        _looks_like_identifiers(name, values)
        for name, values in table.columns.items()
        if name not in used
    )
    known = sum(name in set(wanted.columns) for name in table.columns)
    return Unread(table.width, max(0, table.width - known), identifiers)


def _looks_like_identifiers(name: str, values: Iterable[Any]) -> bool:
    if _IDENTIFIER_NAME.fullmatch(name.strip()):
        return True
    cells = [str(value) for value in values if value not in (None, "")]
    codes = sum(
        len(cell) <= _LONGEST_IDENTIFIER and not cell.count(" ") and any(map(str.isdigit, cell))
        for cell in cells
    )
    differing = len(set(cells))
    return len(cells) > 1 and min(codes, differing) >= _MOSTLY * len(cells)
