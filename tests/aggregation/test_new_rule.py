"""A new aggregation rule costs one file and its line in the table."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import federate

from fedbt_app.aggregation import RULES
from fedbt_app.aggregation.base import Rule
from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.tensors import Tensors
from fedbt_app.wire.local_grid import simulated

# -- the one file ------------------------------------------------------------------------------------------------


class Median(Rule):
    """The coordinate-wise median of the clients' deltas, whatever their rows, times a factor."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._deltas: dict[str, list[torch.Tensor]] = {}

    def add(self, deltas: Tensors, weight: int) -> None:
        for name, delta in deltas.items():
            self._deltas.setdefault(name, []).append(delta)

    def result(self) -> Tensors:
        return {
            name: self._factor * torch.stack(own).median(dim=0).values
            for name, own in self._deltas.items()
        }


# -- what it gets for that -------------------------------------------------------------------------------------------


def test_a_toy_rule_is_chosen_by_name_and_takes_a_value(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, "median", lambda value, settings: Median(float(value or 1)))
    small = {
        "max_train_examples": 36,
        "batch_size": 16,
        "client_evaluation": "never",
        "num_rounds": 1,
    }
    mean = federate(settings(**small), simulated(3)).tensors
    median = federate(settings(**small, aggregation="median"), simulated(3)).tensors
    nothing = federate(settings(**small, aggregation="median:0"), simulated(3))
    name = "bert.encoder.layer.3.output.dense.weight"
    assert not torch.equal(mean[name], median[name])
    assert torch.equal(nothing.tensors[name], nothing.rounds.weights.checkpoint.tensor(name))


def test_a_rule_that_is_none_or_a_value_that_is_no_number_is_refused_in_one_line(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FedBTError, match=r"^aggregation=sorcery is not one of mean$"):
        RunConfig.load(settings(aggregation="sorcery"))
    monkeypatch.setitem(RULES, "median", lambda value, settings: Median(float(value or 1)))
    with pytest.raises(FedBTError, match="aggregation=median:much: median takes a number"):
        RunConfig.load(settings(aggregation="median:much"))


@pytest.mark.parametrize("setting", ["aggregation=mean:0.1", "server-optimizer=momentum:5"])
def test_a_value_behind_a_name_that_takes_none_is_refused(
    setting: str, settings: Callable[..., dict[str, Any]]
) -> None:
    key, text = setting.split("=")
    name = text.partition(":")[0]
    with pytest.raises(FedBTError, match=f"^{setting}: {name} takes no value, write {name} alone$"):
        RunConfig.load(settings(**{key.replace("-", "_"): text}))
