"""The report of a run: report.json with fixed names, rounds.jsonl, report.md, a summary, a comparison."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbt_app import plots
from fedbt_app.costs import Ledger, RoundEntry
from fedbt_app.errors import FedBTError
from fedbt_app.tasks import METRIC_LABELS, PRIMARY_METRIC

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA = 1
REPORT, PARTIAL, PAGE, ROUNDS = "report.json", "report.json.part", "report.md", "rounds.jsonl"
UNKNOWN = "n/a"


@dataclass
class RunRecord:
    """What a finished run knows.

    Attributes
    ----------
    reference : the cost keys for full-model FedAvg on the same data and rounds, None where unknown
    reference_source : "measured" or "predicted"
    reference_same_flops : FLOPs of full-model training with this app's own optimisations
    initial, final : metrics on the central test set; empty without one
    client_metrics : final, on the clients' held-out rows, weighted by rows; may be empty
    majority : accuracy of always answering the test set's most frequent class (classification)
    clients : `name`, `examples`, `local_depth`, `device` of each
    refused : `round`, `client`, `reason` of each reply that was not used
    """

    method: str
    task: str
    model: str
    seed: int
    rounds: list[RoundEntry]
    cost: Ledger
    reference: dict[str, float | None]
    reference_source: str
    reference_same_flops: int | None
    initial: dict[str, float]
    final: dict[str, float]
    client_metrics: dict[str, float]
    majority: float | None
    clients: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    data: str
    base_fingerprint: str
    labels: list[str]
    model_dir: str
    config: dict[str, Any]
    versions: dict[str, str]


def _digits(value: float) -> str:
    """Write three significant digits, never an exponent."""
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, places)}f}"


def _scaled(value: float | None, step: int, units: Sequence[str]) -> str:
    if value is None:
        return UNKNOWN
    power = 0
    while abs(value) >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    return f"{_digits(value)} {units[power]}"


def format_flops(value: float | None) -> str:
    """Write floating-point operations: 2.15 PFLOP."""
    return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def format_bytes(value: float | None) -> str:
    """Write traffic in decimal units: 13.4 MB."""
    return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB"))


def format_memory(value: float | None) -> str:
    """Write memory in binary units: 1.25 GiB."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_seconds(value: float | None) -> str:
    """Write a duration given in seconds: 45.3 s, 12.5 min, 3.40 h."""
    if value is None or value < 120:
        return UNKNOWN if value is None else f"{_digits(value)} s"
    return f"{_digits(value / 60)} min" if value < 7200 else f"{_digits(value / 3600)} h"


def format_ratio(value: float | None) -> str:
    """Write a ratio as a percentage: 7.04 %."""
    return UNKNOWN if value is None else f"{_digits(100 * value)} %"


def format_score(name: str, value: float | None) -> str:
    """Write a metric: losses as they are, shares as percentages."""
    if value is None:
        return UNKNOWN
    return f"{value:,.3f}" if name in ("loss", "perplexity") else f"{100 * value:.1f} %"


COSTS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "train_flops": ("Training compute", format_flops),
    "uplink_bytes": ("Uplink", format_bytes),
    "downlink_bytes": ("Downlink", format_bytes),
    "first_contact_bytes": ("First contact", format_bytes),
    "catch_up_bytes": ("Catch-up", format_bytes),
    "evaluation_bytes": ("Evaluation", format_bytes),
    "client_seconds": ("Client time, summed", format_seconds),
    "peak_memory_bytes": ("Peak memory of a client", format_memory),
}
RATIOS = ("train_flops", "uplink_bytes", "downlink_bytes")
TRAFFIC = ("uplink_bytes", "downlink_bytes", "first_contact_bytes", "catch_up_bytes", "evaluation_bytes")
COMPARISON_HEAD = ["", "method", "task\nmodel", "rounds", "test\nscore", "TFLOP", "uplink\nMB", "downlink\nMB"]
COMPARISON_HEAD += ["client\nseconds", "peak\nmemory", "FLOPs /\nstock full"]
SCORE_HEAD = ["score on the central test set", "before", "after", "majority class"]
FIXED = {"schema", "method", "task", "model", "seed", "rounds", "cost", "reference", "ratio"}
FIXED |= {"ratio_same_optimisations", "initial", "final", "model_dir"}


def to_json(record: RunRecord) -> dict[str, Any]:
    """Return report.json: the fixed names that other tools read and the rest of the record; NaN is None."""
    values = asdict(record)
    source, reference, cost = values.pop("reference_source"), values["reference"], values["cost"]
    values["reference"] = {"source": source} | {name: reference.get(name) for name in COSTS}
    values["ratio"] = {name: _ratio(cost[name], reference.get(name)) for name in RATIOS}
    same = record.reference_same_flops
    values["ratio_same_optimisations"] = {"train_flops": _ratio(cost["train_flops"], same)}
    plain: dict[str, Any] = _plain({"schema": SCHEMA} | values)
    return plain


