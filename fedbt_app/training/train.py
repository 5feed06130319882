"""The local training loop, and evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedbt_app.costs.meter import FlopMeter
from fedbt_app.model import forward
from fedbt_app.model.local_model import LocalModel
from fedbt_app.tasks.base import padded
from fedbt_app.tasks.batch import Batch, Collator
from fedbt_app.tasks.scores import Scores
from fedbt_app.training.optimizer import Optimizer, TrainSettings
from fedbt_app.training.prefix_cache import PrefixCache

EVALUATION_BATCH = 32  # rows: all of a batch's predictions are in memory at once
# batches whose rows are sorted by length together: little padding, still shuffled
_SORTED_STRETCH = 50


@dataclass(frozen=True)
class TrainResult:
    """What training gave.

    Attributes
    ----------
    loss : mean per loss position
    examples : in one pass over the rows
    shapes : of all steps run
    cached : (B, T) of the steps that took the frozen blocks' output from the cache
    """

    loss: float
    examples: int
    shapes: list[tuple[int, int, int, bool]]
    cached: list[tuple[int, int]]


def run(
    local: LocalModel,
    rows: Sequence[Mapping[str, Any]],
    collator: Collator,
    settings: TrainSettings,
    meter: FlopMeter,
    cache: PrefixCache | None = None,
) -> TrainResult:
    """Train `local` in place: AdamW over its trained tensors, a new one each round as in FedAvg.

    With a `cache`, the frozen blocks below its depth run once for each example, in this round or an
    earlier one.
    """
    noise = np.random.default_rng(settings.seed).integers(2**62)
    torch.manual_seed(int(noise))  # of dropout
    optimizer = Optimizer(local.trained.values(), settings)
    steps = _Steps(local, settings, meter, cache)
    # stays there: asking a GPU each step would stall it
    total = torch.zeros((), device=local.device)
    positions = 0
    for epoch in range(settings.epochs):
        generator = np.random.default_rng([*settings.seed, epoch])
        for batch in batches(
            rows,
            collator,
            size=settings.batch_size,
            generator=generator,
            tokens=settings.tokens_per_batch,
        ):
            pieces = batch.split(settings.micro_batch_size)
            pieces = [piece for piece in pieces if piece.reads]  # others have no loss
            for piece in pieces:
                optimizer.due = piece is pieces[-1]
                loss = steps.take(piece, share=piece.reads / batch.reads)
                total += loss * piece.reads
            positions += batch.reads
    optimizer.detach()
    return TrainResult(
        loss=float(total) / max(1, positions),
        examples=len(rows),
        shapes=steps.shapes,
        cached=steps.cached,
    )


@dataclass(frozen=True)
class _Steps:
    """Runs single steps, counts their FLOPs, and notes what they were."""

    local: LocalModel
    settings: TrainSettings
    meter: FlopMeter
    cache: PrefixCache | None
    shapes: list[tuple[int, int, int, bool]] = field(default_factory=list)
    cached: list[tuple[int, int]] = field(default_factory=list)

    def take(self, batch: Batch, share: float) -> torch.Tensor:
        """Add the gradient of `share` times a batch's mean loss; returns that loss."""
        there = batch.to(self.local.device)
        start = self._start(batch, there)
        self.shapes.append(batch.shape)

        def backward() -> torch.Tensor:
            loss = forward.loss(self.local, there, start, self.settings.checkpointing)
            (loss * share).backward()
            return loss.detach()

        computed = (start is not None, batch.shape)
        return self.meter.step(computed, backward)

    def _start(self, batch: Batch, there: Batch) -> forward.Prefix | None:
        """Return what the frozen blocks give, from the cache or into it; None without a cache."""
        cache = self.cache
        if cache is None:
            return None
        states = cache.read(batch)
        if states is not None:
            size, length = there.input_ids.shape
            self.cached.append((size, length))
            states = states.to(self.local.device, non_blocking=True)
            return forward.Prefix(cache.depth, states)
        run = partial(forward.prefix, self.local, there, cache.depth)
        start = self.meter.step(("prefix", batch.shape), run)
        cache.write(batch, start.states)
        return start


@torch.no_grad()
def evaluate(
    local: LocalModel,
    rows: Sequence[Mapping[str, Any]],
    collator: Collator,
    batch_size: int,
) -> Scores:
    """Return the scores of `local` on `rows`; mlm masks the same pieces every time."""
    local.module.eval()
    scores = Scores(local.spec.task, local.spec.labels)
    generator = np.random.default_rng(0)
    for batch in batches(rows, collator, batch_size, generator, shuffled=False):
        outputs = forward.logits(local, batch.to(local.device))
        scores.add(outputs.float().cpu(), batch.labels, [rows[row] for row in batch.rows])
    return scores


def batches(
    rows: Sequence[Mapping[str, Any]],
    collator: Collator,
    size: int,
    generator: np.random.Generator,
    shuffled: bool = True,
    tokens: int = 0,
) -> Iterator[Batch]:
    """Yield batches of rows of similar length, in random order when `shuffled`.

    A batch has at most `size` rows and, unless that is 0, at most `tokens` padded pieces (but one
    row at least).
    """
    lengths = np.array([len(row["input_ids"]) for row in rows])
    order = np.arange(len(rows))
    if shuffled:
        order = generator.permutation(len(rows))
    groups = []
    stretch = size * _SORTED_STRETCH
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]
        by_length = part[np.argsort(lengths[part], kind="stable")]
        groups += _groups(by_length, lengths, size, tokens)
    turns = np.arange(len(groups))
    if shuffled:
        turns = generator.permutation(len(groups))
    for index in turns:
        group = groups[index]
        batch = collator([rows[row] for row in group], generator)
        yield replace(batch, rows=tuple(group))


def _groups(
    by_length: np.ndarray,
    lengths: np.ndarray,
    size: int,
    tokens: int,
) -> list[list[int]]:
    """Cut rows, sorted by their length, into those of one batch each."""
    groups: list[list[int]] = [[]]
    for row in by_length:
        group = groups[-1]
        # the last row of a group is its longest: all are padded to that
        pieces = (len(group) + 1) * padded(lengths[row])
        too_long = tokens and pieces > tokens
        if group and (len(group) == size or too_long):
            group = []
            groups.append(group)
        group.append(int(row))
    return groups
