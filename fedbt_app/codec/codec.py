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
from typing import Any, NamedTuple, TypeGuard

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
LARGEST_VALUE = 1e35
LARGEST_STEP = 1e36
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
    _check_known(codec)
    bits, zstd = CODECS[codec]
    shapes = [tensor.shape for tensor in tensors.values()]
    value_lengths, code_lengths = lengths(shapes, bits)
    values = torch.empty(sum(value_lengths), dtype=_value_type(bits))
    codes = torch.empty(sum(code_lengths), dtype=torch.uint8)
    parts = zip(
        tensors.items(),
        values.split(value_lengths),
        codes.split(code_lengths),
        strict=True,
    )
    for (name, tensor), own_values, own_codes in parts:
        _encode_into(own_values, own_codes, name, tensor, bits)
    if bits != 32:
        values = values.view(torch.uint16)  # numpy has no bfloat16
    arrays = {"values": values.numpy(), "codes": codes.numpy()}
    arrays = {name: array for name, array in arrays.items() if array.size}
    if zstd:
        arrays = {name: _compress(array) for name, array in arrays.items()}
    fields = _header_fields(codec, list(tensors))
    header = json.dumps(fields, separators=(",", ":"))
    return Encoded(arrays, header)


def _encode_into(
    values: torch.Tensor,
    codes: torch.Tensor,
    name: str,
    tensor: torch.Tensor,
    bits: int,
) -> None:
    """Fill one tensor's stretches of the two arrays."""
    on_cpu = tensor.device.type == "cpu" and tensor.layout == torch.strided
    if tensor.dtype != torch.float32 or not on_cpu:
        raise FedBTError(f"tensor {_shown(name)} must be a dense float32 tensor on the CPU")
    largest = LARGEST_VALUE
    if bits == 32:
        largest = FLOAT32_MAX
    flat = tensor.detach().reshape(-1)
    _check_range(name, flat, -largest, largest)
    if is_quantised(tensor.shape, bits):
        _quantise(flat, bits, values, codes)
    else:
        values.copy_(flat)


def _value_type(bits: int) -> torch.dtype:
    if bits == 32:
        return torch.float32
    return torch.bfloat16


