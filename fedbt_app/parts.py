"""Parts: the unit that is trained, versioned and sent.

A part is `embeddings`, `block.3`, `adapter.3` (the LoRA adapters of block 3) or `head`. It is known
by its name, its tensors by their names in transformers' own model (the *canonical* names), its
state by version and digest.
"""

import math
from dataclasses import dataclass
from enum import Enum

EMBEDDINGS = "embeddings"
HEAD = "head"

BASE = 0  # the version that a run starts from

Shapes = dict[str, tuple[int, ...]]


def block_part(index: int) -> str:
    """Name the part of encoder block `index`."""
    return f"block.{index}"


def adapter_part(index: int) -> str:
    """Name the part of the adapters on encoder block `index`."""
    return f"adapter.{index}"


def count(shapes: Shapes) -> int:
    """Return the number of parameters in `shapes`."""
    return sum(math.prod(shape) for shape in shapes.values())


@dataclass(frozen=True)
class PartState:
    """Which state of a part this is: equal digests are equal bits."""

    version: int
    digest: str


class HeadKind(Enum):
    """What the output head reads and puts out; the value is transformers' class with such a head."""

    MASKED_LM = "AutoModelForMaskedLM"  # a word piece at each position
    SEQUENCE = "AutoModelForSequenceClassification"  # one output a row
    TOKEN = "AutoModelForTokenClassification"  # one output a position
