"""Whole federated runs in this process: what is trained, sent, averaged and booked."""

import math
from pathlib import Path

import pytest
import torch
from conftest import RecordingGrid, federate
from federated import THIRD, TRAFFIC, Settings, assert_equal, round_of, trainings
from flwr.app import ConfigRecord, Message

from fedbt_app.codec.codec import decode
from fedbt_app.config import RunConfig
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.weights import Weights, new_tensors
from fedbt_app.parts import HEAD
from fedbt_app.plan import METHODS
from fedbt_app.server.rounds import Hooks
from fedbt_app.server.strategy import FedBT
from fedbt_app.tasks import TASKS
from fedbt_app.wire.local_grid import simulated
from fedbt_app.wire.messages import read_reply, read_request
from fedbt_app.wire.records import serialised_bytes

# What a round trains and sends --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_sends_only_what_is_planned(
    small: Settings, method: str, task: str
) -> None:
    run = federate(small(task=task, method=method), simulated(2))
    trained: dict[int, set[str]] = {}
    for request, reply in trainings(run):
        plan = read_request(request).plan
        assert plan is not None
        assert set(read_reply(reply).deltas or {}) == set(plan.trained_parts)
        trained[round_of(request)] = set(plan.trained_parts)
    for request, _ in trainings(run):
        asked = read_request(request)
        values = {update.part for update in asked.sync.updates if update.kind == "value"}
        deltas = {update.part for update in asked.sync.updates if update.kind == "delta"}
        before = trained.get(round_of(request) - 1, set())
        assert deltas == before
        assert all(part == HEAD or part.startswith("adapter.") for part in values)
        assert all(
            update.state.version == 0 for update in asked.sync.updates if update.kind == "value"
        )
    changed = {name for name, state in run.rounds.state.states().items() if state.version}
    assert changed == set().union(*trained.values())
    assert all(math.isfinite(entry.metrics["train_loss"]) for entry in run.outcome.rounds)
    assert run.refusals == []


def test_untrained_tensors_of_the_global_model_stay_those_of_the_base(
    small: Settings, tiny_bert: Path
) -> None:
    run = federate(small(num_rounds=1, weight_decay=0.1), simulated(2))
    base = Checkpoint(tiny_bert)
    for name, value in run.tensors.items():
        if name.startswith(
            ("bert.embeddings.", *(f"bert.encoder.layer.{index}." for index in (0, 1, 2)))
        ):
            assert torch.equal(value, base.tensor(name)), name
        elif not name.startswith("classifier."):
            assert not torch.equal(value, base.tensor(name)), name


def test_first_round_carries_no_block_downlink(small: Settings) -> None:
    run = federate(small(task="mlm", num_rounds=1), simulated(2))
    assert run.outcome.cost.downlink_payload_bytes == 0
    assert run.outcome.cost.first_contact_bytes > 0
    for request, _ in trainings(run):
        assert [update.part for update in read_request(request).sync.updates] == [HEAD]


@pytest.mark.parametrize("task", TASKS)
def test_downlink_payload_equals_the_uplink_payload_of_the_round_before(
    small: Settings, task: str
) -> None:
    run = federate(small(task=task, num_rounds=3), simulated(3))
    up: dict[int, int] = {}
    down: dict[int, int] = {}
    for request, reply in trainings(run):
        round_ = round_of(request)
        costs = read_reply(reply).costs
        up[round_] = up.get(round_, 0) + costs.uplink_payload_bytes
        down[round_] = down.get(round_, 0) + costs.downlink_payload_bytes
    assert down[2] == up[1] > 0
    assert down[3] == up[2] > 0
    assert run.outcome.cost.downlink_payload_bytes == down[2] + down[3]
    assert run.outcome.cost.uplink_payload_bytes == sum(up.values())


# Every byte is booked once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", ["never", "every"])
def test_categories_of_traffic_add_up_to_all_messages(small: Settings, evaluation: str) -> None:
    run = federate(small(client_evaluation=evaluation, task="mlm"), simulated(3))
    cost = run.outcome.cost
    total = sum(getattr(cost, name) for name in TRAFFIC)
    assert total == sum(map(serialised_bytes, run.grid.sent + run.grid.received))
    assert (cost.evaluation_bytes == 0) == (evaluation == "never")


