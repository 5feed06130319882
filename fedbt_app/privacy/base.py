"""The seam through which clipping, noise or masking enter: a client half and a server half."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedbt_app.tensors import Tensors


class Mechanism:
    """Something done to each client's deltas on their way into the aggregate.

    Attributes
    ----------
    memory
        What the server half has to remember from round to round, as JSON can hold it: a resumed run
        gets it back.
    """

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}

    def on_client(self, deltas: "dict[str, Tensors]") -> "dict[str, Tensors]":
        """Treat the deltas of all trained parts, by part, before they are encoded.

        Returns new tensors: those given are not changed.
        """
        return deltas

    def on_server(self, deltas: "Tensors") -> "Tensors":
        """Treat one client's decoded and checked deltas, by tensor, before they are aggregated."""
        return deltas
