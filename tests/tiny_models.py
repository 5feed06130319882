"""Local models over the tiny BERT of conftest.py: new heads, adapters that have learned a bit."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import LocalModel, build
from fedbt_app.model.weights import ModelSpec, Weights, new_tensors
from fedbt_app.parts import HEAD, adapter_part
from fedbt_app.plan import METHODS, PAPER, RoundPlan, RunPlan
from fedbt_app.tasks import TASKS
from fedbt_app.tensors import Tensors

LABELS: Mapping[str, tuple[str, ...]] = {
    "mlm": (),
    "classification": ("heart", "kidney", "liver"),
    "ner": ("B-x", "I-x", "O"),
}
DEPTH, ROUNDS, RANK = 4, 4, 4


def weights_of(
    folder: Path,
    task: str,
    adapted: Iterable[int] = (),
    dropout: float = 0.0,
    rank: int = RANK,
    labels: tuple[str, ...] | None = None,
) -> Weights:
    """Return the base with a new head, and with adapters on the blocks `adapted`."""
    held: dict[str, Tensors] = {}
    spec = ModelSpec(TASKS[task], LABELS[task] if labels is None else labels, dropout, rank)
    weights = Weights(Checkpoint(folder), lambda part: held.get(part, {}), spec)
    held[HEAD] = new_tensors(weights.lacking(HEAD), seed=1)
    generator = torch.Generator().manual_seed(2)
    for part in map(adapter_part, adapted):
        shapes = weights.shapes(part)
        held[part] = {
            name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
        }
    return weights


def local_model(
    folder: Path,
    task: str,
    plan: RoundPlan,
    dropout: float = 0.0,
    labels: tuple[str, ...] | None = None,
) -> LocalModel:
    """Build the local model of a plan."""
    adapted = plan.trained_blocks if plan.adapters else ()
    return build(weights_of(folder, task, adapted, dropout, labels=labels), plan)


def plan_of(
    method: str,
    task: str,
    round_: int = 1,
    local_depth: int = 0,
    rounds: int = ROUNDS,
    schedule: str = PAPER,
) -> RoundPlan:
    """Plan one round of a tiny model."""
    return RunPlan(METHODS[method], TASKS[task], DEPTH, rounds, schedule).round(
        round_, "a", local_depth
    )
