"""From a data set's name to one client's tokenised examples: load, split, partition, tokenise.

Rows become word pieces once per client, tokenizer and setting; after that the memory-mapped result
is read back and neither the raw data nor the tokenizer is loaded.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedbt_app.config import EMBEDDED, NO_DATA, RunConfig
from fedbt_app.data import label_names, phenotypes
from fedbt_app.data.example_cache import Facts, Made, cached
from fedbt_app.data.partition import partition as split_over_clients
from fedbt_app.data.readers.table import Table, length
from fedbt_app.data.sources import checked, local_files, readers, select
from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Columns
from fedbt_app.tasks.fit import Fit
from fedbt_app.tasks.notes import Notes

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("flwr")
Tokenizer = Callable[[], "PreTrainedTokenizerFast"]

# The settings that decide what is in a tokenised test set, and in one client's examples.
_TEST_KEYS = (
    "task",
    "dataset_subset",
    "text_column",
    "label_column",
    "tokens_column",
    "tags_column",
    "labels",
    "label_map",
    "labels_allowed",
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
    (`Task.tokenise`). `label_counts` and `fit` cover train and heldout.
    """

    train: "Dataset"
    heldout: "Dataset"
    label_counts: dict[str, int]
    fit: Fit


@dataclass(frozen=True)
class CentralData:
    """The central test set's examples.

    Attributes
    ----------
    available : rows of the test set before `max-test-examples`
    """

    examples: "Dataset"
    available: int
    fit: Fit


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
        rows = _client_rows(config, partition, notes)
        rng = _rng(config.seed, f"heldout {partition}")
        heldout, train = _carve(rows, config.heldout_fraction, rng)
        made, fit = _tokenise(config, tokenizer(), {"train": train, "heldout": heldout})
        if not length(made["train"]):
            raise FedBTError(
                f"dataset={config.dataset} leaves nothing to train on: give this client more rows"
            )
        counts = TASKS[config.task].label_counts(made.values())
        fit = replace(fit, dropped=_share(notes.dropped, partition))
        return made, Facts(counts, fit, length(rows), notes.lines)

    splits, facts = cached(
        config,
        keys=_CLIENT_KEYS,
        use=["client", partition],
        tokenizer_id=tokenizer_id,
        build=build,
    )
    _tell(config.dataset, tuple(facts.notes))
    return ClientData(splits["train"], splits["heldout"], facts.label_counts, facts.fit)


def test_data(config: RunConfig, tokenizer: Tokenizer, tokenizer_id: str) -> CentralData:
    """Return the central test set's examples: of `test`, else `validation`, else part of `train`.

    Parameters are those of `client_data`. Rows carved off `train` are the same on every machine,
    and never in a simulated client's examples.
    """

    def build() -> Made:
        rng = _rng(config.seed, "cap test")
        notes = Notes()
        rows = _test_rows(config, notes)
        scored = _take(rows, config.max_test_examples, rng)
        made, fit = _tokenise(config, tokenizer(), {"test": scored})
        if not length(made["test"]):
            raise FedBTError(
                f"dataset={config.dataset} has no test rows: "
                "raise test-fraction or add a test split"
            )
        fit = replace(fit, dropped=notes.dropped)
        return made, Facts({}, fit, length(rows), notes.lines)

    splits, facts = cached(
        config,
        keys=_TEST_KEYS,
        use=["test"],
        tokenizer_id=tokenizer_id,
        build=build,
    )
    _tell(config.dataset, tuple(facts.notes))
    return CentralData(splits["test"], facts.available, facts.fit)


@cache  # once a process: every message asks for the data
def _tell(dataset: str, notes: tuple[str, ...]) -> None:
    """Tell the people of this machine what was read, also when it is read back from the cache."""
    for note in notes:
        log.info("fedbt: data: %s", note)


def describe(config: RunConfig) -> str:
    """Say for a model card what data it was: no text of it, and no folder of this machine."""
    if config.dataset == EMBEDDED:
        return phenotypes.describe()
    if config.dataset == NO_DATA:
        return "data that the sites keep"
    files = local_files(config.dataset)
    if files is None:
        subset = config.dataset_subset or "default"
        return f"hub data set {config.dataset}, subset {subset}"
    names = ", ".join(file.name for paths in files.values() for file in paths)
    return f"local data {Path(config.dataset).name} ({names})"


# Splits of rows -----------------------------------------------------------------------------------


