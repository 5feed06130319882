"""Tag schemes of named entities, recognised over all rows of a split and turned into BIO.

| scheme | tags of `a` and of the adjacent `b c`, both of type X |
|---|---|
| BIO | B-X, B-X I-X |
| IOB1 | I-X, B-X I-X (B- only right after an entity of the same type) |
| IOBES | S-X, B-X E-X |
| BILOU | U-X, B-X L-X |
| BMES, BMEWO | S-X (or W-X), B-X E-X, with M- in the middle |
| types alone | X, X X |
| numbers | the place of a tag among given names, which follow one of the above |

One rule reads all schemes with marks, so that a wrong guess of their name cannot change an entity:
B, S, U and W begin one; any other mark goes on with the entity before it if that is of the same
type and not ended by E, L, S, U or W, and begins one otherwise. Marks without a type (B, I, O) stand
for one type, `Entity`.

Tags have marks if each but O has one, and the marks are of one scheme: types alone that all begin
like one (`S-phase`, and no other type) are taken for marks, and the note says so. They are types alone if none
has B- or I- before it and O occurs: without O, they would be a class of each word. Adjacent entities
of one type cannot be told apart there. All else is not recognised and stays as it is.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from fedbt_app.errors import FedBTError
from fedbt_app.tasks.notes import Notes

OUTSIDE = "O"
ONLY_TYPE = "Entity"  # where the tags have marks but no type
MOST_TYPES = 100  # more types alone are words in the wrong column
SCHEMES = {"BIO": "BI", "IOBES": "BIES", "BILOU": "BILU", "BMES": "BMES", "BMEWO": "BMEW"}
_BEGINS, _ENDS = frozenset("BSUW"), frozenset("ESLUW")
_MARKED = re.compile(r"([BIESLUMW])-(.+)")
_TYPE = re.compile(r"[^\W\d][\w .&/+-]{0,39}")

Parts = dict[str, tuple[str, str]]  # tag -> mark and type


def normalised(
    rows: Sequence[Any], names: Sequence[str], column: str, notes: Notes
) -> Sequence[Any]:
    """Return each row's tags as BIO, and note the scheme; as they are where none is recognised.

    Parameters
    ----------
    rows
        a list of tags each; what is no list stays as it is
    names
        of tags that are numbers, in order
    column
        what the column is called in messages

    Raises
    ------
    FedBTError
        If the tags are numbers without a name.
    """
    numbered = _are_numbers(rows)
    if numbered:
        rows = _named(rows, names, column)
    distinct = set(_tags(rows))
    if not all(isinstance(tag, str) for tag in distinct):
        return rows
    scheme, parts = _recognised(distinct)
    if not parts:
        return rows
    made = [_as_bio(tags, parts) if isinstance(tags, list) else tags for tags in rows]
    if scheme == "BIO":
        scheme = _name_of_bio(rows, parts)
    origin = "numbers, named by labels, " if numbered else ""
    notes.add(f"tags: {origin}{scheme}" + ("" if scheme == "BIO" else ", read as BIO"))
    return made


def bio_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return given label names as BIO tags, in their order; as they are where none is
    recognised.
    """
    scheme, parts = _recognised(set(names))
    if not parts:
        return tuple(names)
    made: list[str] = []
    for name in names:
        mark, kind = parts[name]
        if mark == OUTSIDE:
            made.append(OUTSIDE)
        elif scheme == "types alone":
            made += [f"B-{kind}", f"I-{kind}"]
        else:
            made.append(f"B-{kind}" if mark in _BEGINS else f"I-{kind}")
    return tuple(dict.fromkeys(made))


def _tags(rows: Iterable[Any]) -> Iterable[Any]:
    return (tag for tags in rows if isinstance(tags, list) for tag in tags)


# Numbers ------------------------------------------------------------------------------------------


def _are_numbers(rows: Sequence[Any]) -> bool:
    kinds = {_number(tag) is not None for tag in _tags(rows)}
    return kinds == {True}


def _number(tag: Any) -> int | None:
    if isinstance(tag, str) and re.fullmatch(r"-?[0-9]{1,9}", tag):
        return int(tag)
    if isinstance(tag, float) and tag.is_integer():
        return int(tag)
    return tag if isinstance(tag, int) and not isinstance(tag, bool) else None


def _named(rows: Sequence[Any], names: Sequence[str], column: str) -> list[Any]:
    if not names:
        raise FedBTError(
            f"tags in column {column!r} are numbers: name them in their order, from 0, with "
            "labels, e.g. labels=O,B-Drug,I-Drug"
        )
    made: list[Any] = []
    for number, tags in enumerate(rows, start=1):
        if not isinstance(tags, list):
            made.append(tags)
            continue
        values = [_number(tag) for tag in tags]
        for place, value in enumerate(values, start=1):
            if value is None or not 0 <= value < len(names):
                raise FedBTError(
                    f"row {number}: tag {place} of column {column!r} is a number that none of the "
                    f"{len(names)} names in labels stands for: they count from 0"
                )
        made.append([names[value] for value in values if value is not None])
    return made


# Recognition --------------------------------------------------------------------------------------


def _recognised(tags: set[str]) -> tuple[str, Parts]:
    """Return the scheme's name and the parts of each tag; no parts where none fits."""
    others = tags - {OUTSIDE}
    found = {tag: _MARKED.fullmatch(tag) for tag in others}
    outside = {OUTSIDE: (OUTSIDE, "")}
    if all(found.values()):
        parts = {tag: (match[1], match[2]) for tag, match in found.items() if match}
        return _scheme_of_marks(parts), outside | parts if _scheme_of_marks(parts) else {}
    alone = {tag: (tag, ONLY_TYPE) for tag in others}
    if scheme := _scheme_of_marks(alone):
        return f"{scheme} without types", outside | alone
    marked = any(match and match[1] in "BI" for match in found.values())
    types = all(_TYPE.fullmatch(tag) for tag in others)
    if marked or not types or OUTSIDE not in tags or len(others) > MOST_TYPES:
        return "", {}
    return "types alone", outside | {tag: ("I", tag) for tag in others}


def _scheme_of_marks(parts: Parts) -> str:
    marks = {mark for mark, _ in parts.values()}
    return next((name for name, known in SCHEMES.items() if marks <= set(known)), "")


def _name_of_bio(rows: Sequence[Any], parts: Parts) -> str:
    """Tell BIO from IOB1, and from BIO with slips, by how entities begin."""
    begun_by_i = begun_by_b = 0
    for tags in rows:
        before = ""
        for tag in tags if isinstance(tags, list) else ():
            mark, kind = parts[tag]
            begun_by_i += mark == "I" and kind != before
            begun_by_b += mark == "B" and kind != before
            before = kind
    if not begun_by_i:
        return "BIO"
    if not begun_by_b:
        return "IOB1"
    return f"BIO with {begun_by_i} entities that begin with I-"


def _as_bio(tags: Sequence[str], parts: Parts) -> list[str]:
    made = []
    before = ""  # the type of an entity that may go on
    for tag in tags:
        mark, kind = parts[tag]
        if mark == OUTSIDE:
            made.append(OUTSIDE)
            before = ""
            continue
        begins = mark in _BEGINS or kind != before
        made.append(f"B-{kind}" if begins else f"I-{kind}")
        before = "" if mark in _ENDS else kind
    return made
