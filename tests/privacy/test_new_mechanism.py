"""A new privacy mechanism costs one file and its line in the table: here clipping, and a count that resume covers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import federate

import client_app
import server_app
from fedbt_app.codec.codec import decode
from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.privacy import MECHANISMS, mechanisms
from fedbt_app.privacy.base import Mechanism
from fedbt_app.server.snapshot import Snapshot
from fedbt_app.tensors import Tensors
from fedbt_app.wire.local_grid import LocalGrid, simulated
from fedbt_app.wire.messages import read_reply

# -- the one file ------------------------------------------------------------------------------------------------


class Clip(Mechanism):
    """Shortens a client's whole delta to a norm; the server does it again, as it takes nobody's word."""

    def __init__(self, norm: float) -> None:
        super().__init__()
        self._norm = norm
        self.memory = {"seen": 0}

    def on_client(self, deltas: dict[str, Tensors]) -> dict[str, Tensors]:
        scale = self._scale(tensor for own in deltas.values() for tensor in own.values())
        return {
            part: {name: scale * tensor for name, tensor in own.items()}
            for part, own in deltas.items()
        }

    def on_server(self, deltas: Tensors) -> Tensors:
        self.memory["seen"] += 1
        scale = self._scale(deltas.values())
        return {name: scale * tensor for name, tensor in deltas.items()}

    def _scale(self, tensors: Any) -> float:
        return min(1.0, self._norm / max(1e-12, norm_of(tensors)))


# -- what it gets for that -------------------------------------------------------------------------------------------


def norm_of(tensors: Any) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MECHANISMS, "clip", lambda value, settings: Clip(float(value)))


SMALL: dict[str, Any] = {
    "max_train_examples": 36,
    "batch_size": 16,
    "num_rounds": 1,
    "client_evaluation": "never",
}


def test_a_toy_mechanism_treats_deltas_on_both_sides(
    settings: Callable[..., dict[str, Any]], clip: None
) -> None:
    run = federate(settings(**SMALL, privacy="clip:0.01"), simulated(3))
    for message in run.grid.received:
        for part, encoded in (
            (read_reply(message).deltas or {}).items()
            if message.metadata.message_type == "train"
            else ()
        ):
            sent = decode(encoded.arrays, encoded.header, run.rounds.weights.shapes(part))
            assert norm_of(sent.values()) <= 0.0101
    assert [mechanism.memory for mechanism in run.rounds.mechanisms] == [{"seen": 3}]
    free = federate(settings(**SMALL), simulated(3)).tensors
    assert any(not torch.equal(free[name], run.tensors[name]) for name in free)


def test_none_is_on_by_default_and_one_that_is_none_is_refused(
    settings: Callable[..., dict[str, Any]],
) -> None:
    assert mechanisms(RunConfig.load(settings())) == []
    with pytest.raises(FedBTError, match=r"^privacy=cloak is not one of"):
        RunConfig.load(settings(privacy="cloak:1"))


def test_what_a_mechanism_remembers_is_in_the_snapshot_and_comes_back(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, clip: None
) -> None:
    class Losing(LocalGrid):
        def answer(self, node: int, message: Any) -> Any:
            return None if message.metadata.group_id == "2" else super().answer(node, message)

    changes = SMALL | {"num_rounds": 2, "privacy": "clip:1"}
    values = settings(**changes, round_timeout=1.0)
    with pytest.raises(FedBTError, match="go on with"):
        server_app.run(Losing(client_app.app, values, simulated(2)), RunConfig.load(values))
    values |= {"resume": values["output-dir"], "round-timeout": 60.0}
    config = RunConfig.load(values)
    assert Snapshot(Path(values["output-dir"])).load(config).mechanisms == [{"seen": 2}]
    assert (
        len(server_app.run(LocalGrid(client_app.app, values, simulated(2)), config)["rounds"]) == 2
    )
