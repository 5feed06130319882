"""Whole federated runs in this process: what is trained, sent, averaged, booked, refused and repaired."""

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Federated, RecordingGrid, federate
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord

import client_app
import server_app
from fedbt_app.client.pool import ParameterPool
from fedbt_app.codec.codec import decode
from fedbt_app.config import RunConfig
from fedbt_app.costs.ledger import Outcome
from fedbt_app.data import examples
from fedbt_app.errors import FedBTError
from fedbt_app.model import forward
from fedbt_app.model.checkpoint import Checkpoint
from fedbt_app.model.local_model import LocalModel
from fedbt_app.model.weights import Weights, model_spec, new_tensors
from fedbt_app.parts import HEAD, HeadKind
from fedbt_app.plan import METHODS, RoundPlan
from fedbt_app.server.rounds import Hooks
from fedbt_app.server.snapshot import Progress
from fedbt_app.server.strategy import FedBT
from fedbt_app.tasks import TASKS
from fedbt_app.tasks.base import Reading
from fedbt_app.tasks.batch import Collator, special_tokens
from fedbt_app.training import train
from fedbt_app.training.optimizer import TrainSettings
from fedbt_app.wire.local_grid import LocalGrid, over_the_wire, simulated
from fedbt_app.wire.messages import read_reply, read_request
from fedbt_app.wire.records import serialised_bytes

Settings = Callable[..., dict[str, Any]]
Tensors = dict[str, torch.Tensor]
THIRD = 12  # node id of client-2
TRAFFIC = ("uplink_bytes", "downlink_bytes", "first_contact_bytes", "catch_up_bytes", "evaluation_bytes")


@pytest.fixture
def small(settings: Settings) -> Settings:
    """Return a function that makes the configuration of a run of few rows, without client evaluation."""
    few = {"max_train_examples": 36, "batch_size": 16, "client_evaluation": "never"}
    return lambda **changes: settings(**(few | changes))


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


# The method=full baseline is FedAvg ---------------------------------------------------------------------------


def exact_loss(local: LocalModel, batch: Any) -> torch.Tensor:
    return forward.loss(local, batch)


def stock_loss(local: LocalModel, batch: Any) -> torch.Tensor:
    labels = batch.labels[:, 0]
    if local.spec.task.name != "classification":
        labels = torch.full_like(batch.input_ids, -100)
        row, column = (batch.labels >= 0).nonzero(as_tuple=True)
        labels[row, batch.positions[row, column]] = batch.labels[row, column]
    mask = None if batch.mask is None else batch.mask.long()
    return local.module(input_ids=batch.input_ids, attention_mask=mask, labels=labels).loss


STOCK = {
    "mlm": transformers.BertForMaskedLM,
    "classification": transformers.BertForSequenceClassification,
    "ner": transformers.BertForTokenClassification,
}


