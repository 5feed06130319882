"""Costs from the model's dimensions alone: what `fedbt plan` prints and what measurements are held against.

FLOPs are those of matrix products, two for a multiply-add, as torch's counter counts them. A linear
layer costs one product forward, one more for its weight's gradient if it is trained and one more
for its input's gradient if anything below is.
"""

import math
from dataclasses import dataclass

from fedbt_app.codec.formats import payload_bytes
from fedbt_app.encoders.bert import Architecture
from fedbt_app.parts import HEAD, count
from fedbt_app.plan import METHODS, PAPER, RoundPlan, plan_round

BYTES = 4  # of a float32
_FUSED_BACKWARD, _PLAIN_BACKWARD = 5, 4  # products: a fused attention kernel computes the scores again


@dataclass(frozen=True)
class StepShape:
    """B examples of T word pieces with P loss positions each."""

    batch: int
    length: int
    positions: int


def step_flops(
    arch: Architecture,
    task: str,
    num_labels: int,
    plan: RoundPlan,
    shape: StepShape,
    rank: int = 0,
    fused: bool = False,
    start: int = 0,
) -> int:
    """Return the FLOPs of one exact training step (forward.py).

    `rank` is that of the LoRA adapters where the plan trains those; `fused` says that attention
    with dropout runs in a fused kernel too (on a CPU only attention without dropout does); `start`
    is how many of the lowest blocks' output comes from the cache.
    """
    h, f = arch.hidden, arch.intermediate
    tokens, total, gradient_below = shape.batch * shape.length, 0, plan.embeddings
    for position, block in enumerate(plan.local_blocks):
        if position < start:
            continue
        trained = block in plan.trained_blocks
        full, adapted = trained and not plan.adapters, trained and plan.adapters
        last = position == len(plan.local_blocks) - 1
        queries = shape.batch * shape.positions if last else tokens
        below, inside = gradient_below, gradient_below or trained
        for rows in (queries, tokens):  # the adapted projections: query, value
            total += _linear(rows, h, h, full, below)
            if adapted:
                total += _linear(rows, h, rank, True, below) + _linear(rows, rank, h, True, True)
        total += _linear(tokens, h, h, full, below)  # key
        backward = _FUSED_BACKWARD if fused or not trained else _PLAIN_BACKWARD - (adapted and not below)
        total += 2 * queries * shape.length * h * (2 + (backward if inside else 0))
        # after attention the adapters below count as something to pass a gradient to
        total += _linear(queries, h, h, full, inside)
        total += _linear(queries, h, f, full, inside) + _linear(queries, f, h, full, inside)
        gradient_below = inside
    return total + _head_flops(arch, task, num_labels, shape.batch * shape.positions, plan.embeddings, gradient_below)


def stock_step_flops(arch: Architecture, task: str, num_labels: int, batch: int, length: int) -> int:
    """Return the FLOPs of a stock full-model step: every position of every block, dense output head."""
    h, f = arch.hidden, arch.intermediate
    tokens = batch * length
    block = 3 * (4 * 2 * tokens * h * h + 2 * 2 * tokens * h * f) + 2 * tokens * length * h * (2 + _PLAIN_BACKWARD)
    rows = batch if task == "classification" else tokens
    return arch.depth * block + _head_flops(arch, task, num_labels, rows, True, True)


def prefix_flops(arch: Architecture, depth: int, batch: int, length: int) -> int:
    """Return the FLOPs of the first `depth` blocks, forward only, at every position."""
    h, tokens = arch.hidden, batch * length
    return depth * (4 * 2 * tokens * h * h + 2 * 2 * tokens * h * arch.intermediate + 2 * 2 * tokens * length * h)


def _linear(rows: int, inputs: int, outputs: int, trained: bool, gradient_below: bool) -> int:
    return 2 * rows * inputs * outputs * (1 + trained + gradient_below)


