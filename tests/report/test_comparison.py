"""The terminal's tables: a run's result, and finished runs compared like for like."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import make_record

from fedbt_app.costs.ledger import Ledger
from fedbt_app.report import comparison, report


def printed(values: dict[str, Any], width: int = 100) -> str:
    stream = io.StringIO()
    comparison.print_result(values, Console(file=stream, width=width))
    return stream.getvalue()


def test_print_result_fits_and_tells_all() -> None:
    text = printed(report.to_json(make_record()))
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "10.0 TFLOP",
        "142 TFLOP",
        "7.04 %",
        "20.0 %",
        "1.50 GiB",
        "25.0 %",
        "81.2 %",
        "31.0 %",
    ):
        assert part in text
    assert "Model: runs/one/model" in text


def test_print_result_of_a_diverged_run() -> None:
    assert "n/a" in printed(
        report.to_json(make_record(final={"loss": math.nan, "accuracy": math.inf}))
    )


def test_print_result_keeps_an_odd_path_whole() -> None:
    path = "runs/[bold]" + "x" * 150
    assert path in printed(report.to_json(make_record(model_dir=path)), width=60)


def test_print_result_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    comparison.print_result(report.to_json(make_record()))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "full-model FedAvg" in text


def compared(folder: Path, **runs: report.RunRecord) -> str:
    for name, record in runs.items():
        report.write(folder / name, record)
    return comparison.compare([folder / name for name in runs])


def row(text: str, number: int) -> str:
    return next(line for line in text.splitlines() if line.startswith(f" {number} "))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbt_app.report.plots.write_plots", lambda *_: [])


@pytest.mark.usefixtures("no_plots")
def test_compare_alike_runs(tmp_path: Path) -> None:
    text = compared(tmp_path, one=make_record(), two=make_record(method="lora", seed=8))
    assert row(text, 1).split()[1:] == [
        *(
            "fedbt",
            "classification",
            "2",
            "25.0",
            "%",
            "10.0",
            "10.0",
            "12.0",
            "60.0",
            "1.50",
            "GiB",
        ),
        *("7.04", "%", "20.0", "%", "25.0", "%"),
    ]
    assert "bert-small" in text
    assert "-> 81.2 %" in text
    assert f"2: {tmp_path / 'two'}" in text
    assert "Warning" not in text
    assert "measured" not in text


@pytest.mark.usefixtures("no_plots")
def test_compare_warns(tmp_path: Path) -> None:
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"task": "ner"}, "task"),
        ({"base_fingerprint": "cd34"}, "model"),
        ({"model": "other", "base_fingerprint": ""}, "model"),
        ({"data": "other"}, "data"),
        ({"rounds": []}, "number of rounds"),
        ({"clients": []}, "rows of the clients"),
        ({"config": {"local-epochs": 3}}, "local-epochs"),
    )
    for change, name in changes:
        text = compared(tmp_path, one=make_record(), two=make_record(**change))
        warnings = [line for line in text.splitlines() if line.startswith("Warning")]
        assert warnings == [
            f"Warning: the runs differ in {name}, so comparing them is not like for like."
        ]


@pytest.mark.usefixtures("no_plots")
def test_compare_against_the_measured_full_run(tmp_path: Path) -> None:
    full = make_record(method="full", cost=Ledger(train_flops=2 * 10**13, uplink_bytes=80_000_000))
    text = compared(tmp_path, one=make_record(), two=full, three=make_record(data="other"))
    assert row(text, 1).endswith("7.04 %    50.0 %    12.5 %  ")
    assert row(text, 2).endswith("100 %     100 %  ")
    assert row(text, 3).endswith("n/a       n/a  ")
    assert "Run 2 (method full) is the measured reference" in text
    assert "full run" in text
