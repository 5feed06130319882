"""`fedbt check` and the look that `fedbt doctor` takes: what a run would say, before it."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS
from transformers import AutoTokenizer

from fedbt_app.cli.main import main
from fedbt_app.wire.messages import Capabilities

SECRET = "Smith"
Check = Callable[..., tuple[int, list[str]]]


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))


@pytest.fixture
def command(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Return a function that runs a command with the tiny BERT: its exit status and its lines."""

    def run(*words: str, model: Path = tiny_bert) -> tuple[int, list[str]]:
        folders = [f"cache-dir={tmp_path / 'cache'}", f"pool-dir={tmp_path / 'pools'}"]
        status = main([*words, f"model={model}", *folders])
        return status, capsys.readouterr().out.splitlines()

    return run


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "text": f"{WORDS[index]} pain of the heart and liver no mild",
            "label": ("no", "yes")[index % 2],
        }
        for index in range(count)
    ]


def with_an_added_token(tiny_bert: Path, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.add_tokens(["[NAME]"])
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tiny_bert / name).read_bytes())
    return folder


def lines_with(lines: Iterable[str], words: str) -> list[str]:
    return [line for line in lines if words in line]


# What is found ------------------------------------------------------------------------------------


def test_rows_notes_labels_and_lengths_are_told(command: Check, tmp_path: Path) -> None:
    status, lines = command("check", str(write(tmp_path / "site.jsonl", some_rows())))
    assert status == 0
    assert [line for line in lines if line.startswith(("FAIL", "warn"))] == []
    for wanted in (
        "ok   data: local data site.jsonl (site.jsonl): train 12 rows",
        "ok   data: site.jsonl: JSON lines, UTF-8, 12 rows",
        "ok   data: 2 labels: no 6, yes 6",
        "ok   data: word pieces of a row of train: "
        "11 (0 %), 11 (25 %), 11 (50 %), 11 (75 %), 11 (100 %)",
        "ok   data: 2 columns, 0 of them not read",
        "ok   model: 64 positions, max-length 64",
    ):
        assert wanted in lines


def test_all_that_would_leave_the_site_is_shown_and_no_text_is_in_it(
    command: Check, tmp_path: Path
) -> None:
    rows = [row | {"text": f"{SECRET} {row['text']}"} for row in some_rows()]
    status, lines = command("check", str(write(tmp_path / "site.jsonl", rows)))
    assert status == 0
    start = lines.index(*lines_with(lines, "If this site joins"))
    shown = dict(line.strip().split(": ", 1) for line in lines[start + 1 :])
    assert list(shown) == [field.name for field in fields(Capabilities)]
    assert shown["examples"] == "11"
    assert shown["label_counts"] == "{'no': 6, 'yes': 6}"
    assert lines_with(lines, SECRET) == []
    assert not (tmp_path / "pools").exists()


def test_duplicates_empty_texts_and_unknown_pieces_are_warned_of(
    command: Check, tmp_path: Path
) -> None:
    rows = some_rows()
    again = rows[0] | {"text": f"  {rows[0]['text']} "}
    unknown = {"text": "ж " * 30, "label": "no"}
    write(tmp_path / "site" / "train.jsonl", [*rows, again, {"text": " ", "label": "no"}, unknown])
    write(tmp_path / "site" / "test.jsonl", rows[:3])
    status, lines = command("check", str(tmp_path / "site"))
    assert status == 0
    for wanted in (
        "warn data: 1 rows of train have no text and are dropped",
        "warn data: 1 rows of train repeat the text of an earlier one",
        "warn data: 3 texts of train are in test, too: scores on test are too good",
    ):
        assert wanted in lines
    assert lines_with(lines, "[UNK]: the tokenizer does not fit the text")


def test_what_is_cut_is_warned_of(command: Check, tmp_path: Path) -> None:
    path = str(write(tmp_path / "site.jsonl", some_rows()))
    status, lines = command("check", path, "max-length=8")
    assert status == 0
    assert lines_with(lines, "warn data: 12 of 12 rows are cut, 33.3 % of the word pieces")


def test_tagged_words_are_looked_at_alike(command: Check, ner_data: Path) -> None:
    status, lines = command("check", str(ner_data), "task=ner")
    assert status == 0
    (labels,) = lines_with(lines, " labels: ")
    assert "B-Organ" in labels
    assert lines_with(lines, "word pieces of a row of test: ")