def plain_fedavg(config: RunConfig, labels: tuple[str, ...], clients: int, loss: Any, deltas: bool) -> Tensors:
    """Return the global tensors of textbook FedAvg on stock transformers models, as deltas or as weights."""
    checkpoint = Checkpoint(Path(config.model))
    spec = model_spec(config, labels)
    arch = transformers.BertConfig.from_pretrained(
        config.model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=max(1, len(labels))
    )
    collator = Collator(
        TASKS[config.task], Reading(special_tokens(checkpoint.tokenizer()), labels, config.mask_probability)
    )
    shapes = checkpoint.architecture.model(TASKS[config.task].head, len(labels))
    weights: Tensors = {name: checkpoint.tensor(name) for name in shapes if name in checkpoint}
    weights |= new_tensors(Weights(checkpoint, lambda part: {}, spec).lacking(HEAD), config.seed)
    everything = tuple(range(checkpoint.architecture.depth))
    for round_ in range(config.num_rounds):
        results: list[tuple[int, Tensors]] = []
        for client in range(clients):
            own = examples.client_data(config, checkpoint.tokenizer, checkpoint.tokenizer_id, (client, clients))
            rows = own.train.to_list()
            module = STOCK[config.task](arch)
            module.load_state_dict({name: value.clone() for name, value in weights.items()}, strict=False)
            module.train()
            trained = dict(module.named_parameters())
            assert trained.keys() == weights.keys()
            plan = RoundPlan(round_, everything, everything, embeddings=True)
            local = LocalModel(module, checkpoint.architecture.encoder, plan, spec, trained)
            matrices = [value for value in trained.values() if value.ndim > 1]
            vectors = [value for value in trained.values() if value.ndim < 2]
            groups = [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
            for epoch in range(config.local_epochs):
                seed = [config.seed, zlib.crc32(f"client-{client}".encode()), round_, epoch]
                for batch in train.batches(rows, collator, config.batch_size, np.random.default_rng(seed)):
                    optimizer.zero_grad()
                    loss(local, batch).backward()
                    optimizer.step()
            results.append((len(rows), {name: value.detach() for name, value in trained.items()}))
        total = sum(size for size, _ in results)
        if deltas:
            for name, value in weights.items():
                mean = sum(size * (new[name] - value).double() for size, new in results) / total
                weights[name] = value + mean.float()
        else:
            weights = {name: sum(size / total * new[name] for size, new in results) for name in weights}
    return weights


SKEWED = {
    **{"method": "full", "dropout": 0.0, "batch_size": 8},
    **{"partitioner": "size-skewed", "partition_weights": "1,2,4"},
}


def test_a_falling_step_size_is_that_of_the_round_on_every_client(
    small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, real = [], train.run

    def run(local: Any, rows: Any, collator: Any, settings: TrainSettings, *others: Any) -> Any:
        used.append((local.plan.round, settings.learning_rate))
        return real(local, rows, collator, settings, *others)

    monkeypatch.setattr(train, "run", run)
    federate(small(learning_rate=0.5, learning_rate_decay="linear"), simulated(2))
    assert used == [(0, 0.5)] * 2 + [(1, 0.25)] * 2


@pytest.mark.parametrize("task", TASKS)
def test_full_method_equals_fedavg_bit_for_bit(small: Settings, task: str) -> None:
    values = small(**SKEWED, task=task, local_epochs=2)
    run = federate(values, simulated(3))
    expected = plain_fedavg(RunConfig.load(values), run.rounds.labels, 3, exact_loss, deltas=True)
    assert_equal(run.tensors, expected)


@pytest.mark.parametrize("task", TASKS)
def test_full_method_equals_fedavg_with_transformers_own_loss(small: Settings, task: str) -> None:
    values = small(**SKEWED, task=task)
    run = federate(values, simulated(3))
    expected = plain_fedavg(RunConfig.load(values), run.rounds.labels, 3, stock_loss, deltas=False)
    assert run.tensors.keys() == expected.keys()
    for name, value in run.tensors.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)  # a step is 5e-4, the largest gap 1e-6


# What a round trains and sends --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_sends_only_what_is_planned(small: Settings, method: str, task: str) -> None:
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
        assert all(update.state.version == 0 for update in asked.sync.updates if update.kind == "value")
    changed = {name for name, state in run.rounds.state.states().items() if state.version}
    assert changed == set().union(*trained.values())
    assert all(math.isfinite(entry.metrics["train_loss"]) for entry in run.outcome.rounds)
    assert run.refusals == []


def test_untrained_tensors_of_the_global_model_stay_those_of_the_base(small: Settings, tiny_bert: Path) -> None:
    run = federate(small(num_rounds=1, weight_decay=0.1), simulated(2))
    base = Checkpoint(tiny_bert)
    for name, value in run.tensors.items():
        if name.startswith(("bert.embeddings.", *(f"bert.encoder.layer.{index}." for index in (0, 1, 2)))):
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
def test_downlink_payload_equals_the_uplink_payload_of_the_round_before(small: Settings, task: str) -> None:
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
        assert sum(getattr(entry, name) for entry in outcome.rounds) == getattr(outcome.cost, name) > 0
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


# Pools that are behind, damaged or gone -----------------------------------------------------------------------


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


@pytest.mark.parametrize("task", ["mlm", "classification"])
def test_healthy_run_needs_no_catch_up_and_leaves_all_pools_up_to_date(small: Settings, task: str) -> None:
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


@pytest.mark.parametrize("damage", [damage_delete, damage_delete_head, damage_truncate, damage_flip_a_bit])
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
    lacking = Weights(run.rounds.weights.checkpoint, lambda part: {}, run.rounds.weights.spec).lacking(HEAD)
    expected = new_tensors(lacking, run.rounds.config.seed)
    expected |= {name: run.rounds.weights.checkpoint.tensor(name) for name in run.tensors if name not in expected}
    for one in sums.values():
        for name, deltas in one.items():
            mean = sum(size * delta.double() for size, delta in deltas) / sum(size for size, _ in deltas)
            expected[name] = expected[name] + mean.float()
    assert_equal(run.tensors, expected)
    assert run.refusals == []


# Clients that are refused -------------------------------------------------------------------------------------


def test_client_with_another_base_is_refused_by_both_fingerprints_and_names_and_the_rest_goes_on(
    small: Settings, tiny_bert: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    other = tmp_path / "other-bert"
    shutil.copytree(tiny_bert, other)
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(tiny_bert)).save_pretrained(other)
    nodes = simulated(3)
    nodes[THIRD]["model-path"] = str(other)
    run = federate(small(num_rounds=1), nodes)
    (refusal,) = run.refusals
    for folder in (other, tiny_bert):
        assert folder.name in refusal.reason
        assert Checkpoint(folder).fingerprint(HeadKind.SEQUENCE)[:12] in refusal.reason
    assert "client-2" in refusal.reason
    assert run.outcome.rounds[0].clients == 2


def test_two_clients_of_one_name_are_refused(small: Settings) -> None:
    nodes = simulated(3)
    nodes[11]["name"] = nodes[THIRD]["name"] = "clinic"
    run = federate(small(num_rounds=1), nodes)
    (refusal,) = run.refusals
    assert "'clinic'" in refusal.reason
    assert sorted(one.name for one in run.participants) == ["client-0", "clinic"]


def test_node_that_comes_back_under_a_new_id_takes_its_own_place(small: Settings) -> None:
    nodes = simulated(3)

    def restart(node: int, reply: Message) -> Message:
        if node == THIRD and round_of(reply) == 1:
            nodes[99] = nodes.pop(THIRD)
        return reply

    run = federate(small(num_rounds=2, round_timeout=1.0), nodes, restart)
    assert [entry.clients for entry in run.outcome.rounds] == [3, 3]


def put(record: str, key: str, value: Any) -> Callable[[Message], None]:
    return lambda reply: reply.content[record].__setitem__(key, value)


def drop(*path: str) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        place: Any = reply.content
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def replace(record: str, value: Any) -> Callable[[Message], None]:
    return lambda reply: reply.content.__setitem__(record, value)


def drop_head(reply: Message) -> None:
    del reply.content["parts"]["head/values"], reply.content["headers"][HEAD]


def rename_a_tensor(reply: Message) -> None:
    headers = reply.content["headers"]
    headers[HEAD] = headers[HEAD].replace("classifier.bias", "x.bias")


def reshape(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Message], None]:
    def apply(reply: Message) -> None:
        parts = reply.content["parts"]
        parts["head/values"] = Array(change(parts["head/values"].numpy().copy()))

    return apply


