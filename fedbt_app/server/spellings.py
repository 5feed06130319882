"""Labels that sites write differently: each spelling would be a class of its own."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

SHOWN = 20  # labels in one warning
_BETWEEN = re.compile(r"(?<=\w)[\s_-]+(?=\w)")


def warnings(writers: Mapping[str, Iterable[str]]) -> list[str]:
    """Name the labels that differ only in case, blanks or hyphens, and propose a `label-map`.

    Parameters
    ----------
    writers
        the label names of each site, by its name
    """
    sites: dict[str, set[str]] = defaultdict(set)
    for site, names in writers.items():
        for name in names:
            sites[name].add(site)
    renames = _renames(sites)
    # sites with the same proposal share a warning
    proposals: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for site in writers:
        mine = tuple((old, new) for old, new in renames.items() if site in sites[old])
        if mine:
            proposals[mine].append(site)
    return [_warning(pairs, found) for pairs, found in proposals.items()]


def _renames(sites: Mapping[str, set[str]]) -> dict[str, str]:
    """Return old -> new: what most sites write; among equals, small letters, then few."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted(sites):
        alike[_folded(name)].append(name)
    renames: dict[str, str] = {}
    for names in alike.values():
        new = max(names, key=lambda name: (len(sites[name]), name == name.lower(), -len(name)))
        renames |= {name: new for name in names if name != new}
    return renames


def _folded(name: str) -> str:
    # not at the ends: -1 and 1 are two classes
    return _BETWEEN.sub(" ", unicodedata.normalize("NFKC", name).casefold())


def _warning(pairs: tuple[tuple[str, str], ...], sites: list[str]) -> str:
    shown = [f"{old!r} ({new!r})" for old, new in pairs[:SHOWN]]
    if len(pairs) > SHOWN:
        shown.append(f"{len(pairs) - SHOWN} more")
    where = ", ".join(sites)
    text = (
        f"labels of {where} differ from others only in case, blanks or hyphens: {', '.join(shown)}; "
        "each spelling is a label of its own"
    )
    # in a label-map these signs part its entries
    written = [pair for pair in pairs if not re.search("[;=]", "".join(pair))]
    if not written:
        return f"{text}, write them alike in the data"
    proposal = ";".join(f"{old}={new}" for old, new in written[:SHOWN])
    return f"{text}, to make them one set label-map={proposal!r} there, or for the run"
