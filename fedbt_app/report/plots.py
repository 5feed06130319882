"""The two plots of a report: the score by round, and the cost by round against full-model
FedAvg.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbt_app.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRIC, COST = "metric.png", "cost.png"
FILES = (METRIC, COST)
DPI = 150
# Okabe and Ito's colour-blind safe set
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"


def write_plots(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Draw what the report has numbers for and return the files written.

    metric.png shows the task's primary metric on the central test set, round 0 being the score
    before the run; it is left out when there is no such score. cost.png shows cumulative TFLOP and
    MB (uplink and downlink).
    """
    drawn = [(METRIC, _metric_figure(report)), (COST, _cost_figure(report))]
    paths = []
    for name, figure in drawn:
        if figure is not None:
            figure.savefig(folder / name, dpi=DPI)
            paths.append(folder / name)
    return paths


def _metric_figure(report: Mapping[str, Any]) -> "Figure | None":
    metric = TASKS[report["task"]].metric
    scores = [(0, report["initial"].get(metric.name))]
    scores += [(entry["round"], entry["metrics"].get(metric.name)) for entry in report["rounds"]]
    known = [(number, score) for number, score in scores if score is not None]
    if not known:
        return None
    figure, (axes,) = _figure(1)
    label = metric.label[0].upper() + metric.label[1:]
    scale = 100 if metric.share else 1
    _line(
        axes,
        [number for number, _ in known],
        [scale * score for _, score in known],
        report["method"],
    )
    if metric.share:
        axes.set_ylim(0, 100)
    if metric.has_majority and report["majority"] is not None:
        axes.axhline(100 * report["majority"], color=GREY, linestyle="--", label="majority class")
    axes.set_ylabel(f"{label} ({metric.unit})")
    _finish(axes, f"{label} on the central test set, by round")
    return figure


def _cost_figure(report: Mapping[str, Any]) -> "Figure":
    figure, (compute, traffic) = _figure(2)
    rounds, reference = report["rounds"], report["reference"]
    numbers = [0, *(entry["round"] for entry in rounds)]
    flops = [entry["train_flops"] / 1e12 for entry in rounds]
    sent = [(entry["uplink_bytes"] + entry["downlink_bytes"]) / 1e6 for entry in rounds]
    full = f"full-model FedAvg ({reference['source']})"
    ways = (reference["uplink_bytes"], reference["downlink_bytes"])
    _line(compute, numbers, list(accumulate(flops, initial=0.0)), report["method"])
    _straight(compute, numbers, reference["train_flops"], 1e12, full, ORANGE, "--")
    same = report["reference_same_flops"]
    _straight(compute, numbers, same, 1e12, "full model, same optimisations", GREEN, ":")
    compute.set_ylabel("Training compute (TFLOP)")
    _line(traffic, numbers, list(accumulate(sent, initial=0.0)), report["method"])
    _straight(traffic, numbers, None if None in ways else sum(ways), 1e6, full, ORANGE, "--")
    traffic.set_ylabel("Uplink and downlink (MB)")
    for axes, title in ((compute, "Cumulative training compute"), (traffic, "Cumulative traffic")):
        axes.set_ylim(bottom=0)
        _finish(axes, title)
    return figure


def _figure(panels: int) -> "tuple[Figure, Sequence[Axes]]":
    """Make a figure with panels side by side, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0) if panels == 1 else (10.4, 4.2))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _line(axes: "Axes", x: Sequence[float], y: Sequence[float], label: str) -> None:
    marker = "o" if len(x) <= 40 else ""
    axes.plot(
        x,
        y,
        color=BLUE,
        linewidth=2,
        marker=marker,
        markersize=5,
        label=label,
        zorder=3,
        clip_on=False,
    )


def _straight(
    axes: "Axes",
    numbers: Sequence[int],
    total: float | None,
    unit: float,
    label: str,
    color: str,
    style: str,
) -> None:
    """Draw a total as a line that grows evenly over the rounds."""
    if total is not None:
        ends = [0, numbers[-1]], [0, total / unit]
        axes.plot(*ends, color=color, linestyle=style, linewidth=2, label=label, zorder=4)


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
