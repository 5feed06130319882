"""What the tests of the server share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import Federated
from flwr.app import ConfigRecord, Message

from fedbt_app.client.pool import ParameterPool

Settings = Callable[..., dict[str, Any]]
Tensors = dict[str, torch.Tensor]
Tamper = Callable[[int, Message], Message | None]
THIRD = 12  # node id of client-2
TRAFFIC = (
    "uplink_bytes",
    "downlink_bytes",
    "first_contact_bytes",
    "catch_up_bytes",
    "evaluation_bytes",
)


def trainings(run: Federated) -> list[tuple[Message, Message]]:
    """Return every (request, reply) of training, in order; needs a run in which nothing was lost."""
    pairs = zip(run.grid.sent, run.grid.received, strict=True)
    return [pair for pair in pairs if pair[0].metadata.message_type == "train"]


def round_of(message: Message) -> int:
    """Return the round, from 1, of a training message; 0 for any other."""
    group = message.metadata.group_id
    return int(group) if message.metadata.message_type == "train" and group.isdecimal() else 0


def assert_equal(ones: Tensors, others: Tensors) -> None:
    assert ones.keys() == others.keys()
    assert [name for name in ones if not torch.equal(ones[name], others[name])] == []


def pool_of(run: Federated, client: str) -> ParameterPool:
    return ParameterPool(run.rounds.config.pool_folder, run.rounds.roster.lineage, client)


def assert_pools_up_to_date(run: Federated) -> None:
    for one in run.participants:
        pool = pool_of(run, one.name)
        assert pool.states() == run.rounds.state.states(), one.name
        for part in run.rounds.state.states():
            assert_equal(pool.tensors(part), run.rounds.state.tensors(part))


def pool_folder(values: dict[str, Any], client: str = "client-2") -> Path:
    (folder,) = Path(values["pool-dir"]).glob(f"*/{client}")
    return folder


def failing(round_: int, nodes: set[int], times: int = 1000) -> Tamper:
    """Return a tamper by which the first `times` training replies of `nodes` in that round are failures."""
    left = [times]

    def tamper(node: int, reply: Message) -> Message:
        if round_of(reply) == round_ and node in nodes and left[0]:
            left[0] -= 1
            reply.content["reply"] = ConfigRecord(
                {"status": "failed", "error": f"disk {node} full"}
            )
        return reply

    return tamper


def asked(run: Federated) -> dict[int, list[int]]:
    """Return the nodes asked to train, by round."""
    nodes: dict[int, list[int]] = {}
    for message in run.grid.sent:
        if round_ := round_of(message):
            nodes.setdefault(round_, []).append(message.metadata.dst_node_id)
    return nodes
