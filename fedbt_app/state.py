"""The server's side of the parts: the global float32 state, versions, and the running weighted sum."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedbt_app.blocks import part_of
from fedbt_app.checkpoint import Checkpoint
from fedbt_app.codec import Encoded, encode
from fedbt_app.pool import BASE, PartState, Tensors, digest

DELTA, VALUE = "delta", "value"


@dataclass(frozen=True)
class Update:
    """What brings one part of a client's pool to the server's state of it.

    `kind` is DELTA (to be added to the version before) or VALUE (replaces whatever is there).
    """

    part: str
    kind: str
    state: PartState
    encoded: Encoded

    @property
    def cause(self) -> str:
        """Why it is sent: the ledger books `first_contact`, `round` and `catch_up` apart."""
        if self.kind == DELTA:
            return "round"
        return "first_contact" if self.state.version == BASE else "catch_up"


class WeightedSum:
    """Running weighted mean of deltas, tensor by tensor: memory does not grow with the clients.

    Sums in float64, so that the order in which clients answer does not show in float32.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, int] = {}

    def add(self, deltas: Mapping[str, torch.Tensor], weight: int) -> None:
        """Add one client's deltas; clients may have trained different tensors."""
        for name, delta in deltas.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(delta.shape, dtype=torch.float64)
                self._weights[name] = 0
            self._sums[name].add_(delta, alpha=weight)
            self._weights[name] += weight

    def mean(self) -> Tensors:
        """Return sum(n_k * delta_k) / sum(n_k) over the clients that trained each tensor, float32."""
        return {name: (total / self._weights[name]).to(torch.float32) for name, total in self._sums.items()}


@dataclass
class _Part:
    tensors: Tensors
    state: PartState
    before: PartState | None = None  # the version that `delta` starts from; None: the base checkpoint
    delta: Encoded | None = None


@dataclass
class GlobalState:
    """Every part that differs from the base checkpoint, with its version and last aggregated delta."""

    checkpoint: Checkpoint
    codec: str = "float32"
    _parts: dict[str, _Part] = field(default_factory=dict)

    def introduce(self, part: str, tensors: Tensors) -> None:
        """Add tensors that the base lacks (a new head, adapters), made by the server, at version 0."""
        self._parts[part] = _Part(tensors, PartState(BASE, digest(tensors)))

    def tensors(self, part: str) -> Tensors:
        """Return the tensors of `part` that differ from the base checkpoint's."""
        return self._parts[part].tensors if part in self._parts else {}

    def states(self) -> dict[str, PartState]:
        """Return what an up-to-date pool holds."""
        return {name: part.state for name, part in self._parts.items()}

    def apply(self, mean: Tensors, seed: int) -> None:
        """Add the aggregated deltas, exactly as clients will receive them."""
        for name, deltas in by_part(mean).items():
            encoded = encode(deltas, self.codec, seed)
            held = self._parts.get(name)
            current = held.tensors if held else {}
            tensors = {
                key: (current[key] if key in current else self.checkpoint.tensor(key)) + delta
                for key, delta in deltas.items()
            }
            version = (held.state.version if held else BASE) + 1
            state = PartState(version, digest(tensors))
            self._parts[name] = _Part(tensors, state, held.state if held else None, encoded)

    def updates_for(self, held: Mapping[str, PartState]) -> list[Update]:
        """Return what a pool that holds `held` lacks: the last delta where it is one step behind, else values."""
        updates = []
        for name, part in self._parts.items():
            if held.get(name) == part.state:
                continue
            if part.delta is not None and held.get(name) == part.before:
                updates.append(Update(name, DELTA, part.state, part.delta))
            else:
                updates.append(Update(name, VALUE, part.state, encode(part.tensors, "float32")))
        return updates


def by_part(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
    """Group named tensors by the part they belong to."""
    grouped: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        grouped.setdefault(part_of(name), {})[name] = tensor
    return grouped
