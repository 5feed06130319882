"""FedAvg's weighted mean (McMahan et al., 2017), of deltas and tensor by tensor."""

from typing import TYPE_CHECKING

from fedbt_app.aggregation.base import Rule

if TYPE_CHECKING:
    import torch

    from fedbt_app.tensors import Tensors


class WeightedMean(Rule):
    """sum(n_k * delta_k) / sum(n_k), over the clients that trained each tensor.

    Memory does not grow with the clients. Sums in float64, so that the order in which clients
    answer does not show in float32.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, int] = {}

    def add(self, deltas: "Tensors", weight: int) -> None:
        """Add one client's deltas."""
        for name, delta in deltas.items():
            if name not in self._sums:
                self._sums[name] = delta.new_zeros(delta.shape).double()
                self._weights[name] = 0
            self._sums[name].add_(delta, alpha=weight)
            self._weights[name] += weight

    def result(self) -> "Tensors":
        """Return the mean of each tensor."""
        means = {}
        for name, total in self._sums.items():
            mean = total / self._weights[name]
            means[name] = mean.float()
        return means
