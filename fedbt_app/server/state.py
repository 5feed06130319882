"""The server's side of the parts: the global float32 state and its versions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedbt_app.aggregation.base import ServerOptimizer
from fedbt_app.aggregation.momentum import Momentum
from fedbt_app.codec.codec import Encoded, encode
from fedbt_app.codec.feedback import encode_with_feedback
from fedbt_app.encoders.base import Encoder
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.parts import BASE, PartState
from fedbt_app.tensors import Tensors, digest
from fedbt_app.wire.updates import DELTA, VALUE, Update


@dataclass(frozen=True)
class Step:
    """One aggregation of a part: the state it starts from (None: the base checkpoint) and
    leads to.
    """

    before: PartState | None
    state: PartState
    delta: Encoded


@dataclass(frozen=True)
class Part:
    """A part's present state, and how it came about."""

    tensors: Tensors
    state: PartState
    steps: tuple[Step, ...] = ()  # the latest, together no larger than the tensors themselves
    residual: Tensors = field(default_factory=dict)  # what the codec has dropped so far
    memory: Tensors = field(default_factory=dict)  # what the server optimiser remembers of it


@dataclass
class GlobalState:
    """Every part that differs from the base checkpoint, with its version and last encoded
    deltas.
    """

    checkpoint: Checkpoint
    codec: str = "float32"
    optimizer: ServerOptimizer = field(default_factory=lambda: Momentum(0.0))
    parts: dict[str, Part] = field(default_factory=dict)

    def introduce(self, part: str, tensors: Tensors) -> None:
        """Add tensors that the base lacks (a new head, adapters), made by the server, at
        version 0.
        """
        self.parts[part] = Part(tensors, PartState(BASE, digest(tensors)))

    def tensors(self, part: str) -> Tensors:
        """Return the tensors of `part` that differ from the base checkpoint's."""
        return self.parts[part].tensors if part in self.parts else {}

    def states(self) -> dict[str, PartState]:
        """Return what an up-to-date pool holds."""
        return {name: part.state for name, part in self.parts.items()}

    def apply(self, deltas: Tensors) -> None:
        """Take a step along a round's aggregated deltas, exactly as clients will decode it.

        What the codec drops is added to the part's next step (error feedback).
        """
        for name, own in by_part(deltas, self.checkpoint.architecture.encoder).items():
            self.parts[name] = self._stepped(self.parts.get(name), own)

    def _stepped(self, held: Part | None, deltas: Tensors) -> Part:
        before = held or Part({}, PartState(BASE, ""))  # of which the base checkpoint holds all
        step, memory = self.optimizer.step(deltas, before.memory)
        encoded, received, residual = encode_with_feedback(step, before.residual, self.codec)
        tensors = {name: self._current(before, name) + change for name, change in received.items()}
        state = PartState(before.state.version + 1, digest(tensors))
        steps = (*before.steps, Step(held.state if held else None, state, encoded))
        whole = sum(tensor.nbytes for tensor in tensors.values())
        while sum(step.delta.nbytes for step in steps) > whole and len(steps) > 1:
            steps = steps[1:]
        return Part(tensors, state, steps, residual, memory)

    def _current(self, part: Part, name: str) -> torch.Tensor:
        return part.tensors[name] if name in part.tensors else self.checkpoint.tensor(name)

    def updates_for(self, held: Mapping[str, PartState], whole: bool = False) -> list[Update]:
        """Return what a pool that holds `held` lacks: deltas where it is a few steps behind, else
        values.

        `whole` sends values only: for a pool that could not use the deltas.
        """
        updates: list[Update] = []
        for name, part in self.parts.items():
            if held.get(name) == part.state:
                continue
            missing = () if whole else _steps_from(part, held.get(name))
            updates += [
                Update(name, DELTA, step.state, step.delta, late=step != missing[-1])
                for step in missing
            ]
            if not missing:
                updates.append(Update(name, VALUE, part.state, encode(part.tensors, "float32")))
        return updates


def _steps_from(part: Part, held: PartState | None) -> tuple[Step, ...]:
    """Return the steps from a held state to the present one; none when they are not kept any
    longer.
    """
    for index, step in enumerate(part.steps):
        if step.before == held:
            return part.steps[index:]
    return ()


def by_part(tensors: Mapping[str, torch.Tensor], encoder: Encoder) -> dict[str, Tensors]:
    """Group named tensors by the part they belong to."""
    grouped: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        grouped.setdefault(encoder.part_of(name), {})[name] = tensor
    return grouped
