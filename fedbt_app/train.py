"""The local training loop, and evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedbt_app import forward
from fedbt_app.costs import FlopMeter
from fedbt_app.local_model import LocalModel
from fedbt_app.prefix import PrefixCache
from fedbt_app.tasks import Batch, Collator, Scores

_SORTED_STRETCH = 50  # batches whose rows are sorted by length together: little padding, still shuffled


@dataclass(frozen=True)
class TrainSettings:
    """How a client optimises."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float


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
    optimizer = _adamw(list(local.trained.values()), settings)
    total, positions, shapes, cached = 0.0, 0, [], []
    for epoch in range(settings.epochs):
        generator = np.random.default_rng([*seed, epoch])
        for batch in batches(rows, collator, settings.batch_size, generator):
            there = batch.to(local.device)
            start = None
            if cache and (states := cache.read(batch)) is not None:
                start = forward.Prefix(cache.depth, states.to(local.device, non_blocking=True))
                cached.append(batch.shape[:2])
            elif cache:
                start = meter.step(("prefix", batch.shape), partial(forward.prefix, local, there, cache.depth))
                cache.write(batch, start.states)
            value = meter.step((bool(start), batch.shape), partial(_backward, local, there, start))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            read = int((batch.labels >= 0).sum())
            total, positions = total + float(value) * read, positions + read
            shapes.append(batch.shape)
    return TrainResult(total / max(1, positions), len(rows), shapes, cached)


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
) -> Iterator[Batch]:
    """Yield batches of rows of similar length, in random order when `shuffled`."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    order = generator.permutation(len(rows)) if shuffled else np.arange(len(rows))
    stretch = size * _SORTED_STRETCH
    groups = []
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]
        part = part[np.argsort(lengths[part], kind="stable")]
        groups += [part[at : at + size] for at in range(0, len(part), size)]
    for index in generator.permutation(len(groups)) if shuffled else range(len(groups)):
        numbers = tuple(int(row) for row in groups[index])
        yield replace(collator([rows[row] for row in numbers], generator), rows=numbers)


def _backward(local: LocalModel, batch: Batch, start: forward.Prefix | None) -> torch.Tensor:
    value = forward.loss(local, batch, start)
    value.backward()
    return value.detach()


def _adamw(parameters: list[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay on matrices only: biases and LayerNorm are left alone, as in BERT's own training."""
    groups = [
        {"params": [value for value in parameters if value.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [value for value in parameters if value.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
