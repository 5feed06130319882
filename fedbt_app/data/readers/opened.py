"""Files as bytes and as text: compression by ending, encoding by trying.

Encodings are tried, not guessed: a byte order mark, else UTF-8, else cp1252 as a Western Excel writes
it. Statistical guessing takes short cp1252 files for cp775, cp1250 or others and so changes letters
without a word. What would be changed by cp1252 too is refused: text of another script, and UTF-8
with some bad bytes.
"""

import bz2
import codecs
import gzip
import io
import lzma
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TextIO

from fedbt_app.errors import FedBTError

PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
CHUNK = 1 << 20
FOREIGN = 0.3  # of the letters may be beyond ASCII; Western languages have up to a tenth
CURE = "save it as UTF-8"
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def bare(path: Path) -> str:
    """Return the name in lower case without the ending of the compression."""
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return name


def binary(path: Path) -> IO[bytes]:
    """Open a file for reading its bytes, unpacked."""
    for ending, unpacked in PACKED.items():
        if path.name.lower().endswith(ending):
            stream: IO[bytes] = unpacked(path)
            return stream
    return path.open("rb")


@contextmanager
def text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file for reading its text; `newline` as for `open`."""
    encoding = encoding_of(path)
    with binary(path) as stream, io.TextIOWrapper(stream, encoding, newline=newline) as lines:
        yield lines


def shown_encoding(path: Path) -> str:
    """Return the encoding for a note."""
    name = encoding_of(path)
    return "cp1252" if name == "cp1252" else name.removesuffix("-sig").upper()


def encoding_of(path: Path) -> str:
    """Return the codec that reads a file; FedBTError where none does."""
    state = path.stat()
    return _encoding_of(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=16)  # a reader asks several times, and each time is a pass over the file
def _encoding_of(path: Path, size: int, changed: int) -> str:
    with binary(path) as stream:
        start = stream.read(4096)
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name
    if b"\0" in start:
        return _unmarked_utf16(start)
    try:
        for _ in _decoded(path, "strict"):
            pass
    except UnicodeDecodeError:
        _check_western(path)
        return "cp1252"
    return "utf-8-sig"


def _decoded(path: Path, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    with binary(path) as stream:
        while chunk := stream.read(CHUNK):
            yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _unmarked_utf16(start: bytes) -> str:
    """Tell the two byte orders by where the zeros of the ASCII characters are."""
    even, odd = start[::2].count(0), start[1::2].count(0)
    if odd > len(start) // 8 and not even:
        return "utf-16-le"
    if even > len(start) // 8 and not odd:
        return "utf-16-be"
    raise FedBTError(f"it is no text: {CURE}, or give it the ending of its kind")


@dataclass
class _Seen:
    """What stands beyond ASCII in a file that is not UTF-8."""

    line: int = 1
    first_bad: int = 0
    bad: int = 0
    good: int = 0

    def add(self, piece: str) -> None:
        if piece.isascii():
            self.line += piece.count("\n")
            return
        for character in piece:
            self.line += character == "\n"
            if "\udc80" <= character <= "\udcff":
                self.bad += 1
                self.first_bad = self.first_bad or self.line
            # two bytes beyond Latin letters are easily cp1252 by accident: a sharp s and a quote
            elif "\x80" <= character < "\u0180" or character >= "\u0800":
                self.good += 1


def _check_western(path: Path) -> None:
    """Refuse what is not UTF-8 and would not be itself in cp1252."""
    seen = _Seen()
    for piece in _decoded(path, "surrogateescape"):
        seen.add(piece)
    if seen.good * 10 > seen.bad:
        raise FedBTError(f"line {seen.first_bad} is not UTF-8, other lines are: {CURE}")
    letters = high = amiss = 0
    before = " "
    with binary(path) as stream, io.TextIOWrapper(stream, "cp1252", errors="replace") as lines:
        while piece := lines.read(CHUNK):
            for character, after in zip(piece, piece[1:] + " ", strict=True):
                letters += character.isalpha()
                if character >= "\x80":
                    high += character.isalpha()
                    between = before.isalpha() and after.isalpha()
                    amiss += character == "\ufffd" or (between and _is_sign(character))
                before = character
    if high > FOREIGN * letters or amiss * 10 > seen.bad:
        raise FedBTError(f"line {seen.first_bad} is neither UTF-8 nor cp1252 (Western): {CURE}")


def _is_sign(character: str) -> bool:
    """Say whether a character does not stand inside a word: dashes and apostrophes do."""
    return unicodedata.category(character) in ("No", "So", "Sk", "Sc", "Sm", "Po")
