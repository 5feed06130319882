"""Parquet, Arrow and Feather files, and folders of `datasets.save_to_disk`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbt_app.data.readers.documents import SPAN_COLUMNS, Documents
from fedbt_app.data.readers.opened import binary
from fedbt_app.data.readers.table import Table, Wanted, check_unique, from_columns, table_of
from fedbt_app.errors import FedBTError
from fedbt_app.tasks.base import Columns, Row
from fedbt_app.tasks.notes import Notes

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

SPLITS_FILE = "dataset_dict.json"  # a DatasetDict on disk
STATE_FILE = "state.json"  # a Dataset on disk


def read_parquet(path: Path, wanted: Wanted) -> Table:
    """Read a Parquet file."""
    import pyarrow.parquet

    with binary(path) as stream:
        return _read(pyarrow.parquet.read_table(stream), wanted, f"{path.name}: Parquet")


def read_arrow(path: Path, wanted: Wanted) -> Table:
    """Read an Arrow file, an Arrow stream, or Feather."""
    import pyarrow
    import pyarrow.feather
    import pyarrow.ipc

    with binary(path) as stream:
        content = pyarrow.py_buffer(stream.read())
    start = content[:8].to_pybytes()
    if start.startswith(b"FEA1"):
        table = pyarrow.feather.read_table(pyarrow.BufferReader(content))
    elif start.startswith(b"ARROW1"):
        table = pyarrow.ipc.open_file(content).read_all()
    else:
        table = pyarrow.ipc.open_stream(content).read_all()
    return _read(table, wanted, f"{path.name}: Arrow")


def read_saved(path: Path, wanted: Wanted) -> Table:
    """Read a Dataset that `save_to_disk` wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:  # whatever the library raises: its text may quote rows
        raise FedBTError(
            f"it is no data set of save_to_disk ({type(error).__name__}): save it anew"
        ) from None
    return read_dataset(saved, wanted, f"{path.name}: data set on disk")


def read_dataset(data: "Dataset", wanted: Wanted, name: str) -> Table:
    """Take the wanted columns of a data set."""
    # a filtered or sorted data set has an index beside its table; to_dict follows it
    kept = [column for column in data.column_names if column in _with_spans(wanted)]
    columns = data.select_columns(kept).to_dict() if kept else {}
    table = _made(_named(columns, data.features), wanted, name)
    table.width = len(data.column_names)
    table.rows = len(data)
    return table


def is_saved(path: Path) -> bool:
    """Say whether a folder is a Dataset on disk."""
    return (path / STATE_FILE).is_file() and (path / "dataset_info.json").is_file()


def saved_splits(path: Path) -> list[str]:
    """Return the splits of a DatasetDict on disk; none where it is not one."""
    about = path / SPLITS_FILE
    if not about.is_file():
        return []
    try:
        return [str(split) for split in json.loads(about.read_text(encoding="utf-8"))["splits"]]
    except (ValueError, KeyError, TypeError):
        raise FedBTError(f"{SPLITS_FILE} names no splits: save the data set anew") from None


def _read(table: "pyarrow.Table", wanted: Wanted, name: str) -> Table:
    check_unique(table.column_names, wanted)
    kept = [column for column in table.column_names if column in _with_spans(wanted)]
    features = _features(table.schema)
    made = _made(_named(table.select(kept).to_pydict(), features), wanted, name)
    made.width = len(table.column_names)
    made.rows = table.num_rows
    return made


def _with_spans(wanted: Wanted) -> frozenset[str]:
    return wanted.columns | {wanted.text, *SPAN_COLUMNS} if wanted.words else wanted.columns


def _made(columns: Columns, wanted: Wanted, name: str) -> Table:
    notes = Notes()
    if wanted.words and wanted.tokens not in columns and wanted.text in columns:
        documents = Documents(wanted, notes, name.split(":")[0])
        table = table_of(documents.rows(_rows(columns)), wanted, notes)
        documents.tell()
    else:
        table = from_columns(columns, wanted, notes)
    notes.add(f"{name}, {table.rows} rows")
    return table


def _rows(columns: Columns) -> list[Row]:
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


# Names of classes ---------------------------------------------------------------------------------


def _features(schema: "pyarrow.Schema") -> Mapping[str, Any]:
    """Return the features that the datasets library left in a file; none where it did not write it.

    The schema itself is not asked: the library knows no dictionary columns.
    """
    import datasets

    about = (schema.metadata or {}).get(b"huggingface")
    if not about:
        return {}
    try:
        named: Mapping[str, Any] = datasets.Features.from_dict(
            json.loads(about)["info"]["features"]
        )
    except (ValueError, KeyError, TypeError):
        return {}
    return named


def _named(columns: Columns, features: Mapping[str, Any]) -> Columns:
    """Replace the numbers of every ClassLabel column, or column of ClassLabel lists, by names."""
    from datasets import ClassLabel

    def name(feature: ClassLabel, value: Any) -> Any:
        if isinstance(value, list):
            return [name(feature, item) for item in value]
        # -1 stands for no label
        return None if value is None or value < 0 else feature.int2str(value)

    for column in columns:
        feature = features.get(column)
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, ClassLabel):
            columns[column] = [name(inner, value) for value in columns[column]]
    return columns
