"""Every scheme gives the entities that were written in it."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as draw

from fedbt_app.errors import FedBTError
from fedbt_app.tasks.notes import Notes
from fedbt_app.tasks.tag_schemes import bio_names, normalised

KINDS = ("Drug", "Disease", "S-phase")
Span = tuple[int, int, str]  # first word, word after the last, type


def found(rows: list[Any], names: tuple[str, ...] = ()) -> tuple[Any, str]:
    notes = Notes()
    made = normalised(rows, names, "ner_tags", notes)
    return made, "; ".join(notes)


def bio(length: int, spans: list[Span]) -> list[str]:
    tags = ["O"] * length
    for start, end, kind in spans:
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return tags


def iob1(length: int, spans: list[Span]) -> list[str]:
    tags = ["O"] * length
    for start, end, kind in spans:
        touches = any(other[1:] == (start, kind) for other in spans)
        tags[start:end] = [f"{'B' if touches else 'I'}-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return tags


def ended(begin: str, inside: str, end: str, single: str) -> Callable[..., list[str]]:
    def write(length: int, spans: list[Span]) -> list[str]:
        tags = ["O"] * length
        for start, stop, kind in spans:
            middle = [f"{inside}-{kind}"] * (stop - start - 2)
            several = [f"{begin}-{kind}", *middle, f"{end}-{kind}"]
            tags[start:stop] = several if stop - start > 1 else [f"{single}-{kind}"]
        return tags

    return write


def types(length: int, spans: list[Span]) -> list[str]:
    tags = ["O"] * length
    for start, end, kind in spans:
        tags[start:end] = [kind] * (end - start)
    return tags


WRITERS = {
    "BIO": bio,
    "IOB1": iob1,
    "IOBES": ended("B", "I", "E", "S"),
    "BILOU": ended("B", "I", "L", "U"),
    "BMES": ended("B", "M", "E", "S"),
    "BMEWO": ended("B", "M", "E", "W"),
}


@draw.composite
def sentences(make: Any, gap: int, kinds: tuple[str, ...] = KINDS) -> list[tuple[int, list[Span]]]:
    """Draw sentences: their lengths and entities, at least `gap` words apart."""
    made = []
    for _ in range(make(draw.integers(1, 4))):
        spans, at = [], make(draw.integers(0, 2))
        for _ in range(make(draw.integers(0, 5))):
            end = at + make(draw.integers(1, 4))
            spans.append((at, end, make(draw.sampled_from(kinds))))
            at = end + gap + make(draw.integers(0, 2))
        made.append((at + 2, spans))
    return made


@given(sentences(gap=0))
def test_every_scheme_with_marks_is_read_as_it_was_written(drawn: Any) -> None:
    wanted = [bio(length, spans) for length, spans in drawn]
    for name, write in WRITERS.items():
        made, _ = found([write(length, spans) for length, spans in drawn])
        assert made == wanted, name


@given(sentences(gap=1, kinds=("Drug", "Disease", "late-phase")))
def test_types_alone_are_read_as_they_were_written_where_no_two_entities_touch(drawn: Any) -> None:
    made, _ = found([types(length, spans) for length, spans in drawn])
    assert made == [bio(length, spans) for length, spans in drawn]


@given(sentences(gap=0))
def test_numbers_are_read_by_their_names(drawn: Any) -> None:
    for name, write in WRITERS.items():
        rows = [write(length, spans) for length, spans in drawn]
        names = tuple(sorted({tag for tags in rows for tag in tags}))
        numbers = [[names.index(tag) for tag in tags] for tags in rows]
        made, note = found(numbers, names)
        assert made == [bio(length, spans) for length, spans in drawn], name
        assert note.startswith("tags: numbers, named by labels, ")
        assert found([[str(tag) for tag in tags] for tags in numbers], names)[0] == made


def test_the_scheme_is_told() -> None:
    for tags, wanted, note in (
        (["O", "B-X", "I-X"], ["O", "B-X", "I-X"], "tags: BIO"),
        (["I-X", "B-X", "I-Y"], ["B-X", "B-X", "B-Y"], "tags: IOB1, read as BIO"),
        (
            ["B-X", "O", "I-X"],
            ["B-X", "O", "B-X"],
            "tags: BIO with 1 entities that begin with I-, read as BIO",
        ),
        (["S-X", "B-X", "E-X"], ["B-X", "B-X", "I-X"], "tags: IOBES, read as BIO"),
        (["U-X", "B-X", "L-X"], ["B-X", "B-X", "I-X"], "tags: BILOU, read as BIO"),
        (["B-X", "M-X", "E-X"], ["B-X", "I-X", "I-X"], "tags: BMES, read as BIO"),
        (["O", "X", "X", "Y"], ["O", "B-X", "I-X", "B-Y"], "tags: types alone, read as BIO"),
        (
            ["O", "B", "I"],
            ["O", "B-Entity", "I-Entity"],
            "tags: BIO without types, read as BIO",
        ),
        (["O", "O"], ["O", "O"], "tags: BIO"),
        (["O", "S-phase"], ["O", "B-phase"], "tags: IOBES, read as BIO"),
        (["O", "S-phase", "X"], ["O", "B-S-phase", "B-X"], "tags: types alone, read as BIO"),
    ):
        assert found([tags]) == ([wanted], note)


def test_the_scheme_is_that_of_all_rows() -> None:
    rows = [["O", "B-X"], ["S-X", "O"], ["B-X", "E-X"]]
    made, note = found(rows)
    assert made == [["O", "B-X"], ["B-X", "O"], ["B-X", "I-X"]]
    assert note == "tags: IOBES, read as BIO"


def test_what_is_no_scheme_is_left_for_the_check_to_refuse() -> None:
    for tags in (
        ["O", "B-X", "X"],  # a mark on one, none on another
        ["E-X", "L-X"],  # marks of two schemes
        ["NN", "VB"],  # no O: a class of each word
        ["O", "a sentence of more than forty characters, not a type"],
        ["O", "1st"],
        ["O", None],
        ["O", 1],
        ["O", *(f"T{number}" for number in range(101))],
    ):
        assert found([tags]) == ([tags], "")
    assert found(["text", None, ["S-X"]])[0] == ["text", None, ["B-X"]]


def test_numbers_without_a_name_are_refused() -> None:
    with pytest.raises(FedBTError, match=r"are numbers: name them .* labels=O,B-Drug"):
        found([[0, 1]])
    for tag in (3, -1, -100):
        with pytest.raises(FedBTError, match="row 2: tag 2 of column 'ner_tags' is a number that"):
            found([[0, 1], [0, tag]], ("O", "B-X", "I-X"))


def test_given_names_become_bio_too() -> None:
    for names, wanted in (
        (("O", "B-X", "I-X"), ("O", "B-X", "I-X")),
        (("O", "B-X", "I-X", "E-X", "S-X"), ("O", "B-X", "I-X")),
        (("O", "X", "Y"), ("O", "B-X", "I-X", "B-Y", "I-Y")),
        ((), ()),
        (("O", "B-X", "X"), ("O", "B-X", "X")),
    ):
        assert bio_names(names) == wanted
