"""Run the paper's tables: the cells that the results lack, or have with other settings.

    python -m benchmarks.paper finetune-tuning finetune --data FOLDER
    python -m benchmarks.paper finetune --data FOLDER \\
        --set model=bert-base-uncased --output base.jsonl

Each cell is a whole run of the product in a process of its own, on one thread. It can be stopped at
any time.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.federation import Run, do, run_all
from benchmarks.paper.ablations import ablated
from benchmarks.paper.cells import MADE, Job, line_of
from benchmarks.paper.students import shallow_student
from benchmarks.paper.tables import read_table
from benchmarks.results import KEY, PAPER, Key, Line, add_lines, read_lines
from fedbt_app.config import EMBEDDED, parse_assignment
from fedbt_app.errors import FedBTError

TABLES = Path(__file__).resolve().parent  # the folder of the tables' files


def main() -> None:
    """Run what is missing of the tables that the command line names."""
    options = _options()
    try:
        for table in options.tables:
            _run_table(table, options)
    except FedBTError as error:
        sys.exit(f"benchmarks.paper: error: {error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tables", nargs="+", choices=sorted(path.stem for path in TABLES.glob("*.toml"))
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with one folder for each data set"
    )
    parser.add_argument(
        "--models", type=Path, help="folder with the models that tables name by folder"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="cells with one of these values of each key named",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings to change in every cell"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/paper"), help="folder for the runs")
    parser.add_argument("--output", type=Path, default=PAPER)
    parser.add_argument("--force", action="store_true", help="run again what is there")
    parser.add_argument("--list", action="store_true", help="only say what there is to do")
    options = parser.parse_args()
    if options.set and options.output.resolve() == PAPER:
        parser.error(
            "--set changes what the lines of the default --output are about: name another file"
        )
    return options


def _run_table(table: str, options: argparse.Namespace) -> None:
    done = read_lines(options.output)
    jobs = read_table(TABLES / f"{table}.toml", done, _wanted(options.only))
    changes = dict(map(parse_assignment, options.set))
    left = [job for job in jobs if options.force or not job.is_done(done, changes)]
    print(f"{table}: {len(left)} of {len(jobs)} jobs to do", file=sys.stderr, flush=True)
    if options.list:
        for job in left:
            print(f"  {_title(job)}", file=sys.stderr)
        return
    _run_jobs(left, changes, options)


def _run_jobs(jobs: Sequence[Job], changes: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Run the jobs and keep each one's lines as soon as it has ended."""
    models = options.models
    if models:
        models = models.resolve()
    work = partial(
        run_job,
        data=options.data.resolve(),
        models=models,
        work=options.work.resolve(),
        changes=changes,
    )
    began = time.monotonic()
    waiting = list(jobs)
    for job, lines in run_all(jobs, options.processes, work):
        add_lines(options.output, lines)
        waiting.remove(job)
        count = len(jobs) - len(waiting)
        finished = f"{job.table}: {count} of {len(jobs)}: {_title(job)}"
        minutes_spent = (time.monotonic() - began) / 60
        seconds_left = _seconds_left(waiting, read_lines(options.output))
        minutes_left = seconds_left / options.processes / 60
        clock = f"{minutes_spent:.0f} min so far, about {minutes_left:.0f} to go"
        print(f"{finished}: {_scores(lines)}; {clock}", file=sys.stderr, flush=True)


def _scores(lines: Iterable[Line]) -> str:
    texts = [f"{line['dataset']} {line['metric']} {line['value']:.4f}" for line in lines]
    return ", ".join(texts)


def _wanted(texts: Iterable[str]) -> dict[str, set[str]]:
    """Return KEY=VALUE texts as sets of values by key."""
    wanted: dict[str, set[str]] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if key not in KEY or not separator:
            raise FedBTError(f"--only {text} is not KEY=VALUE: the keys are {', '.join(KEY)}")
        wanted.setdefault(key, set()).add(value)
    return wanted


def _title(job: Job) -> str:
    dataset = job.own_stages[0].dataset
    named = f"{job.method} {job.variant}".rstrip()  # many have no variant
    return f"{dataset}, {named}, seed {job.seed}"


def _seconds_left(waiting: Iterable[Job], done: Mapping[Key, Line]) -> float:
    seconds = 0.0
    for job in waiting:
        seconds += sum(_expected_seconds(key, done) for key in job.keys)
    return seconds


def _expected_seconds(key: Key, done: Mapping[Key, Line]) -> float:
    """Expect what the cell took with other seeds, else its data set's mean, its table's, all's."""
    for depth in (4, 2, 1, 0):  # so much of the key is alike
        known = []
        for other, line in done.items():
            if other[:depth] == key[:depth]:
                known.append(line["wall_seconds"])
        if known:
            return float(statistics.mean(known))
    return 0.0


def run_job(
    job: Job, data: Path, models: Path | None, work: Path, changes: Mapping[str, Any]
) -> list[Line]:
    """Do a job in this process and return its lines; nothing of it stays on disk."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    table, *about = map(str, job.keys[0])
    folder = work / table / "-".join(about).replace("/", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = _base(job, models, folder, changes)
    lines: list[Line] = []
    for number, (stage, values) in enumerate(zip(job.own_stages, job.runs(changes), strict=True)):
        if values.get("model") == MADE:
            model = str(folder / "0" / "model")
        dataset = str(_data(data, stage.dataset, job.split, folder))
        settings = {**values, "dataset": dataset, "model": model}
        run = Run(job.keys[number], settings, folder / str(number), stage.clients)
        ablation = ""  # later stages are the product's own
        if number == 0:
            ablation = job.ablation
        began = time.monotonic()
        with ablated(ablation):
            report = do(run)
        seconds = time.monotonic() - began
        lines.append(line_of(job, stage, values, report, seconds))
    shutil.rmtree(folder)
    return lines


def _base(job: Job, models: Path | None, folder: Path, changes: Mapping[str, Any]) -> str:
    """Return the model that the first stage starts from: a name or a folder."""
    base = str(changes.get("model", job.stages[0].settings.get("model", EMBEDDED)))
    if models and (models / base).is_dir():
        base = str(models / base)
    if job.student:
        base = str(shallow_student(base, job.student, folder / "student"))
    return base


def _data(data: Path, name: str, split: str, folder: Path) -> Path:
    """Return the data's folder, or one without its test split: `validation` then tests."""
    source = data / name
    if not source.is_dir():
        raise FedBTError(f"--data {data} has no folder {name}: it is one of the tables' data sets")
    if split == "test":
        return source
    reduced = folder / "data" / name
    reduced.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*"):
        if not file.name.startswith("test"):
            (reduced / file.name).symlink_to(file)
    return reduced
