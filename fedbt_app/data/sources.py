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
    from datasets import Dataset

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
SPLITS = ("train", "validation", "test")


def readers(config: RunConfig) -> dict[str, Callable[[], Columns]]:
    """Return a reader of each split that the data set has."""
    if config.dataset == EMBEDDED:
        return {split: partial(_columns, rows) for split, rows in _embedded_rows(config).items()}
    files = local_files(config.dataset)
    if files is not None:
        return {split: partial(_read, file) for split, file in files.items()}
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(
            config.dataset,
            config.dataset_subset or None,
            cache_dir=str(config.cache_folder / "hub"),
        )
    # whatever the hub client raises: its text may quote rows, its type does not
    except Exception as error:
        raise FedBTError(
            f"dataset={config.dataset} could not be had from the hub ({type(error).__name__}): check the name, "
            "dataset-subset and the network, or give the path of a local file or folder"
        ) from None
    return {name: partial(_from_hub, split) for name, split in loaded.items()}


def _embedded_rows(config: RunConfig) -> dict[str, list[phenotypes.Row]]:
    task = TASKS[config.task]
    if not task.embedded_rows:
        keys = " and ".join(key.replace("_", "-") for key in task.columns)
        raise FedBTError(
            f"dataset=embedded has nothing for task={task.name}: set dataset to a file, a folder or a hub id that has "
            f"the columns which {keys} name"
        )
    return phenotypes.ROWS[task.embedded_rows]()


def local_files(dataset: str) -> dict[str, Path] | None:
    """Return split -> file of a local data set, None for a hub id."""
    path = Path(dataset).expanduser()
    if path.is_file():
        _ending(path)
        return {"train": path}
    if not path.is_dir():
        looks_local = dataset.startswith((os.sep, ".", "~")) or _bare(path).endswith(ENDINGS)
        if looks_local:
            raise FedBTError(
                f"no such file: dataset={dataset}; give the path of a file or folder that exists"
            )
        return None
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        split, _, ending = _bare(file).rpartition(".")
        if split in SPLITS and f".{ending}" in ENDINGS:
            if split in files:
                raise FedBTError(
                    f"{files[split].name} and {file.name} are both split {split}: remove one"
                )
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
    """Read one file as columns; classes stored as numbers become names where the file has the
    names.
    """
    read = READERS[_ending(path)]
    try:
        content = path.read_bytes()
        return read(gzip.decompress(content) if path.name.lower().endswith(".gz") else content)
    except FedBTError as error:
        raise FedBTError(f"{path.name}: {error}") from None
    except (OSError, ValueError, EOFError, csv.Error, zlib.error) as error:
        raise FedBTError(
            f"{path.name} cannot be read ({type(error).__name__}): mend or replace it"
        ) from None


def _read_json(content: bytes) -> Columns:
    rows = []
    for number, line in enumerate(io.StringIO(content.decode("utf-8-sig")), start=1):
        if line.strip():
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
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    for number, row in enumerate(rows, start=1):
        if None in row:
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
    return {
        "text": [line.strip() for line in io.StringIO(content.decode("utf-8-sig")) if line.strip()]
    }


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
    """Replace the numbers of every ClassLabel column, or column of ClassLabel lists, by their
    names.
    """
    from datasets import ClassLabel

    def name(feature: ClassLabel, value: Any) -> Any:
        if isinstance(value, list):
            return [name(feature, item) for item in value]
        # -1 stands for no label
        return None if value is None or value < 0 else feature.int2str(value)

    for column, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, ClassLabel):
            columns[column] = [name(inner, value) for value in columns[column]]
    return columns


def identity(config: RunConfig) -> list[Any]:
    """Return what tells this data set, in this state, from any other."""
    files = (
        {EMBEDDED: phenotypes.path()} if config.dataset == EMBEDDED else local_files(config.dataset)
    )
    if files is None:
        return [config.dataset]
    stats = {split: file.resolve().stat() for split, file in files.items()}
    return [
        [name, str(files[name].resolve()), stat.st_size, stat.st_mtime_ns]
        for name, stat in stats.items()
    ]


def select(columns: Columns, rows: Iterable[Any]) -> Columns:
    """Return the rows of these numbers, in that order."""
    chosen = [int(row) for row in rows]
    return {name: [values[row] for row in chosen] for name, values in columns.items()}


def length(columns: Mapping[str, Sequence[Any]]) -> int:
    """Return the number of rows."""
    return len(next(iter(columns.values()))) if columns else 0


def checked(config: RunConfig, columns: Columns, split: str) -> Columns:
    """Return the columns that the task uses, rows without text dropped, labels as text."""
    task = TASKS[config.task]
    for key in task.columns:
        if getattr(config, key) not in columns:
            raise FedBTError(
                f"split {split} has no column {getattr(config, key)!r}, only "
                f"{', '.join(map(_shown, columns)) or 'none'}: set {key.replace('_', '-')} to the right one"
            )
    used = {getattr(config, key) for key in (*task.columns, "label_column", "partition_column")}
    columns = task.prepared(
        config, {name: values for name, values in columns.items() if name in used}
    )
    known = frozenset(config.label_names)
    kept = []
    for number in range(length(columns)):
        row = {name: values[number] for name, values in columns.items()}
        labels = task.check(config, row, f"{split} row {number + 1}")
        for label in labels or ():
            if known and label not in known:
                raise FedBTError(
                    f"{split} row {number + 1} has the label {_shown(label)}, not one of {config.labels}: "
                    "mend the row, or add the label to labels"
                )
        if labels is not None:
            kept.append(number)
    if not kept:
        text = getattr(config, task.columns[0])
        raise FedBTError(f"split {split} has no row with text in column {text!r}: add some")
    return select(columns, kept)


def _shown(name: str) -> str:
    """Quote a name for a message, unless it is so long that it may be local text in the wrong
    place.
    """
    return repr(name) if len(name) <= 40 else f"(a name of {len(name)} characters)"
