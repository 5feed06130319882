"""Turn named float32 tensors into few, compact arrays and a header, and back.

A codec is a number format, `float32` (bit-exact), `bf16`, `int8`, `int4` or `int2`, and with the
suffix `+zstd` its arrays are compressed without loss on top. Format 1 has at most two arrays:

values
    float32, or bfloat16 seen as uint16, which Flower can carry. A tensor in `float32` or `bf16`,
    and in the integer codecs every tensor of fewer than two dimensions (0.1 % of a BERT block),
    puts its elements here; a quantised tensor puts one step for each block of 32 elements.
codes
    uint8, in the integer codecs only: 8, 4 or 2 bits for each element of the quantised tensors,
    the first element in the lowest bits, each tensor padded to a whole byte.

Tensors follow one another in the order of the header's `names`. A block never spans two tensors,
so the last of a tensor may be short. Code `c` of a b-bit codec stands for `(c + 0.5 - 2**(b-1)) *
step`: the 2**b levels lie symmetric about zero, half a step off it, and a block of zeros has step
zero. An array that would be empty is left out. With `+zstd` each array is one zstd frame of its
byte planes: all lowest bytes first, all highest last.

The receiver knows which tensors it asked for and hence how long every array must be. Nothing in a
header or in a frame decides how much memory is allocated.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard

from fedbt_app.codec.formats import BLOCK, CODECS, is_quantised, lengths
from fedbt_app.errors import FedBTError

FORMAT = 1
# Elements per pass. Temporaries of 1 MiB stay in the L3 cache, and the cost of calling an operator,
# which makes passes that fit in L2 half as fast, is spread over enough elements.
CHUNK = 1 << 18
# The lossy codecs' bounds: every level times every accepted step is a finite float32.
LARGEST_VALUE, LARGEST_STEP = 1e35, 1e36
FLOAT32_MAX = torch.finfo(torch.float32).max
# Levels 2 and 3 are slower and gain nothing: no matches to find, only skewed bytes to entropy-code.
ZSTD_LEVEL = 1


class Encoded(NamedTuple):
    """What travels: the arrays by name, and the JSON text that says how to read them."""

    arrays: dict[str, np.ndarray]
    header: str

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def encode(tensors: Mapping[str, torch.Tensor], codec: str) -> Encoded:
    """Encode float32 CPU tensors.

    Parameters
    ----------
    tensors
        What to send, by name.
    codec
        A name in `CODECS`.

    Returns
    -------
    Encoded
        Equal tensors in the same order give equal bytes: values are rounded to the nearest level,
        which over 20 steps of error feedback left 25 to 40 % less residual than unbiased (random)
        rounding did.
    """
    if codec not in CODECS:
        raise FedBTError(f"unknown codec {_shown(codec)}; known are {', '.join(CODECS)}")
    bits, zstd = CODECS[codec]
    value_lengths, code_lengths = lengths([tensor.shape for tensor in tensors.values()], bits)
    values = torch.empty(sum(value_lengths), dtype=torch.float32 if bits == 32 else torch.bfloat16)
    codes = torch.empty(sum(code_lengths), dtype=torch.uint8)
    largest = FLOAT32_MAX if bits == 32 else LARGEST_VALUE
    parts = zip(
        tensors.items(), values.split(value_lengths), codes.split(code_lengths), strict=True
    )
    for (name, tensor), own_values, own_codes in parts:
        if (
            tensor.dtype != torch.float32
            or tensor.device.type != "cpu"
            or tensor.layout != torch.strided
        ):
            raise FedBTError(f"tensor {_shown(name)} must be a dense float32 tensor on the CPU")
        flat = tensor.detach().reshape(-1)
        _check_range(name, flat, -largest, largest)
        if is_quantised(tensor.shape, bits):
            _quantise(flat, bits, own_values, own_codes)
        else:
            own_values.copy_(flat)
    raw = values if bits == 32 else values.view(torch.uint16)
    arrays = {
        name: part.numpy() for name, part in (("values", raw), ("codes", codes)) if part.numel()
    }
    if zstd:
        arrays = {name: _compress(array) for name, array in arrays.items()}
    return Encoded(arrays, json.dumps(_header_fields(codec, list(tensors)), separators=(",", ":")))


def decode(
    encoded_arrays: Mapping[str, np.ndarray], header: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Decode what `encode` made, trusting nothing that came with it.

    Parameters
    ----------
    encoded_arrays, header
        As received.
    shapes
        The tensors asked for. Exactly these names must have been sent.

    Returns
    -------
    dict
        New, finite float32 tensors of these shapes, in the order in which they were sent.
    """
    codec, names = _read_header(header, shapes)
    bits, zstd = CODECS[codec]
    value_lengths, code_lengths = lengths([shapes[name] for name in names], bits)
    expected = {
        "values": (sum(value_lengths), np.dtype(np.float32 if bits == 32 else np.uint16)),
        "codes": (sum(code_lengths), np.dtype(np.uint8)),
    }
    if set(encoded_arrays) != {name for name, (length, _) in expected.items() if length}:
        raise FedBTError(f"the arrays sent are not those of codec {codec}")
    values, codes = (
        torch.from_numpy(_receive(name, encoded_arrays.get(name), length, dtype, zstd))
        for name, (length, dtype) in expected.items()
    )
    if bits != 32:
        values = values.view(torch.bfloat16)
    tensors = {}
    parts = zip(names, values.split(value_lengths), codes.split(code_lengths), strict=True)
    for name, own_values, own_codes in parts:
        shape = shapes[name]
        flat = torch.empty(math.prod(shape), dtype=torch.float32)
        if is_quantised(shape, bits):
            _check_range(name, own_values, 0.0, LARGEST_STEP)
            _restore(own_values.float(), own_codes, bits, flat)
        else:
            flat.copy_(own_values)
            _check_range(name, flat, -FLOAT32_MAX, FLOAT32_MAX)
        tensors[name] = flat.view(shape)
    return tensors


