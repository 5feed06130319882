"""Every kind of file that docs/data.md names: its sample is read as the page says, or refused."""

import random
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedbt_app.config import APP_DIR
from fedbt_app.data.sources import checked, identity, readers
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Columns

SAMPLES = Path(__file__).parent / "samples"
PAGE = APP_DIR / "docs" / "data.md"
TEXTS = [
    "The naïve café visit found no fracture.",
    "A left wrist fracture; painful.",
    "Old fracture, healed since March.",
    "Chest clear, heart of normal size.",
]
LABELS = ["no", "yes", "yes", "no"]
WORDS = ["Aspirin", "helps", "acute", "pain"]
TAGS = ["B-Drug", "O", "B-Disease", "I-Disease"]
SENTENCE = ["Aspirin", "helps", "against", "acute", "pain", "."]
SENTENCE_TAGS = ["B-Drug", "O", "O", "B-Disease", "I-Disease", "O"]
TITLED = ["Aspirin", "and", "pain", *SENTENCE]


def read(config: Any, name: str, split: str = "train", **values: Any) -> tuple[Columns, list[str]]:
    made = config(dataset=str(SAMPLES / name), **values)
    table = readers(made)[split]()
    return checked(made, table, split), list(table.notes)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("lines.jsonl", "lines.jsonl: JSON lines, UTF-8, 4 rows"),
        ("lines.jsonl.gz", "lines.jsonl.gz: JSON lines, UTF-8, 4 rows"),
        ("array.json", "array.json: JSON array, UTF-8, 4 rows"),
        ("wrapped.json", "wrapped.json: JSON array, UTF-8, 4 rows"),
        ("columns.json", "columns.json: JSON of columns, UTF-8, 4 rows"),
        ("pandas.json", "pandas.json: JSON of columns, UTF-8, 4 rows"),
        ("comma.csv", "comma.csv: CSV, UTF-8, delimiter comma, 4 rows"),
        (
            "semicolon-cp1252.csv",
            "semicolon-cp1252.csv: CSV, cp1252, delimiter semicolon, 4 rows",
        ),
        ("pipe.csv", "pipe.csv: CSV, UTF-8, delimiter pipe, 4 rows"),
        ("utf8-bom.csv", "utf8-bom.csv: CSV, UTF-8, delimiter comma, 4 rows"),
        ("utf16.csv", "utf16.csv: CSV, UTF-16, delimiter tab, 4 rows"),
        ("tab.tsv", "tab.tsv: CSV, UTF-8, delimiter tab, 4 rows"),
        ("sheet.xlsx", "sheet.xlsx: Excel, sheet 2 of 2, 4 rows"),
        ("dictionary.parquet", "dictionary.parquet: Parquet, 4 rows"),
        ("dictionary.feather", "dictionary.feather: Arrow, 4 rows"),
        ("stream.arrow", "stream.arrow: Arrow, 4 rows"),
        ("saved-dataset", "saved-dataset: data set on disk, 4 rows"),
    ],
)
def test_tables_of_every_kind_hold_the_same_rows(name: str, note: str, config: Any) -> None:
    assert read(config, name) == ({"text": TEXTS, "label": LABELS}, [note])


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("words.txt", ["words.txt: CoNLL of 2 columns, UTF-8, 1 sentences", "tags: BIO"]),
        (
            "words.tsv",
            [
                "words.tsv: CoNLL of 2 columns, UTF-8, 1 sentences",
                "tags: types alone, read as BIO",
            ],
        ),
        (
            "bilou.iob",
            ["bilou.iob: CoNLL of 2 columns, UTF-8, 1 sentences", "tags: BILOU, read as BIO"],
        ),
        (
            "iobes.jsonl",
            ["iobes.jsonl: one JSON object, UTF-8, 1 rows", "tags: IOBES, read as BIO"],
        ),
        (
            "numbers.jsonl",
            [
                "numbers.jsonl: one JSON object, UTF-8, 1 rows",
                "tags: numbers, named by labels, BIO",
            ],
        ),
    ],
)
def test_tags_of_every_scheme_become_the_same_bio(name: str, notes: list[str], config: Any) -> None:
    labels = "O,B-Drug,I-Drug,B-Disease,I-Disease"
    found = read(config, name, task="ner", labels=labels)
    assert found == ({"tokens": [WORDS], "ner_tags": [TAGS]}, notes)


