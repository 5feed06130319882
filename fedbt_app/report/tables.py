"""Numbers and scores as people read them, and the cost and score rows that the page and the
terminal share.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedbt_app.tasks import metric_named

UNKNOWN = "n/a"


def digits(value: float) -> str:
    """Write three significant digits, never an exponent."""
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, places)}f}"


def _scaled(value: float | None, step: int, units: Sequence[str]) -> str:
    if value is None:
        return UNKNOWN
    power = 0
    while abs(value) >= step and power < len(units) - 1:
        value, power = value / step, power + 1
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
    if value is None or value < 120:
        return UNKNOWN if value is None else f"{digits(value)} s"
    return f"{digits(value / 60)} min" if value < 7200 else f"{digits(value / 3600)} h"


def format_ratio(value: float | None) -> str:
    """Write a ratio as a percentage: 7.04 %."""
    return UNKNOWN if value is None else f"{digits(100 * value)} %"


def format_score(name: str, value: float | None) -> str:
    """Write a metric: losses as they are, shares as percentages."""
    if value is None:
        return UNKNOWN
    return f"{100 * value:.1f} %" if metric_named(name).share else f"{value:,.3f}"


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
    return value / reference if reference else None


def cost_head(report: Mapping[str, Any]) -> list[str]:
    """Return the head of the cost table."""
    full = f"full-model FedAvg\n({report['reference']['source']})"
    return ["cost", "this run", full, "ratio", "ratio, same\noptimisations"]


def cost_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the cost table: a row per entry of COSTS, beside full-model FedAvg."""
    cost, reference, same = report["cost"], report["reference"], report["ratio_same_optimisations"]
    rows = []
    for name, (label, text) in COSTS.items():
        optimised = format_ratio(same[name]) if name in same else ""
        ratio = format_ratio(ratio_of(cost[name], reference[name]))
        rows.append([label, text(cost[name]), text(reference[name]), ratio, optimised])
    return rows


def score_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the score table: a row per metric of the central test set."""
    rows = []
    for name, after in report["final"].items():
        metric = metric_named(name)
        majority = report.get("majority") if metric.has_majority else None
        scores = [format_score(name, score) for score in (report["initial"].get(name), after)]
        rows.append(
            [metric.label, *scores, "" if majority is None else format_score(name, majority)]
        )
    return rows
