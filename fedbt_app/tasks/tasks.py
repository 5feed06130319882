"""The three tasks: rows to batches, the output head, loss positions, labels and metrics."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedbt_app.errors import FedBTError

IGNORED = -100  # torch's own mark for "no loss here"
MULTIPLE = 8  # batches are padded to multiples of this: fewer distinct shapes, friendlier kernels


@dataclass(frozen=True)
class Batch:
    """One step's tensors; B examples, T word pieces, P loss positions an example (padded with 0).

    Attributes
    ----------
    input_ids : (B, T) int64
    mask : (B, T) bool, True where there is a word piece; None when nothing is padded
    positions : (B, P) int64, where the loss reads
    labels : (B, P) int64, IGNORED where `positions` is padding
    rows : the examples' numbers in the client's data
    """

    input_ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor
    labels: torch.Tensor
    rows: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """(B, T, P, padded): all that decides what a step computes."""
        return (*self.input_ids.shape, self.positions.shape[1], self.mask is not None)

    @property
    def reads(self) -> int:
        """Number of loss positions."""
        return int((self.labels != IGNORED).sum())

    def split(self, size: int) -> "list[Batch]":
        """Split into batches of `size` examples, as padded as this one; 0 leaves it whole."""
        if not 0 < size < len(self.rows):
            return [self]
        masks = [None] * len(self.rows) if self.mask is None else self.mask.split(size)
        tensors = zip(
            self.input_ids.split(size), masks, self.positions.split(size), self.labels.split(size), strict=False
        )
        return [Batch(*tensors_, self.rows[at * size : (at + 1) * size]) for at, tensors_ in enumerate(tensors)]

    def to(self, device: torch.device) -> "Batch":
        """Move to `device`."""
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            mask,
            self.positions.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.rows,
        )


def padded(length: int) -> int:
    """Round a length up to what it is padded to."""
    return -(-int(length) // MULTIPLE) * MULTIPLE


@dataclass(frozen=True)
class SpecialTokens:
    """What masking and padding need to know of a tokenizer."""

    pad: int
    mask: int
    special: tuple[int, ...]
    vocabulary: int


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Read them off a transformers tokenizer."""
    return SpecialTokens(
        tokenizer.pad_token_id, tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), len(tokenizer)
    )


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows.

    Parameters
    ----------
    labels : names in the order of their ids; empty for mlm
    mask_probability : share of an mlm row's pieces that is predicted
    """

    task: str
    tokens: SpecialTokens
    labels: tuple[str, ...] = ()
    mask_probability: float = 0.15

    def __call__(self, rows: Sequence[Mapping[str, Any]], generator: np.random.Generator) -> Batch:
        """Collate `rows`; `generator` draws the masking (mlm) and nothing else."""
        lengths = [len(row["input_ids"]) for row in rows]
        width = padded(max(lengths)) if min(lengths) < max(lengths) else max(lengths)
        ids = np.full((len(rows), width), self.tokens.pad, dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : lengths[index]] = row["input_ids"]
        present = np.arange(width) < np.array(lengths)[:, None]
        ids, positions, labels = _READERS[self.task](self, rows, ids, present, generator)
        mask = None if present.all() else torch.from_numpy(present)
        return Batch(torch.from_numpy(ids), mask, torch.from_numpy(positions), torch.from_numpy(labels))

    def label_id(self, name: str) -> int:
        """Return the id of a label; FedBTError when it is not in the label set."""
        try:
            return self.labels.index(name)
        except ValueError:
            known = ", ".join(self.labels)
            raise FedBTError(f"label {name!r} is not in the label set ({known}): mend the data or set labels") from None


Read = tuple[np.ndarray, np.ndarray, np.ndarray]


def _read_mlm(
    collator: Collator,
    rows: Sequence[Any],
    ids: np.ndarray,
    present: np.ndarray,
    generator: np.random.Generator,
) -> Read:
    """Choose 15 % of each row's pieces: 80 % become [MASK], 10 % a random piece, 10 % stay (BERT, section 3.1)."""
    if "positions" in rows[0]:
        return _read_masked(rows, ids)
    candidates = present & ~np.isin(ids, collator.tokens.special)
    wanted = np.maximum(1, np.round(candidates.sum(axis=1) * collator.mask_probability).astype(int))
    scores = np.where(candidates, generator.random(ids.shape), 2.0)
    order = np.argsort(scores, axis=1)[:, : wanted.max()]
    chosen = (np.arange(wanted.max()) < wanted[:, None]) & (np.take_along_axis(scores, order, axis=1) < 2.0)
    positions = np.where(chosen, order, 0)
    labels = np.where(chosen, np.take_along_axis(ids, positions, axis=1), IGNORED)
    fate = generator.random(positions.shape)
    masked, replaced = chosen & (fate < 0.8), chosen & (fate >= 0.8) & (fate < 0.9)
    row_of = np.broadcast_to(np.arange(len(ids))[:, None], positions.shape)
    ids[row_of[masked], positions[masked]] = collator.tokens.mask
    ids[row_of[replaced], positions[replaced]] = generator.integers(0, collator.tokens.vocabulary, replaced.sum())
    return ids, positions, labels


