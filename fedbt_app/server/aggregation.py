"""How the deltas of a round become one."""

from collections.abc import Mapping

import torch

from fedbt_app.tensors import Tensors


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
