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
    """One aggregation of a part: from `before` (None: the base checkpoint) to `state`."""

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
    """Every part that differs from the base checkpoint, with its version and last deltas."""

    checkpoint: Checkpoint
    codec: str = "float32"
    optimizer: ServerOptimizer = field(default_factory=lambda: Momentum(0.0))
    parts: dict[str, Part] = field(default_factory=dict)

    def introduce(self, part: str, tensors: Tensors) -> None:
        """Add tensors that the base lacks (a new head, adapters), made by the server."""
        state = PartState(BASE, digest(tensors))
        self.parts[part] = Part(tensors, state)

    def tensors(self, part: str) -> Tensors:
        """Return the tensors of `part` that differ from the base checkpoint's."""
        if part not in self.parts:
            return {}
        return self.parts[part].tensors

    def states(self) -> dict[str, PartState]:
        """Return what an up-to-date pool holds."""
        return {name: part.state for name, part in self.parts.items()}

    def apply(self, deltas: Tensors) -> None:
        """Take a step along a round's aggregated deltas, exactly as clients will decode it.

        What the codec drops is added to the part's next step (error feedback).
        """
        encoder = self.checkpoint.architecture.encoder
        for name, own in by_part(deltas, encoder).items():
            held = self.parts.get(name)
            self.parts[name] = self._stepped(held, own)

    def _stepped(self, held: Part | None, deltas: Tensors) -> Part:
        start = None
        before = Part({}, PartState(BASE, ""))  # of which the base checkpoint holds all
        if held:
            start = held.state
            before = held
        change, memory = self.optimizer.step(deltas, before.memory)
        encoded, received, residual = encode_with_feedback(change, before.residual, self.codec)
        tensors = {}
        for name, own_change in received.items():
            tensors[name] = self._current(before, name) + own_change
        state = PartState(before.state.version + 1, digest(tensors))
        step = Step(start, state, encoded)
        return Part(
            tensors=tensors,
            state=state,
            steps=_worth_keeping((*before.steps, step), tensors),
            residual=residual,
            memory=memory,
        )

    def _current(self, part: Part, name: str) -> torch.Tensor:
        if name in part.tensors:
            return part.tensors[name]
        return self.checkpoint.tensor(name)

    def updates_for(self, held: Mapping[str, PartState], whole: bool = False) -> list[Update]:
        """Return what a pool that holds `held` lacks: the last few steps as deltas, else values.

        `whole` sends values only: for a pool that could not use the deltas.
        """
        updates: list[Update] = []
        for name, part in self.parts.items():
            if held.get(name) == part.state:
                continue
            missing: tuple[Step, ...] = ()
            if not whole:
                missing = _steps_from(part, held.get(name))
            for step in missing:
                late = step != missing[-1]
                updates.append(Update(name, DELTA, step.state, step.delta, late))
            if not missing:
                value = encode(part.tensors, "float32")
                updates.append(Update(name, VALUE, part.state, value))
        return updates


def _worth_keeping(steps: tuple[Step, ...], tensors: Tensors) -> tuple[Step, ...]:
    """Drop the oldest steps while all are larger than the tensors: then those are sent instead."""
    whole = sum(tensor.nbytes for tensor in tensors.values())
    while sum(step.delta.nbytes for step in steps) > whole and len(steps) > 1:
        steps = steps[1:]
    return steps


def _steps_from(part: Part, held: PartState | None) -> tuple[Step, ...]:
    """Return the steps from a held state to the present one; none when they are kept no longer."""
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
