"""The published ablations of further pre-training, as we read them, and other ways to train.

Each changes the product in this process only, most of them what the server plans for a client's
round. L_k is the depth of the local model, l the trained block. Source of the method: Wang et al.,
Journal of Software 36(9), 2025; what the names of its ablations stand for is inferred.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np

from fedbt_app.client import client
from fedbt_app.encoders import ENCODERS
from fedbt_app.model import local_model
from fedbt_app.model.local_model import LocalModel
from fedbt_app.model.weights import Weights
from fedbt_app.parts import HEAD
from fedbt_app.plan import RoundPlan, RunPlan, untrained_plan
from fedbt_app.server.rounds import Rounds
from fedbt_app.training import train
from fedbt_app.training.optimizer import Optimizer, TrainSettings

BERT = ENCODERS["bert"]
Change = Callable[[RoundPlan, int, np.random.Generator], RoundPlan]


def _with_above(plan_: RoundPlan, above: Iterable[int]) -> RoundPlan:
    """Put these blocks above the trained one."""
    kept = plan_.local_blocks[: plan_.trained_blocks[0] + 1]
    return replace(plan_, local_blocks=(*kept, *map(int, above)))


def _all_local(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Train every parameter of the local model."""
    drawn = _distinct(plan_, depth, rng)  # each block at one position, and so with one delta
    return replace(drawn, trained_blocks=drawn.local_blocks, embeddings=True)


def _without_progress(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Train block 0 in every round."""
    drawn = rng.integers(1, depth, size=len(plan_.local_blocks) - 1)
    above = sorted(map(int, drawn))
    return replace(plan_, trained_blocks=(0,), local_blocks=(0, *above))


def _without_mapping(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Put the drawn blocks above l in random order, not in that of the global model."""
    above = plan_.local_blocks[plan_.trained_blocks[0] + 1 :]
    return _with_above(plan_, rng.permutation(above))


def _without_sampling(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Take blocks 0 .. L_k - 1, in every round."""
    first = plan_.trained_blocks[0] + 1
    return _with_above(plan_, range(first, len(plan_.local_blocks)))


def _distinct(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Draw the blocks above l without replacement."""
    first = plan_.trained_blocks[0] + 1
    size = len(plan_.local_blocks) - first
    drawn = rng.choice(np.arange(first, depth), size, replace=False)
    return _with_above(plan_, sorted(drawn))


def _distinct_with_last(plan_: RoundPlan, depth: int, rng: np.random.Generator) -> RoundPlan:
    """Draw the blocks above l without replacement, the last block always among them."""
    first = plan_.trained_blocks[0] + 1
    size = len(plan_.local_blocks) - first
    if size == 0:
        return plan_
    last = depth - 1
    drawn = rng.choice(np.arange(first, last), size - 1, replace=False)
    return _with_above(plan_, [*sorted(drawn), last])


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

REDRAWN = "redrawn-every-step"
HEAD_RATE = "head-rate"
BLOCK_RATES = "block-rates"
NAMES = (*ABLATIONS, REDRAWN, HEAD_RATE, BLOCK_RATES)


@contextmanager
def ablated(name: str) -> Iterator[None]:
    """Run with this ablation, one of NAMES; an empty name changes nothing."""
    with _change(name):
        yield


def _change(name: str) -> AbstractContextManager[Any]:
    if name == "":
        return nullcontext()
    if name == REDRAWN:
        return _redrawn()
    if name == HEAD_RATE:
        return _rates(_head_rate)
    if name == BLOCK_RATES:
        return _rates(_block_rate)
    return _changed_plan(ABLATIONS[name])


def _changed_plan(change: Change) -> AbstractContextManager[Any]:
    real: Any = vars(Rounds)["plan"].fget  # of the class: the property itself, not its value

    def plan(rounds: Rounds) -> Changed:
        return Changed(real(rounds), change)

    return patch.object(Rounds, "plan", property(plan))


@dataclass(frozen=True)
class Changed:
    """A run's plan with this change to what it plans for a round."""

    plan: RunPlan
    change: Change

    def round(self, index: int, client_name: str, local_depth: int) -> RoundPlan:
        """Plan a round, and change that."""
        made = self.plan.round(index, client_name, local_depth)
        client_number = zlib.crc32(client_name.encode())
        rng = np.random.default_rng([self.plan.seed, client_number, index, 1])
        return self.change(made, self.plan.depth, rng)


def _head_rate(name: str, last: int) -> float:
    """Train the head at ten times the learning rate."""
    if BERT.part_of(name) == HEAD:
        return 10.0
    return 1.0


def _block_rate(name: str, last: int) -> float:
    """Halve the learning rate from block to block downwards (as in Howard and Ruder, 2018)."""
    kind, _, block = BERT.part_of(name).partition(".")
    if kind != "block":
        return 1.0
    return float(0.5 ** (last - int(block)))


@contextmanager
def _rates(rate: Callable[[str, int], float]) -> Iterator[None]:
    """Train each tensor at the learning rate times `rate(name, index of the last block)`."""
    real_run = train.run

    def run(
        local: LocalModel, rows: Any, collator: Any, settings: TrainSettings, *others: Any
    ) -> Any:
        last = local.plan.local_blocks[-1]

        class RatedOptimizer(Optimizer):
            """The product's optimizer, begun anew for each tensor; the hooks of all are kept."""

            def __init__(self, parameters: Any, settings: TrainSettings) -> None:
                hooks = []
                for name, parameter in local.trained.items():
                    own_rate = settings.learning_rate * rate(name, last)
                    super().__init__([parameter], replace(settings, learning_rate=own_rate))
                    hooks += self._hooks
                self._hooks = hooks

        with patch.object(train, "Optimizer", RatedOptimizer):
            return real_run(local, rows, collator, settings, *others)

    with patch.object(train, "run", run):
        yield


@contextmanager
def _redrawn() -> Iterator[None]:
    """Before each step put other blocks above the trained one: drawn with replacement, ascending.

    A client then holds every block of the global model; its FLOPs stay those of the published plan.
    """
    real_build = local_model.build
    real_take = train._Steps.take
    # all blocks of the global model, of the one local model that there is at a time
    banks: dict[int, Any] = {}
    rng = np.random.default_rng(0)

    def build(weights: Weights, made: RoundPlan, *where: Any) -> LocalModel:
        local = real_build(weights, made, *where)
        banks.clear()
        depth = weights.checkpoint.architecture.depth
        whole = real_build(weights, untrained_plan(depth), *where)
        banks[id(local)] = BERT.blocks(whole.module)
        return local

    def take(steps: Any, *step: Any, **options: Any) -> Any:
        local = steps.local
        bank = banks[id(local)]
        first = local.plan.trained_blocks[0] + 1
        size = len(local.plan.local_blocks) - first
        drawn = np.sort(rng.integers(first, len(bank), size=size))
        for position, block in enumerate(drawn, first):
            BERT.blocks(local.module)[position] = bank[int(block)]
        return real_take(steps, *step, **options)

    with patch.object(client, "build", build), patch.object(train._Steps, "take", take):
        yield