def decode(
    encoded_arrays: Mapping[str, np.ndarray],
    header: str,
    shapes: Mapping[str, tuple[int, ...]],
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
    wanted = {"values": sum(value_lengths), "codes": sum(code_lengths)}
    if set(encoded_arrays) != {name for name, length in wanted.items() if length}:
        raise FedBTError(f"the arrays sent are not those of codec {codec}")
    received = {}
    for name, length in wanted.items():
        dtype = _sent_type(name, bits)
        array = _receive(name, encoded_arrays.get(name), length, dtype, zstd)
        received[name] = torch.from_numpy(array)
    values = received["values"].view(_value_type(bits))
    parts = zip(
        names,
        values.split(value_lengths),
        received["codes"].split(code_lengths),
        strict=True,
    )
    tensors = {}
    for name, own_values, own_codes in parts:
        flat = _decode_from(own_values, own_codes, name, shapes[name], bits)
        tensors[name] = flat.view(shapes[name])
    return tensors


def _decode_from(
    values: torch.Tensor,
    codes: torch.Tensor,
    name: str,
    shape: tuple[int, ...],
    bits: int,
) -> torch.Tensor:
    """Return one tensor, flat, from its stretches of the two arrays."""
    flat = torch.empty(math.prod(shape), dtype=torch.float32)
    if is_quantised(shape, bits):
        _check_range(name, values, 0.0, LARGEST_STEP)
        _restore(values.float(), codes, bits, flat)
    else:
        flat.copy_(values)
        _check_range(name, flat, -FLOAT32_MAX, FLOAT32_MAX)
    return flat


def _sent_type(name: str, bits: int) -> np.dtype:
    if name == "codes":
        return np.dtype(np.uint8)
    if bits == 32:
        return np.dtype(np.float32)
    return np.dtype(np.uint16)


class _Pass(NamedTuple):
    """A run of equally long blocks of a tensor."""

    elements: slice
    codes: slice  # of the bytes
    blocks: slice
    width: int  # elements a block


def _passes(size: int, bits: int) -> Iterator[_Pass]:
    """Split a tensor into runs of equally long blocks, of at most CHUNK elements."""
    whole = size - size % BLOCK
    bounds = [*range(0, whole, CHUNK), whole, size]  # a short block is a run of its own
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            yield _Pass(
                elements=slice(start, stop),
                # starts on a whole byte, as 8 divides BLOCK; what ends within one takes all of it
                codes=slice(start * bits // 8, -(-stop * bits // 8)),
                blocks=slice(start // BLOCK, -(-stop // BLOCK)),
                width=min(BLOCK, stop - start),
            )


def _quantise(
    flat: torch.Tensor,
    bits: int,
    steps: torch.Tensor,
    codes: torch.Tensor,
) -> None:
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
    step_bits = steps.view(torch.int16)
    for run in _passes(flat.numel(), bits):
        rows = flat[run.elements].view(-1, run.width)
        magnitudes = rows.abs()
        step = magnitudes.amax(1, keepdim=True).div_(half)
        if bits == 2:
            step = _refitted(step, magnitudes)
        # To bfloat16, rounding up: rounded down, the largest element would leave the outer level.
        rounded = (step.view(torch.int32) + 0xFFFF) >> 16
        step_bits[run.blocks] = rounded.view(-1)
        # the least that a non-zero step can be: a block of zeros is not divided by zero
        step = (rounded << 16).view(torch.float32).clamp_(min=2.0**-133)
        # the magnitudes have served: their memory takes the levels
        levels = torch.div(rows, step, out=magnitudes)
        levels.add_(half).clamp_(0, 2 * half - 1)
        own = levels.view(-1).to(torch.uint8)  # rounds down, as the levels lie half a step off
        codes[run.codes] = _packed(own, bits)


def _refitted(step: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """Return the least-squares step for the levels that `step` gives; overwrites `magnitudes`."""
    levels = (magnitudes >= step).add(0.5)
    along = magnitudes.mul_(levels).sum(1, keepdim=True)
    squares = levels.square_().sum(1, keepdim=True)
    return along.div_(squares)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Put as many codes into each byte as go into it, the first into its lowest bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    missing = -codes.numel() % per_byte
    rows = torch.nn.functional.pad(codes, (0, missing)).view(-1, per_byte)
    packed = rows[:, 0]
    for place in range(1, per_byte):
        packed = packed + (rows[:, place] << bits * place)
    return packed


def _restore(
    steps: torch.Tensor,
    codes: torch.Tensor,
    bits: int,
    out: torch.Tensor,
) -> None:
    """Undo `_quantise` by looking up what the 8 / bits elements of each byte stand for."""
    shifts = np.arange(0, 8, bits)
    unpacked = (np.arange(256)[:, None] >> shifts) % 2**bits
    middle = 2 ** (bits - 1) - 0.5
    table = (unpacked - middle).astype(np.float32)
    packed = codes.numpy()
    for run in _passes(out.numel(), bits):
        looked_up = table.take(packed[run.codes], axis=0)
        levels = torch.from_numpy(looked_up).view(-1)
        rows = out[run.elements].view(-1, run.width)
        own = levels[: rows.numel()]  # the last byte may hold more than there are elements
        own_steps = steps[run.blocks, None]
        torch.mul(own.view(-1, run.width), own_steps, out=rows)


def _compress(array: np.ndarray) -> np.ndarray:
    """One zstd frame, which states its size and ends in a checksum, of the array's byte planes."""
    planes = array.view(np.uint8).reshape(-1, array.itemsize).T.tobytes()
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
    return np.frombuffer(compressor.compress(planes), dtype=np.uint8)


def _receive(
    name: str,
    array: Any,
    length: int,
    dtype: np.dtype,
    zstd: bool,
) -> np.ndarray:
    """Check one array and return it plain: writable, contiguous, of `length` entries of `dtype`."""
    if not length:
        return np.empty(0, dtype)
    sent = dtype
    if zstd:
        sent = np.dtype(np.uint8)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != sent:
        raise FedBTError(f"array '{name}' is not a one-dimensional array of {sent}")
    if zstd:
        array = _decompress(name, array, length, dtype)
    if len(array) != length:
        raise FedBTError(
            f"array '{name}' has {len(array)} entries, the tensors asked for have {length}"
        )
    # contiguous, aligned and writable, as torch wants it; copied only where it is not
    return np.require(array, requirements=["C", "A", "W"])


def _decompress(
    name: str,
    array: np.ndarray,
    length: int,
    dtype: np.dtype,
) -> np.ndarray:
    """Undo `_compress`, once the frame states the size that is asked for."""
    size = length * dtype.itemsize
    frame = array.tobytes()
    try:
        stated = zstandard.get_frame_parameters(frame).content_size
        if stated != size:
            raise FedBTError(
                f"array '{name}' states {stated} bytes, the tensors asked for have {size}"
            )
        # Allocates the size just checked, and refuses a frame that holds more, less or a tail.
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FedBTError(f"array '{name}' is not a whole zstd frame: {error}") from error
    planes = np.frombuffer(content, np.uint8).reshape(dtype.itemsize, -1)
    return planes.T.copy().view(dtype).ravel()


def _check_range(
    name: str,
    values: torch.Tensor,
    low: float,
    high: float,
) -> None:
    """Refuse NaN and values outside the range, in one pass and without a copy."""
    if not values.numel():
        return
    bounds = torch.aminmax(values)  # both NaN if any value is: then no comparison holds
    least = bounds.min.item()
    most = bounds.max.item()
    if not (low <= least and most <= high):
        found = f"it spans {least:g} to {most:g}, and {low:g} to {high:g} is allowed"
        raise FedBTError(f"tensor {_shown(name)} cannot be encoded or was damaged: {found}")


def _check_known(codec: str) -> None:
    if codec not in CODECS:
        known = ", ".join(CODECS)
        raise FedBTError(f"unknown codec {_shown(codec)}; known are {known}")


def _header_fields(codec: str, names: list[str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "codec": codec,
        "block": BLOCK,
        "vectors": "bf16",
        "names": names,
    }


def _read_header(header: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, list[str]]:
    """Return the codec and the order of the tensors, or refuse."""
    try:
        fields = json.loads(header)
    except (ValueError, TypeError, RecursionError) as error:
        raise FedBTError("the header is not JSON text") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise FedBTError(f"the header is not of format {FORMAT}, the only one known")
    codec = fields.get("codec")
    names = fields.get("names")
    if not isinstance(codec, str) or not _are_names(names):
        raise FedBTError(
            "the header's codec is not a string or its names are not a list of strings"
        )
    _check_known(codec)
    if fields != _header_fields(codec, names):
        raise FedBTError(f"the header has fields that format {FORMAT} does not know")
    _check_asked_for(names, shapes)
    return codec, names


def _are_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_asked_for(names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors sent twice, not asked for, or not sent."""
    if len(set(names)) < len(names):
        raise FedBTError("the header names a tensor twice")
    for name in names:
        if name not in shapes:
            raise FedBTError(f"tensor {_shown(name)} was sent but not asked for")
    for name in shapes:
        if name not in names:
            raise FedBTError(f"tensor {_shown(name)} was asked for but not sent")


def _shown(name: str) -> str:
    """Any name on one short line."""
    return ascii(name)[:100]
