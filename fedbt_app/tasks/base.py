"""What a task has to say of itself: columns, word pieces, labels, loss, metrics, order of blocks."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from fedbt_app.errors import FedBTError
from fedbt_app.parts import HeadKind
from fedbt_app.tasks.fit import Fit
from fedbt_app.tasks.metrics import Metric
from fedbt_app.tasks.notes import Notes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # torch's own mark for "no loss here"
SPECIAL_PIECES = 2  # [CLS] and [SEP] of a row
MULTIPLE = 8  # batches are padded to multiples of this: fewer distinct shapes, friendlier kernels

Columns = dict[str, list[Any]]  # column name -> one value a row
Row = Mapping[str, Any]
Blocks = tuple[int, ...]
Tally = dict[str, int]


class Settings(Protocol):
    """What tasks read of a run's settings: a part of RunConfig, which stands above them."""

    @property
    def text_column(self) -> str: ...  # noqa: D102 (docs/config.md says what each is)
    @property
    def label_column(self) -> str: ...  # noqa: D102
    @property
    def tokens_column(self) -> str: ...  # noqa: D102
    @property
    def tags_column(self) -> str: ...  # noqa: D102
    @property
    def label_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def allowed_names(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def label_renames(self) -> dict[str, str]: ...  # noqa: D102
    @property
    def max_length(self) -> int: ...  # noqa: D102
    @property
    def masking(self) -> str: ...  # noqa: D102
    @property
    def static_maskings(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class SpecialTokens:
    """What masking and padding need to know of a tokenizer."""

    pad: int
    mask: int
    special: tuple[int, ...]
    vocabulary: int


@dataclass(frozen=True)
class Reading:
    """What reading a batch needs to know beside its rows.

    Attributes
    ----------
    labels : names in the order of their ids; empty where the task has none
    mask_probability : share of a row's pieces that is predicted (mlm)
    """

    tokens: SpecialTokens
    labels: tuple[str, ...] = ()
    mask_probability: float = 0.15

    def label_id(self, name: str) -> int:
        """Return the id of a label; FedBTError when it is not in the label set."""
        try:
            return self.labels.index(name)
        except ValueError:
            # the label is not quoted: this travels to the server
            raise FedBTError(
                f"the data has a label that is none of the run's {len(self.labels)}: "
                "it changed since the run began; mend it, or set labels or label-map"
            ) from None


@dataclass(frozen=True)
class Read:
    """What a task makes of a batch of rows.

    There are B examples, T word pieces and P loss positions (padded with 0).

    Attributes
    ----------
    ids : (B, T) int64 word pieces
    positions : (B, P) int64, where the loss reads
    targets : (B, P) int64, IGNORED where `positions` is padding
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Pair:
    """One example's true and predicted label ids, position by position, and the example itself."""

    true: list[int]
    predicted: list[int]
    row: Row


@dataclass(frozen=True)
class Tokenised:
    """Examples, column by column, and what of their text did not fit."""

    columns: Columns
    fit: Fit


class Task(ABC):
    """One kind of training.

    Attributes
    ----------
    name : as `task=` names it
    head : the kind of output head
    metrics : all that its scores have, the primary one first
    pipeline : transformers' pipeline for the exported model
    pipeline_options : further arguments of it, as code, with which it cuts texts that are too long
    columns : settings that name the columns which rows must have, the one with the text first
    label_key : the setting that names the column of labels; empty where there are none
    embedded_rows : which rows of the embedded data set it takes (data.phenotypes); empty for none
    draws_deeper_blocks
        whether, in the published order, the blocks above the trained one are drawn for each client
    """

    name: ClassVar[str]
    head: ClassVar[HeadKind]
    metrics: ClassVar[tuple[Metric, ...]]
    pipeline: ClassVar[str]
    pipeline_options: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]]
    label_key: ClassVar[str] = ""
    embedded_rows: ClassVar[str] = ""
    draws_deeper_blocks: ClassVar[bool] = False

    @property
    def metric(self) -> Metric:
        """The metric by which runs are judged."""
        return self.metrics[0]

    # -- rows --------------------------------------------------------------------------------------

    def prepared(self, settings: Settings, columns: Columns, notes: Notes) -> Columns:
        """Return raw columns as `check` and `tokenise` want them; note what the site should know.

        Raises
        ------
        FedBTError
            For a split that cannot be used; it names a row as `row 3`, and no cell.
        """
        return columns

    def given_labels(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the labels of the setting `labels` as `check` returns them."""
        return names

    def allowed(self, names: tuple[str, ...]) -> frozenset[str]:
        """Return the names of the setting `labels-allowed` as `plain_name` returns them."""
        return frozenset(self.given_labels(names))

    def plain_name(self, label: str) -> str:
        """Return the name that people gave, without what the task adds; empty for its own labels."""
        return label

    @abstractmethod
    def check(self, settings: Settings, row: Row, where: str) -> Sequence[str] | None:
        """Return a row's labels; None for a row without text, which is dropped.

        Raises
        ------
        FedBTError
            For a row that cannot be used; `where` names it. No cell is quoted: errors travel to the
            server.
        """

    @abstractmethod
    def tokenise(
        self, settings: Settings, tokenizer: "PreTrainedTokenizerFast", rows: Columns
    ) -> Tokenised:
        """Turn checked rows into examples: `input_ids`, [CLS] and [SEP] included, and what `read`
        wants.
        """

    def label_counts(self, splits: Iterable[Mapping[str, Any]]) -> dict[str, int]:
        """Count the labels in tokenised examples, by name; none where the task has none."""
        counts: Counter[str] = Counter()
        for split in splits:
            counts.update(self.labels_in(split))
        return dict(sorted(counts.items()))

    def labels_in(self, split: Mapping[str, Any]) -> Iterable[str]:
        """Return every label of a split's examples, as often as it occurs."""
        return ()

    def merged_labels(self, reported: Iterable[Iterable[str]]) -> tuple[str, ...]:
        """Merge the label names of the clients, in the order of their ids."""
        merged: set[str] = set()
        for names in reported:
            merged.update(names)
        return tuple(sorted(merged))

    def skew_by(
        self, settings: Settings, columns: Mapping[str, Sequence[Any]]
    ) -> Sequence[Any] | None:
        """Return what a skewed partition goes by, one value a row; None without such a column."""
        return columns.get(settings.label_column)

    # -- batches -----------------------------------------------------------------------------------

    def versions(self, settings: Settings) -> int:
        """Return how many versions of a row take turns, one a round; 0: each epoch makes its own."""
        return 1

    def fixed(self, rows: Sequence[Row], reading: Reading, seed: Sequence[int]) -> Sequence[Row]:
        """Return rows that every epoch reads alike, in the version that `seed` stands for."""
        return rows

    @abstractmethod
    def read(
        self,
        rows: Sequence[Row],
        ids: np.ndarray,
        present: np.ndarray,
        reading: Reading,
        generator: np.random.Generator,
    ) -> Read:
        """Choose the loss positions of a batch and their targets.

        Parameters
        ----------
        ids : (B, T) word pieces, padded; may be changed in place
        present : (B, T) bool, True where there is a word piece
        generator : for what is drawn anew in each batch
        """

    @abstractmethod
    def full_positions(self, length: int, mask_probability: float) -> int:
        """Return the loss positions of an example of `length` word pieces: for predicted costs."""

    # -- loss and scores ---------------------------------------------------------------------------

    def loss(
        self, outputs: "torch.Tensor", targets: "torch.Tensor", reduction: str = "mean"
    ) -> "torch.Tensor":
        """Return the mean (or `sum`) of the cross-entropy at the loss positions.

        `outputs` are (B, P, classes), `targets` (B, P).
        """
        from torch.nn.functional import cross_entropy

        return cross_entropy(
            outputs.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction=reduction,
        )

    @abstractmethod
    def tallied(self, pair: Pair, labels: tuple[str, ...]) -> Tally:
        """Count one example's hits and misses, so that counts of many examples can be summed."""

    @abstractmethod
    def scored(self, tally: Mapping[str, float], labels: tuple[str, ...]) -> dict[str, float]:
        """Return the metrics, by name, from the sum of all tallies.

        It holds `loss` and `positions` beside what `tallied` counts. Summed over sites it gives
        what one process over all of their rows would have got.
        """

    def majority(self, label_counts: Mapping[str, int]) -> float | None:
        """Return the score of always answering the most frequent label; None if meaningless."""
        return None

    # -- plan --------------------------------------------------------------------------------------

    @abstractmethod
    def published(self, num_rounds: int, depth: int, local_depth: int) -> list[Blocks]:
        """Return the blocks that each round trains in the paper's order, ascending."""

    def measured(self, depth: int) -> str:
        """Return the schedule that we measured best for so shallow a model; empty: the published."""
        return ""


def mean_loss(tally: Mapping[str, float]) -> float:
    """Return the mean loss of a loss position."""
    return tally.get("loss", 0.0) / max(1, tally.get("positions", 0))


def cut_at(ids: list[int], max_length: int) -> list[int]:
    """Return a sequence that fits: its beginning, and the piece that ends it."""
    return ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]


def padded(length: int) -> int:
    """Round a length up to what it is padded to."""
    multiples = -(-int(length) // MULTIPLE)  # negated twice: division that rounds up
    return multiples * MULTIPLE


def in_batches(values: list[Any], size: int = 1000) -> Iterator[list[Any]]:
    """Yield a long list in pieces: so many rows are tokenised at once."""
    return (values[start : start + size] for start in range(0, len(values), size))


def checked_text(settings: Settings, row: Row, where: str) -> bool:
    """Say whether a row has text; FedBTError when its text column holds something else."""
    text = row[settings.text_column]
    if text is not None and not isinstance(text, str):
        raise FedBTError(
            f"{where}: column {settings.text_column!r} holds no text: set text-column, or mend the row"
        )
    return bool(text and text.strip())
