"""Where a model's tensors come from: a pool or the server's state, over the base checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.parts import HEAD, Shapes, adapter_part, block_part
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Task
from fedbt_app.tensors import Tensors

LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"


@dataclass(frozen=True)
class ModelSpec:
    """What makes a model of a base checkpoint besides its weights."""

    task: Task
    labels: tuple[str, ...] = ()
    dropout: float = 0.1
    lora_rank: int = 8
    lora_alpha: float = 16.0


@dataclass(frozen=True)
class Weights:
    """Where tensors come from: `held(part)` of a pool or the server's state, over the base."""

    checkpoint: Checkpoint
    held: Callable[[str], Tensors]
    spec: ModelSpec

    def shapes(self, part: str) -> Shapes:
        """Shapes of the tensors of `part`."""
        return self.checkpoint.architecture.part(
            part,
            kind=self.spec.task.head,
            num_labels=len(self.spec.labels),
            rank=self.spec.lora_rank,
        )

    def lacking(self, part: str) -> Shapes:
        """Shapes of the tensors of `part` that the base lacks: the server makes and sends them.

        A classifier in the base counts only if it is one for the very same labels.
        """
        shapes = self.shapes(part)
        in_base = self._in_base(part)
        return {name: shape for name, shape in shapes.items() if name not in in_base}

    def _in_base(self, part: str) -> list[str]:
        """Return which tensors of `part` the base checkpoint has."""
        foreign: set[str] = set()
        if part == HEAD and self.checkpoint.labels != self.spec.labels:
            foreign = self.checkpoint.architecture.label_tensors(self.spec.task.head)
        names = self.shapes(part)
        return [name for name in names if name in self.checkpoint and name not in foreign]

    def part(self, part: str) -> Tensors:
        """Read `part` whole."""
        held = self.held(part)
        tensors = {}
        for name in self._in_base(part):
            if name not in held:
                tensors[name] = self.checkpoint.tensor(name)
        tensors |= held
        missing = self.shapes(part).keys() - tensors.keys()
        if missing:
            first = min(missing)
            raise FedBTError(
                f"{part} lacks {first}: neither the base checkpoint nor the pool holds it"
            )
        return tensors

    def block(self, index: int, merge: bool) -> Tensors:
        """Read encoder block `index`; `merge` adds what its adapters, if any, have learned."""
        tensors = self.part(block_part(index))
        if not merge:
            return tensors
        adapters = self.held(adapter_part(index))
        for name, down in adapters.items():
            if name.endswith(LORA_A):
                module = name.removesuffix(LORA_A)
                up = adapters[module + LORA_B]
                scale = self.spec.lora_alpha / self.spec.lora_rank
                weight = f"{module}.weight"
                # a new tensor: the old one may be a view of the checkpoint's file
                tensors[weight] = tensors[weight] + scale * (up @ down)
        return tensors


def model_spec(config: RunConfig, labels: tuple[str, ...]) -> ModelSpec:
    """Return what a run's configuration says of the model."""
    return ModelSpec(
        task=TASKS[config.task],
        labels=labels,
        dropout=config.dropout,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
    )


def new_tensors(shapes: Shapes, seed: int) -> Tensors:
    """Initialise tensors that no checkpoint holds, as BERT does.

    Adapters start as no change: their second matrix is zero (LoRA, section 4.1).
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) < 2 and name.endswith(".weight"):  # of a norm
            tensors[name] = torch.ones(shape)
        elif len(shape) < 2 or name.endswith(LORA_B):
            tensors[name] = torch.zeros(shape)
        else:
            values = torch.empty(shape)
            tensors[name] = values.normal_(0.0, 0.02, generator=generator)
    return tensors
