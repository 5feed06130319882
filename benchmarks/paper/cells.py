"""The cells of the paper's tables: from declarative files to runs, and finished ones as JSON lines.

A file in benchmarks/paper/ is one table. `[settings]` hold for all of its cells, `[datasets.NAME]` and `[[cells]]`
add their own; a cell is one (method, variant), run for each data set (or those that it names) and seed. `grid`, a
cell's or the table's, makes a variant of it with each entry; `tuned-by` names the table whose best entry for that
method gives a cell the settings to tune. `[[downstream]]` are runs on the model that a cell has made.
"""

import itertools
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.machine import cpu
from benchmarks.results import KEY, Key, Line
from fedbt_app.config import defaults
from fedbt_app.errors import FedBTError
from fedbt_app.model.device import pick_device, use_bfloat16
from fedbt_app.tasks.tasks import PRIMARY_METRIC

LOWER_IS_BETTER = {"loss"}
MADE = "made by this cell"  # the model of a later run


@dataclass(frozen=True)
class Stage:
    """One run of a job: `settings` are changes to the default configuration, by dashed keys."""

    dataset: str
    settings: dict[str, Any]
    clients: int


@dataclass(frozen=True)
class Job:
    """What one process does: a run, and those on the model that it made; each gives one line."""

    table: str
    method: str
    variant: str
    seed: int
    stages: tuple[Stage, ...]
    split: str = "test"
    student: int = 0  # start from the first so many blocks of the base only
    ablation: str = ""  # of ablations.py
    bare: bool = False  # no run of its own: the later stages start from the base

    @property
    def keys(self) -> list[Key]:
        """The lines that it gives."""
        return [(self.table, stage.dataset, self.method, self.variant, self.seed) for stage in self.own_stages]

    @property
    def own_stages(self) -> tuple[Stage, ...]:
        """The stages that it runs."""
        return self.stages[1:] if self.bare else self.stages

    def runs(self, changes: Mapping[str, Any] = MappingProxyType({})) -> list[dict[str, Any]]:
        """Return the settings of its runs, `changes` in force; later ones start from what the first has made."""
        runs = [stage.settings | {"min-clients": stage.clients} | changes for stage in self.own_stages]
        return runs if self.bare else [runs[0], *(values | {"model": MADE} for values in runs[1:])]

    def is_done(self, done: Mapping[Key, Line], changes: Mapping[str, Any] = MappingProxyType({})) -> bool:
        """Say whether all its lines are there, run with the settings that its table gives now."""
        pairs = zip(self.keys, self.runs(changes), strict=True)
        return all(key in done and not_default(done[key]["settings"]) == not_default(values) for key, values in pairs)


# Lines --------------------------------------------------------------------------------------------------------


def not_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from the product's defaults."""
    standard = defaults()
    return {name: value for name, value in settings.items() if standard[name] != value}


def best(lines: Collection[Line]) -> Line:
    """Return the line with the best score."""
    lower = all(line["metric"] in LOWER_IS_BETTER for line in lines)
    return (min if lower else max)(lines, key=lambda line: line["value"])


# Tables -------------------------------------------------------------------------------------------------------


