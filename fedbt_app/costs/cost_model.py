"""Costs from the model's dimensions alone: for `fedbt plan`, and to hold measurements against."""

from dataclasses import dataclass
from functools import cached_property

from fedbt_app.codec.formats import payload_bytes
from fedbt_app.costs.counting import Counts
from fedbt_app.costs.formulas import Formulas, StepShape
from fedbt_app.encoders.architecture import Architecture
from fedbt_app.parts import HEAD, HeadKind, Shapes, count
from fedbt_app.plan import RoundPlan, full_plan
from fedbt_app.tasks.base import Task

BYTES = 4  # of a float32


@dataclass(frozen=True)
class RoundCosts:
    """One client's predicted costs in one round: of one step, of one exchange, of memory."""

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
        """The closed formulas, which take no time, where the family has them; else counts."""
        if self.architecture.encoder.plain_blocks:
            return Formulas(
                architecture=self.architecture,
                head=self.task.head,
                num_labels=self.num_labels,
                rank=self.rank,
                fused=self.fused,
            )
        return Counts(
            architecture=self.architecture,
            task=self.task,
            num_labels=self.num_labels,
            rank=self.rank,
            fused=self.fused,
        )

    def step_flops(self, plan: RoundPlan, shape: StepShape, start: int = 0) -> int:
        """Return the FLOPs of one exact step; the cache has the `start` lowest blocks' output."""
        return self._flops.step(plan, shape, start)

    def stock_step_flops(self, batch: int, length: int) -> int:
        """Return the FLOPs of a stock full-model step: the reference of a report."""
        return self._flops.stock_step(batch, length)

    def full_step_flops(self, shape: StepShape) -> int:
        """Return the FLOPs of a full-model exact step: a reference with the same optimisations."""
        plan = full_plan(self.architecture.depth)
        return self.step_flops(plan, shape)

    def prefix_flops(self, depth: int, batch: int, length: int) -> int:
        """Return the FLOPs of the first `depth` blocks, forward only, at every position."""
        return self._flops.prefix(depth, batch, length)

    def full_shape(
        self,
        batch: int,
        length: int,
        mask_probability: float,
    ) -> StepShape:
        """Return the shape of a full batch: all sequences of full length."""
        positions = self.task.full_positions(length, mask_probability)
        return StepShape(batch, length, positions)

    def trained_parameters(self, plan: RoundPlan) -> int:
        """Return how many parameters a round trains and sends each way."""
        return sum(count(self._shapes(part)) for part in plan.trained_parts)

    def exchange_bytes(self, plan: RoundPlan) -> int:
        """Return the bytes that a round sends each way."""
        total = 0
        for part in plan.trained_parts:
            shapes = self._shapes(part)
            total += payload_bytes(shapes.values(), self.codec)
        return total

    def memory_bytes(self, plan: RoundPlan, shape: StepShape) -> int:
        """Estimate a step's memory: weights, what training adds to them, and saved activations.

        Training adds the gradient and two AdamW moments of what is trained. A block with a graph
        saves about 10 states of the hidden and 2 of the intermediate size a token, and two
        attention maps; the MLM head its logits, their softmax and their gradient.
        """
        trained = 3 * self.trained_parameters(plan)
        with_graph = len(plan.local_blocks) - max(0, plan.lowest_trained)
        blocks = with_graph * self._block_activations(shape)
        head = 3 * shape.batch * shape.positions * self._outputs
        return BYTES * (self._held(plan) + trained + blocks + head)

    def _held(self, plan: RoundPlan) -> int:
        """Return how many weights the local model has."""
        block = count(self.architecture.block(0))
        blocks = len(set(plan.local_blocks))  # a block that stands in several places is one
        embeddings = count(self.architecture.embeddings())
        return embeddings + blocks * block + count(self._shapes(HEAD))

    def _block_activations(self, shape: StepShape) -> int:
        tokens = shape.batch * shape.length
        hidden = self.architecture.hidden
        intermediate = self.architecture.dimensions.intermediate
        states = tokens * (10 * hidden + 2 * intermediate)
        attention_heads = max(1, hidden // 64)
        maps = 2 * shape.batch * attention_heads * shape.length**2
        return states + maps

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
        if self.task.head is HeadKind.MASKED_LM:
            return self.architecture.dimensions.vocabulary
        return self.num_labels

    def _shapes(self, part: str) -> Shapes:
        return self.architecture.part(
            part,
            kind=self.task.head,
            num_labels=self.num_labels,
            rank=self.rank,
        )


def full_model_bytes(
    architecture: Architecture,
    head: HeadKind,
    num_labels: int,
) -> int:
    """Return the bytes of one exchange of full-model federated averaging, in float32."""
    return BYTES * count(architecture.model(head, num_labels))
