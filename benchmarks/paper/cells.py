"""A cell of the paper's tables as a job: what runs, when it is done, and the line it gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from benchmarks.machine import cpu
from benchmarks.results import KEY, Key, Line
from fedbt_app.config import defaults
from fedbt_app.model.device import pick_device, use_bfloat16
from fedbt_app.tasks import TASKS

MADE = "made by this cell"  # the model of a later run
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})
SPENT = ("train_flops", "uplink_bytes", "downlink_bytes")
COSTS = (*SPENT, "client_seconds", "stock_flops", "same_flops", "peak_memory_bytes")


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
        keys = []
        for stage in self.own_stages:
            keys.append((self.table, stage.dataset, self.method, self.variant, self.seed))
        return keys

    @property
    def own_stages(self) -> tuple[Stage, ...]:
        """The stages that it runs."""
        if self.bare:
            return self.stages[1:]
        return self.stages

    def runs(self, changes: Mapping[str, Any] = NO_CHANGES) -> list[dict[str, Any]]:
        """Return the settings of its runs, `changes` in force; the first makes the later's model."""
        runs = []
        for stage in self.own_stages:
            runs.append({**stage.settings, "min-clients": stage.clients, **changes})
        if not self.bare:
            for later in runs[1:]:
                later["model"] = MADE
        return runs

    def is_done(self, done: Mapping[Key, Line], changes: Mapping[str, Any] = NO_CHANGES) -> bool:
        """Say whether all its lines are there, run with the settings that its table gives now."""
        for key, settings in zip(self.keys, self.runs(changes), strict=True):
            if key not in done:
                return False
            if not_default(done[key]["settings"]) != not_default(settings):
                return False
        return True


def not_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from the product's defaults."""
    standard = defaults()
    return {name: value for name, value in settings.items() if standard[name] != value}


def line_of(
    job: Job,
    stage: Stage,
    values: Mapping[str, Any],
    report: Mapping[str, Any],
    seconds: float,
) -> Line:
    """Return the line of a finished stage, run with `values`; `tried` is what a grid changes."""
    metric = TASKS[report["task"]].metric.name
    about = (job.table, stage.dataset, job.method, job.variant, job.seed)
    run = {**defaults(), **values}
    bfloat16 = use_bfloat16(run["precision"], pick_device(run["device"]))
    return {
        **dict(zip(KEY, about, strict=True)),
        "metric": metric,
        "value": report["final"][metric],
        "initial": report["initial"][metric],
        **{name: report["cost"][name] for name in COSTS},
        "full_bytes": report["reference"]["uplink_bytes"],
        "trained_blocks": [entry["trained_blocks"] for entry in report["rounds"]],
        "curve": _curve(report["rounds"], metric),
        "wall_seconds": round(seconds, 1),
        "clients": stage.clients,
        "cpu": cpu(),
        "bfloat16": bfloat16,
        "settings": not_default(values),
        "tried": _tried(job.variant, values),
    }


def _tried(variant: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a variant such as `half, lora-rank=4` names."""
    names = set()
    for text in variant.split(", "):
        name, is_setting, _ = text.partition("=")
        if is_setting:
            names.add(name)
    return {name: value for name, value in values.items() if name in names}


def _curve(rounds: list[dict[str, Any]], metric: str) -> list[list[Any]]:
    """Return a point for each scored round: its number, all that was spent until then, the score."""
    curve = []
    spent = dict.fromkeys(SPENT, 0)
    for entry in rounds:
        for name in SPENT:
            spent[name] += entry[name]
        if metric in entry["metrics"]:
            curve.append([entry["round"], *spent.values(), entry["metrics"][metric]])
    return curve
