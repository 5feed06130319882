"""From a data set's name to tokenised examples: load, check, split, tokenise, and keep the result on disk.

Rows become word pieces once per client, tokenizer and setting; after that the memory-mapped result is read back
and neither the raw data nor the tokenizer is loaded. Local text never enters an error message.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedbt_app import embedded
from fedbt_app.config import EMBEDDED, RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.partition import partition as split_over_clients

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Columns = dict[str, list[Any]]  # column name -> one value a row
Tokenizer = Callable[[], "PreTrainedTokenizerFast"]

FORMAT = 1  # of the tokenised cache: raise it when the same input gives other examples
ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
SPLITS = ("train", "validation", "test")
MIN_TAIL = 8  # word pieces that make the last, short mlm chunk worth keeping
_BIO = re.compile(r"O|[BI]-.+")
_TEST_KEYS = (
    *("task", "dataset_subset", "text_column", "label_column", "tokens_column", "tags_column", "labels"),
    *("max_length", "test_fraction", "max_test_examples", "seed"),
)
_CLIENT_KEYS = (
    *(*_TEST_KEYS, "max_train_examples", "heldout_fraction"),
    *("partitioner", "dirichlet_alpha", "partition_weights", "partition_column"),
)


@dataclass(frozen=True)
class ClientData:
    """One client's tokenised examples.

    Every example has `input_ids`, [CLS] and [SEP] included; classification adds `label`, ner adds `tags`, one
    per piece and empty where the piece is not the first of a word. `label_counts` covers train and heldout:
    rows per class (classification), tags per name with `O` (ner), nothing (mlm).
    """

    train: "Dataset"
    heldout: "Dataset"
    label_counts: dict[str, int]


def client_data(
    config: RunConfig, tokenizer: Tokenizer, tokenizer_id: str, partition: tuple[int, int] | None
) -> ClientData:
    """Return the examples of one client, from the cache where they were made before.

    Parameters
    ----------
    tokenizer
        Called only when the examples have to be made.
    tokenizer_id
        Names the tokenizer in the cache key: another tokenizer must have another id.
    partition
        `(k, n)` for the k-th (from 0) of n simulated clients; None for a site whose data is all its own.

    Raises
    ------
    FedBTError
        If the data is missing, malformed, empty or cannot be split over n clients.
    """

    def build() -> tuple[dict[str, Columns], dict[str, int]]:
        rows = _take(_rows(config, "train"), config.max_train_examples, _rng(config.seed, "train"))
        if partition:
            client, clients = partition
            if not 0 <= client < clients:
                raise FedBTError(f"client {client} of {clients} does not exist: count clients from 0")
            rows = _select(rows, split_over_clients(config, _length(rows), rows, clients)[client])
        heldout, train = _carve(rows, config.heldout_fraction, _rng(config.seed, f"heldout {partition}"))
        made = _tokenise(config, tokenizer(), {"train": train, "heldout": heldout})
        if not _length(made["train"]):
            raise FedBTError(f"dataset={config.dataset} leaves nothing to train on: give this client more rows")
        return made, _label_counts(config.task, made.values())

    splits, counts = _cached(config, _CLIENT_KEYS, ["client", partition], tokenizer_id, build)
    return ClientData(splits["train"], splits["heldout"], counts)


def test_data(config: RunConfig, tokenizer: Tokenizer, tokenizer_id: str) -> "Dataset":
    """Return the examples of the central test set: split `test`, else `validation`, else a share of `train`.

    Parameters are those of `client_data`. Rows carved off `train` are the same on every machine, and never in
    any client's examples.
    """

    def build() -> tuple[dict[str, Columns], dict[str, int]]:
        rows = _take(_rows(config, "test"), config.max_test_examples, _rng(config.seed, "cap test"))
        made = _tokenise(config, tokenizer(), {"test": rows})
        if not _length(made["test"]):
            raise FedBTError(
                f"dataset={config.dataset} has no test rows: raise test-fraction or add a test split"
            )
        return made, {}

    return _cached(config, _TEST_KEYS, ["test"], tokenizer_id, build)[0]["test"]


def describe(config: RunConfig) -> str:
    """Return name, source and version of the data for a model card: no text and no folder of this machine."""
    if config.dataset == EMBEDDED:
        return embedded.describe()
    files = _files(config.dataset)
    if files is None:
        return f"hub data set {config.dataset}, subset {config.dataset_subset or 'default'}"
    return f"local data {Path(config.dataset).name} ({', '.join(file.name for file in files.values())})"


# Splits of rows -----------------------------------------------------------------------------------------------


def _rows(config: RunConfig, wanted: str) -> Columns:
    """Return the checked rows of `train` or `test`, before any cap."""
    splits = _splits(config)
    test = next((name for name in ("test", "validation") if name in splits), None)
    if wanted == "test" and test:
        return _checked(config, splits[test](), test)
    if "train" not in splits:
        raise FedBTError(f"dataset={config.dataset} has no split train: add one, e.g. a file train.jsonl")
    rows = _checked(config, splits["train"](), "train")
    if test:
        return rows
    for_test, for_train = _carve(rows, config.test_fraction, _rng(config.seed, "test"))
    return for_test if wanted == "test" else for_train


def _rng(seed: int, use: str) -> np.random.Generator:
    """Return a generator of its own for each use of the seed."""
    return np.random.default_rng([seed, *use.encode()])


def _carve(columns: Columns, fraction: float, rng: np.random.Generator) -> tuple[Columns, Columns]:
    """Return (carved, rest): at least one row each where `fraction` > 0 and there are two rows."""
    rows = _length(columns)
    carved = min(max(round(rows * fraction), 1), rows - 1) if fraction > 0 and rows > 1 else 0
    order = rng.permutation(rows)
    return _select(columns, np.sort(order[:carved])), _select(columns, np.sort(order[carved:]))


def _take(columns: Columns, at_most: int, rng: np.random.Generator) -> Columns:
    rows = _length(columns)
    if not 0 < at_most < rows:
        return columns
    return _select(columns, np.sort(rng.permutation(rows)[:at_most]))


def _select(columns: Columns, rows: Iterable[Any]) -> Columns:
    chosen = [int(row) for row in rows]
    return {name: [values[row] for row in chosen] for name, values in columns.items()}


def _length(columns: Mapping[str, Sequence[Any]]) -> int:
    return len(next(iter(columns.values()))) if columns else 0


# Loading ------------------------------------------------------------------------------------------------------


def _splits(config: RunConfig) -> dict[str, Callable[[], Columns]]:
    """Return a reader of each split that the data set has."""
    if config.dataset == EMBEDDED:
        return {name: partial(_columns, rows) for name, rows in embedded.rows(config.task).items()}
    files = _files(config.dataset)
    if files is not None:
        return {split: partial(_read, file) for split, file in files.items()}
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(
            config.dataset, config.dataset_subset or None, cache_dir=str(config.cache_folder / "hub")
        )
    except Exception as error:  # whatever the hub client raises: its text may quote rows, its type does not
        raise FedBTError(
            f"dataset={config.dataset} could not be had from the hub ({type(error).__name__}): check the name, "
            "dataset-subset and the network, or give the path of a local file or folder"
        ) from None
    return {name: partial(_from_hub, split) for name, split in loaded.items()}


def _files(dataset: str) -> dict[str, Path] | None:
    """Return split -> file of a local data set, None for a hub id."""
    path = Path(dataset).expanduser()
    if path.is_file():
        _ending(path)
        return {"train": path}
    if not path.is_dir():
        looks_local = dataset.startswith((os.sep, ".", "~")) or _bare(path).endswith(ENDINGS)
        if looks_local:
            raise FedBTError(f"no such file: dataset={dataset}; give the path of a file or folder that exists")
        return None
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        split, _, ending = _bare(file).rpartition(".")
        if split in SPLITS and f".{ending}" in ENDINGS:
            if split in files:
                raise FedBTError(f"{files[split].name} and {file.name} are both split {split}: remove one")
            files[split] = file
    if not files:
        raise FedBTError(
            f"dataset={dataset} has no file train, validation or test: name one e.g. train.jsonl "
            f"(or {' '.join(ENDINGS[1:])}, also .gz)"
        )
    return files


def _bare(path: Path) -> str:
    return path.name.lower().removesuffix(".gz")


def _ending(path: Path) -> str:
    for ending in ENDINGS:
        if _bare(path).endswith(ending):
            return ending
    raise FedBTError(f"{path.name} is of no known kind: use {' '.join(ENDINGS)}, also .gz")


def _read(path: Path) -> Columns:
    """Read one file as columns; classes stored as numbers become names where the file has the names."""
    read = READERS[_ending(path)]
    try:
        content = path.read_bytes()
        return read(gzip.decompress(content) if path.name.lower().endswith(".gz") else content)
    except FedBTError as error:
        raise FedBTError(f"{path.name}: {error}") from None
    except (OSError, ValueError, EOFError, csv.Error, zlib.error) as error:
        raise FedBTError(f"{path.name} cannot be read ({type(error).__name__}): mend or replace it") from None


def _read_json(content: bytes) -> Columns:
    rows = []
    for number, line in enumerate(io.StringIO(content.decode("utf-8-sig")), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise FedBTError(f"line {number} is no JSON object: write JSON lines, one object a line")
            rows.append(row)
    return _columns(rows)


def _read_csv(content: bytes) -> Columns:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the module's 128 KiB
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise FedBTError(f"row {number} has more fields than the header: quote the fields that hold commas")
    return _columns(rows)


def _read_parquet(content: bytes) -> Columns:
    import datasets
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    return _named(table.to_pydict(), datasets.Features.from_arrow_schema(table.schema))


def _read_txt(content: bytes) -> Columns:
    return {"text": [line.strip() for line in io.StringIO(content.decode("utf-8-sig")) if line.strip()]}


READERS: dict[str, Callable[[bytes], Columns]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _from_hub(split: "Dataset") -> Columns:
    return _named(split.to_dict(), split.features)


def _columns(rows: Iterable[Mapping[str, Any]]) -> Columns:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _named(columns: Columns, features: Mapping[str, Any]) -> Columns:
    """Replace the numbers of every ClassLabel column, or column of ClassLabel lists, by their names."""
    from datasets import ClassLabel

    def name(feature: ClassLabel, value: Any) -> Any:
        if isinstance(value, list):
            return [name(feature, item) for item in value]
        return None if value is None or value < 0 else feature.int2str(value)  # -1 stands for no label

    for column, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, ClassLabel):
            columns[column] = [name(inner, value) for value in columns[column]]
    return columns


# Checks -------------------------------------------------------------------------------------------------------


def _checked(config: RunConfig, columns: Columns, split: str) -> Columns:
    """Return the columns that the task uses, rows without text dropped, labels as text."""
    needed = _NEEDED[config.task]
    for key in needed:
        if getattr(config, key) not in columns:
            raise FedBTError(
                f"split {split} has no column {getattr(config, key)!r}, only "
                f"{', '.join(map(_shown, columns)) or 'none'}: set {key.replace('_', '-')} to the right one"
            )
    used = {getattr(config, key) for key in (*needed, "label_column", "partition_column")}
    columns = {name: values for name, values in columns.items() if name in used}
    if config.task == "classification":
        columns[config.label_column] = [_text_of(label) for label in columns[config.label_column]]
    check = _check_words if config.task == "ner" else _check_text
    known = frozenset(config.label_names)
    kept = []
    for row in range(_length(columns)):
        labels = check(
            config, {name: values[row] for name, values in columns.items()}, f"{split} row {row + 1}"
        )
        for label in labels or ():
            if known and label not in known:
                raise FedBTError(
                    f"{split} row {row + 1} has the label {_shown(label)}, not one of {config.labels}: "
                    "mend the row, or add the label to labels"
                )
        if labels is not None:
            kept.append(row)
    if not kept:
        raise FedBTError(
            f"split {split} has no row with text in column {getattr(config, needed[0])!r}: add some"
        )
    return _select(columns, kept)


_NEEDED = {
    "mlm": ("text_column",),
    "classification": ("text_column", "label_column"),
    "ner": ("tokens_column", "tags_column"),
}


def _check_text(config: RunConfig, row: Mapping[str, Any], where: str) -> Sequence[str] | None:
    """Return the row's label, if the task has labels; None for a row without text."""
    text = row[config.text_column]
    if text is not None and not isinstance(text, str):
        raise FedBTError(
            f"{where}: column {config.text_column!r} holds no text: set text-column, or mend the row"
        )
    if not text or not text.strip():
        return None
    if config.task == "mlm":
        return ()
    if not row[config.label_column]:
        raise FedBTError(f"{where}: column {config.label_column!r} has no label: fill it, or drop the row")
    return (row[config.label_column],)


