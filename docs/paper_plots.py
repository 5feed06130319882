"""Score against cumulative cost, for all methods: what a user decides by."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paper_tables import METRICS, REFERENCE, _cell, _name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = dict[str, Any]
COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#6B6B6B", "#000000", "#8C564B", "#9ACD32")
MARKERS = "os^vDPX*<>"


def draw(lines: list[Line], folder: Path) -> list[Path]:
    """Draw results-NAME.png for each data set of the fine-tuning and pre-training tables that has curves."""
    drawn = []
    for table in ("finetune", "pretrain"):
        of_table = [line for line in lines if line["table"] == table and len(line["curve"]) > 1 and line["seed"] == 1]
        for dataset in dict.fromkeys(line["dataset"] for line in of_table):
            own = [line for line in of_table if line["dataset"] == dataset]
            if table == "pretrain" and own[0]["metric"] != "loss":
                continue
            drawn.append(folder / f"results-{dataset}.png")
            _figure(own, dataset, drawn[-1])
    return drawn


def _figure(lines: list[Line], dataset: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.6))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    compute, traffic = figure.subplots(1, 2, sharey=True)
    metric = lines[0]["metric"]
    scale = 1 if metric == "loss" else 100
    for index, line in enumerate(lines):
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "label": _name(_cell(line)),
        }
        style |= {"linewidth": 2.4 if line["method"] in ("FedBT", REFERENCE[0]) else 1.4, "markersize": 4.5}
        scores = [scale * point[-1] for point in line["curve"]]
        compute.plot([point[1] / 1e12 for point in line["curve"]], scores, **style)
        traffic.plot([(point[2] + point[3]) / 1e6 for point in line["curve"]], scores, **style)
    label = METRICS[metric]
    compute.set_ylabel(f"{label} on held-out text" if metric == "loss" else f"{label} on the test set (%)")
    _finish(compute, "Client compute so far (TFLOP, all clients)")
    _finish(traffic, "Bytes so far (MB, up and down, all clients)")
    figure.suptitle(
        f"{dataset}: score by what it cost, one point a round (seed 1)", x=0.01, ha="left", fontweight="bold"
    )
    handles, labels = compute.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9.5)
    figure.savefig(path, dpi=140, metadata={"Software": None})


def _finish(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