def poison(value: float) -> Callable[[Message], None]:
    def change(values: np.ndarray) -> np.ndarray:
        values[7] = value
        return values

    return reshape(change)


def send_unasked(reply: Message) -> None:
    content = reply.content
    content["parts"]["block.0/values"] = content["parts"]["block.3/values"]
    content["headers"]["block.0"] = content["headers"]["block.3"].replace("layer.3.", "layer.0.")


def send_bytes(data_: bytes) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        array = reply.content["parts"]["head/values"]
        reply.content["parts"]["head/values"] = Array(array.dtype, array.shape, array.stype, data_)

    return change


def npy_header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


SPOILT: dict[str, tuple[Callable[[Message], None], str]] = {
    "nan": (poison(math.nan), "nan|finite"),
    "infinity": (poison(math.inf), "inf|finite"),
    "absurd step": (poison(2e6), "more than 1e\\+06: lower learning-rate"),
    "unasked tensors": (send_unasked, "nobody asked for"),
    "missing part": (drop_head, "no delta of 'head'"),
    "array without header": (drop("headers", HEAD), "JSON"),
    "header without array": (drop("parts", "head/values"), "arrays sent"),
    "two dimensions": (reshape(lambda values: values[:, None]), "one-dimensional"),
    "float64": (reshape(lambda values: values.astype(np.float64)), "float32"),
    "too short": (reshape(lambda values: values[:-1]), "entries"),
    "too long": (reshape(lambda values: np.append(values, values[:1])), "entries"),
    "another tensor's name": (rename_a_tensor, "not asked for"),
    "no examples": (put("counts", "num-examples", 0), "0 examples"),
    "negative examples": (put("counts", "num-examples", -3), "malformed"),
    "examples not whole": (put("counts", "num-examples", 2.5), "malformed"),
    "unknown status": (put("reply", "status", "fine"), "malformed"),
    "cost is nan": (put("costs", "seconds", math.nan), "malformed"),
    "cost is negative": (put("costs", "train_flops", -1.0), "malformed"),
    "no costs": (drop("costs"), "malformed"),
    "no counts": (drop("counts"), "malformed"),
    "no arrays": (drop("parts"), "malformed"),
    "record of another type": (replace("parts", MetricRecord({"a": 1.0})), "malformed"),
    "array without bytes": (send_bytes(b""), "malformed"),
    "array of garbage": (send_bytes(b"garbage" * 20), "malformed"),
    "array that claims terabytes": (send_bytes(npy_header("(100000000000000,)")), "malformed"),
    "state of endless nesting": (put("held", HEAD, "[" * 100_000), "malformed"),
    "failure": (replace("reply", ConfigRecord({"status": "failed", "error": "disk full"})), "disk full"),
}


