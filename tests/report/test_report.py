"""The report: names that other tools read, ratios, one-stroke writing, the page, loading."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedbt_app.costs.ledger import Ledger, RoundEntry
from fedbt_app.errors import FedBTError
from fedbt_app.files import PARTIAL
from fedbt_app.report import plots, report
from fedbt_app.tasks.fit import Fit

COST_NAMES = {
    "train_flops",
    "uplink_bytes",
    "downlink_bytes",
    "first_contact_bytes",
    "catch_up_bytes",
    "evaluation_bytes",
    "client_seconds",
    "peak_memory_bytes",
}
ROUND_NAMES = {
    "round",
    "trained_blocks",
    "clients",
    "train_flops",
    "uplink_bytes",
    "downlink_bytes",
    "seconds",
    "metrics",
}


def make_record(**changes: Any) -> report.RunRecord:
    rounds = [
        RoundEntry(
            1, [0, 1], 3, 4 * 10**12, 6_000_000, 7_000_000, 12.5, {"loss": 0.9, "accuracy": 0.55}
        ),
        RoundEntry(
            2, [2, 3], 2, 6 * 10**12, 4_000_000, 5_000_000, 11.5, {"loss": 0.5, "accuracy": 0.8125}
        ),
    ]
    record = report.RunRecord(
        method="fedbt",
        task="classification",
        model="someone/bert-small",
        seed=7,
        rounds=rounds,
        cost=Ledger(
            train_flops=10**13,
            uplink_bytes=10_000_000,
            downlink_bytes=12_000_000,
            first_contact_bytes=131_000_000,
            catch_up_bytes=2_000_000,
            evaluation_bytes=15_000,
            client_seconds=60.0,
            peak_memory_bytes=3 * 2**29,
            uplink_payload_bytes=9_900_000,
        ),
        reference={"train_flops": 1.42e14, "uplink_bytes": 4e7, "downlink_bytes": None},
        reference_source="predicted",
        reference_same_flops=5 * 10**13,
        initial={"loss": 1.4, "accuracy": 0.25},
        final={"loss": 0.5, "accuracy": 0.8125},
        client_metrics={"accuracy": 0.8},
        majority=0.31,
        clients=[
            {
                "name": "north",
                "examples": 120,
                "local_depth": 4,
                "device": "cpu",
                "fit": asdict(Fit(rows=130, rows_cut=9, pieces=4000, pieces_cut=77)),
            }
        ],
        test={"rows": 1000, "available": 1500, "fit": asdict(Fit(rows=1000, pieces=30_000))},
        warnings=["north: 9 of 130 rows are cut"],
        refused=[{"round": 2, "client": "south", "reason": "values | not finite"}],
        data="embedded, 3 clients",
        base_fingerprint="ab12",
        tokenizer_fingerprint="cd34",
        labels=["no", "yes"],
        model_dir="runs/one/model",
        config={"num-rounds": 2},
        versions={"torch": "2.9"},
    )
    return replace(record, **changes)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing: matplotlib takes longer than all else in a report."""
    monkeypatch.setattr("fedbt_app.report.plots.write_plots", lambda *_: [])


def test_fixed_names() -> None:
    values = report.to_json(make_record())
    assert values.keys() >= {
        "schema",
        "method",
        "task",
        "model",
        "seed",
        "rounds",
        "cost",
        "reference",
    }
    assert values.keys() >= {"ratio", "ratio_same_optimisations", "initial", "final", "model_dir"}
    assert values["schema"] == 1
    assert set(values["rounds"][0]) == ROUND_NAMES
    assert values["cost"].keys() >= COST_NAMES
    assert set(values["reference"]) == COST_NAMES | {"source"}
    assert set(values["ratio"]) == {
        "train_flops",
        "client_seconds",
        "uplink_bytes",
        "downlink_bytes",
    }
    assert set(values["ratio_same_optimisations"]) == {"train_flops", "client_seconds"}


def test_the_rest_of_the_record_is_kept() -> None:
    values = report.to_json(make_record())
    assert values["cost"]["uplink_payload_bytes"] == 9_900_000
    assert values["clients"][0]["name"] == "north"
    assert values["reference"]["source"] == "predicted"
    assert "reference_source" not in values
    assert values["majority"] == 0.31


def test_ratios_are_measured_over_reference() -> None:
    values = report.to_json(make_record())
    assert values["ratio"]["train_flops"] == pytest.approx(10 / 142)
    assert values["ratio"]["uplink_bytes"] == 0.25
    assert values["ratio"]["downlink_bytes"] is None
    assert values["ratio_same_optimisations"]["train_flops"] == 0.2


def test_ratios_are_null_for_an_unknown_or_zero_reference() -> None:
    values = report.to_json(make_record(reference={"uplink_bytes": 0}, reference_same_flops=None))
    assert set(values["ratio"].values()) == {None}
    assert values["ratio_same_optimisations"]["train_flops"] is None
    assert values["reference"]["train_flops"] is None


@pytest.mark.usefixtures("no_plots")
def test_a_diverged_run_is_still_strict_json(tmp_path: Path) -> None:
    report.write(tmp_path, make_record(final={"loss": math.nan, "accuracy": math.inf}))
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["final"] == {"loss": None, "accuracy": None}


