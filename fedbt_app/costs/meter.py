"""What a step really does: FLOPs by torch's dispatcher, seconds and peak memory of this process."""

import resource
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

Result = TypeVar("Result")


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_backward_flop_count(gradient, query, key, value)
    return flops


# torch counts the GPU's fused attention kernels by these formulas, but not yet the CPU's.
_CPU_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FORMULAS = {
    **flop_registry,
    _CPU_FORWARD: shape_wrapper(_attention),
    _CPU_BACKWARD: shape_wrapper(_attention_backward),
}


class DispatchCounter(TorchDispatchMode):
    """Adds up the FLOPs of the operators that run, by torch's own formulas.

    torch's FlopCounterMode gives the same number, but keeps books by module and takes operators
    apart again; at small batches that made a counted step half as slow again. In inference mode
    torch hands over operators whole, such as `linear`, for which there is no formula: refused, as
    it would count too little.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert not torch.is_inference_mode_enabled(), (
            "FLOPs are not seen in inference mode: use no_grad"
        )
        self.total: int = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func.overloadpacket)
        if formula:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class FlopMeter:
    """Counts the FLOPs of steps: each distinct shape once by the dispatcher, then by adding up."""

    def __init__(self) -> None:
        self.total = 0
        self._known: dict[Hashable, int] = {}

    def step(self, shape: Hashable, run: Callable[[], Result]) -> Result:
        """Run one step; `shape` must determine what it computes."""
        if shape in self._known:
            result = run()
        else:
            with DispatchCounter() as counting:
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
        kilobytes = status.split("VmHWM:")[1].split()[0]
        return int(kilobytes) * 1024
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform == "darwin":  # in bytes there, elsewhere in kilobytes
            return peak
        return peak * 1024
