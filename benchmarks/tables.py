"""The benchmark's output: rows in a JSON file, and tables on the terminal."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
KEYS = ("arch", "task", "method", "local_depth", "length", "precision")  # what a row is about


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


def load(path: Path, keys: Sequence[str] = KEYS) -> dict[tuple[Any, ...], Row]:
    """Return the stored rows by what each is about; none if there is no file."""
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {tuple(row[name] for name in keys): row for row in there}


def store(path: Path, rows: Sequence[Row], keys: Sequence[str] = KEYS) -> None:
    """Write the rows in place of those about the same; all others in the file stay."""
    merged = load(path, keys) | {tuple(row[name] for name in keys): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(list(merged.values()), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def print_steps(rows: list[Row]) -> None:
    """Print the table of training steps."""
    heads = ("task", "length", "method", "blocks", "GFLOP", "of stock", "of same", "seconds", "min - max")
    lines = [
        (
            *(row["task"], row["length"], row["method"], str(row["local_depth"]), f"{row['train_flops'] / 1e9:.2f}"),
            *(_percent(row["ratio_flops_stock"]), _percent(row["ratio_flops_same"])),
            *(f"{row['seconds']:.3f}", f"{row['seconds_min']:.3f} - {row['seconds_max']:.3f}"),
            *(_percent(row["ratio_seconds_stock"]), _percent(row["ratio_seconds_same"])),
            *(f"{row['peak_memory_bytes'] / 1e6:.0f}", _percent(row["ratio_memory_stock"])),
        )
        for row in rows
    ]
    title = f"One training step: {rows[0]['arch']}, {rows[0]['precision']}"
    _print(title, (*heads, "of stock", "of same", "peak MB", "of stock"), lines)


def print_rounds(rows: list[Row]) -> None:
    """Print the table of whole rounds."""
    phases = tuple(rows[0]["seconds"])
    lines = [
        (row["task"], row["method"], str(row["local_depth"]), *(f"{row['seconds'][phase]:.2f}" for phase in phases))
        for row in rows
    ]
    heads = ("task", "method", "blocks", *(phase.replace("_", " ") for phase in phases))
    _print(f"A client's round, seconds: {rows[0]['arch']}, {rows[0]['precision']}", heads, lines)


def _print(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="left" if head in ("task", "method") else "right", no_wrap=True)
    before = lines[0]
    for line in lines:
        if line[0] != before[0]:
            table.add_section()
        table.add_row(*line)
        before = line
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
