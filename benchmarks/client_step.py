"""What one client's training step costs: FLOPs, seconds and memory, FedBT beside stock code.

Random weights and random word pieces, batches of 8, one process on the CPU. FedBT costs the mean over its
schedule of 10 rounds. Writes client_step.json, and client_round.json for a client's whole round.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import client_round
import torch
from variants import (
    ARCHITECTURES,
    BATCH,
    LENGTH,
    METHODS,
    TASKS,
    Part,
    Setting,
    Work,
    Workload,
    real_lengths,
    workload,
    write_checkpoint,
)
from variants import parts as parts_of

from fedbt_app.costs import FlopMeter
from fedbt_app.predict import StepShape

Row = dict[str, Any]
KEYS = ("arch", "task", "method", "local_depth", "length", "precision")
ROUND_METHODS = {"mlm": ("full", "fedbt"), "classification": ("full", "fedbt")}
BASELINE = "baseline"  # of memory: a process that has only imported the libraries


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="bert-base")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--lengths", nargs="+", choices=(str(LENGTH), "real"), default=[str(LENGTH), "real"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--raw", type=Path, help="folder with train.jsonl.gz: its texts' lengths are the real ones")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/client_step.json"))
    parser.add_argument(
        *("--round",),
        action=argparse.BooleanOptionalAction,
        help="only the table of whole rounds, or all but that; both tables if not given",
    )
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)  # the rest is for processes of our own
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--whole-round", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    _quiet()
    if options.peak:
        method, task, depth = options.peak
        print(json.dumps(_peak(options, method, task, int(depth))))
    elif options.whole_round:
        method, task, depth, began = options.whole_round
        setting = Setting(options.checkpoint, task, options.precision == "bf16")
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(client_round.measure(setting, method, int(depth), Path(scratch), float(began))))
    else:
        with tempfile.TemporaryDirectory() as folder:
            options.checkpoint = Path(folder)
            write_checkpoint(options.checkpoint, options.arch)
            _both_tables(options)


def _both_tables(options: argparse.Namespace) -> None:
    if options.round is not True:
        rows = []
        peaks = _Peaks(options)
        for task in options.tasks:
            for length in options.lengths:
                rows += _with_ratios(_compare(options, task, length, peaks))
                _store(options.output, rows)
        _print_steps(rows)
    if options.round is not False:
        rows = _rounds(options)
        _store(options.output.with_name("client_round.json"), rows)
        _print_rounds(rows)


# Steps --------------------------------------------------------------------------------------------------------


@dataclass
class _Sample:
    """One part on one batch: its FLOPs, and the seconds of every repetition."""

    part: Part
    work: Work
    flops: int = 0
    seconds: list[float] = field(default_factory=list)

    def warm_up(self, name: str) -> None:
        """Run once, count the FLOPs and hold them against the formula."""
        meter = FlopMeter()
        meter.step("step", lambda: self.part.run(self.work))
        self.flops = meter.total
        if self.part.predicted is not None:
            predicted = self.part.predicted(StepShape(*self.work.batch.shape[:3]))
            if predicted != self.flops:
                print(f"{name}: counted {self.flops} FLOPs, predicted {predicted}", file=sys.stderr)

    def run(self) -> None:
        """Run and time it."""
        began = time.perf_counter()
        self.part.run(self.work)
        self.seconds.append(time.perf_counter() - began)


def _compare(options: argparse.Namespace, task: str, length: str, peaks: "_Peaks") -> list[Row]:
    """Measure all methods on one task and distribution of lengths, repetition by repetition."""
    setting = Setting(options.checkpoint, task, options.precision == "bf16")
    load = workload(setting, real_lengths(options.raw) if length == "real" else [LENGTH] * BATCH)
    variants = [(method, depth) for method in METHODS for depth in setting.local_depths(method)]
    memory = {variant: peaks.of(*variant, task) for variant in variants}  # before this process needs much itself
    samples = {variant: _samples(parts_of(setting, *variant, load), load) for variant in variants}
    for (method, depth), own in samples.items():
        for sample in own:
            sample.warm_up(f"{task}, {method}, {depth} blocks, {length}")
    for repetition in range(options.repetitions):
        print(f"{task}, {length}: repetition {repetition + 1} of {options.repetitions}", file=sys.stderr)
        for own in samples.values():
            for sample in own:
                sample.run()
    rows = []
    for (method, depth), own in samples.items():
        variant = (options.arch, task, method, depth, length, options.precision)
        row = dict(zip(KEYS, variant, strict=True)) | {
            "train_flops": round(_mean(own, lambda sample: sample.flops)),
            "seconds": _mean(own, lambda sample: statistics.median(sample.seconds)),
            "seconds_min": _mean(own, lambda sample: min(sample.seconds)),
            "seconds_max": _mean(own, lambda sample: max(sample.seconds)),
            "peak_memory_bytes": memory[method, depth],
            "baseline_memory_bytes": peaks.of(BASELINE, 0, task),
            "padded_lengths": [LENGTH if sample.part.padded else sample.work.batch.shape[1] for sample in own],
            "repetitions": options.repetitions,
        }
        row["padded_lengths"] = row["padded_lengths"][: 1 if own[0].part.padded else len(load.works)]
        rows.append(row | _machine())
    gc.collect()
    return rows


def _samples(parts: Iterable[Part], load: Workload) -> list[_Sample]:
    return [_Sample(part, work) for part in parts for work in (load.works[:1] if part.padded else load.works)]


def _mean(samples: Sequence[_Sample], value: Callable[[_Sample], float]) -> float:
    """Sum parts by their share; of one part, its batches count alike."""
    batches = len({id(sample.work) for sample in samples})
    return sum(sample.part.share * value(sample) for sample in samples) / batches


def _with_ratios(rows: list[Row]) -> list[Row]:
    """Add each row's costs as a share of the full-model methods' on the same task and length."""
    by_method = {row["method"]: row for row in rows}
    stock, same = by_method["full-stock"], by_method["full-optimised"]
    for row in rows:
        row["ratio_flops_stock"] = row["train_flops"] / stock["train_flops"]
        row["ratio_flops_same"] = row["train_flops"] / same["train_flops"]
        row["ratio_seconds_stock"] = row["seconds"] / stock["seconds"]
        row["ratio_seconds_same"] = row["seconds"] / same["seconds"]
        row["ratio_memory_stock"] = row["peak_memory_bytes"] / stock["peak_memory_bytes"]
    return rows


# Memory and whole rounds, each in a process of its own --------------------------------------------------------


class _Peaks:
    """Peak memory of each method, measured once, at full length."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._known: dict[tuple[str, ...], int] = {}

    def of(self, method: str, depth: int, task: str) -> int:
        key = (method, task if method != BASELINE else TASKS[0], str(depth))
        if key not in self._known:
            self._known[key] = _in_process(self._options, "--peak", *key)
        return self._known[key]


