"""The two plots of a report, by round: the score, and the cost beside full-model FedAvg's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbt_app.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRIC = "metric.png"
COST = "cost.png"
FILES = (METRIC, COST)
DPI = 150
MOST_MARKERS = 40  # more would run into each other
# Okabe and Ito's colour-blind safe set
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
GREY = "#6B6B6B"


@dataclass(frozen=True)
class _Total:
    """What a whole run costs to compare with; it is drawn as a line that grows evenly by round."""

    label: str
    amount: float | None  # None where it is unknown
    color: str = ORANGE
    linestyle: str = "--"


def write_plots(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Draw what the report has numbers for and return the files written.

    metric.png shows the task's primary metric on the central test set, round 0 being the score
    before the run; it is left out when there is no such score. cost.png shows cumulative TFLOP and
    MB (uplink and downlink).
    """
    figures = {METRIC: _metric_figure(report), COST: _cost_figure(report)}
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=DPI)
            paths.append(folder / name)
    return paths


def _metric_figure(report: Mapping[str, Any]) -> "Figure | None":
    metric = TASKS[report["task"]].metric
    scores = [(0, report["initial"].get(metric.name))]
    scores += [(entry["round"], entry["metrics"].get(metric.name)) for entry in report["rounds"]]
    known = {number: score for number, score in scores if score is not None}
    if not known:
        return None
    figure, (axes,) = _figure(6.4, 4.0, panels=1)
    label = metric.label[0].upper() + metric.label[1:]
    shown = list(known.values())
    if metric.share:
        shown = [100 * score for score in shown]
        axes.set_ylim(0, 100)
    _line(axes, list(known), shown, report["method"])
    if metric.has_majority and report["majority"] is not None:
        axes.axhline(100 * report["majority"], color=GREY, linestyle="--", label="majority class")
    axes.set_ylabel(f"{label} ({metric.unit})")
    _finish(axes, f"{label} on the central test set, by round")
    return figure


def _cost_figure(report: Mapping[str, Any]) -> "Figure":
    figure, (compute, traffic) = _figure(10.4, 4.2, panels=2)
    _draw_compute(compute, report)
    _draw_traffic(traffic, report)
    return figure


def _draw_compute(axes: "Axes", report: Mapping[str, Any]) -> None:
    reference = report["reference"]
    spent = [entry["train_flops"] for entry in report["rounds"]]
    full = _Total(f"full-model FedAvg ({reference['source']})", reference["train_flops"])
    same = _Total(
        "full model, same optimisations", report["reference_same_flops"], GREEN, linestyle=":"
    )
    _draw_costs(axes, report, spent, [full, same], unit=1e12)
    axes.set_ylabel("Training compute (TFLOP)")
    _finish(axes, "Cumulative training compute")


def _draw_traffic(axes: "Axes", report: Mapping[str, Any]) -> None:
    reference = report["reference"]
    sent = [entry["uplink_bytes"] + entry["downlink_bytes"] for entry in report["rounds"]]
    up = reference["uplink_bytes"]
    down = reference["downlink_bytes"]
    both = None
    if up is not None and down is not None:
        both = up + down
    full = _Total(f"full-model FedAvg ({reference['source']})", both)
    _draw_costs(axes, report, sent, [full], unit=1e6)
    axes.set_ylabel("Uplink and downlink (MB)")
    _finish(axes, "Cumulative traffic")


def _draw_costs(
    axes: "Axes",
    report: Mapping[str, Any],
    amounts: Sequence[float],
    totals: Sequence[_Total],
    unit: float,
) -> None:
    """Draw what the rounds cost, added up, and straight lines to the totals that are known."""
    rounds = [0, *(entry["round"] for entry in report["rounds"])]
    in_units = [amount / unit for amount in amounts]
    _line(axes, rounds, list(accumulate(in_units, initial=0.0)), report["method"])
    for total in totals:
        if total.amount is None:
            continue
        axes.plot(
            [0, rounds[-1]],
            [0, total.amount / unit],
            color=total.color,
            linestyle=total.linestyle,
            linewidth=2,
            label=total.label,
            zorder=4,
        )
    axes.set_ylim(bottom=0)


def _figure(width: float, height: float, panels: int) -> "tuple[Figure, Sequence[Axes]]":
    """Make a figure with panels side by side, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)  # else it could not be saved
    (row,) = figure.subplots(1, panels, squeeze=False)
    return figure, row


def _line(axes: "Axes", rounds: Sequence[int], values: Sequence[float], label: str) -> None:
    """Draw the run's own line."""
    marker = ""
    if len(rounds) <= MOST_MARKERS:
        marker = "o"
    axes.plot(
        rounds,
        values,
        color=BLUE,
        linewidth=2,
        marker=marker,
        markersize=5,
        label=label,
        zorder=3,
        clip_on=False,
    )


def _finish(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=12)
    axes.set_xlabel("Round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_fontsize(12)
    axes.legend(edgecolor="none", framealpha=1, fontsize=10.5)
