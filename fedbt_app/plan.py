"""What is trained when: the methods, a run's plan, and one client's plan for one round.

The published orders (tasks/schedules.py) and the sampled local models are those of Wang et al.,
"Efficient framework for BERT model training based on federated learning" (Journal of Software
36(9), 2025).
"""

import zlib
from dataclasses import dataclass

import numpy as np

from fedbt_app.errors import FedBTError
from fedbt_app.parts import EMBEDDINGS, HEAD, adapter_part, block_part
from fedbt_app.tasks.base import Blocks, Task

AUTO = "auto"  # the schedule by task and depth
PAPER = "paper"  # the published one
SHALLOW = 6  # blocks


@dataclass(frozen=True)
class Method:
    """One row of the methods' table. Every method also trains the output head."""

    blocks: str  # "scheduled", "all" or "none"
    embeddings: bool = False
    adapters: bool = False  # train LoRA adapters on those blocks instead of the blocks


FULL = "full"  # full-model federated averaging: what costs are set against
METHODS = {
    "fedbt": Method("scheduled"),
    FULL: Method("all", embeddings=True),
    "head": Method("none"),
    "lora": Method("all", adapters=True),
    "fedbt-lora": Method("scheduled", adapters=True),
}
# Methods with a schedule, whose clients may hold fewer blocks.
DEPTH_METHODS = tuple(name for name, row in METHODS.items() if row.blocks == "scheduled")


