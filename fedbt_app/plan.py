"""What is trained when: the methods, the schedules, and one client's plan for one round.

The two schedules of PAPER and the sampled local models are those of Wang et al., "Efficient framework for BERT
model training based on federated learning" (Journal of Software 36(9), 2025), sections on further
pre-training and fine-tuning.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from fedbt_app.errors import FedBTError
from fedbt_app.parts import EMBEDDINGS, HEAD, adapter_part, block_part

AUTO, PAPER = "auto", "paper"  # schedules: by task and depth, the published one
SHALLOW = 6  # blocks


@dataclass(frozen=True)
class Method:
    """One row of the methods' table. Every method also trains the output head."""

    blocks: str  # "scheduled", "all" or "none"
    embeddings: bool = False
    adapters: bool = False  # train LoRA adapters on those blocks instead of the blocks


METHODS = {
    "fedbt": Method("scheduled"),
    "full": Method("all", embeddings=True),
    "head": Method("none"),
    "lora": Method("all", adapters=True),
    "fedbt-lora": Method("scheduled", adapters=True),
}
DEPTH_METHODS = tuple(
    name for name, row in METHODS.items() if row.blocks == "scheduled"
)  # clients may hold fewer blocks


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
        name = adapter_part if self.adapters else block_part
        embeddings = (EMBEDDINGS,) if self.embeddings else ()
        return (*embeddings, *(name(index) for index in self.trained_blocks), HEAD)

    @property
    def lowest_trained(self) -> int:
        """Position of the lowest trained block: -1 with trained embeddings, the depth when only the head is."""
        if self.embeddings:
            return -1
        return self.local_blocks.index(self.trained_blocks[0]) if self.trained_blocks else len(self.local_blocks)


def shallow_progressive(num_rounds: int, local_depth: int) -> list[int]:
    """Return the one block trained in each round of further pre-training.

    Half of the remaining rounds go to the present block, then the next deeper one has its turn:
    10 rounds give 0,0,0,0,0,1,1,1,2,3. The block stays below `local_depth`.
    """
    block, remaining, schedule = 0, num_rounds, []
    for index in range(num_rounds):
        if index and index == num_rounds - remaining // 2:
            block, remaining = min(block + 1, local_depth - 1), num_rounds - index
        schedule.append(block)
    return schedule


