"""From a data set's name to one client's tokenised examples: load, split, partition, tokenise.

Rows become word pieces once per client, tokenizer and setting; after that the memory-mapped result
is read back and neither the raw data nor the tokenizer is loaded.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedbt_app.config import EMBEDDED, LONGEST_LABEL, MOST_LABELS, NO_DATA, RunConfig
from fedbt_app.data import phenotypes
from fedbt_app.data.example_cache import Made, cached
from fedbt_app.data.partition import partition as split_over_clients
from fedbt_app.data.sources import checked, length, local_files, readers, select
from fedbt_app.errors import FedBTError
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Columns

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Tokenizer = Callable[[], "PreTrainedTokenizerFast"]

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
    (`Task.tokenise`). `label_counts` covers train and heldout.
    """

    train: "Dataset"
    heldout: "Dataset"
    label_counts: dict[str, int]


def client_data(
    config: RunConfig,
    tokenizer: Tokenizer,
    tokenizer_id: str,
    partition: tuple[int, int] | None,
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
        rows = _client_rows(config, partition)
        rng = _rng(config.seed, f"heldout {partition}")
        heldout, train = _carve(rows, config.heldout_fraction, rng)
        made = _tokenise(config, tokenizer(), {"train": train, "heldout": heldout})
        if not length(made["train"]):
            raise FedBTError(
                f"dataset={config.dataset} leaves nothing to train on: give this client more rows"
            )
        counts = TASKS[config.task].label_counts(made.values())
        return made, _checked_labels(config, counts)

    splits, counts = cached(
        config,
        keys=_CLIENT_KEYS,
        use=["client", partition],
        tokenizer_id=tokenizer_id,
        build=build,
    )
    return ClientData(splits["train"], splits["heldout"], counts)


def test_data(
    config: RunConfig,
    tokenizer: Tokenizer,
    tokenizer_id: str,
) -> "Dataset":
    """Return the central test set's examples: of `test`, else `validation`, else part of `train`.

    Parameters are those of `client_data`. Rows carved off `train` are the same on every machine,
    and never in a simulated client's examples.
    """

    def build() -> Made:
        rng = _rng(config.seed, "cap test")
        rows = _take(_test_rows(config), config.max_test_examples, rng)
        made = _tokenise(config, tokenizer(), {"test": rows})
        if not length(made["test"]):
            raise FedBTError(
                f"dataset={config.dataset} has no test rows: "
                "raise test-fraction or add a test split"
            )
        return made, {}

    splits, _ = cached(
        config,
        keys=_TEST_KEYS,
        use=["test"],
        tokenizer_id=tokenizer_id,
        build=build,
    )
    return splits["test"]


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
    names = ", ".join(file.name for file in files.values())
    return f"local data {Path(config.dataset).name} ({names})"


# Splits of rows -----------------------------------------------------------------------------------


def _client_rows(config: RunConfig, partition: tuple[int, int] | None) -> Columns:
    """Return the checked rows of one client, to train on and to hold out."""
    rows = _train_rows(config, whole=partition is None)
    rows = _take(rows, config.max_train_examples, _rng(config.seed, "train"))
    if partition is None:
        return rows
    client, clients = partition
    if not 0 <= client < clients:
        raise FedBTError(f"client {client} of {clients} does not exist: count clients from 0")
    parts = split_over_clients(config, length(rows), rows, clients)
    return select(rows, parts[client])


def _train_rows(config: RunConfig, whole: bool) -> Columns:
    """Return the checked rows of `train`, before any cap; `whole`: without carving a test set."""
    splits = readers(config)
    rows = _checked_train(config, splits)
    if whole or _test_split(splits):
        return rows
    _, rest = _carve_test(config, rows)
    return rest


def _test_rows(config: RunConfig) -> Columns:
    """Return the checked rows of the test set, before any cap."""
    splits = readers(config)
    name = _test_split(splits)
    if name:
        return checked(config, splits[name](), name)
    rows = _checked_train(config, splits)
    carved, _ = _carve_test(config, rows)
    return carved


def _test_split(splits: Iterable[str]) -> str | None:
    for name in ("test", "validation"):
        if name in splits:
            return name
    return None


def _checked_train(config: RunConfig, splits: Mapping[str, Callable[[], Columns]]) -> Columns:
    if "train" not in splits:
        raise FedBTError(
            f"dataset={config.dataset} has no split train: add one, e.g. a file train.jsonl"
        )
    return checked(config, splits["train"](), "train")


def _carve_test(config: RunConfig, rows: Columns) -> tuple[Columns, Columns]:
    return _carve(rows, config.test_fraction, _rng(config.seed, "test"))


def _rng(seed: int, use: str) -> np.random.Generator:
    """Return a generator of its own for each use of the seed."""
    return np.random.default_rng([seed, *use.encode()])


def _carve(
    columns: Columns,
    fraction: float,
    rng: np.random.Generator,
) -> tuple[Columns, Columns]:
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
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerFast",
    splits: Mapping[str, Columns],
) -> dict[str, Columns]:
    task = TASKS[config.task]
    tokenised = {}
    for name, rows in splits.items():
        tokenised[name] = task.tokenise(config, tokenizer, rows)
    return tokenised


def _checked_labels(config: RunConfig, counts: dict[str, int]) -> dict[str, int]:
    """Refuse what looks like text: label names leave the site."""
    longest = max(map(len, counts), default=0)
    rows = sum(counts.values())
    mostly_once = len(counts) > max(FEW_LABELS, rows // 2)
    if len(counts) > MOST_LABELS or mostly_once or longest > LONGEST_LABEL:
        key = TASKS[config.task].label_key
        setting = f"{key.replace('_', '-')}={getattr(config, key)}"
        raise FedBTError(
            f"{setting} has {len(counts)} different values, the longest of {longest} characters: "
            "that looks like text, which must not leave the site; name the column of the labels"
        )
    return counts
