"""The labels of several sites become one set: alike where they mean the same, and never a cell."""

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RecordingGrid, federate
from flwr.app import Message

import server_app
from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError

Settings = Callable[..., dict[str, Any]]
Site = dict[str, Any]
ORGANS = ("heart", "kidney", "liver")


def rows_of(labels: list[Any], rows: int = 24) -> list[dict[str, Any]]:
    generator = random.Random(len(labels))
    return [
        {
            "text": " ".join(generator.choices(ORGANS, k=4)),
            "label": labels[number % len(labels)],
        }
        for number in range(rows)
    ]


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Site]:
    """Return a function that writes a site's rows and makes its node configuration."""

    def make(name: str, rows: list[dict[str, Any]], **node: Any) -> Site:
        folder = tmp_path / name
        folder.mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "train.jsonl").write_text(lines)
        settings = {key.replace("_", "-"): value for key, value in node.items()}
        return {"name": name, "data-path": str(folder)} | settings

    return make


@pytest.fixture
def run(settings: Settings) -> Callable[..., tuple[dict[str, Any], RecordingGrid]]:
    """Return a function that runs sites as the app does, to the report."""

    def start(*sites: Site, **changes: Any) -> tuple[dict[str, Any], RecordingGrid]:
        values = settings(**({"dataset": "none", "num_rounds": 1, "codec": "int2"} | changes))
        values["min-clients"] = len(sites)
        grid = RecordingGrid(values, dict(enumerate(sites, start=10)))
        return server_app.run(grid, RunConfig.load(values)), grid

    return start


# One class, however it is written -----------------------------------------------------------------


def test_whole_numbers_of_two_sites_are_the_same_classes(site: Any, run: Any) -> None:
    report, _ = run(site("a", rows_of([0, 1, 2])), site("b", rows_of([0.0, 1.0, 2.0])))
    assert report["labels"] == ["0", "1", "2"]
    assert report["warnings"] == []


def test_accents_composed_and_decomposed_are_the_same_classes(site: Any, run: Any) -> None:
    report, _ = run(
        site("a", rows_of(["n\u00e9phro", "cardio"])),
        site("b", rows_of(["ne\u0301phro", "cardio "])),
    )
    assert report["labels"] == ["cardio", "n\u00e9phro"]


def test_labels_that_differ_in_case_are_named_with_a_label_map_that_mends_it(
    site: Any, run: Any, flower_log: list[str]
) -> None:
    lower, upper = rows_of(["heart", "heart failure"]), rows_of(["Heart", "heart  failure"])
    report, _ = run(site("a", lower), site("b", upper))
    (warning,) = report["warnings"]
    assert "labels of b differ from others only in case, blanks or hyphens" in warning
    assert "'Heart' ('heart')" in warning
    assert f"fedbt: {warning}" in flower_log
    proposal = warning.split("label-map='")[1].split("'")[0]
    mended, _ = run(site("c", lower), site("d", upper, label_map=proposal))
    assert mended["labels"] == ["heart", "heart failure"]
    assert mended["warnings"] == []
    for_all, _ = run(site("e", lower), site("f", upper), label_map=proposal)
    assert for_all["labels"] == ["heart", "heart failure"]


def test_the_central_test_set_is_a_writer_of_labels_too(
    site: Any, run: Any, site_data: Path
) -> None:
    report, _ = run(
        site("a", rows_of(["Heart", "Kidney", "liver"])), dataset=str(site_data), num_rounds=1
    )
    (warning,) = report["warnings"]
    assert "label-map='Heart=heart;Kidney=kidney'" in warning


def test_entity_types_that_differ_in_case_are_named_and_mended(site: Any, run: Any) -> None:
    def tagged(kind: str) -> list[dict[str, Any]]:
        return [{"tokens": list(ORGANS), "ner_tags": ["O", f"B-{kind}", f"I-{kind}"]}] * 10

    report, _ = run(site("a", tagged("Organ")), site("b", tagged("organ")), task="ner")
    (warning,) = report["warnings"]
    assert "label-map='Organ=organ'" in warning
    mended, _ = run(
        site("c", tagged("Organ"), label_map="Organ=organ"), site("d", tagged("organ")), task="ner"
    )
    assert mended["labels"] == ["B-organ", "I-organ", "O"]