def test_refused_replies_are_booked_too(small: Settings) -> None:
    def fail(node: int, reply: Message) -> Message:
        if node == THIRD and round_of(reply):
            reply.content["reply"] = ConfigRecord({"status": "failed", "error": "disk full"})
        return reply

    run = federate(small(), simulated(3), fail)
    total = sum(getattr(run.outcome.cost, name) for name in TRAFFIC)
    assert total == sum(map(serialised_bytes, run.grid.sent + run.grid.received))


def test_the_server_evaluates_each_round_or_at_the_end_only(small: Settings) -> None:
    scored = {}
    for when in ("every", "final"):
        values = small(num_rounds=3, central_evaluation=when)
        config = RunConfig.load(values)
        hooks = Hooks(evaluate=lambda weights: {"accuracy": 0.5})
        strategy = FedBT(config, Checkpoint(Path(config.model)))
        outcome = strategy.start(RecordingGrid(values, simulated(2)), hooks).outcome
        scored[when] = ["accuracy" in entry.metrics for entry in outcome.rounds]
    assert scored == {"every": [True, True, True], "final": [False, False, True]}


def test_rounds_add_up_to_the_cost(small: Settings) -> None:
    outcome = federate(small(num_rounds=3, client_evaluation="every"), simulated(3)).outcome
    for name in ("train_flops", "uplink_bytes", "downlink_bytes"):
        assert (
            sum(getattr(entry, name) for entry in outcome.rounds) == getattr(outcome.cost, name) > 0
        )
    assert [entry.round for entry in outcome.rounds] == [1, 2, 3]


def test_client_costs_are_summed_and_memory_is_a_maximum(small: Settings) -> None:
    run = federate(small(), simulated(3))
    costs = [read_reply(reply).costs for _, reply in trainings(run)]
    cost = run.outcome.cost
    assert cost.train_flops == sum(one.train_flops for one in costs)
    assert cost.stock_flops == sum(one.stock_flops for one in costs)
    assert cost.same_flops == sum(one.same_flops for one in costs)
    assert cost.uplink_bytes == sum(one.uplink_serialised_bytes for one in costs)
    assert cost.client_seconds == pytest.approx(sum(one.seconds for one in costs))
    assert cost.peak_memory_bytes == max(one.peak_memory_bytes for one in costs)


# Unequal clients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mlm", "classification"])
def test_clients_of_unequal_local_depth_train_together(small: Settings, task: str) -> None:
    nodes = simulated(3)
    for node, depth in zip(nodes, (1, 2, 4), strict=True):
        nodes[node]["local-depth"] = depth
    run = federate(small(task=task), nodes)
    plans = {}
    sums: dict[int, dict[str, list[tuple[int, torch.Tensor]]]] = {1: {}, 2: {}}
    for request, reply in trainings(run):
        asked, said = read_request(request), read_reply(reply)
        assert asked.plan is not None
        plans[round_of(request), request.metadata.dst_node_id] = asked.plan
        for part, encoded in (said.deltas or {}).items():
            decoded = decode(encoded.arrays, encoded.header, run.rounds.weights.shapes(part))
            for name, delta in decoded.items():
                sums[round_of(request)].setdefault(name, []).append((said.examples, delta))
    assert [len(plans[2, node].local_blocks) for node in nodes] == [1, 2, 4]
    trained = [plans[2, node].trained_blocks for node in nodes]
    assert trained == ([(0,), (1,), (1,)] if task == "mlm" else [(3,), (2, 3), (2, 3)])
    lacking = Weights(
        run.rounds.weights.checkpoint, lambda part: {}, run.rounds.weights.spec
    ).lacking(HEAD)
    expected = new_tensors(lacking, run.rounds.config.seed)
    expected |= {
        name: run.rounds.weights.checkpoint.tensor(name)
        for name in run.tensors
        if name not in expected
    }
    for one in sums.values():
        for name, deltas in one.items():
            mean = sum(size * delta.double() for size, delta in deltas) / sum(
                size for size, _ in deltas
            )
            expected[name] = expected[name] + mean.float()
    assert_equal(run.tensors, expected)
    assert run.refusals == []
