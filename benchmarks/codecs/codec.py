"""What each codec costs and what it does to a run, on the deltas of real training.

For both scenarios and each seed: a whole run with float32, whose first client's deltas are kept;
whole runs with the lossy codecs; then, alone on the machine and on one thread, every codec on the
kept deltas. Writes benchmarks/results/codec.json after each step; what is there already is not done
again without --force.
"""

import argparse
import itertools
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, MessageType
from safetensors.torch import load_file, save_file

from benchmarks import results
from benchmarks.federation import Run, do, run_all
from benchmarks.machine import machine
from benchmarks.results import RESULTS, Row
from fedbt_app.codec.codec import decode, encode
from fedbt_app.codec.formats import CODECS
from fedbt_app.config import EMBEDDED, RunConfig
from fedbt_app.errors import without_folders
from fedbt_app.model.checkpoint import Checkpoint, find_model
from fedbt_app.tasks import TASKS
from fedbt_app.tensors import Tensors
from fedbt_app.wire.local_grid import LocalGrid
from fedbt_app.wire.messages import read_reply, read_request

KEYS = ("scenario", "codec", "seed")
DELTAS = "deltas"
METRICS = {"classification": "accuracy", "mlm": "loss"}
WHOLE_RUNS = ("float32", "int8", "int4", "int2")  # `+zstd` changes no value, and so no run
ROUNDS = 10
REPETITIONS = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "classification": {"max-train-examples": 1000, "max-test-examples": 400, "max-length": 128},
    "mlm": {
        "max-train-examples": 400,
        "max-test-examples": 200,
        "max-length": 64,
        "local-depth": 6,
        "dropout": 0.0,
    },
}


