"""From a data set's name to checked raw columns: embedded rows, local files or a hub data set.

Local text never enters an error message.
"""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbt_app.config import EMBEDDED, RunConfig
from fedbt_app.data import phenotypes
from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Columns

if TYPE_CHECKING:
    from datasets import ClassLabel, Dataset

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
SPLITS = ("train", "validation", "test")
LONGEST_NAME_SHOWN = 40


def readers(config: RunConfig) -> dict[str, Callable[[], Columns]]:
    """Return a reader of each split that the data set has."""
    if config.dataset == EMBEDDED:
        embedded = _embedded_rows(config)
        return {split: partial(_columns, rows) for split, rows in embedded.items()}
    files = local_files(config.dataset)
    if files is not None:
        return {split: partial(_read, file) for split, file in files.items()}
    loaded = _load_from_hub(config)
    return {name: partial(_from_hub, split) for name, split in loaded.items()}


def _load_from_hub(config: RunConfig) -> Mapping[str, "Dataset"]:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded: Mapping[str, Dataset] = datasets.load_dataset(
            config.dataset,
            config.dataset_subset or None,
            cache_dir=str(config.cache_folder / "hub"),
        )
    # whatever the hub client raises: its text may quote rows, its type does not
    except Exception as error:
        kind = type(error).__name__
        raise FedBTError(
            f"dataset={config.dataset} could not be had from the hub ({kind}): "
            "check the name, dataset-subset and the network, "
            "or give the path of a local file or folder"
        ) from None
    return loaded


def _embedded_rows(config: RunConfig) -> dict[str, list[phenotypes.Row]]:
    task = TASKS[config.task]
    if not task.embedded_rows:
        keys = " and ".join(key.replace("_", "-") for key in task.columns)
        raise FedBTError(
            f"dataset=embedded has nothing for task={task.name}: "
            "set dataset to a file, a folder or a hub id "
            f"that has the columns which {keys} name"
        )
    return phenotypes.ROWS[task.embedded_rows]()


def local_files(dataset: str) -> dict[str, Path] | None:
    """Return split -> file of a local data set, None for a hub id."""
    path = Path(dataset).expanduser()
    if path.is_file():
        _ending(path)  # refuses a kind that cannot be read
        return {"train": path}
    if path.is_dir():
        return _split_files(path, dataset)
    begins_as_path = dataset.startswith((os.sep, ".", "~"))
    ends_as_file = _bare(path).endswith(ENDINGS)
    if begins_as_path or ends_as_file:
        raise FedBTError(
            f"no such file: dataset={dataset}; give the path of a file or folder that exists"
        )
    return None


