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
    left_out,
    ratio_of,
    score_rows,
)
from fedbt_app.tasks import TASKS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Ratios = tuple[float | None, float | None]  # of FLOPs and of uplink, None where unknown

COMPARISON_HEAD = [
    "",
    "method",
    "task\nmodel",
    "rounds",
    "test\nscore",
    "TFLOP",
    "uplink\nMB",
    "downlink\nMB",
    "client\nseconds",
    "peak\nmemory",
    "FLOPs /\nreference",
]


def print_result(report: Mapping[str, Any], console: "Console | None" = None) -> None:
    """Print the costs, the scores and where the model is, in 100 columns at most."""
    console = console or _console(100)
    console.print(_table(cost_head(report), cost_rows(report)))
    if report["final"]:
        console.print(_table(SCORE_HEAD, score_rows(report)))
    lines = [f"Warning: {warning}" for warning in report.get("warnings", [])]
    for client, reason in left_out(report).items():
        lines.append(f"Left out: {client}: {reason}")
    if report["model_dir"]:
        lines.append(f"Model: {report['model_dir']}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def compare(folders: Sequence[Path | str]) -> str:
    """Return a table of finished runs, a row each, and notes on what may be compared.

    Once there is a run with method=full, ratios are against the first such run that is alike, or
    unknown; else they are those of each run's own report.
    """
    reports = [load(folder) for folder in folders]
    heads = ["FLOPs / same\nopt. full", "uplink /\nfull"]
    ratios = [_reported_ratios(report) for report in reports]
    references: list[int | None] = []
    if any(report["method"] == FULL for report in reports):
        heads = ["FLOPs /\nfull run", "uplink /\nfull run"]
        references = [_full_like(report, reports) for report in reports]
        ratios = []
        for report, full in zip(reports, references, strict=True):
            ratios.append(_measured_ratios(report, reports, full))
    rows = []
    for number, report in enumerate(reports, start=1):
        of_full = map(format_ratio, ratios[number - 1])
        rows.append([str(number), *_comparison_cells(report), *of_full])
    console = _console(132)
    with console.capture() as capture:
        console.print(_table(COMPARISON_HEAD + heads, rows, names=3))
    return capture.get() + "\n".join(_notes(folders, reports, references))


def _notes(
    folders: Sequence[Path | str],
    reports: Sequence[Mapping[str, Any]],
    references: Sequence[int | None],
) -> list[str]:
    """Say which run is which, against which of them ratios are, and where they are not alike."""
    notes = [f"{number}: {folder}" for number, folder in enumerate(folders, start=1)]
    for full in sorted({number for number in references if number}):
        notes.append(
            f"Run {full} (method full) is the measured reference of the runs that are like it."
        )
    unlike: dict[str, None] = {}  # each once, in the order in which they are met
    for report in reports:
        unlike |= dict.fromkeys(differences(report, reports[0]))
    for name in unlike:
        notes.append(f"Warning: the runs differ in {name}, so comparing them is not like for like.")
    return notes


def _full_like(report: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> int | None:
    """Number, from 1, of the first full run that `report` may be set against."""
    for number, other in enumerate(reports, start=1):
        if other["method"] == FULL and not differences(other, report):
            return number
    return None


def _reported_ratios(report: Mapping[str, Any]) -> Ratios:
    same = report["ratio_same_optimisations"]["train_flops"]
    uplink = report["ratio"]["uplink_bytes"]
    return same, uplink


def _measured_ratios(
    report: Mapping[str, Any], reports: Sequence[Mapping[str, Any]], full: int | None
) -> Ratios:
    """Set a run against number `full` of them."""
    if full is None:
        return None, None
    own_cost = report["cost"]
    full_cost = reports[full - 1]["cost"]
    flops = ratio_of(own_cost["train_flops"], full_cost["train_flops"])
    uplink = ratio_of(own_cost["uplink_bytes"], full_cost["uplink_bytes"])
    return flops, uplink


def _comparison_cells(report: Mapping[str, Any]) -> list[str]:
    cost = report["cost"]
    primary = TASKS[report["task"]].metric.name
    before = format_score(primary, report["initial"].get(primary))
    after = format_score(primary, report["final"].get(primary))
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
        table.add_column(name, overflow="fold")
        if index >= names:
            table.columns[-1].justify = "right"
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _console(width: int) -> "Console":
    """Make a console of `width` columns, or of a terminal's own if that is narrower."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        width = min(width, console.width)
    return Console(width=width)