def main() -> None:
    """Measure what the command line names and the file does not have yet."""
    options = _options()
    _do_whole_runs(options)
    for scenario, seed in itertools.product(options.scenarios, options.seeds):
        folder = _run(options, scenario, "float32", seed).folder / DELTAS
        if folder.is_dir():  # kept by a run above, or by an earlier one
            for row in _measure(folder, scenario, seed):
                _add(options.output, row)
    print_table(list(results.load(options.output, KEYS).values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--classification", default=EMBEDDED, help="data set to fine-tune on")
    parser.add_argument("--mlm", default=EMBEDDED, help="data set to pre-train on")
    parser.add_argument("--mlm-model", default=EMBEDDED, help="base model of the pre-training")
    parser.add_argument("--scenarios", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--codecs", nargs="+", choices=CODECS, default=list(WHOLE_RUNS), help="codecs of whole runs"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/codec-benchmark"), help="folder for runs and deltas"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "codec.json")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    return parser.parse_args()


def _add(path: Path, row: Row) -> None:
    """Add to what is stored of the same run: its score and its codec's speed are measured apart."""
    stored = results.load(path, KEYS).get(results.about(row, KEYS), {})
    results.store(path, [stored | row], KEYS)


# Whole runs ---------------------------------------------------------------------------------------


def _do_whole_runs(options: argparse.Namespace) -> None:
    done: dict[tuple[Any, ...], Row] = {}
    if not options.force:
        done = results.load(options.output, KEYS)
    codecs = dict.fromkeys(["float32", *options.codecs])
    runs = []
    for seed, scenario, codec in itertools.product(options.seeds, options.scenarios, codecs):
        stored = done.get((scenario, codec, seed), {})
        if stored.get("final") is None:
            runs.append(_run(options, scenario, codec, seed))
    for count, (run, report) in enumerate(run_all(runs, options.processes, _do), 1):
        _add(options.output, _outcome(run, report))
        print(f"{count} of {len(runs)}: {run.key}: {report['final']}", file=sys.stderr)


def _run(options: argparse.Namespace, scenario: str, codec: str, seed: int) -> Run:
    values = {
        **SETTINGS[scenario],
        "task": scenario,
        "codec": codec,
        "seed": seed,
        "num-rounds": ROUNDS,
        "partitioner": "iid",
        "client-evaluation": "never",
    }
    if scenario == "mlm":
        values["dataset"] = _path(options.mlm)
        values["schedule"] = "paper"
        values["model"] = _path(options.mlm_model)
    else:
        values["dataset"] = _path(options.classification)
    folder = options.work.resolve() / f"{scenario}-{codec}-{seed}"
    return Run((scenario, codec, seed), values, folder)


def _path(name: str) -> str:
    """Make the path of a folder absolute: runs are done elsewhere. A name stays."""
    if Path(name).exists():
        return str(Path(name).resolve())
    return name


class _KeepingGrid(LocalGrid):
    """Keeps what the first client sends in each round, under the run's output folder."""

    def answer(self, node: int, message: Message) -> Message | None:
        reply = super().answer(node, message)
        is_first_client = node == min(self.nodes)
        is_round = message.metadata.message_type == MessageType.TRAIN
        if reply is not None and is_first_client and is_round:
            self._keep(message, reply)
        return reply

    def _keep(self, message: Message, reply: Message) -> None:
        config = RunConfig.load(self.run_config)
        labels = read_request(message).labels
        arch = Checkpoint(find_model(config.model)).architecture
        deltas = read_reply(reply).deltas or {}
        tensors: Tensors = {}
        for part, sent in deltas.items():
            shapes = arch.part(part, TASKS[config.task].head, len(labels), 0)
            tensors |= decode(sent.arrays, sent.header, shapes)
        folder = Path(config.output_dir) / DELTAS
        folder.mkdir(exist_ok=True)
        round_ = int(message.metadata.group_id)
        save_file(tensors, folder / f"{round_:02}.safetensors")


def _do(run: Run) -> dict[str, Any]:
    grid = LocalGrid
    if run.values["codec"] == "float32":
        grid = _KeepingGrid
    report = do(run, grid)
    shutil.rmtree(run.folder / "model")
    return report


def _outcome(run: Run, report: dict[str, Any]) -> Row:
    """Return the row of a whole run: its metric on the central test set, and its bytes."""
    scenario, codec, seed = run.key
    metric = METRICS[scenario]
    return {
        "scenario": scenario,
        "codec": codec,
        "seed": seed,
        "metric": metric,
        "initial": report["initial"][metric],
        "final": report["final"][metric],
        "rounds": len(report["rounds"]),
        "data": without_folders(run.values["dataset"]),
        "model": without_folders(report["model"]),
        "uplink_bytes": report["cost"]["uplink_bytes"],
        "downlink_bytes": report["cost"]["downlink_bytes"],
        "ratio_uplink": report["ratio"]["uplink_bytes"],
        "ratio_downlink": report["ratio"]["downlink_bytes"],
    }


# Codecs on the kept deltas ------------------------------------------------------------------------


def _measure(folder: Path, scenario: str, seed: int) -> list[Row]:
    """Measure all codecs on all rounds' deltas together; medians over interleaved repetitions."""
    torch.set_num_threads(1)
    rounds = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    parameters = sum(value.numel() for deltas in rounds for value in deltas.values())
    megabytes = 4 * parameters / 1e6  # in float32
    encode_seconds: dict[str, list[float]] = {codec: [] for codec in CODECS}
    decode_seconds: dict[str, list[float]] = {codec: [] for codec in CODECS}
    rows: dict[str, Row] = {}
    for codec in CODECS:
        trip = _round_trip(rounds, codec)  # it warms up, and is looked at
        rows[codec] = {
            "scenario": scenario,
            "codec": codec,
            "seed": seed,
            "bits_per_parameter": 8 * trip.size / parameters,
            "relative_error": relative_error(rounds, trip.received),
        }
    for _ in range(REPETITIONS):
        for codec in CODECS:
            trip = _round_trip(rounds, codec)
            encode_seconds[codec].append(trip.encode_seconds)
            decode_seconds[codec].append(trip.decode_seconds)
    for codec, row in rows.items():
        row["encode_mb_per_s"] = megabytes / statistics.median(encode_seconds[codec])
        row["decode_mb_per_s"] = megabytes / statistics.median(decode_seconds[codec])
        row.update(machine())
    return list(rows.values())


@dataclass(frozen=True)
class _Trip:
    """All rounds' deltas, encoded and decoded."""

    size: int  # bytes sent
    received: list[Tensors]
    encode_seconds: float
    decode_seconds: float


def _round_trip(rounds: Sequence[Tensors], codec: str) -> _Trip:
    shapes = []
    for deltas in rounds:
        shapes.append({name: tuple(value.shape) for name, value in deltas.items()})
    began = time.perf_counter()
    sent = [encode(deltas, codec) for deltas in rounds]
    middle = time.perf_counter()
    received = []
    for delta, shape in zip(sent, shapes, strict=True):
        received.append(decode(delta.arrays, delta.header, shape))
    ended = time.perf_counter()
    size = sum(delta.nbytes + len(delta.header) for delta in sent)
    return _Trip(size, received, middle - began, ended - middle)


def relative_error(sent: Sequence[Tensors], received: Sequence[Tensors]) -> float:
    """Return ||received - sent|| / ||sent|| over all tensors of all deltas."""
    missed = []
    for own, theirs in zip(sent, received, strict=True):
        missed.append({name: theirs[name] - own[name] for name in own})
    return math.sqrt(sum(map(_energy, missed)) / sum(map(_energy, sent)))


def _energy(tensors: Tensors) -> float:
    return sum(float(value.square().sum()) for value in tensors.values())


# The table ----------------------------------------------------------------------------------------


def print_table(rows: list[Row]) -> None:
    """Print means over seeds, as docs/methods.md shows them."""
    measures = "bits/parameter | relative error | encode MB/s | decode MB/s"
    print(f"| scenario | codec | {measures} | final, mean (spread) |")
    print("|---|---|---|---|---|---|---|")
    for scenario, codec in itertools.product(METRICS, CODECS):
        own = [row for row in rows if (row["scenario"], row["codec"]) == (scenario, codec)]
        if own:
            print(f"| {' | '.join([scenario, codec, *_means(own), _final(own)])} |")


def _means(rows: list[Row]) -> list[str]:
    formats = {
        "bits_per_parameter": "{:.2f}",
        "relative_error": "{:.2g}",
        "encode_mb_per_s": "{:,.0f}",
        "decode_mb_per_s": "{:,.0f}",
    }
    texts = []
    for name, form in formats.items():
        mean = statistics.mean(row[name] for row in rows if name in row)
        texts.append(form.format(mean))
    return texts


def _final(rows: list[Row]) -> str:
    finals = [row["final"] for row in rows if row.get("final") is not None]
    if not finals:
        return "-"
    spread = max(finals) - min(finals)
    return f"{statistics.mean(finals):.4f} ({spread:.4f})"


if __name__ == "__main__":
    main()