def _check_words(config: RunConfig, row: Mapping[str, Any], where: str) -> Sequence[str] | None:
    """Return the row's tags; None for a row without words. A bad tag is not quoted: it may be a word."""
    tokens, tags = row[config.tokens_column] or [], row[config.tags_column] or []
    if not isinstance(tokens, list) or not isinstance(tags, list):
        raise FedBTError(
            f"{where}: columns {config.tokens_column!r} and {config.tags_column!r} must hold lists: "
            "set tokens-column and tags-column, or use jsonl or parquet"
        )
    if len(tokens) != len(tags):
        raise FedBTError(f"{where} has {len(tokens)} tokens but {len(tags)} tags: give every token one tag")
    for place, (token, tag) in enumerate(zip(tokens, tags, strict=True), start=1):
        if not isinstance(token, str):
            raise FedBTError(f"{where}: token {place} of column {config.tokens_column!r} is no text: mend it")
        if not isinstance(tag, str) or not _BIO.fullmatch(tag):
            raise FedBTError(
                f"{where}: tag {place} of column {config.tags_column!r} is none of O, B-x, I-x: "
                "set tags-column, or write BIO tags"
            )
    return tags if any(token.strip() for token in tokens) else None


def _text_of(label: Any) -> str:
    return "" if label is None or label != label else str(label).strip()  # NaN is how parquet may say none


