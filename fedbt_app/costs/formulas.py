"""Closed formulas for the FLOPs of a step, for families whose blocks compute what BERT's do.

FLOPs are those of matrix products, two for a multiply-add, as torch's counter counts them. A linear
layer costs one product forward, one more for its weight's gradient if it is trained and one more
for its input's gradient if anything below is.
"""

from dataclasses import dataclass

from fedbt_app.encoders.architecture import Architecture
from fedbt_app.parts import HeadKind
from fedbt_app.plan import RoundPlan

# Products of attention's backward pass.
_PLAIN_BACKWARD = 4
_FUSED_BACKWARD = 5  # such a kernel computes the scores again


@dataclass(frozen=True)
class StepShape:
    """B examples of T word pieces with P loss positions each."""

    batch: int
    length: int
    positions: int


@dataclass(frozen=True)
class Formulas:
    """The FLOPs of one model with one head.

    Attributes
    ----------
    rank : of the LoRA adapters where a plan trains those
    fused
        whether attention with dropout runs in a fused kernel too; on a CPU only attention without
        dropout does
    """

    architecture: Architecture
    head: HeadKind
    num_labels: int
    rank: int = 0
    fused: bool = False

    def step(self, plan: RoundPlan, shape: StepShape, start: int = 0) -> int:
        """Return the FLOPs of one exact training step (model/forward.py).

        `start` is how many of the lowest blocks' output comes from the cache.
        """
        total = 0
        gradient_below = plan.embeddings
        last = len(plan.local_blocks) - 1
        for position in range(start, last + 1):
            trained = plan.local_blocks[position] in plan.trained_blocks
            total += self._block(plan, shape, trained, position == last, gradient_below)
            gradient_below = gradient_below or trained
        rows = shape.batch * shape.positions
        return total + self._head(rows, plan.embeddings, gradient_below)

    def stock_step(self, batch: int, length: int) -> int:
        """Return the FLOPs of a stock full-model step: all positions of all blocks, dense head."""
        hidden = self.architecture.hidden
        tokens = batch * length
        linear = 3 * self._linear_layers(tokens)
        attention = 2 * tokens * length * hidden * (2 + _PLAIN_BACKWARD)
        rows = tokens
        if self.head is HeadKind.SEQUENCE:
            rows = batch
        head = self._head(rows, embeddings_trained=True, gradient_below=True)
        return self.architecture.depth * (linear + attention) + head

    def prefix(self, depth: int, batch: int, length: int) -> int:
        """Return the FLOPs of the first `depth` blocks, forward only, at every position."""
        tokens = batch * length
        attention = 2 * 2 * tokens * length * self.architecture.hidden
        return depth * (self._linear_layers(tokens) + attention)

    def _linear_layers(self, tokens: int) -> int:
        """Return the FLOPs of a block's six linear layers, forward."""
        hidden = self.architecture.hidden
        intermediate = self.architecture.dimensions.intermediate
        attention = 4 * 2 * tokens * hidden * hidden  # query, key, value and output
        feed_forward = 2 * 2 * tokens * hidden * intermediate
        return attention + feed_forward

    def _block(
        self,
        plan: RoundPlan,
        shape: StepShape,
        trained: bool,
        last: bool,
        gradient_below: bool,
    ) -> int:
        hidden = self.architecture.hidden
        intermediate = self.architecture.dimensions.intermediate
        full = trained and not plan.adapters
        adapted = trained and plan.adapters
        tokens = shape.batch * shape.length
        queries = tokens
        if last:
            queries = shape.batch * shape.positions
        # after attention the adapters below count as something to pass a gradient to
        inside = gradient_below or trained
        total = 0
        for rows in (queries, tokens):  # the adapted projections: query, value
            total += _linear(rows, hidden, hidden, full, gradient_below)
            if adapted:
                total += _linear(rows, hidden, self.rank, True, gradient_below)
                total += _linear(rows, self.rank, hidden, True, True)
        total += _linear(tokens, hidden, hidden, full, gradient_below)  # key
        # forward the scores and what they weigh: two products
        products = 2 + self._attention_backward(trained, adapted, gradient_below)
        total += 2 * queries * shape.length * hidden * products
        total += _linear(queries, hidden, hidden, full, inside)
        total += _linear(queries, hidden, intermediate, full, inside)
        total += _linear(queries, intermediate, hidden, full, inside)
        return total

    def _attention_backward(
        self,
        trained: bool,
        adapted: bool,
        gradient_below: bool,
    ) -> int:
        """Return how many products attention's backward pass takes; it needs something to train."""
        if not trained and not gradient_below:
            return 0
        if self.fused or not trained:
            return _FUSED_BACKWARD
        if adapted and not gradient_below:
            return _PLAIN_BACKWARD - 1  # nobody asks for the gradient of the keys
        return _PLAIN_BACKWARD

    def _head(self, rows: int, embeddings_trained: bool, gradient_below: bool) -> int:
        """The head's matrices are always trained, a tied word decoder only with the embeddings."""
        total = 0
        shapes = self.architecture.head(self.head, self.num_labels)
        for shape in shapes.values():
            if len(shape) == 2:
                outputs, inputs = shape
                total += _linear(rows, inputs, outputs, True, gradient_below)
                gradient_below = True
        if self.head is HeadKind.MASKED_LM:
            vocabulary = self.architecture.dimensions.vocabulary
            total += _linear(rows, self.architecture.hidden, vocabulary, embeddings_trained, True)
        return total


def _linear(
    rows: int,
    inputs: int,
    outputs: int,
    trained: bool,
    gradient_below: bool,
) -> int:
    products = 1 + trained + gradient_below
    return 2 * rows * inputs * outputs * products