def test_a_malformed_label_map_is_refused_without_quoting_it(config: Any) -> None:
    for entry in ("Secret", "Secret=", "=Secret"):
        with pytest.raises(FedBTError, match="entry 2 of label-map") as caught:
            config(label_map=f"a=b;{entry}")
        assert "Secret" not in str(caught.value)
    with pytest.raises(FedBTError, match="a second time"):
        config(label_map="a=b;a=c")


# Nothing to learn ---------------------------------------------------------------------------------


def test_one_label_is_nothing_to_learn(site: Any, run: Any) -> None:
    with pytest.raises(FedBTError, match="one label, 'heart': there is nothing to learn"):
        run(site("a", rows_of(["heart"])), site("b", rows_of(["heart"])))
    untagged = [{"tokens": list(ORGANS), "ner_tags": ["O"] * 3}] * 10
    with pytest.raises(FedBTError, match="one label, 'O': there is nothing to learn"):
        run(site("c", untagged), site("d", untagged), task="ner")


def test_lists_and_scores_are_refused_at_the_site(site: Any, run: Any) -> None:
    good = site("a", rows_of(list(ORGANS)))
    lists = site("b", rows_of([["heart", "x"], ["liver"]]))
    scores = site("c", rows_of([number / 10 + 0.03 for number in range(10)]))
    report, _ = run(good, lists, scores)
    reasons = " ".join(refusal["reason"] for refusal in report["refused"])
    assert "holds lists of labels in 24 of 24 rows" in reasons
    assert "holds fractions in 24 of 24 rows" in reasons


# Which names may leave ----------------------------------------------------------------------------


def test_names_of_persons_in_place_of_labels_stay_at_the_site(site: Any, run: Any) -> None:
    names = [f"Given Family{number}" for number in range(25)]
    report, grid = run(site("a", rows_of(list(ORGANS))), site("b", rows_of(names, rows=25)))
    assert report["labels"] == list(ORGANS)
    (refusal,) = report["refused"]
    assert "25 different values in 25 places" in refusal["reason"]
    assert all(not holds(message, "Family") for message in grid.received)


def test_labels_allowed_is_strict_and_quotes_no_other_label(site: Any, run: Any) -> None:
    rows = rows_of([*ORGANS, "secret"])
    strict = site("b", rows, labels_allowed="heart, kidney,liver")
    report, grid = run(site("a", rows_of(list(ORGANS))), strict)
    (refusal,) = report["refused"]
    assert refusal["reason"] == (
        "train row 4 has a label that labels-allowed does not list: mend the row, or add the label there"
    )
    assert all(not holds(message, "secret") for message in grid.received)


def test_labels_allowed_lets_a_tiny_site_take_part(site: Any, run: Any) -> None:
    three = [{"text": organ, "label": organ} for organ in ORGANS]
    good = site("a", rows_of(list(ORGANS)))
    report, _ = run(good, site("b", three), site("c", three, labels_allowed="heart,kidney,liver"))
    assert [one["name"] for one in report["clients"]] == ["a", "c"]
    assert "list them in labels-allowed" in report["refused"][0]["reason"]


def test_a_site_is_told_in_its_own_log_which_names_leave(
    site: Any, run: Any, flower_log: list[str]
) -> None:
    run(site("a", rows_of(list(ORGANS))), site("b", rows_of(["heart", "liver"])))
    told = [line for line in flower_log if "will see" in line]
    assert told == [
        "fedbt: a: label names that the server will see: heart, kidney, liver",
        "fedbt: b: label names that the server will see: heart, liver",
    ]


# No cell leaves a site ----------------------------------------------------------------------------

MARK = "Zyxwort"


def holds(message: Message, text: str) -> bool:
    """Say whether a record of the message has the text in it."""
    return text in repr(
        [dict(record) for record in message.content.config_records.values()]
    ) + repr([dict(record) for record in message.content.metric_records.values()])


def _lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def _labelled(*labels: Any) -> str:
    return _lines(*({"text": f"{MARK} heart", "label": label} for label in labels))