def _peak(options: argparse.Namespace, method: str, task: str, depth: int) -> int:
    """Run two steps of the plan that needs most memory and return this process's largest resident size."""
    from transformers import BertForMaskedLM  # noqa: F401 (lazy: else the baseline would not have it)

    if method != BASELINE:
        setting = Setting(options.checkpoint, task, options.precision == "bf16")
        load = workload(setting, [LENGTH] * BATCH)
        made = parts_of(setting, method, depth, load, largest=True)
        for part in (*made, made[-1]):
            part.run(load.works[0])
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def _rounds(options: argparse.Namespace) -> list[Row]:
    rows = []
    for task in (task for task in options.tasks if task in ROUND_METHODS):
        for method in ROUND_METHODS[task]:
            depth = Setting(options.checkpoint, task).local_depths(method)[0]
            print(f"whole round: {task}, {method}", file=sys.stderr)
            seconds = _in_process(options, "--whole-round", method, task, str(depth), str(time.time()))
            variant = (options.arch, task, method, depth, str(LENGTH), options.precision)
            rows.append(dict(zip(KEYS, variant, strict=True)) | {"seconds": seconds} | _machine())
    return rows


def _in_process(options: argparse.Namespace, *arguments: str) -> Any:
    fixed = ["--arch", options.arch, "--precision", options.precision, "--checkpoint", str(options.checkpoint)]
    command = [sys.executable, __file__, *fixed, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


# Output -------------------------------------------------------------------------------------------------------


def _machine() -> Row:
    try:
        names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    except OSError:
        names = []
    cpu = names[0].strip() if names else platform.processor()
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": cpu}


def _store(path: Path, rows: list[Row]) -> None:
    """Write the rows in place of those of the same variants; all others in the file stay."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in KEYS)

    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    merged = {key(row): row for row in there} | {key(row): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(list(merged.values()), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _print_steps(rows: list[Row]) -> None:
    heads = ("task", "length", "method", "blocks", "GFLOP", "of stock", "of same", "seconds", "min - max")
    _print_table(
        f"One step of {BATCH}: {rows[0]['arch']}, {rows[0]['precision']}",
        (*heads, "of stock", "of same", "peak MB", "of stock"),
        [
            (
                *(row["task"], row["length"], row["method"], str(row["local_depth"])),
                *(f"{row['train_flops'] / 1e9:.2f}", _percent(row["ratio_flops_stock"])),
                *(_percent(row["ratio_flops_same"]), f"{row['seconds']:.3f}"),
                f"{row['seconds_min']:.3f} - {row['seconds_max']:.3f}",
                *(_percent(row["ratio_seconds_stock"]), _percent(row["ratio_seconds_same"])),
                *(f"{row['peak_memory_bytes'] / 1e6:.0f}", _percent(row["ratio_memory_stock"])),
            )
            for row in rows
        ],
    )


def _print_rounds(rows: list[Row]) -> None:
    phases = (*client_round.PHASES, "total")
    lines = [
        (row["task"], row["method"], str(row["local_depth"]), *(f"{row['seconds'][phase]:.2f}" for phase in phases))
        for row in rows
    ]
    heads = ("task", "method", "blocks", *(phase.replace("_", "\n") for phase in phases))
    _print_table(f"A client's round of {client_round.STEPS} steps, seconds", heads, lines)


def _print_table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for before, line in zip([lines[0], *lines], lines, strict=False):
        if before[:2] != line[:2]:
            table.add_section()
        table.add_row(*line)
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