def test_conll(config: Any) -> None:
    found, notes = read(config, "two-columns.conll", task="ner")
    assert found["tokens"] == [SENTENCE, ["#", "1", "works"]]  # a line with a tag is no comment
    assert found["ner_tags"] == [SENTENCE_TAGS, ["O"] * 3]
    found, notes = read(config, "four-columns.conll", task="ner")
    assert found == {
        "tokens": [WORDS, ["Ibuprofen", "Paracetamol"]],
        "ner_tags": [TAGS, ["B-Drug", "B-Drug"]],
    }
    assert notes == [
        "four-columns.conll: CoNLL of 4 columns, UTF-8, 2 sentences",
        "tags: IOB1, read as BIO",
    ]


@pytest.mark.parametrize(
    ("name", "tokens", "tags", "note"),
    [
        (
            "doccano.jsonl",
            [SENTENCE, ["Ibuprofen", "-", "like", "drugs"]],
            [SENTENCE_TAGS, ["B-Drug", "I-Drug", "I-Drug", "O"]],
            "doccano.jsonl: 2 texts with 4 spans, 1 left out that overlap a longer one",
        ),
        (
            "entities.jsonl",
            [SENTENCE],
            [SENTENCE_TAGS],
            "entities.jsonl: 1 texts with 2 spans",
        ),
        (
            "label-studio.json",
            [["\U0001f600", *SENTENCE]],
            [["O", *SENTENCE_TAGS]],
            "label-studio.json: 1 texts without annotation left out",
        ),
        (
            "brat",
            [SENTENCE, ["Left", "and", "right", "leg", "pain", "until", "noon", "."]],
            [
                SENTENCE_TAGS,
                ["B-Disease", "O", "O", "B-Disease", "I-Disease", "B-Time", "I-Time", "O"],
            ],
            "brat: 1 spans in several pieces, each piece became an entity",
        ),
        (
            "documents.pubtator",
            [TITLED, ["No", "entity", "Here", "is", "none", "."]],
            [["B-Drug", "O", "O", *SENTENCE_TAGS], ["O"] * 6],
            "documents.pubtator: 2 texts with 3 spans",
        ),
        (
            "bioc.json",
            [TITLED],
            [["B-Drug", "O", "O", "O", *SENTENCE_TAGS[1:]]],
            "bioc.json: 1 texts with 2 spans",
        ),
        (
            "bioc.xml",
            [TITLED],
            [["B-Drug", "O", "O", "O", *SENTENCE_TAGS[1:]]],
            "bioc.xml: BioC, 1 documents",
        ),
    ],
)
def test_character_spans(name: str, tokens: Any, tags: Any, note: str, config: Any) -> None:
    found, notes = read(config, name, task="ner")
    assert found == {"tokens": tokens, "ner_tags": tags}
    assert note in notes


def test_documents_are_text_where_no_words_are_tagged(config: Any) -> None:
    text = "Aspirin and pain\nAspirin helps against acute pain."
    for name in ("documents.pubtator", "bioc.json", "bioc.xml"):
        assert read(config, name, task="mlm")[0]["text"][0] == text
    assert read(config, "brat", task="mlm")[0]["text"][0].startswith("Aspirin helps")
    assert read(config, "words.tsv", task="ner", labels="O,Drug,Disease")[0]["ner_tags"] == [TAGS]


def test_texts(config: Any) -> None:
    assert read(config, "lines.txt", task="mlm")[0] == {"text": TEXTS}
    found, notes = read(config, "notes", task="mlm")
    assert found == {"text": [f"{text}\nSecond line.\n" for text in TEXTS]}
    assert notes == ["notes: folder of texts, UTF-8, 4 files, a row each"]


