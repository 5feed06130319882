"""What a measurement was made on."""

import platform
from pathlib import Path

import torch

from benchmarks.results import Row


def machine() -> Row:
    """Say what was measured on."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": cpu()}


def cpu() -> str:
    """Name the processor and what it brings: one name may stand for very different ones."""
    described = f"{_name()}, {torch.backends.cpu.get_cpu_capability()}"
    able = torch.cpu.get_capabilities()  # whether or not the app takes it for the faster one
    if able.get("avx512_bf16") or able.get("amx_bf16"):
        described += ", bfloat16"
    return described


def _name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    for line in text.splitlines():
        if "model name" in line:
            return line.split(":")[1].strip()
    return platform.processor()