Tamper = Callable[[int, Message], Message | None]


@pytest.fixture(scope="module")
def without_third() -> dict[str, Tensors]:
    """Keep the result of the run in which client-2 does not take part, once it was made."""
    return {}


def check_left_out(values: dict[str, Any], without: dict[str, Tensors], tamper: Tamper, reason: str) -> Federated:
    """Run with client-2 spoilt: it is refused in one line and all else is as if it had not been there."""
    if not without:
        nodes = simulated(3)
        del nodes[THIRD]
        without["tensors"] = federate(values, nodes).tensors
    run = federate(values, simulated(3), tamper)
    (refusal,) = run.refusals
    assert refusal.client == "client-2"
    assert re.search(reason, refusal.reason), refusal.reason
    assert len(refusal.reason.splitlines()) == 1
    assert run.outcome.rounds[0].clients == 2
    assert_equal(run.tensors, without["tensors"])
    return run


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_reply_is_refused_whole_in_one_line_and_the_rest_goes_on(
    small: Settings, without_third: dict[str, Tensors], flower_log: list[str], kind: str
) -> None:
    spoil, reason = SPOILT[kind]

    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and round_of(reply):
            spoil(reply)
        return reply

    check_left_out(small(num_rounds=1), without_third, tamper, reason)
    assert len([line for line in flower_log if "client-2 is left out" in line]) == 1


def test_node_error_is_refused_in_one_line(small: Settings, without_third: dict[str, Tensors]) -> None:
    def tamper(node: int, reply: Message) -> Message:
        if node != THIRD or not round_of(reply):
            return reply
        return Message(Error(3, "Node\nUnavailable"), reply_to=grid_message(reply))

    check_left_out(small(num_rounds=1), without_third, tamper, "Node")


def grid_message(reply: Message) -> Message:
    """Return a message that what answers it answers the same as `reply` does."""
    message = Message(reply.content, dst_node_id=reply.metadata.src_node_id, message_type="train", group_id="1")
    message.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return message


def test_silence_is_refused_after_the_timeout(small: Settings, without_third: dict[str, Tensors]) -> None:
    def lose(node: int, reply: Message) -> Message | None:
        return None if node == THIRD and round_of(reply) else reply

    check_left_out(small(num_rounds=1, round_timeout=1.0), without_third, lose, "round-timeout")


