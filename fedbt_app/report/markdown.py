"""report.md: what was run, its scores and costs, the plots and a row for each round."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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

TRAFFIC = (
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
    same = report["reference_same_flops"]
    facts = {
        "Base model": f"{report['model']} ({report['base_fingerprint']})",
        "Data": report["data"],
    }
    facts |= {
        "Method": report["method"],
        "Rounds": len(report["rounds"]),
        "Clients": len(report["clients"]),
    }
    facts |= {"Seed": report["seed"], "Exported model": report["model_dir"]}
    facts |= {
        "Versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    }
    scores = (
        _markdown(SCORE_HEAD, score_rows(report))
        if report["final"]
        else "There was no central test set."
    )
    if client_metrics := report["client_metrics"]:
        own = (
            f"{metric_named(name).label} {format_score(name, score)}"
            for name, score in client_metrics.items()
        )
        scores += f"\n\nAfter the run, on the clients' own held-out rows: {', '.join(own)}."
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
    page = PAGE_TEXT.format(
        task=report["task"],
        method=report["method"],
        summary=_summary(report, primary),
        facts=_markdown(("what", "value"), facts.items()),
        scores=scores,
        costs=_markdown(cost_head(report), cost_rows(report)),
        traffic=format_bytes(sum(report["cost"][name] for name in TRAFFIC)),
        against=AGAINST[report["reference"]["source"]],
        cached=_cached(report["cost"]),
        same="" if same is None else f", {format_flops(same)}",
        images="\n\n".join(f"![{image.stem}]({image.name})" for image in images),
        rounds=_markdown(head, (_round_row(entry, primary) for entry in report["rounds"])),
    )
    for title, items in (("Clients", report["clients"]), ("Refused replies", report["refused"])):
        if items:
            page += f"\n## {title}\n\n{_markdown(items[0], (item.values() for item in items))}\n"
    if healed := report["cost"].get("healed_parts"):
        page += f"\nParts sent again, whole, to clients whose pool was not what they had said: {healed}.\n"
    return page


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
    return (
        f"{text} Against full-model FedAvg, training took {stock} of the compute of {against} "
        f"({same} of full-model training with the same optimisations) and {uplink} of the uplink."
    )


def _round_row(entry: Mapping[str, Any], primary: Metric) -> list[str]:
    blocks = ", ".join(map(str, entry["trained_blocks"])) or "none"
    work = (str(entry["round"]), blocks, str(entry["clients"]), format_flops(entry["train_flops"]))
    traffic = (format_bytes(entry[name]) for name in ("uplink_bytes", "downlink_bytes"))
    score = format_score(primary.name, entry["metrics"].get(primary.name))
    return [*work, *traffic, format_seconds(entry["seconds"]), score]


def _markdown(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    lines = [
        [" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (head, *rows)
    ]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
