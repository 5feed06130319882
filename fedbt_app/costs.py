"""Measured costs: FLOPs by torch's dispatcher, bytes, seconds and peak memory; sums, never averages."""

import resource
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

Result = TypeVar("Result")


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch counts the GPU's fused attention kernels by these formulas, but not yet the CPU's.
_FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
}


class _Counting(TorchDispatchMode):
    """Adds up the FLOPs of the operators that run, by torch's own formulas.

    torch's FlopCounterMode gives the same number, but keeps books by module and takes operators apart again; at
    small batches that made a counted step half as slow again. In inference mode torch hands over operators whole, such
    as `linear`, for which there is no formula: refused, as it would count too little.
    """

    def __init__(self) -> None:
        super().__init__()
        assert not torch.is_inference_mode_enabled(), "FLOPs are not seen in inference mode: use no_grad"
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := _FORMULAS.get(func.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class FlopMeter:
    """Counts the FLOPs of steps: once by the dispatcher for each distinct shape, then by adding up."""

    def __init__(self) -> None:
        self.total = 0
        self._known: dict[Hashable, int] = {}

    def step(self, shape: Hashable, run: Callable[[], Result]) -> Result:
        """Run one step; `shape` must determine what it computes."""
        if shape in self._known:
            result = run()
        else:
            with _Counting() as counting:
                result = run()
            self._known[shape] = counting.total
        self.total += self._known[shape]
        return result


class Stopwatch:
    """Seconds and peak memory of a stretch of work in this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_peak_rss()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._begin

    @property
    def peak_memory_bytes(self) -> int:
        """Peak of the device's allocated memory (GPU) or of the process's resident memory (CPU)."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _peak_rss()


def _reset_peak_rss() -> None:
    """Let Linux forget earlier peaks: a simulation reuses one process for many clients."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # then the peak is that of the whole process, an upper bound


def _peak_rss() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class ClientCosts:
    """What one client measured while it answered one message. Payload is tensor data, serialised all of it."""

    train_flops: int = 0
    stock_flops: int = 0  # the same batches in a stock full-model step, by formula: the report's reference
    same_flops: int = 0  # the same batches in full-model training with our optimisations, by formula
    downlink_payload_bytes: int = 0
    downlink_serialised_bytes: int = 0
    uplink_payload_bytes: int = 0
    uplink_serialised_bytes: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    prefix_cache_bytes: int = 0  # disk that holds the frozen blocks' output
    saved_flops: int = 0  # what the frozen blocks would have cost again without it, by formula


@dataclass
class Ledger:
    """The server's books: sums over clients, and the largest memory of any. By cause, each byte once."""

    train_flops: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    first_contact_bytes: int = 0
    catch_up_bytes: int = 0
    evaluation_bytes: int = 0
    client_seconds: float = 0.0
    peak_memory_bytes: int = 0
    uplink_payload_bytes: int = 0
    downlink_payload_bytes: int = 0
    stock_flops: int = 0
    same_flops: int = 0
    saved_flops: int = 0
    prefix_cache_bytes: int = 0  # of the client with the largest
    healed_parts: int = 0  # sent again, whole, to a client whose pool was not what it had said

    def add(self, other: "Ledger") -> None:
        """Sum everything; memory and cache are maxima."""
        for spec in fields(self):
            mine, theirs = getattr(self, spec.name), getattr(other, spec.name)
            combine = max if spec.name in ("peak_memory_bytes", "prefix_cache_bytes") else sum
            setattr(self, spec.name, combine((mine, theirs)))

    def book_work(self, costs: ClientCosts) -> None:
        """Book what a client computed."""
        self.train_flops += costs.train_flops
        self.stock_flops += costs.stock_flops
        self.same_flops += costs.same_flops
        self.client_seconds += costs.seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, costs.peak_memory_bytes)
        self.prefix_cache_bytes = max(self.prefix_cache_bytes, costs.prefix_cache_bytes)
        self.saved_flops += costs.saved_flops

    def book_downlink(self, rest: str, serialised: int, payload_by_cause: dict[str, int]) -> None:
        """Book a message to a client: its parts by their cause, headers and all else under `rest`."""
        fields_ = {
            "round": "downlink_bytes",
            "first_contact": "first_contact_bytes",
            "catch_up": "catch_up_bytes",
        }
        for cause, size in payload_by_cause.items():
            setattr(self, fields_[cause], getattr(self, fields_[cause]) + size)
        self.downlink_payload_bytes += payload_by_cause.get("round", 0)
        setattr(self, rest, getattr(self, rest) + serialised - sum(payload_by_cause.values()))


@dataclass
class RoundEntry:
    """One line of rounds.jsonl and of the report's `rounds`."""

    round: int
    trained_blocks: list[int]
    clients: int
    train_flops: int
    uplink_bytes: int
    downlink_bytes: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a run leaves, besides the model."""

    rounds: list[RoundEntry] = field(default_factory=list)
    cost: Ledger = field(default_factory=Ledger)
    full_bytes_up: int = 0  # what full-model averaging would have sent for the same exchanges
    full_bytes_down: int = 0
    client_metrics: dict[str, float] = field(default_factory=dict)
