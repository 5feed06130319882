"""From a data set's name to checked raw columns: embedded rows, local files or a hub data set.

Local text never enters an error message.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedbt_app.config import EMBEDDED, RunConfig
from fedbt_app.data import phenotypes
from fedbt_app.data.readers import ENDINGS, ending_of, is_readable_folder, read
from fedbt_app.data.readers.arrow_files import is_saved, read_dataset, saved_splits
from fedbt_app.data.readers.opened import bare
from fedbt_app.data.readers.table import Table, Wanted, length, table_of
from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Columns
from fedbt_app.tasks.notes import Notes

SPLITS = {  # as files and folders are called -> as the run calls it
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")  # a split in several files, as the hub keeps it


def readers(config: RunConfig) -> dict[str, Callable[[], Table]]:
    """Return a reader of each split that the data set has."""
    wanted = wanted_of(config)
    if config.dataset == EMBEDDED:
        return {
            split: partial(table_of, rows, wanted, Notes())
            for split, rows in _embedded_rows(config).items()
        }
    files = local_files(config.dataset)
    if files is not None:
        return {split: partial(read, paths, wanted) for split, paths in files.items()}
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
    return {
        SPLITS.get(name, name): partial(read_dataset, split, wanted, f"hub split {name}")
        for name, split in loaded.items()
    }


def wanted_of(config: RunConfig) -> Wanted:
    """Return what a run reads of the files of its data set."""
    task = TASKS[config.task]
    keys = (*task.columns, "label_column", "partition_column")
    return Wanted(
        frozenset(getattr(config, key) for key in keys) - {""},
        text=config.text_column,
        label=config.label_column,
        tokens=config.tokens_column,
        tags=config.tags_column,
        words="tokens_column" in task.columns,
    )


def _embedded_rows(config: RunConfig) -> dict[str, list[phenotypes.Row]]:
    task = TASKS[config.task]
    if not task.embedded_rows:
        keys = " and ".join(key.replace("_", "-") for key in task.columns)
        raise FedBTError(
            f"dataset=embedded has nothing for task={task.name}: set dataset to a file, a folder or a hub id that has "
            f"the columns which {keys} name"
        )
    return phenotypes.ROWS[task.embedded_rows]()


def local_files(dataset: str) -> dict[str, list[Path]] | None:
    """Return split -> files, or the folder, of a local data set; None for a hub id."""
    path = Path(dataset).expanduser()
    if path.is_file():
        ending_of(path)
        return {"train": [path]}
    if not path.is_dir():
        looks_local = dataset.startswith((os.sep, ".", "~")) or bare(path).endswith(ENDINGS)
        if looks_local:
            raise FedBTError(
                f"no such file: dataset={dataset}; give the path of a file or folder that exists"
            )
        return None
    found = _saved(path) or _splits_in(path)
    if not found and is_readable_folder(path):
        return {"train": [path]}
    if not found:
        raise FedBTError(
            f"dataset={dataset} has no file or folder train, validation or test, and no .txt files: "
            f"name one e.g. train.jsonl (or {' '.join(ENDINGS[1:])}, also .gz)"
        )
    return found


def _saved(path: Path) -> dict[str, list[Path]]:
    """Return the splits of a DatasetDict on disk, or the one of a Dataset."""
    if is_saved(path):
        return {"train": [path]}
    found: dict[str, list[Path]] = {}
    for name in saved_splits(path):
        split = SPLITS.get(name.lower(), name)
        _check_single(found, split, path / name)
        found[split] = [path / name]
    return found


def _splits_in(path: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        name, ending = file.name.lower(), ""
        if not file.is_dir():
            name, _, ending = bare(file).rpartition(".")
        if f".{ending}" not in ENDINGS and not is_readable_folder(file):
            continue
        split = SPLITS.get(_SHARD.sub("", name))
        if split is None:
            continue
        if _SHARD.search(name) and all(
            _SHARD.search(_stem(other)) for other in found.get(split, [])
        ):
            found.setdefault(split, []).append(file)
            continue
        _check_single(found, split, file)
        found[split] = [file]
    return found


def _stem(file: Path) -> str:
    return bare(file).rpartition(".")[0]


def _check_single(found: Mapping[str, Sequence[Path]], split: str, file: Path) -> None:
    if split in found:
        raise FedBTError(
            f"{found[split][0].name} and {file.name} are both split {split}: remove one"
        )


def identity(config: RunConfig) -> list[Any]:
    """Return what tells this data set, in this state, from any other."""
    if config.dataset == EMBEDDED:
        return [["embedded", *_state(phenotypes.path())]]
    files = local_files(config.dataset)
    if files is None:
        return [config.dataset]
    return [
        [split, *_state(file)]
        for split, paths in files.items()
        for path in paths
        for file in _files_below(path)
    ]


def _files_below(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def _state(file: Path) -> list[Any]:
    stat = file.resolve().stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def select(columns: Columns, rows: Iterable[Any]) -> Columns:
    """Return the rows of these numbers, in that order."""
    chosen = [int(row) for row in rows]
    return {name: [values[row] for row in chosen] for name, values in columns.items()}


def checked(config: RunConfig, table: Table, split: str) -> Columns:
    """Return the columns that the task uses, rows without text dropped, labels as text.

    The table's notes get what the task has to say of it, and its label counts are filled in.
    """
    task = TASKS[config.task]
    for key in task.columns:
        if getattr(config, key) not in table.columns:
            # not what they are called: without a header, names are cells
            raise FedBTError(
                f"split {split} has {table.width} columns, none is called {getattr(config, key)!r}: "
                f"set {key.replace('_', '-')} to the right one; a table needs a first row of names"
            )
    try:
        columns = task.prepared(config, table.columns, table.notes)
    except FedBTError as error:
        raise FedBTError(f"split {split}: {error}") from None
    known = frozenset(task.given_labels(config.label_names))
    allowed = task.allowed(config.allowed_names)
    kept = []
    for number in range(length(columns)):
        row = {name: values[number] for name, values in columns.items()}
        labels = task.check(config, row, f"{split} row {number + 1}")
        for label in labels or ():
            if known and label not in known:
                raise FedBTError(
                    f"{split} row {number + 1} has a label that is not one of {config.labels}: "
                    "mend the row, or add the label to labels"
                )
            if allowed and (name := task.plain_name(label)) and name not in allowed:
                raise FedBTError(
                    f"{split} row {number + 1} has a label that labels-allowed does not list: "
                    "mend the row, or add the label there"
                )
        if labels is not None:
            kept.append(number)
            table.label_counts.update(labels)
    if not kept:
        text = getattr(config, task.columns[0])
        raise FedBTError(f"split {split} has no row with text in column {text!r}: add some")
    return select(columns, kept)