def append_round(folder: Path, entry: RoundEntry) -> None:
    """Add a line to rounds.jsonl and see it onto the disk."""
    with (folder / ROUNDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(_plain(asdict(entry)), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def clear(folder: Path) -> None:
    """Create `folder`, or remove an earlier report from it, report.json first, and nothing else.

    Raises
    ------
    FedBTError
        When the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (REPORT, PARTIAL, PAGE, ROUNDS, *plots.FILES):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise FedBTError(f"output-dir {folder} is unusable ({error.strerror}): choose another folder") from None


def write(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Write the plots, report.md and last, at one stroke, report.json; return what it holds."""
    report = to_json(record)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).unlink(missing_ok=True)
    images = plots.write_plots(folder, report)
    (folder / PAGE).write_text(_page(report, images), encoding="utf-8")
    with (folder / PARTIAL).open("w", encoding="utf-8") as file:
        json.dump(report, file, indent=2, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / PARTIAL, folder / REPORT)
    return report


def load(path: Path | str) -> dict[str, Any]:
    """Read a report.json, given itself or its folder.

    Raises
    ------
    FedBTError
        When there is none, or it is not a report of this schema.
    """
    path = Path(path) / REPORT if Path(path).is_dir() else Path(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FedBTError(f"{path} does not exist: give the output-dir of a run that finished") from None
    except OSError as error:
        raise FedBTError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    except ValueError:
        raise FedBTError(f"{path} is not JSON: give the report.json of a run") from None
    if not isinstance(report, dict) or "schema" not in report:
        raise FedBTError(f"{path} is not a report: give the report.json of a run")
    if report["schema"] != SCHEMA:
        raise FedBTError(f"{path} has schema {report['schema']!r}, not {SCHEMA}: read it with its own version")
    if missing := sorted(FIXED - report.keys()):
        raise FedBTError(f"{path} lacks {', '.join(missing)}: give the report.json of a run")
    return report


def print_result(report: Mapping[str, Any], console: "Console | None" = None) -> None:
    """Print the costs, the scores and where the model is, in 100 columns at most."""
    console = console or _console(100)
    console.print(_table(_cost_head(report), _cost_rows(report)))
    if report["final"]:
        console.print(_table(SCORE_HEAD, _score_rows(report)))
    if report["model_dir"]:
        console.print(f"Model: {report['model_dir']}", markup=False, highlight=False, soft_wrap=True)


LIKENESS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "task": lambda report: report["task"],
    "model": lambda report: report.get("base_fingerprint") or report["model"],
    "data": lambda report: report.get("data"),
    "number of rounds": lambda report: len(report["rounds"]),
}


def compare(folders: Sequence[Path | str]) -> str:
    """Return a table of finished runs, a row each, and notes on what may be compared.

    Once there is a run with method=full, ratios are against the first such run that agrees in task, model, data
    and rounds, or unknown; else they are those of each run's own report.
    """
    reports = [load(folder) for folder in folders]
    measured = any(report["method"] == "full" for report in reports)
    rows, notes, used = [], [], set()
    for number, (folder, report) in enumerate(zip(folders, reports, strict=True), start=1):
        same, uplink = report["ratio_same_optimisations"]["train_flops"], report["ratio"]["uplink_bytes"]
        if measured:
            full = _full_like(report, reports)
            same, uplink = (
                full and _ratio(report["cost"][name], reports[full - 1]["cost"][name])
                for name in ("train_flops", "uplink_bytes")
            )
            used.add(full)
        rows.append([str(number), *_comparison_cells(report), format_ratio(same), format_ratio(uplink)])
        notes.append(f"{number}: {folder}")
    for full in sorted(number for number in used if number):
        notes.append(f"Run {full} (method full) is the measured reference of the runs that are like it.")
    for name, read in LIKENESS.items():
        if len({read(report) for report in reports}) > 1:
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
        if other["method"] == "full" and all(read(other) == read(report) for read in LIKENESS.values()):
            return number
    return None


def _comparison_cells(report: Mapping[str, Any]) -> list[str]:
    cost, primary = report["cost"], PRIMARY_METRIC[report["task"]]
    amounts = (cost["train_flops"] / 1e12, cost["uplink_bytes"] / 1e6, cost["downlink_bytes"] / 1e6)
    return [
        *(report["method"], f"{report['task']}\n{Path(report['model']).name}", str(len(report["rounds"]))),
        "\n-> ".join(format_score(primary, report[when].get(primary)) for when in ("initial", "final")),
        *map(_digits, (*amounts, cost["client_seconds"])),
        *(format_memory(cost["peak_memory_bytes"]), format_ratio(report["ratio"]["train_flops"])),
    ]


def _cost_head(report: Mapping[str, Any]) -> list[str]:
    full = f"full-model FedAvg\n({report['reference']['source']})"
    return ["cost", "this run", full, "ratio", "ratio, same\noptimisations"]


def _cost_rows(report: Mapping[str, Any]) -> list[list[str]]:
    cost, reference, same = report["cost"], report["reference"], report["ratio_same_optimisations"]
    rows = []
    for name, (label, text) in COSTS.items():
        optimised = format_ratio(same[name]) if name in same else ""
        ratio = format_ratio(_ratio(cost[name], reference[name]))
        rows.append([label, text(cost[name]), text(reference[name]), ratio, optimised])
    return rows


def _score_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, after in report["final"].items():
        majority = report.get("majority") if name == "accuracy" else None
        scores = [format_score(name, score) for score in (report["initial"].get(name), after)]
        rows.append([_label(name), *scores, "" if majority is None else format_score(name, majority)])
    return rows


PAGE_TEXT = """\
# FedBT run: {task} with {method}

{summary}

## What was run

{facts}

## Score

{scores}

## Cost

{costs}

Uplink and downlink are the serialised bytes of the training rounds, summed over clients and rounds. First
contact, catch-up and evaluation are booked apart, so that every byte is counted once; together: {traffic}.
The ratio is against the stock training step of the full model; the ratio with the same optimisations is against
full-model training that saves the same work as this run does{same}. Memory is the largest of any client.
{cached}

{images}

## Rounds

{rounds}
"""


def _page(report: Mapping[str, Any], images: Iterable[Path]) -> str:
    """Write report.md."""
    primary, same = PRIMARY_METRIC[report["task"]], report["reference_same_flops"]
    facts = {"Base model": f"{report['model']} ({report['base_fingerprint']})", "Data": report["data"]}
    facts |= {"Method": report["method"], "Rounds": len(report["rounds"]), "Clients": len(report["clients"])}
    facts |= {"Seed": report["seed"], "Exported model": report["model_dir"]}
    facts |= {"Versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items())}
    scores = _markdown(SCORE_HEAD, _score_rows(report)) if report["final"] else "There was no central test set."
    if client_metrics := report["client_metrics"]:
        own = (f"{_label(name)} {format_score(name, score)}" for name, score in client_metrics.items())
        scores += f"\n\nAfter the run, on the clients' own held-out rows: {', '.join(own)}."
    head = ("round", "trained blocks", "clients", "compute", "uplink", "downlink", "time", _label(primary))
    page = PAGE_TEXT.format(
        task=report["task"],
        method=report["method"],
        summary=_summary(report, primary),
        facts=_markdown(("what", "value"), facts.items()),
        scores=scores,
        costs=_markdown(_cost_head(report), _cost_rows(report)),
        traffic=format_bytes(sum(report["cost"][name] for name in TRAFFIC)),
        cached=_cached(report["cost"]),
        same="" if same is None else f", {format_flops(same)}",
        images="\n\n".join(f"![{image.stem}]({image.name})" for image in images),
        rounds=_markdown(head, (_round_row(entry, primary) for entry in report["rounds"])),
    )
    for title, items in (("Clients", report["clients"]), ("Refused replies", report["refused"])):
        if items:
            page += f"\n## {title}\n\n{_markdown(items[0], (item.values() for item in items))}\n"
    return page


def _cached(cost: Mapping[str, Any]) -> str:
    """Say what the frozen-prefix cache took and saved."""
    if not cost.get("prefix_cache_bytes"):
        return "No output of frozen blocks was kept between passes."
    return (
        "The output of the blocks that no round trains was kept on disk, at most "
        f"{format_bytes(cost['prefix_cache_bytes'])} a client; that saved {format_flops(cost['saved_flops'])}."
    )


def _summary(report: Mapping[str, Any], primary: str) -> str:
    text = f"Rounds: {len(report['rounds'])}; clients: {len(report['clients'])}."
    if report["final"]:
        before, after = (format_score(primary, report[when].get(primary)) for when in ("initial", "final"))
        text += f" On the central test set the {_label(primary)} went from {before} to {after}."
    stock, uplink = (format_ratio(report["ratio"][name]) for name in ("train_flops", "uplink_bytes"))
    same = format_ratio(report["ratio_same_optimisations"]["train_flops"])
    text += f" Against full-model FedAvg, training took {stock} of the compute of the stock step"
    return text + f" ({same} of full-model training with the same optimisations) and {uplink} of the uplink."


def _round_row(entry: Mapping[str, Any], primary: str) -> list[str]:
    blocks = ", ".join(map(str, entry["trained_blocks"])) or "none"
    work = (str(entry["round"]), blocks, str(entry["clients"]), format_flops(entry["train_flops"]))
    traffic = (format_bytes(entry[name]) for name in ("uplink_bytes", "downlink_bytes"))
    score = format_score(primary, entry["metrics"].get(primary))
    return [*work, *traffic, format_seconds(entry["seconds"]), score]


def _markdown(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    lines = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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


def _label(metric: str) -> str:
    return METRIC_LABELS.get(metric, metric.replace("_", " ").replace("f1", "F1"))


def _ratio(value: float, reference: float | None) -> float | None:
    return value / reference if reference else None


def _plain(value: Any) -> Any:
    """Make a value fit for strict JSON: NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