def test_columns_that_look_like_identifiers_are_counted_and_not_named(
    command: Check, tmp_path: Path
) -> None:
    path = tmp_path / "site.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "label", "patient_name", "code", "ward"])
        table.writeheader()
        for number, row in enumerate(some_rows()):
            extra = {"patient_name": SECRET, "code": f"A-{number}", "ward": "north"}
            table.writerow(row | extra)
    status, lines = command("check", str(path))
    assert status == 0
    (told,) = lines_with(lines, " columns, ")
    assert told == (
        "ok   data: 5 columns, 3 of them not read; 2 look like identifiers, which stay here"
    )
    assert lines_with(lines, SECRET) + lines_with(lines, "patient_name") == []


# What would be refused ----------------------------------------------------------------------------


def test_a_site_that_would_be_refused_exits_with_1_and_shows_the_line_that_would_leave(
    command: Check, tmp_path: Path
) -> None:
    no_label = [{"text": row["text"]} for row in some_rows()]
    sentences = [
        row | {"label": f"{row['text']} {number}" * 9} for number, row in enumerate(some_rows())
    ]
    for rows, reason in ((no_label, "set label-column"), (sentences, "looks like text")):
        path = write(tmp_path / "site.jsonl", rows)
        status, lines = command("check", str(path))
        assert status == 1
        (failure,) = [line for line in lines if line.startswith("FAIL")]
        (left,) = lines_with(lines, "this line would leave it")
        assert reason in failure
        assert reason in left
        assert str(tmp_path) not in left
        assert not lines_with(lines, "If this site joins")


def test_more_pieces_than_positions_are_refused(command: Check, tmp_path: Path) -> None:
    path = str(write(tmp_path / "site.jsonl", some_rows()))
    status, lines = command("check", path, "max-length=65")
    assert status == 1
    assert lines_with(lines, "FAIL model: max-length=65 but ")
    assert lines_with(lines, "64 positions: lower it")


def test_a_test_set_that_cannot_be_read_is_no_reason_to_refuse_a_site(
    command: Check, tmp_path: Path
) -> None:
    write(tmp_path / "site" / "train.jsonl", some_rows())
    write(tmp_path / "site" / "test.jsonl", [{"other": 1}])
    status, lines = command("check", str(tmp_path / "site"))
    assert status == 0
    assert lines_with(lines, "warn data: not read at a site, and unreadable: split test")
    doctor, lines = command("doctor", f"dataset={tmp_path / 'site'}")
    assert doctor == 1
    assert lines_with(lines, "FAIL data: split test has 1 columns")


def test_a_path_that_is_not_there_is_no_hub_data_set(
    command: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "someone/notes"]) == 1
    assert "no such file: someone/notes" in capsys.readouterr().err


# Doctor -------------------------------------------------------------------------------------------


def test_doctor_names_what_is_wrong_with_the_data_and_with_each_side_of_the_model(
    command: Check, tiny_bert: Path, tmp_path: Path
) -> None:
    added = with_an_added_token(tiny_bert, tmp_path / "added")
    path = write(tmp_path / "site.jsonl", [{"note": "a", "class": "b"}])
    status, lines = command("doctor", f"dataset={path}", "max-length=512", model=added)
    assert status == 1
    failures = [line for line in lines if line.startswith("FAIL")]
    assert [line.partition(":")[0] for line in failures] == [
        "FAIL model",
        "FAIL model",
        "FAIL data",
    ]
    assert "entries, the embedding " in failures[0]
    assert "64 positions" in failures[1]
    assert "split train has 2 columns, none is called 'text'" in failures[2]


def test_doctor_looks_at_the_data_though_the_tokenizer_does_not_fit_the_model(
    command: Check, tiny_bert: Path, tmp_path: Path
) -> None:
    added = with_an_added_token(tiny_bert, tmp_path / "added")
    path = write(tmp_path / "site.jsonl", some_rows())
    status, lines = command("doctor", f"dataset={path}", "max-length=8", model=added)
    assert status == 1
    for wanted in ("train 12 rows", "2 labels: no 6, yes 6", "12 of 12 rows are cut"):
        assert lines_with(lines, wanted), wanted


def test_doctor_takes_a_test_set_alone_as_the_servers(command: Check, tmp_path: Path) -> None:
    write(tmp_path / "server" / "test.jsonl", some_rows())
    status, lines = command("doctor", f"dataset={tmp_path / 'server'}")
    assert status == 0
    assert lines_with(lines, "test 12 rows")
    assert lines_with(lines, "2 labels: no 6, yes 6")