def _head_flops(
    arch: Architecture, task: str, num_labels: int, rows: int, embeddings_trained: bool, gradient_below: bool
) -> int:
    """Head is always trained; the MLM decoder only with the word embeddings that it is tied to."""
    h = arch.hidden
    if task == "mlm":
        return _linear(rows, h, h, True, gradient_below) + _linear(rows, h, arch.vocabulary, embeddings_trained, True)
    if task == "classification":
        return _linear(rows, h, h, True, gradient_below) + _linear(rows, h, num_labels, True, True)
    return _linear(rows, h, num_labels, True, gradient_below)


@dataclass(frozen=True)
class RoundCosts:
    """One client's predicted costs in one round: FLOPs of one step, bytes of one exchange, bytes of memory."""

    plan: RoundPlan
    step_flops: int
    exchange_bytes: int
    memory_bytes: int


def trained_parameters(arch: Architecture, task: str, num_labels: int, plan: RoundPlan, rank: int) -> int:
    """Return how many parameters a round trains and sends each way."""
    return sum(count(arch.part(part, task, num_labels, rank)) for part in plan.trained_parts)


def round_costs(
    arch: Architecture,
    task: str,
    num_labels: int,
    plan: RoundPlan,
    shape: StepShape,
    rank: int = 0,
    codec: str = "float32",
) -> RoundCosts:
    """Predict one client's costs of one plan; bytes before any zstd."""
    return RoundCosts(
        plan,
        step_flops(arch, task, num_labels, plan, shape, rank),
        sum(payload_bytes(arch.part(part, task, num_labels, rank).values(), codec) for part in plan.trained_parts),
        _memory(arch, task, num_labels, plan, shape, rank),
    )


def predict_rounds(
    arch: Architecture,
    task: str,
    method: str,
    num_labels: int,
    num_rounds: int,
    local_depth: int,
    shape: StepShape,
    rank: int,
    codec: str = "float32",
    schedule: str = PAPER,
) -> list[RoundCosts]:
    """Predict every round of one client."""
    plans = [
        plan_round(method, task, arch.depth, local_depth, num_rounds, round_, seed=0, client="", schedule=schedule)
        for round_ in range(num_rounds)
    ]
    return [round_costs(arch, task, num_labels, plan, shape, rank, codec) for plan in plans]


def full_model_bytes(arch: Architecture, task: str, num_labels: int) -> int:
    """Return the bytes of one exchange of full-model federated averaging."""
    return BYTES * count(arch.model(task, num_labels))


def _memory(arch: Architecture, task: str, num_labels: int, plan: RoundPlan, shape: StepShape, rank: int) -> int:
    """Estimate a step's memory: weights, gradient and two AdamW moments of what is trained, saved activations.

    A block with a graph saves about 10 states of the hidden and 2 of the intermediate size a token,
    and two attention maps; the MLM head its logits, their softmax and their gradient.
    """
    h = arch.hidden
    distinct = set(plan.local_blocks)
    weights = count(arch.embeddings()) + len(distinct) * count(arch.block(0))
    weights += count(arch.part(HEAD, task, num_labels, rank))
    trained = trained_parameters(arch, task, num_labels, plan, rank)
    with_graph = len(plan.local_blocks) - max(0, plan.lowest_trained)
    tokens = shape.batch * shape.length
    heads = max(1, h // 64)
    block = tokens * (10 * h + 2 * arch.intermediate) + 2 * shape.batch * heads * shape.length**2
    outputs = arch.vocabulary if task == "mlm" else num_labels
    head = 3 * shape.batch * shape.positions * outputs
    return BYTES * (weights + 3 * trained + with_graph * block + head)


def default_shape(task: str, batch: int, length: int, mask_probability: float) -> StepShape:
    """Return the shape of a full batch: all sequences of full length."""
    positions = {"mlm": math.ceil(mask_probability * (length - 2)), "classification": 1, "ner": length}
    return StepShape(batch, length, positions[task])


def full_plan(depth: int) -> RoundPlan:
    """Return the plan of full-model training."""
    row = METHODS["full"]
    everything = tuple(range(depth))
    return RoundPlan(0, everything, everything, row.embeddings, row.adapters)
