"""Write medical_terms.csv again: definitions of medical terms from WordNet 3.0, each with its kind.

WordNet's nouns are one text file, `data.noun` (Debian and Ubuntu: `apt-get install wordnet-base`):

    python examples/make_terms.py /usr/share/wordnet/data.noun
"""

import csv
import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).resolve().parent / "medical_terms.csv"
ROWS_OF_A_KIND = 70
SHORTEST = 25  # characters: less is hardly a definition
KINDS = {  # label -> the nouns whose more special nouns bear it, by their number in the file
    "anatomy": (
        "05297523",
        "05269901",
        "05417975",
        "05289297",
        "05474346",
    ),  # organ, bone, vessel, muscle, nerve
    "disease": ("14070360",),
    "medicine": ("03740161",),
    "microorganism": ("01326291",),
    "procedure": ("01024392", "00671351", "00661091"),  # medical procedure, operation, therapy
}


class Noun(NamedTuple):
    """One meaning of a noun: the numbers of what it is a kind of, and its definition."""

    number: str
    parents: tuple[str, ...]
    definition: str


def read(line: str) -> Noun:
    """Read one line: number, file, type, words, pointers, then the definition with examples of use in quotes."""
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    words = int(fields[3], 16)
    pointers = fields[4 + 2 * words + 1 :]
    parents = tuple(
        to for sign, to in zip(pointers[::4], pointers[1::4], strict=False) if sign == "@"
    )
    return Noun(fields[0], parents, re.split(r';\s*"', gloss)[0].strip())


def below(roots: Iterable[str], nouns: Iterable[Noun]) -> set[str]:
    """Return the numbers of the nouns that are a kind of one of the roots, directly or not, roots left out."""
    children: dict[str, list[str]] = {}
    for noun in nouns:
        for parent in noun.parents:
            children.setdefault(parent, []).append(noun.number)
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        for number in children.get(waiting.pop(), []):
            if number not in found:
                found.add(number)
                waiting.append(number)
    return found - set(roots)


def chosen(nouns: list[Noun]) -> list[tuple[str, str]]:
    """Return definition and label of so many nouns of each kind, none under two kinds, in a stable random order."""
    members = {label: below(roots, nouns) for label, roots in KINDS.items()}
    shuffled = sorted(nouns, key=lambda noun: hashlib.sha256(noun.number.encode()).digest())
    rows: dict[str, str] = {}
    left = dict.fromkeys(KINDS, ROWS_OF_A_KIND)
    for noun in shuffled:
        labels = [label for label, numbers in members.items() if noun.number in numbers]
        usable = (
            len(labels) == 1 and len(noun.definition) >= SHORTEST and noun.definition not in rows
        )
        if usable and left[labels[0]]:
            rows[noun.definition] = labels[0]
            left[labels[0]] -= 1
    return list(rows.items())


def main() -> None:
    """Write the file beside this script."""
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    nouns = [read(line) for line in lines if not line.startswith("  ")]  # the licence is indented
    with TARGET.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(chosen(nouns))


if __name__ == "__main__":
    main()
