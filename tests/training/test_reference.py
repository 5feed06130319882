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


def run(values: dict[str, Any]) -> dict[str, Any]:
    return server_app.run(LocalGrid(client_app.app, values, simulated(2)), RunConfig.load(values))


def test_ratios_are_against_the_named_run_and_the_page_says_so(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    full = run(settings(method="full", output_dir=str(tmp_path / "full")))
    own = run(settings(reference=str(tmp_path / "full"), output_dir=str(tmp_path / "own")))
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


def test_a_run_that_is_not_alike_is_refused_as_reference(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(settings(method="head", output_dir=str(tmp_path / "head")))
    with pytest.raises(FedBTError, match="has method 'head', not 'full'"):
        run(settings(reference=str(tmp_path / "head"), output_dir=str(tmp_path / "own")))
    run(settings(method="full", output_dir=str(tmp_path / "full")))
    with pytest.raises(
        FedBTError, match="differs from this run in number of rounds, local-epochs: name a full run"
    ):
        run(
            settings(
                reference=str(tmp_path / "full"),
                num_rounds=1,
                local_epochs=2,
                output_dir=str(tmp_path / "own"),
            )
        )


def test_a_reference_of_other_clients_gives_way_to_predicted_costs(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, flower_log: list[str]
) -> None:
    run(settings(method="full", output_dir=str(tmp_path / "full")))
    values = settings(reference=str(tmp_path / "full"), output_dir=str(tmp_path / "own"))
    own = server_app.run(LocalGrid(client_app.app, values, simulated(3)), RunConfig.load(values))
    assert own["reference"]["source"] == "predicted"
    assert any("reference differs in rows of the clients" in line for line in flower_log)


def test_a_mistake_in_the_settings_leaves_what_lies_in_the_folder(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "same"
    run(settings(method="full", output_dir=str(folder)))
    (folder / "resume").mkdir()
    before = sorted(folder.rglob("*"))
    with pytest.raises(FedBTError):
        run(settings(model=str(tmp_path / "typo"), output_dir=str(folder)))
    assert sorted(folder.rglob("*")) == before
    own = run(settings(reference=str(folder), output_dir=str(folder)))
    assert own["reference"]["source"] == "measured"
