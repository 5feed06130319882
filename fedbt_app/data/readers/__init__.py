"""One reader a kind of file, and the table of them by ending."""

import lzma
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from fedbt_app.data.readers.arrow_files import is_saved, read_arrow, read_parquet, read_saved
from fedbt_app.data.readers.bioc import read_bioc
from fedbt_app.data.readers.brat import read_brat
from fedbt_app.data.readers.conll import read_conll
from fedbt_app.data.readers.csv_files import read_csv
from fedbt_app.data.readers.excel import read_excel
from fedbt_app.data.readers.json_files import read_json
from fedbt_app.data.readers.opened import bare, text
from fedbt_app.data.readers.pubtator import TEXT_LINE, read_pubtator
from fedbt_app.data.readers.table import Table, Wanted, joined
from fedbt_app.data.readers.text_files import notes_in, read_folder, read_lines
from fedbt_app.errors import FedBTError

Reader = Callable[[Path, Wanted], Table]
# what broken content makes the libraries raise; their texts may quote it
BROKEN = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    MemoryError,
    RecursionError,
    NotImplementedError,  # zipfile's word for a compression that it does not know
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)


def _read_text(path: Path, wanted: Wanted) -> Table:
    """Read lines of text; for tagged words, what such a file then holds."""
    if not wanted.words:
        return read_lines(path, wanted)
    with text(path) as stream:
        first = next((line for line in stream if line.strip()), "")
    read = read_pubtator if TEXT_LINE.fullmatch(first.rstrip("\r\n")) else read_conll
    return read(path, wanted)


def _read_tsv(path: Path, wanted: Wanted) -> Table:
    """Read a table; for tagged words, which no cell can hold, CoNLL."""
    return read_conll(path, wanted) if wanted.words else read_csv(path, wanted)


READERS: dict[str, Reader] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": _read_tsv,
    ".xlsx": read_excel,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".txt": _read_text,
    ".conll": read_conll,
    ".iob": read_conll,
    ".iob2": read_conll,
    ".bio": read_conll,
    ".pubtator": read_pubtator,
    ".xml": read_bioc,
}
ENDINGS = tuple(READERS)


def ending_of(path: Path) -> str:
    """Return what the name ends in, without the compression; FedBTError for no known kind."""
    for ending in ENDINGS:
        if bare(path).endswith(ending):
            return ending
    raise FedBTError(
        f"{path.name} is of no known kind: use {' '.join(ENDINGS)}, also .gz .bz2 .xz, or a folder"
    )


def is_readable_folder(path: Path) -> bool:
    """Say whether a folder is a split: a data set on disk, or texts."""
    return path.is_dir() and (is_saved(path) or bool(notes_in(path)))


def read(paths: Sequence[Path], wanted: Wanted) -> Table:
    """Read a split, of one file or folder or of several files."""
    return joined(_read_one(path, wanted) for path in paths)


def _read_one(path: Path, wanted: Wanted) -> Table:
    try:
        return _reader(path, wanted)(path, wanted)
    except FedBTError as error:
        raise FedBTError(f"{path.name}: {error}") from None
    except BROKEN as error:
        raise FedBTError(
            f"{path.name} cannot be read ({type(error).__name__}): mend or replace it"
        ) from None


def _reader(path: Path, wanted: Wanted) -> Reader:
    if not path.is_dir():
        return READERS[ending_of(path)]
    if is_saved(path):
        return read_saved
    return read_brat if wanted.words else read_folder