def read_table(
    path: Path, done: Mapping[Key, Line], only: Mapping[str, Collection[str]] = MappingProxyType({})
) -> list[Job]:
    """Return a table's jobs, by seed first: stopped early, it is a whole table of fewer seeds.

    `only` keeps those whose table, data set, method, variant or seed is one of the named.

    Raises
    ------
    FedBTError
        If the table is tuned by another that has no finished line for one of its methods.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    jobs = []
    for cell in table["cells"]:
        datasets = cell.get("datasets", table["datasets"])
        names = [cell["variant"]] if "variant" in cell else []
        grid = cell.get("grid", table.get("grid", [{}]))
        tries = itertools.product(datasets, grid, cell.get("seeds", table["seeds"]))
        for dataset, entry, seed in tries:
            variant = ", ".join([*names, *(f"{key}={value}" for key, value in entry.items())])
            key = (path.stem, dataset, cell["method"], variant, seed)
            about = dict(zip(KEY, map(str, key), strict=True))
            if all(about[name] in values for name, values in only.items()):
                jobs.append(_job(key, table, cell, entry, done))
    return sorted(jobs, key=lambda job: job.seed)


def _job(
    key: Key, table: Mapping[str, Any], cell: Mapping[str, Any], entry: Mapping[str, Any], done: Mapping[Key, Line]
) -> Job:
    name, dataset, method, variant, seed = key
    common, curve = table["settings"], {"central-evaluation": "every" if seed in table.get("curves", []) else "final"}
    clients = cell.get("clients", table["clients"])

    def settings(about: Mapping[str, Any], data: str, tuned: str) -> dict[str, Any]:
        by = about.get("tuned-by", table.get("tuned-by"))
        chosen = _tuned(by, about.get("tuned-on", data), tuned, done) if by else {}
        return {**common, **about.get("settings", {}), **chosen}

    bare = cell.get("bare", False)
    own = {} if bare else settings(table["datasets"][dataset], dataset, cell.get("tuned-as", method))
    stages = [Stage(dataset, {**common, **own, **cell.get("settings", {}), **entry, **curve, "seed": seed}, clients)]
    for after in table.get("downstream", []):
        values = settings(after, after["dataset"], after["tuned-as"]) | {"central-evaluation": "final", "seed": seed}
        stages.append(Stage(after["dataset"], values, table["clients"]))
    return Job(
        table=name,
        method=method,
        variant=variant,
        seed=seed,
        stages=tuple(stages),
        split=table.get("split", "test"),
        student=cell.get("student", 0),
        ablation=cell.get("ablation", ""),
        bare=bare,
    )


def _tuned(table: str, dataset: str, method: str, done: Mapping[Key, Line]) -> dict[str, Any]:
    """Return the tried settings that gave the best validation score."""
    own = [line for key, line in done.items() if key[:3] == (table, dataset, method)]
    if not own:
        raise FedBTError(
            f"table {table} has no line for {method} on {dataset}: run `python -m benchmarks.paper {table}` first"
        )
    return dict(best(own)["tried"])


def line_of(job: Job, stage: Stage, values: Mapping[str, Any], report: Mapping[str, Any], seconds: float) -> Line:
    """Return the line of a finished stage, run with `values`; `tried` is what the variants of a grid differ in."""
    metric = PRIMARY_METRIC[report["task"]]
    cost, rounds = report["cost"], report["rounds"]
    names = ("train_flops", "uplink_bytes", "downlink_bytes")
    curve, sums = [], dict.fromkeys(names, 0)
    for entry in rounds:
        sums = {name: sums[name] + entry[name] for name in names}
        if metric in entry["metrics"]:
            curve.append([entry["round"], *sums.values(), entry["metrics"][metric]])
    run = defaults() | dict(values)
    tried = {name.split("=")[0] for name in job.variant.split(", ") if "=" in name}
    return {
        **dict(zip(KEY, (job.table, stage.dataset, job.method, job.variant, job.seed), strict=True)),
        "metric": metric,
        "value": report["final"][metric],
        "initial": report["initial"][metric],
        **{name: cost[name] for name in (*names, "client_seconds", "stock_flops", "same_flops", "peak_memory_bytes")},
        "full_bytes": report["reference"]["uplink_bytes"],
        "trained_blocks": [entry["trained_blocks"] for entry in rounds],
        "curve": curve,
        "wall_seconds": round(seconds, 1),
        "clients": stage.clients,
        "cpu": cpu(),
        "bfloat16": use_bfloat16(run["precision"], pick_device(run["device"])),
        "settings": not_default(values),
        "tried": {name: value for name, value in values.items() if name in tried},
    }