@pytest.mark.parametrize("kind", ["query", "train"])
def test_a_message_that_flower_does_not_take_costs_its_node_only_and_books_no_bytes(small: Settings, kind: str) -> None:
    class Full(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            (message,) = messages
            lost = message.metadata.dst_node_id == THIRD and message.metadata.message_type == kind
            return [] if lost else super().push_messages([message])

    values = small(num_rounds=1, round_timeout=60.0)
    report = server_app.run(Full(client_app.app, values, simulated(3)), RunConfig.load(values))
    assert report["refused"]
    assert all(refusal["reason"].startswith("Flower did not take the ") for refusal in report["refused"])
    assert report["rounds"][0]["clients"] == 2


def test_error_of_several_lines_becomes_one_line(small: Settings, without_third: dict[str, Tensors]) -> None:
    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and round_of(reply):
            reply.content["reply"] = ConfigRecord({"status": "failed", "error": "no\nfedbt: error: forged"})
        return reply

    check_left_out(small(num_rounds=1), without_third, tamper, "no")


def drop_everything(reply: Message) -> None:
    for name in list(reply.content):
        del reply.content[name]


QUERY_SPOILT: dict[str, Callable[[Message], None]] = {
    "nothing": drop_everything,
    "no reply record": drop("reply"),
    "no status": drop("reply", "status"),
    "reply of another type": replace("reply", MetricRecord({"status": 1})),
    "unknown status": put("reply", "status", "fine"),
    "no capabilities": drop("capabilities"),
    "no labels": drop("labels"),
    "name is a number": put("capabilities", "name", 3),
    "negative examples": put("capabilities", "examples", -1),
    "no examples": put("capabilities", "examples", 0),
    "unequal lists": put("labels", "counts", [1]),
    "negative label count": replace("labels", ConfigRecord({"names": ["heart"], "counts": [-1]})),
    "held is no JSON": replace("held", ConfigRecord({"head": "x"})),
}


@pytest.mark.parametrize("kind", QUERY_SPOILT)
def test_spoilt_answer_to_the_query_is_refused_in_one_line_and_the_rest_goes_on(small: Settings, kind: str) -> None:
    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and reply.metadata.message_type == "query":
            QUERY_SPOILT[kind](reply)
        return reply

    run = federate(small(num_rounds=1), simulated(3), tamper)
    (refusal,) = run.refusals
    assert refusal.reason
    assert len(refusal.reason.splitlines()) == 1
    assert [one.name for one in run.participants] == ["client-0", "client-1"]


def test_spoilt_metric_of_one_client_does_not_spoil_the_evaluation(small: Settings) -> None:
    def tamper(node: int, reply: Message) -> Message:
        if node == THIRD and reply.metadata.message_type == "evaluate":
            reply.content["metrics"] = MetricRecord({"loss": math.nan, "accuracy": math.inf})
        return reply

    run = federate(small(num_rounds=1, client_evaluation="final"), simulated(3), tamper)
    assert all(math.isfinite(value) for value in run.outcome.client_metrics.values())


def test_when_every_client_failed_the_run_stops_with_the_reason_and_leaves_no_result(small: Settings) -> None:
    values = small()

    def fail(node: int, reply: Message) -> Message:
        if round_of(reply) == 2:
            reply.content["reply"] = ConfigRecord({"status": "failed", "error": f"disk {node} full"})
        return reply

    with pytest.raises(FedBTError, match=r"round 2: 0 of 3 clients .*disk 1\d full"):
        server_app.run(RecordingGrid(values, simulated(3), fail), RunConfig.load(values))
    folder = Path(values["output-dir"])
    assert not (folder / "report.json").exists()
    assert not (folder / "model").exists()


# Too few usable replies ----------------------------------------------------------------------------------------


def failing(round_: int, nodes: set[int], times: int = 1000) -> Tamper:
    """Return a tamper by which the first `times` training replies of `nodes` in that round are failures."""
    left = [times]

    def tamper(node: int, reply: Message) -> Message:
        if round_of(reply) == round_ and node in nodes and left[0]:
            left[0] -= 1
            reply.content["reply"] = ConfigRecord({"status": "failed", "error": f"disk {node} full"})
        return reply

    return tamper


def test_a_round_below_the_minimum_stops_the_run_and_changes_nothing_but_the_books(small: Settings) -> None:
    values = small(codec="int4", min_replies=2, num_rounds=3)
    config, grid = RunConfig.load(values), RecordingGrid(values, simulated(3), failing(2, {11, THIRD}))
    kept: list[tuple[Any, ...]] = []
    books: list[Outcome] = []

    def keep(progress: Progress) -> None:
        parts = {name: part.state for name, part in progress.parts.items()}
        books.append(progress.outcome)
        kept.append((parts, len(progress.outcome.rounds), progress.outcome.cost.uplink_bytes, len(progress.refusals)))

    strategy = FedBT(config, Checkpoint(Path(config.model)))
    with pytest.raises(FedBTError, match=r"round 2: 1 of 3 .*min-replies=2 \(disk 12 full\): .*--resume .*run`$"):
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
    values = small(codec=codec, min_replies=2, below_minimum="repeat", num_rounds=3, client_evaluation="final")
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
        assert sum(getattr(entry, name) for entry in run.outcome.rounds) == getattr(run.outcome.cost, name)
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
    values = small(participation=0.25, min_replies=2, below_minimum="repeat", method="head", max_train_examples=16)
    run = federate(values, simulated(4), failing(1, {10, 11, THIRD, 13}, times=2))
    first, second = asked(run)[1][:2], asked(run)[1][2:]
    assert len(set(first)) == len(set(second)) == 2
    assert set(first) != set(second)


def test_when_no_client_can_take_part_the_reasons_are_named(small: Settings) -> None:
    nodes = simulated(2, **{"model-path": "/no/such/folder"})
    with pytest.raises(FedBTError, match=r"no client can take part: .*model folder folder does not exist"):
        federate(small(), nodes)


def test_longer_rows_than_the_base_has_positions_for_are_refused_by_key(small: Settings, tmp_path: Path) -> None:
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

    with pytest.raises(FedBTError, match=r"ValueError at test_strategy\.py:\d+") as raised:
        federate(values, simulated(2), watch)
    assert "SECRET" not in str(raised.value)
    assert "SECRET" not in "\n".join(flower_log)
    assert len(received) == 4
    assert "SECRET" not in "".join(str(dict(reply.content)) for reply in received)


# Labels -------------------------------------------------------------------------------------------------------


def write_site(folder: Path, labels: str) -> Path:
    folder.mkdir()
    rows = [{"text": f"the patient has severe {label} failure", "label": label} for label in labels.split() * 6]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sites(tmp_path: Path, *labels: str) -> dict[int, dict[str, Any]]:
    return {
        10 + index: {"name": f"site-{index}", "data-path": str(write_site(tmp_path / f"site-{index}", one))}
        for index, one in enumerate(labels)
    }


def test_labels_are_merged_by_name_in_sorted_order_and_clients_may_lack_some(small: Settings, tmp_path: Path) -> None:
    nodes = sites(tmp_path, "liver heart", "kidney heart", "liver")
    run = federate(small(dataset="none", heldout_fraction=0.2, client_evaluation="final"), nodes)
    assert run.rounds.labels == ("heart", "kidney", "liver")
    assert run.tensors["classifier.weight"].shape == (3, 32)
    assert run.refusals == []
    assert [entry.clients for entry in run.outcome.rounds] == [3, 3]


def test_order_in_which_clients_answer_does_not_change_the_labels(small: Settings, tmp_path: Path) -> None:
    nodes = sites(tmp_path, "liver heart", "kidney heart", "liver")
    backwards = dict(reversed(nodes.items()))
    values = small(dataset="none", num_rounds=1)
    ones, others = federate(values, nodes), federate(values, backwards)
    assert ones.rounds.labels == others.rounds.labels
    assert_equal(ones.tensors, others.tensors)


def test_ner_labels_have_both_tags_of_every_entity(small: Settings) -> None:
    run = federate(small(task="ner", num_rounds=1), simulated(2))
    assert run.rounds.labels == ("B-Organ", "B-Sign", "I-Organ", "I-Sign", "O")


def test_configured_labels_keep_their_order(small: Settings) -> None:
    run = federate(small(labels="liver, heart ,kidney", num_rounds=1), simulated(2))
    assert run.rounds.labels == ("liver", "heart", "kidney")


def test_client_with_a_label_outside_the_configured_set_is_refused(small: Settings, tmp_path: Path) -> None:
    nodes = sites(tmp_path, "liver heart", "heart spleen")
    run = federate(small(dataset="none", labels="heart,liver", num_rounds=1), nodes)
    assert [one.name for one in run.participants] == ["site-0"]
    (refusal,) = run.refusals
    assert "a label that is not one of heart,liver" in refusal.reason
    assert "spleen" not in refusal.reason  # a cell of the site


def test_client_that_joins_later_with_a_new_label_is_refused(small: Settings, tmp_path: Path) -> None:
    everyone = sites(tmp_path, "liver heart", "heart liver", "heart spleen")
    nodes = {node: everyone[node] for node in (10, 11)}

    def join(node: int, reply: Message) -> Message:
        if round_of(reply):
            nodes[THIRD] = everyone[THIRD]
        return reply

    run = federate(small(dataset="none"), nodes, join)
    (refusal,) = run.refusals
    assert "spleen" in refusal.reason
    assert [entry.clients for entry in run.outcome.rounds] == [2, 2]


def test_client_that_joins_later_takes_part_from_then_on(small: Settings) -> None:
    everyone = simulated(3)
    nodes = {node: everyone[node] for node in (10, 11)}

    def join(node: int, reply: Message) -> Message:
        if round_of(reply) == 2:
            nodes[THIRD] = everyone[THIRD]
        return reply

    run = federate(small(num_rounds=3, client_evaluation="final"), nodes, join)
    assert [entry.clients for entry in run.outcome.rounds] == [2, 2, 3]
    assert run.outcome.cost.catch_up_bytes > 0
    assert_pools_up_to_date(run)


# Sampling and seeds -------------------------------------------------------------------------------------------


def asked(run: Federated) -> dict[int, list[int]]:
    """Return the nodes asked to train, by round."""
    nodes: dict[int, list[int]] = {}
    for message in run.grid.sent:
        if round_ := round_of(message):
            nodes.setdefault(round_, []).append(message.metadata.dst_node_id)
    return nodes


def test_participation_of_a_half_asks_half_of_the_clients_by_the_seed(small: Settings) -> None:
    values = small(participation=0.5, num_rounds=4, max_train_examples=16, method="head")
    first, again = asked(federate(values, simulated(4))), asked(federate(values, simulated(4)))
    assert first == again
    assert all(len(set(nodes)) == 2 for nodes in first.values())
    assert len({tuple(nodes) for nodes in first.values()}) > 1
    assert asked(federate(values | {"seed": 6}, simulated(4))) != first


def test_clients_left_out_of_some_rounds_are_up_to_date_in_the_end(small: Settings) -> None:
    values = small(participation=0.5, num_rounds=4, client_evaluation="final", max_train_examples=16)
    run = federate(values, simulated(4))
    assert run.refusals == []
    assert_pools_up_to_date(run)


@pytest.mark.parametrize("codec", ["float32", "int2"])
def test_what_clients_missed_as_they_were_not_drawn_is_downlink(small: Settings, codec: str) -> None:
    values = small(participation=0.5, num_rounds=4, codec=codec, method="full", max_train_examples=16)
    run = federate(values, simulated(4))
    assert run.outcome.cost.catch_up_bytes == 0
    assert run.outcome.full_bytes_down == run.outcome.full_bytes_up * 6 / 8  # two of four clients, none in round 1


def test_training_that_diverged_is_refused_by_the_client_itself(small: Settings) -> None:
    with pytest.raises(FedBTError, match=r"training diverged, .* is not finite: lower learning-rate"):
        federate(small(learning_rate=1e38, num_rounds=1), simulated(2))


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_gives_the_same_model_bit_for_bit_and_another_does_not(small: Settings, task: str) -> None:
    first = federate(small(task=task), simulated(2)).tensors
    assert_equal(first, federate(small(task=task), simulated(2)).tensors)
    other = federate(small(task=task, seed=6), simulated(2)).tensors
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_lowers_the_loss(settings: Settings) -> None:
    values = settings(task="mlm", num_rounds=6, method="full", learning_rate=5e-3, client_evaluation="never")
    losses = [entry.metrics["train_loss"] for entry in federate(values, simulated(2)).outcome.rounds]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("codec", ["bf16", "int8+zstd", "int4", "int2"])
def test_pools_equal_the_global_state_bit_for_bit_with_lossy_codecs_too(small: Settings, codec: str) -> None:
    run = federate(small(codec=codec, client_evaluation="final"), simulated(2))
    assert run.refusals == []
    assert run.outcome.cost.catch_up_bytes == 0
    assert_pools_up_to_date(run)


def test_messages_travel_unchanged(small: Settings) -> None:
    run = federate(small(num_rounds=1), simulated(2))
    for message in run.grid.sent + run.grid.received:
        assert over_the_wire(message).content == message.content
