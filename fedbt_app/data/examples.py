"""From a data set's name to one client's tokenised examples: load, split, partition, tokenise.

Rows become word pieces once per client, tokenizer and setting; after that the memory-mapped result
is read back and neither the raw data nor the tokenizer is loaded.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedbt_app.config import EMBEDDED, LONGEST_LABEL, MOST_LABELS, NO_DATA, RunConfig
from fedbt_app.data import phenotypes
from fedbt_app.data.example_cache import Made, cached
from fedbt_app.data.partition import partition as split_over_clients
from fedbt_app.data.readers.table import Table
from fedbt_app.data.sources import checked, length, local_files, readers, select
from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Columns
from fedbt_app.tasks.notes import Notes

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Tokenizer = Callable[[], "PreTrainedTokenizerFast"]

log = logging.getLogger("flwr")

FEW_LABELS = 30  # so many may be different in each row of a small site
# The settings that decide what is in a tokenised test set, and in one client's examples.
_TEST_KEYS = (
    "task",
    "dataset_subset",
    "text_column",
    "label_column",
    "tokens_column",
    "tags_column",
    "labels",
    "max_length",
    "test_fraction",
    "max_test_examples",
    "seed",
)
_CLIENT_KEYS = (
    *_TEST_KEYS,
    "max_train_examples",
    "heldout_fraction",
    "partitioner",
    "dirichlet_alpha",
    "partition_weights",
    "partition_column",
)


@dataclass(frozen=True)
class ClientData:
    """One client's tokenised examples.

    Every example has `input_ids`, [CLS] and [SEP] included, and what the task reads
    (`Task.tokenise`). `label_counts` covers train and heldout. `notes` say how the files were read.
    """

    train: "Dataset"
    heldout: "Dataset"
    label_counts: dict[str, int]
    notes: tuple[str, ...] = ()


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
        `(k, n)` for the k-th (from 0) of n simulated clients; None for a site whose training rows
        are all its own: nothing is carved off them for a test set, which is the server's business.

    Raises
    ------
    FedBTError
        If the data is missing, malformed, empty or cannot be split over n clients.
    """

    def build() -> Made:
        notes = Notes()
        rows = _train_rows(config, whole=partition is None, notes=notes)
        rows = _take(rows, config.max_train_examples, _rng(config.seed, "train"))
        if partition:
            client, clients = partition
            if not 0 <= client < clients:
                raise FedBTError(
                    f"client {client} of {clients} does not exist: count clients from 0"
                )
            rows = select(rows, split_over_clients(config, length(rows), rows, clients)[client])
        heldout, train = _carve(
            rows, config.heldout_fraction, _rng(config.seed, f"heldout {partition}")
        )
        made = _tokenise(config, tokenizer(), {"train": train, "heldout": heldout})
        if not length(made["train"]):
            raise FedBTError(
                f"dataset={config.dataset} leaves nothing to train on: give this client more rows"
            )
        counts = _checked_labels(config, TASKS[config.task].label_counts(made.values()))
        return made, counts, notes.lines

    splits, counts, notes = cached(config, _CLIENT_KEYS, ["client", partition], tokenizer_id, build)
    _tell(config.dataset, tuple(notes))
    return ClientData(splits["train"], splits["heldout"], counts, tuple(notes))


def test_data(config: RunConfig, tokenizer: Tokenizer, tokenizer_id: str) -> "Dataset":
    """Return the examples of the central test set: split `test`, else `validation`, else a share of
    `train`.

    Parameters are those of `client_data`. Rows carved off `train` are the same on every machine,
    and never in a simulated client's examples.
    """

    def build() -> Made:
        notes = Notes()
        rows = _take(
            _test_rows(config, notes), config.max_test_examples, _rng(config.seed, "cap test")
        )
        made = _tokenise(config, tokenizer(), {"test": rows})
        if not length(made["test"]):
            raise FedBTError(
                f"dataset={config.dataset} has no test rows: raise test-fraction or add a test split"
            )
        return made, {}, notes.lines

    splits, _, notes = cached(config, _TEST_KEYS, ["test"], tokenizer_id, build)
    _tell(config.dataset, tuple(notes))
    return splits["test"]


