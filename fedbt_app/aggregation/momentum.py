"""Server momentum: FedAvgM (Hsu et al., 2019), for each part by itself."""

from typing import TYPE_CHECKING

from fedbt_app.aggregation.base import ServerOptimizer

if TYPE_CHECKING:
    from fedbt_app.tensors import Tensors


class Momentum(ServerOptimizer):
    """Adds `share` of a part's last step to its next one; without any it is plain FedAvg."""

    def __init__(self, share: float) -> None:
        self._share = share

    def step(self, deltas: "Tensors", memory: "Tensors") -> "tuple[Tensors, Tensors]":
        """Return the deltas plus momentum, before the codec rounds them, as step and as memory."""
        if not self._share:
            return deltas, {}
        if not memory:  # the part's first step
            return deltas, deltas
        moved = {name: delta + self._share * memory[name] for name, delta in deltas.items()}
        return moved, moved