@dataclass(frozen=True)
class RoundPlan:
    """What one client builds and trains in one round (counted from 0).

    `local_blocks[p]` is the global block at position p of the local model; `trained_blocks` are
    global blocks, ascending, each at exactly one position.
    """

    round: int
    local_blocks: tuple[int, ...]
    trained_blocks: tuple[int, ...]
    embeddings: bool = False
    adapters: bool = False

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The parts whose deltas the client sends."""
        part_of = block_part
        if self.adapters:
            part_of = adapter_part
        parts = [part_of(block) for block in self.trained_blocks]
        if self.embeddings:
            parts.insert(0, EMBEDDINGS)
        return (*parts, HEAD)

    @property
    def lowest_trained(self) -> int:
        """Position of the lowest trained block: -1 for embeddings, the depth for the head alone."""
        if self.embeddings:
            return -1
        if not self.trained_blocks:
            return len(self.local_blocks)
        return self.local_blocks.index(self.trained_blocks[0])


@dataclass(frozen=True)
class RunPlan:
    """What a run trains, in every round and for every client.

    Attributes
    ----------
    depth : blocks of the global model
    schedule
        AUTO, PAPER, or what each round trains, again from the start when the rounds outnumber it:
        rounds are parted by `;`, blocks by `,`, negative ones count from the top. `-1; -2,-1`
        trains the last block, then the last two. Up to SHALLOW blocks AUTO is what our measurements
        chose for the task by score and cost (docs/results.md), above it the published order: the
        paper measured on 12 blocks.
    """

    method: Method
    task: Task
    depth: int
    num_rounds: int
    schedule: str = AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a schedule that is none, or that names a block which the model has not."""
        self.scheduled_blocks(self.depth)

    @property
    def by_measurement(self) -> bool:
        """Whether AUTO stands for what our measurements chose, not for the published order."""
        return self.schedule == AUTO and self.depth <= SHALLOW

    @property
    def resolved(self) -> str:
        """The schedule, with AUTO replaced by what it stands for."""
        if self.by_measurement:
            return self.task.measured(self.depth) or PAPER
        if self.schedule == AUTO:
            return PAPER
        return self.schedule

    @property
    def draws_deeper_blocks(self) -> bool:
        """Whether each client's blocks above the trained one are drawn, as the paper pre-trains."""
        if self.method.blocks != "scheduled" or self.resolved != PAPER:
            return False
        return self.task.draws_deeper_blocks

    @property
    def default_local_depth(self) -> int:
        """L_k where the user gives none: half the depth where deeper blocks are drawn, else all.

        AUTO keeps all of up to SHALLOW blocks: trained for a model of half of them, the global one
        got worse.
        """
        if self.draws_deeper_blocks and not self.by_measurement:
            return max(1, self.depth // 2)
        return self.depth

    def round(self, index: int, client: str = "", local_depth: int = 0) -> RoundPlan:
        """Plan round `index` (from 0) for a client of `local_depth` blocks (0: the default).

        A client shallower than its round's blocks trains the nearest it can hold: the deepest of
        its shallow blocks in the paper's pre-training, else the topmost `local_depth` of the
        round's blocks.
        """
        everything = tuple(range(self.depth))
        if self.method.blocks == "none":
            return RoundPlan(index, everything, ())
        if self.method.blocks == "all":
            local = everything
            trained = everything
        else:
            local_depth = min(local_depth or self.default_local_depth, self.depth)
            trained = self.scheduled_blocks(local_depth)[index][-local_depth:]
            local = self._local_blocks(trained, local_depth, client, index)
        return RoundPlan(index, local, trained, self.method.embeddings, self.method.adapters)

    def rounds(self, client: str = "", local_depth: int = 0) -> list[RoundPlan]:
        """Plan every round of one client."""
        return [self.round(index, client, local_depth) for index in range(self.num_rounds)]

    def frozen_prefix(self, local_depth: int = 0) -> int:
        """Return how many of a local model's lowest blocks stay the same, frozen, in all rounds."""
        plans = self.rounds(local_depth=local_depth)
        lowest_trained = min(plan.lowest_trained for plan in plans)
        frozen = max(0, lowest_trained)
        for position in range(frozen):
            blocks = {plan.local_blocks[position] for plan in plans}
            if len(blocks) > 1:  # not the same block in every round
                return position
        return frozen

    def scheduled_blocks(self, local_depth: int) -> list[Blocks]:
        """Return the blocks that each round trains, ascending, if clients hold `local_depth`."""
        schedule = self.resolved
        if schedule == PAPER:
            return self.task.published(self.num_rounds, self.depth, local_depth)
        cycle = [self._named(turn) for turn in schedule.split(";")]
        return [cycle[index % len(cycle)] for index in range(self.num_rounds)]

    def _named(self, turn: str) -> Blocks:
        try:
            named = [int(name) for name in turn.split(",")]
        except ValueError:
            raise FedBTError(
                f"schedule={self.schedule} is not one: write auto, paper or blocks as in `-1; -2,-1`"
            ) from None
        for block in named:
            if not -self.depth <= block < self.depth:
                raise FedBTError(
                    f"schedule={self.schedule} names block {block}, the model has 0 to {self.depth - 1}: "
                    "name one of those"
                )
        ascending = sorted({block % self.depth for block in named})
        return tuple(ascending)

    def _local_blocks(self, trained: Blocks, local_depth: int, client: str, index: int) -> Blocks:
        """Return the trained blocks and, up to `local_depth` blocks, the frozen ones beside them."""
        if self.draws_deeper_blocks:
            return self._sampled_above(trained[0], local_depth, client, index)
        frozen = [block for block in range(self.depth) if block not in trained]
        lowest = frozen[: local_depth - len(trained)]
        return tuple(sorted((*lowest, *trained)))

    def _sampled_above(self, block: int, local_depth: int, client: str, index: int) -> Blocks:
        """Keep blocks 0..block; above, draw from the deeper ones, with replacement, ascending."""
        if local_depth == self.depth:  # nothing to leave out: the local model is the global one
            return tuple(range(self.depth))
        generator = _generator(self.seed, client, index)
        kept = range(block + 1)
        drawn = generator.integers(block + 1, self.depth, size=local_depth - len(kept))
        return (*kept, *sorted(map(int, drawn)))


def full_plan(depth: int) -> RoundPlan:
    """Return the plan of full-model training."""
    everything = tuple(range(depth))
    return RoundPlan(0, everything, everything, embeddings=METHODS[FULL].embeddings)


def untrained_plan(depth: int) -> RoundPlan:
    """Return the plan of the global model with nothing trained: for evaluation and export."""
    return RoundPlan(0, tuple(range(depth)), ())


def _generator(seed: int, client: str, index: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(client.encode()), index])
