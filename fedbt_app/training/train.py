"""The local training loop, and evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedbt_app.costs.meter import FlopMeter
from fedbt_app.model import forward
from fedbt_app.model.local_model import LocalModel
from fedbt_app.tasks.tasks import Batch, Collator, Scores, padded
from fedbt_app.training.optimizer import Optimizer, TrainSettings
from fedbt_app.training.prefix_cache import PrefixCache

EVALUATION_BATCH = 32  # rows: all of a batch's predictions are in memory at once
_SORTED_STRETCH = 50  # batches whose rows are sorted by length together: little padding, still shuffled


@dataclass(frozen=True)
class TrainResult:
    """What training gave: mean loss per loss position, examples a pass, and the shapes of all steps run."""

    loss: float
    examples: int
    shapes: list[tuple[int, int, int, bool]]
    cached: list[tuple[int, int]]  # (B, T) of the steps that took the frozen blocks' output from the cache


def run(
    local: LocalModel,
    rows: Sequence[Mapping[str, Any]],
    collator: Collator,
    settings: TrainSettings,
    meter: FlopMeter,
    seed: Sequence[int],
    cache: PrefixCache | None = None,
) -> TrainResult:
    """Train `local` in place: AdamW over its trained tensors, a fresh optimizer each round as in FedAvg.

    With a `cache`, the frozen blocks below its depth run once for each example, in this round or an
    earlier one.
    """
    torch.manual_seed(int(np.random.default_rng(seed).integers(2**62)))  # dropout
    optimizer = Optimizer(local.trained.values(), settings)
    total, positions = torch.zeros((), device=local.device), 0  # stays there: asking a GPU each step would stall it
    shapes, cached = [], []
    for epoch in range(settings.epochs):
        generator = np.random.default_rng([*seed, epoch])
        for batch in batches(rows, collator, settings.batch_size, generator, tokens=settings.tokens_per_batch):
            pieces = [piece for piece in batch.split(settings.micro_batch_size) if piece.reads]  # others have no loss
            for piece in pieces:
                optimizer.due = piece is pieces[-1]
                there = piece.to(local.device)
                start = None
                if cache and (states := cache.read(piece)) is not None:
                    start = forward.Prefix(cache.depth, states.to(local.device, non_blocking=True))
                    cached.append(piece.shape[:2])
                elif cache:
                    start = meter.step(("prefix", piece.shape), partial(forward.prefix, local, there, cache.depth))
                    cache.write(piece, start.states)
                share = piece.reads / batch.reads
                step = partial(_backward, local, there, start, share, settings.checkpointing)
                total += meter.step((bool(start), piece.shape), step) * piece.reads
                shapes.append(piece.shape)
            positions += batch.reads
    optimizer.detach()
    return TrainResult(float(total) / max(1, positions), len(rows), shapes, cached)


@torch.no_grad()
def evaluate(
    local: LocalModel, rows: Sequence[Mapping[str, Any]], collator: Collator, batch_size: int
) -> dict[str, float]:
    """Return the task's metrics of `local` on `rows`; mlm masks the same pieces every time."""
    local.module.eval()
    scores = Scores(local.spec.task, local.spec.labels)
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

    A batch has at most `size` rows and, unless that is 0, at most `tokens` padded pieces (but one row at least).
    """
    lengths = np.array([len(row["input_ids"]) for row in rows])
    order = generator.permutation(len(rows)) if shuffled else np.arange(len(rows))
    stretch = size * _SORTED_STRETCH
    groups: list[list[int]] = []
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]
        groups.append([])
        for row in part[np.argsort(lengths[part], kind="stable")]:  # the last row of a group is its longest
            full = len(groups[-1]) == size or (tokens and (len(groups[-1]) + 1) * padded(lengths[row]) > tokens)
            if full and groups[-1]:
                groups.append([])
            groups[-1].append(int(row))
    for index in generator.permutation(len(groups)) if shuffled else range(len(groups)):
        yield replace(collator([rows[row] for row in groups[index]], generator), rows=tuple(groups[index]))


def _backward(
    local: LocalModel, batch: Batch, start: forward.Prefix | None, share: float, checkpointing: bool
) -> torch.Tensor:
    """Add the gradient of `share` times the batch's mean loss; returns that loss."""
    value = forward.loss(local, batch, start, checkpointing)
    (value * share).backward()
    return value.detach()
