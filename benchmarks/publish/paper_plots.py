"""Score against cost, by which a user decides: the methods by round, the plans as they ended."""

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.publish.paper_statistics import (
    METRICS,
    REFERENCE,
    Cell,
    Cost,
    cell_of,
    cells_of,
    megabytes,
    name_of,
    spent_of,
    tflop,
)
from benchmarks.results import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#D55E00",
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#6B6B6B",
    "#000000",
    "#8C564B",
    "#9ACD32",
)
MARKERS = "os^vDPX*<>"
# tables that share a picture for each data set
CURVES = (("finetune",), ("pretrain", "plan-pretrain"))
ABLATIONS = (
    "all local parameters",
    "without progressive schedule",
    "without mapping",
    "without sampling",
)


def draw(lines: list[Line], folder: Path) -> list[Path]:
    """Draw results-NAME.png for each data set that has curves, and results-plans-NAME.png."""
    drawn = []
    for tables in CURVES:
        of_tables = [line for line in lines if line["table"] in tables and len(line["curve"]) > 1]
        cells = shown(of_tables)
        curves = [line for line in of_tables if line["seed"] == 1 and cell_of(line) in cells]
        for dataset, own in _by_dataset(curves).items():
            path = folder / f"results-{dataset}.png"
            _figure(own, cells, dataset, path)
            drawn.append(path)
    plans = [line for line in lines if line["table"] == "plan-finetune"]
    for dataset, own in _by_dataset(plans).items():
        path = folder / f"results-plans-{dataset}.png"
        _plans(own, dataset, path)
        drawn.append(path)
    return drawn


def _by_dataset(lines: list[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["dataset"], []).append(line)
    return found


def shown(lines: list[Line]) -> list[Cell]:
    """Return the cells that all pictures of these lines show, each always in its own colour.

    Ablations, which nobody would choose, stay in the tables. Where there are more than colours they
    show those with most seeds.
    """
    cells = cells_of(line for line in lines if line["variant"] not in ABLATIONS)
    if len(cells) <= len(COLOURS):
        return list(cells)
    most = max(map(len, cells.values()))
    return [cell for cell, own in cells.items() if len(own) == most]


def _figure(lines: list[Line], cells: list[Cell], dataset: str, path: Path) -> None:
    figure, (compute, traffic) = _canvas()
    metric = lines[0]["metric"]
    scale = 100
    where = "on the test set (%)"
    if metric == "loss":
        scale = 1
        where = "on held-out text"
    for line in lines:
        index = cells.index(cell_of(line))
        width = 1.4
        if line["method"] in ("FedBT", REFERENCE[0]):
            width = 2.4
        style: dict[str, Any] = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "label": name_of(cell_of(line)),
            "linewidth": width,
            "markersize": 4.5,
        }
        scores = [scale * point[-1] for point in line["curve"]]
        for axes, cost in ((compute, tflop), (traffic, megabytes)):
            axes.plot(_spent_by_round(line, cost), scores, **style)
    compute.set_ylabel(f"{METRICS[metric]} {where}")
    _finish(compute, "Client compute so far (TFLOP, all clients)")
    _finish(traffic, "Bytes so far (MB, up and down, all clients)")
    _save(figure, f"{dataset}: score by what it cost, one point a round (seed 1)", path)


def _spent_by_round(line: Line, cost: Cost) -> list[float]:
    return [cost(*point[1:4]) for point in line["curve"]]


def _plans(lines: list[Line], dataset: str, path: Path) -> None:
    """Draw FedBT's plans beside BERT-FL's curves; those no cheaper plan beats bear a number."""
    figure, axes_of = _canvas()
    same_base = [line for line in lines if "model" not in line["settings"]]
    curves = [line for line in same_base if line["method"] == REFERENCE[0]]
    ours = [line for line in same_base if line["method"] == "FedBT"]
    ours.sort(key=lambda line: line["train_flops"])
    costs = (tflop, megabytes)
    best = [line for line in ours if any(_unbeaten(line, ours, cost) for cost in costs)]
    others = [line for line in ours if line not in best]
    for axes, cost in zip(axes_of, costs, strict=True):
        _draw_curves(axes, curves, cost)
        if others:
            _draw_others(axes, others, cost)
        _draw_best(axes, best, cost)
    axes_of[0].set_ylabel(f"{METRICS[lines[0]['metric']]} on validation text (%)")
    _finish(axes_of[0], "Client compute (TFLOP, all clients)")
    _finish(axes_of[1], "Bytes (MB, up and down, all clients)")
    _save(figure, f"{dataset}: what the plans reached, by what they cost (one seed)", path)


def _draw_curves(axes: "Axes", lines: list[Line], cost: Cost) -> None:
    for line, dashes in zip(lines, cycle(("-", "--", ":", "-.")), strict=False):
        axes.plot(
            _spent_by_round(line, cost),
            [100 * point[-1] for point in line["curve"]],
            dashes,
            color=COLOURS[0],
            label=f"{name_of(cell_of(line))}, by round",
        )


def _draw_others(axes: "Axes", lines: list[Line], cost: Cost) -> None:
    axes.scatter(
        [cost(*spent_of(line)) for line in lines],
        [100 * line["value"] for line in lines],
        color="#B0B0B0",
        s=22,
        label="FedBT, the other plans",
        zorder=3,
    )


def _draw_best(axes: "Axes", lines: list[Line], cost: Cost) -> None:
    for number, line in enumerate(lines, 1):
        size = 60
        if number >= 10:  # two digits
            size = 110
        axes.scatter(
            cost(*spent_of(line)),
            100 * line["value"],
            label=f"FedBT, {line['variant']}",
            color=COLOURS[1],
            marker=f"${number}$",
            s=size,
            zorder=4,
        )


def _unbeaten(line: Line, others: list[Line], cost: Cost) -> bool:
    """Say whether no plan that costs as much or less scores better, nor a cheaper one as well."""
    own_cost = cost(*spent_of(line))
    for rival in others:
        rival_cost = cost(*spent_of(rival))
        if rival_cost > NEAR * own_cost:
            continue
        if rival["value"] > line["value"]:
            return False
        if rival["value"] == line["value"] and rival_cost < own_cost:
            return False
    return True


NEAR = 1.02  # costs that differ by less count as equal


def _canvas() -> "tuple[Figure, Any]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.8))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, 2, sharey=True)


def _save(figure: "Figure", title: str, path: Path) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=140, metadata={"Software": None})


def _finish(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    marked = [1.0]  # of each power of ten
    if high < 60 * low:
        marked += [2.0, 5.0]
    axes.xaxis.set_major_locator(LogLocator(subs=marked))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
