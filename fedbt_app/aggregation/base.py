"""What an aggregation rule and a server optimiser have to do."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedbt_app.tensors import Tensors


class Rule(ABC):
    """How the deltas of a round become one; a new object for each round."""

    @abstractmethod
    def add(self, deltas: "Tensors", weight: int) -> None:
        """Take in one client's deltas, by tensor; clients may have trained different ones."""

    @abstractmethod
    def result(self) -> "Tensors":
        """Return the round's delta of each tensor that some client trained, float32."""


class ServerOptimizer(ABC):
    """What the server makes of a round's delta, for each part by itself."""

    @abstractmethod
    def step(self, deltas: "Tensors", memory: "Tensors") -> "tuple[Tensors, Tensors]":
        """Return the step that one part takes, and what to remember until its next one.

        `memory` is what the part's last step returned, some rounds ago perhaps; empty at first. A
        resumed run has it.
        """
