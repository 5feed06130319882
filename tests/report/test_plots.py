"""The plots: valid images, and lines that show the report's own numbers."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from fedbt_app.config import APP_DIR
from fedbt_app.report import plots


def entry(number: int, flops: float, up: float, down: float, accuracy: float) -> dict[str, Any]:
    costs = {"train_flops": flops, "uplink_bytes": up, "downlink_bytes": down}
    return {"round": number, **costs, "metrics": {"accuracy": accuracy}}


REPORT: dict[str, Any] = {
    "method": "fedbt",
    "task": "classification",
    "initial": {"loss": 1.4, "accuracy": 0.25},
    "majority": 0.31,
    "rounds": [entry(1, 4e12, 6e6, 7e6, 0.5), entry(2, 6e12, 4e6, 5e6, 0.8)],
    "reference": {
        "source": "predicted",
        "train_flops": 1.4e14,
        "uplink_bytes": 3e7,
        "downlink_bytes": 4e7,
    },
    "reference_same_flops": 5e13,
}


@pytest.fixture
def report() -> dict[str, Any]:
    return copy.deepcopy(REPORT)


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }


def test_the_plots_are_images_of_a_readable_size(tmp_path: Path, report: dict[str, Any]) -> None:
    paths = plots.write_plots(tmp_path, report)
    assert paths == [tmp_path / "metric.png", tmp_path / "cost.png"]
    for path, wide in zip(paths, (960, 1560), strict=True):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        image = matplotlib.image.imread(path)
        assert image.shape[1] == wide
        assert 500 < image.shape[0] < 800
        assert image[..., :3].std() > 0.05  # something is drawn


def test_metric_starts_before_the_run(report: dict[str, Any]) -> None:
    figure = plots._metric_figure(report)
    assert figure is not None
    drawn = lines(figure.axes[0])
    assert drawn["fedbt"] == ([0, 1, 2], [25.0, 50.0, 80.0])
    assert drawn["majority class"][1] == [31.0, 31.0]
    assert figure.axes[0].get_ylabel() == "Accuracy (%)"


def test_metric_without_majority_or_some_rounds(report: dict[str, Any]) -> None:
    report["majority"], report["rounds"][0]["metrics"] = None, {}
    figure = plots._metric_figure(report)
    assert figure is not None
    assert lines(figure.axes[0]) == {"fedbt": ([0, 2], [25.0, 80.0])}


def test_each_task_shows_its_own_metric(report: dict[str, Any]) -> None:
    for task, metric, label, shown in (
        ("mlm", "loss", "Loss (nats", 0.5),
        ("ner", "f1", "Entity F1 (%)", 50.0),
    ):
        own = report | {"task": task, "initial": {metric: 0.5, "accuracy": 0.1}, "majority": None}
        figure = plots._metric_figure(own)
        assert figure is not None
        assert figure.axes[0].get_ylabel().startswith(label)
        assert lines(figure.axes[0])["fedbt"][1] == [shown]


def test_no_metric_no_plot(tmp_path: Path, report: dict[str, Any]) -> None:
    report["initial"] = {}
    for entry in report["rounds"]:
        entry["metrics"] = {}
    assert plots.write_plots(tmp_path, report) == [tmp_path / "cost.png"]
    assert not (tmp_path / "metric.png").exists()


def test_costs_add_up_against_the_straight_reference(report: dict[str, Any]) -> None:
    compute, traffic = plots._cost_figure(report).axes
    assert lines(compute) == {
        "fedbt": ([0, 1, 2], [0.0, 4.0, 10.0]),
        "full-model FedAvg (predicted)": ([0, 2], [0, 140.0]),
        "full model, same optimisations": ([0, 2], [0, 50.0]),
    }
    assert lines(traffic) == {
        "fedbt": ([0, 1, 2], [0.0, 13.0, 22.0]),
        "full-model FedAvg (predicted)": ([0, 2], [0, 70.0]),
    }
    assert compute.get_ylabel() == "Training compute (TFLOP)"
    assert traffic.get_ylabel() == "Uplink and downlink (MB)"


def test_unknown_references_are_not_drawn(report: dict[str, Any]) -> None:
    report["reference"] |= {"train_flops": None, "downlink_bytes": None}
    report["reference_same_flops"] = None
    for axes in plots._cost_figure(report).axes:
        assert list(lines(axes)) == ["fedbt"]


def test_importing_draws_in_nothing_heavy() -> None:
    modules = ", ".join(f"fedbt_app.report.{name}" for name in ("plots", "comparison", "report"))
    code = (
        f"import sys, {modules}; print(*{{'matplotlib', 'rich', 'tensorboard'}} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=APP_DIR, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == []


def test_drawing_leaves_pyplot_alone(tmp_path: Path, report: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plots.write_plots(tmp_path, report)
    assert plt.get_fignums() == before