@pytest.mark.usefixtures("no_plots")
def test_rounds_sum_to_the_cost(tmp_path: Path) -> None:
    report.clear(tmp_path)
    record = make_record()
    for entry in record.rounds:
        report.append_round(tmp_path, entry)
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    report.write(tmp_path, record)
    values = report.load(tmp_path)
    assert values["rounds"] == lines
    for name in ("train_flops", "uplink_bytes", "downlink_bytes"):
        assert sum(line[name] for line in lines) == values["cost"][name]


def test_write_leaves_exactly_the_report(tmp_path: Path) -> None:
    returned = report.write(tmp_path / "new" / "run", make_record())
    names = {path.name for path in (tmp_path / "new" / "run").iterdir()}
    assert names == {"report.json", "report.md", "metric.png", "cost.png"}
    assert report.load(tmp_path / "new" / "run") == returned


@pytest.mark.usefixtures("no_plots")
def test_a_failure_leaves_no_report_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("full disk")

    for target in (
        "fedbt_app.report.plots.write_plots",
        "fedbt_app.report.markdown.render",
        "os.fsync",
    ):
        report.write(tmp_path, make_record())
        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            with pytest.raises(RuntimeError):
                report.write(tmp_path, make_record(seed=8))
        assert not (tmp_path / "report.json").exists()


def test_report_json_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = report.os.replace

    def watch(source: Path, target: Path) -> None:
        seen.extend(sorted(path.name for path in tmp_path.iterdir()))
        assert json.loads(Path(source).read_text())["schema"] == 1
        real(source, target)

    monkeypatch.setattr(report.os, "replace", watch)
    report.write(tmp_path, make_record())
    (partial,) = (name for name in seen if name.endswith(PARTIAL))
    assert set(seen) == {"cost.png", "metric.png", partial, "report.md"}


def test_clear_removes_a_report_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report.clear(folder)
    report.append_round(folder, make_record().rounds[0])
    report.write(folder, make_record())
    (folder / "model").mkdir()
    (folder / "notes.png").write_text("mine")
    report.clear(folder)
    assert {path.name for path in folder.iterdir()} == {"model", "notes.png"}


@pytest.mark.usefixtures("no_plots")
def test_clear_starts_with_report_json(tmp_path: Path) -> None:
    report.write(tmp_path, make_record())
    (tmp_path / "report.md").unlink()
    (tmp_path / "report.md").mkdir()  # cannot be unlinked
    with pytest.raises(FedBTError, match="choose another folder"):
        report.clear(tmp_path)
    assert not (tmp_path / "report.json").exists()


def test_clear_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedBTError, match=r"output-dir .* unusable"):
        report.clear(tmp_path / "file")


@pytest.mark.usefixtures("no_plots")
def test_load_reads_a_folder_or_a_file(tmp_path: Path) -> None:
    report.write(tmp_path, make_record())
    assert report.load(tmp_path) == report.load(str(tmp_path / "report.json"))


def test_load_refuses(tmp_path: Path) -> None:
    for text, message in {
        None: "does not exist",
        "{": "is not JSON",
        "[1]": "is not a report",
        '{"a": 1}': "is not a report",
        '{"schema": 2}': "schema 2, not 1",
        '{"schema": 1, "method": "fedbt"}': "lacks cost, final",
    }.items():
        if text is not None:
            (tmp_path / "report.json").write_text(text)
        with pytest.raises(FedBTError, match=message) as caught:
            report.load(tmp_path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_page_says_what_a_manager_asks(tmp_path: Path) -> None:
    report.write(tmp_path, make_record())
    page = (tmp_path / "report.md").read_text()
    assert "accuracy went from 25.0 % to 81.2 %" in page
    assert "| accuracy | 25.0 % | 81.2 % | 31.0 % |" in page
    assert "| Training compute | 10.0 TFLOP | 142 TFLOP | 7.04 % | 20.0 % |" in page
    assert "| Downlink | 12.0 MB | n/a | n/a |  |" in page
    assert "full-model FedAvg (predicted)" in page
    assert "serialised bytes" in page
    assert "155 MB" in page  # every byte by cause, summed
    assert "| 2 | 2, 3 | 2 | 6.00 TFLOP | 4.00 MB | 5.00 MB | 11.5 s | 81.2 % |" in page
    assert "| 2 | south | values \\| not finite |" in page
    assert "![metric](metric.png)" in page
    assert "![cost](cost.png)" in page


def test_page_without_test_set_or_refusals(tmp_path: Path) -> None:
    rounds = [replace(entry, metrics={}) for entry in make_record().rounds]
    record = make_record(
        initial={}, final={}, client_metrics={}, majority=None, refused=[], rounds=rounds
    )
    report.write(tmp_path, record)
    page = (tmp_path / "report.md").read_text()
    assert "no central test set" in page
    assert "Refused" not in page
    assert "metric.png" not in page
    assert not (tmp_path / plots.METRIC).exists()


def test_page_says_who_was_left_out_and_what_of_the_text_was_read(tmp_path: Path) -> None:
    report.write(tmp_path, make_record())
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    first = page.split("\n\n")[1]
    assert "**Left out** of some round or all: south (values | not finite)" in first
    assert "| Test rows | 1000 of 1500 (max-test-examples) |" in page
    assert "- north: 9 of 130 rows are cut" in page
    assert "| north | 130 | 9 | 4000 | 77 | 0 | 0 | 0 |" in page
