"""Rounds with too few usable replies."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import RecordingGrid, federate
from federated import (
    THIRD,
    TRAFFIC,
    Settings,
    asked,
    assert_equal,
    assert_pools_up_to_date,
    failing,
    round_of,
)
from flwr.app import Message

from fedbt_app.config import RunConfig
from fedbt_app.costs.ledger import Outcome
from fedbt_app.errors import FedBTError
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.server.rounds import Hooks
from fedbt_app.server.snapshot import Progress
from fedbt_app.server.strategy import FedBT
from fedbt_app.training import train
from fedbt_app.wire.local_grid import simulated
from fedbt_app.wire.records import serialised_bytes

# Too few usable replies ----------------------------------------------------------------------------------------


def test_a_round_below_the_minimum_stops_the_run_and_changes_nothing_but_the_books(
    small: Settings,
) -> None:
    values = small(codec="int4", min_replies=2, num_rounds=3)
    config, grid = (
        RunConfig.load(values),
        RecordingGrid(values, simulated(3), failing(2, {11, THIRD})),
    )
    kept: list[tuple[Any, ...]] = []
    books: list[Outcome] = []

    def keep(progress: Progress) -> None:
        parts = {name: part.state for name, part in progress.parts.items()}
        books.append(progress.outcome)
        kept.append(
            (
                parts,
                len(progress.outcome.rounds),
                progress.outcome.cost.uplink_bytes,
                len(progress.refusals),
            )
        )

    strategy = FedBT(config, Checkpoint(Path(config.model)))
    with pytest.raises(
        FedBTError, match=r"round 2: 1 of 3 .*min-replies=2 \(disk 12 full\): .*--resume .*run`$"
    ):
        strategy.start(grid, Hooks(keep=keep))
    (_, done_0, up_0, _), (before, done_1, up_1, refused_1), (after, done_2, up_2, refused_2) = kept
    assert (done_0, done_1, done_2) == (0, 1, 1)
    assert before == after
    assert up_0 < up_1 < up_2
    assert (refused_1, refused_2) == (0, 2)
    traffic = sum(getattr(books[-1].cost, name) for name in TRAFFIC)
    assert traffic == sum(map(serialised_bytes, grid.sent + grid.received))


@pytest.mark.parametrize("codec", ["float32", "int4"])
def test_a_repeated_round_ends_as_if_nothing_had_failed_and_its_costs_are_booked(
    small: Settings, flower_log: list[str], codec: str
) -> None:
    values = small(
        codec=codec, min_replies=2, below_minimum="repeat", num_rounds=3, client_evaluation="final"
    )
    run = federate(values, simulated(3), failing(2, {11, THIRD}, times=4))
    (once, twice) = [line for line in flower_log if "is repeated" in line]
    assert "round 2: 1 of 3 clients gave a usable reply, min-replies=2 (disk 12 full)" in once
    assert "(2 of 3)" in twice
    assert [entry.clients for entry in run.outcome.rounds] == [3, 3, 3]
    whole = federate(values, simulated(3))
    assert_equal(run.tensors, whole.tensors)
    assert_pools_up_to_date(run)
    assert run.outcome.rounds[1].uplink_bytes > 2 * whole.outcome.rounds[1].uplink_bytes
    for name in ("train_flops", "uplink_bytes", "downlink_bytes"):
        assert sum(getattr(entry, name) for entry in run.outcome.rounds) == getattr(
            run.outcome.cost, name
        )
    traffic = sum(getattr(run.outcome.cost, name) for name in TRAFFIC)
    assert traffic == sum(map(serialised_bytes, run.grid.sent + run.grid.received))


def test_a_round_is_repeated_three_times_at_most(small: Settings, flower_log: list[str]) -> None:
    values = small(below_minimum="repeat", method="head", max_train_examples=16)
    grid = RecordingGrid(values, simulated(2), failing(1, {10, 11}))
    config = RunConfig.load(values)
    with pytest.raises(FedBTError, match="round 1: 0 of 2 clients"):
        FedBT(config, Checkpoint(Path(config.model))).start(grid)
    assert len([line for line in flower_log if "is repeated" in line]) == 3
    assert len([message for message in grid.sent if round_of(message) == 1]) == 4 * 2


def test_a_repeated_round_draws_its_clients_anew_and_never_too_few(small: Settings) -> None:
    values = small(
        participation=0.25,
        min_replies=2,
        below_minimum="repeat",
        method="head",
        max_train_examples=16,
    )
    run = federate(values, simulated(4), failing(1, {10, 11, THIRD, 13}, times=2))
    first, second = asked(run)[1][:2], asked(run)[1][2:]
    assert len(set(first)) == len(set(second)) == 2
    assert set(first) != set(second)


def test_when_no_client_can_take_part_the_reasons_are_named(small: Settings) -> None:
    nodes = simulated(2, **{"model-path": "/no/such/folder"})
    with pytest.raises(
        FedBTError, match=r"no client can take part: .*model folder folder does not exist"
    ):
        federate(small(), nodes)


def test_longer_rows_than_the_base_has_positions_for_are_refused_by_key(
    small: Settings, tmp_path: Path
) -> None:
    rows = [{"text": "kidney " * 100, "label": "ab"[row % 2]} for row in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FedBTError, match="max-length"):
        federate(small(max_length=128, dataset=str(tmp_path / "train.jsonl")), simulated(2))


def test_too_few_clients_are_named_after_the_timeout(small: Settings) -> None:
    with pytest.raises(FedBTError, match="2 of min-clients=3 clients connected"):
        federate(small(min_clients=3, round_timeout=1.0), simulated(2))


def test_unexpected_error_on_a_client_reaches_the_server_and_the_log_without_its_text(
    small: Settings, flower_log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("SECRET patient text")

    monkeypatch.setattr(train, "run", fail)
    values, received = small(num_rounds=1), []

    def watch(node: int, reply: Message) -> Message:
        received.append(reply)
        return reply

    with pytest.raises(FedBTError, match=r"ValueError at test_minimum\.py:\d+") as raised:
        federate(values, simulated(2), watch)
    assert "SECRET" not in str(raised.value)
    assert "SECRET" not in "\n".join(flower_log)
    assert len(received) == 4
    assert "SECRET" not in "".join(str(dict(reply.content)) for reply in received)
