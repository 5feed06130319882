"""report.md: what was run, its scores and costs, the plots and a row for each round."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedbt_app.report import tables
from fedbt_app.report.tables import (
    SCORE_HEAD,
    cost_head,
    cost_rows,
    format_bytes,
    format_flops,
    format_ratio,
    format_score,
    format_seconds,
    score_rows,
)
from fedbt_app.tasks import TASKS, metric_named
from fedbt_app.tasks.metrics import Metric

TRAFFIC = (  # keys of the cost that are bytes, each byte in one of them
    "uplink_bytes",
    "downlink_bytes",
    "first_contact_bytes",
    "catch_up_bytes",
    "evaluation_bytes",
)
AGAINST = {
    "predicted": "the stock training step (predicted)",
    "measured": "a measured run, which takes this app's own step",
}
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
The ratio of compute is against {against}; the ratio with the same optimisations is against
full-model training that saves the same work as this run does{same}. Memory is the largest of any client.
{cached}

{images}

## Rounds

{rounds}
"""


def render(report: Mapping[str, Any], images: Iterable[Path]) -> str:
    """Return the text of report.md; `images` are the plots beside it."""
    primary = TASKS[report["task"]].metric
    same = ""
    if report["reference_same_flops"] is not None:
        same = f", {format_flops(report['reference_same_flops'])}"
    page = PAGE_TEXT.format(
        task=report["task"],
        method=report["method"],
        summary=_summary(report, primary),
        facts=_facts(report),
        scores=_scores(report),
        costs=_markdown(cost_head(report), cost_rows(report)),
        traffic=format_bytes(sum(report["cost"][name] for name in TRAFFIC)),
        against=AGAINST[report["reference"]["source"]],
        cached=_cached(report["cost"]),
        same=same,
        images="\n\n".join(f"![{image.stem}]({image.name})" for image in images),
        rounds=_rounds(report, primary),
    )
    page += _warnings(report)
    clients = [
        {name: value for name, value in client.items() if name != "fit"}
        for client in report["clients"]
    ]
    page += _section("Clients", clients)
    page += _fits(report)
    page += _section("Refused replies", report["refused"])
    if healed := report["cost"].get("healed_parts"):
        page += f"\nParts sent again, whole, to clients whose pool was not what they had said: {healed}.\n"
    return page


def _facts(report: Mapping[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in report["versions"].items()]
    facts = {
        "Base model": f"{report['model']} ({report['base_fingerprint']})",
        "Tokenizer": report["tokenizer_fingerprint"],
        "Data": report["data"],
        "Method": report["method"],
        "Rounds": len(report["rounds"]),
        "Clients": len(report["clients"]),
        "Test rows": _test_rows(report),
        "Seed": report["seed"],
        "Exported model": report["model_dir"],
        "Versions": ", ".join(versions),
    }
    return _markdown(("what", "value"), facts.items())


def _test_rows(report: Mapping[str, Any]) -> str:
    test = report.get("test")
    if not test:
        return "not stated"
    if test["rows"] == test["available"]:
        return f"{test['rows']}, all there are"
    return f"{test['rows']} of {test['available']} (max-test-examples)"


def _scores(report: Mapping[str, Any]) -> str:
    text = "There was no central test set."
    if report["final"]:
        text = _markdown(SCORE_HEAD, score_rows(report))
    held_out = []
    for name, score in report["client_metrics"].items():
        held_out.append(f"{metric_named(name).label} {format_score(name, score)}")
    if held_out:
        text += f"\n\nAfter the run, on the clients' own held-out rows: {', '.join(held_out)}."
    return text


def _section(title: str, items: Sequence[Mapping[str, Any]]) -> str:
    """Write a table under a heading; nothing without items."""
    if not items:
        return ""
    table = _markdown(items[0], (item.values() for item in items))
    return f"\n## {title}\n\n{table}\n"


def _cached(cost: Mapping[str, Any]) -> str:
    """Say what the frozen-prefix cache took and saved."""
    if not cost.get("prefix_cache_bytes"):
        return "No output of frozen blocks was kept between passes."
    return (
        "The output of the blocks that no round trains was kept on disk, at most "
        f"{format_bytes(cost['prefix_cache_bytes'])} a client; that saved {format_flops(cost['saved_flops'])}."
    )


def _summary(report: Mapping[str, Any], primary: Metric) -> str:
    text = f"Rounds: {len(report['rounds'])}; clients: {len(report['clients'])}."
    if report["final"]:
        before = format_score(primary.name, report["initial"].get(primary.name))
        after = format_score(primary.name, report["final"].get(primary.name))
        text += f" On the central test set the {primary.label} went from {before} to {after}."
    stock = format_ratio(report["ratio"]["train_flops"])
    same = format_ratio(report["ratio_same_optimisations"]["train_flops"])
    uplink = format_ratio(report["ratio"]["uplink_bytes"])
    against = AGAINST[report["reference"]["source"]]
    text += _left_out(report)
    return (
        f"{text} Against full-model FedAvg, training took {stock} of the compute of {against} "
        f"({same} of full-model training with the same optimisations) and {uplink} of the uplink."
    )


def _left_out(report: Mapping[str, Any]) -> str:
    """Name the sites of which something was not used: a score without them means something else."""
    left_out = tables.left_out(report)
    if not left_out:
        return ""
    last = report["rounds"][-1]["clients"] if report["rounds"] else 0
    sites = "; ".join(f"{client} ({reason})" for client, reason in left_out.items())
    return f" **Left out** of some round or all: {sites}. The last round had {last} clients."


def _warnings(report: Mapping[str, Any]) -> str:
    lines = [f"- {_cell(warning)}" for warning in report.get("warnings", [])]
    if not lines:
        return ""
    return "\n## Warnings\n\n" + "\n".join(lines) + "\n"


def _fits(report: Mapping[str, Any]) -> str:
    """Write how well each site's text, and the test set's, fits the model."""
    fits = {client["name"]: client["fit"] for client in report["clients"] if "fit" in client}
    test = report.get("test") or {}
    if test.get("fit", {}).get("rows"):
        fits["central test set"] = test["fit"]
    if not fits:
        return ""
    heads = ["text of", *(name.replace("_", " ") for name in next(iter(fits.values())))]
    rows = ([name, *fit.values()] for name, fit in fits.items())
    return f"\n## What of the text is read\n\n{_markdown(heads, rows)}\n"


def _rounds(report: Mapping[str, Any], primary: Metric) -> str:
    head = (
        "round",
        "trained blocks",
        "clients",
        "compute",
        "uplink",
        "downlink",
        "time",
        primary.label,
    )
    return _markdown(head, [_round_row(entry, primary) for entry in report["rounds"]])


def _round_row(entry: Mapping[str, Any], primary: Metric) -> list[str]:
    return [
        str(entry["round"]),
        ", ".join(map(str, entry["trained_blocks"])) or "none",
        str(entry["clients"]),
        format_flops(entry["train_flops"]),
        format_bytes(entry["uplink_bytes"]),
        format_bytes(entry["downlink_bytes"]),
        format_seconds(entry["seconds"]),
        format_score(primary.name, entry["metrics"].get(primary.name)),
    ]


def _markdown(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    heads = [_cell(name) for name in head]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        lines.append([_cell(value) for value in row])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    """Write a value in one line that does not end its cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