@cache  # once a process: every message asks for the data
def _tell(dataset: str, notes: tuple[str, ...]) -> None:
    """Tell the people of this machine what was read, also when it is read back from the cache."""
    for note in notes:
        log.info("fedbt: data: %s", note)


def describe(config: RunConfig) -> str:
    """Return name, source and version of the data for a model card: no text and no folder of this
    machine.
    """
    if config.dataset == EMBEDDED:
        return phenotypes.describe()
    if config.dataset == NO_DATA:
        return "data that the sites keep"
    files = local_files(config.dataset)
    if files is None:
        return f"hub data set {config.dataset}, subset {config.dataset_subset or 'default'}"
    names = [file.name for paths in files.values() for file in paths]
    return f"local data {Path(config.dataset).name} ({', '.join(names)})"


# Splits of rows -----------------------------------------------------------------------------------


def _train_rows(config: RunConfig, whole: bool, notes: Notes) -> Columns:
    """Return the checked rows of `train`, before any cap; `whole` if no test set may be carved off
    them.
    """
    splits = readers(config)
    rows = _checked_train(config, splits, notes)
    return rows if whole or _test_split(splits) else _carve_test(config, rows)[1]


def _test_rows(config: RunConfig, notes: Notes) -> Columns:
    """Return the checked rows of the test set, before any cap."""
    splits = readers(config)
    if test := _test_split(splits):
        return _checked(config, splits[test](), test, notes)
    return _carve_test(config, _checked_train(config, splits, notes))[0]


def _checked(config: RunConfig, table: Table, split: str, notes: Notes) -> Columns:
    rows = checked(config, table, split)
    for note in table.notes:
        notes.add(note)
    return rows


def _test_split(splits: Iterable[str]) -> str | None:
    return next((name for name in ("test", "validation") if name in splits), None)


def _checked_train(
    config: RunConfig, splits: Mapping[str, Callable[[], Table]], notes: Notes
) -> Columns:
    if "train" not in splits:
        raise FedBTError(
            f"dataset={config.dataset} has no split train: add one, e.g. a file train.jsonl"
        )
    return _checked(config, splits["train"](), "train", notes)


def _carve_test(config: RunConfig, rows: Columns) -> tuple[Columns, Columns]:
    return _carve(rows, config.test_fraction, _rng(config.seed, "test"))


def _rng(seed: int, use: str) -> np.random.Generator:
    """Return a generator of its own for each use of the seed."""
    return np.random.default_rng([seed, *use.encode()])


def _carve(columns: Columns, fraction: float, rng: np.random.Generator) -> tuple[Columns, Columns]:
    """Return (carved, rest): at least one row each where `fraction` > 0 and there are two rows."""
    rows = length(columns)
    carved = min(max(round(rows * fraction), 1), rows - 1) if fraction > 0 and rows > 1 else 0
    order = rng.permutation(rows)
    return select(columns, np.sort(order[:carved])), select(columns, np.sort(order[carved:]))


def _take(columns: Columns, at_most: int, rng: np.random.Generator) -> Columns:
    rows = length(columns)
    if not 0 < at_most < rows:
        return columns
    return select(columns, np.sort(rng.permutation(rows)[:at_most]))


# Word pieces --------------------------------------------------------------------------------------


def _tokenise(
    config: RunConfig, tokenizer: "PreTrainedTokenizerFast", splits: Mapping[str, Columns]
) -> dict[str, Columns]:
    task = TASKS[config.task]
    return {name: task.tokenise(config, tokenizer, rows) for name, rows in splits.items()}


def _checked_labels(config: RunConfig, counts: dict[str, int]) -> dict[str, int]:
    """Refuse what looks like text: label names leave the site."""
    mostly_once = len(counts) > max(FEW_LABELS, sum(counts.values()) // 2)
    if (
        len(counts) > MOST_LABELS
        or mostly_once
        or any(len(name) > LONGEST_LABEL for name in counts)
    ):
        key = TASKS[config.task].label_key
        raise FedBTError(
            f"{key.replace('_', '-')}={getattr(config, key)} has {len(counts)} different values, the longest of "
            f"{max(map(len, counts))} characters: "
            "that looks like text, which must not leave the site; name the column of the labels"
        )
    return counts
