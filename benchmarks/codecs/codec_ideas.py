"""Ideas for a better codec, on the deltas that codec.py kept: bits per parameter, relative error.

Each is the product's own codec with something around it, without error feedback. An idea is worth
its code only if at the same bits its error is lower. Writes benchmarks/results/codec_ideas.json.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks import results
from benchmarks.codecs.codec import relative_error
from benchmarks.results import RESULTS, Row
from fedbt_app.codec.codec import decode, encode
from fedbt_app.tensors import Tensors

Result = tuple[float, Tensors]  # bits, and what the receiver gets
GROUP = 128  # elements that are rotated together


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/codec-benchmark"), help="folder of codec.py's runs"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "codec_ideas.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for scenario in ("classification", "mlm"):
        kept = sorted(options.work.glob(f"{scenario}-float32-*/deltas/*.safetensors"))
        deltas = [load_file(path) for path in kept]
        for name, idea in IDEAS.items():
            sent = [idea(delta) for delta in deltas]
            bits = sum(bits_of_delta for bits_of_delta, _ in sent)
            received = [received_delta for _, received_delta in sent]
            row: Row = {
                "scenario": scenario,
                "idea": name,
                "bits_per_parameter": bits / sum(map(_size, deltas)),
                "relative_error": relative_error(deltas, received),
                "deltas": len(deltas),
            }
            rows.append(row)
            figures = f"{row['bits_per_parameter']:.2f} | {row['relative_error']:.3f}"
            print(f"| {scenario} | {name} | {figures} |", flush=True)
    results.store(options.output, rows, ("scenario", "idea"))


def _size(tensors: Tensors) -> int:
    return sum(value.numel() for value in tensors.values())


def as_it_is(codec: str) -> Callable[[Tensors], Result]:
    """Send as the product does."""

    def send(tensors: Tensors) -> Result:
        sent = encode(tensors, codec)
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        return 8.0 * sent.nbytes, decode(sent.arrays, sent.header, shapes)

    return send


def rotated(codec: str) -> Callable[[Tensors], Result]:
    """Spread outliers over groups of 128 elements by a Hadamard rotation; the receiver undoes it."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < GROUP:  # twice the size from four copies, the last with its sign turned
        upper = torch.cat([hadamard, hadamard], 1)
        lower = torch.cat([hadamard, -hadamard], 1)
        hadamard = torch.cat([upper, lower])
    hadamard /= math.sqrt(GROUP)

    def turn(tensors: Tensors) -> Tensors:
        turned = {}
        for name, value in tensors.items():
            if _divides(value):
                value = (value.reshape(-1, GROUP) @ hadamard).reshape(value.shape)
            turned[name] = value
        return turned

    def send(tensors: Tensors) -> Result:
        bits, received = as_it_is(codec)(turn(tensors))
        return bits, turn(received)  # the rotation is its own inverse

    return send


def _divides(value: torch.Tensor) -> bool:
    return value.ndim > 1 and value.numel() % GROUP == 0


def _vectors(tensors: Tensors) -> Result:
    """Send biases and LayerNorm weights as the product does: as bfloat16."""
    vectors = {name: value.bfloat16().float() for name, value in tensors.items() if value.ndim < 2}
    return 16.0 * _size(vectors), vectors


def scale_per_row(bits: int) -> Callable[[Tensors], Result]:
    """Give each output row one step instead of each block of 32."""

    def send(tensors: Tensors) -> Result:
        total, received = _vectors(tensors)
        for name in tensors.keys() - received.keys():
            value = tensors[name]
            half = 2 ** (bits - 1)
            largest = value.abs().amax(1, keepdim=True)
            step = (largest / half).bfloat16().float().clamp_min(1e-30)
            level = (value / step).floor().clamp(-half, half - 1)
            received[name] = (level + 0.5) * step
            total += bits * value.numel() + 16 * len(value)
        return total, received

    return send


def largest_only(share: float) -> Callable[[Tensors], Result]:
    """Send each matrix' largest elements in int4, and a bit for each that says if it is sent."""

    def send(tensors: Tensors) -> Result:
        total, received = _vectors(tensors)
        for name in tensors.keys() - received.keys():
            value = tensors[name]
            flat = value.reshape(-1)
            count = int(share * flat.numel())
            largest = torch.topk(flat.abs(), count, sorted=False)
            chosen = largest.indices.sort().values
            # [None] makes it a matrix of one row: a vector would be sent in bfloat16
            bits, kept = as_it_is("int4")({name: flat[chosen][None]})
            restored = torch.zeros_like(flat).scatter(0, chosen, kept[name][0])
            received[name] = restored.view(value.shape)
            total += bits + flat.numel()
        return total, received

    return send


def by_energy(tensors: Tensors) -> Result:
    """Give int4 to the half of the elements in the tensors of most energy, int2 to the rest."""

    def energy(name: str) -> float:
        return float(tensors[name].square().mean())

    order = sorted(tensors, key=energy, reverse=True)
    total = 0.0
    received: Tensors = {}
    elements_given = 0
    for name in order:
        codec = "int2"
        if elements_given < _size(tensors) / 2:
            codec = "int4"
        bits, got = as_it_is(codec)({name: tensors[name]})
        total += bits
        received |= got
        elements_given += tensors[name].numel()
    return total, received


def without_vectors(codec: str) -> Callable[[Tensors], Result]:
    """Leave out biases and LayerNorm weights."""

    def send(tensors: Tensors) -> Result:
        matrices = {name: value for name, value in tensors.items() if value.ndim > 1}
        bits, received = as_it_is(codec)(matrices)
        zeros = {name: torch.zeros_like(value) for name, value in tensors.items()}
        return bits, zeros | received

    return send


IDEAS: dict[str, Callable[[Tensors], Result]] = {
    "int4": as_it_is("int4"),
    "int4, one step a row": scale_per_row(4),
    "int4, Hadamard": rotated("int4"),
    "int4 or int2 by energy": by_energy,
    "largest 25 % in int4": largest_only(0.25),
    "largest 10 % in int4": largest_only(0.1),
    "int2": as_it_is("int2"),
    "int2, one step a row": scale_per_row(2),
    "int2, Hadamard": rotated("int2"),
    "int2 without vectors": without_vectors("int2"),
}

if __name__ == "__main__":
    main()
