"""From a table's declarative file to its jobs.

A file in benchmarks/paper/ is one table. `[settings]` hold for all of its cells, `[datasets.NAME]`
and `[[cells]]` add their own; a cell is one (method, variant), run for each data set (or those that
it names) and seed. `grid`, a cell's or the table's, makes a variant of it with each entry;
`tuned-by` names the table whose best entry for that method gives a cell the settings to tune.
`[[downstream]]` are runs on the model that a cell has made.
"""

import itertools
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.paper.cells import Job, Stage
from benchmarks.results import KEY, Key, Line, best
from fedbt_app.errors import FedBTError

EVERY: Mapping[str, Collection[str]] = MappingProxyType({})
Content = Mapping[str, Any]  # of a file, or of one of its tables


def read_table(
    path: Path, done: Mapping[Key, Line], only: Mapping[str, Collection[str]] = EVERY
) -> list[Job]:
    """Return a table's jobs, by seed first: stopped early, it is a whole table of fewer seeds.

    `only` keeps those whose table, data set, method, variant or seed is one of the named.

    Raises
    ------
    FedBTError
        If the table is tuned by another that has no finished line for one of its methods.
    """
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    table = _Table(path.stem, content, done)
    jobs = []
    for entry in table.entries():
        if _is_wanted(table.key_of(entry), only):
            jobs.append(table.job(entry))
    return sorted(jobs, key=lambda job: job.seed)


def _is_wanted(key: Key, only: Mapping[str, Collection[str]]) -> bool:
    about = dict(zip(KEY, map(str, key), strict=True))
    return all(about[name] in values for name, values in only.items())


@dataclass(frozen=True)
class _Entry:
    """One cell on one data set with one entry of the grid and one seed."""

    cell: Content
    dataset: str
    changes: Content
    seed: int

    @property
    def variant(self) -> str:
        """The cell's own variant, and what the grid changes."""
        names = [f"{key}={value}" for key, value in self.changes.items()]
        if "variant" in self.cell:
            names.insert(0, self.cell["variant"])
        return ", ".join(names)


@dataclass(frozen=True)
class _Table:
    """A table's file, and the finished cells that may tune it."""

    name: str
    content: Content
    done: Mapping[Key, Line]

    def entries(self) -> Iterator[_Entry]:
        content = self.content
        for cell in content["cells"]:
            datasets = cell.get("datasets", content["datasets"])
            grid = cell.get("grid", content.get("grid", [{}]))
            seeds = cell.get("seeds", content["seeds"])
            for dataset, changes, seed in itertools.product(datasets, grid, seeds):
                yield _Entry(cell, dataset, changes, seed)

    def key_of(self, entry: _Entry) -> Key:
        return self.name, entry.dataset, entry.cell["method"], entry.variant, entry.seed

    def job(self, entry: _Entry) -> Job:
        cell = entry.cell
        stages = [self._own_stage(entry)]
        for after in self.content.get("downstream", []):
            stages.append(self._later_stage(after, entry.seed))
        return Job(
            table=self.name,
            method=cell["method"],
            variant=entry.variant,
            seed=entry.seed,
            stages=tuple(stages),
            split=self.content.get("split", "test"),
            student=cell.get("student", 0),
            ablation=cell.get("ablation", ""),
            bare=cell.get("bare", False),
        )

    def _own_stage(self, entry: _Entry) -> Stage:
        cell = entry.cell
        settings = dict(self.content["settings"])
        if not cell.get("bare", False):  # a bare cell has no run of its own, and so nothing to tune
            about_data = self.content["datasets"][entry.dataset]
            tuned_as = cell.get("tuned-as", cell["method"])
            settings |= self._settings(about_data, entry.dataset, tuned_as)
        settings |= cell.get("settings", {})
        settings |= entry.changes
        settings["central-evaluation"] = "final"
        if entry.seed in self.content.get("curves", []):
            settings["central-evaluation"] = "every"
        settings["seed"] = entry.seed
        clients = cell.get("clients", self.content["clients"])
        return Stage(entry.dataset, settings, clients)

    def _later_stage(self, after: Content, seed: int) -> Stage:
        settings = self._settings(after, after["dataset"], after["tuned-as"])
        settings["central-evaluation"] = "final"
        settings["seed"] = seed
        return Stage(after["dataset"], settings, self.content["clients"])

    def _settings(self, about: Content, dataset: str, method: str) -> dict[str, Any]:
        """Return the table's settings, over them a data set's or later stage's, then tuned ones."""
        settings = {**self.content["settings"], **about.get("settings", {})}
        tuning_table = about.get("tuned-by", self.content.get("tuned-by"))
        if tuning_table:
            tuned_on = about.get("tuned-on", dataset)
            settings |= self._tuned(tuning_table, tuned_on, method)
        return settings

    def _tuned(self, tuning_table: str, dataset: str, method: str) -> dict[str, Any]:
        """Return the tried settings that gave the best validation score."""
        wanted = (tuning_table, dataset, method)
        own = [line for key, line in self.done.items() if key[:3] == wanted]
        if not own:
            raise FedBTError(
                f"table {tuning_table} has no line for {method} on {dataset}: "
                f"run `python -m benchmarks.paper {tuning_table}` first"
            )
        return dict(best(own)["tried"])
