"""Label names as people and their software write them, made alike before anything leaves a site."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d+([.,]\d+)?|[.,]\d+)(e[+-]?\d+)?", re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?\d+(\.0+)?")
_BLANK = re.compile(r"\s")  # line ends and no-break spaces, too
_INVISIBLE = re.compile("[\u200b\ufeff\u00ad]")  # zero-width space, byte order mark, soft hyphen
_LIST = re.compile(r"\[.*\]|\{.*\}", re.DOTALL)  # as it is written into a CSV


def clean(value: Any) -> str:
    """Return a cell as a name: Unicode composed (NFC), every blank a space and none around it;
    empty for none.
    """
    if value is None or value != value:  # NaN is how parquet may say none
        return ""
    name = _INVISIBLE.sub("", unicodedata.normalize("NFC", str(value)))
    return _BLANK.sub(" ", name).strip()


def names_of(cells: Sequence[Any], known: Collection[str] = ()) -> list[str]:
    """Return a column of labels by name: 1, 1.0 and "1.0" are one label, written `1`.

    A column with fractions stays as it is: it holds scores, or codes in which the end counts. So do
    `known` names.
    """
    names = [clean(cell) for cell in cells]
    distinct = set(names)
    others = distinct.difference(known)
    made = {name: name for name in distinct}
    if not any(map(_is_fraction, others)):
        made |= {name: _without_point(name) for name in others if _WHOLE.fullmatch(name)}
    return [made[name] for name in names]


def lists_in(cells: Iterable[Any]) -> int:
    """Count the cells that are a list or an object, or one written as text."""
    return sum(_is_list(cell) for cell in cells)


def fractions_in(names: Iterable[str]) -> int:
    """Count the fractions in a column that is mostly numbers; none in any other."""
    filled = [name for name in names if name]
    numbers = [name for name in filled if _NUMBER.fullmatch(name)]
    if 2 * len(numbers) <= len(filled):
        return 0
    return sum(map(_is_fraction, numbers))


def _is_list(cell: Any) -> bool:
    if isinstance(cell, str):
        return bool(_LIST.fullmatch(cell.strip()))
    return isinstance(cell, list | tuple | dict)


def _is_fraction(name: str) -> bool:
    return bool(_NUMBER.fullmatch(name)) and not _WHOLE.fullmatch(name)


def _without_point(number: str) -> str:
    whole, _, _ = number.partition(".")
    return "0" if whole == "-0" else whole
