"""A new server optimiser costs one file and its line in the table; a resumed run has what it remembers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import client_app
import server_app
from fedbt_app.aggregation import OPTIMIZERS
from fedbt_app.aggregation.base import ServerOptimizer
from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.tensors import Tensors
from fedbt_app.wire.local_grid import LocalGrid, simulated

# -- the one file ------------------------------------------------------------------------------------------------


class Adagrad(ServerOptimizer):
    """FedAdagrad (Reddi et al., 2021): steps shrink where the deltas have been large."""

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def step(self, deltas: Tensors, memory: Tensors) -> tuple[Tensors, Tensors]:
        seen = {
            name: memory.get(name, torch.zeros_like(delta)) + delta**2
            for name, delta in deltas.items()
        }
        return {
            name: self._rate * delta / (seen[name].sqrt() + 1e-3) for name, delta in deltas.items()
        }, seen


# -- what it gets for that -------------------------------------------------------------------------------------------


def test_a_toy_optimiser_goes_on_where_a_stopped_run_left_it(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "adagrad", lambda value, settings: Adagrad(float(value)))
    small = {
        "max_train_examples": 36,
        "batch_size": 16,
        "num_rounds": 3,
        "min_replies": 2,
        "schedule": "-1",
    }

    def run(folder: str, lose: bool, **changes: Any) -> dict[str, Any]:
        class Losing(LocalGrid):
            def answer(self, node: int, message: Any) -> Any:
                lost = (
                    lose
                    and message.metadata.group_id == "3"
                    and message.metadata.message_type == "train"
                )
                return None if lost else super().answer(node, message)

        values = settings(
            **small, server_optimizer="adagrad:0.01", output_dir=str(tmp_path / folder), **changes
        )
        return server_app.run(Losing(client_app.app, values, simulated(2)), RunConfig.load(values))

    whole = run("whole", lose=False)
    with pytest.raises(FedBTError, match="go on with"):
        run("stopped", lose=True, round_timeout=1.0)
    resumed = run("stopped", lose=False, resume=str(tmp_path / "stopped"))
    models = [
        Path(report["model_dir"], "model.safetensors").read_bytes() for report in (whole, resumed)
    ]
    assert models[0] == models[1]
    assert whole["final"] == resumed["final"]
