"""A measured reference: the costs of a finished full-model run stand in for the predicted ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import client_app
import server_app
from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.wire.local_grid import LocalGrid, simulated

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def brief(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return a function that makes the configuration of a run as short as can be, without plots."""
    monkeypatch.setattr("fedbt_app.report.plots.write_plots", lambda *_: [])
    once = {"num_rounds": 1, "client_evaluation": "never", "central_evaluation": "final"}
    few = {"max_train_examples": 40, "max_test_examples": 10}
    return lambda **changes: settings(**once | few | changes)


def run(values: dict[str, Any]) -> dict[str, Any]:
    return server_app.run(LocalGrid(client_app.app, values, simulated(2)), RunConfig.load(values))


def test_ratios_are_against_the_named_run_and_the_page_says_so(
    brief: Settings, tmp_path: Path
) -> None:
    full = run(brief(method="full", output_dir=str(tmp_path / "full")))
    own = run(brief(reference=str(tmp_path / "full"), output_dir=str(tmp_path / "own")))
    assert own["reference"]["source"] == "measured"
    for name in (
        "train_flops",
        "uplink_bytes",
        "downlink_bytes",
        "client_seconds",
        "peak_memory_bytes",
    ):
        assert own["reference"][name] == full["cost"][name]
    assert own["ratio"]["train_flops"] == own["cost"]["train_flops"] / full["cost"]["train_flops"]
    seconds = own["cost"]["client_seconds"] / full["cost"]["client_seconds"]
    assert (
        own["ratio"]["client_seconds"]
        == own["ratio_same_optimisations"]["client_seconds"]
        == seconds
    )
    assert (
        full["ratio"]["client_seconds"]
        is None
        is full["ratio_same_optimisations"]["client_seconds"]
    )
    assert "a measured run" in (tmp_path / "own" / "report.md").read_text()
    assert "stock training step" in (tmp_path / "full" / "report.md").read_text()


def test_a_run_that_is_not_alike_is_refused_as_reference(brief: Settings, tmp_path: Path) -> None:
    run(brief(method="head", output_dir=str(tmp_path / "head")))
    with pytest.raises(FedBTError, match="has method 'head', not 'full'"):
        run(brief(reference=str(tmp_path / "head"), output_dir=str(tmp_path / "own")))
    run(brief(method="full", output_dir=str(tmp_path / "full")))
    with pytest.raises(
        FedBTError, match="differs from this run in number of rounds, local-epochs: name a full run"
    ):
        run(
            brief(
                reference=str(tmp_path / "full"),
                num_rounds=2,
                local_epochs=2,
                output_dir=str(tmp_path / "own"),
            )
        )


def test_a_reference_of_other_clients_gives_way_to_predicted_costs(
    brief: Settings, tmp_path: Path, flower_log: list[str]
) -> None:
    run(brief(method="full", output_dir=str(tmp_path / "full")))
    values = brief(reference=str(tmp_path / "full"), output_dir=str(tmp_path / "own"))
    own = server_app.run(LocalGrid(client_app.app, values, simulated(3)), RunConfig.load(values))
    assert own["reference"]["source"] == "predicted"
    assert any("reference differs in rows of the clients" in line for line in flower_log)


def test_a_mistake_in_the_settings_leaves_what_lies_in_the_folder(
    brief: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "same"
    run(brief(method="full", output_dir=str(folder)))
    (folder / "resume").mkdir()
    before = sorted(folder.rglob("*"))
    with pytest.raises(FedBTError):
        run(brief(model=str(tmp_path / "typo"), output_dir=str(folder)))
    assert sorted(folder.rglob("*")) == before
    own = run(brief(reference=str(folder), output_dir=str(folder)))
    assert own["reference"]["source"] == "measured"
