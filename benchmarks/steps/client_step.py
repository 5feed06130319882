"""What one client's training step costs: FLOPs, seconds and memory, FedBT beside stock code.

Random weights and random word pieces, batches of 8, one process on the CPU. FedBT costs the mean
over its schedule of 10 rounds. Writes client_step.json, and client_round.json for a client's whole
round.
"""

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results, workload
from benchmarks.machine import machine
from benchmarks.results import RESULTS, ROOT, Row
from benchmarks.steps import tables, variants
from benchmarks.steps.tables import KEYS
from benchmarks.steps.variants import METHODS, Part
from benchmarks.workload import ARCHITECTURES, BATCH, LENGTH, Setting, Work, Workload
from fedbt_app.costs.formulas import StepShape
from fedbt_app.costs.meter import FlopMeter
from fedbt_app.tasks import TASKS

ROUNDS_OF = ("mlm", "classification")  # tasks whose whole rounds are measured
Variant = tuple[str, int]  # method, local depth
BASELINE = "baseline"  # of memory: a process that has only imported the libraries


def main() -> None:
    """Measure what the command line names."""
    options = _options()
    _quiet()
    if options.peak:
        method, task, depth, moment = options.peak
        print(json.dumps(_peak(options, method, task, int(depth), moment)))
    elif options.whole_round:
        method, task, depth, began = options.whole_round
        print(json.dumps(_whole_round(options, method, task, int(depth), float(began))))
    else:
        with tempfile.TemporaryDirectory() as folder:
            options.checkpoint = Path(folder)
            workload.write_checkpoint(options.checkpoint, options.arch)
            _both_tables(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--arch", choices=ARCHITECTURES, default="bert-base")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--lengths", nargs="+", choices=(str(LENGTH), "real"), default=[str(LENGTH), "real"]
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--raw", type=Path, help="folder with train.jsonl.gz: its texts' lengths are the real ones"
    )
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--output", type=Path, default=RESULTS / "client_step.json")
    only = "only the table of whole rounds, or all but it; both tables if not given"
    parser.add_argument("--round", action=argparse.BooleanOptionalAction, default=None, help=only)
    # the rest is for processes of our own
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--whole-round", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def _both_tables(options: argparse.Namespace) -> None:
    if options.round is not True:
        rows = []
        peaks = _Peaks(options)
        for task in options.tasks:
            for length in options.lengths:
                rows += _with_ratios(_compare(options, task, length, peaks))
                gc.collect()  # a task's models go before the next task's come
                results.store(options.output, rows, KEYS)
        tables.print_steps(rows)
    if options.round is not False:
        rows = _rounds(options)
        if rows:
            results.store(options.output.with_name("client_round.json"), rows, KEYS)
            tables.print_rounds(rows)


# Steps --------------------------------------------------------------------------------------------


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
            size, length, positions, _ = self.work.batch.shape
            predicted = self.part.predicted(StepShape(size, length, positions))
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
    lengths = [LENGTH] * BATCH
    if length == "real":
        lengths = workload.real_lengths(options.raw)
    load = workload.make(setting, lengths)
    compared: list[Variant] = []
    for method in METHODS:
        compared += [(method, depth) for depth in setting.local_depths(method)]
    # before this process needs much itself
    memory = {(method, depth): peaks.of(method, depth, task) for method, depth in compared}
    baseline = peaks.of(BASELINE, 0, task)
    samples: dict[Variant, list[_Sample]] = {}
    for method, depth in compared:
        parts = variants.parts(setting, method, depth, load)
        samples[method, depth] = _samples(parts, load)
    for (method, depth), own in samples.items():
        for sample in own:
            sample.warm_up(f"{task}, {method}, {depth} blocks, {length}")
    for repetition in range(options.repetitions):  # all of them in each: a slow minute hits all
        number = f"{repetition + 1} of {options.repetitions}"
        print(f"{task}, {length}: repetition {number}", file=sys.stderr)
        for own in samples.values():
            for sample in own:
                sample.run()
    rows = []
    for (method, depth), own in samples.items():
        variant = (options.arch, task, method, depth, length, options.precision)
        row: Row = dict(zip(KEYS, variant, strict=True))
        row |= _step_costs(own)
        row["peak_memory_bytes"] = memory[method, depth]
        row["baseline_memory_bytes"] = baseline
        row["batch_lengths"] = _batch_lengths(own[0].part, load)
        row["repetitions"] = options.repetitions
        rows.append(row | machine())
    return rows


def _samples(parts: Sequence[Part], load: Workload) -> list[_Sample]:
    samples = []
    for part in parts:
        works = load.works
        if part.padded:  # one batch costs what another does
            works = works[:1]
        samples += [_Sample(part, work) for work in works]
    return samples