def _client_rows(config: RunConfig, partition: tuple[int, int] | None, notes: Notes) -> Columns:
    """Return the checked rows of one client, to train on and to hold out."""
    rows = _train_rows(config, whole=partition is None, notes=notes)
    rows = _take(rows, config.max_train_examples, _rng(config.seed, "train"))
    if partition is None:
        return rows
    client, clients = partition
    if not 0 <= client < clients:
        raise FedBTError(f"client {client} of {clients} does not exist: count clients from 0")
    parts = split_over_clients(config, length(rows), rows, clients)
    return select(rows, parts[client])


def _train_rows(config: RunConfig, whole: bool, notes: Notes) -> Columns:
    """Return the checked rows of `train`, before any cap; `whole`: without carving a test set."""
    splits = readers(config)
    rows = _checked_train(config, splits, notes)
    if whole or _test_split(splits):
        return rows
    _, rest = _carve_test(config, rows)
    return rest


def _test_rows(config: RunConfig, notes: Notes) -> Columns:
    """Return the checked rows of the test set, before any cap."""
    splits = readers(config)
    name = _test_split(splits)
    if name:
        return _checked(config, splits[name](), name, notes)
    rows = _checked_train(config, splits, notes)
    carved, _ = _carve_test(config, rows)
    return carved


def _checked(config: RunConfig, table: Table, split: str, notes: Notes) -> Columns:
    rows = checked(config, table, split)
    for note in table.notes:
        notes.add(note)
    dropped = table.rows - length(rows)
    if dropped:
        notes.add(f"{dropped} rows of {split} have no text and are dropped")
    notes.dropped += dropped
    return rows


def _share(dropped: int, partition: tuple[int, int] | None) -> int:
    """Deal what no client was given evenly, so that the clients' numbers add up to all of it."""
    if partition is None:
        return dropped
    client, clients = partition
    return len(range(client, dropped, clients))


def _test_split(splits: Iterable[str]) -> str | None:
    for name in ("test", "validation"):
        if name in splits:
            return name
    return None


def _checked_train(
    config: RunConfig, splits: Mapping[str, Callable[[], Table]], notes: Notes
) -> Columns:
    if "train" not in splits:
        raise FedBTError(
            f"dataset={config.dataset} has no split train: add one, e.g. a file train.jsonl"
        )
    table = splits["train"]()
    rows = _checked(config, table, "train", notes)
    _check_names(config, table.label_counts)
    return rows


def _check_names(config: RunConfig, label_counts: Mapping[str, int]) -> None:
    """Refuse labels that look like text, where no list says which may leave the site.

    All training rows are looked at, whoever of simulated clients will have them.
    """
    task = TASKS[config.task]
    if config.label_names or config.allowed_names or not task.label_key:
        return
    names: Counter[str] = Counter()
    for label, count in label_counts.items():
        if name := task.plain_name(label):
            names[name] += count
    column = getattr(config, task.label_key)
    label_names.refuse_text(names, f"{task.label_key.replace('_', '-')}={column}")


def _carve_test(config: RunConfig, rows: Columns) -> tuple[Columns, Columns]:
    return _carve(rows, config.test_fraction, _rng(config.seed, "test"))


def _rng(seed: int, use: str) -> np.random.Generator:
    """Return a generator of its own for each use of the seed."""
    return np.random.default_rng([seed, *use.encode()])


def _carve(columns: Columns, fraction: float, rng: np.random.Generator) -> tuple[Columns, Columns]:
    """Return (carved, rest): at least one row each where `fraction` > 0 and there are two rows."""
    rows = length(columns)
    size = 0
    if fraction > 0 and rows > 1:
        size = min(max(round(rows * fraction), 1), rows - 1)
    order = rng.permutation(rows)
    # sorted, so that both keep the data's own order
    carved = np.sort(order[:size])
    rest = np.sort(order[size:])
    return select(columns, carved), select(columns, rest)


def _take(columns: Columns, at_most: int, rng: np.random.Generator) -> Columns:
    rows = length(columns)
    if not 0 < at_most < rows:
        return columns
    taken = rng.permutation(rows)[:at_most]
    return select(columns, np.sort(taken))


# Word pieces --------------------------------------------------------------------------------------


def _tokenise(
    config: RunConfig, tokenizer: "PreTrainedTokenizerFast", splits: Mapping[str, Columns]
) -> tuple[dict[str, Columns], Fit]:
    """Return the examples of each split, and how well the text of all of them fits the model."""
    task = TASKS[config.task]
    made = {}
    fit = Fit()
    for name, rows in splits.items():
        tokenised = task.tokenise(config, tokenizer, rows)
        made[name] = tokenised.columns
        unknown = sum(ids.count(tokenizer.unk_token_id) for ids in tokenised.columns["input_ids"])
        fit += replace(tokenised.fit, unknown=unknown)
    return made, fit