def _tagged(*rows: tuple[Any, Any]) -> str:
    return _lines(*({"tokens": tokens, "ner_tags": tags} for tokens, tags in rows))


M = MARK
SPOILT = {  # file name, content; those of named entities end in .ner
    "no header": ("train.csv", f"{M} one,{M} two\n{M} three,{M} four\n"),
    "no column of labels": ("train.csv", f"text,{M}\n{M},{M}\n"),
    "ragged": ("train.csv", f"text,label\n{M},a\n{M},a,{M}\n"),
    "stray quote": ("train.csv", f'text,label\n"{M}" {M},{M}\n'),
    "column twice": ("train.csv", f"text,label,label\n{M},{M},{M}\n"),
    "not JSON": ("train.jsonl", _labelled("a", "b") + f"\n{M} {{"),
    "key twice": ("train.jsonl", _labelled("a") + f'\n{{"{M}": 1, "{M}": "{M}"}}'),
    "JSON text": ("train.json", json.dumps(M)),
    "JSON array of texts": ("train.json", json.dumps([M, M])),
    "JSON columns differ": ("train.json", json.dumps({"text": [M, M], "label": [M]})),
    "JSON rows of data differ": ("train.json", json.dumps({"columns": ["text"], "data": [[M, M]]})),
    "no text": ("train.jsonl", _lines({"text": 3, "label": M}, {"text": [M], "label": M})),
    "text is an object": ("train.jsonl", _lines({"text": {M: M}, "label": "a"})),
    "no label": ("train.jsonl", _labelled("a", None, M)),
    "lists of labels": ("train.jsonl", _labelled([M], [M, M])),
    "objects as labels": ("train.jsonl", _labelled({M: M}, {M: 1})),
    "own label a row": ("train.jsonl", _labelled(*(f"{M}{number}" for number in range(30)))),
    "few rows": ("train.jsonl", _labelled(f"{M}a", f"{M}b", f"{M}c")),
    "long label": ("train.jsonl", _labelled("a", "b", *[f"{M} " * 40] * 9)),
    "sentence": ("train.jsonl", _labelled("a", *[f"{M} was seen on the ward today."] * 9)),
    "date": ("train.jsonl", _labelled("a", *[f"{M} 1956-03-12"] * 9)),
    "record": ("train.jsonl", _labelled("a", *[f"{M}123456"] * 9)),
    "address": ("train.jsonl", _labelled("a", *[f"{M}@clinic.org"] * 9)),
    "title": ("train.jsonl", _labelled("a", "b", *[f"Mrs {M}"] * 9)),
    "persons": ("train.jsonl", _labelled(*[f"Anna {M}", f"Ben {M}"] * 9)),
    "fractions and a name": ("train.jsonl", _labelled(0.5, 0.25, 0.75, M)),
    "bytes": ("train.jsonl", b"\xff\xfe\x00" + M.encode()),
    "mixed encodings": ("train.csv", b"text,label\n\xc3\xa4,a\n\xe4 " + M.encode() + b",b\n"),
    "not Parquet": ("train.parquet", M),
    "not Excel": ("train.xlsx", M),
    "not gzip": ("train.csv.gz", M),
    "XML": ("train.xml", f"<{M}>{M}</{M}>"),
    "broken XML": ("train.xml", f"<collection><document><{M}"),
    "two columns of CoNLL": ("ner/train.conll", f"{M} O\n{M}\n"),
    "many columns": ("ner/train.conll", " ".join([M] * 9)),
    "words as tags": ("ner/train.conll", f"{M} B-x\n{M} {M}\n"),
    "more tags than words": ("ner/train.jsonl", _tagged(([M], ["O", M]))),
    "tags that are no list": ("ner/train.jsonl", _tagged((M, M))),
    "words that are no text": ("ner/train.jsonl", _tagged(([{M: M}], ["B-x"]))),
    "numbers without names": ("ner/train.jsonl", _tagged(([M, M], [0, 1]))),
    "mixed schemes": ("ner/train.jsonl", _tagged(([M, M], ["B-x", M]), ([M], [f"Q-{M}"]))),
    "types of persons": ("ner/train.jsonl", _tagged(*[([M, M], [f"B-Anna {M}", "O"])] * 9)),
    "a type a row": (
        "ner/train.jsonl",
        _tagged(*(([M], [f"B-{M}{number}"]) for number in range(9))),
    ),
    "moved spans": ("ner/train.jsonl", _lines({"text": M, "label": [[0, 99, M]]})),
    "spans without a type": ("ner/train.jsonl", _lines({"text": M, "label": [[0, 3, [M, M]]]})),
    "spans that are none": ("ner/train.jsonl", _lines({"text": M, "label": [M]})),
    "PubTator": ("ner/train.txt", f"1|t|{M}\n1|a|{M}\n1\t0\t99\t{M}\t{M}\n"),
    "PubTator lines": ("ner/train.txt", f"1|t|{M}\n{M} {M}\n"),
    "BRAT": ("ner/train/one.ann", f"T1\t{M} 0 {M}\t{M}"),
}