def _shown(name: str) -> str:
    """Quote a name for a message, unless it is so long that it may be local text in the wrong place."""
    return repr(name) if len(name) <= 40 else f"(a name of {len(name)} characters)"


# Word pieces --------------------------------------------------------------------------------------------------


def _tokenise(
    config: RunConfig, tokenizer: "PreTrainedTokenizerFast", splits: Mapping[str, Columns]
) -> dict[str, Columns]:
    encode = {"mlm": _encode_mlm, "classification": _encode_text, "ner": _encode_words}[config.task]
    return {name: encode(config, tokenizer, rows) for name, rows in splits.items()}


def _batches(values: list[Any], size: int = 1000) -> Iterator[list[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _encode_text(config: RunConfig, tokenizer: "PreTrainedTokenizerFast", rows: Columns) -> Columns:
    ids: list[list[int]] = []
    for texts in _batches(rows[config.text_column]):
        ids += tokenizer(texts, truncation=True, max_length=config.max_length)["input_ids"]
    return {"input_ids": ids, "label": rows[config.label_column]}


def _encode_words(config: RunConfig, tokenizer: "PreTrainedTokenizerFast", rows: Columns) -> Columns:
    """Give the first piece of each word the word's tag, and every other piece an empty one."""
    made: Columns = {"input_ids": [], "tags": []}
    tags = iter(rows[config.tags_column])
    for words in _batches(rows[config.tokens_column]):
        coded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=config.max_length)
        made["input_ids"] += coded["input_ids"]
        for row in range(len(words)):
            left = dict(enumerate(next(tags)))
            made["tags"].append(["" if word is None else left.pop(word, "") for word in coded.word_ids(row)])
    return made


def _encode_mlm(config: RunConfig, tokenizer: "PreTrainedTokenizerFast", rows: Columns) -> Columns:
    """Join all texts with [SEP] and cut them into chunks of `max_length`, [CLS] and [SEP] around each."""
    first, last, body = tokenizer.cls_token_id, tokenizer.sep_token_id, config.max_length - 2
    stream = array("i")
    for texts in _batches(rows[config.text_column]):
        for pieces in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            if stream and pieces:
                stream.append(last)
            stream.extend(pieces)
    chunks = [stream[start : start + body].tolist() for start in range(0, len(stream), body)]
    if chunks and len(chunks[-1]) < min(MIN_TAIL, body):
        chunks.pop()
    return {"input_ids": [[first, *chunk, last] for chunk in chunks]}


def _label_counts(task: str, splits: Iterable[Columns]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for split in splits:
        if task == "classification":
            counts.update(split["label"])
        elif task == "ner":
            counts.update(tag for tags in split["tags"] for tag in tags if tag)
    return dict(sorted(counts.items()))


# Cache --------------------------------------------------------------------------------------------------------


def _cached(
    config: RunConfig,
    keys: Iterable[str],
    use: list[Any],
    tokenizer_id: str,
    build: Callable[[], tuple[dict[str, Columns], dict[str, int]]],
) -> tuple[dict[str, "Dataset"], dict[str, int]]:
    """Return (split -> examples, label counts) from the cache, after building them if need be."""
    settings = {key: getattr(config, key) for key in keys}
    identity = json.dumps([FORMAT, use, tokenizer_id, _identity(config), settings], sort_keys=True)
    folder = config.cache_folder / "tokenised" / hashlib.sha256(identity.encode()).hexdigest()
    try:
        return _open(folder)
    except Exception:  # absent, or corrupt in whatever way: make it anew
        splits, counts = build()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name[:8]}.", dir=folder.parent))
        try:
            _save(scratch, splits, counts)
            return _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise FedBTError(
            f"the cache {config.cache_folder} cannot be written ({error.strerror or type(error).__name__}): "
            "free some space, or set cache-dir to a folder that can be written"
        ) from None


def _identity(config: RunConfig) -> list[Any]:
    """Return what tells this data set, in this state, from any other."""
    files = {EMBEDDED: embedded.path()} if config.dataset == EMBEDDED else _files(config.dataset)
    if files is None:
        return [config.dataset]
    stats = {split: file.resolve().stat() for split, file in files.items()}
    return [[name, str(files[name].resolve()), stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]


def _dataset(columns: Columns) -> "Dataset":
    from datasets import Dataset, Features, List, Value

    kinds = {"input_ids": List(Value("int32")), "label": Value("string"), "tags": List(Value("string"))}
    return Dataset.from_dict(columns, features=Features({name: kinds[name] for name in columns}))


def _save(folder: Path, splits: Mapping[str, Columns], counts: Mapping[str, int]) -> None:
    import datasets

    datasets.disable_progress_bars()
    for name, columns in splits.items():
        if _length(columns):  # datasets cannot read back what has no rows
            _dataset(columns).save_to_disk(folder / name)
    about = {
        "rows": {name: _length(columns) for name, columns in splits.items()},
        "columns": list(next(iter(splits.values()))),
        "label_counts": counts,
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _open(folder: Path) -> tuple[dict[str, "Dataset"], dict[str, int]]:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    from datasets import Dataset

    splits = {
        name: Dataset.load_from_disk(folder / name)
        if rows
        else _dataset({column: [] for column in about["columns"]})
        for name, rows in about["rows"].items()
    }
    return splits, about["label_counts"]


def _publish(scratch: Path, folder: Path) -> tuple[dict[str, "Dataset"], dict[str, int]]:
    """Rename to the final name at once, unless another process was faster: then its examples are the same."""
    try:
        scratch.rename(folder)
    except OSError:
        try:
            return _open(folder)
        except Exception:  # a corrupt entry stands in the way
            shutil.rmtree(folder, ignore_errors=True)
            scratch.rename(folder)
    return _open(folder)
