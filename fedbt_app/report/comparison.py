"""The terminal's tables: the result of a run, and a comparison of finished runs."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbt_app.plan import FULL
from fedbt_app.report.report import differences, load
from fedbt_app.report.tables import (
    SCORE_HEAD,
    cost_head,
    cost_rows,
    digits,
    format_memory,
    format_ratio,
    format_score,
    ratio_of,
    score_rows,
)
from fedbt_app.tasks import TASKS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COMPARISON_HEAD = [
    "",
    "method",
    "task\nmodel",
    "rounds",
    "test\nscore",
    "TFLOP",
    "uplink\nMB",
    "downlink\nMB",
]
COMPARISON_HEAD += ["client\nseconds", "peak\nmemory", "FLOPs /\nreference"]


def print_result(report: Mapping[str, Any], console: "Console | None" = None) -> None:
    """Print the costs, the scores and where the model is, in 100 columns at most."""
    console = console or _console(100)
    console.print(_table(cost_head(report), cost_rows(report)))
    if report["final"]:
        console.print(_table(SCORE_HEAD, score_rows(report)))
    if report["model_dir"]:
        console.print(
            f"Model: {report['model_dir']}", markup=False, highlight=False, soft_wrap=True
        )


def compare(folders: Sequence[Path | str]) -> str:
    """Return a table of finished runs, a row each, and notes on what may be compared.

    Once there is a run with method=full, ratios are against the first such run that is alike, or
    unknown; else they are those of each run's own report.
    """
    reports = [load(folder) for folder in folders]
    measured = any(report["method"] == FULL for report in reports)
    rows, notes, used = [], [], set()
    for number, (folder, report) in enumerate(zip(folders, reports, strict=True), start=1):
        same, uplink = (
            report["ratio_same_optimisations"]["train_flops"],
            report["ratio"]["uplink_bytes"],
        )
        if measured:
            full = _full_like(report, reports)
            same, uplink = (
                full and ratio_of(report["cost"][name], reports[full - 1]["cost"][name])
                for name in ("train_flops", "uplink_bytes")
            )
            used.add(full)
        rows.append(
            [str(number), *_comparison_cells(report), format_ratio(same), format_ratio(uplink)]
        )
        notes.append(f"{number}: {folder}")
    for full in sorted(number for number in used if number):
        notes.append(
            f"Run {full} (method full) is the measured reference of the runs that are like it."
        )
    for name in dict.fromkeys(
        name for report in reports for name in differences(report, reports[0])
    ):
        notes.append(f"Warning: the runs differ in {name}, so comparing them is not like for like.")
    against = ["FLOPs /\nfull run", "uplink /\nfull run"]
    if not measured:
        against = ["FLOPs / same\nopt. full", "uplink /\nfull"]
    console = _console(132)
    with console.capture() as capture:
        console.print(_table(COMPARISON_HEAD + against, rows, names=3))
    return capture.get() + "\n".join(notes)


def _full_like(report: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> int | None:
    """Number, from 1, of the first full run that `report` may be set against."""
    for number, other in enumerate(reports, start=1):
        if other["method"] == FULL and not differences(other, report):
            return number
    return None


def _comparison_cells(report: Mapping[str, Any]) -> list[str]:
    cost = report["cost"]
    primary = TASKS[report["task"]].metric.name
    before, after = (
        format_score(primary, report[when].get(primary)) for when in ("initial", "final")
    )
    return [
        report["method"],
        f"{report['task']}\n{Path(report['model']).name}",
        str(len(report["rounds"])),
        f"{before}\n-> {after}",
        digits(cost["train_flops"] / 1e12),
        digits(cost["uplink_bytes"] / 1e6),
        digits(cost["downlink_bytes"] / 1e6),
        digits(cost["client_seconds"]),
        format_memory(cost["peak_memory_bytes"]),
        format_ratio(report["ratio"]["train_flops"]),
    ]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], names: int = 1) -> "Table":
    """Make a table whose first columns are `names`, the others numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < names else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _console(width: int) -> "Console":
    """Make a console of `width` columns, or of a terminal's own if that is narrower."""
    from rich.console import Console

    console = Console()
    return Console(width=min(width, console.width)) if console.is_terminal else Console(width=width)
