"""What a measurement was made on."""

import platform
from pathlib import Path

import torch

from benchmarks.results import Row


def machine() -> Row:
    """Say what was measured on."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": cpu()}


def cpu() -> str:
    """Name the processor and what it brings: one and the same name may stand for very different ones."""
    try:
        names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    except OSError:
        names = []
    name = names[0].strip() if names else platform.processor()
    able = torch.cpu.get_capabilities()  # whether or not the app takes it for the faster one
    formats = ", bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{formats}"
