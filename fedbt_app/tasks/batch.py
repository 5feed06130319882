"""From rows to one step's tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedbt_app.tasks.base import IGNORED, Reading, SpecialTokens, Task, padded


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
        size, length = self.input_ids.shape
        return size, length, self.positions.shape[1], self.mask is not None

    @property
    def reads(self) -> int:
        """Number of loss positions."""
        return int((self.labels != IGNORED).sum())

    def split(self, size: int) -> "list[Batch]":
        """Split into batches of `size` examples, as padded as this one; 0 leaves it whole."""
        if not 0 < size < len(self.rows):
            return [self]
        starts = range(0, len(self.rows), size)
        return [self._part(slice(start, start + size)) for start in starts]

    def _part(self, examples: slice) -> "Batch":
        mask = self.mask
        if mask is not None:
            mask = mask[examples]
        return Batch(
            input_ids=self.input_ids[examples],
            mask=mask,
            positions=self.positions[examples],
            labels=self.labels[examples],
            rows=self.rows[examples],
        )

    def to(self, device: torch.device) -> "Batch":
        """Move to `device`."""
        mask = self.mask
        if mask is not None:
            mask = mask.to(device, non_blocking=True)
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            mask=mask,
            positions=self.positions.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Collator:
    """Makes a batch of a task's rows."""

    task: Task
    reading: Reading

    def __call__(self, rows: Sequence[Mapping[str, Any]], generator: np.random.Generator) -> Batch:
        """Collate `rows`; from `generator` only the task draws, what is new in each batch."""
        lengths = np.array([len(row["input_ids"]) for row in rows])
        width = int(lengths.max())
        if lengths.min() < width:
            width = padded(width)
        ids = np.full((len(rows), width), self.reading.tokens.pad, dtype=np.int64)
        for padded_ids, length, row in zip(ids, lengths, rows, strict=True):
            padded_ids[:length] = row["input_ids"]  # a view: this fills `ids`
        present = np.arange(width) < lengths[:, None]
        read = self.task.read(rows, ids, present, self.reading, generator)
        mask = None
        if not present.all():
            mask = torch.from_numpy(present)
        return Batch(
            input_ids=torch.from_numpy(read.ids),
            mask=mask,
            positions=torch.from_numpy(read.positions),
            labels=torch.from_numpy(read.targets),
        )


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Read them off a transformers tokenizer."""
    return SpecialTokens(
        pad=tokenizer.pad_token_id,
        mask=tokenizer.mask_token_id,
        special=tuple(tokenizer.all_special_ids),
        vocabulary=len(tokenizer),
    )
