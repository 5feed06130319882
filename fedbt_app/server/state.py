"""The server's side of the parts: the global float32 state, versions, and the running weighted sum."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedbt_app.codec.codec import Encoded, encode
from fedbt_app.codec.feedback import encode_with_feedback
from fedbt_app.encoders.bert import part_of
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.parts import BASE, PartState
from fedbt_app.tensors import Tensors, digest
from fedbt_app.wire.updates import DELTA, VALUE, Update


@dataclass(frozen=True)
class Step:
    """One aggregation of a part: the state it starts from (None: the base checkpoint) and leads to."""

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
    velocity: Tensors = field(default_factory=dict)  # the last step as it was to be, before the codec


@dataclass
class GlobalState:
    """Every part that differs from the base checkpoint, with its version and last encoded deltas."""

    checkpoint: Checkpoint
    codec: str = "float32"
    momentum: float = 0.0
    parts: dict[str, Part] = field(default_factory=dict)

    def introduce(self, part: str, tensors: Tensors) -> None:
        """Add tensors that the base lacks (a new head, adapters), made by the server, at version 0."""
        self.parts[part] = Part(tensors, PartState(BASE, digest(tensors)))

    def tensors(self, part: str) -> Tensors:
        """Return the tensors of `part` that differ from the base checkpoint's."""
        return self.parts[part].tensors if part in self.parts else {}

    def states(self) -> dict[str, PartState]:
        """Return what an up-to-date pool holds."""
        return {name: part.state for name, part in self.parts.items()}

    def apply(self, mean: Tensors) -> None:
        """Add the aggregated deltas, and `momentum` times each part's last step, exactly as clients will decode them.

        A part's last step may be some rounds old (FedAvgM, Hsu et al. 2019, for each part by itself). What the codec
        drops is added to the part's next delta (error feedback).
        """
        for name, deltas in by_part(mean).items():
            held = self.parts.get(name)
            velocity = held.velocity if held else {}
            if velocity:
                deltas = {key: delta + self.momentum * velocity[key] for key, delta in deltas.items()}
            encoded, received, residual = encode_with_feedback(deltas, held.residual if held else {}, self.codec)
            current = held.tensors if held else {}
            tensors = {
                key: (current[key] if key in current else self.checkpoint.tensor(key)) + delta
                for key, delta in received.items()
            }
            state = PartState((held.state.version if held else BASE) + 1, digest(tensors))
            steps = (*(held.steps if held else ()), Step(held.state if held else None, state, encoded))
            whole = sum(tensor.nbytes for tensor in tensors.values())
            while sum(step.delta.nbytes for step in steps) > whole and len(steps) > 1:
                steps = steps[1:]
            self.parts[name] = Part(tensors, state, steps, residual, deltas if self.momentum else {})

    def updates_for(self, held: Mapping[str, PartState], whole: bool = False) -> list[Update]:
        """Return what a pool that holds `held` lacks: deltas where it is a few steps behind, else values.

        `whole` sends values only: for a pool that could not use the deltas.
        """
        updates = []
        for name, part in self.parts.items():
            if held.get(name) == part.state:
                continue
            known = [index for index, step in enumerate(part.steps) if held.get(name) == step.before]
            if known and not whole:
                missing = part.steps[known[0] :]
                updates += [Update(name, DELTA, one.state, one.delta, late=one != missing[-1]) for one in missing]
            else:
                updates.append(Update(name, VALUE, part.state, encode(part.tensors, "float32")))
        return updates


def by_part(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
    """Group named tensors by the part they belong to."""
    grouped: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        grouped.setdefault(part_of(name), {})[name] = tensor
    return grouped
