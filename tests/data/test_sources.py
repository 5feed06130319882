import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from fedbt_app.config import RunConfig
from fedbt_app.data import examples
from fedbt_app.data.sources import checked, readers
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Columns

ROWS = [{"text": f"patient {number} is well", "label": "ab"[number % 2]} for number in range(40)]
WORDS = [
    {"tokens": ["Acetaminophen", "helps", str(n)], "ner_tags": ["B-Drug", "O", "O"]}
    for n in range(20)
]
SECRET = "Mrs Smith was seen on the ward with a broken arm"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    packing = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix)
    bare = path.stem if packing else path.name
    if bare.endswith(".csv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    elif bare.endswith(".parquet"):
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        content = sink.getvalue()
    elif bare.endswith(".txt"):
        content = "\n\n".join(row["text"] for row in rows).encode()
    else:
        content = "\n".join(json.dumps(row) for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packing(content) if packing else content)
    return path


def train(config: RunConfig) -> Columns:
    return checked(config, readers(config)["train"](), "train")


def raised(call: Callable[[], Any]) -> str:
    with pytest.raises(FedBTError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    return message


def test_every_ending_gives_the_same_rows(tmp_path: Path, config: Any) -> None:
    wanted = {name: [row[name] for row in ROWS] for name in ("text", "label")}
    for ending, zipped in product(
        (".jsonl", ".json", ".csv", ".parquet", ".txt"), ("", ".gz", ".bz2", ".xz")
    ):
        file = write(tmp_path / f"notes{ending}{zipped}", ROWS)
        assert train(config(dataset=str(file), task="mlm"))["text"] == wanted["text"]
        if ending != ".txt":
            assert train(config(dataset=str(file))) == wanted


def test_a_folder_is_read_by_its_file_names(tmp_path: Path, config: Any) -> None:
    write(tmp_path / "data" / "train.csv", ROWS[:20])
    write(tmp_path / "data" / "Validation.jsonl", ROWS[20:30])
    write(tmp_path / "data" / "test.parquet.gz", ROWS[30:])
    write(tmp_path / "data" / "notes.txt", ROWS)
    found = readers(config(dataset=str(tmp_path / "data")))
    assert {split: read().columns["text"] for split, read in found.items()} == {
        split: [row["text"] for row in rows]
        for split, rows in (("train", ROWS[:20]), ("validation", ROWS[20:30]), ("test", ROWS[30:]))
    }


def test_class_numbers_in_parquet_become_their_names(tmp_path: Path, config: Any) -> None:
    names = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=names).to_parquet(
        tmp_path / "x.parquet"
    )
    found = train(config(dataset=str(tmp_path / "x.parquet")))
    assert found["label"] == ["yes", "no"]
    Dataset.from_dict({"text": ["a"], "label": [-1]}, features=names).to_parquet(
        tmp_path / "z.parquet"
    )
    assert "train row 1: column 'label' has no label" in raised(
        lambda: train(config(dataset=str(tmp_path / "z.parquet")))
    )
    tags = Features(
        {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-X"]))}
    )
    rows = {"tokens": [["up", "down"]], "ner_tags": [[1, 0]]}
    Dataset.from_dict(rows, features=tags).to_parquet(tmp_path / "y.parquet")
    found = train(config(dataset=str(tmp_path / "y.parquet"), task="ner"))
    assert found["ner_tags"] == [["B-X", "O"]]


def test_plain_class_numbers_become_text(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "x.jsonl", [{"text": "up", "label": 3}, {"text": "down", "label": 0}])
    assert train(config(dataset=str(file)))["label"] == ["3", "0"]


def test_hub_data(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, cache_dir: str) -> DatasetDict:
        asked.append((name, subset))
        kinds = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
        made = Dataset.from_dict(
            {"text": ["up", "down", "left"], "label": [0, 1, 1]}, features=kinds
        )
        return DatasetDict(train=made, test=made)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = config(dataset="someone/data", dataset_subset="small")
    assert train(found)["label"] == ["no", "yes", "yes"]
    assert asked == [("someone/data", "small")]
    assert examples.describe(found) == "hub data set someone/data, subset small"


def test_a_hub_that_cannot_be_reached(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError(SECRET)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    message = raised(lambda: train(config(dataset="someone/data")))
    assert "dataset=someone/data could not be had from the hub (ConnectionError)" in message
    assert "give the path of a local file or folder" in message


def test_missing_file(config: Any) -> None:
    for name in ("/no/such/place", "./none", "~/none-here", "notes.csv", "notes.jsonl.gz"):
        assert f"no such file: dataset={name}" in raised(
            lambda name=name: train(config(dataset=name))
        )


def test_malformed_files(tmp_path: Path, config: Any) -> None:
    for name, content, message in (
        (
            "x.jsonl",
            f'{{"text": "a", "label": "b"}}\n{SECRET}',
            "x.jsonl: line 2 is no JSON object",
        ),
        ("x.json", f'[{{"text": "{SECRET}"}}', "x.json: line 1 is no JSON object"),
        ("x.json", f'["{SECRET}"]', "x.json: item 1 of the array is no object"),
        (
            "x.json",
            f'{{"text": ["{SECRET}", "b"], "label": ["a"]}}',
            "x.json: its columns differ in length",
        ),
        (
            "x.jsonl",
            f'{{"label": 1}}\n{{"label": "{SECRET}", "label": 1}}',
            "line 2: an object has one key twice",
        ),
        ("x.csv", f"text,label\n{SECRET},a,b", "x.csv: line 2 has 3 fields, the header 2"),
        ("x.csv", f"text,label\n{SECRET}", "x.csv: line 2 has 1 fields, the header 2"),
        ("x.csv", f"{SECRET},1\nb,2", "has 2 columns, none is called 'text': set text-column"),
        ("x.parquet", SECRET, "x.parquet cannot be read (Arrow"),
        ("x.jsonl.gz", SECRET, "x.jsonl.gz cannot be read (BadGzipFile)"),
        ("x.pdf", SECRET, "x.pdf is of no known kind"),
        ("x.jsonl", "", "has 0 columns, none is called 'text'"),
        ("x.jsonl", '{"text": " ", "label": "b"}', "no row with text in column 'text'"),
        ("x.jsonl", '{"text": 5, "label": "b"}', "train row 1: column 'text' holds no text"),
        (
            "x.jsonl",
            f'{{"text": "{SECRET}", "label": null}}',
            "train row 1: column 'label' has no label",
        ),
    ):
        (tmp_path / name).write_text(content)
        assert message in raised(lambda name=name: train(config(dataset=str(tmp_path / name))))


def test_undecodable_text(tmp_path: Path, config: Any) -> None:
    for content, message in (
        (
            b"good \x81 thing",
            "x.txt: line 1 is neither UTF-8 nor cp1252 (Western): save it as UTF-8",
        ),
        (
            "caf\xe9\n".encode() * 9 + b"caf\xe9",
            "x.txt: line 10 is not UTF-8, other lines are: save it as UTF-8",
        ),
        (
            "\u043f\u0430\u0446\u0438\u0435\u043d\u0442".encode("cp1251"),
            "x.txt: line 1 is neither UTF-8 nor cp1252 (Western): save it as UTF-8",
        ),
        (
            "zg\u0142asza b\xf3l".encode("cp1250"),
            "x.txt: line 1 is neither UTF-8 nor cp1252 (Western): save it as UTF-8",
        ),
        (
            b"\x00\x01\x00\x00" * 9,
            "x.txt: it is no text: save it as UTF-8, or give it the ending of its kind",
        ),
    ):
        (tmp_path / "x.txt").write_bytes(content)
        assert raised(lambda: train(config(dataset=str(tmp_path / "x.txt"), task="mlm"))) == message


def test_folders_must_be_clear(tmp_path: Path, config: Any) -> None:
    (tmp_path / "data").mkdir()
    made = config(dataset=str(tmp_path / "data"))
    assert "has no file or folder train, validation or test" in raised(lambda: train(made))
    write(tmp_path / "data" / "train.csv", ROWS)
    write(tmp_path / "data" / "train.jsonl", ROWS)
    assert "train.csv and train.jsonl are both split train" in raised(lambda: train(made))


def test_missing_column(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "x.jsonl", ROWS)
    cases: tuple[tuple[dict[str, str], str], ...] = (
        ({"text_column": "abstract"}, "'abstract': set text-column"),
        ({"label_column": "class"}, "'class': set label-column"),
        ({"task": "mlm", "text_column": "abstract"}, "'abstract': set text-column"),
        ({"task": "ner"}, "'tokens': set tokens-column"),
        ({"task": "ner", "tokens_column": "text"}, "'ner_tags': set tags-column"),
    )
    for values, missing in cases:
        message = raised(lambda values=values: train(config(dataset=str(file), **values)))
        assert f"split train has 2 columns, none is called {missing}" in message


def test_wrong_tags(tmp_path: Path, config: Any) -> None:
    cases: tuple[tuple[Any, Any, str], ...] = (
        (["a", "b"], ["O"], "train row 2 has 2 tokens but 1 tags"),
        (
            ["a", "b"],
            ["O", "Drug"],
            "train row 2: tag 2 of column 'ner_tags' is none of O, B-x, I-x",
        ),
        (["a"], ["B-"], "tag 1 of column"),
        (["a"], [1], "tag 1 of column"),
        (["a"], [SECRET], "tag 1 of column"),
        ([None], ["O"], "token 1 of column 'tokens' is no text"),
        ("a", "O", "columns 'tokens' and 'ner_tags' must hold lists"),
    )
    for tokens, tags, message in cases:
        file = write(tmp_path / "x.jsonl", [WORDS[0], {"tokens": tokens, "ner_tags": tags}])
        assert message in raised(lambda file=file: train(config(dataset=str(file), task="ner")))


def test_label_outside_the_set(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "x.jsonl", ROWS)
    assert "has a label that is not one of a,c" in raised(
        lambda: train(config(dataset=str(file), labels="a,c"))
    )
    assert train(config(dataset=str(file), labels="b,a"))["label"] == [row["label"] for row in ROWS]
    file = write(tmp_path / "y.jsonl", WORDS)
    message = raised(lambda: train(config(dataset=str(file), task="ner", labels="O,B-Disease")))
    assert "train row 1 has a label that is not one of O,B-Disease" in message
    file = write(tmp_path / "z.jsonl", [{"text": "a", "label": SECRET}])
    assert "train row 1 has a label that is not one of a" in raised(
        lambda: train(config(dataset=str(file), labels="a"))
    )


def test_rows_without_text_are_dropped(tmp_path: Path, config: Any) -> None:
    file = write(
        tmp_path / "x.jsonl",
        [*ROWS[:4], {"text": None, "label": "a"}, {"text": "  ", "label": None}],
    )
    found = train(config(dataset=str(file)))
    assert found["text"] == [row["text"] for row in ROWS[:4]]
    empty = [
        {"tokens": [], "ner_tags": []},
        {"tokens": None, "ner_tags": None},
        {"tokens": [" "], "ner_tags": ["O"]},
    ]
    file = write(tmp_path / "y.jsonl", [*WORDS[:3], *empty])
    found = train(config(dataset=str(file), task="ner"))
    assert found["tokens"] == [row["tokens"] for row in WORDS[:3]]


def test_a_long_file_is_not_held_beside_its_rows(tmp_path: Path, config: Any) -> None:
    line = json.dumps({"text": "a short note", "label": "a", "other": "x" * 2000})
    (tmp_path / "x.jsonl").write_text("\n".join([line] * 5000))
    with (tmp_path / "x.csv").open("w") as file:
        file.write("text,label,other\n" + f"a short note,a,{'x' * 2000}\n" * 5000)
    for name in ("x.jsonl", "x.csv"):
        read = readers(config(dataset=str(tmp_path / name)))["train"]
        tracemalloc.start()
        table = read()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert table.rows == 5000
        assert peak < 5e6 < (tmp_path / name).stat().st_size


def test_odd_tables_are_read_as_they_are_meant(tmp_path: Path, config: Any) -> None:
    for content, rows in (
        ("sep=;\r\ntext;label\r\na, b;x\r\n", [("a, b", "x")]),
        ("text,label\ra,x\rb,y\r", [("a", "x"), ("b", "y")]),
        (",text,label\n0,a,x\n1,b,y\n", [("a", "x"), ("b", "y")]),
        ("text;label;;\na;x;;\n;;;\nb;y;;\n", [("a", "x"), ("b", "y")]),
        ('text,label\n"a\nb ""q"" ,",x\n', [('a\nb "q" ,', "x")]),
        ("note,note,text,label\n1,2,a,x\n", [("a", "x")]),
    ):
        (tmp_path / "x.csv").write_text(content, newline="")
        found = train(config(dataset=str(tmp_path / "x.csv")))
        assert list(zip(found["text"], found["label"], strict=True)) == rows
    (tmp_path / "x.csv").write_text("text\nhello, world\nwhole\nhm, a, b\n")
    found = train(config(dataset=str(tmp_path / "x.csv"), task="mlm"))
    assert found["text"] == ["hello, world", "whole", "hm, a, b"]


def test_json_of_other_forms(tmp_path: Path, config: Any) -> None:
    row = {"text": "a", "label": "x"}
    for content in (
        {"columns": ["text", "label"], "index": [0], "data": [["a", "x"]]},
        row,
        [
            {
                "id": 1,
                "data": {"text": "a"},
                "annotations": [{"result": [{"value": {"choices": ["x"]}}]}],
            }
        ],
    ):
        (tmp_path / "x.json").write_text(json.dumps(content))
        assert train(config(dataset=str(tmp_path / "x.json"))) == {"text": ["a"], "label": ["x"]}
    (tmp_path / "x.json").write_text(json.dumps({"train": [row], "test": [row]}))
    message = raised(lambda: train(config(dataset=str(tmp_path / "x.json"))))
    assert "several lists of rows: write each split into a file of its own" in message
    spans = {"start": 5, "end": 12, "text": "aspirin", "labels": ["Drug"]}
    passage = {
        "offset": 3,
        "text": "Take aspirin",
        "annotations": [{"infons": {"type": "Drug"}, "locations": [{"offset": 8, "length": 7}]}],
    }
    for whole in (
        [["Take aspirin", {"entities": [[5, 12, "Drug"]]}]],
        [{"text": "Take aspirin", "label": [spans]}],
        {"PubTator3": [{"passages": [passage]}]},
        {"tokens": [["Take", "aspirin"]], "ner_tags": [["O", "B-Drug"]]},
        {"tokens": ["Take", "aspirin"], "ner_tags": ["O", "B-Drug"]},
    ):
        (tmp_path / "x.json").write_text(json.dumps(whole))
        found = train(config(dataset=str(tmp_path / "x.json"), task="ner"))
        assert found == {"tokens": [["Take", "aspirin"]], "ner_tags": [["O", "B-Drug"]]}


def test_excel_cells(tmp_path: Path, config: Any) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    for cells in (["text", "label"], ["a", 1], ["b", 2]):
        book.active.append(cells)
    book.save(tmp_path / "x.xlsx")
    assert train(config(dataset=str(tmp_path / "x.xlsx")))["label"] == ["1", "2"]
    book.active.append(["c", "=1+1"])
    book.save(tmp_path / "x.xlsx")
    message = raised(lambda: train(config(dataset=str(tmp_path / "x.xlsx"))))
    assert "x.xlsx: row 4: column 'label' holds a formula without a value" in message


def test_a_split_in_several_files(tmp_path: Path, config: Any) -> None:
    for number, rows in enumerate((ROWS[:20], ROWS[20:])):
        write(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", rows)
    assert train(config(dataset=str(tmp_path / "data")))["text"] == [row["text"] for row in ROWS]
    write(tmp_path / "data" / "dev.csv", ROWS)
    write(tmp_path / "data" / "valid.csv", ROWS)
    message = raised(lambda: train(config(dataset=str(tmp_path / "data"))))
    assert message == "dev.csv and valid.csv are both split validation: remove one"


def test_sites_of_different_schemes_have_the_same_labels(tmp_path: Path, config: Any) -> None:
    for name, tags, given in (
        ("a", ["O", "S-X"], "O,B-X,I-X"),
        ("b", ["O", "X"], "O,X"),
        ("c", [0, 1], "O,B-X,I-X,E-X,S-X"),
    ):
        row = {"tokens": ["the", "arm"], "ner_tags": tags}
        file = write(tmp_path / f"{name}.jsonl", [row])
        found = train(config(dataset=str(file), task="ner", labels=given))
        assert found["ner_tags"] == [["O", "B-X"]]
