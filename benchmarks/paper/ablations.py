"""The published ablations of further pre-training, in our reading, and other ways that the product does not have.

Each changes the product in this process only, most of them what `plan_round` gives to the server. L_k is the depth of
the local model, l the trained block. Source of the method: Wang et al., Journal of Software 36(9), 2025; what the
names of its ablations stand for is inferred.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

from fedbt_app import plan
from fedbt_app.client import client
from fedbt_app.encoders.bert import part_of
from fedbt_app.model import local_model
from fedbt_app.model.local_model import LocalModel, whole_plan
from fedbt_app.model.weights import Weights
from fedbt_app.parts import HEAD
from fedbt_app.plan import RoundPlan
from fedbt_app.server import strategy
from fedbt_app.training import train

Change = Callable[[RoundPlan, int, np.random.Generator], RoundPlan]


def _with_above(plan_: RoundPlan, above: Any) -> RoundPlan:
    kept = plan_.local_blocks[: plan_.trained_blocks[0] + 1]
    return replace(plan_, local_blocks=kept + tuple(map(int, above)))


def _all_local(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Train every parameter of the local model, whose blocks are drawn without replacement: each has one delta."""
    drawn = _distinct(plan_, depth, rng)
    return replace(drawn, trained_blocks=drawn.local_blocks, embeddings=True)


def _without_progress(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Train block 0 in every round."""
    above = rng.integers(1, depth, size=len(plan_.local_blocks) - 1)
    return replace(plan_, trained_blocks=(0,), local_blocks=(0, *sorted(map(int, above))))


def _without_mapping(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Put the drawn blocks above l in random order, not in that of the global model."""
    return _with_above(plan_, rng.permutation(plan_.local_blocks[plan_.trained_blocks[0] + 1 :]))


def _without_sampling(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Take blocks 0 .. L_k - 1, in every round."""
    return _with_above(plan_, range(plan_.trained_blocks[0] + 1, len(plan_.local_blocks)))


def _distinct(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Draw the blocks above l without replacement."""
    first = plan_.trained_blocks[0] + 1
    size = len(plan_.local_blocks) - first
    return _with_above(plan_, sorted(rng.choice(np.arange(first, depth), size, replace=False)))


def _distinct_with_last(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Draw the blocks above l without replacement, the last block always among them."""
    first = plan_.trained_blocks[0] + 1
    if not (size := len(plan_.local_blocks) - first):
        return plan_
    return _with_above(plan_, [*sorted(rng.choice(np.arange(first, depth - 1), size - 1, replace=False)), depth - 1])


def _with_embeddings(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Train the embeddings too: whole ones, and their delta is sent."""
    return replace(plan_, embeddings=True)


ABLATIONS: dict[str, Change] = {
    "all-local": _all_local,
    "without-progress": _without_progress,
    "without-mapping": _without_mapping,
    "without-sampling": _without_sampling,
    "distinct": _distinct,
    "distinct-with-last": _distinct_with_last,
    "with-embeddings": _with_embeddings,
}


REDRAWN, HEAD_RATE, BLOCK_RATES = "redrawn-every-step", "head-rate", "block-rates"
NAMES = (*ABLATIONS, REDRAWN, HEAD_RATE, BLOCK_RATES)


@contextmanager
def ablated(name: str) -> Iterator[None]:
    """Run with this ablation, one of NAMES; an empty name changes nothing."""

    def changed(method: str, task: str, depth: int, *others: Any) -> RoundPlan:
        made = plan.plan_round(method, task, depth, *others)
        _, _, round_, seed, client_, *_ = others
        return ABLATIONS[name](made, depth, np.random.default_rng([seed, zlib.crc32(client_.encode()), round_, 1]))

    with contextlib.ExitStack() as changes:
        if name == REDRAWN:
            changes.enter_context(_redrawn())
        elif name in (HEAD_RATE, BLOCK_RATES):
            changes.enter_context(_rates(_head_rate if name == HEAD_RATE else _block_rate))
        elif name:
            changes.enter_context(patch.object(strategy, "plan_round", changed))
        yield


def _head_rate(name: str, last: int) -> float:
    """Train the head at ten times the learning rate."""
    return 10.0 if part_of(name) == HEAD else 1.0


def _block_rate(name: str, last: int) -> float:
    """Halve the learning rate from block to block, from the last one down (as ULMFiT does, Howard and Ruder 2018)."""
    if not name.startswith("bert.encoder.layer."):
        return 1.0
    return 0.5 ** (last - int(name.split(".")[3]))


@contextmanager
def _rates(rate: Callable[[str, int], float]) -> Iterator[None]:
    """Train each tensor at the learning rate times `rate(name, index of the last block)`."""
    real_run, real_optimizer = train.run, train.Optimizer

    def run(local: LocalModel, rows: Any, collator: Any, settings: train.TrainSettings, *others: Any) -> Any:
        class Optimizer(real_optimizer):
            def __init__(self, parameters: Any, settings: train.TrainSettings) -> None:
                hooks = []
                for name, parameter in local.trained.items():
                    own = settings.learning_rate * rate(name, local.plan.local_blocks[-1])
                    super().__init__([parameter], replace(settings, learning_rate=own))
                    hooks += self._hooks
                self._hooks = hooks

        with patch.object(train, "Optimizer", Optimizer):
            return real_run(local, rows, collator, settings, *others)

    with patch.object(train, "run", run):
        yield


@contextmanager
def _redrawn() -> Iterator[None]:
    """Before each step put other blocks above the trained one: drawn with replacement, ascending.

    A client then holds every block of the global model; its FLOPs stay those of the published plan.
    """
    real_build, real_backward = local_model.build, train._backward
    banks: dict[int, Any] = {}
    rng = np.random.default_rng(0)

    def build(weights: Weights, made: RoundPlan, *where: Any) -> LocalModel:
        local = real_build(weights, made, *where)
        banks.clear()
        banks[id(local)] = real_build(weights, whole_plan(weights), *where).module.bert.encoder.layer
        return local

    def backward(local: LocalModel, *step: Any) -> Any:
        bank, first = banks[id(local)], local.plan.trained_blocks[0] + 1
        drawn = np.sort(rng.integers(first, len(bank), size=len(local.plan.local_blocks) - first))
        for position, block in enumerate(drawn, first):
            local.module.bert.encoder.layer[position] = bank[int(block)]
        return real_backward(local, *step)

    with patch.object(client, "build", build), patch.object(train, "_backward", backward):
        yield