def _read_masked(rows: Sequence[Any], ids: np.ndarray) -> Read:
    """Take the masking that `mask_once` gave each row."""
    width = max(len(row["positions"]) for row in rows)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        positions[index, : len(row["positions"])], labels[index, : len(row["targets"])] = (
            row["positions"],
            row["targets"],
        )
    return ids, positions, labels


def mask_once(collator: Collator, rows: Sequence[Mapping[str, Any]], seed: Sequence[int]) -> list[dict[str, Any]]:
    """Give each mlm row one masking for good, so that what frozen blocks make of it can be kept."""
    generator, masked = np.random.default_rng(seed), []
    for row in rows:
        batch = collator([row], generator)
        values = {"input_ids": batch.input_ids, "positions": batch.positions, "targets": batch.labels}
        masked.append({name: value[0].tolist() for name, value in values.items()})
    return masked


def _read_classification(
    collator: Collator,
    rows: Sequence[Any],
    ids: np.ndarray,
    present: np.ndarray,
    generator: np.random.Generator,
) -> Read:
    labels = np.array([[collator.label_id(row["label"])] for row in rows], dtype=np.int64)
    return ids, np.zeros((len(rows), 1), dtype=np.int64), labels


def _read_ner(
    collator: Collator,
    rows: Sequence[Any],
    ids: np.ndarray,
    present: np.ndarray,
    generator: np.random.Generator,
) -> Read:
    """Read the first piece of each word; continuation pieces carry no tag."""
    found = [[(at, collator.label_id(tag)) for at, tag in enumerate(row["tags"]) if tag] for row in rows]
    width = padded(max(1, *map(len, found)))
    positions = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for index, pairs in enumerate(found):
        if pairs:
            positions[index, : len(pairs)], labels[index, : len(pairs)] = np.array(pairs).T
    return ids, positions, labels


_READERS: dict[str, Callable[..., Read]] = {
    "mlm": _read_mlm,
    "classification": _read_classification,
    "ner": _read_ner,
}

PRIMARY_METRIC = {"mlm": "loss", "classification": "accuracy", "ner": "f1"}
METRIC_LABELS = {"loss": "loss", "accuracy": "accuracy", "f1": "entity F1"}


@dataclass
class Scores:
    """Collects predictions over batches and turns them into the task's metrics."""

    task: str
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Start empty."""
        self._loss, self._count = 0.0, 0
        self._pairs: list[tuple[list[int], list[int]]] = []

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add one batch: logits (B, P, classes), labels (B, P)."""
        kept = labels != IGNORED
        loss = torch.nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum")
        self._loss += float(loss)
        self._count += int(kept.sum())
        predicted = logits.argmax(dim=-1)
        for row in range(len(labels)):
            self._pairs.append((labels[row][kept[row]].tolist(), predicted[row][kept[row]].tolist()))

    def metrics(self) -> dict[str, float]:
        """Return the metrics over all that was added."""
        loss = self._loss / max(1, self._count)
        if self.task == "ner":
            return {"loss": loss, **self._entity_scores()}
        true = np.array([label for row, _ in self._pairs for label in row])
        predicted = np.array([label for _, row in self._pairs for label in row])
        accuracy = float((true == predicted).mean()) if len(true) else 0.0
        if self.task == "mlm":
            return {"loss": loss, "perplexity": math.exp(min(loss, 50.0)), "accuracy": accuracy}
        return {"loss": loss, "accuracy": accuracy, "macro_f1": _macro_f1(true, predicted)}

    def _entity_scores(self) -> dict[str, float]:
        from seqeval.metrics import f1_score, precision_score, recall_score

        if not self._pairs:
            return {"f1": 0.0, "precision": 0.0, "recall": 0.0}
        true = [[self.labels[label] for label in row] for row, _ in self._pairs]
        predicted = [[self.labels[label] for label in row] for _, row in self._pairs]
        options: dict[str, Any] = {"zero_division": 0}
        return {
            "f1": float(f1_score(true, predicted, **options)),
            "precision": float(precision_score(true, predicted, **options)),
            "recall": float(recall_score(true, predicted, **options)),
        }


def merge_labels(task: str, reported: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Merge the clients' label names: sorted; for ner every type gets both its B- and its I- tag."""
    names = {name for one in reported for name in one}
    if task == "ner":
        types = {name[2:] for name in names if name != "O"}
        names = {"O"} | {f"{prefix}-{kind}" for kind in types for prefix in "BI"}
    return tuple(sorted(names))


def majority_score(counts: Mapping[str, int]) -> float:
    """Return the accuracy of always answering the most frequent class."""
    return max(counts.values(), default=0) / max(1, sum(counts.values()))


def _macro_f1(true: np.ndarray, predicted: np.ndarray) -> float:
    scores = []
    for label in np.unique(true):
        hits = int(((true == label) & (predicted == label)).sum())
        scores.append(2 * hits / int((true == label).sum() + (predicted == label).sum()))
    return float(np.mean(scores)) if scores else 0.0