def test_splits_by_other_names(config: Any) -> None:
    for name in ("split-names", "saved-splits"):
        assert read(config, name)[0]["label"][:3] == LABELS[:3]
        assert read(config, name, split="validation")[0]["label"][-1] == LABELS[-1]


def test_half_a_character_is_replaced_and_counted(config: Any) -> None:
    found, notes = read(config, "surrogate.jsonl")
    assert found["text"] == ["half an emoji \ufffd here", "a whole one \U0001f600"]
    assert "surrogate.jsonl: 1 halves of a character (lone surrogates) became U+FFFD" in notes


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("no-header.csv", "classification", "train has 2 columns, none is called 'text': set text"),
        ("two-labels.csv", "classification", "two-labels.csv: column 'label' stands twice: rename"),
        (
            "stray-quote.csv",
            "classification",
            "stray-quote.csv: the record that begins on line 3 has a stray quote, or one that is",
        ),
        ("ragged.csv", "classification", "ragged.csv: line 3 has 3 fields, the header 2: put"),
        (
            "cyrillic.csv",
            "classification",
            "cyrillic.csv: line 2 is neither UTF-8 nor cp1252 (Western): save it as UTF-8",
        ),
        (
            "mixed-encodings.csv",
            "classification",
            "mixed-encodings.csv: line 3 is not UTF-8, other lines are: save it as UTF-8",
        ),
        ("moved-spans.jsonl", "ner", "moved-spans.jsonl: row 1: a span is outside the text, or"),
        ("mixed-schemes.conll", "ner", "train row 1: tag 3 of column 'ner_tags' is none of"),
        ("no-ann", "ner", "no-ann: 1 of 1 .txt files have no .ann file beside them: add one"),
    ],
)
def test_refused(name: str, task: str, message: str, config: Any) -> None:
    with pytest.raises(FedBTError) as caught:
        read(config, f"refused/{name}", task=task)
    assert message in str(caught.value)
    for cell in ("note", "lesion", "comma", "Пац", "Aspirin", "Disease"):
        assert cell not in str(caught.value)


def test_the_page_names_every_sample_and_no_other() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`tests/data/samples/([^`]+)`", page))
    there = {path.name for path in SAMPLES.iterdir() if path.name != "refused"}
    there |= {f"refused/{path.name}" for path in (SAMPLES / "refused").iterdir()}
    assert named == there


def test_the_cache_key_covers_every_file_of_a_folder(tmp_path: Path, config: Any) -> None:
    made = config(dataset=str(tmp_path), task="mlm")
    seen = []
    steps: tuple[Callable[[], object], ...] = (
        lambda: (tmp_path / "b.txt").write_text("a note"),
        lambda: (tmp_path / "a.txt").write_text("another"),
        lambda: (tmp_path / "a.txt").write_text("another one"),
        lambda: (tmp_path / "a.ann").write_text(""),
        lambda: (tmp_path / "b.txt").unlink(),
    )
    for step in steps:
        step()
        seen.append(str(identity(made)))
    assert len(set(seen)) == len(steps)


def test_damaged_files_are_read_or_refused(tmp_path: Path, config: Any) -> None:
    generator = random.Random(19)
    pieces = (b'"', b"null", b"[]", b"\t", b"\n\n", b",", b"-5", b"\x00", b"\xff", b'"\\ud800"')
    for sample in (file for file in sorted(SAMPLES.iterdir()) if file.is_file()):
        content = sample.read_bytes()
        for task in ("classification", "ner", "mlm"):
            at = generator.randrange(len(content))
            for damaged in (
                content[:at],
                content[:at] + generator.choice(pieces) + content[at:],
                content[:at] + content[at + generator.randint(1, 9) :],
            ):
                (tmp_path / sample.name).write_bytes(damaged)
                made = config(dataset=str(tmp_path / sample.name), task=task)
                with suppress(FedBTError):
                    checked(made, readers(made)["train"](), "train")