@pytest.fixture
def errors_of_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect every record of every logger, the arguments and the traceback included."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Collect()
    names = ("", "flwr")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield lines
    for name in names:
        logging.getLogger(name).removeHandler(handler)


def test_no_cell_of_a_spoilt_file_is_in_a_reply_a_log_or_the_report(
    settings: Settings, site: Any, tmp_path: Path, errors_of_all: list[str]
) -> None:
    good = {
        "classification": site(
            "good", [row | {"text": f"{MARK} {row['text']}"} for row in rows_of(list(ORGANS))]
        ),
        "ner": site(
            "tagged", [{"tokens": [MARK, *ORGANS], "ner_tags": ["B-x", "O", "O", "O"]}] * 9
        ),
    }
    for task in good:
        spoilt = _written(tmp_path / task, task)
        sites = [good[task], *spoilt.values()]
        values = settings(task=task, num_rounds=1)
        values |= {"dataset": "none", "min-clients": 1, "output-dir": str(tmp_path / f"{task}-run")}
        grid = RecordingGrid(values, dict(enumerate(sites, start=10)))
        report = server_app.run(grid, RunConfig.load(values))
        accepted = {one["name"] for one in report["clients"]}
        assert accepted == {good[task]["name"]}, accepted
        assert len(report["refused"]) == len(spoilt)
        assert [refusal for refusal in report["refused"] if MARK in refusal["reason"]] == []
        # a refusal that a person can mend, not the place of a crash
        assert [one for one in report["refused"] if ".py:" in one["reason"]] == []
        assert all(not holds(message, MARK) for message in grid.received)
        assert all(not holds(message, MARK) for message in grid.sent)
        for name in ("report.json", "report.md", "rounds.jsonl"):
            assert MARK not in (tmp_path / f"{task}-run" / name).read_text()
    assert [line for line in errors_of_all if MARK in line] == []


def _written(folder: Path, task: str) -> dict[str, Site]:
    sites = {}
    for name, (file, content) in SPOILT.items():
        if file.startswith("ner/") != (task == "ner"):
            continue
        path = folder / name.replace(" ", "-") / file.removeprefix("ner/")
        path.parent.mkdir(parents=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if path.suffix == ".ann":
            path.with_suffix(".txt").write_text(MARK)
        data = folder / name.replace(" ", "-")
        sites[name] = {"name": name, "data-path": str(data)}
    return sites


def test_labels_that_change_after_the_query_are_not_quoted(
    settings: Settings, site: Any, tmp_path: Path
) -> None:
    sites = [site("a", rows_of(list(ORGANS))), site("b", rows_of(list(ORGANS)))]
    changed = Path(sites[1]["data-path"], "train.jsonl")

    def spoil(node: int, reply: Message) -> Message:
        if reply.metadata.message_type == "query" and node == 11:
            rows = rows_of([*ORGANS, MARK])
            changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return reply

    run = federate(settings(dataset="none", num_rounds=1), dict(enumerate(sites, start=10)), spoil)
    assert run.refusals
    assert all(MARK not in refusal.reason for refusal in run.refusals)
    assert "a label that is none of the run's 3" in run.refusals[0].reason
