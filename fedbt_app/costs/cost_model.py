"""Costs from the model's dimensions alone: what `fedbt plan` prints and what measurements are held
against.
"""

from dataclasses import dataclass
from functools import cached_property

from fedbt_app.codec.formats import payload_bytes
from fedbt_app.costs.counting import Counts
from fedbt_app.costs.formulas import Formulas, StepShape
from fedbt_app.encoders.architecture import Architecture
from fedbt_app.parts import HEAD, HeadKind, count
from fedbt_app.plan import RoundPlan, full_plan
from fedbt_app.tasks.base import Task

BYTES = 4  # of a float32


@dataclass(frozen=True)
class RoundCosts:
    """One client's predicted costs in one round: FLOPs of one step, bytes of one exchange, bytes of
    memory.
    """

    plan: RoundPlan
    step_flops: int
    exchange_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class CostModel:
    """What one model, trained for one task, costs.

    Attributes
    ----------
    rank : of the LoRA adapters where a plan trains those
    fused
        whether attention with dropout runs in a fused kernel too: on a CPU only attention without
        dropout does
    codec : number format of the deltas; bytes are those before any zstd
    """

    architecture: Architecture
    task: Task
    num_labels: int
    rank: int = 0
    fused: bool = False
    codec: str = "float32"

    @cached_property
    def _flops(self) -> Formulas | Counts:
        """The closed formulas where the family has them: they take no time. Else the step is
        counted.
        """
        if self.architecture.encoder.plain_blocks:
            return Formulas(
                self.architecture, self.task.head, self.num_labels, self.rank, self.fused
            )
        return Counts(self.architecture, self.task, self.num_labels, self.rank, self.fused)

    def step_flops(self, plan: RoundPlan, shape: StepShape, start: int = 0) -> int:
        """Return the FLOPs of one exact step; `start` is how many of the lowest blocks' output
        comes from the cache.
        """
        return self._flops.step(plan, shape, start)

    def stock_step_flops(self, batch: int, length: int) -> int:
        """Return the FLOPs of a stock full-model step: the reference of a report."""
        return self._flops.stock_step(batch, length)

    def full_step_flops(self, shape: StepShape) -> int:
        """Return the FLOPs of full-model training by the exact step: the reference with the same
        optimisations.
        """
        return self.step_flops(full_plan(self.architecture.depth), shape)

    def prefix_flops(self, depth: int, batch: int, length: int) -> int:
        """Return the FLOPs of the first `depth` blocks, forward only, at every position."""
        return self._flops.prefix(depth, batch, length)

    def full_shape(self, batch: int, length: int, mask_probability: float) -> StepShape:
        """Return the shape of a full batch: all sequences of full length."""
        return StepShape(batch, length, self.task.full_positions(length, mask_probability))

    def trained_parameters(self, plan: RoundPlan) -> int:
        """Return how many parameters a round trains and sends each way."""
        return sum(count(self._shapes(part)) for part in plan.trained_parts)

    def exchange_bytes(self, plan: RoundPlan) -> int:
        """Return the bytes that a round sends each way."""
        return sum(
            payload_bytes(self._shapes(part).values(), self.codec) for part in plan.trained_parts
        )

    def memory_bytes(self, plan: RoundPlan, shape: StepShape) -> int:
        """Estimate a step's memory: weights, gradient and two AdamW moments of what is trained,
        saved activations.

        A block with a graph saves about 10 states of the hidden and 2 of the intermediate size a
        token, and two attention maps; the MLM head its logits, their softmax and their gradient.
        """
        hidden = self.architecture.hidden
        tokens = shape.batch * shape.length
        distinct = len(set(plan.local_blocks))
        weights = count(self.architecture.embeddings()) + distinct * count(
            self.architecture.block(0)
        )
        weights += count(self._shapes(HEAD))
        with_graph = len(plan.local_blocks) - max(0, plan.lowest_trained)
        attention_heads = max(1, hidden // 64)
        block = tokens * (10 * hidden + 2 * self.architecture.dimensions.intermediate)
        block += 2 * shape.batch * attention_heads * shape.length**2
        head = 3 * shape.batch * shape.positions * self._outputs
        return BYTES * (weights + 3 * self.trained_parameters(plan) + with_graph * block + head)

    def round(self, plan: RoundPlan, shape: StepShape) -> RoundCosts:
        """Predict one client's costs of one plan."""
        return RoundCosts(
            plan=plan,
            step_flops=self.step_flops(plan, shape),
            exchange_bytes=self.exchange_bytes(plan),
            memory_bytes=self.memory_bytes(plan, shape),
        )

    @property
    def _outputs(self) -> int:
        words = self.task.head is HeadKind.MASKED_LM
        return self.architecture.dimensions.vocabulary if words else self.num_labels

    def _shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        return self.architecture.part(part, self.task.head, self.num_labels, self.rank)


def full_model_bytes(architecture: Architecture, head: HeadKind, num_labels: int) -> int:
    """Return the bytes of one exchange of full-model federated averaging, in float32."""
    return BYTES * count(architecture.model(head, num_labels))
