"""What a codec makes of tensors, by their shapes alone: which it quantises, how long arrays are."""

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
    "float32": Codec(32, zstd=False),
    "float32+zstd": Codec(32, zstd=True),
    "bf16": Codec(16, zstd=False),
    "bf16+zstd": Codec(16, zstd=True),
    "int8": Codec(8, zstd=False),
    "int8+zstd": Codec(8, zstd=True),
    "int4": Codec(4, zstd=False),
    "int4+zstd": Codec(4, zstd=True),
    "int2": Codec(2, zstd=False),
    "int2+zstd": Codec(2, zstd=True),
}


def is_lossless(codec: str) -> bool:
    """Say whether decoding gives back every bit."""
    return CODECS[codec].bits == 32


def is_quantised(shape: Sequence[int], bits: int) -> bool:
    """Biases and LayerNorm weights are not: as bfloat16 they add 0.02 bits a block's parameter."""
    return bits <= 8 and len(shape) >= 2


def lengths(shapes: Sequence[Sequence[int]], bits: int) -> tuple[list[int], list[int]]:
    """Return how many entries of `values`, and how many bytes of `codes`, each tensor takes."""
    values = []
    codes = []
    for shape in shapes:
        size = math.prod(shape)
        if is_quantised(shape, bits):
            values.append(-(-size // BLOCK))  # rounded up
            codes.append(-(-size * bits // 8))
        else:
            values.append(size)
            codes.append(0)
    return values, codes


def payload_bytes(shapes: Iterable[Sequence[int]], codec: str) -> int:
    """Return the bytes of the arrays, before any zstd."""
    bits = CODECS[codec].bits
    values, codes = lengths(list(shapes), bits)
    value_bytes = 2
    if bits == 32:
        value_bytes = 4
    return value_bytes * sum(values) + sum(codes)