def _passes(size: int, bits: int) -> Iterator[tuple[slice, slice, slice, int]]:
    """Split a tensor into runs of equally long blocks: elements, bytes of codes, blocks, block
    length.
    """
    whole = size - size % BLOCK
    for start, stop in itertools.pairwise([*range(0, whole, CHUNK), whole, size]):
        if start < stop:
            # starts on a whole byte, as 8 divides BLOCK
            codes = slice(start * bits // 8, -(-stop * bits // 8))
            blocks = slice(start // BLOCK, -(-stop // BLOCK))
            yield slice(start, stop), codes, blocks, min(BLOCK, stop - start)


def _quantise(flat: torch.Tensor, bits: int, steps: torch.Tensor, codes: torch.Tensor) -> None:
    """Fill `steps` and `codes`, rounding every element to the nearest level of its block.

    The step spreads the levels over plus and minus the block's largest magnitude, which keeps every
    error within half a step. With four levels one outlier would then make the rest of its block
    worse than zeros, so the step is refitted by least squares to the assignment which that gave:
    the error is always smaller than the block itself, as error feedback needs, and 5 % (real
    deltas) to 24 % (heavy tails) lower; only elements beyond two steps may miss by more than half
    of one. A step proportional to the mean magnitude has the same one-shot error, but under error
    feedback it clips the same elements again and again.
    """
    half = 2 ** (bits - 1)
    per_byte = 8 // bits
    step_bits = steps.view(torch.int16)
    for elements, own, blocks, width in _passes(flat.numel(), bits):
        rows = flat[elements].view(-1, width)
        magnitudes = rows.abs()
        step = magnitudes.amax(1, keepdim=True).div_(half)
        if bits == 2:
            levels = (magnitudes >= step).add(0.5)
            step = (
                magnitudes.mul_(levels)
                .sum(1, keepdim=True)
                .div_(levels.square_().sum(1, keepdim=True))
            )
        # To bfloat16, rounding up: rounded down, the largest element would leave the outer level.
        rounded = (step.view(torch.int32) + 0xFFFF) >> 16
        step_bits[blocks] = rounded.view(-1)
        # any non-zero step is as large
        step = (rounded << 16).view(torch.float32).clamp_(min=2.0**-133)
        levels = torch.div(rows, step, out=magnitudes).add_(half).clamp_(0, 2 * half - 1)
        packed = levels.view(-1).to(torch.uint8)  # rounds down, as the levels lie half a step off
        if per_byte > 1:
            packed = torch.nn.functional.pad(packed, (0, -packed.numel() % per_byte)).view(
                -1, per_byte
            )
            packed = sum((packed[:, i] << bits * i for i in range(1, per_byte)), start=packed[:, 0])
        codes[own] = packed


def _restore(steps: torch.Tensor, codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Undo `_quantise` by looking up what the 8 / bits elements of each byte stand for."""
    shifts = np.arange(0, 8, bits)
    table = ((np.arange(256)[:, None] >> shifts) % 2**bits + (0.5 - 2 ** (bits - 1))).astype(
        np.float32
    )
    packed = codes.numpy()
    for elements, own, blocks, width in _passes(out.numel(), bits):
        levels = torch.from_numpy(table.take(packed[own], axis=0)).view(-1)
        rows = out[elements].view(-1, width)
        torch.mul(levels[: rows.numel()].view(-1, width), steps[blocks, None], out=rows)


def _compress(array: np.ndarray) -> np.ndarray:
    """One zstd frame, which states its size and ends in a checksum, of the array's byte planes."""
    planes = array.view(np.uint8).reshape(-1, array.itemsize).T.tobytes()
    frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(planes)
    return np.frombuffer(frame, dtype=np.uint8)


def _receive(name: str, array: Any, length: int, dtype: np.dtype, zstd: bool) -> np.ndarray:
    """Check one array and return it plain: writable, contiguous, of `length` entries of `dtype`."""
    if not length:
        return np.empty(0, dtype)
    sent = np.dtype(np.uint8) if zstd else dtype
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != sent:
        raise FedBTError(f"array '{name}' is not a one-dimensional array of {sent}")
    if zstd:
        size = length * dtype.itemsize
        frame = array.tobytes()
        try:
            stated = zstandard.get_frame_parameters(frame).content_size
            if stated != size:
                raise FedBTError(
                    f"array '{name}' states {stated} bytes, the tensors asked for have {size}"
                )
            # Allocates the size just checked, and refuses a frame that holds more, less or a tail.
            planes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise FedBTError(f"array '{name}' is not a whole zstd frame: {error}") from error
        array = (
            np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, -1).T.copy().view(dtype).ravel()
        )
    if len(array) != length:
        raise FedBTError(
            f"array '{name}' has {len(array)} entries, the tensors asked for have {length}"
        )
    return np.require(array, requirements=["C", "A", "W"])


def _check_range(name: str, values: torch.Tensor, low: float, high: float) -> None:
    """Refuse NaN and values outside the range, in one pass and without a copy."""
    if values.numel():
        least, most = (bound.item() for bound in torch.aminmax(values))  # NaN if any is
        if not (low <= least and most <= high):
            found = f"it spans {least:g} to {most:g}, and {low:g} to {high:g} is allowed"
            raise FedBTError(f"tensor {_shown(name)} cannot be encoded or was damaged: {found}")


def _header_fields(codec: str, names: list[str]) -> dict[str, Any]:
    return {"format": FORMAT, "codec": codec, "block": BLOCK, "vectors": "bf16", "names": names}


def _read_header(header: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, list[str]]:
    """Return the codec and the order of the tensors, or refuse."""
    try:
        fields = json.loads(header)
    except (ValueError, TypeError, RecursionError) as error:
        raise FedBTError("the header is not JSON text") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise FedBTError(f"the header is not of format {FORMAT}, the only one known")
    codec, names = fields.get("codec"), fields.get("names")
    if not (
        isinstance(codec, str)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
    ):
        raise FedBTError(
            "the header's codec is not a string or its names are not a list of strings"
        )
    if codec not in CODECS:
        raise FedBTError(f"unknown codec {_shown(codec)}; known are {', '.join(CODECS)}")
    if fields != _header_fields(codec, names):
        raise FedBTError(f"the header has fields that format {FORMAT} does not know")
    if len(set(names)) < len(names):
        raise FedBTError("the header names a tensor twice")
    for name in names:
        if name not in shapes:
            raise FedBTError(f"tensor {_shown(name)} was sent but not asked for")
    for name in shapes:
        if name not in names:
            raise FedBTError(f"tensor {_shown(name)} was asked for but not sent")
    return codec, names


def _shown(name: str) -> str:
    """Any name on one short line."""
    return ascii(name)[:100]
