"""The count on a weightless model against the closed formulas: two ways to the same number."""

from itertools import product

from tiny_models import LABELS, RANK

from fedbt_app.costs.counting import Counts
from fedbt_app.costs.formulas import Formulas, StepShape
from fedbt_app.encoders.architecture import Architecture
from fedbt_app.plan import METHODS, RoundPlan, RunPlan
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Task

SMALL = Architecture.from_config(
    {
        "model_type": "bert",
        "num_hidden_layers": 3,
        "hidden_size": 12,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "vocab_size": 50,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
    },
    "small",
)


def plans_of(method: str, task: Task) -> list[RoundPlan]:
    """Return what a method trains; if scheduled, a block between frozen ones, then the last."""
    scheduled = METHODS[method].blocks == "scheduled"
    return RunPlan(METHODS[method], task, SMALL.depth, 1 + scheduled, "1;-1").rounds()


def test_the_count_of_every_step_is_the_formulas_number_whatever_is_cached() -> None:
    for name, method, fused in product(LABELS, METHODS, (False, True)):
        task, labels = TASKS[name], len(LABELS[name])
        counts, formulas = (
            Counts(SMALL, task, labels, RANK, fused),
            Formulas(SMALL, task.head, labels, RANK, fused),
        )
        shape = StepShape(2, 8, task.full_positions(8, 0.4))
        for plan in plans_of(method, task):
            for start in {0, max(0, plan.lowest_trained)}:
                found = counts.step(plan, shape, start)
                assert found == formulas.step(plan, shape, start) > 0, (name, fused, start, plan)


def test_the_count_of_the_stock_step_and_of_a_prefix_is_the_formulas_number() -> None:
    for name in LABELS:
        task, labels = TASKS[name], len(LABELS[name])
        counts, formulas = Counts(SMALL, task, labels), Formulas(SMALL, task.head, labels)
        assert counts.stock_step(2, 8) == formulas.stock_step(2, 8) > 0
        for depth in (1, 3):
            assert counts.prefix(depth, 2, 8) == formulas.prefix(depth, 2, 8) > 0
