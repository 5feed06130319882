"""Pools that are behind, damaged or gone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import federate
from federated import THIRD, Settings, assert_equal, assert_pools_up_to_date, pool_folder, round_of
from flwr.app import Message

from fedbt_app.client.pool import ParameterPool
from fedbt_app.errors import FedBTError
from fedbt_app.wire.local_grid import simulated

# Pools that are behind, damaged or gone -----------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mlm", "classification"])
def test_healthy_run_needs_no_catch_up_and_leaves_all_pools_up_to_date(
    small: Settings, task: str
) -> None:
    run = federate(small(task=task, client_evaluation="final"), simulated(3))
    assert run.outcome.cost.catch_up_bytes == 0
    assert_pools_up_to_date(run)


def test_client_whose_reply_was_lost_is_brought_up_to_date(small: Settings) -> None:
    def lose(node: int, reply: Message) -> Message | None:
        return None if node == THIRD and round_of(reply) == 1 else reply

    run = federate(small(client_evaluation="final", round_timeout=1.0), simulated(3), lose)
    assert [(one.round, one.client) for one in run.refusals] == [(1, "client-2")]
    assert run.outcome.cost.catch_up_bytes > 0
    assert [entry.clients for entry in run.outcome.rounds] == [2, 3]
    assert_pools_up_to_date(run)


def damage_delete(folder: Path) -> None:
    shutil.rmtree(folder)


def damage_delete_head(folder: Path) -> None:
    (folder / "head.safetensors").unlink()


def damage_truncate(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_flip_a_bit(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage", [damage_delete, damage_delete_head, damage_truncate, damage_flip_a_bit]
)
@pytest.mark.parametrize(("task", "after"), [("mlm", 1), ("classification", 2)])
def test_client_with_a_lost_or_corrupt_pool_is_brought_up_to_date_at_once(
    small: Settings, damage: Callable[[Path], None], task: str, after: int
) -> None:
    values = small(task=task, client_evaluation="final", num_rounds=3)

    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and round_of(reply) == after:
            damage(pool_folder(values))
        return reply

    run = federate(values, simulated(3), tamper)
    assert run.refusals == []
    assert run.outcome.cost.catch_up_bytes > 0
    assert [entry.clients for entry in run.outcome.rounds] == [3, 3, 3]
    assert_pools_up_to_date(run)
    assert_equal(run.tensors, federate(values, simulated(3)).tensors)


def test_client_with_a_stale_pool_is_brought_up_to_date(small: Settings, tmp_path: Path) -> None:
    values = small(task="mlm", client_evaluation="final", num_rounds=4)

    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and round_of(reply) == 2:
            shutil.copytree(pool_folder(values), tmp_path / "backup")
        elif node == THIRD and round_of(reply) == 3:  # restored from the backup of a round ago
            folder = pool_folder(values)
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "backup", folder)
        return reply

    run = federate(values, simulated(3), tamper)
    assert run.refusals == []
    assert run.outcome.cost.catch_up_bytes > 0
    assert_pools_up_to_date(run)


def test_lost_adapters_are_sent_again(small: Settings) -> None:
    values = small(method="lora", client_evaluation="final")

    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and round_of(reply) == 1:
            shutil.rmtree(pool_folder(values))
        return reply

    run = federate(values, simulated(3), tamper)
    assert run.refusals == []
    assert_pools_up_to_date(run)


def test_pool_that_cannot_be_kept_is_refused_after_one_more_try(
    small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ParameterPool, "states", lambda self: {})
    with pytest.raises(FedBTError, match="pool stays incomplete"):
        federate(small(num_rounds=1), simulated(2))
