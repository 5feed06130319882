"""From entities given as character spans to words with BIO tags.

The words of a text are its runs of letters and digits; each other character that is no blank is a
word of its own, and so is each character of a script without blanks (Chinese, Japanese). A span that
cuts a word is extended to all of it. Of spans that share a word the longest stays, of equal ones the
first: BIO has one tag a word. Of a span in several pieces each piece is an entity. What was changed
in such a way is counted.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedbt_app.tasks.tag_schemes import OUTSIDE

_OWN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han characters
_MARKS = "\u0300-\u036f"  # accents that stand for themselves
_WORD = re.compile(rf"[{_OWN}]|(?:[^\W{_OWN}][{_MARKS}]*)+|[^\w\s]")


@dataclass(frozen=True)
class Span:
    """An entity: the characters from `start` up to `end`, and its text where the file gives it."""

    start: int
    end: int
    kind: str
    mention: str | None = None


@dataclass
class Changes:
    """What became of spans."""

    spans: int = 0
    extended: int = 0
    overlapping: int = 0
    empty: int = 0

    def told(self) -> str:
        """Return a phrase for a note."""
        parts = [f"{self.spans} spans"]
        if self.extended:
            parts.append(f"{self.extended} that cut a word extended to all of it")
        if self.overlapping:
            parts.append(f"{self.overlapping} left out that overlap a longer one")
        if self.empty:
            parts.append(f"{self.empty} left out that hold no word")
        return ", ".join(parts)


def tagged(text: str, spans: Sequence[Span], changes: Changes) -> tuple[list[str], list[str]]:
    """Return the words of a text and their BIO tags; `changes` counts what was changed."""
    places = [(match.start(), match.end()) for match in _WORD.finditer(text)]
    words = [text[start:end] for start, end in places]
    tags = [OUTSIDE] * len(words)
    changes.spans += len(spans)
    for span in sorted(spans, key=lambda span: (span.start - span.end, span.start)):
        touched = _touched(places, span)
        if not touched:
            changes.empty += 1
            continue
        if any(tags[word] != OUTSIDE for word in touched):
            changes.overlapping += 1
            continue
        cuts_first = places[touched[0]][0] < span.start
        cuts_last = places[touched[-1]][1] > span.end
        changes.extended += cuts_first or cuts_last
        for word in touched:
            tags[word] = f"I-{span.kind}"
        tags[touched[0]] = f"B-{span.kind}"
    return words, tags


def _touched(places: Sequence[tuple[int, int]], span: Span) -> range:
    """Return the numbers of the words that a span shares a character with."""
    first = bisect_right(places, span.start, key=lambda place: place[1])
    last = bisect_left(places, span.end, key=lambda place: place[0])
    return range(first, max(first, last))


def placed(text: str, spans: Sequence[Span]) -> list[Span] | None:
    """Return spans whose mentions stand where they say, None where they do not.

    Offsets count characters, or UTF-16 units as tools in a browser do.
    """
    if all(_fits(text, span) for span in spans):
        return list(spans)
    if text.isascii() or max(text, default="") < "\U00010000":
        return None
    at = _characters_at_units(text)
    if any(not 0 <= span.start <= span.end < len(at) for span in spans):
        return None
    moved = [Span(at[span.start], at[span.end], span.kind, span.mention) for span in spans]
    return moved if all(_fits(text, span) for span in moved) else None


def _fits(text: str, span: Span) -> bool:
    if not 0 <= span.start <= span.end <= len(text):
        return False
    if span.mention is None:
        return True
    return _letters(span.mention) == _letters(text[span.start : span.end])


def _letters(text: str) -> str:
    return "".join(text.split())  # tools write line ends and runs of blanks as they like


def _characters_at_units(text: str) -> list[int]:
    """Return, for each UTF-16 unit, the number of its character."""
    at = [place for place, character in enumerate(text) for _ in _units(character)]
    return [*at, len(text)]


def _units(character: str) -> Iterable[int]:
    return range(2 if character >= "\U00010000" else 1)
