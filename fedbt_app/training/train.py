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
from fedbt_app.training.optimizer import Optimizer, TrainSettings
from fedbt_app.training.prefix_cache import PrefixCache

EVALUATION_BATCH = 32  # rows: all of a batch's predictions are in memory at once
# batches whose rows are sorted by length together: little padding, still shuffled
_SORTED_STRETCH = 50


@dataclass(frozen=True)
class TrainResult:
    """What training gave: mean loss per loss position, examples a pass, and the shapes of all steps
    run.
    """

    loss: float
    examples: int
    shapes: list[tuple[int, int, int, bool]]
    cached: list[
        tuple[int, int]
    ]  # (B, T) of the steps that took the frozen blocks' output from the cache


def run(
    local: LocalModel,
    rows: Sequence[Mapping[str, Any]],
    collator: Collator,
    settings: TrainSettings,
    meter: FlopMeter,
    cache: PrefixCache | None = None,
) -> TrainResult:
    """Train `local` in place: AdamW over its trained tensors, a fresh optimizer each round as in
    FedAvg.

    With a `cache`, the frozen blocks below its depth run once for each example, in this round or an
    earlier one.
    """
    torch.manual_seed(int(np.random.default_rng(settings.seed).integers(2**62)))  # dropout
    optimizer = Optimizer(local.trained.values(), settings)
    steps = _Steps(local, settings, meter, cache)
    # stays there: asking a GPU each step would stall it
    total = torch.zeros((), device=local.device)
    positions = 0
    for epoch in range(settings.epochs):
        generator = np.random.default_rng([*settings.seed, epoch])
        for batch in batches(
            rows, collator, settings.batch_size, generator, tokens=settings.tokens_per_batch
        ):
            # others have no loss
            pieces = [piece for piece in batch.split(settings.micro_batch_size) if piece.reads]
            for piece in pieces:
                optimizer.due = piece is pieces[-1]
                total += steps.take(piece, share=piece.reads / batch.reads) * piece.reads
            positions += batch.reads
    optimizer.detach()
    return TrainResult(float(total) / max(1, positions), len(rows), steps.shapes, steps.cached)


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
            value = forward.loss(self.local, there, start, self.settings.checkpointing)
            (value * share).backward()
            return value.detach()

        return self.meter.step((start is not None, batch.shape), backward)

    def _start(self, batch: Batch, there: Batch) -> forward.Prefix | None:
        """Return what the frozen blocks give for a batch, from the cache or into it; None where
        nothing is kept.
        """
        cache = self.cache
        if cache is None:
            return None
        states = cache.read(batch)
        if states is not None:
            self.cached.append((there.input_ids.shape[0], there.input_ids.shape[1]))
            return forward.Prefix(cache.depth, states.to(self.local.device, non_blocking=True))
        start = self.meter.step(
            ("prefix", batch.shape), partial(forward.prefix, self.local, there, cache.depth)
        )
        cache.write(batch, start.states)
        return start


@torch.no_grad()
def evaluate(
    local: LocalModel, rows: Sequence[Mapping[str, Any]], collator: Collator, batch_size: int
) -> dict[str, float]:
    """Return the task's metrics of `local` on `rows`; mlm masks the same pieces every time."""
    local.module.eval()
    scores = local.spec.task.scores(local.spec.labels)
    generator = np.random.default_rng(0)
    for batch in batches(rows, collator, batch_size, generator, shuffled=False):
        scores.add(forward.logits(local, batch.to(local.device)).float().cpu(), batch.labels)
    return scores.metrics()


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
    order = generator.permutation(len(rows)) if shuffled else np.arange(len(rows))
    stretch = size * _SORTED_STRETCH
    groups: list[list[int]] = []
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]
        groups.append([])
        # the last row of a group is its longest
        for row in part[np.argsort(lengths[part], kind="stable")]:
            full = len(groups[-1]) == size or (
                tokens and (len(groups[-1]) + 1) * padded(lengths[row]) > tokens
            )
            if full and groups[-1]:
                groups.append([])
            groups[-1].append(int(row))
    for index in generator.permutation(len(groups)) if shuffled else range(len(groups)):
        yield replace(
            collator([rows[row] for row in groups[index]], generator), rows=tuple(groups[index])
        )
