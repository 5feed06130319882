"""The cache of tokenised examples: made once, saved whole or not at all, read back memory-mapped.

An entry's name covers all that decides what is in it; a corrupt entry is made anew.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbt_app.config import RunConfig
from fedbt_app.data.sources import identity, length
from fedbt_app.errors import FedBTError
from fedbt_app.files import replaced_folder
from fedbt_app.tasks.base import Columns

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 3  # raise it when the same input gives other examples

# split -> columns, the label counts, and the notes
Made = tuple[dict[str, Columns], dict[str, int], list[str]]
Found = tuple[dict[str, "Dataset"], dict[str, int], list[str]]  # the same, read back


def cached(
    config: RunConfig,
    keys: Iterable[str],
    use: list[Any],
    tokenizer_id: str,
    build: Callable[[], Made],
) -> Found:
    """Return (split -> examples, label counts, notes) from the cache, after building them if need be."""
    settings = {name: getattr(config, name) for name in keys}
    key = json.dumps([FORMAT, use, tokenizer_id, identity(config), settings], sort_keys=True)
    folder = config.cache_folder / "tokenised" / hashlib.sha256(key.encode()).hexdigest()
    try:
        return _open(folder)
    except Exception:  # absent, or corrupt in whatever way: make it anew
        splits, counts, notes = build()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replaced_folder(folder, keep=lambda: _is_whole(folder)) as scratch:
            _save(scratch, splits, counts, notes)
        return _open(folder)
    except OSError as error:
        raise FedBTError(
            f"the cache {config.cache_folder} cannot be written ({error.strerror or type(error).__name__}): "
            "free some space, or set cache-dir to a folder that can be written"
        ) from None


def _dataset(columns: Columns) -> "Dataset":
    """Make a data set; word pieces take four bytes each, other columns are what their
    values are.
    """
    import pyarrow
    from datasets import Dataset

    kinds = {"input_ids": pyarrow.list_(pyarrow.int32())}
    return Dataset(
        pyarrow.table(
            {name: pyarrow.array(values, kinds.get(name)) for name, values in columns.items()}
        )
    )


def _save(
    folder: Path, splits: Mapping[str, Columns], counts: Mapping[str, int], notes: list[str]
) -> None:
    import datasets

    datasets.disable_progress_bars()
    for name, columns in splits.items():
        if length(columns):  # datasets cannot read back what has no rows
            _dataset(columns).save_to_disk(folder / name)
    about = {
        "rows": {name: length(columns) for name, columns in splits.items()},
        "columns": list(next(iter(splits.values()))),
        "label_counts": counts,
        "notes": notes,
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _open(folder: Path) -> Found:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    from datasets import Dataset

    splits = {
        name: Dataset.load_from_disk(folder / name)
        if rows
        else _dataset({column: [] for column in about["columns"]})
        for name, rows in about["rows"].items()
    }
    return splits, about["label_counts"], about["notes"]


def _is_whole(folder: Path) -> bool:
    """Say whether another process was faster: then its examples are the same. A corrupt entry is
    not whole.
    """
    try:
        _open(folder)
    except Exception:  # absent, or corrupt in whatever way
        return False
    return True
