"""What a codec makes of tensors, by their shapes alone: which are quantised, how long its two
arrays are.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# With bfloat16 steps 32 is the smallest block within 4.6 and 2.6 bits per parameter; blocks of 64
# save 0.25 bits, and cost up to 9 % (int4) or 2 % (int2) more error on trained blocks.
BLOCK = 32


class Codec(NamedTuple):
    """How one codec stores an element, and whether its arrays are compressed afterwards."""

    bits: int
    zstd: bool


CODECS: dict[str, Codec] = {
    name + suffix: Codec(bits, bool(suffix))
    for name, bits in {"float32": 32, "bf16": 16, "int8": 8, "int4": 4, "int2": 2}.items()
    for suffix in ("", "+zstd")
}


def is_lossless(codec: str) -> bool:
    """Say whether decoding gives back every bit."""
    return CODECS[codec].bits == 32


def is_quantised(shape: Sequence[int], bits: int) -> bool:
    """Biases and LayerNorm weights are not: as bfloat16 they add 0.02 bits per parameter of a
    block.
    """
    return bits <= 8 and len(shape) >= 2


def lengths(shapes: Sequence[Sequence[int]], bits: int) -> tuple[list[int], list[int]]:
    """Return how many entries of `values`, and how many bytes of `codes`, each tensor takes."""
    sizes = [math.prod(shape) for shape in shapes]
    quantised = [is_quantised(shape, bits) for shape in shapes]
    return (
        [-(-size // BLOCK) if yes else size for size, yes in zip(sizes, quantised, strict=True)],
        [-(-size * bits // 8) if yes else 0 for size, yes in zip(sizes, quantised, strict=True)],
    )


def payload_bytes(shapes: Iterable[Sequence[int]], codec: str) -> int:
    """Return the bytes of the arrays, before any zstd."""
    bits = CODECS[codec].bits
    values, codes = lengths(list(shapes), bits)
    return sum(values) * (4 if bits == 32 else 2) + sum(codes)