def _batch_lengths(part: Part, load: Workload) -> list[int]:
    if part.padded:
        return [LENGTH]
    return [work.batch.shape[1] for work in load.works]


def _step_costs(samples: Sequence[_Sample]) -> Row:
    return {
        "train_flops": round(_mean(samples, lambda sample: sample.flops)),
        "seconds": _mean(samples, lambda sample: statistics.median(sample.seconds)),
        "seconds_min": _mean(samples, lambda sample: min(sample.seconds)),
        "seconds_max": _mean(samples, lambda sample: max(sample.seconds)),
    }


def _mean(samples: Sequence[_Sample], value: Callable[[_Sample], float]) -> float:
    """Sum parts by their share; of one part, its batches count alike."""
    batches = len({id(sample.work) for sample in samples})
    return sum(sample.part.share * value(sample) for sample in samples) / batches


def _with_ratios(rows: list[Row]) -> list[Row]:
    """Add each row's costs as a share of the full-model methods' on the same task and length."""
    by_method = {row["method"]: row for row in rows}
    stock = by_method["full-stock"]
    same = by_method["full-optimised"]
    for row in rows:
        row["ratio_flops_stock"] = row["train_flops"] / stock["train_flops"]
        row["ratio_flops_same"] = row["train_flops"] / same["train_flops"]
        row["ratio_seconds_stock"] = row["seconds"] / stock["seconds"]
        row["ratio_seconds_same"] = row["seconds"] / same["seconds"]
        row["ratio_memory_stock"] = row["peak_memory_bytes"] / stock["peak_memory_bytes"]
    return rows


# Memory and whole rounds, each in a process of its own --------------------------------------------


class _Peaks:
    """Peak memory of each method, measured once, at full length.

    FedBT's is the larger of that of its first round, which fills the frozen-prefix cache, and that
    of the round whose plan needs most, which finds it filled.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._known: dict[tuple[str, ...], int] = {}

    def of(self, method: str, depth: int, task: str) -> int:
        """Return it in bytes."""
        if method == BASELINE:
            task = next(iter(TASKS))  # it is the same for all
        key = (method, task, str(depth))
        if key not in self._known:
            moments = ["only"]
            if method == "fedbt":
                moments = ["first", "largest"]
            peaks = [_in_process(self._options, "--peak", *key, moment) for moment in moments]
            self._known[key] = max(peaks)
        return self._known[key]


def _peak(options: argparse.Namespace, method: str, task: str, depth: int, moment: str) -> int:
    """Run two steps and return this process's largest resident size."""
    from transformers import BertForMaskedLM  # noqa: F401 (lazy: else the baseline would not have it)

    if method != BASELINE:
        setting = Setting(options.checkpoint, task, options.precision == "bf16")
        if moment == "first":
            plan = setting.schedule(depth)[0]
        else:
            plan = variants.largest(setting, depth)
        load = workload.make(setting, [LENGTH] * BATCH * 2)
        if method == "fedbt":
            variants.train_round(setting, plan, load.rows, options.checkpoint / "prefix")
        else:
            (part,) = variants.parts(setting, method, depth, load, only=plan)
            for work in load.works:
                part.run(work)
    status = Path("/proc/self/status").read_text()
    kibibytes = status.split("VmHWM:")[1].split()[0]
    return int(kibibytes) * 1024


def _whole_round(
    options: argparse.Namespace, method: str, task: str, depth: int, began: float
) -> dict[str, float]:
    """Do a whole round in this process and return its seconds."""
    from benchmarks.steps import client_round  # brings Flower: not for the memory of a step

    setting = Setting(options.checkpoint, task, options.precision == "bf16")
    with tempfile.TemporaryDirectory() as scratch:
        return client_round.measure(setting, method, depth, Path(scratch), began)


def _rounds(options: argparse.Namespace) -> list[Row]:
    rows = []
    tasks = [task for task in options.tasks if task in ROUNDS_OF]
    for task, method in itertools.product(tasks, ("full", "fedbt")):
        depth = Setting(options.checkpoint, task).local_depths(method)[0]
        print(f"whole round: {task}, {method}", file=sys.stderr)
        began = str(time.time())
        seconds = _in_process(options, "--whole-round", method, task, str(depth), began)
        variant = (options.arch, task, method, depth, str(LENGTH), options.precision)
        row: Row = dict(zip(KEYS, variant, strict=True))
        row["seconds"] = seconds
        rows.append(row | machine())
    return rows


def _in_process(options: argparse.Namespace, *arguments: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.steps.client_step"]
    command += ["--arch", options.arch]
    command += ["--precision", options.precision]
    command += ["--checkpoint", str(options.checkpoint)]
    command += arguments
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    *_, last_line = done.stdout.splitlines()
    return json.loads(last_line)


def _quiet() -> None:
    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
