"""The cache of tokenised examples: made once, saved whole or not at all, read back memory-mapped.

An entry's name covers all that decides what is in it; a corrupt entry is made anew.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbt_app.config import RunConfig
from fedbt_app.data.readers.table import length
from fedbt_app.data.sources import identity
from fedbt_app.errors import FedBTError
from fedbt_app.files import replaced_folder
from fedbt_app.tasks.base import Columns
from fedbt_app.tasks.fit import Fit

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 5  # raise it when the same input gives other examples
ABOUT = "about.json"  # what is in an entry's folder


@dataclass(frozen=True)
class Facts:
    """What is known of examples beside themselves: counts only.

    Attributes
    ----------
    available : rows there were before a cap
    notes : how the files were read
    """

    label_counts: dict[str, int]
    fit: Fit
    available: int
    notes: list[str]


Made = tuple[dict[str, Columns], Facts]  # split -> columns, and the facts
Found = tuple[dict[str, "Dataset"], Facts]  # the same, read back


def cached(
    config: RunConfig,
    keys: Iterable[str],
    use: list[Any],
    tokenizer_id: str,
    build: Callable[[], Made],
) -> Found:
    """Return (split -> examples, facts) from the cache, after building them if need be."""
    settings = {name: getattr(config, name) for name in keys}
    decisive = [FORMAT, use, tokenizer_id, identity(config), settings]
    folder = config.cache_folder / "tokenised" / _digest(decisive)
    try:
        return _open(folder)
    except Exception:  # absent, or corrupt in whatever way: make it anew
        splits, facts = build()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replaced_folder(folder, keep=lambda: _is_whole(folder)) as scratch:
            _save(scratch, splits, facts)
        return _open(folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise FedBTError(
            f"the cache {config.cache_folder} cannot be written ({reason}): "
            "free some space, or set cache-dir to a folder that can be written"
        ) from None


def _digest(decisive: list[Any]) -> str:
    key = json.dumps(decisive, sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()


def _dataset(columns: Columns) -> "Dataset":
    """Make a data set: word pieces take four bytes each, other columns what their values need."""
    import pyarrow
    from datasets import Dataset

    kinds = {"input_ids": pyarrow.list_(pyarrow.int32())}
    arrays = {}
    for name, values in columns.items():
        arrays[name] = pyarrow.array(values, kinds.get(name))
    return Dataset(pyarrow.table(arrays))


def _save(folder: Path, splits: Mapping[str, Columns], facts: Facts) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = {}
    for name, columns in splits.items():
        rows[name] = length(columns)
        if rows[name]:  # datasets cannot read back what has no rows
            _dataset(columns).save_to_disk(folder / name)
    some_split = next(iter(splits.values()))  # all have the same columns
    about = {
        "rows": rows,
        "columns": list(some_split),
        "facts": asdict(facts),
    }
    (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")


def _open(folder: Path) -> Found:
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    # imported only now: an absent entry has failed by here, without the seconds that this takes
    from datasets import Dataset

    splits = {}
    for name, rows in about["rows"].items():
        if rows:
            splits[name] = Dataset.load_from_disk(folder / name)
        else:
            splits[name] = _dataset({column: [] for column in about["columns"]})
    facts = about["facts"]
    return splits, Facts(**facts | {"fit": Fit(**facts["fit"])})


def _is_whole(folder: Path) -> bool:
    """Say whether another process was faster (its examples are the same) and wrote it whole."""
    try:
        _open(folder)
    except Exception:  # absent, or corrupt in whatever way
        return False
    return True
