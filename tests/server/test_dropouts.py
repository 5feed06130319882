"""Fifty rounds in which clients come and go as they please: pools and server never drift apart."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecordingGrid
from flwr.app import Message, MessageType

from fedbt_app.client.pool import ParameterPool
from fedbt_app.config import RunConfig
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.server.strategy import FedBT
from fedbt_app.wire.local_grid import simulated
from fedbt_app.wire.messages import refusal_message

CLIENTS = 4


class FlakyGrid(RecordingGrid):
    """Nodes that are down in a round, train in vain, or lose their pool or residuals; all answer the last message."""

    def __init__(self, run_config: dict[str, Any], seed: int) -> None:
        super().__init__(run_config, simulated(CLIENTS))
        self._random, self.faults = (
            random.Random(seed),
            dict.fromkeys(("down", "in vain", "pool", "residuals"), 0),
        )

    def answer(self, node: int, message: Message) -> Message | None:
        if message.metadata.message_type != MessageType.TRAIN:
            return super().answer(node, message)
        fault = self._random.choices([*self.faults, ""], weights=[25, 10, 4, 4, 57])[0]
        if fault:
            self.faults[fault] += 1
        for pool in Path(self.run_config["pool-dir"]).glob(f"*/client-{node - min(self.nodes)}"):
            if fault == "pool":
                shutil.rmtree(pool)
            elif fault == "residuals":
                shutil.rmtree(pool / "residuals", ignore_errors=True)
        if fault == "down":
            return refusal_message("down", message)
        reply = super().answer(node, message)
        return refusal_message("the line broke", message) if fault == "in vain" else reply


@pytest.mark.parametrize(
    ("task", "codec", "wanted"), [("classification", "int4", 25), ("mlm", "int2+zstd", 50)]
)
def test_after_many_rounds_with_drop_outs_every_pool_is_the_servers_state_bit_for_bit(
    task: str, codec: str, wanted: int, settings: Callable[..., dict[str, Any]]
) -> None:
    values = settings(
        task=task,
        codec=codec,
        num_rounds=wanted,
        max_train_examples=16,
        min_clients=CLIENTS,
        local_depth=0,
    )
    values |= {"batch-size": 16, "client-evaluation": "final", "below-minimum": "repeat"}
    config, grid = RunConfig.load(values), FlakyGrid(values, seed=1)
    rounds = FedBT(config, Checkpoint(Path(config.model))).start(grid)
    outcome = rounds.outcome

    assert all(grid.faults.values()), "every kind of fault must have happened"
    assert len(outcome.rounds) == wanted
    assert {entry.clients for entry in outcome.rounds} >= {1, 2, 3, 4}
    assert outcome.cost.healed_parts > 0
    assert outcome.cost.catch_up_bytes > 0
    states = rounds.state.states()
    assert max(state.version for state in states.values()) == wanted
    for client in range(CLIENTS):
        pool = ParameterPool(config.pool_folder, rounds.roster.lineage, f"client-{client}")
        assert pool.states() == states
        for part in states:
            held, served = pool.tensors(part), rounds.state.tensors(part)
            assert held.keys() == served.keys()
            assert all(torch.equal(held[name], served[name]) for name in served)