def _split_files(folder: Path, dataset: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        split, _, ending = _bare(file).rpartition(".")
        if split not in SPLITS or f".{ending}" not in ENDINGS:
            continue
        if split in files:
            raise FedBTError(
                f"{files[split].name} and {file.name} are both split {split}: remove one"
            )
        files[split] = file
    if not files:
        others = " ".join(ENDINGS[1:])
        raise FedBTError(
            f"dataset={dataset} has no file train, validation or test: "
            f"name one e.g. train.jsonl (or {others}, also .gz)"
        )
    return files


def _bare(path: Path) -> str:
    return path.name.lower().removesuffix(".gz")


def _ending(path: Path) -> str:
    for ending in ENDINGS:
        if _bare(path).endswith(ending):
            return ending
    known = " ".join(ENDINGS)
    raise FedBTError(f"{path.name} is of no known kind: use {known}, also .gz")


def _read(path: Path) -> Columns:
    """Read one file as columns; class numbers become names where the file has the names."""
    read = READERS[_ending(path)]
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        return read(content)
    except FedBTError as error:
        raise FedBTError(f"{path.name}: {error}") from None
    except (OSError, ValueError, EOFError, csv.Error, zlib.error) as error:
        raise FedBTError(
            f"{path.name} cannot be read ({type(error).__name__}): mend or replace it"
        ) from None


def _read_json(content: bytes) -> Columns:
    rows = []
    for number, line in enumerate(_text(content), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise FedBTError(
                f"line {number} is no JSON object: write JSON lines, one object a line"
            )
        rows.append(row)
    return _columns(rows)


def _read_csv(content: bytes) -> Columns:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the module's 128 KiB
    # newline="": a line break inside quotes is the module's business
    rows = list(csv.DictReader(_text(content, newline="")))
    for number, row in enumerate(rows, start=1):
        if None in row:  # where DictReader puts what has no header
            raise FedBTError(
                f"row {number} has more fields than the header: quote the fields that hold commas"
            )
    return _columns(rows)


def _read_parquet(content: bytes) -> Columns:
    import datasets
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    return _named(table.to_pydict(), datasets.Features.from_arrow_schema(table.schema))


def _read_txt(content: bytes) -> Columns:
    lines = [line.strip() for line in _text(content)]
    return {"text": [line for line in lines if line]}


def _text(content: bytes, newline: str = "\n") -> io.StringIO:
    """Decode a file; what editors on Windows put before the text (a byte order mark) goes."""
    return io.StringIO(content.decode("utf-8-sig"), newline=newline)


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
    names: dict[str, None] = {}  # a set in order of appearance
    for row in rows:
        names |= dict.fromkeys(row)
    columns = {}
    for name in names:
        columns[name] = [row.get(name) for row in rows]
    return columns


def _named(columns: Columns, features: Mapping[str, Any]) -> Columns:
    """Replace numbers by names in the columns of ClassLabel values, or of lists of those."""
    from datasets import ClassLabel

    for column, feature in features.items():
        inner = getattr(feature, "feature", feature)  # a list's feature is that of its items
        if isinstance(inner, ClassLabel):
            columns[column] = [_class_name(inner, value) for value in columns[column]]
    return columns


def _class_name(label: "ClassLabel", value: Any) -> Any:
    if isinstance(value, list):
        return [_class_name(label, item) for item in value]
    if value is None or value < 0:  # -1 stands for no label
        return None
    return label.int2str(value)


def identity(config: RunConfig) -> list[Any]:
    """Return what tells this data set, in this state, from any other."""
    files: dict[str, Path] | None
    if config.dataset == EMBEDDED:
        files = {EMBEDDED: phenotypes.path()}
    else:
        files = local_files(config.dataset)
    if files is None:
        return [config.dataset]
    found = []
    for split, file in files.items():
        path = file.resolve()
        stat = path.stat()
        found.append([split, str(path), stat.st_size, stat.st_mtime_ns])
    return found


def select(columns: Columns, rows: Iterable[Any]) -> Columns:
    """Return the rows of these numbers, in that order."""
    numbers = [int(row) for row in rows]
    chosen = {}
    for name, values in columns.items():
        chosen[name] = [values[number] for number in numbers]
    return chosen


def length(columns: Mapping[str, Sequence[Any]]) -> int:
    """Return the number of rows."""
    if not columns:
        return 0
    some_column = next(iter(columns.values()))  # all have as many
    return len(some_column)


def checked(config: RunConfig, columns: Columns, split: str) -> Columns:
    """Return the columns that the task uses, rows without text dropped, labels as text."""
    task = TASKS[config.task]
    columns = task.prepared(config, _used(config, columns, split))
    known = frozenset(config.label_names)
    kept = []
    for index in range(length(columns)):
        row = {name: values[index] for name, values in columns.items()}
        place = f"{split} row {index + 1}"
        labels = task.check(config, row, place)
        if labels is None:
            continue
        for label in labels:
            if known and label not in known:
                raise FedBTError(
                    f"{place} has the label {_shown(label)}, not one of {config.labels}: "
                    "mend the row, or add the label to labels"
                )
        kept.append(index)
    if not kept:
        text = getattr(config, task.columns[0])
        raise FedBTError(f"split {split} has no row with text in column {text!r}: add some")
    return select(columns, kept)


def _used(config: RunConfig, columns: Columns, split: str) -> Columns:
    """Return the columns that the settings name; FedBTError when the task lacks one of its own."""
    own = TASKS[config.task].columns
    for key in own:
        name = getattr(config, key)
        if name not in columns:
            there = ", ".join(map(_shown, columns)) or "none"
            setting = key.replace("_", "-")
            raise FedBTError(
                f"split {split} has no column {name!r}, only {there}: "
                f"set {setting} to the right one"
            )
    used = {getattr(config, key) for key in (*own, "label_column", "partition_column")}
    return {name: values for name, values in columns.items() if name in used}


def _shown(name: str) -> str:
    """Quote a name for a message, unless so long a name may be local text in the wrong place."""
    if len(name) > LONGEST_NAME_SHOWN:
        return f"(a name of {len(name)} characters)"
    return repr(name)
