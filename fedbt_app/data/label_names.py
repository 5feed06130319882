"""Label names leave a site: this refuses those that look like text, persons or records.

A list of the names that may leave (`labels-allowed`, or the run's `labels`) is the strict test, and
data.sources makes it. Without one, each rule of RULES has a look at all names of the training rows.
A rule says what it found by counts; no name is quoted, since refusals travel to the server.

No rule can know a name that looks like a class: `miller` is one word like `kidney`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedbt_app.config import LONGEST_LABEL, MOST_LABELS
from fedbt_app.errors import FedBTError

Rule = Callable[["Labels"], str]

FEW = 2  # names that may stand once each: two classes are the least that there can be
ROWS_OF_A_NAME = (
    2  # on average, at least: of ICD codes, half stand once, but few of them in most rows
)
TAIL = 30  # more names than that, most of them several words and seen once: free text
MOST_WORDS = 12  # of a name; titles of ICD-10 chapters have up to 11
SENTENCE_WORDS = 6  # that end like a sentence; `Consult - History and Phy.` has 4
RECORD_DIGITS = 6  # in a row: a record number or a date; ICD-9, CPT and zip codes have 5
PHONE_DIGITS = 9  # with blanks and the like between; two years (1990-1999) have 8

_DATE = re.compile(
    r"(?<![\w./-])("
    r"(1[89]|20)\d\d([./-])(0?[1-9]|1[0-2])\3(0?[1-9]|[12]\d|3[01])(?![\d./-])"
    r"|(0?[1-9]|[12]\d|3[01])([./-])(0?[1-9]|[12]\d|3[01])\7((1[89]|20)?\d\d)(?![\d./-])"
    r"|(0?[1-9]|[12]\d|3[01])(\.|st|nd|rd|th)?[ -][^\W\d_]{3,9}\.?,?[ -](1[89]|20)\d\d\b"
    r"|[^\W\d_]{3,9}\.? (0?[1-9]|[12]\d|3[01])(st|nd|rd|th)?,? (1[89]|20)\d\d\b"
    r")"
)
_RECORD = re.compile(rf"\d{{{RECORD_DIGITS},}}")
_PHONE = re.compile(r"\+?\d(?:[ ()/.-]{0,2}\d)+")
_ADDRESS = re.compile(r"\S@\S+\.\S|://|\bwww\.", re.IGNORECASE)
_TITLE = re.compile(
    r"\b(Mr|Mrs|Ms|Miss|Dr|Prof|Herr|Frau|Mme|Sr|Sra|Sig|Dhr|Mevr)\b\.? +[^\W\d_a-z]"
)
_WORD = re.compile(r"[^\W_]+")
# `Anna Miller`, `ANNA MILLER`, `J. Miller`, `Anna Maria van Miller2`, `O'Neil, Mary-Jane`
_CAPITALISED = r"[^\W\d_a-zß-öø-ÿ](?:[^\W_]|['’-](?=\w))+"
_INITIAL = r"[^\W\d_a-zß-öø-ÿ]\."
_PERSON = re.compile(
    r"(?!.*\b[IVX]+$)"  # Stage II
    rf"(?:{_CAPITALISED}|{_INITIAL})"
    rf"(?:,? (?:{_CAPITALISED}|{_INITIAL}|van|von|de|der|den|di|da|la|le|el|al|bin)){{0,3}}"
    rf",? (?:{_CAPITALISED}|{_INITIAL})"
)


@dataclass(frozen=True)
class Labels:
    """The names in a column of labels, and how often each stands there."""

    counts: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        """Each name, once."""
        return list(self.counts)

    @property
    def places(self) -> int:
        """How many rows (ner: tagged words) have a label."""
        return sum(self.counts.values())

    def found(self, pattern: re.Pattern[str]) -> int:
        """Count the names that have the pattern in them."""
        return sum(bool(pattern.search(name)) for name in self.counts)


def refuse_text(counts: Mapping[str, int], setting: str) -> None:
    """Raise FedBTError, which quotes no name, where a rule finds something.

    Parameters
    ----------
    counts : how often each name stands in the training rows
    setting : the one that names the column, as in `label-column=note`
    """
    if found := findings(counts):
        raise FedBTError(
            f"{setting}: {'; '.join(found)}: that looks like text or persons, which must not leave the site; "
            "name the column of the labels, or, if these are the labels, list them in labels-allowed"
        )


def findings(counts: Mapping[str, int]) -> list[str]:
    """Return what each rule found, without a name."""
    labels = Labels(counts)
    return [said for rule in RULES if (said := rule(labels))]


# Rules --------------------------------------------------------------------------------------------


def too_many(labels: Labels) -> str:
    """More names than any label set has."""
    count = len(labels.names)
    return f"{count} different values, more than {MOST_LABELS}" if count > MOST_LABELS else ""


def too_long(labels: Labels) -> str:
    """A name that is as long as a sentence."""
    longest = max(map(len, labels.names), default=0)
    return f"a value of {longest} characters" if longest > LONGEST_LABEL else ""


def rarely_repeated(labels: Labels) -> str:
    """Hardly two rows of a name: text, persons or records, as a class is for many rows."""
    count, places = len(labels.names), labels.places
    if count <= FEW or places >= ROWS_OF_A_NAME * count:
        return ""
    return f"{count} different values in {places} places, fewer than {ROWS_OF_A_NAME} of each"


def rare_phrases(labels: Labels) -> str:
    """Many names of several words that stand once, beside a few frequent ones: free text."""
    phrases = [
        name for name, count in labels.counts.items() if count == 1 and len(_words(name)) > 1
    ]
    if len(labels.names) <= TAIL or 2 * len(phrases) <= len(labels.names):
        return ""
    return f"{len(phrases)} of {len(labels.names)} different values are phrases that stand once"


def sentences(labels: Labels) -> str:
    """A name that reads like a sentence."""
    return _said(sum(map(_is_sentence, labels.names)), "like a sentence")


def dates(labels: Labels) -> str:
    """A name with a date."""
    return _said(labels.found(_DATE), "with a date")


def records(labels: Labels) -> str:
    """A name with so many digits as the number of a record, or of a phone."""
    long = sum(_has_record(name) for name in labels.names)
    return _said(long, "with a number as long as that of a record or a phone")


def addresses(labels: Labels) -> str:
    """A name with an address of mail or of the web."""
    return _said(labels.found(_ADDRESS), "with an address")


def titles(labels: Labels) -> str:
    """A name with the title of a person: one is enough."""
    return _said(labels.found(_TITLE), "with the title of a person")


def persons(labels: Labels) -> str:
    """Most names written like those of persons: two or more capitalised words and no others."""
    alike = sum(bool(_PERSON.fullmatch(name)) for name in labels.names)
    if 2 * alike <= len(labels.names):
        return ""
    return f"{alike} of {len(labels.names)} different values are written like names of persons"


RULES: tuple[Rule, ...] = (
    too_many,
    too_long,
    rarely_repeated,
    rare_phrases,
    sentences,
    dates,
    records,
    addresses,
    titles,
    persons,
)


def _said(count: int, what: str) -> str:
    if not count:
        return ""
    return f"{count} different {'value' if count == 1 else 'values'} {what}"


def _words(name: str) -> list[str]:
    return _WORD.findall(name)


def _is_sentence(name: str) -> bool:
    words = len(_words(name))
    return words > MOST_WORDS or (words >= SENTENCE_WORDS and name.endswith((".", "!", "?")))


def _has_record(name: str) -> bool:
    spaced: Iterable[str] = (found.group() for found in _PHONE.finditer(name))
    return bool(_RECORD.search(name)) or any(
        sum(character.isdigit() for character in run) >= PHONE_DIGITS for run in spaced
    )