def cyclic_decreasing(num_rounds: int, depth: int) -> list[int]:
    """Return the lowest block trained in each round of fine-tuning; all above it are trained too.

    One step shallower a round and, after a window of depth/2 rounds, back to the deepest block.
    """
    window = max(1, depth // 2)
    return [depth - 1 - index % window for index in range(num_rounds)]


def resolved(schedule: str, task: str, depth: int) -> str:
    """Return what AUTO stands for, others as they are.

    Up to SHALLOW blocks AUTO is what our measurements chose for the task by score and cost (docs/results.md), above it
    the published order: the paper measured on 12 blocks.
    """
    if _by_our_measurement(schedule, depth) and task == "classification":
        return ",".join(map(str, range(depth // 2, depth)))
    if _by_our_measurement(schedule, depth) and task == "ner":
        return f"0,{(depth - 1) // 2},-1"
    return PAPER if schedule == AUTO else schedule


def _by_our_measurement(schedule: str, depth: int) -> bool:
    return schedule == AUTO and depth <= SHALLOW


def scheduled_blocks(schedule: str, task: str, depth: int, local_depth: int, num_rounds: int) -> list[tuple[int, ...]]:
    """Return the blocks that each round trains, ascending.

    Parameters
    ----------
    schedule
        AUTO, PAPER, or what each round trains, again from the start when the rounds outnumber it: rounds are parted
        by `;`, blocks by `,`, negative ones count from the top. `-1; -2,-1` trains the last block, then the last two.

    Raises
    ------
    FedBTError
        If `schedule` is none of these, or names a block that the model has not.
    """
    schedule = resolved(schedule, task, depth)
    if schedule != PAPER:
        cycle = [_blocks(turn, schedule, depth) for turn in schedule.split(";")]
        return [cycle[index % len(cycle)] for index in range(num_rounds)]
    if task == "mlm":
        return [(block,) for block in shallow_progressive(num_rounds, local_depth)]
    return [tuple(range(lowest, depth)) for lowest in cyclic_decreasing(num_rounds, depth)]


def _blocks(turn: str, schedule: str, depth: int) -> tuple[int, ...]:
    try:
        named = [int(name) for name in turn.split(",")]
    except ValueError:
        raise FedBTError(f"schedule={schedule} is not one: write auto, paper or blocks as in `-1; -2,-1`") from None
    for block in named:
        if not -depth <= block < depth:
            raise FedBTError(
                f"schedule={schedule} names block {block}, the model has 0 to {depth - 1}: name one of those"
            )
    return tuple(sorted({block % depth for block in named}))


def frozen_prefix(method: str, task: str, depth: int, local_depth: int, num_rounds: int, schedule: str = PAPER) -> int:
    """Return how many of a local model's lowest blocks are the same, and frozen, in every round of the run."""
    rounds = range(num_rounds)
    plans = [plan_round(method, task, depth, local_depth, num_rounds, index, 0, "", schedule) for index in rounds]
    first = plans[0].local_blocks
    lowest = min(plan.lowest_trained for plan in plans)
    same = [len({plan.local_blocks[position] for plan in plans}) == 1 for position in range(len(first))]
    return max(0, min(lowest, same.index(False) if False in same else len(first)))


def default_local_depth(method: str, task: str, depth: int, schedule: str = PAPER) -> int:
    """Return L_k where the user gives none: half the depth for sampled pre-training, all of it else.

    AUTO keeps all of up to SHALLOW blocks: trained for a model of half of them, the global one got worse.
    """
    sampled = METHODS[method].blocks == "scheduled" and _samples(schedule, task, depth)
    return max(1, depth // 2) if sampled and not _by_our_measurement(schedule, depth) else depth


def _samples(schedule: str, task: str, depth: int) -> bool:
    """Say whether the blocks above the trained one are drawn: in the paper's pre-training."""
    return task == "mlm" and resolved(schedule, task, depth) == PAPER


def plan_round(
    method: str,
    task: str,
    depth: int,
    local_depth: int,
    num_rounds: int,
    round_: int,
    seed: int,
    client: str,
    schedule: str = PAPER,
) -> RoundPlan:
    """Plan round `round_` (from 0) for a client that builds `local_depth` of `depth` blocks.

    A client shallower than its round's blocks trains the nearest it can hold: the deepest of its
    shallow blocks in the paper's pre-training, else the topmost `local_depth` of the round's blocks.
    """
    row = METHODS[method]
    everything = tuple(range(depth))
    if row.blocks == "none":
        return RoundPlan(round_, everything, ())
    if row.blocks == "all":
        return RoundPlan(round_, everything, everything, row.embeddings, row.adapters)
    local_depth = min(local_depth or default_local_depth(method, task, depth, schedule), depth)
    trained = scheduled_blocks(schedule, task, depth, local_depth, num_rounds)[round_][-local_depth:]
    if _samples(schedule, task, depth):
        local = _sampled_above(trained[0], local_depth, depth, _generator(seed, client, round_))
    else:
        frozen = [block for block in everything if block not in trained][: local_depth - len(trained)]
        local = tuple(sorted((*frozen, *trained)))
    return RoundPlan(round_, local, trained, row.embeddings, row.adapters)


def _sampled_above(block: int, local_depth: int, depth: int, generator: np.random.Generator) -> tuple[int, ...]:
    """Keep blocks 0..block; draw the positions above from the deeper ones, with replacement, ascending."""
    if local_depth == depth:  # nothing to leave out: the local model is the global one
        return tuple(range(depth))
    kept = tuple(range(block + 1))
    drawn = generator.integers(block + 1, depth, size=local_depth - len(kept))
    return kept + tuple(sorted(map(int, drawn)))


def _generator(seed: int, client: str, round_: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(client.encode()), round_])
