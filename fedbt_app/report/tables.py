"""Numbers and scores as people read them, in rows that the page and the terminal share."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedbt_app.tasks import metric_named

UNKNOWN = "n/a"


def digits(value: float) -> str:
    """Write three significant digits, never an exponent."""
    places = 0
    if value:
        places = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, places)}f}"


def _scaled(value: float | None, step: int, units: Sequence[str]) -> str:
    if value is None:
        return UNKNOWN
    power = 0
    while abs(value) >= step and power < len(units) - 1:
        value /= step
        power += 1
    return f"{digits(value)} {units[power]}"


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
    if value is None:
        return UNKNOWN
    if value < 120:
        return f"{digits(value)} s"
    if value < 7200:
        return f"{digits(value / 60)} min"
    return f"{digits(value / 3600)} h"


def format_ratio(value: float | None) -> str:
    """Write a ratio as a percentage: 7.04 %."""
    if value is None:
        return UNKNOWN
    return f"{digits(100 * value)} %"


def format_score(name: str, value: float | None) -> str:
    """Write a metric: losses as they are, shares as percentages."""
    if value is None:
        return UNKNOWN
    if metric_named(name).share:
        return f"{100 * value:.1f} %"
    return f"{value:,.3f}"


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
SCORE_HEAD = ["score on the central test set", "before", "after", "majority class"]


def ratio_of(value: float, reference: float | None) -> float | None:
    """Divide by a reference; None where that is unknown or zero."""
    if not reference:
        return None
    return value / reference


def cost_head(report: Mapping[str, Any]) -> list[str]:
    """Return the head of the cost table."""
    full = f"full-model FedAvg\n({report['reference']['source']})"
    return ["cost", "this run", full, "ratio", "ratio, same\noptimisations"]


def cost_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the cost table: a row per entry of COSTS, beside full-model FedAvg."""
    same = report["ratio_same_optimisations"]
    rows = []
    for name, (label, text) in COSTS.items():
        own = report["cost"][name]
        full = report["reference"][name]
        ratio_same = ""
        if name in same:
            ratio_same = format_ratio(same[name])
        ratio = format_ratio(ratio_of(own, full))
        rows.append([label, text(own), text(full), ratio, ratio_same])
    return rows


def score_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the score table: a row per metric of the central test set."""
    rows = []
    for name, after in report["final"].items():
        metric = metric_named(name)
        before = report["initial"].get(name)
        majority = ""
        if metric.has_majority and report.get("majority") is not None:
            majority = format_score(name, report["majority"])
        rows.append([metric.label, format_score(name, before), format_score(name, after), majority])
    return rows


def left_out(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the clients of which something was not used, with the latest reason."""
    return {refusal["client"]: refusal["reason"] for refusal in report["refused"]}
